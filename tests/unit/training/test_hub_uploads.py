"""Uploads of models to a hub on this machine: tags and repositories, retries, what is left to the next start."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from das_ds import hub as hub_client
from das_ds.config import RunConfig
from das_ds.config.io import parse_config
from das_ds.errors import ConfigError
from das_ds.preflight.environment import check_hub
from das_ds.run_dir import RunDir
from das_ds.storage import MODEL_CARD, atomic_dir
from das_ds.training import hub_uploads
from das_ds.training.hub_upload import HubRecord, check_hub_names
from das_ds.training.hub_uploads import HubUploads
from das_ds.training.model_card import model_card
from helpers.fake_hub import fake_hub, point_to
from helpers.preflight import Alone, silent_checks
from helpers.runs import small_run
from helpers.writable_hub import WritableHub


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """A hub that this process asks, with a token, and no waits between attempts."""
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_client, "_gave_up", False)
    monkeypatch.setattr(hub_uploads, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setenv("HF_TOKEN", "hf_written_for_tests")
    with fake_hub(WritableHub) as one:
        point_to(one.endpoint)
        yield one


def run(folder: Path, **export: Any) -> RunConfig:
    export = {"push_to_hub": True, "hub_model_id": "owner/papers", **export}
    return RunConfig(**small_run(folder, export=export))


def save_model(config: RunConfig, index: int, name: str, content: str, **files: str) -> Path:
    folder = RunDir(config.output_dir).model(index, name)
    with atomic_dir(folder) as partial:
        (partial / "model.safetensors").write_text(content)
        (partial / MODEL_CARD).write_text(f"card of {name}")
        for other, text in files.items():
            (partial / f"{other}.safetensors").write_text(text)
    return folder


def upload(config: RunConfig, num_domains: int = 2) -> HubUploads:
    uploads = HubUploads(config, RunDir(config.output_dir))
    uploads.add(num_domains)
    assert uploads.wait(lambda: False)
    return uploads


def test_uploads_one_repository_has_a_tag_for_each_domain(
    served: WritableHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run(tmp_path)
    save_model(config, 0, "food", "first", second="of two files")
    save_model(config, 1, "papers", "newest")
    upload(config)
    repository = served.repositories["owner/papers"]
    messages = [message for _, message, _ in repository.commits[1:]]
    assert repository.private and messages == ["run: after food", "run: after papers"]
    assert repository.files("food")["model.safetensors"] == b"first"
    assert repository.files("food")["second.safetensors"] == b"of two files"
    assert repository.files("papers") == repository.files()
    assert repository.files()["model.safetensors"] == b"newest" and repository.files()[MODEL_CARD] == b"card of papers"
    # The newest model has one file.
    assert "second.safetensors" not in repository.files()
    record = HubRecord.read(RunDir(config.output_dir).hub_record(1, "papers"))
    assert (record.repo_id, record.tag, record.commit) == ("owner/papers", "papers", repository.head)
    assert "again" not in caplog.text


def test_uploads_a_repository_for_each_domain(served: WritableHub, tmp_path: Path) -> None:
    config = run(tmp_path, hub_layout="repositories", hub_private_repo=False, hub_model_id="lab/papers")
    save_model(config, 0, "food", "first")
    save_model(config, 1, "papers", "newest")
    upload(config)
    assert list(served.repositories) == ["lab/papers-food", "lab/papers-papers"]
    assert not any(repository.private or repository.tags for repository in served.repositories.values())
    assert served.repositories["lab/papers-food"].files()["model.safetensors"] == b"first"


def test_uploads_send_changed_models_alone_again(served: WritableHub, tmp_path: Path) -> None:
    config = run(tmp_path)
    save_model(config, 0, "food", "first")
    upload(config, 1)
    served.requests.clear()
    upload(config, 1)
    assert served.requests == []
    save_model(config, 0, "food", "another")
    upload(config, 1)
    repository = served.repositories["owner/papers"]
    assert repository.files("food")["model.safetensors"] == b"another" and len(repository.commits) == 3


def test_uploads_tag_that_was_not_set_is_set_by_the_next_start(served: WritableHub, tmp_path: Path) -> None:
    config = run(tmp_path)
    save_model(config, 0, "food", "first")
    upload(config, 1)
    repository = served.repositories["owner/papers"]
    repository.tags.clear()
    RunDir(config.output_dir).hub_record(0, "food").unlink()
    upload(config, 1)
    # Nothing of the model is sent again.
    assert repository.tags == {"food": repository.head} and len(repository.commits) == 2


def test_uploads_are_tried_again(
    served: WritableHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run(tmp_path)
    save_model(config, 0, "food", "first")
    served.failures = 1
    with caplog.at_level(logging.WARNING):
        upload(config, 1)
    assert served.repositories["owner/papers"].files("food")["model.safetensors"] == b"first"
    assert "is tried again" in caplog.text and "by hand" not in caplog.text
    assert f"uploaded food to {served.endpoint}/owner/papers/tree/food" in capsys.readouterr().err


def test_uploads_that_fail_are_left_to_the_next_domain_in_order(
    served: WritableHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run(tmp_path)
    folder = save_model(config, 0, "food", "first")
    served.failures = 3
    with caplog.at_level(logging.WARNING):
        uploads = upload(config, 1)
    last = caplog.records[-1].getMessage()
    assert last.startswith("food is not on the hub (") and last.endswith(
        f"by hand: hf upload owner/papers {folder} . --private && hf repos tag create owner/papers food"
    )
    assert not RunDir(config.output_dir).hub_record(0, "food").exists()
    save_model(config, 1, "papers", "newest")
    uploads.add(2)
    assert uploads.wait(lambda: False)
    repository = served.repositories["owner/papers"]
    assert repository.files("food")["model.safetensors"] == b"first"
    assert repository.files()["model.safetensors"] == b"newest"


def test_uploads_stop_request_ends_the_wait(
    served: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = run(tmp_path)
    save_model(config, 0, "food", "first")
    served.failures = 1
    monkeypatch.setattr(hub_uploads, "RETRY_SECONDS", (3600.0,))
    uploads = HubUploads(config, RunDir(config.output_dir))
    uploads.add(1)
    with caplog.at_level(logging.WARNING):
        assert not uploads.wait(lambda: True)
    assert "food is not on the hub (the run was asked to stop)" in caplog.text


def test_uploads_nothing_that_was_moved_away_or_where_off(served: WritableHub, tmp_path: Path) -> None:
    upload(run(tmp_path))
    off = run(tmp_path, push_to_hub=False)
    save_model(off, 0, "food", "first")
    upload(off)
    assert served.requests == []


def test_uploads_ask_a_hub_that_did_not_answer_before(
    served: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = run(tmp_path)
    save_model(config, 0, "food", "first")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING):
        upload(config, 1)
    assert served.requests == [] and "food is not on the hub (HF_HUB_OFFLINE is set)" in caplog.text
    monkeypatch.setattr(hub_client, "_gave_up", True)
    upload(config, 1)
    assert served.repositories["owner/papers"].tags.keys() == {"food"}


def test_model_card_names_the_repository(tmp_path: Path) -> None:
    card = model_card(run(tmp_path), 2, "mlm")
    assert 'AutoModelForMaskedLM.from_pretrained("owner/papers", revision="papers")' in card
    card = model_card(run(tmp_path, hub_layout="repositories"), 2, "mlm")
    assert 'AutoModelForMaskedLM.from_pretrained("owner/papers-papers")' in card
    # The model of another step stays here.
    assert "owner/papers" not in model_card(run(tmp_path), 2, "mlm", name="best")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("export.push_to_hub=true", "export: hub_model_id: found null with push_to_hub, expected a repository"),
        ("export.hub_model_id=papers", "export.hub_model_id: found 'papers', allowed: text matching"),
        ("export.hub_layout=branches", "export.hub_layout: found 'branches', allowed: tags | repositories"),
        ("export.max_shard_size=5", "export.max_shard_size: found 5, allowed: text matching"),
        ("export.max_shard_size=0GB", "export.max_shard_size: found '0GB', allowed: text matching"),
        ("export.max_shard_size=5GiB", "export.max_shard_size: found '5GiB', allowed: text matching"),
    ],
)
def test_export_config_wrong_value_is_one_line(tmp_path: Path, change: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(small_run(tmp_path), [change])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_hub_name_that_the_hub_does_not_allow_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_hub_names(run(tmp_path, hub_model_id="owner/pa--pers"))
    message = str(caught.value)
    assert message.startswith("export.hub_model_id: found owner/pa--pers, but the hub allows no repository")
    assert "\n" not in message


def hub_check(config: RunConfig) -> tuple[str, str]:
    checks = silent_checks(Alone())
    check_hub(checks, config, 0)
    (result,) = checks.results
    return result.status, result.found


def test_preflight_hub_names_account_and_repositories(served: WritableHub, tmp_path: Path) -> None:
    assert hub_check(run(tmp_path)) == ("ok", "models go to owner/papers as owner")
    layout = run(tmp_path, hub_layout="repositories", hub_model_id="lab/papers")
    assert hub_check(layout) == ("ok", "models go to lab/papers-food, lab/papers-papers as owner")
    checks = silent_checks(Alone())
    check_hub(checks, run(tmp_path, push_to_hub=False), 0)
    assert checks.results == []


def test_preflight_hub_wrong_token_fails(served: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = hub_check(run(tmp_path, hub_model_id="other/papers"))
    assert status == "failed" and "found owner other, but the token is of owner; allowed: owner, lab" in found
    served.account["auth"] = {"accessToken": {"role": "read"}}
    assert hub_check(run(tmp_path))[1].endswith("found a token of owner that only reads, expected one that may write")
    served.refuses_token = True
    assert "refuses; set another HF_TOKEN" in hub_check(run(tmp_path))[1]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    status, found = hub_check(run(tmp_path))
    assert status == "failed" and "found no token; set HF_TOKEN, or log in with: hf auth login" in found


def test_preflight_hub_that_does_not_answer_is_a_warning(
    served: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    warning = ("warning", "the hub does not answer; models would stay in the run folder until it does")
    assert hub_check(run(tmp_path)) == warning
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_check(run(tmp_path)) == warning
