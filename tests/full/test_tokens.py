"""Complete runs whose second domain adds tokens, at ZeRO 2 and 3 on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from das_ds.reporting.results import Results
from helpers.resume import break_off
from helpers.run_ranks import run_ranks
from helpers.runs import WORDS, evaluate_export, exported_weights, run_all, run_stopped_and_continued, small_run
from helpers.tiny_tokenizer import word_tokenizer
from helpers.tokens import BIAS, EMBEDDING, check_as_if_added_between_two_runs, grown_and_in_two_runs, without_tokens
from helpers.tokens import run_with_tokens as run

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Results]]:
    """Runs at ZeRO 2, one after the other on the same ranks."""
    folder = tmp_path_factory.mktemp("tokens")
    grown = grown_and_in_two_runs(folder, 2, "fp32")
    plain = {**grown[0], "output_dir": folder / "plain", "data": without_tokens(grown[0])}
    one = run(folder, "one", 2, method={"name": "one"})
    alone = run(folder, "alone", 2, method={"name": "ncl"}, domains=one["domains"][1:])
    return folder, run_ranks(run_all, 2, [*grown, plain, one, alone])[0]


def test_added_tokens_equal_tokens_added_between_runs(finished: tuple[Path, list[Results]]) -> None:
    folder, results = finished
    check_as_if_added_between_two_runs(folder, results[0], results[2])


def test_added_tokens_earlier_domains_keep_text_and_loss(finished: tuple[Path, list[Results]]) -> None:
    """Until tokens are added, columns of other corpora are those of a run without tokens; exports give all of them."""
    folder, (grown, _, _, plain, *_) = finished
    for stage in (0, 1):
        row = grown.loss_matrix[stage]
        same = plain.loss_matrix[stage]
        assert [row[0], row[2]] == pytest.approx([same[0], same[2]], rel=1e-6) and row[1] != same[1]
    values = run(folder, "both", 2, method={"name": "ncl"})
    for stage, domain in ((1, "00_food"), (2, "01_papers")):
        losses = run_ranks(evaluate_export, 1, values, folder / "both" / "domains" / domain / "model")[0]
        assert list(losses.values()) == pytest.approx(grown.loss_matrix[stage], rel=1e-5)


def test_added_tokens_per_domain_method_starts_with_own_tokens(finished: tuple[Path, list[Results]]) -> None:
    folder, _ = finished
    weights = exported_weights(folder / "one", "01_papers")
    expected = exported_weights(folder / "alone", "00_papers")
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_added_tokens_changed_after_start_raise(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("treebanks\n", encoding="utf-8")
    values = run(tmp_path, "run", 2, method={"name": "ncl"}, general=None)
    values["data"]["add_tokens"] = {"food": str(tokens)}
    values["domains"] = values["domains"][:1]
    run_ranks(break_off, 1, values, 8)
    tokens.write_text("baseline\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"RunFolderError.*the text or the tokens of food changed since"):
        run_ranks(run_all, 1, [values])


def test_added_tokens_das_resumes_bitwise(tmp_path: Path) -> None:
    method = {"name": "das", "importance": {"num_samples": 10, "granularity": "parameter"}}
    complete, parts = (run(tmp_path, name, 3, method=method) for name in ("complete", "parts"))
    expected = run_ranks(run_all, 2, [complete])[0][0]
    found = run_ranks(run_stopped_and_continued, 2, parts, "das")[0]
    assert found.loss_matrix == expected.loss_matrix
    mine, theirs = (exported_weights(tmp_path / name, "01_papers") for name in ("complete", "parts"))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for place, num_tokens in (
        ("importance_general", 300),
        ("domains/00_food/importance", 300),
        ("importance", 303),
    ):
        importance = load_file(tmp_path / "complete" / f"{place}.safetensors")
        assert len(importance[EMBEDDING]) == 24 * num_tokens and len(importance[BIAS]) == num_tokens


def test_run_tokenizer_with_id_holes(tmp_path: Path) -> None:
    values = small_run(tmp_path, method={"name": "ncl"}, data={"tokenizer": str(tmp_path / "words")})
    word_tokenizer(WORDS, skipped=40).save_pretrained(tmp_path / "words")
    result = run_ranks(run_all, 1, [values])[0][0]
    folder = tmp_path / "run" / "domains" / "01_papers" / "model"
    found = run_ranks(evaluate_export, 1, values, folder)[0]
    assert list(found.values()) == pytest.approx(result.loss_matrix[2], rel=1e-5)
    assert len(exported_weights(tmp_path / "run", "01_papers")[EMBEDDING]) == 45 + len(set(WORDS))


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, torch.float32), ({"export": {"dtype": "bf16"}}, torch.bfloat16)]
)
def test_export_config_names_dtype(changes: dict[str, Any], expected: torch.dtype, tmp_path: Path) -> None:
    values = small_run(tmp_path, method={"name": "ncl"}, train={"precision": "bf16"}, **changes)
    run_ranks(run_all, 1, [values])
    folder = tmp_path / "run" / "domains" / "01_papers" / "model"
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {expected}
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert model.dtype == model.config.dtype == expected


def test_added_tokens_are_free_of_direction_masks(tmp_path: Path) -> None:
    """Where nothing known may change, logits of new tokens move over the first domain's inputs, and no others do."""
    method = {"name": "directions", "half_saturation": 1e-6, "num_samples": 10}
    values = run(tmp_path, "run", 2, method=method)
    values["train"] = {**values["train"], "weight_decay": 0.0}
    run_ranks(run_all, 2, [values])
    before, after = (exported_weights(tmp_path / "run", name)[EMBEDDING] for name in ("00_food", "01_papers"))
    moment = load_file(tmp_path / "run" / "domains" / "00_food" / "directions.safetensors")[EMBEDDING]
    steps = torch.cat((after[:300] - before, after[300:] - before.mean(dim=0)))
    moved = ((steps @ moment) * steps).sum(dim=1).clamp_min(0.0).sqrt()
    assert len(moved) == 303 and moved[:300].max() < 1e-2 * moved[300:].min()
    files = [
        tmp_path / "run" / place / "directions.safetensors" for place in ("domains/00_food", "domains/01_papers", "")
    ]
    num_tokens = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            num_tokens.append(file.metadata()["num_tokens"])
    assert num_tokens == ["300", "303", "303"]
