"""The C++ kernels: compiled, or the reason logged; equal on any number of threads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from das_ds.kernels import native
from das_ds.kernels.masked_adamw import masked_adamw_
from das_ds.kernels.protection import Protection
from helpers.protections import new_seed, random_protection


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and no decision yet."""
    monkeypatch.setenv("DAS_DS_CACHE", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def test_library_compiles_once_without_leftovers(cache: Path) -> None:
    assert native.use_native(torch.zeros(1)) and not native.use_native(torch.zeros(1, device="meta"))
    (built,) = (cache / "kernels").iterdir()
    when = built.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None and built.stat().st_mtime_ns == when


def test_library_without_compiler_falls_back_to_torch(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO):
        assert not native.use_native(torch.zeros(1))
    assert "torch, because there is no C++ compiler" in caplog.text
    param = torch.randn(100)
    start = torch.zeros(100)
    start.copy_(param)
    moments = torch.zeros(100), torch.zeros(100)
    protection = Protection(100, importance=torch.ones(100))
    masked_adamw_(param, torch.ones(100), *moments, protection, num_steps=1, lr=1.0, betas=(0.9, 0.9), eps=1e-8,
                  weight_decay=0.1)  # fmt: skip
    assert torch.equal(param, start) and bool((moments[0] != 0).all())


def test_library_compiler_failure_is_logged(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = cache / "c++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert native.library() is None
    assert "could not compile or load" in caplog.text and "out of order" in caplog.text
    assert not list((cache / "kernels").iterdir())


@pytest.mark.parametrize("kind", ["units", "uint8"])
def test_run_any_number_of_threads_bitwise_equal(kind: str) -> None:
    numel = 3 * native.PARALLEL_ELEMENTS + 1003
    generator = torch.Generator().manual_seed(new_seed())
    protection = random_protection(kind, numel, generator)
    start = torch.randn(numel, generator=generator)
    grad = torch.randn(numel, generator=generator)
    ends = []
    threads = torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        param = start.clone()
        moments = (torch.zeros(numel), torch.zeros(numel))
        masked_adamw_(param, grad, *moments, protection, num_steps=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8,
                      weight_decay=0.1)  # fmt: skip
        ends.append((param, *moments))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for end in ends[1:] for a, b in zip(ends[0], end, strict=True))
