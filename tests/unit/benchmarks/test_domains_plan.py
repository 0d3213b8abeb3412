"""Tiers, their corpora and the run configs built from them."""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.domains import data
from benchmarks.domains.__main__ import main, select_variants
from benchmarks.domains.lr_search import Candidate, Choice
from benchmarks.domains.plan import NAIVE, Tier, merge_values
from benchmarks.domains.pretraining import pretraining_run
from benchmarks.domains.runs import RunFactory, loss_after_learning
from benchmarks.domains.tiers import TIERS
from benchmarks.domains.variants import METHODS
from das_ds.config import RunConfig, parse_method
from das_ds.errors import ConfigError, DataError
from das_ds.reporting.results import build_results

TIERS_BY_NAME = pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)


def configs(tier: Tier) -> list[RunConfig]:
    """Every run config of a tier, with the smallest learning rate as if it were chosen."""
    found = []
    factories = [RunFactory(tier, suite, Path("runs"), Path("data"), Path("base")) for suite in tier.suites]
    by_search = {tier.search_name(factory.suite): factory for factory in factories}
    for variant in tier.variants:
        rates = tier.rates(variant)
        found += [factory.lr_search_run(variant, rate) for factory in by_search.values() for rate in rates]
    for label, members in tier.groups.items():
        for factory in factories:
            found += [factory.run(members[0], tier.rates(members[0])[0], seed, label) for seed in tier.run_seeds(label)]
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
    assert not set(labels) & set(tier.groups) - {variant.label for variant in tier.variants if not variant.strength_of}
    assert {NAIVE, *tier.contenders, *tier.task_variants} <= set(tier.groups)
    assert tier.repeated in labels
    assert tier.lr_search_seed not in (*tier.seeds, *tier.more_seeds)
    assert all(high == 2 * low for low, high in pairwise(tier.learning_rates))
    assert set(data.TASK_OF) >= set(tier.corpora if tier.task_variants else ())
    assert sorted(label for wave in tier.waves for label in wave) == sorted(tier.groups)
    searched = [variant.label for wave in tier.waves for variant in tier.searched_with(wave)]
    assert sorted(searched) == sorted(labels)


@pytest.mark.parametrize("name", ["cpu", "short", "length", "decoder", "tasks", "gpu"])
def test_methods_are_searched_with_the_same_budget(name: str) -> None:
    tier = TIERS[name]
    assert len(tier.learning_rates) == 4 and tier.max_extensions == 2
    strengths = {label: len(members) for label, members in tier.groups.items() if len(members) > 1}
    assert set(strengths.values()) <= {2, 3}
    # Of directions one strength is compared, and two more are only searched.
    assert all(count == 3 for label, count in strengths.items() if label != "freeze")
    assert sum(variant.label.startswith("directions ") for variant in METHODS) == 2


@TIERS_BY_NAME
def test_methods_that_measure_read_equally_many_sequences(tier: Tier) -> None:
    samples = {run.method.name: run.method.sample_size for run in configs(tier)}
    found = {name: sample.num_samples for name, sample in samples.items() if sample is not None}
    assert found and set(found.values()) == {tier.num_samples}, found


def test_directions_and_regmean_are_as_shipped_without_general_text() -> None:
    default = parse_method({"name": "directions"})
    found = {variant.label: parse_method(variant.overrides["method"]) for variant in METHODS}
    assert found["directions"] == default.model_copy(update={"general": False})
    assert found["directions, general"] == default.model_copy(update={"general": True})
    # The default of `off_diagonal` is one of its strengths.
    assert found["regmean 0.9"] == parse_method({"name": "regmean", "general": False})
    form = {
        "apply_to": "update",
        "half_saturation": 3.0,
        "over_domains": "sum",
        "freeze_unmasked": False,
        "general": False,
    }
    assert found["directions, first form"] == default.model_copy(update=form)


def test_tasks_tier_shares_the_runs_of_cpu() -> None:
    suite = TIERS["cpu"].suites[0]
    cpu, tasks = (RunFactory(TIERS[name], suite, Path("runs"), Path("data"), Path("base")) for name in ("cpu", "tasks"))
    assert TIERS["tasks"].run_folder == TIERS["cpu"].run_folder == "cpu"
    for label, members in TIERS["tasks"].groups.items():
        for member in members:
            rate = TIERS["cpu"].rates(member)[0]
            run = tasks.run(member, rate, 0, label)
            assert run == cpu.run(member, rate, 0, label) and run.keeps_models
            assert tasks.lr_search_run(member, rate) == cpu.lr_search_run(member, rate)


def test_suites_of_other_lengths_have_searches_of_their_own() -> None:
    tier = TIERS["length"]
    assert [tier.steps(suite) for suite in tier.suites] == [40, 150, 600]
    assert [tier.search_name(suite) for suite in tier.suites] == ["encoder_40", "encoder_150", "encoder_150"]
    assert TIERS["gpu"].search_name(TIERS["gpu"].suites[0]) == "encoder"


@TIERS_BY_NAME
def test_pretraining_run_uses_only_general_text(tier: Tier) -> None:
    for name in tier.bases:
        run = pretraining_run(tier, name, Path("runs"), Path("data"), Path("cache"), Path("head"))
        config = RunConfig.model_validate({"output_dir": run.folder, **run.values})
        assert [domain.name for domain in config.domains] == [data.GENERAL] and run.keeps_models
        assert config.method.name == NAIVE and config.data.cache_dir == "cache"
        assert config.model.name_or_path == "head"


def test_tiers_that_pretrain_alike_share_the_base_model() -> None:
    def base(tier: str) -> Path:
        return pretraining_run(TIERS[tier], "encoder", Path("base"), Path("data"), Path("cache"), Path("head")).folder

    assert base("cpu") == base("length") == base("tasks") != base("masks")


def test_merge_values_merges_sections_and_replaces_lists() -> None:
    first = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert merge_values(first, {"a": {"c": [3]}}, {"e": {"f": 5}}) == {"a": {"b": 1, "c": [3]}, "d": 4, "e": {"f": 5}}
    assert first == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_select_variants_keeps_naive_training() -> None:
    tier = select_variants(TIERS["cpu"], ["replay"])
    assert [variant.label for variant in tier.variants] == [NAIVE, "replay"]
    assert tier.contenders == ("replay",) and tier.repeated == NAIVE
    strengths = select_variants(TIERS["cpu"], ["osft"])
    assert [variant.label for variant in strengths.variants] == [NAIVE, "osft 0.1", "osft 0.25", "osft 0.5"]
    with pytest.raises(ConfigError, match=r"--only: found 'wishes', allowed: 'ncl', 'directions', "):
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
    message = "das_ds: tier cpu trains in bf16: no bf16 here; expected another device, or tier short, decoder, masks\n"
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
