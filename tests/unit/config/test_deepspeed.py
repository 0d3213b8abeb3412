"""The merge of run config and DeepSpeed file: one owner per value, contradictions refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from das_ds.config import RunConfig, parse_method
from das_ds.config.deepspeed import EngineConfig, build_engine_config
from das_ds.config.deepspeed_keys import KEYS
from das_ds.errors import ConfigError
from das_ds.shipped_files import shipped_folder
from helpers.configs import make_config

FILES = sorted(shipped_folder("ds_configs").glob("*.json"))


def run_config(deepspeed: str | dict[str, Any], **train: Any) -> RunConfig:
    sizes = {"global_batch_size": 256, "micro_batch_size": 32, "precision": "bf16", "max_grad_norm": 1.0}
    overrides = [f"train.{key}={json.dumps(value)}" for key, value in {**sizes, **train}.items()]
    return make_config("run", *overrides, f"deepspeed={json.dumps(deepspeed)}")


def error_message(deepspeed: str | dict[str, Any], world_size: int = 4, **train: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build_engine_config(run_config(deepspeed, **train), world_size)
    return str(caught.value)


def test_engine_config_sets_owned_values() -> None:
    engine = build_engine_config(run_config({}, max_grad_norm=0.5), world_size=4).raw
    assert engine["train_batch_size"] == 256
    assert engine["train_micro_batch_size_per_gpu"] == 32
    assert engine["gradient_accumulation_steps"] == 2
    assert engine["gradient_clipping"] == 0.5
    assert engine["bf16"] == {"enabled": True, "bf16_master_weights_and_grads": False}
    assert engine["fp16"] == {"enabled": False, "fp16_master_weights_and_grads": False}
    assert engine["zero_allow_untested_optimizer"] is True
    assert engine["zero_force_ds_cpu_optimizer"] is False


def test_engine_config_knobs_pass_through() -> None:
    knobs = {
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "steps_per_print": 5,
        "comms_logger": {"verbose": False},
    }
    engine = build_engine_config(run_config(knobs), world_size=1).raw
    assert {name: engine[name] for name in knobs} == knobs


def test_engine_config_leaves_inline_content_unchanged() -> None:
    config = run_config({"zero_optimization": {"stage": 2}, "bf16": {"check_grad_overflow": False}})
    engine = build_engine_config(config, world_size=1).raw
    assert engine["bf16"]["check_grad_overflow"] is False
    assert config.deepspeed == {"zero_optimization": {"stage": 2}, "bf16": {"check_grad_overflow": False}}


def test_engine_config_accepts_auto_and_equal_values() -> None:
    engine = build_engine_config(
        run_config(
            {
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": 32,
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 1,
                "optimizer": "auto",
                "bf16": "auto",
                "fp16": {"enabled": "auto"},
            }
        ),
        world_size=4,
    ).raw
    assert engine["train_batch_size"] == 256
    assert engine["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"train_batch_size": 128}, "train_batch_size: found 128 in the DeepSpeed file, but train.global_batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "but train.micro_batch_size in the run config gives 32"),
        ({"gradient_accumulation_steps": 1}, "but train.global_batch_size / (train.micro_batch_size x 4 ranks)"),
        ({"gradient_clipping": 0.1}, "gradient_clipping: found 0.1 in the DeepSpeed file, but train.max_grad_norm"),
        ({"gradient_clipping": True}, "gradient_clipping: found True in the DeepSpeed file, but train.max_grad_norm"),
        ({"bf16": {"enabled": False}}, "bf16.enabled: found False in the DeepSpeed file, but train.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled: found True in the DeepSpeed file, but train.precision"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "(the optimizer keeps fp32)"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "(the optimizer keeps fp32)"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype: found 'fp32'"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer: found {'type': 'AdamW'}, expected none: das_ds brings its own"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: found {'type': 'WarmupLR'}, expected none"),
        ({"bf16": True}, "deepspeed bf16: found True, expected a JSON object"),
        ({"zero_optimization": 3}, "deepspeed zero_optimization: found 3, expected a JSON object"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: found 4, allowed: 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: found true, allowed: 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage: found '2', allowed: 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "round_robin_gradients: found true, allowed: false (with it DeepSpeed reports wrong places",
        ),
        (
            {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["Block"]}}},
            "leaf_module: found {'classes': ['Block']}, expected no such key: leaf modules reduce gradients",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 100}},
            "stage3_module_granularity_threshold: found 100, allowed: 0 (leaf modules",
        ),
    ],
)
def test_engine_config_contradiction_is_error(engine: dict[str, Any], expected: str) -> None:
    assert expected in error_message(engine)


@pytest.mark.parametrize(
    ("method", "cause"),
    [
        ("kd", "method.name kd"),
        ({"name": "ncl", "replay": {"fraction": 0.5, "loss": "kl"}}, "method.replay.loss kl"),
    ],
)
def test_engine_config_teacher_with_secondary_shards_is_error(method: str | dict[str, Any], cause: str) -> None:
    config = run_config({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}})
    later = config.domains[0].model_copy(update={"name": "later"})
    changes = {"method": parse_method(method), "domains": [*config.domains, later]}
    build_engine_config(config, world_size=1)
    with pytest.raises(ConfigError) as caught:
        build_engine_config(config.model_copy(update=changes), world_size=1)
    assert f"zero_hpz_partition_size: found 8 with {cause}, allowed: 1" in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation: unknown key; did you mean zero_optimization?"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "zero_optimization.overlap_com: unknown key; did you mean zero_optimization.overlap_comm?",
        ),
        (
            {"zero_optimization": {"prefetch_bucket_size": 5}},
            "prefetch_bucket_size: unknown key; did you mean zero_optimization.stage3_prefetch_bucket_size?",
        ),
        ({"stage": 2}, "deepspeed stage: unknown key; did you mean zero_optimization.stage?"),
        ({"fp17": {}}, "deepspeed fp17: unknown key; did you mean fp16?"),
        ({"frobnicate": 1}, "deepspeed frobnicate: unknown or untested key; allowed at the top: bf16, "),
        ({"zero_optimization": {"zenflow": {}}}, "zenflow: found {}, expected no such key: ZenFlow is not supported"),
        ({"tensor_parallel": {"autotp_size": 2}}, "expected no such key: tensor parallelism (AutoTP) is not supported"),
        ({"compile": {"deepcompile": True}}, "expected no such key: DeepCompile is not supported"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "allowed: false (ZeRO++ quantization"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "allowed: false (ZeRO++ quantization"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "found 'nvme', allowed: none or cpu"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "found 'nvme', allowed: none or cpu"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.3}}}, "ratio: found 0.3, allowed: 1 (all of"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "super_offload: found true, allowed:"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "reduce_bucket_size: found '5e8', allowed: an integer"),
        ({"zero_optimization": {"reduce_bucket_size": 10**400}}, "reduce_bucket_size: found 1000"),
        ({"zero_optimization": {"reduce_bucket_size": True}}, "reduce_bucket_size: found true, allowed: an integer"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage: found 'auto', allowed: 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}, "stage": 2}},
            "allowed: stage 3 or higher, or none",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "found 'cpu' at stage 0, where nothing"),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}},
            "found 3, expected a divisor of the number",
        ),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer: found true, allowed: false"),
        ({"communication_data_type": "fp8"}, "found 'fp8', allowed: fp32, fp16, bf16 or null"),
    ],
)
def test_engine_keys_unlisted_key_or_value_is_error(engine: dict[str, Any], expected: str) -> None:
    assert expected in error_message(engine)


def test_engine_keys_listed_values_mean_the_same_to_deepspeed() -> None:
    """No key of the list is one that DeepSpeed does not know: each of its own models refuses or drops such."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import config as constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models: dict[str, Any] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
    }
    source = Path(constants.__file__).with_name("constants.py").read_text(encoding="utf-8")
    for key in KEYS:
        section, _, name = key.rpartition(".")
        if section in models:
            fields = models[section].model_fields
            assert name in {field.alias or known for known, field in fields.items()}, key
        else:
            assert f'"{name}"' in source or f"'{name}'" in source, key


