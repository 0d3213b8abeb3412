"""Services of a run: the objects that every part of training uses, built once per start."""

from __future__ import annotations

from dataclasses import dataclass

from das_ds.checkpoint.store import CheckpointStore
from das_ds.distributed.process_group import ProcessGroup
from das_ds.fault_tolerance.shutdown import ShutdownHandler
from das_ds.fault_tolerance.watchdog import Watchdog
from das_ds.run_dir import RunDir
from das_ds.tracking.tracker import Tracker
from das_ds.training.hub_uploads import HubUploads


@dataclass(frozen=True)
class RunServices:
    """Everything a run needs in addition to its config, data and model."""

    process_group: ProcessGroup
    run_dir: RunDir
    tracker: Tracker
    checkpoints: CheckpointStore
    shutdown: ShutdownHandler
    """Requests to stop or save."""
    watchdog: Watchdog
    """Gets the progress of this rank."""
    uploads: HubUploads
    """Of exported models; used on rank 0."""
