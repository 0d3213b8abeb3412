"""DeepSpeed's internals are used in `engine/zero.py` only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[3] / "das_ds"
INTERNALS = re.compile(
    r"\bds_(id|shape|status|persist|numel|tensor|zero_partition_rank)\b"
    r"|\b(engine|_engine|optimizer|_optimizer|zero)\._(config|update_scale|get_|reassign|skip_invalid|global_grad_norm)"
    r"|\._(hp_mapping|index_in_param_group|convert_to_deepspeed_param|constant_buffered_norm2|zero_padding)\b"
    r"|\b(param_coordinator|parameter_offload|fp32_partitioned_groups_flat|single_partition_of_fp32_groups)\b"
    r"|\b(averaged_gradients|bit16_groups|fp16_groups|grad_position)\b"
)
"""Attributes of DeepSpeed's parameters, engines and optimizers that are no interface."""


def find_internals(text: str) -> list[str]:
    return [match.group() for match in INTERNALS.finditer(text)]


def test_deepspeed_internals_are_used_in_zero_only() -> None:
    users = {
        str(path.relative_to(PACKAGE)): internals
        for path in sorted(PACKAGE.rglob("*.py"))
        if (internals := find_internals(path.read_text(encoding="utf-8")))
    }
    assert list(users) == ["engine/zero.py"], users


@pytest.mark.parametrize(
    "text",
    [
        "parameter.ds_shape",
        'getattr(p, "ds_numel", 0)',
        "engine._config",
        "optimizer._update_scale = f",
        "p._hp_mapping",
    ],
)
def test_find_internals_finds_access(text: str) -> None:
    assert find_internals(text)


@pytest.mark.parametrize("text", ["self._config", "ds_configs/zero2.json", "das_ds.engine", "config.deepspeed"])
def test_find_internals_leaves_other_names(text: str) -> None:
    assert not find_internals(text)
