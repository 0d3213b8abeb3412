"""Hub names: resolved with one question, reported in one line, served from the cache without an answer."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from das_ds import hub
from das_ds.config import DataConfig, ModelConfig
from das_ds.data.sources import HubDataset, fingerprint, resolve_source
from das_ds.errors import DataError, ModelError
from das_ds.hub import HubError, find_commit, resolve_model_folder
from das_ds.models.loading import load_model, model_config, open_tokenizer
from helpers.fake_hub import FakeHub, fake_hub
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer

FIRST = "a" * 40
SECOND = "b" * 40
MODEL = "owner/tiny"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, and a process without requests so far."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.chdir(tmp_path)
    forget()
    return tmp_path / "cache"


def forget() -> None:
    """As in a new process."""
    hub._query_hub.cache_clear()
    hub._download_snapshot.cache_clear()
    constants.HF_HUB_OFFLINE = False


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def served(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one tiny model."""
    folder = tmp_path / "upload"
    tiny_model("roberta", vocab_size=len(tiny_tokenizer())).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another form")
    with fake_hub() as one:
        point_to(one.endpoint, monkeypatch)
        one.put("models", MODEL, FIRST, folder)
        yield one


def test_hub_model_is_downloaded_once_after_notice(
    served: FakeHub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(name_or_path=MODEL)
    assert model_config(config).model_type == "roberta"
    # Only the weights that are read are fetched, and only when they are.
    folder = cache / "models--owner--tiny" / "snapshots" / FIRST
    assert (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    model, _ = load_model(config, seed=0, vocab_size=len(open_tokenizer(MODEL)))
    expected = tiny_model("roberta", vocab_size=len(tiny_tokenizer())).state_dict()
    assert all(weight.equal(expected[name]) for name, weight in model.state_dict().items())
    assert not (folder / "pytorch_model.bin").exists()
    error = capsys.readouterr().err
    assert f"das_ds: {MODEL}: no such folder here; asking {served.endpoint} for a model of that name\n" in error
    assert error.count("das_ds: ") == 1
    before = len(served.requests)
    load_model(config, seed=0, vocab_size=10)
    assert len(served.requests) == before


def test_hub_offline_uses_cache(
    served: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    online = resolve_model_folder(MODEL, weights=True)
    forget()
    capsys.readouterr()
    refuse(monkeypatch)
    assert resolve_model_folder(MODEL, weights=True) == online
    error = capsys.readouterr().err
    assert f"das_ds: {MODEL}: {constants.ENDPOINT} does not answer (ConnectError)\n" in error
    assert f"das_ds: {MODEL}: the hub does not answer; using the copy in its cache, commit {FIRST}\n" in error
    forget()
    assert resolve_model_folder(MODEL, FIRST, weights=True) == online


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{probe.getsockname()[1]}", monkeypatch)


def test_hub_without_answer_is_asked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        expected = (
            r"'no-such-model'.*: found no such folder, and the hub \(.*\) does not answer, and its cache has no copy"
        )
        with pytest.raises(ModelError, match=expected):
            model_config(ModelConfig(name_or_path="no-such-model"))
        # Nor for the next name.
        with pytest.raises(ModelError, match="does not answer"):
            open_tokenizer("no-such-tokenizer")
        silent.setblocking(False)
        silent.accept()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_hub_missing_name_is_one_line(served: FakeHub) -> None:
    with pytest.raises(ModelError, match=r"found no such folder, and the hub \(.*\) has no model of that name"):
        model_config(ModelConfig(name_or_path="no-such-model"))
    with pytest.raises(HubError, match="the model of the hub has no revision 'gone'"):
        resolve_model_folder(MODEL, "gone")
    asked = len(served.requests)
    for path in ("x" * 300, "no/such/folder", "/no/such/folder", "./x", "~/model"):
        with pytest.raises(HubError, match="found no such folder, and no model of the hub can have that name"):
            resolve_model_folder(path)
    assert len(served.requests) == asked


def test_resolve_model_folder_revision_of_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found revision 'v1' with a local folder"):
        model_config(ModelConfig(name_or_path=str(tmp_path), revision="v1"))


def test_hub_deleted_model_uses_cached_commit(served: FakeHub, tmp_path: Path) -> None:
    online = resolve_model_folder(MODEL, weights=True)
    forget()
    served.put("models", MODEL, SECOND, tmp_path / "upload")
    assert resolve_model_folder(MODEL, FIRST, weights=True) == online
    forget()
    served._repositories.clear()
    assert resolve_model_folder(MODEL, FIRST, weights=True) == online


def test_hub_dataset_keeps_commit_offline(served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served.put("datasets", "owner/text", FIRST, tmp_path / "upload")
    (source,) = resolve_source("owner/text:part@test")
    assert source == HubDataset("owner/text", "part", "test", FIRST)
    assert fingerprint(source) == f"owner/text:part@test#{FIRST}"
    forget()
    refuse(monkeypatch)
    assert resolve_source("owner/text:part@test") == [source]
    assert resolve_source(f"owner/text@train#{SECOND}") == [HubDataset("owner/text", revision=SECOND)]
    with pytest.raises(DataError, match=r"owner/text: found no such file, and the hub .* does not answer"):
        resolve_source("owner/text#v2")


def test_find_commit_by_revision(served: FakeHub) -> None:
    assert find_commit("model", MODEL, "v1") == FIRST
    assert served.requests == [f"/api/models/{MODEL}/revision/v1"]
    assert find_commit("model", MODEL, SECOND) == SECOND


def test_revision_without_name_raises() -> None:
    with pytest.raises(ValueError, match="revision is of a model of the hub"):
        ModelConfig(config={"model_type": "bert"}, revision="v1")
    with pytest.raises(ValueError, match="tokenizer_revision: found v1 without a tokenizer"):
        DataConfig(tokenizer_revision="v1")
