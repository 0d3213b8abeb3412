"""Export: all ranks write the engine's model as Hugging Face files, and none of them ever holds all of it.

Weights are gathered one at a time, to the rank that writes the file that they belong to. Nothing is read from the
model's source again: it may have changed, and lacks weights that were initialized at random.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from das_ds.config import RunConfig
from das_ds.distributed.process_group import ProcessGroup
from das_ds.engine.engine import Engine
from das_ds.engine.zero import full_shape
from das_ds.errors import ConfigError, RunFolderError
from das_ds.models.export_plan import ExportPlan, main_names, plan_export, to_stored, writer_ranks
from das_ds.models.loading import model_config
from das_ds.models.lora import Lora
from das_ds.models.vocabulary import override_vocab_size, vocabulary_parameters
from das_ds.storage import MODEL_CARD, StagedDir, atomic_dir, checksum, sync

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ExportFormat:
    """How weights are stored."""

    dtype: torch.dtype = torch.float32
    """Of floating-point weights, and named in config.json."""
    max_shard_bytes: int = 5 * 10**9
    """Bytes of a file; see `models.export_plan.plan_export`."""
    num_rows: int | None = None
    """Rows of the vocabulary to write; None: all."""


def export_model(
    folder: Path,
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    form: ExportFormat,
    *,
    lora: Lora | None = None,
    adapter_folder: Path | None = None,
    base: str | None = None,
) -> None:
    """Write the fp32 weights of an engine to a folder that all ranks share; called on every rank.

    Files are divided among the ranks, and written side by side. A rank has the tensors of one file at a time, and the
    weight that is being gathered. The folder appears once everything in it is complete.

    Args:
        folder: where to write; with LoRA the network with its adapters merged.
        engine: has the weights.
        model: the network that the engine runs.
        tokenizer: written to the same folder.
        card: README of the model.
        form: how weights are stored.
        lora: the adapters.
        adapter_folder: where to write only the adapters, in float32.
        base: name of the network in the adapters' file.

    Raises:
        RunFolderError: on every rank, when the disk is full or a folder cannot be written on any.
    """
    ranks = engine.ranks
    source = _WeightSource(engine, model, lora, form.num_rows)
    staged = StagedDir(folder)
    resized = nullcontext() if form.num_rows is None else override_vocab_size(model, form.num_rows)
    try:
        with resized:
            plan = plan_export(model, source.on_meta(form.dtype), form.max_shard_bytes)
            ranks.run_on_main(lambda: _write_small_files(staged, model, tokenizer, card, form.dtype, plan))
            checksums = _write_weights(ranks, staged, model, source, plan, form.dtype)
            ranks.run_on_main(lambda: _publish(staged, checksums))
    except BaseException:
        if ranks.info.is_main:
            staged.discard()
        raise
    if lora is not None and adapter_folder is not None:
        _export_adapter(adapter_folder, engine, lora, base)


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


class _WeightSource:
    """Weights and buffers of the network that is exported, by the names that it has without peft.

    Args:
        engine, model, lora, num_rows: as of `export_model` and `ExportFormat`.
    """

    def __init__(self, engine: Engine, model: PreTrainedModel, lora: Lora | None, num_rows: int | None) -> None:
        self._engine = engine
        self._lora = lora
        self._num_rows = num_rows
        self._parameters = dict(model.named_parameters())
        # A rank needs no peer for buffers: all have them.
        kept = model.state_dict().keys()
        self._buffers = {name: buffer.detach() for name, buffer in model.named_buffers() if name in kept}
        plain = {name: name for name in self._parameters} if lora is None else lora.base_names(model)
        mains = main_names(model, [*plain.values(), *self._buffers])
        self._names = {mains[base]: name for name, base in plain.items()} | {name: name for name in self._buffers}
        """Name in the exported network -> name in the engine's."""
        self._vocabulary = {mains[plain[name]] for name in vocabulary_parameters(model)}
        in_order = [mains.get(base, base) for base in (plain.get(name, name) for name in kept)]
        self._order = [name for name in dict.fromkeys(in_order) if name in self._names]

    def on_meta(self, dtype: torch.dtype) -> Weights:
        """Name -> a tensor without memory, of the shape and the dtype to store."""
        tensors = {}
        for name in self._order:
            own = self._names[name]
            tensor = self._buffers[own] if own in self._buffers else self._parameters[own]
            shape = list(full_shape(tensor))  # type: ignore[arg-type]
            if name in self._vocabulary and self._num_rows is not None:
                shape[0] = self._num_rows
            stored = dtype if tensor.is_floating_point() else tensor.dtype
            tensors[name] = torch.empty(shape, dtype=stored, device="meta")
        return tensors

    def gather(self, name: str, owners: Collection[int]) -> torch.Tensor | None:
        """The complete tensor on the ranks in `owners`, None elsewhere; not to be changed; a collective."""
        own = self._names[name]
        if own in self._buffers:
            return self._buffers[own].cpu() if self._engine.ranks.info.rank in owners else None
        weight = self._engine.gather_weight(own, owners)
        linear = None if self._lora is None else self._lora.adapted(name)
        if self._lora is not None and linear is not None:
            a, b = (self._engine.gather_weight(adapter, owners) for adapter in (linear.a, linear.b))
            if weight is not None and a is not None and b is not None:
                weight = self._lora.merge(linear, weight, a, b)
        is_cut = name in self._vocabulary and self._num_rows is not None
        return weight[: self._num_rows] if is_cut and weight is not None else weight


