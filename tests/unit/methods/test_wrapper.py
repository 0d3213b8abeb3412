"""Wrappers of methods: every hook reaches the method that they wrap."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from das_ds.config import MethodConfig
from das_ds.methods.base import Method
from das_ds.methods.wrapper import MethodWrapper

HOOKS = [
    name
    for name, member in inspect.getmembers(Method, inspect.isfunction)
    if not name.startswith("_") and name != "settings"
]


@pytest.mark.parametrize("hook", HOOKS)
def test_wrapper_delegates_every_hook(hook: str) -> None:
    method: Any = MagicMock(run=SimpleNamespace(config=SimpleNamespace(method=MethodConfig(name="ncl"))))
    getattr(method, hook).return_value = nullcontext({"mlm": 1.0}) if hook == "losses" else "answer"
    arguments = [object() for _ in list(inspect.signature(getattr(Method, hook)).parameters)[1:]]
    found = getattr(MethodWrapper(method), hook)(*arguments)
    if hook == "losses":
        with found as losses:
            assert losses == {"mlm": 1.0}
    elif inspect.signature(getattr(Method, hook)).return_annotation != "None":
        assert found == "answer"
    getattr(method, hook).assert_called_once_with(*arguments)


def test_hooks_are_found() -> None:
    assert {"on_run_start", "before_domain", "losses", "after_domain", "state_dict", "plasticity"} <= set(HOOKS)
