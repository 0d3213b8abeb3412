"""Tiers, their corpora and the run configs built from them."""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.domains import data
from benchmarks.domains.__main__ import main, select_variants
from benchmarks.domains.lr_search import Candidate, Choice
from benchmarks.domains.plan import NAIVE, BaseName, Tier, Values, merge_values
from benchmarks.domains.pretraining import pretraining_run
from benchmarks.domains.runs import RunFactory, loss_after_learning
from benchmarks.domains.tiers import TIERS
from das_ds.config import RunConfig
from das_ds.errors import ConfigError, DataError
from das_ds.reporting.results import build_results

TIERS_BY_NAME = pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)


def configs(tier: Tier) -> list[RunConfig]:
    """Every run config of a tier, with the smallest learning rate as if it were chosen."""
    found = []
    experiments = [RunFactory(tier, suite, Path("runs"), Path("data"), Path("base")) for suite in tier.suites]
    by_base = {factory.suite.base: factory for factory in experiments}
    for variant in tier.variants:
        rates = tier.rates(variant)
        found += [factory.lr_search_run(variant, rate) for factory in by_base.values() for rate in rates]
        found += [factory.run(variant, rates[0], seed) for factory in experiments for seed in tier.seeds]
    return [RunConfig.model_validate({"output_dir": run.folder, **run.values}) for run in found]


@TIERS_BY_NAME
def test_runs_have_valid_and_different_configs(tier: Tier) -> None:
    runs = configs(tier)
    assert len({run.output_dir for run in runs}) == len(runs)
    assert {len(run.domains) for run in runs} == {2, len(tier.suites[0].domains)}
    assert {run.seed for run in runs if len(run.domains) == 2} == {tier.lr_search_seed}


@TIERS_BY_NAME
def test_tier_names_its_variants_and_has_a_search_seed(tier: Tier) -> None:
    labels = [variant.label for variant in tier.variants]
    assert len(set(labels)) == len(labels)
    assert {NAIVE, tier.repeated, *tier.matched, *tier.task_variants} <= set(labels)
    assert tier.lr_search_seed not in tier.seeds
    assert all(low < high for low, high in pairwise(tier.learning_rates))
    assert set(data.TASK_OF) >= set(tier.corpora if tier.task_variants else ())


@TIERS_BY_NAME
def test_pretraining_run_uses_only_general_text(tier: Tier) -> None:
    starts: dict[BaseName, Values] = {
        "encoder": {"model": {"name_or_path": "head"}},
        "decoder": {"data": {"tokenizer": "tokenizer"}},
    }
    for name in tier.bases:
        run = pretraining_run(tier, name, Path("runs"), Path("data"), Path("cache"), starts[name])
        config = RunConfig.model_validate({"output_dir": run.folder, **run.values})
        assert [domain.name for domain in config.domains] == [data.GENERAL] and run.keeps_models
        assert config.method.name == NAIVE and config.data.cache_dir == "cache"
        assert (config.model.name_or_path, config.data.tokenizer) == (
            ("head", None) if name == "encoder" else (None, "tokenizer")
        )


def test_merge_values_merges_sections_and_replaces_lists() -> None:
    first = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merge_values(first, {"a": {"c": [3]}}, {"e": {"f": 5}}) == {"a": {"b": 1, "c": [3]}, "d": 4, "e": {"f": 5}}
    assert first == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_select_variants_keeps_naive_training() -> None:
    tier = select_variants(TIERS["cpu"], ["replay"])
    assert [variant.label for variant in tier.variants] == [NAIVE, "replay"]
    assert tier.matched == () and tier.repeated == NAIVE
    with pytest.raises(ConfigError, match=r"--only: found 'wishes', allowed: 'ncl', 'one', 'pool'"):
        select_variants(TIERS["cpu"], ["wishes"])


def test_choice_has_lowest_loss_and_knows_its_edge() -> None:
    def choice(*losses: float) -> Choice:
        return Choice("das", tuple(Candidate(rate, loss, 0.1) for rate, loss in zip((1, 2, 4), losses, strict=True)))

    assert choice(4.0, 3.0, 3.5).learning_rate == 2
    assert not choice(4.0, 3.0, 3.5).is_at_edge
    assert choice(4.0, 3.0, 2.0).is_at_edge
    assert choice(3.0, 3.0, 3.0).learning_rate == 1


def test_loss_after_learning_is_the_mean_of_the_diagonal() -> None:
    results = build_results(
        method="ncl",
        domains=["a", "b"],
        eval_domains=["a", "b", "general"],
        loss_matrix=[[9.0, 9.0, 9.0], [2.0, 9.0, 9.0], [5.0, 3.0, 9.0]],
        tokens_seen=1,
        wall_seconds=1.0,
        world_size=1,
        zero_stage=0,
    )
    assert loss_after_learning(results) == 2.5


@pytest.mark.parametrize(
    ("value", "message"),
    [("", "DAS_DS_DATA: not set, expected the folder"), ("nowhere", "DAS_DS_DATA: found nowhere, which is no folder")],
)
def test_main_without_data_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, value: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(data.VARIABLE, value)
    assert main(["cpu", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"das_ds: {message}")
    assert not any(tmp_path.iterdir())


def test_main_emulated_precision_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for corpus in (data.GENERAL, *TIERS["cpu"].corpora):
        (tmp_path / corpus).mkdir()
        for part in ("train", "valid"):
            (tmp_path / corpus / f"{part}.txt.xz").touch()
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    monkeypatch.setattr(
        "benchmarks.domains.__main__.emulated_precision_warning", lambda precision: f"no {precision} here"
    )
    assert main(["cpu", "--folder", str(tmp_path / "runs")]) == 2
    message = "das_ds: tier cpu trains in bf16: no bf16 here; expected another device, or tier masks\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "runs").exists()


def test_check_files_missing_ones_are_named(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        (tmp_path / "acl").mkdir(exist_ok=True)
        (tmp_path / "acl" / f"{part}.txt.xz").touch()
    data.check_files(tmp_path, ["acl"])
    with pytest.raises(
        DataError, match=r"lacks pubmed/train.txt.xz, pubmed/valid.txt.xz, tasks/acl_arc/train.jsonl.xz"
    ):
        data.check_files(tmp_path, ["acl", "pubmed"], ["acl_arc"])
