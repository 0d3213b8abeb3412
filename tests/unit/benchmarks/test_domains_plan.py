"""Tiers, their corpora and the run configs that they give."""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.domains import data
from benchmarks.domains.__main__ import main, only
from benchmarks.domains.lr_search import Candidate, Choice
from benchmarks.domains.plan import NAIVE, BaseName, Tier, Values, merged
from benchmarks.domains.pretraining import pretraining_run
from benchmarks.domains.runs import Experiment, learned
from benchmarks.domains.tiers import TIERS
from das_ds.config import RunConfig
from das_ds.errors import ConfigError, DataError
from das_ds.reporting.results import build_results

TIERS_BY_NAME = pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)


def configs(tier: Tier) -> list[RunConfig]:
    """Every run config of a tier, with the smallest learning rate as if it were chosen."""
    found = []
    experiments = [Experiment(tier, track, Path("runs"), Path("data"), Path("base")) for track in tier.tracks]
    by_base = {experiment.track.base: experiment for experiment in experiments}
    for variant in tier.variants:
        rates = tier.rates(variant)
        found += [experiment.lr_search_run(variant, rate) for experiment in by_base.values() for rate in rates]
        found += [experiment.run(variant, rates[0], seed) for experiment in experiments for seed in tier.seeds]
    return [RunConfig.model_validate({"output_dir": run.folder, **run.values}) for run in found]


@TIERS_BY_NAME
def test_every_run_is_a_run_config_of_its_own(tier: Tier) -> None:
    runs = configs(tier)
    assert len({run.output_dir for run in runs}) == len(runs)
    assert {len(run.domains) for run in runs} == {2, len(tier.tracks[0].domains)}
    assert {run.seed for run in runs if len(run.domains) == 2} == {tier.lr_search_seed}


@TIERS_BY_NAME
def test_a_tier_names_its_own_variants_and_leaves_the_choice_a_seed(tier: Tier) -> None:
    labels = [variant.label for variant in tier.variants]
    assert len(set(labels)) == len(labels)
    assert {NAIVE, tier.repeated, *tier.matched, *tier.task_variants} <= set(labels)
    assert tier.lr_search_seed not in tier.seeds
    assert all(low < high for low, high in pairwise(tier.learning_rates))
    assert set(data.TASK_OF) >= set(tier.corpora if tier.task_variants else ())


@TIERS_BY_NAME
def test_base_models_are_runs_over_general_text_alone(tier: Tier) -> None:
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


def test_merging_goes_into_sections_and_replaces_lists() -> None:
    first = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merged(first, {"a": {"c": [3]}}, {"e": {"f": 5}}) == {"a": {"b": 1, "c": [3]}, "d": 4, "e": {"f": 5}}
    assert first == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_some_variants_alone() -> None:
    tier = only(TIERS["cpu"], ["replay"])
    assert [variant.label for variant in tier.variants] == [NAIVE, "replay"]
    assert tier.matched == () and tier.repeated == NAIVE
    with pytest.raises(ConfigError, match=r"--only: found 'wishes', allowed: 'ncl', 'one', 'pool'"):
        only(TIERS["cpu"], ["wishes"])


def test_the_best_learner_is_chosen_and_an_edge_is_named() -> None:
    def choice(*losses: float) -> Choice:
        return Choice("das", tuple(Candidate(rate, loss, 0.1) for rate, loss in zip((1, 2, 4), losses, strict=True)))

    assert choice(4.0, 3.0, 3.5).learning_rate == 2
    assert not choice(4.0, 3.0, 3.5).is_at_edge
    assert choice(4.0, 3.0, 2.0).is_at_edge
    assert choice(3.0, 3.0, 3.0).learning_rate == 1


def test_learned_is_the_diagonal_below_the_first_row() -> None:
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
    assert learned(results) == 2.5


@pytest.mark.parametrize(
    ("value", "message"),
    [("", "DAS_DS_DATA: not set, expected the folder"), ("nowhere", "DAS_DS_DATA: found nowhere, which is no folder")],
)
def test_no_data_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, value: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(data.VARIABLE, value)
    assert main(["cpu", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"das_ds: {message}")
    assert not any(tmp_path.iterdir())


def test_a_tier_that_would_take_days_here_is_refused(
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


def test_missing_files_are_named(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        (tmp_path / "acl").mkdir(exist_ok=True)
        (tmp_path / "acl" / f"{part}.txt.xz").touch()
    data.check_files(tmp_path, ["acl"])
    with pytest.raises(
        DataError, match=r"lacks pubmed/train.txt.xz, pubmed/valid.txt.xz, tasks/acl_arc/train.jsonl.xz"
    ):
        data.check_files(tmp_path, ["acl", "pubmed"], ["acl_arc"])
