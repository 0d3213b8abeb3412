"""Code that Triton compiles the kernels to for NVIDIA GPUs; compiling takes no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Form -> size and instructions, by `helpers.compile_kernels`."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }
    command = [sys.executable, "-m", "helpers.compile_kernels"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_kernel_compiles_for_gpus(code: dict[str, Any]) -> None:
    kernels = {name.split()[0] for name in code}
    assert kernels == {"masked_adamw", "soft_update", "masked_scale", "unit_gate", "measure_gate"}
    assert all(form["bytes"] > 1000 for form in code.values())
    assert {name.split()[-1] for name in code} == {"sm_80", "sm_90"}


def test_loads_and_stores_are_16_bytes_wide_and_nothing_is_spilt(code: dict[str, Any]) -> None:
    for name, form in code.items():
        assert form["instructions"].get("ld.global.v4.b32", 0) > 0, name
        assert form["instructions"].get("st.global.v4.b32", 0) > 0 or name.startswith("measure_gate"), name
        assert not any("local" in instruction for instruction in form["instructions"]), name


def test_quantised_importance_is_divided_exactly(code: dict[str, Any]) -> None:
    quantized = {name: form["instructions"] for name, form in code.items() if " u8 " in name}
    assert quantized and all(instructions.get("div.rn.f32", 0) > 0 for instructions in quantized.values())
    # AdamW has a quotient of its own, which may be approximate; nothing else divides floats.
    others = {name: found for name, found in quantized.items() if not name.startswith("masked_adamw")}
    assert not any("div.full" in instruction for found in others.values() for instruction in found)