def _write_small_files(
    staged: StagedDir,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    dtype: torch.dtype,
    plan: ExportPlan,
) -> None:
    """Begin the folder with everything but weights."""
    with _as_folder_error(staged.folder):
        staged.create()
        # Not the model's own, which names the dtype that the engine computes in.
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.architectures = [type(model).__name__]
        config.save_pretrained(staged.partial)
        if model.can_generate():
            model.generation_config.save_pretrained(staged.partial)
        tokenizer.save_pretrained(staged.partial)
        if plan.index is not None:
            index = json.dumps(plan.index, indent=2) + "\n"
            (staged.partial / SAFE_WEIGHTS_INDEX_NAME).write_text(index, encoding="utf-8")
        (staged.partial / MODEL_CARD).write_text(card, encoding="utf-8")


def _write_weights(
    ranks: ProcessGroup,
    staged: StagedDir,
    model: PreTrainedModel,
    source: _WeightSource,
    plan: ExportPlan,
    dtype: torch.dtype,
) -> dict[str, str]:
    """Write all files, at most one per rank at a time; returns file -> checksum, on every rank."""
    checksums: dict[str, str] = {}
    names = list(plan.files)
    num_ranks = ranks.info.world_size
    for first in range(0, len(names), num_ranks):
        batch = names[first : first + num_ranks]
        writers = dict(zip(batch, writer_ranks(len(batch), num_ranks), strict=True))
        own = next((name for name, rank in writers.items() if rank == ranks.info.rank), None)
        tensors = _collect(ranks.info.rank, model, source, plan, writers, dtype)
        written, failure = _attempt(lambda name=own, tensors=tensors: _write_file(staged, name, tensors))  # type: ignore[misc]
        del tensors
        # Also keeps ranks from waiting in a collective, which may time out, for one that still writes.
        ranks.raise_on_all_ranks(failure)
        for found in ranks.all_gather_object(written or {}):
            checksums |= found
    return checksums


def _collect(
    rank: int,
    model: PreTrainedModel,
    source: _WeightSource,
    plan: ExportPlan,
    writers: dict[str, int],
    dtype: torch.dtype,
) -> Weights:
    """The tensors of this rank's file; a collective.

    Args:
        rank: this one.
        model, source, plan, dtype: of the export.
        writers: file -> the rank that writes it.
    """
    writer_of = {tensor: writer for name, writer in writers.items() for tensor in plan.files[name]}
    tensors = Weights()
    for group in plan.groups_of(writer_of):
        owners = {writer_of[target] for target in group.targets if target in writer_of}
        gathered = {name: source.gather(name, owners) for name in group.sources}
        complete = {name: weight for name, weight in gathered.items() if weight is not None}
        if rank in owners:
            for name, tensor in to_stored(model, complete).items():
                if writer_of.get(name) == rank:
                    stored = dtype if tensor.is_floating_point() else tensor.dtype
                    # With memory of its own, so that the gathered weight is freed.
                    tensors[name] = torch.empty(tensor.shape, dtype=stored).copy_(tensor)
    return tensors


def _write_file(staged: StagedDir, name: str | None, tensors: Weights) -> dict[str, str]:
    """Write one file and flush it; returns its checksum. Nothing without a name."""
    if name is None:
        return {}
    with _as_folder_error(staged.folder):
        # Another node may not see the folder of rank 0 yet.
        staged.partial.mkdir(parents=True, exist_ok=True)
        path = staged.partial / name
        save_file(tensors, path, metadata={"format": "pt"})
        sync(path)
        return {name: checksum(path)}


def _publish(staged: StagedDir, checksums: dict[str, str]) -> None:
    missing = [name for name in checksums if not (staged.partial / name).is_file()]
    if missing:
        raise RunFolderError(
            f"{staged.partial / missing[0]}: found no such file on rank 0, though another rank wrote it; output_dir "
            "must be on a file system that all nodes share"
        )
    with _as_folder_error(staged.folder):
        staged.publish(checksums)


def _export_adapter(folder: Path, engine: Engine, lora: Lora, base: str | None) -> None:
    """Write the adapters alone, on rank 0: peft reads one file."""
    adapters = Weights()
    for name in lora.adapter_names:
        weight = engine.gather_weight(name, {0})
        if weight is not None:
            adapters[name] = weight.clone()

    def write() -> None:
        with _as_folder_error(folder), atomic_dir(folder) as partial:
            lora.save(partial, adapters, base)

    engine.ranks.run_on_main(write)


def _attempt(write: Callable[[], dict[str, str]]) -> tuple[dict[str, str] | None, RunFolderError | None]:
    try:
        return write(), None
    except RunFolderError as error:
        return None, error


@contextmanager
def _as_folder_error(folder: Path) -> Iterator[None]:
    """Errors of the operating system, and of libraries for them, become errors of the run folder."""
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers, written in Rust, raise their own classes for errors of the operating system.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise RunFolderError(f"cannot write the model to {folder}: {reason}") from error