def test_engine_config_auto_is_run_value_or_default() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    hugging_face = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": "auto",
            "stage3_max_reuse_distance": 1e9,
            "offload_optimizer": "auto",
            "offload_param": None,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    engine = build_engine_config(run_config(hugging_face), world_size=1).raw
    assert "auto" not in json.dumps(engine)
    assert (engine["train_batch_size"], engine["gradient_accumulation_steps"]) == (256, 8)
    parsed = DeepSpeedConfig({**engine})
    default = DeepSpeedConfig({"train_batch_size": 256, "zero_optimization": {"stage": 3}}).zero_config
    assert parsed.zero_config.reduce_bucket_size == default.reduce_bucket_size
    assert parsed.zero_config.max_live_parameters == default.max_live_parameters
    assert parsed.zero_config.offload_optimizer is None
    assert parsed.bfloat16_config.enabled and not parsed.float16_config.enabled


@pytest.mark.parametrize(
    ("global_batch_size", "nearest"), [(300, "256 or 384"), (100, "128"), (129, "128 or 256"), (255, "128 or 256")]
)
def test_engine_config_indivisible_batch_names_nearest(global_batch_size: int, nearest: str) -> None:
    message = error_message({}, global_batch_size=global_batch_size)
    assert message == (
        f"train.global_batch_size: found {global_batch_size}, expected a multiple of train.micro_batch_size 32 "
        f"x 4 ranks; nearest allowed: {nearest}"
    )


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ({"importance": {"gradient_batch_size": 6}}, "method.importance.gradient_batch_size"),
        ({"name": "ewc", "gradient_batch_size": 6}, "method.gradient_batch_size"),
    ],
)
def test_engine_config_gradient_batch_size_is_multiple_of_ranks(method: dict[str, Any], key: str) -> None:
    config = run_config({}).model_copy(update={"method": parse_method(method)})
    assert build_engine_config(config, world_size=2).raw["gradient_accumulation_steps"] == 4
    with pytest.raises(ConfigError, match=rf"^{key}: found 6, expected a multiple of .* ranks, 4"):
        build_engine_config(config, world_size=4)


