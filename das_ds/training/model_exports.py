"""Exports of a run: where the models of its domains are written, and what their cards say."""

from __future__ import annotations

from pathlib import Path

from das_ds.checkpoint.manifest import RunState
from das_ds.config import RunConfig
from das_ds.config.stage import Stage
from das_ds.context import RunContext
from das_ds.training.console import RunConsole
from das_ds.training.data_module import DataModule, loss_columns
from das_ds.training.export import ExportFormat, export_dtype, export_model
from das_ds.training.model_card import model_card, write_model_card
from das_ds.training.run_services import RunServices


class ModelExports:
    """Writes models of a run; exports are collectives.

    Args:
        config, context, services, data: of the run.
        console: prints where models are.

    Raises:
        ConfigError: the weights cannot be exported in the type that the config asks for.
    """

    def __init__(
        self, config: RunConfig, context: RunContext, services: RunServices, data: DataModule, console: RunConsole
    ) -> None:
        self._config = config
        self._context = context
        self._run_dir = services.run_dir
        self._data = data
        self._console = console
        self._dtype = export_dtype(config)

    def export(self, stage: Stage, state: RunState) -> None:
        """Export the model that the run goes on with after a stage.

        Raises:
            RunFolderError: the disk is full or a folder cannot be written.
        """
        place = (stage.index, stage.name)
        self._write(self._run_dir.model(*place), self._run_dir.adapter(*place), stage, _model_step(stage, state))

    def export_other(self, stage: Stage, which: str, step: int) -> None:
        """Export the present weights beside that model.

        Args:
            stage: that was learned.
            which: `best` or `last`, the name of the folder.
            step: of the stage that they are of.

        Raises:
            RunFolderError: the disk is full or a folder cannot be written.
        """
        place = (stage.index, stage.name, which)
        self._write(self._run_dir.other_model(*place), self._run_dir.other_adapter(*place), stage, step)

    def write_losses(self, stage: Stage, state: RunState, losses: dict[str, float]) -> None:
        """Add the losses of the model that was exported last, evaluated since, to its card; on rank 0.

        Args:
            stage: that was learned.
            state: of the run.
            losses: corpus -> loss.

        Raises:
            RunFolderError: the disk is full, or the folder cannot be written.
        """
        before = dict(zip(loss_columns(self._config), state.loss_matrix[0], strict=True))
        pairs = {corpus: (before[corpus], loss) for corpus, loss in losses.items()}
        objective = self._context.objective
        steps = _model_step(stage, state)
        card = model_card(self._config, state.domains_done, objective, pairs, num_steps=steps)
        write_model_card(self._run_dir.model(stage.index, stage.name), card)

    def _write(self, folder: Path, adapter_folder: Path, stage: Stage, num_steps: int) -> None:
        corpus = stage.last_domain
        objective = self._context.objective
        export_model(
            folder,
            self._context.engine,
            self._context.network.model,
            self._data.tokenizers[corpus],
            model_card(self._config, stage.index + 1, objective, num_steps=num_steps, name=folder.name),
            ExportFormat(self._dtype, self._config.export.max_shard_bytes, self._data.num_rows(corpus)),
            lora=self._context.lora,
            adapter_folder=adapter_folder,
            base=self._config.model.name_or_path,
        )
        self._console.exported(stage.name, folder)


def _model_step(stage: Stage, state: RunState) -> int:
    """Step of a stage whose model the run went on with."""
    ended = {end.domain: end.model_step for end in state.ends}
    return ended.get(stage.name, stage.num_steps)
