"""The DeepSpeed config of a run: engine knobs by name or from a JSON file, everything else from the run config.

DeepSpeed lets one file set batch sizes, precision, clipping and the optimizer. Here the run config owns them; a file
that contradicts it is an error and never a silent choice between the two.
"""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from das_ds.config import RunConfig
from das_ds.config.deepspeed_keys import AUTO, checked_engine
from das_ds.config.method import load_methods
from das_ds.errors import ConfigError
from das_ds.shipped_files import shipped_folder
from das_ds.user_files import read_text

ZERO_STAGES = (0, 1, 2, 3)
ENGINE_DEFAULTS = {
    # Masked AdamW is a torch optimizer that DeepSpeed does not know, also under offload.
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "wall_clock_breakdown": False,
    "steps_per_print": 10**9,
}


@dataclass(frozen=True)
class EngineConfig:
    """DeepSpeed's settings, merged and checked, and the facts that das_ds reads from them."""

    raw: dict[str, Any]
    """For `deepspeed.initialize`."""
    zero_stage: int
    is_offloaded: bool
    """Whether the optimizer's weights and moments are in host memory."""
    grad_accum_dtype: str
    """In which the gradients of micro-steps are summed, `fp32` or `bf16`."""
    has_secondary_shards: bool
    """Whether ZeRO-3 keeps a second copy of the weights, sharded within a node (`zero_hpz_partition_size`)."""

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> EngineConfig:
        """The facts of a DeepSpeed config.

        Raises:
            ConfigError: the ZeRO stage is not 0, 1, 2 or 3.
        """
        zero = _section(raw, "zero_optimization")
        offload = zero.get("offload_optimizer") or {}
        return cls(
            raw=raw,
            zero_stage=_zero_stage(raw),
            is_offloaded=offload.get("device", "none") != "none",
            grad_accum_dtype=_section(raw, "data_types").get("grad_accum_dtype", "fp32"),
            has_secondary_shards=zero.get("zero_hpz_partition_size", AUTO) not in (AUTO, 1),
        )

    def without_leaf_modules(self) -> EngineConfig:
        """The config for a network with experts, which ZeRO-3 is to treat like any other.

        DeepSpeed makes leaf modules of the expert layers it knows: a hook of the complete layer pads their gradients
        with zeros and reduces them, and it fires in importance passes as well. transformers keeps a layer's experts in
        parameters that are used all together, so that nothing needs padding.
        """
        zero = {**_section(self.raw, "zero_optimization"), "leaf_module": {"classes": []}}
        return replace(self, raw={**self.raw, "zero_optimization": zero})


def build_engine_config(config: RunConfig, world_size: int) -> EngineConfig:
    """The engine's config: engine knobs of `config.deepspeed` plus the keys that the run config owns.

    Raises:
        ConfigError: name unknown, file missing or not a JSON object, a key or value that is not listed in
            `config/deepspeed_keys.py`, a value that contradicts the run config, an own optimizer or scheduler, fp16 at
            stage 0, offload or shards that do not fit the stage or the ranks, batch sizes that do not divide, or
            settings that the method does not support.
    """
    engine = checked_engine(_read_engine(config.deepspeed))
    _refuse_unsupported(engine, config.train.precision)
    _refuse_misfits(engine, world_size)
    for key, (owner, value) in _owned_values(config, engine, world_size).items():
        _set_owned(engine, key, owner, value)
    engine_config = EngineConfig.from_raw(ENGINE_DEFAULTS | engine)
    load_methods().validate_method(config, engine_config)
    return engine_config


def with_zero_stage(config: RunConfig, stage: int) -> RunConfig:
    """The run with all engine knobs of its DeepSpeed file but the ZeRO stage.

    Raises:
        ConfigError: the name is unknown, or the file is missing or not a JSON object.
    """
    engine = _read_engine(config.deepspeed)
    engine["zero_optimization"] = {**_section(engine, "zero_optimization"), "stage": stage}
    return config.model_copy(update={"deepspeed": engine})


