"""Preflight checks of the model: tokenizer, architecture, stored weights, and whether a run fits into memory."""

from __future__ import annotations

import re
import socket
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from das_ds.config import RunConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.data.objectives import build_collator
from das_ds.data.tokenizers import build_tokenizers
from das_ds.errors import PreflightError
from das_ds.functional.token_ids import num_tokens
from das_ds.functional.units import HEAD, INTERMEDIATE
from das_ds.methods import method_class, method_memory
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.depths import frozen_parameters, known_depths
from das_ds.models.generation import check_prompts
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
from das_ds.models.size import FP32, MatrixSize, MemoryUse, ModelSize, Sharding
from das_ds.preflight.checks import UNITS, Checklist, CheckWarning, format_bytes
from das_ds.preflight.generation import generates, generation_memory
from das_ds.preflight.host_memory import free_memory
from das_ds.preflight.memory_estimate import (
    NUM_MOMENTS,
    ExportSize,
    MemoryEstimate,
    activation_bytes,
    checkpoint_bytes,
    domain_bytes,
    estimate_memory,
    logits_bytes,
)
from das_ds.softmask.planned_matrices import Parameters, plan_hidden_matrices, plan_matrices
from das_ds.training.base_divergence import base_divergence_memory
from das_ds.training.kept_weights import kept_memory

if TYPE_CHECKING:
    # It loads DeepSpeed, which takes seconds that an estimate need not wait for.
    from das_ds.distributed.process_group import RankInfo


@dataclass(frozen=True)
class MemoryBudget:
    """Free bytes, as seen by one rank."""

    node: str
    device: int | None
    """On its GPU; None without one."""
    host: int
    """On its node, for all ranks there."""


def check_model(checks: Checklist, config: RunConfig) -> ModelSize | None:
    """Tokenizers load, the architecture is known and covers all parameters, and blocks fit the positions.

    The model is built without memory for its weights.
    """

    def probe() -> tuple[ModelSize, str]:
        architecture = find_spec(config.model)
        base_tokenizer = load_tokenizer(config)
        base_vocab_size = num_tokens(base_tokenizer.get_vocab())
        tokenizers = build_tokenizers(config, base_tokenizer)
        for tokenizer in tokenizers.values():
            build_collator(architecture.objective, tokenizer, config.data)
        check_prompts(config.method.replay.generation, architecture.objective)
        model = skeleton(model_config(config.model, vocab_size=base_vocab_size), architecture.objective)
        check_embeddings(model, base_vocab_size)
        check_sequence_length(model, architecture, config.data.sequence_length)
        # Domains may add tokens, so the largest tokenizer decides on the size of the embedding.
        max_vocab_size = max(num_tokens(tokenizer.get_vocab()) for tokenizer in tokenizers.values())
        weights = "" if config.model.name_or_path is None else f"; {describe_stored_weights(config.model, model)}"
        return count_parameters(config, model, architecture, max_vocab_size), weights

    def summarize(outcomes: list[tuple[ModelSize, str]]) -> str:
        sizes = [size for size, _ in outcomes]
        if len(set(sizes)) > 1:
            totals = ", ".join(str(size.total) for size in sizes[:8])
            raise PreflightError(f"ranks find models of different sizes: {totals}")
        size, weights = outcomes[0]
        trained = f", of which {size.trained:,} are trained" if size.has_frozen else ""
        return f"{size.total:,} parameters{trained}, {size.num_layers} layers, {size.vocabulary} tokens{weights}"

    outcomes = checks.run("model", "a tokenizer, and a model of a known architecture that fits it", probe, summarize)
    return None if outcomes is None else outcomes[0][0]


def count_parameters(
    config: RunConfig, model: PreTrainedModel, architecture: ArchitectureSpec, num_rows: int
) -> ModelSize:
    """Sizes of a model whose embedding has at least `num_rows` rows, LoRA included.

    For a method that measures inputs of layers the model has to be on the meta device.

    Raises:
        ModelError: the architecture does not fit the model.
        ConfigError: LoRA, or a number of frozen layers, does not fit the model, or rates by layer its architecture.
    """
    layout = architecture.layout(model)
    embedding: Any = model.get_input_embeddings()
    num_embeddings, hidden = embedding.weight.shape
    # A new token adds a row to every parameter with one row per token.
    added_tokens = max(0, num_rows - num_embeddings)
    trained_layout = layout.without(frozen_parameters(model, architecture, config.method.frozen_part))
    total, trained = (
        sum(part.sizes.values()) + added_tokens * sum(part.shapes[n][2] for n in part.vocabulary)
        for part in (layout, trained_layout)
    )
    largest_trained = max(trained_layout.sizes.values())
    lora = None if config.model.lora is None else Lora.plan(model, layout, config.model.lora)
    if lora is not None:
        linears = lora.linears
        largest_trained = max(linear.rank * max(linear.num_inputs, linear.num_outputs) for linear in linears)
        trained = sum(linear.rank * (linear.num_inputs + linear.num_outputs) for linear in linears)
        total += trained
    decay = config.train.layer_lr_decay
    if decay < 1.0:
        known_depths(model, architecture, f"train.layer_lr_decay: found {decay:g}")
    inner = layout.num_units.get(INTERMEDIATE, 4 * hidden)
    parameters: Parameters = ()
    matrices: tuple[MatrixSize, ...] = ()
    planned = method_class(config.method).planned_matrices
    if planned == "inputs":
        parameters, matrices = plan_matrices(model, architecture, layout, lora, added_tokens, by_depth=decay < 1.0)
    elif planned == "hidden":
        parameters, matrices = plan_hidden_matrices(model, architecture, layout, added_tokens, by_depth=decay < 1.0)
    if architecture.has_experts:
        # One token uses only some of the experts.
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
        has_adapters=lora is not None,
        largest_trained=largest_trained,
        parameters=parameters,
        matrices=matrices,
    )


