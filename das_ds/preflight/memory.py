"""The tokeniser, the network by its config and the names of its weights, and whether it fits into memory."""

from __future__ import annotations

import re
import socket
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from das_ds.config import RunConfig
from das_ds.config.deepspeed import is_offloaded
from das_ds.data.objectives import build_collator
from das_ds.data.tokenizers import build_tokenizers
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import PreflightError
from das_ds.functional.token_ids import num_tokens
from das_ds.functional.units import HEAD, INTERMEDIATE
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.inspect.probe import skeleton
from das_ds.models.loading import (
    check_embeddings,
    check_sequence_length,
    describe_stored_weights,
    find_spec,
    load_tokenizer,
    model_config,
)
from das_ds.models.lora import Lora
from das_ds.preflight.checks import UNITS, Checklist, CheckWarning, readable
from das_ds.preflight.host_memory import free_memory
from das_ds.preflight.memory_estimate import (
    NUM_MOMENTS,
    Granularity,
    MemoryEstimate,
    ModelSize,
    Sharding,
    activation_bytes,
    checkpoint_bytes,
    logits_bytes,
    memory,
)
from das_ds.preflight.method_memory import kept_by_rank, kept_in_checkpoint

VIEWS_OF_CONTRAST = 4
"""Rows of the packed forward pass per sequence."""


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that are free for one rank."""

    node: str
    device: int | None
    """On its GPU; None without one."""
    host: int
    """On its whole node."""


def granularity(config: RunConfig) -> Granularity | None:
    """Of the importance of units or weights that the run keeps; None: it keeps none."""
    found = config.method.importance.granularity
    return found if config.method.is_soft_masked and found != "direction" else None


def check_model(checks: Checklist, config: RunConfig) -> ModelSize | None:
    """Tokenisers load, an architecture spec covers all parameters of the model, and blocks fit its positions."""

    def look() -> tuple[ModelSize, str]:
        spec = find_spec(config.model)
        base = load_tokenizer(config)
        tokenizers = build_tokenizers(config, base)
        for tokenizer in tokenizers.values():
            build_collator(spec.objective, tokenizer, config.data)
        model = skeleton(model_config(config.model, vocab_size=num_tokens(base.get_vocab())), spec.objective)
        check_embeddings(model, num_tokens(base.get_vocab()))
        check_sequence_length(model, spec, config.data.sequence_length)
        most_tokens = max(num_tokens(tokenizer.get_vocab()) for tokenizer in tokenizers.values())
        weights = "" if config.model.name_or_path is None else f"; {describe_stored_weights(config.model, model)}"
        return measured_size(config, model, spec, most_tokens), weights

    def check_loss(seen: list[tuple[ModelSize, str]]) -> str:
        sizes = [size for size, _ in seen]
        if len(set(sizes)) > 1:
            raise PreflightError(f"ranks find models of different sizes: {', '.join(str(s.total) for s in sizes[:8])}")
        size = sizes[0]
        trained = f", of which {size.trained:,} are trained" if size.has_adapters else ""
        return f"{size.total:,} parameters{trained}, {size.num_layers} layers, {size.vocabulary} tokens{seen[0][1]}"

    found = checks.run("model", "a tokenizer, and a model with an architecture spec that fits it", look, check_loss)
    return None if found is None else found[0][0]


def measured_size(config: RunConfig, model: PreTrainedModel, spec: ArchitectureSpec, num_rows: int) -> ModelSize:
    """Counts of a network that has room for at least `num_rows` tokens, LoRA included.

    Raises:
        ModelError: the architecture spec does not fit the network.
        ConfigError: LoRA does not.
    """
    layout = spec.layout(model)
    embedding: Any = model.get_input_embeddings()
    num_embeddings, hidden = embedding.weight.shape
    added = max(0, num_rows - num_embeddings) * sum(layout.shapes[name][2] for name in layout.vocabulary)
    total = trained = sum(layout.sizes.values()) + added
    if config.model.lora is not None:
        maps = Lora.plan(model, layout, config.model.lora).linears
        trained = sum(item.rank * (item.num_inputs + item.num_outputs) for item in maps)
        total += trained
    inner = layout.num_units.get(INTERMEDIATE, 4 * hidden)
    if spec.has_experts:
        num_experts = max(shape[0] for shape in layout.shapes.values())
        inner = inner // num_experts * getattr(model.config, "num_experts_per_tok", num_experts)
    return ModelSize(
        trained=trained,
        total=total,
        largest_layer=_largest_layer(model),
        num_units=layout.num_layers * sum(layout.num_units.values()),
        num_layers=layout.num_layers,
        hidden=hidden,
        inner=inner,
        heads=layout.num_units.get(HEAD, getattr(model.config, "num_attention_heads", 1)),
        vocabulary=max(num_embeddings, num_rows),
    )


def check_memory(checks: Checklist, config: RunConfig, info: RankInfo, size: ModelSize, engine: dict[str, Any]) -> None:
    """What a rank needs against what is free for it; a rough part alone that is too much is only a doubt."""
    fixed = estimated_memory(config, size, engine, info.world_size)
    if info.device.type == "cpu":
        fixed = fixed.on_cpu()
    rough = activation_estimate(config, size)
    shown = ", ".join(f"{name} {readable(part)}" for name, part in {**fixed.device, **fixed.host}.items() if part)
    beside = f", {readable(fixed.host_bytes)} beside it in host memory" if fixed.host_bytes else ""
    expected = (
        f"room for {readable(fixed.device_bytes)} per rank{beside} and for roughly {readable(rough)} of activations: "
        f"{shown}"
    )

    def look() -> MemoryBudget:
        device = torch.cuda.mem_get_info(info.device)[0] if info.device.type == "cuda" else None
        return MemoryBudget(socket.gethostname(), device, free_memory())

    checks.run("memory", expected, look, lambda rooms: judge_memory(rooms, fixed, rough))


def judge_memory(rooms: list[MemoryBudget], fixed: MemoryEstimate, rough: int) -> str | CheckWarning:
    """Compare with the node, and the GPU, that have least to spare.

    Args:
        rooms: of all ranks.
        fixed: what a rank needs; without GPUs all of it as memory of the device, which is the host.
        rough: activations of a rank.

    Raises:
        PreflightError: what surely is needed is more than what is free.
    """
    gpus = [room.device for room in rooms if room.device is not None]
    ranks_on = Counter(room.node for room in rooms)
    per_rank = fixed.host_bytes if gpus else fixed.device_bytes
    free = {node: min(room.host for room in rooms if room.node == node) for node in ranks_on}
    needed = {node: n * per_rank + (fixed.host_export if node == rooms[0].node else 0) for node, n in ranks_on.items()}
    tightest = min(ranks_on, key=lambda node: free[node] - needed[node])
    num_ranks = ranks_on[tightest]
    found = f"{readable(needed[tightest])} of {readable(free[tightest])} free on {tightest} (ranks there: {num_ranks})"
    if gpus:
        found = f"{readable(fixed.device_bytes)} of {readable(min(gpus))} free on a GPU, {found}"
    if needed[tightest] > free[tightest] or (gpus and fixed.device_bytes > min(gpus)):
        raise PreflightError(
            f"{found}; use more nodes, a higher ZeRO stage, bf16, or offload where host memory is to spare"
        )
    left = min(gpus) - fixed.device_bytes if gpus else (free[tightest] - needed[tightest]) // num_ranks
    found = f"{found}, and roughly {readable(rough)} a rank for activations"
    if rough > left:
        return CheckWarning(
            f"{found}, for which {readable(left)} are left; lower train.micro_batch_size or set "
            "model.gradient_checkpointing"
        )
    return found


def estimated_memory(config: RunConfig, size: ModelSize, engine: dict[str, Any], num_ranks: int) -> MemoryEstimate:
    """Memory of one rank without activations, by the merged DeepSpeed config."""
    zero = engine.get("zero_optimization", {})
    live = min(zero.get("stage3_max_live_parameters", 10**9), zero.get("stage3_max_reuse_distance", 10**9))
    sharding = Sharding(
        stage=zero.get("stage", 0),
        num_ranks=num_ranks,
        weight_bytes=_weight_bytes(config),
        gradient_bytes=2 if engine["data_types"]["grad_accum_dtype"] == "bf16" else 4,
        num_moments=NUM_MOMENTS[config.train.optimizer],
        offloads_optimizer=is_offloaded(engine),
        offloads_weights=(zero.get("offload_param") or {}).get("device", "none") != "none",
        bucket=int(zero.get("reduce_bucket_size", 5 * 10**8)),
        live=int(live),
    )
    copied = checkpoint_bytes(
        trained=size.trained,
        optimizer=config.train.optimizer,
        granularity=granularity(config),
        num_units=size.num_units,
    ) + kept_in_checkpoint(config, size, in_domain=True)
    found = memory(
        size,
        sharding,
        granularity=granularity(config),
        has_own_mask=config.method.has_own_mask,
        copied_bytes=copied if config.checkpoint.async_save else 0,
    )
    on_device, on_host = kept_by_rank(config, size, sharding)
    return replace(found, device=found.device | on_device, host=found.host | on_host)


def activation_estimate(config: RunConfig, size: ModelSize) -> int:
    """Activations and logits of one micro-step."""
    is_contrasted = config.method.is_soft_masked and config.method.contrastive.weight > 0.0
    num_rows = config.train.micro_batch_size * (VIEWS_OF_CONTRAST if is_contrasted else 1)
    if config.method.name == "derpp":
        num_rows += -(-config.num_rehearsed * config.train.micro_batch_size // config.train.global_batch_size)
    num_tokens = config.data.sequence_length
    is_masked = find_spec(config.model).objective == "mlm"
    share = config.data.mlm_probability if is_masked else 1.0
    return activation_bytes(
        size,
        num_rows=num_rows,
        num_tokens=num_tokens,
        weight_bytes=_weight_bytes(config),
        is_eager=config.model.attention == "eager",
        is_recomputed=config.model.gradient_checkpointing,
    ) + logits_bytes(
        size,
        num_positions=round(config.train.micro_batch_size * num_tokens * share),
        largest_chunk=config.train.max_logits_mib * UNITS["MiB"],
    )


def _weight_bytes(config: RunConfig) -> int:
    return 4 if config.train.precision == "fp32" else 2


def _largest_layer(model: nn.Module) -> int:
    """Parameters of one layer, or of one module outside the layers."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        layer = re.match(r".*?\.\d+\.", name)
        counts[layer[0] if layer else name.rpartition(".")[0]] += parameter.numel()
    return max(counts.values())
