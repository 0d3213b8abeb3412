"""`das-ds init`: the file it writes is a valid config, and wrong arguments are one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from das_ds.cli import main
from das_ds.config.io import load_config
from das_ds.config.section import NAME_PATTERN
from das_ds.data.sources import resolve_source


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with folders of text."""
    for file in ("acl/a.txt", "acl/deep/b.txt", "acl/c.jsonl.gz", "pub med/d.parquet", "general.txt", "empty/e.pdf"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*arguments: str, model: str = "roberta-base") -> int:
    return main(["init", "--model", model, *arguments])


def test_init_writes_a_config_with_these_values(corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domains = ["--domain", "acl=acl/", "pubmed=pub med", "--domain", "hub=owner/name@train"]
    assert init(*domains, "--general", "general.txt", "--output", "papers.yaml") == 0
    assert capsys.readouterr().out == (
        "taken as hub data sets, as no such file or folder is here: owner/name@train\n"
        "wrote papers.yaml; next: das-ds preflight --config papers.yaml\n"
    )
    config = load_config("papers.yaml")
    assert config.output_dir == Path("runs/papers") and config.model.name_or_path == "roberta-base"
    assert {domain.name: domain.train for domain in config.domains} == {
        "acl": ["acl/**/*.txt", "acl/**/*.jsonl.gz"],
        "pubmed": ["pub med/**/*.parquet"],
        "hub": ["owner/name@train"],
    }
    assert config.general is not None and config.general.valid == ["general.txt"]
    assert config.method.name == "directions"
    # The globs find what is there.
    assert [str(path) for path in resolve_source(config.domains[0].train[0])] == ["acl/a.txt", "acl/deep/b.txt"]
    assert main(["check-config", "--config", "papers.yaml"]) == 0


@pytest.mark.parametrize(
    ("files", "train", "valid"),
    [
        (["train.jsonl", "valid.jsonl"], ["a b/train.jsonl"], ["a b/valid.jsonl"]),
        (
            ["train.txt", "train.txt.xz", "dev.txt", "test.txt", "LICENSE"],
            ["a b/train.txt", "a b/train.txt.xz"],
            ["a b/dev.txt"],
        ),
        (["train.txt", "test.txt"], ["a b/train.txt"], []),
        (["valid.txt"], ["a b/**/*.txt"], []),
        (["train.txt", "valid.txt", "more.txt"], ["a b/**/*.txt"], []),
        (["train.txt", "valid.txt", "deep/train.txt"], ["a b/**/*.txt"], []),
    ],
)
def test_init_does_not_train_on_held_out_text_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], train: list[str], valid: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path("a b", file).parent.mkdir(parents=True, exist_ok=True)
        Path("a b", file).touch()
    assert init("--domain", "ab=a b", "--general", "a b/") == 0
    config = load_config("run.yaml")
    assert config.domains[0].train == train and config.domains[0].valid == valid
    assert config.general is not None and config.general.valid == (valid or ["a b/**/*.txt"])


def test_init_comments_explain_and_can_be_used(corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init("--domain", "acl=acl", "--method", "ncl") == 0
    assert "hub" not in capsys.readouterr().out
    text = Path("run.yaml").read_text()
    assert all("#" in line for line in text.splitlines() if line.startswith(("output_dir", "method", "deepspeed")))
    (general,) = [line for line in text.splitlines() if line.startswith("# general:")]
    Path("run.yaml").write_text(text.replace(general, general.removeprefix("# ")))
    config = load_config("run.yaml")
    assert config.general is not None and config.method.name == "ncl" and config.tracking == []


@pytest.mark.parametrize("model", ["a: b", "it's", "#x", "yes", "1e3", "- a", "ünï", "a  #b", '"', "*.txt"])
def test_init_quotes_values_that_yaml_would_read_otherwise(corpora: Path, model: str) -> None:
    assert init("--domain", "on=acl", "--output", "run.yaml", model=model) == 0
    config = load_config("run.yaml")
    assert config.model.name_or_path == model and config.domains[0].name == "on"
    assert isinstance(yaml.safe_load(Path("run.yaml").read_text()), dict)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "acl"], "--domain: found 'acl', expected NAME=PATH"),
        (["--domain", "=acl"], "--domain: found '=acl', expected NAME=PATH"),
        (["--domain", "a b=acl"], f"domains.0.name: found 'a b', allowed: text matching {NAME_PATTERN}"),
        (["--domain", "acl=acl", "acl=acl"], "corpus names must differ, found more than once: acl"),
        (["--domain", "acl=acl", "--method", "dsa"], "method.name: found 'dsa', allowed: "),
        (["--domain", "acl=missing.txt"], "missing.txt: found no such file or folder, expected text"),
        (["--domain", "acl=empty"], "empty: found no text in this folder, expected files that end in .txt"),
        (["--domain", "acl=acl", "--output", "no/run.yaml"], "--output no/run.yaml: cannot be written (No such file"),
    ],
)
def test_init_wrong_argument_is_one_line_and_writes_nothing(
    corpora: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(os.listdir(corpora))
    assert init(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("das_ds: ") and error.count("\n") == 1
    assert sorted(os.listdir(corpora)) == before


@pytest.mark.parametrize("model", ["", "./missing", "/nowhere/model", "~/missing", "empty", "general.txt"])
def test_init_model_that_is_none_is_one_line_and_writes_nothing(
    corpora: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert init("--domain", "acl=acl", model=model) == 2
    error = capsys.readouterr().err
    assert error.startswith("das_ds: --model: found ") and "expected" in error and error.count("\n") == 1
    assert not Path("run.yaml").exists()
    (corpora / "empty" / "config.json").write_text("{}")
    assert init("--domain", "acl=acl", model="./empty") == 0


def test_init_refuses_to_overwrite(corpora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine")
    assert init("--domain", "acl=acl") == 2
    assert "--output run.yaml: found a file there, expected a new one" in capsys.readouterr().err
    assert Path("run.yaml").read_text() == "mine"
