"""Writing the model as Hugging Face files: weights in float32, tokeniser, model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from das_ds.config import RunConfig
from das_ds.distributed.engine import Engine
from das_ds.errors import RunFolderError


def export_model(
    folder: Path, engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str
) -> None:
    """Gather the fp32 weights one parameter at a time and write them on rank 0; called on every rank.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written.
    """
    is_main = engine.ranks.info.is_main
    # Under ZeRO-3 only the fp32 shards are whole; on rank 0 the copy lives in host memory.
    state: dict[str, torch.Tensor] = {}
    for name, weight in engine.fp32_weights():
        if is_main:
            state[name] = weight.cpu().clone()
    failure = _write(folder, model, tokenizer, state, card) if is_main else None
    engine.ranks.agree(failure)


def model_card(config: RunConfig, domains_learned: int) -> str:
    """README of an exported model: what it was trained on and how."""
    base = config.model.name_or_path or "random weights"
    domains = [domain.name for domain in config.domains[:domains_learned]]
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags: [das_ds, continual-pre-training]\n---\n\n"
        f"# {config.output_dir.name}: after {domains[-1]}\n\n"
        f"Continually pre-trained with das_ds, method `{config.method.name}`, from {base}.\n\n"
        f"Domains in order: {', '.join(domains)}; {config.train.steps_per_domain} steps of "
        f"{config.train.global_batch_size} sequences of {config.data.sequence_length} tokens each.\n"
    )


def _write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, torch.Tensor],
    card: str,
) -> RunFolderError | None:
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        return RunFolderError(f"cannot write the model to {folder}: {error.strerror or error}")
    return None