def check_memory(checks: Checklist, config: RunConfig, info: RankInfo, size: ModelSize, engine: EngineConfig) -> None:
    """Needed against free memory; if only the estimate of activations exceeds it, the result is a warning."""
    estimate = estimate_run_memory(config, size, engine, info.world_size)
    if info.device.type == "cpu":
        estimate = estimate.on_cpu()
    activations = activation_estimate(config, size)
    items = {**estimate.device, **estimate.host}
    shown = ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in items.items() if num_bytes)
    host = f", {format_bytes(estimate.host_bytes)} more in host memory" if estimate.host_bytes else ""
    expected = (
        f"room for {format_bytes(estimate.device_bytes)} per rank{host} and for roughly {format_bytes(activations)} of "
        f"activations: {shown}"
    )

    def probe() -> MemoryBudget:
        device = torch.cuda.mem_get_info(info.device)[0] if info.device.type == "cuda" else None
        return MemoryBudget(socket.gethostname(), device, free_memory())

    checks.run("memory", expected, probe, lambda budgets: compare_memory(budgets, estimate, activations))


def compare_memory(budgets: list[MemoryBudget], estimate: MemoryEstimate, activations: int) -> str | CheckWarning:
    """Compare with the node, and the GPU, that have the least to spare.

    Args:
        budgets: of all ranks.
        estimate: of one rank; without GPUs, all of it counts as device memory, which is then the host's.
        activations: estimated bytes of one rank.

    Raises:
        PreflightError: even without activations, more is needed than free.
    """
    gpus = [budget.device for budget in budgets if budget.device is not None]
    num_ranks_by_node = Counter(budget.node for budget in budgets)
    host_per_rank = estimate.host_bytes if gpus else estimate.device_bytes
    free = {node: min(budget.host for budget in budgets if budget.node == node) for node in num_ranks_by_node}
    needed = {node: num_ranks * host_per_rank for node, num_ranks in num_ranks_by_node.items()}
    needed[budgets[0].node] += estimate.host_main
    for rank in estimate.writers:
        needed[budgets[rank].node] += estimate.host_export
    tightest = min(num_ranks_by_node, key=lambda node: free[node] - needed[node])
    num_ranks = num_ranks_by_node[tightest]
    found = (
        f"{format_bytes(needed[tightest])} of {format_bytes(free[tightest])} free on {tightest} (ranks there: "
        f"{num_ranks})"
    )
    if gpus:
        found = f"{format_bytes(estimate.device_bytes)} of {format_bytes(min(gpus))} free on a GPU, {found}"
    if needed[tightest] > free[tightest] or (gpus and estimate.device_bytes > min(gpus)):
        raise PreflightError(
            f"{found}; use more nodes, a higher ZeRO stage, bf16, or offload if host memory is available"
        )
    left = min(gpus) - estimate.device_bytes if gpus else (free[tightest] - needed[tightest]) // num_ranks
    found = f"{found}, and roughly {format_bytes(activations)} a rank for activations"
    if activations > left:
        return CheckWarning(
            f"{found}, for which {format_bytes(left)} are left; lower train.micro_batch_size or set "
            "model.gradient_checkpointing"
        )
    return found


def estimate_run_memory(config: RunConfig, size: ModelSize, engine: EngineConfig, num_ranks: int) -> MemoryEstimate:
    """Memory of one rank without activations, by the merged DeepSpeed config."""
    sharding = zero_sharding(config, engine, num_ranks)
    method = run_memory(config, size, sharding)
    copied = checkpoint_bytes(size.trained, config.train.optimizer) + method.checkpoint - method.checkpoint_in_place
    is_copied = config.checkpoint.async_save
    return estimate_memory(
        size,
        sharding,
        method=method,
        export=export_size(config, size),
        copied_bytes=copied if is_copied else 0,
        copied_of_rank=method.checkpoint_of_rank if is_copied else 0,
    )


def export_size(config: RunConfig, size: ModelSize) -> ExportSize:
    """The exported model; `base` is written in the type of the base model, which is at most float32."""
    return ExportSize((2 if config.export.dtype == "bf16" else FP32) * size.total, config.export.max_shard_bytes)


