"""Methods that measure the inputs of layers: the sample of a domain, general text, and the sum over earlier domains."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from das_ds.config import RunConfig
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.methods.base import C, Method
from das_ds.models.size import ModelSize

if TYPE_CHECKING:
    from das_ds.context import CorpusSample, RunContext
    from das_ds.softmask.direction import DirectionImportance

logger = logging.getLogger(__name__)

TOTAL = "total/"
"""Beginning of the names of the sum over domains in checkpoints."""
LATEST = "latest/"
"""Beginning of the names of the moments there that are being measured."""
PREPARED = "is_prepared"


class MeasuredInputs(Method[C]):
    """Keeps the second moments of the inputs of all masked matrices: their sum, and those of the present domain.

    The sum is `_importance`, None while there is nothing in it; what is measured is `_latest`. The keys `num_samples`,
    `batch_size` and `general` of a subclass's config say what is measured.

    Raises:
        ModelError: the network has layers whose inputs cannot be measured.
    """

    planned_matrices = "inputs"

    untrained_weights = "have random values"
    """What weights that no file held do where general text is protected, for the warning."""

    def __init__(self, run: RunContext) -> None:
        from das_ds.softmask.input_layout import build_input_layout
        from das_ds.softmask.linear_inputs import find_masked_matrices

        super().__init__(run)
        # Before anything is measured: a network whose layers cannot be masked is refused.
        matrices = find_masked_matrices(run)
        self._inputs = build_input_layout(matrices, run.engine.weights.shards, run.engine.ranks)
        self._importance: DirectionImportance | None = None
        self._latest: DirectionImportance | None = None
        self._is_prepared = False
        """Whether `_importance` has what was known before the first domain."""

    def state_dict(self) -> ComponentState:
        """Sum of the moments, and those of the present domain that are measured; each with its owner."""
        states = [
            importance.state_dict(prefix)
            for prefix, importance in ((TOTAL, self._importance), (LATEST, self._latest))
            if importance is not None
        ]
        return ComponentState(
            owned={name: moment for state in states for name, moment in state.owned.items()},
            metadata={PREPARED: self._is_prepared}
            | {key: value for state in states for key, value in state.metadata.items()},
        )

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """In host memory of the owners."""
        from das_ds.softmask.direction import DirectionImportance

        self._importance = DirectionImportance.load_state_dict(self.run, self._inputs, saved, TOTAL)
        self._latest = DirectionImportance.load_state_dict(self.run, self._inputs, saved, LATEST)
        self._is_prepared = saved.metadata[PREPARED]

    def _measure_known(self, sample: CorpusSample | None, earlier: DirectionImportance | None = None) -> None:
        """Begin the sum with an earlier one, and the moments of a text that the model knew before the first domain."""
        if sample is not None:
            self._warn_of_untrained_weights()
            earlier = self._measure(sample).accumulate(earlier)
            self._latest = None
        self._importance = earlier
        self._is_prepared = True

    def _measure(self, corpus: CorpusSample) -> DirectionImportance:
        """Moments of a sample; what a run that is stopped has of them is in its checkpoint, as `_latest`."""
        from das_ds.softmask.direction import DirectionImportance

        if self._latest is None:
            self._latest = DirectionImportance(self.run, self._inputs, {}, corpus.num_tokens)
        self._latest.measure(corpus, num_measured(self.run.config, self._inputs.widest))
        return self._latest

    def _warn_of_untrained_weights(self) -> None:
        from das_ds.models.loading import get_weights_record

        record = get_weights_record(self.run.network.model)
        if record is None or not record["drawn"] or self.run.config.model.head_warmup_steps:
            return
        if self.run.engine.ranks.info.is_main:
            drawn = record["drawn"]
            logger.warning(
                "method.general: protects general text from the first step on, but no file held %s%s, which %s; set "
                "model.head_warmup_steps, or method.general=false",
                drawn[0],
                "" if len(drawn) == 1 else f" and {len(drawn) - 1} more",
                self.untrained_weights,
            )


def num_measured(config: RunConfig, widest: int) -> int:
    """Sequences of a sample: `num_samples`, or as many as the widest input needs."""
    from das_ds.softmask.input_moments import default_num_samples

    sample = config.method.sample_size
    assert sample is not None, "the method measures"
    if sample.num_samples is not None:
        return sample.num_samples
    return default_num_samples(widest, config.data.sequence_length)


def num_passed(config: RunConfig, size: ModelSize) -> int:
    """Sequences that pass the network for one sample, which every group of inputs reads once."""
    from das_ds.softmask.input_layout import group_inputs
    from das_ds.softmask.input_moments import SUMS_BYTES

    widths = {matrix.input: matrix.width for matrix in size.matrices}
    return num_measured(config, max(widths.values())) * len(group_inputs(widths, SUMS_BYTES))


def check_general_text(config: RunConfig, general: bool | Literal["generated"] | None) -> None:
    """Check that there is general text where `method.general` asks for it.

    Raises:
        ConfigError: there is none.
    """
    if general is True and not has_general_text(config):
        raise ConfigError("method.general: found true without training text, expected general: {train: ...}")


def has_general_text(config: RunConfig) -> bool:
    """Whether there is training text of `general`."""
    return config.general is not None and bool(config.general.train)
