"""Save points: between two steps or batches all ranks agree on saving and stopping."""

from __future__ import annotations

import logging
from typing import Protocol

from das_ds.checkpoint.manifest import CheckpointMetadata, RunState
from das_ds.checkpoint.saver import AsyncCheckpointer, SaveReport
from das_ds.distributed.flag_sync import Flags, FlagSync
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import ComponentState
from das_ds.errors import DasError, StoppedError
from das_ds.fault_tolerance.shutdown import ShutdownHandler
from das_ds.fault_tolerance.watchdog import Watchdog
from das_ds.tracking.names import CHECKPOINT_MIB, CHECKPOINT_STALL_S, CHECKPOINT_WRITE_S, CHECKPOINTS

logger = logging.getLogger(__name__)


class Saveable(Protocol):
    """A run as a save point sees it."""

    def state_dicts(self) -> dict[str, ComponentState]:
        """Component -> its state; called only where a checkpoint begins."""

    def checkpoint_metadata(self, run: RunState) -> CheckpointMetadata:
        """Further facts for the manifest."""

    def describe(self, run: RunState) -> str:
        """Where the run is, in words: the domain and the step."""

    def failure(self) -> DasError | None:
        """An error of only this rank that has to end the run, such as a full disk where metrics are written."""


class SavePoint:
    """Reached by all ranks together: begins and publishes checkpoints, and stops the run when it is asked to.

    Flags of one rank reach the others at the next save point, so that no rank waits for another.

    Args:
        ranks: the process group.
        saveable: the run.
        checkpointer: writes checkpoints.
        shutdown: requests to this rank.
        watchdog: its time-out is suspended while a checkpoint is written.
    """

    def __init__(
        self,
        ranks: ProcessGroup,
        saveable: Saveable,
        checkpointer: AsyncCheckpointer,
        shutdown: ShutdownHandler,
        watchdog: Watchdog,
    ) -> None:
        self._ranks = ranks
        self._saveable = saveable
        self._checkpointer = checkpointer
        self._shutdown = shutdown
        self._watchdog = watchdog
        self._flag_sync = FlagSync(ranks)
        self._is_fresh = False
        self._reports: list[SaveReport] = []

    def check(self, run: RunState, *, save: bool) -> None:
        """Publish, save or stop if that is due.

        Args:
            run: progress of the run.
            save: whether to save here without a request; the same on every rank.

        Raises:
            StoppedError: the run was asked to stop, and everything is saved.
            CheckpointError: a checkpoint could not be written.
            DasError: on every rank, the `failure` of any rank.
        """
        request = self._shutdown.poll(files=self._ranks.info.is_main)
        failure = self._saveable.failure()
        checkpointer = self._checkpointer
        flags = self._flag_sync.exchange(
            Flags(
                stop=request.stop is not None,
                save=request.save,
                writing=checkpointer.is_writing,
                failed=checkpointer.has_failed,
                ends=failure is not None,
            )
        )
        # All ranks read the same reduced flags, so all take the same branches, in which they meet in collectives.
        if flags.ends:
            self._ranks.raise_on_all_ranks(failure)
        # Flags from the save point at which this checkpoint began, before it was started, do not concern it.
        if checkpointer.is_open and not self._is_fresh and (flags.failed or not flags.writing):
            self._publish()
        self._is_fresh = False
        if flags.stop:
            self._stop(run, request.stop)
        if save or flags.save:
            self._start(run)
        if flags.save:
            self._ranks.run_on_main(self._shutdown.remove_save_file)

    def save(self, run: RunState) -> None:
        """Save, and wait until the checkpoint is published."""
        self._start(run)
        if self._checkpointer.is_open:
            self._publish()

    def wait(self) -> None:
        """Wait for a checkpoint that is being written.

        Raises:
            DasError: as `check` does.
        """
        if self._checkpointer.is_open:
            self._publish()
        self._checkpointer.wait()
        # No exchange may be pending when the process group is destroyed.
        self._flag_sync.wait()
        self._ranks.raise_on_all_ranks(self._saveable.failure())

    def pop_metrics(self) -> dict[str, float]:
        """Costs of the checkpoints published since the last call, as metrics; {} where there were none."""
        reports = self._reports
        self._reports = []
        if not reports:
            return {}
        return {
            CHECKPOINTS: len(reports),
            CHECKPOINT_STALL_S: sum(report.stall_seconds for report in reports),
            CHECKPOINT_WRITE_S: sum(report.write_seconds for report in reports),
            CHECKPOINT_MIB: sum(report.mebibytes for report in reports),
        }

    def _start(self, run: RunState) -> None:
        # One checkpoint at a time: if the disk is slower than the interval, training waits here.
        if self._checkpointer.is_open:
            self._publish()
        with self._watchdog.suspend_timeout("saving"):
            states = self._saveable.state_dicts()
            self._checkpointer.start(run, states, self._saveable.checkpoint_metadata(run))
        self._is_fresh = True
        if not self._checkpointer.asynchronous:
            self._publish()

    def _publish(self) -> None:
        with self._watchdog.suspend_timeout("saving"):
            report = self._checkpointer.publish()
        self._reports.append(report)
        logger.info("saved %s: %.1f MiB, training waited %.2f s", report.name, report.mebibytes, report.stall_seconds)

    def _stop(self, run: RunState, local_reason: str | None) -> None:
        self.save(run)
        reasons = self._flag_sync.stop_reasons(local_reason)
        self._ranks.run_on_main(self._shutdown.remove_stop_file)
        raise StoppedError(
            f"stopped: {reasons}; saved at {self._saveable.describe(run)}, where the same command resumes"
        )
