"""Rank files: tensors that one rank owned, written without a copy and read by any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from das_ds.checkpoint.format import RankFileReader, StoredComponentState, file_name, immutable_tensors
from das_ds.distributed.state import ComponentState
from das_ds.errors import CheckpointError


def write_ranks(folder: Path, states: list[ComponentState]) -> None:
    """One file per rank, with the state of one component."""
    for rank, state in enumerate(states):
        tensors = immutable_tensors({"method": state}, is_main=rank == 0)
        save_file(tensors, folder / file_name(rank, len(states)))


def reader_of(folder: Path, world_size: int, own_rank: int | None = None) -> StoredComponentState:
    return StoredComponentState(RankFileReader(folder, world_size, own_rank, []), "method", {})


@pytest.mark.parametrize("own_rank", [None, 0, 2])
def test_owned_tensors_are_read_by_name(own_rank: int | None, tmp_path: Path) -> None:
    """On as many ranks as wrote (`own_rank`), and on others."""
    moments = {f"m{number}": torch.randn(3 + number, 3 + number) for number in range(5)}
    names = list(moments)
    parts = [names[:2], [], names[2:]]
    write_ranks(tmp_path, [ComponentState(owned={name: moments[name] for name in part}) for part in parts])
    saved = reader_of(tmp_path, 3, own_rank)
    assert saved.owned_names() == sorted(moments)
    found = saved.owned(["m4", "m0"])
    assert found.keys() == {"m0", "m4"}
    assert all(value.equal(moments[name]) for name, value in found.items())
    assert saved.rank_local() == {} and saved.replicated() == {}
    # Not a view of the file, which may be removed.
    (tmp_path / file_name(0, 3)).write_bytes(b"")
    assert found["m0"].equal(moments["m0"])


def test_owned_tensors_only_named_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ranks(tmp_path, [ComponentState(owned={"a": torch.ones(2), "b": torch.ones(3)})])
    saved = reader_of(tmp_path, 1, 0)
    read: list[str] = []
    # The reader's own record of what it fetched from its files.
    for name, (file, key) in saved.reader._owned["method"].items():

        class Counted:
            def __init__(self, file: object, name: str) -> None:
                self._file = file
                self._name = name

            def get_tensor(self, key: str) -> torch.Tensor:
                read.append(self._name)
                return self._file.get_tensor(key)  # type: ignore[attr-defined, no-any-return]

        monkeypatch.setitem(saved.reader._owned["method"], name, (Counted(file, name), key))
    saved.owned_names()
    saved.owned(["b"])
    assert read == ["b"]


def test_owned_tensor_missing_raises(tmp_path: Path) -> None:
    write_ranks(tmp_path, [ComponentState(owned={"a": torch.ones(2)})])
    message = r"method: found no tensor b in the checkpoint, expected one that a rank owned; there are a$"
    with pytest.raises(CheckpointError, match=message):
        reader_of(tmp_path, 1).owned(["b"])


def test_immutable_tensors_copies_all_but_owned() -> None:
    sums = torch.zeros(2)
    moment = torch.zeros(3)
    written = immutable_tensors({"method": ComponentState(rank_local={"s": sums}, owned={"m": moment})}, is_main=False)
    assert written["owned|method|m"].data_ptr() == moment.data_ptr()
    assert written["rank_local|method|s"].data_ptr() != sums.data_ptr()
