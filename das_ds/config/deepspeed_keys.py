"""Allow-list of the keys of a DeepSpeed file; everything else in DeepSpeed is untested under das_ds.

DeepSpeed itself ignores most unknown keys, so that a misspelled section silently leaves ZeRO off. `"auto"` means the
same as in DeepSpeed: the value of the run config where that owns the key, else DeepSpeed's default.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from das_ds.errors import ConfigError

AUTO = "auto"


@dataclass(frozen=True)
class Kind:
    """Allowed values of a key."""

    allowed: str
    """In words."""
    accepts: Callable[[Any], bool]


def one_of(*values: Any, reason: str = "") -> Kind:
    """One of these values, and of their type: JSON's true is not 1."""
    words = [json.dumps(value).strip('"') for value in values]
    allowed = " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
    typed = [(type(value), value) for value in values]
    return Kind(f"{allowed}{reason and f' ({reason})'}", lambda found: (type(found), found) in typed)


def _is_number(found: Any) -> bool:
    return (isinstance(found, int) and not isinstance(found, bool)) or (
        isinstance(found, float) and math.isfinite(found)
    )


def number(least: float, most: float = 1e18) -> Kind:
    """A number of this range."""
    return Kind(f"a number from {least:g} to {most:g}", lambda found: _is_number(found) and least <= found <= most)


def count(least: int, most: float = 1e18) -> Kind:
    """An integer of this range, which JSON may write as 5e8."""
    return Kind(
        f"an integer from {least} to {most:g}",
        lambda found: _is_number(found) and least <= found <= most and found == int(found),
    )


SWITCH = one_of(True, False)
NO_NVME = one_of(None, reason="offload to NVMe is not supported")
OWNED = Kind("the value of the run config", lambda found: True)
"""Compared with the run config when both are merged."""

KEYS: dict[str, Kind] = {
    # The run config's.
    "train_batch_size": OWNED,
    "train_micro_batch_size_per_gpu": OWNED,
    "gradient_accumulation_steps": OWNED,
    "gradient_clipping": OWNED,
    "optimizer": OWNED,
    "scheduler": OWNED,
    "data_types.grad_accum_dtype": OWNED,
    "bf16.enabled": OWNED,
    "bf16.bf16_master_weights_and_grads": OWNED,
    "fp16.enabled": OWNED,
    "fp16.fp16_master_weights_and_grads": OWNED,
    # Precision.
    "bf16.check_grad_overflow": SWITCH,
    "bf16.bf16_optimizer_states": one_of(False, reason="the optimizer keeps fp32"),
    "bf16.immediate_grad_update": one_of(False, reason="gradients of a step are added up first"),
    "fp16.auto_cast": one_of(False, reason="inputs are token ids"),
    "fp16.loss_scale": number(0),
    "fp16.initial_scale_power": count(0, 126),
    "fp16.loss_scale_window": count(1),
    "fp16.hysteresis": count(1),
    "fp16.consecutive_hysteresis": SWITCH,
    "fp16.min_loss_scale": number(0),
    # ZeRO.
    "zero_optimization.stage": one_of(0, 1, 2, 3),
    "zero_optimization.overlap_comm": one_of(True, False, None),
    "zero_optimization.contiguous_gradients": SWITCH,
    "zero_optimization.reduce_scatter": SWITCH,
    "zero_optimization.reduce_bucket_size": count(1),
    "zero_optimization.allgather_bucket_size": count(1),
    "zero_optimization.allgather_partitions": one_of(True, reason="broadcasts are untested"),
    "zero_optimization.sub_group_size": count(1),
    "zero_optimization.stage3_prefetch_bucket_size": count(0),
    "zero_optimization.stage3_param_persistence_threshold": count(0),
    "zero_optimization.stage3_model_persistence_threshold": count(0, 2**63),
    "zero_optimization.stage3_max_live_parameters": count(0),
    "zero_optimization.stage3_max_reuse_distance": count(0),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": SWITCH,
    "zero_optimization.stage3_module_granularity_threshold": one_of(
        0, reason="leaf modules reduce gradients in importance passes too, which are to leave gradients alone"
    ),
    "zero_optimization.zero_hpz_partition_size": count(1, 2**31),
    "zero_optimization.memory_efficient_linear": SWITCH,
    "zero_optimization.log_trace_cache_warnings": SWITCH,
    "zero_optimization.enable_sanity_checks": SWITCH,
    "zero_optimization.ignore_unused_parameters": one_of(True, reason="heads that a pass leaves out are no error"),
    "zero_optimization.round_robin_gradients": one_of(
        False,
        reason="with it DeepSpeed reports wrong places of most parameters in the optimizer's shards, so that masks "
        "would act on the wrong weights",
    ),
    "zero_optimization.zero_quantized_weights": one_of(False, reason="ZeRO++ quantization is not supported"),
    "zero_optimization.zero_quantized_nontrainable_weights": one_of(
        False, reason="ZeRO++ quantization is not supported"
    ),
    "zero_optimization.zero_quantized_gradients": one_of(
        False, reason="ZeRO++ quantization is not supported: importance of quantized gradients is not defined"
    ),
    "zero_optimization.offload_optimizer.device": one_of("none", "cpu", reason="offload to NVMe is not supported"),
    "zero_optimization.offload_optimizer.pin_memory": SWITCH,
    "zero_optimization.offload_optimizer.ratio": Kind(
        "1 (all of the optimizer or nothing)", lambda found: _is_number(found) and found == 1
    ),
    "zero_optimization.offload_optimizer.super_offload": one_of(False, reason="SuperOffload is not supported"),
    "zero_optimization.offload_optimizer.nvme_path": NO_NVME,
    "zero_optimization.offload_optimizer.fast_init": one_of(False, reason="it is for NVMe, which is not supported"),
    "zero_optimization.offload_optimizer.pipeline_read": one_of(False, reason="it is for NVMe, which is not supported"),
    "zero_optimization.offload_optimizer.pipeline_write": one_of(
        False, reason="it is for NVMe, which is not supported"
    ),
    "zero_optimization.offload_param.device": one_of("none", "cpu", reason="offload to NVMe is not supported"),
    "zero_optimization.offload_param.pin_memory": SWITCH,
    "zero_optimization.offload_param.nvme_path": NO_NVME,
    # Required by das_ds's own optimizer.
    "zero_allow_untested_optimizer": one_of(True, reason="the optimizer is das_ds's"),
    "zero_force_ds_cpu_optimizer": one_of(False, reason="train.optimizer names the optimizer"),
    # Communication and logs.
    "communication_data_type": one_of("fp32", "fp16", "bf16", None),
    "prescale_gradients": one_of(False, reason="untested"),
    "steps_per_print": count(1),
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
    "comms_logger.enabled": SWITCH,
    "comms_logger.verbose": SWITCH,
    "comms_logger.prof_all": SWITCH,
    "comms_logger.debug": SWITCH,
    "comms_logger.prof_ops": Kind("a list of operations", lambda found: isinstance(found, list)),
}
SECTIONS = {key.rpartition(".")[0] for key in KEYS if "." in key}
OPTIONAL_SECTIONS = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
"""May be null."""
MUST_BE_SAID = ("zero_optimization.stage", *(f"{section}.device" for section in OPTIONAL_SECTIONS))
"""Keys for which "auto" would leave the placement of weights or optimizer open."""

