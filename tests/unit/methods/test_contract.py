"""The contract of methods: one file and one line each, checked by what they declare."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import das_ds
from das_ds.config.deepspeed import build_engine_config
from das_ds.config.method import MethodConfig
from das_ds.errors import ConfigError
from das_ds.methods import DEFAULT_METHOD, METHODS
from helpers.configs import make_config

ORDINARY_WORDS = {"pool": "das_ds/config/stage.py"}
"""Name of a method that is also a word -> file that means another thing by it: a stage of several domains."""


@pytest.mark.parametrize("name", METHODS)
def test_method_config_has_name_of_method(name: str) -> None:
    config = METHODS[name].Config
    assert issubclass(config, MethodConfig)
    assert config.model_fields["name"].default == name and config.model_validate({}).name == name
    assert str(config.__doc__).partition("\n")[0].endswith(".")


def test_default_method_is_listed() -> None:
    assert DEFAULT_METHOD in METHODS


def test_methods_load_without_deepspeed_and_transformers() -> None:
    code = "import sys, das_ds.methods; print([name for name in ('deepspeed', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_config_loads_without_methods() -> None:
    code = "import sys, das_ds.config, das_ds.config.io; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


OTHER_TRAINERS = "das_ds/integrations/settings.py"
"""Names the masks that other trainers can choose."""


def test_method_names_appear_in_methods_only() -> None:
    root = Path(das_ds.__file__).parents[1]
    found = {
        (str(path.relative_to(root)), node.value)
        for path in (root / "das_ds").rglob("*.py")
        if "methods" not in path.relative_to(root).parts and str(path.relative_to(root)) != OTHER_TRAINERS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in METHODS
    }
    assert {(file, word) for file, word in found if ORDINARY_WORDS.get(word) != file} == set()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["method.batch_size=9"],
            "method.batch_size: found 9, allowed: at most 8, the smaller of method.capacity 1000 and "
            "train.global_batch_size 8",
        ),
        (["method.batch_size=5", "method.capacity=4"], "method.batch_size: found 5, allowed: at most 4"),
    ],
)
def test_derpp_small_buffer_is_error(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_engine_config(make_config("run", "method=derpp", *overrides), world_size=1)


@pytest.mark.parametrize(
    ("batch_size", "global_batch_size", "expected"), [(None, 256, 16), (None, 4, 1), (8, 8, 8), (None, 40, 2)]
)
def test_derpp_num_replayed_default_is_one_in_16(batch_size: int | None, global_batch_size: int, expected: int) -> None:
    settings = METHODS["derpp"].Config.model_validate({"batch_size": batch_size})
    assert settings.num_replayed(global_batch_size) == expected


def test_one_with_head_warmup_is_error() -> None:
    model = "model={name_or_path: roberta-base, allow_missing: [lm_head], head_warmup_steps: 3}"
    with pytest.raises(ConfigError, match=r"model.head_warmup_steps: found 3 with method one, whose domains all start"):
        build_engine_config(make_config("run", "method=one", model), world_size=1)
    build_engine_config(make_config("run", "method=ncl", model), world_size=1)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.lora={}", "method.name: found freeze with model.lora, under which the network is frozen already"),
        ("data.add_tokens={domain: [new]}", "method.embeddings: found true with data.add_tokens, whose tokens would"),
    ],
)
def test_freeze_with_lora_or_added_tokens_is_error(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_engine_config(make_config("run", "method=freeze", override), world_size=1)
    build_engine_config(make_config("run", "method=ncl", override), world_size=1)


def test_freeze_of_nothing_is_error() -> None:
    with pytest.raises(
        ConfigError, match=r"num_layers: found 0 with embeddings: false, expected at least 1, or method"
    ):
        make_config("run", "method={name: freeze, embeddings: false}")


def test_mask_of_first_moment_with_lion_is_error() -> None:
    method = "method={name: dga, softmask: {apply_to: first_moment}}"
    with pytest.raises(
        ConfigError, match=r"softmask.apply_to: found first_moment with train.optimizer lion, which takes"
    ):
        build_engine_config(make_config("run", method, "train.optimizer=lion"), world_size=1)
    build_engine_config(make_config("run", method), world_size=1)