def _zero_stage(engine: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config; 0 where none is given."""
    stage = _section(engine, "zero_optimization").get("stage", 0)
    if isinstance(stage, bool) or stage not in ZERO_STAGES:
        raise ConfigError(f"deepspeed zero_optimization.stage: found {stage!r}, allowed: 0, 1, 2 or 3")
    return int(stage)


def _read_engine(source: str | dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, dict):
        return copy.deepcopy(source)
    path = _locate(source)
    try:
        engine = json.loads(read_text(path), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ConfigError(f"deepspeed: {path} is not a readable JSON file: too many values within each other") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: {path} is not a readable JSON file: {error}") from None
    if not isinstance(engine, dict):
        raise ConfigError(
            f"deepspeed: {path} contains a {type(engine).__name__}, expected a JSON object of engine knobs"
        )
    return engine


def _locate(source: str) -> Path:
    """The file of one of the names that das_ds brings, whatever lies in the working directory, or of a path."""
    shipped = {path.stem: path for path in sorted(shipped_folder("ds_configs").glob("*.json"))}
    if source in shipped:
        return shipped[source]
    # Not Path.exists, which raises an error where the text cannot be a path.
    if os.path.exists(source) and not os.path.isdir(source):
        return Path(source)
    raise ConfigError(
        f"deepspeed: found {source!r}, which is no file in {Path.cwd()}; expected one of {', '.join(shipped)}, or the "
        "path of a DeepSpeed file"
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"found key {next(name for name in names if names.count(name) > 1)} twice")
    return unique


def _refuse_unsupported(engine: dict[str, Any], precision: str) -> None:
    if _zero_stage(engine) == 0 and precision == "fp16":
        raise ConfigError(
            "train.precision: found fp16 at zero_optimization.stage 0, where DeepSpeed divides gradients by a loss "
            "scale that it never multiplied the loss by; allowed: fp16 at stage 1, 2 or 3, bf16 or fp32 at stage 0"
        )
    for key in ("optimizer", "scheduler"):
        if engine.get(key, AUTO) != AUTO:
            raise ConfigError(
                f"deepspeed {key}: found {engine[key]!r}, expected none: das_ds brings its own (train.learning_rate, "
                "train.lr_scheduler and the other keys of train)"
            )


def _refuse_misfits(engine: dict[str, Any], world_size: int) -> None:
    """Refuse settings that DeepSpeed would silently ignore, or that would fail on some ranks only."""
    zero = _section(engine, "zero_optimization")
    stage = _zero_stage(engine)
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if zero.get(key, {}).get("device", "none") != "none" and stage < least:
            raise ConfigError(
                f"deepspeed zero_optimization.{key}.device: found {zero[key]['device']!r} at stage {stage}, where "
                f"nothing is offloaded by it; allowed: stage {least} or higher, or none"
            )
    own_shards = min(int(zero.get("zero_hpz_partition_size", 1)), world_size)
    if world_size % own_shards:
        raise ConfigError(
            f"deepspeed zero_optimization.zero_hpz_partition_size: found {own_shards}, expected a divisor of the "
            f"number of ranks, {world_size}"
        )


def _owned_values(config: RunConfig, engine: dict[str, Any], world_size: int) -> dict[str, tuple[str, Any]]:
    """DeepSpeed key -> (run config key that owns it, value)."""
    train = config.train
    return {
        "train_batch_size": ("train.global_batch_size", train.global_batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch_size", train.micro_batch_size),
        "gradient_accumulation_steps": (
            f"train.global_batch_size / (train.micro_batch_size x {world_size} ranks)",
            _accumulation_steps(train.global_batch_size, train.micro_batch_size, world_size),
        ),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm),
        "fp16.enabled": ("train.precision", train.precision == "fp16"),
        "fp16.fp16_master_weights_and_grads": ("train.precision (the optimizer keeps fp32)", False),
        "bf16.enabled": ("train.precision", train.precision == "bf16"),
        "bf16.bf16_master_weights_and_grads": ("train.precision (the optimizer keeps fp32)", False),
        "data_types.grad_accum_dtype": ("train.precision at this stage", _accumulation_dtype(engine, train.precision)),
    }


def _accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass:
        below, above = (rounding(global_batch_size / per_pass) * per_pass for rounding in (math.floor, math.ceil))
        raise ConfigError(
            f"train.global_batch_size: found {global_batch_size}, expected a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {world_size} ranks; nearest allowed: "
            + (f"{below} or {above}" if below else f"{above}")
        )
    return global_batch_size // per_pass


def _accumulation_dtype(engine: dict[str, Any], precision: str) -> str:
    """The dtype in which gradients of one step are summed: fp32 wherever DeepSpeed shards the optimizer with it.

    With bf16 weights, fp32 sums do not exist at stage 0, and at stage 1 they select an optimizer that keeps the
    complete gradient on every rank.
    """
    return "bf16" if precision == "bf16" and _zero_stage(engine) < 2 else "fp32"


def _set_owned(engine: dict[str, Any], key: str, owner: str, value: Any) -> None:
    name, _, leaf = key.rpartition(".")
    section = _section(engine, name) if name else engine
    found = section.get(leaf, AUTO)
    if found != AUTO and (isinstance(found, bool) != isinstance(value, bool) or found != value):
        raise ConfigError(
            f"deepspeed {key}: found {found!r} in the DeepSpeed file, but {owner} in the run config gives {value!r}; "
            'leave it out of the file, or set "auto"'
        )
    section[leaf] = value
    if name:
        engine[name] = section


def _section(engine: dict[str, Any], name: str) -> dict[str, Any]:
    section = engine.get(name, {})
    if section == AUTO:
        return {}
    if not isinstance(section, dict):
        raise ConfigError(f"deepspeed {name}: found {section!r}, expected a JSON object")
    return section
