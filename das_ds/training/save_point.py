"""Between two steps or batches: what all ranks agree to do about saving and stopping."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from das_ds.checkpoint.manifest import RunState
from das_ds.checkpoint.saver import AsyncCheckpointer, SaveReport
from das_ds.distributed.flag_sync import Flags, FlagSync
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import ComponentState
from das_ds.errors import DasError, StoppedError
from das_ds.fault_tolerance.shutdown import ShutdownHandler
from das_ds.fault_tolerance.watchdog import Watchdog
from das_ds.tracking.names import CHECKPOINT_MIB, CHECKPOINT_STALL_S, CHECKPOINT_WRITE_S, CHECKPOINTS

logger = logging.getLogger(__name__)

Parts = dict[str, ComponentState]


class SavePoint:
    """Passed by all ranks together; begins checkpoints, makes them visible, ends the run when it is asked to stop.

    What ranks report reaches all of them one boundary later, so that none waits for the others.

    Args:
        ranks: the process group.
        saver: writes checkpoints.
        requests: what this rank was asked for.
        watchdog: is told that writing may take any time.
        save_arguments: gives what `AsyncCheckpointer.start` needs besides state.
        failure: gives what this rank alone has found to end the run, as a disk that is full where metrics go.
    """

    def __init__(
        self,
        ranks: ProcessGroup,
        saver: AsyncCheckpointer,
        requests: ShutdownHandler,
        watchdog: Watchdog,
        save_arguments: Callable[[RunState], dict[str, Any]],
        failure: Callable[[], DasError | None] = lambda: None,
    ) -> None:
        self._ranks, self._saver, self._requests, self._watchdog = ranks, saver, requests, watchdog
        self._save_arguments, self._failure = save_arguments, failure
        self._agreement = FlagSync(ranks)
        self._is_fresh = False
        self._reports: list[SaveReport] = []

    def pass_by(self, run: RunState, parts: Callable[[], Parts], *, save: bool) -> None:
        """Do what is due.

        Args:
            run: where the run stands.
            parts: gives part of the program -> its state; called where a checkpoint begins.
            save: whether one is due here in any case; the same on every rank.

        Raises:
            StoppedError: the run was asked to stop; everything is saved.
            CheckpointError: a checkpoint could not be written.
            DasError: on every rank, the `failure` of any.
        """
        wanted, failure = self._requests.poll(files=self._ranks.info.is_main), self._failure()
        saver = self._saver
        agreed = self._agreement.exchange(
            Flags(wanted.stop is not None, wanted.save, saver.is_writing, saver.has_failed, failure is not None)
        )
        if agreed.ends:
            self._ranks.agree(failure)
        if self._saver.is_open and not self._is_fresh and (agreed.failed or not agreed.writing):
            self._publish()
        # What was reported at the boundary where a checkpoint began says nothing about it.
        self._is_fresh = False
        if agreed.stop:
            self._stop(run, parts(), wanted.stop)
        if save or agreed.save:
            self._begin(run, parts())
        if agreed.save:
            self._ranks.run_on_main(self._requests.remove_save_file)

    def save(self, run: RunState, parts: Parts) -> None:
        """Save and wait until the checkpoint is visible."""
        self._begin(run, parts)
        if self._saver.is_open:
            self._publish()

    def settle(self) -> None:
        """Wait for a checkpoint that is being written.

        Raises:
            DasError: as `pass_by` does.
        """
        if self._saver.is_open:
            self._publish()
        self._saver.close()
        self._agreement.settle()
        self._ranks.agree(self._failure())

    def take_reports(self) -> dict[str, float]:
        """What checkpoints that became visible since the last call cost, as metrics; {} where none did."""
        reports, self._reports = self._reports, []
        if not reports:
            return {}
        return {
            CHECKPOINTS: len(reports),
            CHECKPOINT_STALL_S: sum(report.stall_seconds for report in reports),
            CHECKPOINT_WRITE_S: sum(report.write_seconds for report in reports),
            CHECKPOINT_MIB: sum(report.mebibytes for report in reports),
        }

    def _begin(self, run: RunState, parts: Parts) -> None:
        if self._saver.is_open:
            self._publish()
        with self._watchdog.suspend_timeout("saving"):
            self._saver.start(run, parts, **self._save_arguments(run))
        self._is_fresh = True
        if not self._saver.asynchronous:
            self._publish()

    def _publish(self) -> None:
        with self._watchdog.suspend_timeout("saving"):
            report = self._saver.publish()
        self._reports.append(report)
        logger.info("saved %s: %.1f MiB, training waited %.2f s", report.name, report.mebibytes, report.stall_seconds)

    def _stop(self, run: RunState, parts: Parts, local_reason: str | None) -> None:
        self.save(run, parts)
        reasons = self._agreement.reasons(local_reason)
        self._ranks.run_on_main(self._requests.remove_stop_file)
        raise StoppedError(
            f"stopped on {reasons}: {run.phase} {run.domains_done}, step {run.domain_step}, is saved; the same command "
            "continues here"
        )
