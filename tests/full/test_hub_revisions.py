"""Commits of hub models: recorded at the first start, equal on all ranks, reused without the hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from das_ds.config import RunConfig
from das_ds.errors import RunFolderError
from das_ds.reporting.results import Results
from das_ds.run_dir import RESULTS_FILE
from das_ds.training.revisions import with_recorded_revisions
from helpers.commands import command, write_config
from helpers.fake_hub import FakeHub, fake_hub, pin_on_rank
from helpers.run_ranks import run_ranks
from helpers.runs import small_run
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.multirank

FIRST = "a" * 40
SECOND = "b" * 40
MODEL = "owner/tiny"


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    folder = tmp_path / "upload"
    tiny_model("roberta", vocab_size=len(tiny_tokenizer()), **NO_DROPOUT).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def served(upload: Path) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        hub.put("models", MODEL, FIRST, upload)
        hub.put("datasets", "owner/text", FIRST, upload)
        yield hub


def hub_run(folder: Path) -> dict[str, Any]:
    values = small_run(folder, method={"name": "ncl"}, train={"steps_per_domain": 2})
    values["model"] = {"name_or_path": MODEL}
    values["data"].pop("tokenizer")
    return values


def test_hub_revisions_ranks_agree_on_first_commit(served: FakeHub, upload: Path, tmp_path: Path) -> None:
    values = hub_run(tmp_path)
    values["output_dir"].mkdir()
    values["domains"][0]["train"] = ["owner/text:part#v2"]
    values["data"]["tokenizer"] = MODEL
    cache = tmp_path / "cache"

    def pinned(hub: str, *, only_rank_0: bool = False) -> list[Any]:
        return run_ranks(pin_on_rank, 2, values, hub, str(cache), only_rank_0)

    folder = str(cache / "models--owner--tiny" / "snapshots" / FIRST)
    for config, weights, is_offline in pinned(served.endpoint):
        assert (config.model.revision, config.data.tokenizer_revision) == (FIRST, FIRST)
        assert config.domains[0].train == [f"owner/text:part@train#{FIRST}"]
        assert config.domains[1].train == values["domains"][1]["train"]
        assert (weights, is_offline) == (folder, False)
    # The branch moves on, the run does not; and rank 1 on a node without network finds its files in the cache.
    served.put("models", MODEL, SECOND, upload)
    served.put("datasets", "owner/text", SECOND, upload)
    assert [config.model.revision for config, _, _ in pinned(served.endpoint, only_rank_0=True)] == [FIRST, FIRST]
    # Nor does it without any hub; no request is repeated.
    for config, weights, _ in pinned("http://127.0.0.1:1"):
        assert config.domains[0].train == [f"owner/text:part@train#{FIRST}"] and weights == folder
    recorded = values["output_dir"] / "revisions.json"
    assert set(json.loads(recorded.read_text())) - {"sha256"} == {f"model {MODEL}@main", "dataset owner/text@v2"}
    assert with_recorded_revisions(RunConfig(**values)).model.revision == FIRST
    recorded.write_text(recorded.read_text().replace(FIRST, SECOND))
    with pytest.raises(RunFolderError, match=r"revisions.json: was altered.*remove it to look the revisions up again"):
        with_recorded_revisions(RunConfig(**values))


def test_hub_revisions_resume_keeps_commit_and_new_run_starts_offline(
    served: FakeHub, upload: Path, tmp_path: Path
) -> None:
    values = hub_run(tmp_path)
    run = values["output_dir"]
    path = write_config(tmp_path, values)
    hub = {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "home")}
    # Stops before training begins, with the commit recorded.
    run.mkdir()
    (run / "STOP").touch()
    first = command(sys.executable, "launch/train.py", "--config", path, **hub)
    assert first.returncode == 75, first.stderr
    assert f"das_ds: {MODEL}: no such folder here; asking {served.endpoint} for a model of that name" in first.stderr
    # From now on the branch is a commit that cannot be trained.
    (tmp_path / "broken").mkdir()
    served.put("models", MODEL, SECOND, tmp_path / "broken")
    second = command(sys.executable, "launch/train.py", "--config", path, **hub)
    assert second.returncode == 0, second.stderr
    assert Results.read(run / RESULTS_FILE).complete
    nowhere = {**hub, "HF_ENDPOINT": "http://127.0.0.1:1"}
    third = command(sys.executable, "launch/train.py", "--config", path, f"output_dir={tmp_path / 'third'}", **nowhere)
    assert third.returncode == 0, third.stderr
    assert f"using the copy in its cache, commit {FIRST}" in third.stderr
    losses = [Results.read(folder / RESULTS_FILE).loss_matrix for folder in (run, tmp_path / "third")]
    assert losses[0] == losses[1]
    wrong = command(
        sys.executable, "launch/train.py", "--config", path, "model.name_or_path=robeta-base",
        f"output_dir={tmp_path / 'wrong'}", **nowhere,
    )  # fmt: skip
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert wrong.stderr.splitlines()[-1].startswith("das_ds: robeta-base: found no such folder, and the hub")
