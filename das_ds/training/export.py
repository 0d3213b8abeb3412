"""Writing the model as Hugging Face files: weights in float32, tokeniser, model card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from das_ds.config import ObjectiveName, RunConfig
from das_ds.distributed.engine import Engine
from das_ds.durable import replaced_folder
from das_ds.errors import RunFolderError
from das_ds.models.loading import find_adapter, load_model
from das_ds.models.lora import Lora
from das_ds.models.vocabulary import said_to_have, vocabulary_parameters

PIPELINES: dict[ObjectiveName, str] = {"mlm": "fill-mask", "clm": "text-generation"}


def export_model(
    folder: Path,
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    *,
    num_rows: int | None = None,
) -> None:
    """Gather the fp32 weights one parameter at a time and write them on rank 0; called on every rank.

    Args:
        folder: where to write.
        engine: holds the weights.
        model: the network that the engine runs.
        tokenizer: written beside the weights.
        card: README of the model.
        num_rows: rows of the vocabulary to write; None: all.

    Raises:
        RunFolderError: the disk is full or the folder cannot be written.
    """
    state = _trained_weights(engine)
    if num_rows is None:
        engine.ranks.on_main(lambda: _write(folder, model, tokenizer, state, card))
        return
    rows = {name: state[name][:num_rows].clone() for name in vocabulary_parameters(model) if name in state}
    with said_to_have(model, num_rows):
        engine.ranks.on_main(lambda: _write(folder, model, tokenizer, {**state, **rows}, card))


def export_lora(
    model_folder: Path,
    adapter_folder: Path,
    engine: Engine,
    lora: Lora,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
) -> None:
    """Write the network with its adapters merged, and the adapters alone; called on every rank.

    Raises:
        RunFolderError: the disk is full or a folder cannot be written.
        ModelError: the network that was adapted can no longer be loaded.
    """
    trained = _trained_weights(engine)

    def write() -> None:
        # Loaded anew: the engine holds frozen weights in the precision of training, the source holds them whole.
        base, _ = load_model(config.model, seed=config.seed, vocab_size=len(tokenizer))
        lora.merge_into(base, trained)
        _write(model_folder, base, tokenizer, base.state_dict(), card)
        with _replaced(adapter_folder) as partial:
            lora.save(partial, trained, config.model.name_or_path)

    engine.ranks.on_main(write)


def model_card(config: RunConfig, stages_done: int) -> str:
    """README of an exported model: what it was trained on and how."""
    base = config.model.name_or_path or "random weights"
    stages = config.stages[:stages_done]
    domains, newest = [domain for stage in stages for domain in stage.domains], stages[-1]
    how = "in order" if len(newest.domains) == 1 else "all at once"
    replayed = config.replayed(newest.last_domain)
    replay = f" In the last domain {config.num_replayed} of these are from {', '.join(replayed)}." if replayed else ""
    pipeline = PIPELINES[find_adapter(config.model).objective]
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {pipeline}\ntags: [das_ds, continual-pre-training]\n---\n\n"
        f"# {config.output_dir.name}: after {newest.name}\n\n"
        f"Continually pre-trained with das_ds, method `{config.method.name}`, from {base}.\n\n"
        f"Domains {how}: {', '.join(domains)}; {newest.num_steps} steps of "
        f"{config.train.global_batch_size} sequences of {config.data.sequence_length} tokens each.{replay}\n"
    )


def _trained_weights(engine: Engine) -> dict[str, torch.Tensor]:
    # Under ZeRO-3 only the fp32 shards are whole; on rank 0 the copy lives in host memory.
    state: dict[str, torch.Tensor] = {}
    for name, weight in engine.fp32_weights():
        if engine.ranks.info.is_main:
            state[name] = weight.cpu().clone()
    return state


def _write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, torch.Tensor],
    card: str,
) -> None:
    with _replaced(folder) as partial:
        model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    try:
        with replaced_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise RunFolderError(f"cannot write the model to {folder}: {error.strerror or error}") from error
