"""Directions files: written atomically at the owners' places, read by names, refused to another network."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from das_ds.errors import ImportanceError, RunFolderError
from das_ds.models.architectures.registry import spec_for
from das_ds.softmask import directions_file
from das_ds.softmask.directions_file import load_directions, moment_digest, save_directions
from das_ds.softmask.importance_file import (
    DIRECTION,
    load_unit_importance,
    save_unit_importance,
    structure_digest,
    token_digest,
)
from das_ds.softmask.input_layout import InputLayout
from helpers.single_rank import SingleRank
from helpers.tiny_models import random_importance, tiny_model

WIDTHS = {"layer.q": 24, "layer.down": 40, "layer.up": 24}
INPUTS = InputLayout((), WIDTHS, dict.fromkeys(WIDTHS, 0), dict.fromkeys(WIDTHS, (0,)))
TOKENS = ("<s>", "bread", "soup")


def layout() -> Any:
    return spec_for("roberta").layout(tiny_model())


def random_moments() -> dict[str, torch.Tensor]:
    inputs = {name: torch.randn(width, width) for name, width in WIDTHS.items()}
    return {name: values.T @ values for name, values in inputs.items()}


def save(path: Path, moments: dict[str, torch.Tensor], tokens: tuple[str, ...] = ()) -> None:
    save_directions(path, moments, INPUTS, layout(), SingleRank(), tokens)  # type: ignore[arg-type]


def load(path: Path, tokens: tuple[str, ...] | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    return load_directions(path, WIDTHS, **{"widths": WIDTHS, "layout": layout(), **changes}, tokens=tokens)[0]


def test_directions_round_trip_and_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directions.safetensors"
    moments = random_moments()
    save(path, moments, TOKENS)
    for found in (load(path), load_file(path)):
        assert found.keys() == moments.keys()
        assert all(found[name].equal(moment) for name, moment in moments.items())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["num_tokens"] == "3"
    assert load_directions(path, [], WIDTHS, layout(), TOKENS) == ({}, 3)
    # The first moment begins on a page, and what was read is no view of the file.
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert (header + 8) % 4096 == 0
    found = load(path)
    path.write_bytes(b"")
    assert found["layer.up"].equal(moments["layer.up"])


def test_load_directions_reads_named_moments_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "directions.safetensors"
    moments = random_moments()
    save(path, moments)
    read: list[str] = []
    monkeypatch.setattr(
        directions_file, "_check_moment", lambda path, name, moment, digest: read.append(f"{name} {moment.shape[0]}")
    )
    found, _ = load_directions(path, ["layer.down"], WIDTHS, layout())
    assert found.keys() == {"layer.down"} and read == ["layer.down 40"]


def test_load_directions_altered_moment_raises_for_its_reader_only(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    save(path, random_moments())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    load_directions(path, ["layer.q", "layer.down"], WIDTHS, layout())
    with pytest.raises(ImportanceError, match=rf"{path}: was altered: the checksum of layer.up differs"):
        load(path)


@pytest.mark.parametrize(
    ("value", "fault"), [(float("nan"), "not finite"), (-1.0, "negative"), (float("inf"), "not finite")]
)
def test_load_directions_invalid_moment_raises(value: float, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    moments = random_moments()
    moments["layer.down"][3, 3] = value
    save(path, moments)
    with pytest.raises(ImportanceError, match=rf"{path}: layer.down: found .*{fault}.*, expected a second moment"):
        load(path)
    moments["layer.down"] = torch.eye(40)
    moments["layer.down"][3, 4] = 0.5
    save(path, moments)
    with pytest.raises(ImportanceError, match=r"found a matrix that is not symmetric, expected"):
        load(path)


def test_load_directions_missing_damaged_foreign_files_raise(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    with pytest.raises(ImportanceError, match="cannot read directions"):
        load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ImportanceError, match="cannot read directions"):
        load(path)
    save_file({"layer.q": torch.eye(24)}, path)
    with pytest.raises(ImportanceError, match="directions format None, this version reads '5'; measure them again"):
        load(path)
    save_unit_importance(path, random_importance(tiny_model()), layout())
    with pytest.raises(ImportanceError, match=r"importance by unit, expected by direction \(method.init_from\)"):
        load(path)


def test_load_importance_of_directions_raises(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    save(path, random_moments())
    message = rf"{path}: importance by direction, from a run of directions, expected by unit or parameter"
    with pytest.raises(ImportanceError, match=message):
        load_unit_importance(path, layout())


def test_load_directions_earlier_format_raises(tmp_path: Path) -> None:
    """Moments by weight, as the version before wrote them."""
    path = tmp_path / "directions.safetensors"
    header = {
        "format_version": "4",
        "granularity": DIRECTION,
        "model_type": "roberta",
        "structure": structure_digest(layout()),
        "num_tokens": "0",
        "tokens": token_digest(()),
    }
    save_file({"layer.k": torch.eye(24)}, path, metadata=header)
    with pytest.raises(ImportanceError, match=rf"{path}: directions format '4', this version reads '5'; measure"):
        load(path)


def test_load_directions_other_network_or_tokenizer_raises(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    save(path, random_moments(), TOKENS)
    load(path, (*TOKENS, "treebank"))
    with pytest.raises(ImportanceError, match=r"another model: found roberta with layer.q: \(24, 24\), expected"):
        load(path, widths={**WIDTHS, "layer.q": 7})
    with pytest.raises(ImportanceError, match=r"another model: found .*layer.up.*, expected roberta with the same"):
        load(path, widths={"layer.q": 24, "layer.down": 40})
    for others in (("<s>", "soup", "bread"), ("<s>", "bread")):
        with pytest.raises(ImportanceError, match=r"another tokenizer: found 3 tokens"):
            load(path, others)
    other = replace(layout(), ownerships=layout().ownerships[1:])
    with pytest.raises(ImportanceError, match="another table of units"):
        load(path, layout=other)


def test_save_directions_full_disk_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "directions.safetensors"
    save(path, random_moments())
    content = path.read_bytes()

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directions_file.os, "fsync", refuse)
    with pytest.raises(RunFolderError, match=rf"{path}: cannot be written \(.*No space left .*must have free space"):
        save(path, random_moments())
    assert path.read_bytes() == content and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_moment_digest_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = torch.randn(37, 37)
    expected = moment_digest(moment)
    monkeypatch.setattr(directions_file, "CHUNK_BYTES", 1000)
    assert moment_digest(moment) == expected != moment_digest(moment + 1)


def test_header_is_that_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "directions.safetensors"
    save(path, random_moments())
    content = path.read_bytes()
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    entries.pop("__metadata__")
    ends = [entry["data_offsets"][1] for entry in entries.values()]
    assert [entry["data_offsets"][0] for entry in entries.values()] == [0, *ends[:-1]]
