"""Export: writes the engine's model as Hugging Face files: weights, tokenizer, model card.

Nothing is read from the model's source again: it may have changed, and lacks weights that were initialized at random.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from das_ds.config import ObjectiveName, RunConfig
from das_ds.config.stage import stage_folder
from das_ds.engine.engine import Engine
from das_ds.errors import ConfigError, RunFolderError
from das_ds.models.loading import model_config
from das_ds.models.lora import Lora
from das_ds.models.vocabulary import override_vocab_size, vocabulary_parameters
from das_ds.storage import MODEL_CARD, atomic_dir, atomic_write

PIPELINES: dict[ObjectiveName, str] = {"mlm": "fill-mask", "clm": "text-generation"}
AUTO_MODELS: dict[ObjectiveName, str] = {"mlm": "AutoModelForMaskedLM", "clm": "AutoModelForCausalLM"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Weights = dict[str, torch.Tensor]


def export_model(
    folder: Path,
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    *,
    dtype: torch.dtype = torch.float32,
    num_rows: int | None = None,
    lora: Lora | None = None,
    adapter_folder: Path | None = None,
    base: str | None = None,
) -> None:
    """Gather the fp32 weights one parameter at a time and write them on rank 0; called on every rank.

    Args:
        folder: where to write; with LoRA the network with its adapters merged.
        engine: has the weights.
        model: the network that the engine runs.
        tokenizer: written to the same folder.
        card: README of the model.
        dtype: of the weights in the file, and named in config.json.
        num_rows: rows of the vocabulary to write; None: all.
        lora: the adapters.
        adapter_folder: where to write only the adapters, in float32.
        base: name of the network in the adapters' file.

    Raises:
        RunFolderError: the disk is full or a folder cannot be written.
    """
    weights = _gather_weights(engine, model)
    adapters = Weights()
    if lora is not None and engine.ranks.info.is_main:
        weights, adapters = lora.split(weights)

    def write() -> None:
        if lora is not None:
            lora.merge(weights, adapters)
        for name in vocabulary_parameters(model) if num_rows is not None else ():
            weights[name] = weights[name][:num_rows].clone()
        _write(folder, model, tokenizer, weights, card, dtype)
        if lora is not None and adapter_folder is not None:
            with _atomic_export(adapter_folder) as partial:
                lora.save(partial, adapters, base)

    if num_rows is None:
        engine.ranks.run_on_main(write)
        return
    with override_vocab_size(model, num_rows):
        engine.ranks.run_on_main(write)


def export_dtype(config: RunConfig) -> torch.dtype:
    """The type of exported weights that `export.dtype` asks for.

    Raises:
        ModelError: the config of the model cannot be loaded.
        ConfigError: the base model is in a type that weights are not exported in.
    """
    if config.export.dtype != "base":
        return DTYPES[config.export.dtype]
    found = model_config(config.model).dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ConfigError(f"export.dtype: found base, but the base model is in {found}; allowed here: fp32, bf16")
    return found


def model_card(
    config: RunConfig,
    stages_done: int,
    objective: ObjectiveName,
    losses: Mapping[str, tuple[float, float]] | None = None,
    *,
    num_steps: int | None = None,
    name: str = "model",
) -> str:
    """README of an exported model: its base, its training, how to load it, and its held-out losses.

    Args:
        config: of the run.
        stages_done: stages that the model was trained on.
        objective: of pre-training.
        losses: corpus -> loss before training and loss of this model; None: not evaluated yet.
        num_steps: steps of the newest stage that the model was trained for; None: all of them.
        name: of the model's folder, in that of its domain.
    """
    stages = config.stages[:stages_done]
    newest = stages[-1]
    steps = [stage.num_steps for stage in stages]
    if num_steps is not None:
        steps[-1] = num_steps
    domains = ", ".join(domain for stage in stages for domain in stage.domains)
    how = "in order" if len(newest.domains) == 1 else "all at once"
    replayed = config.replayed(newest.last_domain)
    if config.replays_generated(newest.last_domain):
        replayed = [*replayed, "text that the model before it generated"]
    num_replayed = config.num_replayed(newest.last_domain)
    replay = f" In the last domain {num_replayed} of these are from {', '.join(replayed)}." if replayed else ""
    lengths = str(steps[0]) if len(set(steps)) == 1 else ", ".join(map(str, steps))
    folder = config.output_dir / stage_folder(newest.index, newest.name) / name
    base = config.model.name_or_path or "random weights"
    card = f"""---
library_name: transformers
pipeline_tag: {PIPELINES[objective]}
tags: [das_ds, continual-pre-training]
---

# {config.output_dir.name}: after {newest.name}

Continually pre-trained with das_ds, method `{config.method.name}`, from {base}.

Domains {how}: {domains}; {lengths} steps of {config.train.global_batch_size} sequences of \
{config.data.sequence_length} tokens each.{replay}

```python
from transformers import AutoTokenizer, {AUTO_MODELS[objective]}

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = {AUTO_MODELS[objective]}.from_pretrained("{folder}")
```
"""
    if losses is None:
        return card
    rows = "".join(f"| {corpus} | {before:.4f} | {after:.4f} |\n" for corpus, (before, after) in losses.items())
    return (
        f"{card}\nHeld-out loss in nats per predicted token:\n\n"
        f"| corpus | before training | after {newest.name} |\n|---|---:|---:|\n{rows}"
    )


def _gather_weights(engine: Engine, model: PreTrainedModel) -> Weights:
    """The full state dict on rank 0, in host memory: trained and frozen weights, and buffers; a collective."""
    # From the fp32 shards: under ZeRO-3 the parameters of the module are partitioned, and in 16 bits rounded.
    state: Weights = {}
    for name, weight in engine.weights.fp32_weights():
        if engine.ranks.info.is_main:
            state[name] = weight.cpu().clone()
    for name, frozen in engine.frozen_weights():
        if frozen is not None:
            state[name] = frozen
    if engine.ranks.info.is_main:
        state |= _stored_buffers(model)
    return state


def _stored_buffers(model: PreTrainedModel) -> Weights:
    stored = model.state_dict().keys()
    return {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers() if name in stored}


def _write(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Weights,
    card: str,
    dtype: torch.dtype,
) -> None:
    for name, weight in weights.items():
        weights[name] = weight.to(dtype) if weight.is_floating_point() else weight
    with _atomic_export(folder) as partial:
        model.save_pretrained(partial, state_dict=weights)
        # Written again, because save_pretrained records the dtype that the engine computes in, not that of the file.
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / MODEL_CARD).write_text(card, encoding="utf-8")


@contextmanager
def _atomic_export(folder: Path) -> Iterator[Path]:
    try:
        with atomic_dir(folder) as partial:
            yield partial
    except Exception as error:
        # safetensors and tokenizers, written in Rust, raise their own classes for errors of the operating system.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise RunFolderError(f"cannot write the model to {folder}: {reason}") from error


def write_model_card(folder: Path, card: str) -> None:
    """Replace the card of an exported model; nothing is written where the user has moved the model away.

    Raises:
        RunFolderError: the disk is full, or the folder cannot be written.
    """
    if not folder.is_dir():
        return
    try:
        with atomic_write(folder / MODEL_CARD) as partial:
            partial.write_text(card, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{folder / MODEL_CARD}: cannot be written ({error.strerror})") from error