def unsharded_use(config: RunConfig, size: ModelSize) -> MemoryUse:
    """Bytes that method, kept weights and generated text add to checkpoints and folders, over all ranks, however they
    are sharded."""
    weight_bytes = _weight_bytes(config)
    sharding = Sharding(
        stage=0,
        num_ranks=1,
        weight_bytes=weight_bytes,
        gradient_bytes=weight_bytes,
        num_moments=NUM_MOMENTS[config.train.optimizer],
    )
    return run_memory(config, size, sharding)


def run_memory(config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
    """What a run needs in addition to model and optimizer: method, kept weights, base weights, generated text."""
    parts = (method_memory, kept_memory, base_divergence_memory)
    use = sum((part(config, size, sharding) for part in parts), MemoryUse())
    if not generates(config):
        return use
    return use + generation_memory(config, size, sharding, find_spec(config.model).objective)


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a run writes, over all ranks."""

    checkpoint: int
    """A checkpoint within a domain."""
    domain: int
    """Every domain: the checkpoint at its end, the exported model, and the method's files."""
    run: int
    """The method's files of the complete run."""
    num_checkpoints: int
    """Checkpoints that exist at once: those that are kept, and the one that is being written."""
    num_domains: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.num_checkpoints * self.checkpoint + self.num_domains * self.domain + self.run


def disk_use(config: RunConfig, size: ModelSize, num_ranks: int) -> DiskUse:
    """Disk space of a run on so many ranks."""
    method = unsharded_use(config, size)
    method_checkpoint = method.checkpoint + num_ranks * method.checkpoint_of_rank
    num_kept_moments = 0 if config.train.reset_optimizer else NUM_MOMENTS[config.train.optimizer]
    return DiskUse(
        checkpoint=checkpoint_bytes(size.trained, config.train.optimizer) + method_checkpoint,
        domain=domain_bytes(size, num_kept_moments) + method.domain,
        run=method.run,
        # While a checkpoint is written, those to keep are still there.
        num_checkpoints=config.checkpoint.keep_last + 1,
        # A run that continues another one keeps the state in which it began, too.
        num_domains=len(config.own_stages) + (config.num_earlier > 0),
    )


def zero_sharding(config: RunConfig, engine: EngineConfig, num_ranks: int) -> Sharding:
    """How the merged DeepSpeed config divides the network."""
    zero = engine.raw.get("zero_optimization", {})
    live = min(zero.get("stage3_max_live_parameters", 10**9), zero.get("stage3_max_reuse_distance", 10**9))
    return Sharding(
        stage=engine.zero_stage,
        num_ranks=num_ranks,
        weight_bytes=_weight_bytes(config),
        gradient_bytes=2 if engine.grad_accum_dtype == "bf16" else 4,
        num_moments=NUM_MOMENTS[config.train.optimizer],
        offloads_optimizer=engine.is_offloaded,
        offloads_weights=(zero.get("offload_param") or {}).get("device", "none") != "none",
        bucket=int(zero.get("reduce_bucket_size", 5 * 10**8)),
        num_buckets=2 if zero.get("overlap_comm") and engine.zero_stage in (1, 2) else 1,
        live=int(live),
    )


def activation_estimate(config: RunConfig, size: ModelSize) -> int:
    """Estimated bytes of activations and logits of one micro-step."""
    num_rows = config.train.micro_batch_size + unsharded_use(config, size).extra_rows
    num_tokens = config.data.sequence_length
    is_masked = find_spec(config.model).objective == "mlm"
    predicted_fraction = config.data.mlm_probability if is_masked else 1.0
    return activation_bytes(
        size,
        num_rows=num_rows,
        num_tokens=num_tokens,
        weight_bytes=_weight_bytes(config),
        is_eager=config.model.attention == "eager",
        is_recomputed=config.model.gradient_checkpointing,
    ) + logits_bytes(
        size,
        num_positions=round(config.train.micro_batch_size * num_tokens * predicted_fraction),
        largest_chunk=config.train.max_logits_mib * UNITS["MiB"],
    )


def forward_estimate(config: RunConfig, size: ModelSize) -> int:
    """Estimated bytes of activations and logits of a forward pass over a method's sample, without gradients."""
    sample = config.method.sample_size
    num_rows = (sample and sample.batch_size) or config.train.micro_batch_size
    num_tokens = config.data.sequence_length
    activations = activation_bytes(
        replace(size, num_layers=1),
        num_rows=num_rows,
        num_tokens=num_tokens,
        weight_bytes=_weight_bytes(config),
        is_eager=config.model.attention == "eager",
        is_recomputed=False,
    )
    largest_chunk = config.train.max_logits_mib * UNITS["MiB"]
    return activations + logits_bytes(size, num_positions=num_rows * num_tokens, largest_chunk=largest_chunk)


def _weight_bytes(config: RunConfig) -> int:
    return 4 if config.train.precision == "fp32" else 2


def _largest_layer(model: nn.Module) -> int:
    """Parameters of one layer, or of one module outside the layers."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        layer = re.match(r".*?\.\d+\.", name)
        counts[layer[0] if layer else name.rpartition(".")[0]] += parameter.numel()
    return max(counts.values())
