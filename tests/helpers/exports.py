"""Exports by real ranks from an engine over a model that was loaded as runs load it."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.context import RunContext, build_context
from das_ds.distributed.process_group import ProcessGroup, init_process_group
from das_ds.engine.sharded_init import sharded_init
from das_ds.errors import RunFolderError
from das_ds.models.loading import load_model
from das_ds.training import export, hub_uploads
from das_ds.training.export import ExportFormat, export_model
from das_ds.training.train import train
from helpers.allocations import AllocationCounter
from helpers.fake_hub import point_to
from helpers.half import allow_fp16_on_cpu
from helpers.training import run_config


@dataclass(frozen=True)
class Exported:
    """What one rank saw of an export."""

    peak: int
    """Bytes of tensors that it allocated at once, beside those of the engine."""
    written: list[str]
    """Files of weights that it wrote."""


def export_config(folder: Path, base: Path, stage: int, precision: str = "fp32", **model: Any) -> RunConfig:
    """A run over a saved model."""
    return run_config(
        folder,
        model={"config": None, "name_or_path": str(base), **model},
        train={"precision": precision, "global_batch_size": 12, "micro_batch_size": 2},
        method={"name": "ncl"},
        deepspeed={"zero_optimization": {"stage": stage}},
    )


def export_all(config: RunConfig, forms: dict[str, ExportFormat]) -> dict[str, Exported]:
    """Export the model of a run in several forms to `<output_dir>/<name>/model`, with LoRA also `adapter`."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    run = _build(config, ranks)
    found = {name: _export(run, Path(config.output_dir) / name, form) for name, form in forms.items()}
    run.engine.close()
    return found


def export_on_full_disk(config: RunConfig, form: ExportFormat, full_rank: int) -> tuple[str, list[str]]:
    """The error of this rank where the disk fills while one rank writes, and the files that are left; then the export
    is repeated with room."""
    ranks = init_process_group()
    run = _build(config, ranks)
    folder = Path(config.output_dir) / "full"
    save_file = export.save_file

    def fill(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if ranks.info.rank == full_rank:
        export.save_file = fill
    message = ""
    try:
        _export(run, folder, form)
    except RunFolderError as error:
        message = str(error)
    ranks.barrier()
    left = sorted(path.name for path in folder.rglob("*"))
    ranks.barrier()
    export.save_file = save_file
    _export(run, folder, form)
    run.engine.close()
    return message, left


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of an exported model, from one file or several, after a check of its index."""
    paths = sorted(folder.glob("*.safetensors"))
    parts = {path.name: load_file(path) for path in paths}
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(paths) > 1)
    if index.exists():
        located = {name: file for file, part in parts.items() for name in part}
        assert json.loads(index.read_text())["weight_map"] == located
    weights = [item for part in parts.values() for item in part.items()]
    assert len(dict(weights)) == len(weights), "no tensor is in two files"
    return dict(weights)


def _build(config: RunConfig, ranks: ProcessGroup) -> RunContext:
    engine_config = build_engine_config(config, ranks.info.world_size)
    construction = sharded_init(engine_config, ranks)
    model, spec = load_model(config.model, seed=0, vocab_size=100, construction=construction)
    exact = construction.take_exact_weights() if construction else None
    return build_context(config, model, spec, engine_config, ranks, exact=exact)


def _export(run: RunContext, folder: Path, form: ExportFormat) -> Exported:
    written: list[str] = []
    save_file = export.save_file

    def noted(tensors: Any, path: Path, **options: Any) -> None:
        written.append(path.name)
        save_file(tensors, path, **options)

    counter = AllocationCounter()
    counter.ignore(item for item in gc.get_objects() if isinstance(item, torch.Tensor) and not item.is_meta)
    export.save_file = noted
    try:
        with counter:
            export_model(
                folder / "model",
                run.engine,
                run.network.model,
                _NoTokenizer(),  # type: ignore[arg-type]
                "card",
                form,
                lora=run.lora,
                adapter_folder=folder / "adapter",
            )
    finally:
        export.save_file = save_file
    return Exported(counter.peak, written)


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


def run_with_hub(values: dict[str, Any], endpoint: str) -> bool:
    """A run on these ranks that uploads its models there, without waits between attempts; whether it is complete."""
    point_to(endpoint)
    constants.HF_HUB_DISABLE_XET = True
    constants.HF_HUB_OFFLINE = False
    os.environ["HF_TOKEN"] = "hf_written_for_tests"
    hub_uploads.RETRY_SECONDS = (0.0,)
    return train(RunConfig(**values), init_process_group()).complete