REASONS = {
    "activation_checkpointing": "the networks' own is used (model.gradient_checkpointing)",
    "aio": "offload to NVMe is not supported",
    "amp": "precision is train.precision",
    "torch_autocast": "precision is train.precision",
    "bfloat16": "its name is bf16",
    "autotuning": "it starts its own runs",
    "compile": "DeepCompile is not supported",
    "compression_training": "compression is not supported",
    "csv_monitor": "metrics are das_ds's (metrics.jsonl)",
    "data_efficiency": "the order of the data is das_ds's",
    "curriculum_learning": "the order of the data is das_ds's",
    "elasticity": "batch sizes are the run config's",
    "expert_parallel": "expert parallelism is not supported",
    "pipeline": "pipeline parallelism is not supported",
    "sequence_parallel_size": "sequence parallelism is not supported",
    "tensor_parallel": "tensor parallelism (AutoTP) is not supported",
    "tensorboard": "metrics are das_ds's (tracking in the run config)",
    "wandb": "metrics are das_ds's (tracking and wandb in the run config)",
    "weight_quantization": "quantization is not supported",
    "zero_optimization.zenflow": "ZenFlow is not supported",
    "zero_optimization.cpu_offload": "its name is offload_optimizer",
    "zero_optimization.cpu_offload_param": "its name is offload_param",
    "zero_optimization.leaf_module": (
        "leaf modules reduce gradients in importance passes too, which are to leave gradients alone"
    ),
}
"""DeepSpeed keys that users may try -> why they are refused."""


def checked_engine(engine: dict[str, Any]) -> dict[str, Any]:
    """Validated copy without keys that are `"auto"` or null.

    Raises:
        ConfigError: an unknown or unsupported key, with the nearest known one, or a value that is not allowed.
    """
    return _checked_section(engine, "")


def _checked_section(section: dict[str, Any], prefix: str) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, value in section.items():
        key = f"{prefix}{name}"
        if "." in name:
            # DeepSpeed ignores it, though the dotted name of a key is in the list.
            raise ConfigError(
                f"deepspeed {key}: found a dotted key, expected sections within each other, such as "
                '{"zero_optimization": {"stage": 2}}'
            )
        if key in SECTIONS:
            inner = _section_value(key, value)
            checked |= {} if inner is None else {name: inner}
        elif _checked_value(key, value) != AUTO:
            checked[name] = value
    return checked


def _section_value(key: str, value: Any) -> dict[str, Any] | None:
    if value == AUTO or (value is None and key in OPTIONAL_SECTIONS):
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"deepspeed {key}: found {value!r}, expected a JSON object")
    return _checked_section(value, f"{key}.")


def _checked_value(key: str, value: Any) -> Any:
    """The value, or "auto"."""
    kind = KEYS.get(key)
    if kind is None:
        raise ConfigError(f"deepspeed {key}: {_why_not(key, value)}")
    if value == AUTO and key not in MUST_BE_SAID:
        return AUTO
    if not kind.accepts(value):
        raise ConfigError(f"deepspeed {key}: found {_shown(value)}, allowed: {kind.allowed}")
    return value


def _why_not(key: str, value: Any) -> str:
    if key in REASONS:
        return f"found {_shown(value)}, expected no such key: {REASONS[key]}"
    section, _, name = key.rpartition(".")
    known = sorted({*KEYS, *SECTIONS})
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    # A high cutoff: long names may share most of their letters without being misspellings.
    if nearest := difflib.get_close_matches(name, siblings, n=1, cutoff=0.75):
        return f"unknown key; did you mean {f'{section}.' if section else ''}{nearest[0]}?"
    elsewhere = [other for other in known if other.rpartition(".")[2] in (name, f"stage3_{name}")]
    if elsewhere:
        return f"unknown key; did you mean {elsewhere[0]}?"
    where = f"in {section}" if section else "at the top"
    return f"unknown or untested key; allowed {where}: {', '.join(siblings)}"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
