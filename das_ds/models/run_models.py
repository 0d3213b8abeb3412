"""The models of a run that are scored: the one it starts from, and those it has exported so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from das_ds.config import ModelConfig, RunConfig
from das_ds.progress import say
from das_ds.run_dir import BASE_FOLDER, RunDir, model_run_dir

WEIGHT_FILES = ("*.safetensors", "*.bin")
"""Names of files of weights in order of preference."""


@dataclass(frozen=True)
class RunModel:
    """A model of a run."""

    stage: str
    """The stage after which it was exported: a domain, or `pool`; `base` for the model that the run starts from."""
    source: ModelConfig
    is_base: bool
    """Whether the run starts from it."""
    scores_path: Path
    """File of its scores."""


def list_run_models(config: RunConfig, scores_file: str) -> list[RunModel]:
    """The models of a run that exist, in the order of training.

    The model before training is left out where it is in no files: after a warm-up of its head, or with the adapter of
    an earlier run.

    Args:
        config: of the run.
        scores_file: name of the file of scores in the folder of each.
    """
    run_dir = RunDir(config.output_dir)
    lora = config.model.lora
    models = []
    if not config.model.head_warmup_steps and (lora is None or lora.init_from is None):
        models.append(RunModel(BASE_FOLDER, config.model, True, run_dir.root / BASE_FOLDER / scores_file))
    for index, name in enumerate(config.stage_names):
        # Scores of earlier runs' models are written to the folder of this run all the same.
        folder = model_run_dir(config, index + 1).model(index, name)
        if folder.is_dir():
            source = ModelConfig(
                name_or_path=str(folder), attention=config.model.attention, architecture=config.model.architecture
            )
            models.append(RunModel(name, source, False, run_dir.domain(index, name) / scores_file))
    return models


def say_which_are_missing(config: RunConfig, models: Sequence[RunModel]) -> None:
    """Print the stages that have no model although a later one has: they were trained, and are left out."""
    found = [model.stage for model in models if not model.is_base]
    learned = config.stage_names[: config.stage_names.index(found[-1])] if found else []
    if missing := [name for name in learned if name not in found]:
        say(f"left out, as their exported models are no longer there: {', '.join(missing)}")


def list_weight_files(folder: Path) -> list[Path]:
    """The weight files of a model, sorted; [] if it has none."""
    return next((paths for pattern in WEIGHT_FILES if (paths := sorted(folder.glob(pattern)))), [])
