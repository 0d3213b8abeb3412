"""LoRA at ZeRO 3 on two ranks, compared with the same network written without peft."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.lora_checks import (
    check_adapters_equal_explicit_network,
    check_bf16_protected_units_do_not_move,
)

pytestmark = pytest.mark.multirank


def test_lora_zero3_equals_explicit_network(tmp_path: Path) -> None:
    check_adapters_equal_explicit_network(3, 2, tmp_path)


def test_lora_zero3_bf16_protected_units_do_not_move(tmp_path: Path) -> None:
    check_bf16_protected_units_do_not_move(3, tmp_path)
