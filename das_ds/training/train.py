"""One start of a run: open its folder, find where to continue, and go on until it is finished or asked to stop."""

from __future__ import annotations

import sys

from das_ds.checkpoint.manifest import Manifest
from das_ds.checkpoint.store import CheckpointStore, find_latest_valid
from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.distributed.process_group import ProcessGroup, leave
from das_ds.errors import EXIT_USER_ERROR, CheckpointError, StoppedError
from das_ds.fault_tolerance.shutdown import ShutdownHandler
from das_ds.fault_tolerance.watchdog import Watchdog
from das_ds.models.loading import check_files, find_spec, weights_folder
from das_ds.reporting.results import Results
from das_ds.run_dir import METRICS_FILE, RESULTS_FILE, RunDir, open_run_dir
from das_ds.tracking.tracker import Tracker, build_tracker
from das_ds.tracking.wandb_sink import store_run_id, stored_run_id
from das_ds.training.data_module import prepare_data
from das_ds.training.publish import collect_results
from das_ds.training.revisions import pin_revisions
from das_ds.training.run_lock import RunLock
from das_ds.training.trainer import ContinualTrainer


def train(config: RunConfig, ranks: ProcessGroup) -> Results:
    """Start a run, or continue it from its newest whole checkpoint; returns the final results on every rank.

    Raises:
        DasError: anything in the config, data, model, run folder or checkpoints that the user has to mend.
        StoppedError: the run was asked to stop and is saved.
    """
    engine_config = build_engine_config(config, ranks.info.world_size)
    watchdog = Watchdog(ranks, config.runtime.hang_timeout, config.output_dir)
    lock = RunLock(config.output_dir, on_loss=_end_at_once)
    with watchdog, lock, ShutdownHandler(config.output_dir, config.runtime.stop_signals) as requests:
        with watchdog.suspend_timeout("opening the run folder"):
            ranks.run_on_main(lock.acquire)
            folder = ranks.main_process_first(lambda: open_run_dir(config))
            store = CheckpointStore(folder.root, config.checkpoint.keep_last)
            manifest = find_latest_valid(store, ranks)
        ranks.run_on_main(lambda: _check_folder(folder, manifest))
        if manifest is not None and manifest.run.phase == "finished":
            return _finished(config, ranks, folder, manifest)
        with watchdog.suspend_timeout("fetching the model"):
            config = pin_revisions(config, ranks)
            ranks.main_process_first(lambda: (weights_folder(config.model),))
        with watchdog.suspend_timeout("preparing text"):
            ranks.run_on_main(lambda: check_files(config.model))
            objective = find_spec(config.model).objective
            text = ranks.main_process_first(lambda: prepare_data(config, ranks.info, objective))
        _leave_if_asked(ranks, requests)
        tracker = ranks.run_on_main(lambda: build_tracker(config, enabled=True)) or Tracker()
        with tracker:
            with watchdog.suspend_timeout("building the engine"):
                sequence = ContinualTrainer(
                    config, ranks, folder, text, tracker, engine_config, store, requests, watchdog
                )
            try:
                return sequence.run(manifest)
            finally:
                sequence.engine.close()


def _end_at_once(message: str) -> None:
    """Nothing more may be written to a folder in which another start trains."""
    print(f"das_ds: {message}", file=sys.stderr)
    leave(EXIT_USER_ERROR)


def _check_folder(folder: RunDir, manifest: Manifest | None) -> None:
    metrics = folder.root / METRICS_FILE
    if manifest is None:
        if metrics.exists() and metrics.stat().st_size:
            raise CheckpointError(
                f"{folder.root}: found {METRICS_FILE} of training but no checkpoint, expected the folder checkpoints "
                "that it was saved in; put it back, or start anew with another output_dir"
            )
    elif manifest.wandb_run_id is not None and stored_run_id(folder.root) is None:
        store_run_id(folder.root, manifest.wandb_run_id)


def _finished(config: RunConfig, ranks: ProcessGroup, folder: RunDir, manifest: Manifest) -> Results:
    results = collect_results(config, manifest.run, manifest.world_size, manifest.zero_stage)
    ranks.run_on_main(lambda: results.write(folder.root / RESULTS_FILE))
    return results


def _leave_if_asked(ranks: ProcessGroup, requests: ShutdownHandler) -> None:
    """What was asked for while text was prepared is obeyed before the engine is built: nothing is lost."""
    reasons = ranks.gather(requests.poll(files=ranks.info.is_main).stop)
    if any(reasons):
        ranks.run_on_main(requests.remove_stop_file)
        raise StoppedError(
            f"stopped on {next(filter(None, reasons))} before training began; the same command starts it"
        )
