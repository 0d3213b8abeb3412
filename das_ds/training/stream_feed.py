"""Streams of a run while it trains: windows made ahead of its steps, and positions in the text for checkpoints."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict
from itertools import count

from das_ds.data.batch import Batch
from das_ds.data.loader import SampleStream
from das_ds.data.stream_windows import TokenStream, remove_ahead
from das_ds.data.text_stream import StreamPosition
from das_ds.data.window_feeder import WindowFeeder
from das_ds.distributed.state import ComponentState, SavedComponentState

Windows = Mapping[str, int]
"""Name of a stream -> a window."""


class StreamPositions:
    """Where training is in its streams, a component of checkpoints.

    Samples follow from their numbers; the positions only save reading a stream from its beginning where the cache no
    longer has them, or another machine goes on.

    Args:
        streams: name -> stream, all of the run.
    """

    def __init__(self, streams: Mapping[str, TokenStream]) -> None:
        self._streams = streams
        self._windows: Windows = {}

    def advance(self, windows: Windows) -> None:
        """Note the windows that the next step needs."""
        self._windows = windows

    def state_dict(self) -> ComponentState:
        """Streams that are trained on, with a window and where it begins in the text."""
        positions = {name: self._streams[name].position(window) for name, window in self._windows.items()}
        return ComponentState(
            metadata={
                name: {"window": self._windows[name], **asdict(position)}
                for name, position in positions.items()
                if position is not None
            }
        )

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Note the positions in the cache.

        Raises:
            DataError: it cannot be written.
        """
        for name, values in saved.metadata.items():
            if name in self._streams:
                position = {key: value for key, value in values.items() if key != "window"}
                self._streams[name].remember(values["window"], StreamPosition(**position))


def feed_steps(
    steps: Iterator[list[Batch]],
    samples: SampleStream,
    *,
    first_step: int,
    global_batch_size: int,
    positions: StreamPositions,
    is_feeding: bool,
) -> Generator[list[Batch]]:
    """The steps, whose streams are read ahead; windows that no step needs any more are removed.

    Args:
        steps: micro-batches of every step from `first_step` on.
        samples: of these steps.
        first_step: number of steps already done.
        global_batch_size: samples of a step.
        positions: told of every step.
        is_feeding: whether this rank makes windows for those of its node.
    """
    streams = {stream.spec.name: stream for stream, _ in samples.windows(0)}
    feeder = WindowFeeder([stream.spec for stream in streams.values()]) if is_feeding else None
    windows = _windows(samples, first_step * global_batch_size)
    try:
        for step in count(first_step + 1):
            if feeder is not None:
                feeder.advance(windows)
            batches = next(steps, None)
            if batches is None:
                break
            # A checkpoint after this step is continued with the next one.
            windows = _windows(samples, step * global_batch_size)
            positions.advance(windows)
            yield batches
    finally:
        if feeder is not None:
            feeder.close()
    if is_feeding:
        # All ranks have their last batch, because this one has taken the last step with them.
        for name, window in windows.items():
            remove_ahead(streams[name], window)


def _windows(samples: SampleStream, number: int) -> Windows:
    return {stream.spec.name: window for stream, window in samples.windows(number)}
