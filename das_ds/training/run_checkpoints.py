"""Checkpoints of a run: saves the state of all its components, and restores it when the run resumes or rolls back."""

from __future__ import annotations

from collections.abc import Mapping

from das_ds.checkpoint.manifest import CheckpointMetadata, Manifest, RunState
from das_ds.checkpoint.reader import CheckpointReader
from das_ds.checkpoint.saver import AsyncCheckpointer
from das_ds.checkpoint.store import find_latest_valid
from das_ds.config import RunConfig
from das_ds.config.stage import Stage
from das_ds.distributed.state import ComponentState, SavedComponentState, Stateful
from das_ds.engine.engine import Engine
from das_ds.errors import DasError
from das_ds.tracking.run_ids import stored_run_id
from das_ds.training.run_services import RunServices
from das_ds.training.save_point import SavePoint
from das_ds.versions import library_versions


def current_stage(stages: list[Stage], state: RunState) -> Stage:
    """The stage that a run is at, the last one after all are done."""
    return stages[min(state.domains_done, len(stages) - 1)]


class EngineDomainState:
    """The engine's optimizer moments and schedule within a domain, a component separate from its weights.

    Weights are restored when a run resumes; these only after `Engine.start_domain`, which resets them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def state_dict(self) -> ComponentState:
        """See `Engine.domain_state_dict`."""
        return self._engine.domain_state_dict()

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """See `Engine.load_domain_state_dict`."""
        self._engine.load_domain_state_dict(saved)


class RunCheckpoints:
    """Saves and restores the components of a run; every method is called on all ranks.

    Args:
        config: of the run.
        services: of the run.
        engine: whose weights are sharded over the ranks.
        components: name -> component, in the order in which they are restored.
    """

    def __init__(
        self, config: RunConfig, services: RunServices, engine: Engine, components: Mapping[str, Stateful]
    ) -> None:
        self._stages = config.stages
        self._services = services
        self._engine = engine
        self._components = dict(components)
        self.step_components: dict[str, Stateful] = {}
        """Components that exist only while the optimizer steps of a phase run; restored by `load_step_components`."""
        checkpointer = AsyncCheckpointer(
            services.process_group,
            services.checkpoints,
            engine.weights.checkpoint_shards(),
            asynchronous=config.checkpoint.async_save,
            fsync_also=[services.run_dir.metrics_file],
        )
        # Before weights change, wait until those that are being saved are copied.
        engine.on_weights_will_change = checkpointer.wait_for_staging
        self.save_point = SavePoint(services.process_group, self, checkpointer, services.shutdown, services.watchdog)
        self._reader: CheckpointReader | None = None

    def state_dicts(self) -> dict[str, ComponentState]:
        """Component -> its state."""
        components = {**self._components, **self.step_components}
        return {name: component.state_dict() for name, component in components.items()}

    def checkpoint_metadata(self, run: RunState) -> CheckpointMetadata:
        """Facts for the manifest in addition to the state of the run and of its components."""
        return CheckpointMetadata(
            domain=current_stage(self._stages, run).name,
            metrics_bytes=self._services.tracker.num_bytes(),
            wandb_run_id=stored_run_id(self._services.run_dir.root),
            world_size=self._services.process_group.info.world_size,
            zero_stage=self._engine.zero_stage,
            versions=library_versions(),
        )

    def describe(self, run: RunState) -> str:
        """Where the run is: `domain acl (2 of 3), train, step 40 of 75`."""
        stage = current_stage(self._stages, run)
        text = f"domain {stage.name} ({stage.index + 1} of {len(self._stages)}), phase {run.phase}"
        return f"{text}, step {run.domain_step} of {stage.num_steps}" if run.phase == "train" else text

    def failure(self) -> DasError | None:
        """Why metrics can no longer be logged; known only to rank 0."""
        return self._services.tracker.failure

    def load(self, manifest: Manifest) -> RunState:
        """Restore all components but those of steps, whose files stay open until they are needed.

        Returns:
            Progress of the run when the checkpoint was saved.
        """
        self.close_reader()
        self._reader = CheckpointReader(
            self._services.checkpoints.folder,
            manifest,
            self._services.process_group.info,
            self._engine.zero_stage,
            self._engine.weights.shards,
        )
        # Rank-local state comes back empty if the world size or ZeRO stage changed; components handle that themselves.
        for name, component in self._components.items():
            component.load_state_dict(self._reader.component(name))
        return manifest.run

    def load_step_components(self) -> None:
        """Restore the `step_components`, in their order; comes after `Engine.start_domain`."""
        assert self._reader is not None, "steps resume from a checkpoint"
        for name, component in self.step_components.items():
            component.load_state_dict(self._reader.component(name))
        self.close_reader()

    def close_reader(self) -> None:
        """Close the files of the checkpoint that was loaded, if they are open."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def find_rollback_target(self) -> Manifest:
        """The latest valid checkpoint, after the one that is being written is published."""
        # The checkpoint in progress may be the latest valid one.
        self.save_point.wait()
        self.close_reader()
        manifest = find_latest_valid(self._services.checkpoints, self._services.process_group)
        assert manifest is not None, "steps come after a checkpoint"
        return manifest

    def truncate_metrics(self, state: RunState, manifest: Manifest | None) -> None:
        """Drop metrics logged after the checkpoint that the run continues from; all of them if there is none."""
        num_bytes = manifest.metrics_bytes if manifest else 0
        tracker = self._services.tracker
        self._services.process_group.run_on_main(lambda: tracker.truncate_after(state.global_step, num_bytes))
