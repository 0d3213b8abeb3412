"""One start of a run: opens the run folder, finds the checkpoint to resume from, and trains until done or stopped."""

from __future__ import annotations

import sys

from das_ds.checkpoint.manifest import Manifest
from das_ds.checkpoint.store import CheckpointStore, find_latest_valid
from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.distributed.process_group import ProcessGroup, hard_exit
from das_ds.errors import EXIT_USER_ERROR, CheckpointError, StoppedError
from das_ds.fault_tolerance.shutdown import ShutdownHandler
from das_ds.fault_tolerance.watchdog import Watchdog
from das_ds.models.loading import check_files, find_spec, weights_folder
from das_ds.progress import disable_library_bars, is_terminal
from das_ds.reporting.results import Results
from das_ds.run_dir import METRICS_FILE, RunDir, open_run_dir
from das_ds.tracking.libraries import import_libraries
from das_ds.tracking.run_ids import store_run_id, stored_run_id
from das_ds.tracking.tracker import Tracker, build_tracker
from das_ds.training.data_module import DataModule, prepare_data
from das_ds.training.earlier_run import EarlierRun, open_earlier_run
from das_ds.training.hub_uploads import HubUploads
from das_ds.training.publish import collect_results
from das_ds.training.revisions import pin_revisions
from das_ds.training.run_lock import RunLock
from das_ds.training.run_services import RunServices
from das_ds.training.trainer import ContinualTrainer


def train(config: RunConfig, ranks: ProcessGroup) -> Results:
    """Start a run, or resume it from its latest valid checkpoint; returns the final results on every rank.

    Raises:
        DasError: an error in the config, data, model, run folder or checkpoints that the user has to fix.
        StoppedError: the run was asked to stop and is saved.
    """
    engine_config = build_engine_config(config, ranks.info.world_size)
    # Before anything is written or computed: a missing library should not end a run after its text was prepared.
    ranks.run_on_main(lambda: import_libraries(config))
    if not (ranks.info.is_main and is_terminal()):
        disable_library_bars()
    run_dir = RunDir(config.output_dir)
    watchdog = Watchdog(ranks, config.runtime.hang_timeout, run_dir)
    lock = RunLock(config.output_dir, on_loss=_exit_without_writing)
    # The lock is acquired inside: a start that waits for it is not hung, and a signal ends it cleanly.
    uploads = HubUploads(config, run_dir)
    with watchdog, lock, ShutdownHandler(run_dir, config.runtime.stop_signals) as shutdown:
        with watchdog.suspend_timeout("opening the run folder"):
            ranks.run_on_main(lock.acquire)
            run_dir = ranks.main_process_first(lambda: open_run_dir(config))
            store = CheckpointStore(run_dir.checkpoints_dir, config.checkpoint.keep_last)
            manifest = find_latest_valid(store, ranks)
        # Rank 0 alone: files on a network file system may appear later on other nodes.
        ranks.run_on_main(lambda: _check_run_dir(run_dir, manifest))
        if manifest is not None and manifest.run.phase == "finished":
            results = _write_final_results(config, ranks, run_dir, manifest)
            _finish_uploads(uploads, ranks, watchdog, shutdown, manifest.run.domains_done)
            return results
        if manifest is not None and ranks.info.is_main:
            # The model of a domain that is to be evaluated follows after that.
            uploads.add(manifest.run.domains_done - (manifest.run.phase == "evaluate"))
        with watchdog.suspend_timeout("reading the earlier run"):
            earlier = _find_earlier_run(config, ranks, manifest)
        config, data = prepare_run(config, ranks, watchdog)
        _stop_if_requested(ranks, shutdown)
        # Rank 0 alone logs; the others have a tracker without sinks.
        tracker = ranks.run_on_main(lambda: build_tracker(config, enabled=True)) or Tracker()
        services = RunServices(ranks, run_dir, tracker, store, shutdown, watchdog, uploads)
        with tracker:
            with watchdog.suspend_timeout("building the engine"):
                trainer = ContinualTrainer(config, services, data, engine_config, earlier)
            try:
                results = trainer.run(manifest)
                _finish_uploads(uploads, ranks, watchdog, shutdown, len(config.learned))
                return results
            finally:
                trainer.engine.close()


def _find_earlier_run(config: RunConfig, ranks: ProcessGroup, manifest: Manifest | None) -> EarlierRun | None:
    """The run that this one continues, until it has begun with its own domains; then it has all that it needs."""
    if config.continue_from is None:
        return None
    if manifest is not None and (manifest.run.phase != "evaluate" or manifest.run.domains_done > config.num_earlier):
        return None
    return open_earlier_run(config, ranks)


def prepare_run(config: RunConfig, ranks: ProcessGroup, watchdog: Watchdog) -> tuple[RunConfig, DataModule]:
    """Fetch the model and tokenize the text; returns the config with pinned revisions and steps."""
    with watchdog.suspend_timeout("fetching the model"):
        config = pin_revisions(config, ranks)
        ranks.main_process_first(lambda: (weights_folder(config.model),))
    with watchdog.suspend_timeout("preparing text"):
        ranks.run_on_main(lambda: check_files(config.model))
        objective = find_spec(config.model).objective
        data = ranks.main_process_first(lambda: prepare_data(config, ranks.info, objective))
    return data.config, data


def _exit_without_writing(message: str) -> None:
    """Exit at once: another start trains in this folder, so nothing more may be written to it."""
    print(f"das_ds: {message}", file=sys.stderr)
    hard_exit(EXIT_USER_ERROR)


def _check_run_dir(run_dir: RunDir, manifest: Manifest | None) -> None:
    """Refuse a folder whose checkpoints were deleted, and restore a W&B run id that was."""
    metrics = run_dir.metrics_file
    if manifest is None:
        if metrics.exists() and metrics.stat().st_size:
            raise CheckpointError(
                f"{run_dir.root}: found {METRICS_FILE} of training but no checkpoint, expected the folder checkpoints "
                "that it was saved in; restore it, or start over with another output_dir"
            )
    elif manifest.wandb_run_id is not None and stored_run_id(run_dir.root) is None:
        store_run_id(run_dir.root, manifest.wandb_run_id)


def _write_final_results(config: RunConfig, ranks: ProcessGroup, run_dir: RunDir, manifest: Manifest) -> Results:
    results = collect_results(config, manifest.run, manifest.world_size, manifest.zero_stage)
    ranks.run_on_main(lambda: results.write(run_dir.results_file))
    return results


def _finish_uploads(
    uploads: HubUploads, ranks: ProcessGroup, watchdog: Watchdog, shutdown: ShutdownHandler, num_domains: int
) -> None:
    """Wait until all models of a finished run are on the hub, where they are uploaded, or a stop is requested."""

    def is_stopped() -> bool:
        return shutdown.poll(files=True).stop is not None

    def finish() -> None:
        uploads.add(num_domains)
        if not uploads.wait(is_stopped):
            shutdown.remove_stop_file()

    with watchdog.suspend_timeout("uploading models"):
        ranks.run_on_main(finish)


def _stop_if_requested(ranks: ProcessGroup, shutdown: ShutdownHandler) -> None:
    """Stop before the engine is built if that was requested meanwhile: there is nothing to save yet."""
    reasons = ranks.all_gather_object(shutdown.poll(files=ranks.info.is_main).stop)
    if any(reasons):
        ranks.run_on_main(shutdown.remove_stop_file)
        raise StoppedError(f"stopped before training began: {next(filter(None, reasons))}; the same command starts it")
