"""Text sources: files, globs and hub datasets, and errors of everything else."""

import os
from pathlib import Path

import pytest

from das_ds.data.sources import HubDataset, find_shared_sources, fingerprint, parse_hub_name, resolve_source
from das_ds.errors import DataError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", HubDataset("owner/name")),
        ("owner/name:part-1", HubDataset("owner/name", "part-1")),
        ("owner/name@validation", HubDataset("owner/name", split="validation")),
        ("owner/name:part@test", HubDataset("owner/name", "part", "test")),
        ("owner/name#v1.0", HubDataset("owner/name", revision="v1.0")),
        ("owner/name:part@test#refs/pr/1", HubDataset("owner/name", "part", "test", "refs/pr/1")),
        ("owner/web-1.0", HubDataset("owner/web-1.0")),
        ("owner/name.en@train", HubDataset("owner/name.en")),
        ("corpora/train.txt", None),
        ("corpora/train.csv", None),
        ("corpora/train.txt.xz", None),
        ("train.txt", None),
        ("a/b/c", None),
        ("owner/*", None),
        ("/owner/name", None),
    ],
)
def test_parse_hub_name(name: str, expected: HubDataset | None) -> None:
    assert parse_hub_name(name) == expected


def test_parse_hub_name_existing_path_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_hub_name("owner/name") is None


def test_resolve_source_glob_is_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    assert resolve_source(str(tmp_path / "*.txt")) == [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert len(resolve_source(f"{tmp_path}/**/*")) == 3


def test_resolve_source_file_named_like_a_glob(tmp_path: Path) -> None:
    path = tmp_path / "part[1].txt"
    path.write_text("x")
    assert resolve_source(str(path)) == [path]


@pytest.mark.parametrize("name", ["missing.txt", "*.txt", "folder/**/*.parquet"])
def test_resolve_source_missing_raises(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"found no such file; expected a file, a glob with a match, or a hub name"):
        resolve_source(str(tmp_path / name))


def test_resolve_source_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found a folder; expected files"):
        resolve_source(str(tmp_path))


def test_file_suffix_unknown_raises(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("x")
    with pytest.raises(DataError, match=r"data\.csv: unknown file type; allowed are \.txt, .*\.parquet"):
        resolve_source(str(path))


def test_resolve_source_hub_without_answer_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"no-such-owner/no-such-name: found no such file, and the hub .* not answer"):
        resolve_source("no-such-owner/no-such-name")


def test_resolve_source_hub_pins_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("das_ds.data.sources.find_commit", lambda kind, name, revision: "abc")
    (source,) = resolve_source("owner/name:part@test")
    assert source == HubDataset("owner/name", "part", "test", "abc")
    assert fingerprint(source) == "owner/name:part@test#abc"


def test_fingerprint_depends_on_content_and_suffix(tmp_path: Path) -> None:
    contents = {"a.txt": "one", "b.txt": "one", "c.txt": "two", "d.jsonl": "one"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    a, b, c, d = (fingerprint(tmp_path / name) for name in contents)
    assert a == b
    assert len({a, c, d}) == 3


def test_fingerprint_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        fingerprint(tmp_path / "gone.txt")


def test_resolve_source_glob_in_bracketed_folder(tmp_path: Path) -> None:
    folder = tmp_path / "corpus [2024]" / "part[1]"
    folder.mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("x")
    assert resolve_source(str(folder / "*.txt")) == [folder / "a.txt", folder / "b.txt"]
    assert resolve_source(str(folder.parent / "*" / "a.txt")) == [folder / "a.txt"]
    # A pattern, where no folder of that very name exists.
    assert resolve_source(str(tmp_path / "corpus [[]202[0-9]]" / "**" / "b.txt")) == [folder / "b.txt"]


@pytest.mark.timeout(60)
def test_resolve_source_pipe_raises_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text.txt")
    for name in ("text.txt", "*.txt"):
        with pytest.raises(DataError, match=r"text.txt: found a pipe, socket or device; expected a regular file"):
            resolve_source(str(tmp_path / name))


def test_find_shared_sources_by_target_not_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "c.txt").symlink_to("a.txt")
    assert find_shared_sources([str(tmp_path / "a.txt")], [str(tmp_path / "b.txt")]) == []
    assert find_shared_sources([f"{tmp_path}/../{tmp_path.name}/c.txt"], [f"{tmp_path}/a*"])
    assert find_shared_sources(["owner/name@train"], ["owner/name"]) == [HubDataset("owner/name")]
    assert find_shared_sources(["owner/name@test"], ["owner/name"]) == []