@pytest.mark.parametrize(
    ("precision", "zero", "expected"),
    [
        ("fp32", {"stage": 0}, "fp32"),
        ("fp32", {"stage": 1}, "fp32"),
        ("bf16", {"stage": 0}, "bf16"),
        ("bf16", {"stage": 1}, "bf16"),
        ("bf16", {"stage": 2}, "fp32"),
        ("bf16", {"stage": 3}, "fp32"),
        ("fp16", {"stage": 1}, "fp32"),
        ("fp16", {"stage": 3}, "fp32"),
    ],
)
def test_accumulation_dtype_is_fp32_where_possible(precision: str, zero: dict[str, Any], expected: str) -> None:
    engine = build_engine_config(run_config({"zero_optimization": zero}, precision=precision), world_size=1)
    assert engine.raw["data_types"] == {"grad_accum_dtype": expected} and engine.grad_accum_dtype == expected


def test_engine_config_fp16_at_stage_0_is_error() -> None:
    message = error_message({"zero_optimization": {"stage": 0}}, precision="fp16")
    assert message.startswith("train.precision: found fp16 at zero_optimization.stage 0, where DeepSpeed divides")
    assert "allowed: fp16 at stage 1, 2 or 3, bf16 or fp32 at stage 0" in message


def test_engine_config_loss_scaler_comes_from_file() -> None:
    knobs = {"initial_scale_power": 12, "loss_scale_window": 500, "hysteresis": 1, "min_loss_scale": 2}
    engine = build_engine_config(
        run_config({"zero_optimization": {"stage": 2}, "fp16": knobs}, precision="fp16"), world_size=1
    ).raw
    assert engine["fp16"] == {**knobs, "enabled": True, "fp16_master_weights_and_grads": False}
    assert engine["bf16"]["enabled"] is False


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ds_configs_hold_engine_knobs_only(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {"zero_optimization"}
    zero = content["zero_optimization"]
    assert f"zero{zero['stage']}" == path.stem.removesuffix("_offload")
    assert ("offload_optimizer" in zero) == path.stem.endswith("_offload")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ds_configs_are_accepted_by_deepspeed(path: Path, precision: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    engine = build_engine_config(run_config(path.stem, precision=precision), world_size=1)
    parsed = DeepSpeedConfig(engine.raw)
    assert parsed.zero_config.stage == engine.zero_stage
    assert (parsed.train_batch_size, parsed.gradient_accumulation_steps) == (256, 8)
    assert parsed.bfloat16_config.enabled == (precision == "bf16")


def test_ds_configs_cover_all_stages() -> None:
    expected = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert [path.stem for path in FILES] == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_engine_name_is_the_shipped_file_from_any_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / path.stem).write_text('{"zero_optimization": {"stage": 9}}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    built = build_engine_config(run_config(path.stem), world_size=1)
    assert built == build_engine_config(run_config(json.loads(path.read_text(encoding="utf-8"))), world_size=1)


@pytest.mark.parametrize("name", ["ds_configs/zero2.json", "own.json", "own"])
def test_engine_path_counts_from_the_working_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / name).write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert build_engine_config(run_config(name), world_size=1).zero_stage == 1
    assert build_engine_config(run_config(str(tmp_path / name)), world_size=1).zero_stage == 1


@pytest.mark.parametrize("name", ["zero9", "ds_configs/zero9.json", "ds_configs", "n" * 5000, ""])
def test_engine_name_unknown_lists_the_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds_configs").mkdir()
    monkeypatch.chdir(tmp_path)
    names = "zero0, zero1, zero2, zero2_offload, zero3, zero3_offload"
    expected = f"found {name!r}, which is no file in {tmp_path}; expected one of {names}, or the path of a DeepSpeed"
    assert expected in error_message(name)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", "is not a readable JSON file"),
        (b"\xff", "is not a readable JSON file"),
        (b"[1]", "contains a list, expected a JSON object"),
        (b'{"steps_per_print": 1, "steps_per_print": 2}', "found key steps_per_print twice"),
        (b"[" * 100_000, "too many values within each other"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    ],
)
def test_engine_file_unreadable_is_error(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "engine.json"
    path.write_bytes(content)
    message = error_message(str(path))
    assert str(path) in message
    assert expected in message


def test_zero_stage_default_is_0() -> None:
    assert EngineConfig.from_raw({}).zero_stage == 0
    assert EngineConfig.from_raw({"zero_optimization": {"stage": 3}}).zero_stage == 3


@pytest.mark.parametrize(
    "engine", [{"zero_optimization.stage": 3}, {"zero_optimization": {"offload_optimizer.device": "cpu"}}]
)
def test_engine_keys_dotted_key_is_error(engine: dict[str, Any]) -> None:
    assert "found a dotted key, expected sections within each other" in error_message(engine)
