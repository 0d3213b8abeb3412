"""Extending results without their run folders: no run is repeated, and nothing incompatible is joined."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.domains import data
from benchmarks.domains.__main__ import main
from benchmarks.domains.jobs import Job
from benchmarks.domains.lr_search import Candidate, Choice, LrSearch
from benchmarks.domains.plan import NAIVE, Tier
from benchmarks.domains.result_file import SuiteResult, TierResult, write_result_file
from benchmarks.domains.resume_results import (
    AGREEMENT,
    check_agreement,
    check_tier,
    find_run,
    find_suite,
    join_comparisons,
)
from benchmarks.domains.runner import Runner
from benchmarks.domains.runs import RunFactory
from benchmarks.domains.suite import SuiteRuns
from benchmarks.domains.tiers import CPU, GPU
from das_ds.errors import RunFolderError, StoppedError
from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.metrics import baseline_sweep
from helpers.comparisons import comparison, group, run_summary, with_scores
from helpers.domain_runs import FakeRunner

RATE = "train__learning_rate"
SUITE = replace(CPU.suites[0], domains=("acl", "pubmed"))
RATES = (Candidate(1e-4, 3.3, 0.3), Candidate(2e-4, 3.2, 0.3), Candidate(4e-4, 3.1, 0.4), Candidate(8e-4, 3.2, 0.4))


class RecordingRunner(Runner):
    """Records the names of the jobs, and stops."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def run(self, jobs: Sequence[Job], on_finish: Callable[[Job], None] = lambda job: None) -> None:
        self.names += [job.name for job in jobs]
        raise StoppedError("noted")


def known() -> Comparison:
    """Two seeds of naive training at two rates and at that of a match, and of another method."""
    return comparison(
        group(NAIVE, [(3.0, 1.0), (3.1, 1.1)], **{RATE: "4e-4", "method__replay__fraction": "null"}),
        group("ncl x 0.5", [(3.5, 0.5), (3.6, 0.6)], **{RATE: "2e-4", "method__replay__fraction": "null"}),
        group("ncl at 0.000186", [(3.2, 0.8), (3.3, 0.9)], **{RATE: "1.86e-4", "method__replay__fraction": "null"}),
        group("replay", [(3.1, 0.1), (3.1, 0.2)], **{RATE: "4e-4", "method__replay__fraction": "0.25"}),
    )


def seeds(of: Group) -> list[int]:
    return [run.seed for run in of.runs]


def suite() -> SuiteResult:
    return SuiteResult(name=SUITE.name, base=SUITE.base, steps_per_domain=400, comparison=known(), groups=[])


def record(tier: Tier = CPU) -> TierResult:
    return TierResult(
        tier=tier.name,
        environment={"device": "a processor", "date": "2026-01-01", "versions": {"torch": "2.0"}},
        settings=tier.recorded_settings,
        choices={"encoder": [Choice("replay", RATES)]},
        strengths={},
        repeated=None,
        suites=[suite()],
    )


def new() -> Comparison:
    """Seed 1 of naive training again and its own seed, and a method that differs in its contrast."""
    first = group(NAIVE, [(9.0, 9.0), (9.0, 9.0), (3.2, 1.2)], **{RATE: "4e-4", "method__contrastive__weight": "1"})
    first = first.model_copy(update={"runs": first.runs[1:]})
    return comparison(first, group("das", [(3.4, 0.3)], **{RATE: "4e-4", "method__contrastive__weight": "0"}))


def test_join_comparisons_has_each_seed_once() -> None:
    both = join_comparisons(known(), new())
    assert [(one.label, seeds(one)) for one in both.groups] == [
        (NAIVE, [0, 1, 2]),
        ("ncl x 0.5", [0, 1]),
        ("ncl at 0.000186", [0, 1]),
        ("replay", [0, 1]),
        ("das", [0]),
    ]
    # Of a run that both have, the known one.
    assert [run.loss_after_learning for run in both.group(NAIVE).runs] == pytest.approx([3.0, 3.1, 3.2])


def test_join_comparisons_fills_settings_from_the_baseline() -> None:
    both = join_comparisons(known(), new())
    assert both.group("replay").settings == {
        "train.learning_rate": "4e-4",
        "method.replay.fraction": "0.25",
        "method.contrastive.weight": "1",
    }
    assert both.group("das").settings["method.replay.fraction"] == "null"
    assert [one.label for one in baseline_sweep(both)] == [NAIVE, "ncl x 0.5", "ncl at 0.000186"]


def test_join_comparisons_end_tasks_of_a_known_run_are_added() -> None:
    first = comparison(group(NAIVE, [(3.0, 1.0), (3.1, 1.1)]))
    scored = comparison(with_scores(group(NAIVE, [(9.0, 9.0)]), 0.7))
    runs = join_comparisons(first, scored).group(NAIVE).runs
    assert [run.loss_after_learning for run in runs] == pytest.approx([3.0, 3.1])
    assert runs[0].end_tasks == scored.groups[0].runs[0].end_tasks and runs[1].end_tasks is None


def test_join_comparisons_other_settings_are_refused() -> None:
    other = comparison(group(NAIVE, [(3.0, 1.0)], **{RATE: "2e-4"}))
    with pytest.raises(RunFolderError, match=r"ncl: found train.learning_rate 2e-4, expected 4e-4"):
        join_comparisons(known(), other)


def test_join_comparisons_keys_that_one_side_did_not_record_are_kept() -> None:
    # A key of the method's section is not recorded where no other group has another value than its default.
    first = comparison(group(NAIVE, [(3.0, 1.0)]), group("das", [(3.1, 0.1)], method__granularity="unit"))
    again = comparison(group(NAIVE, [(3.0, 1.0)]), group("das", [(3.1, 0.1)] * 3, method__weight="0"))
    joined = join_comparisons(first, again).group("das")
    assert joined.settings == {"method.granularity": "unit", "method.weight": "0"}
    assert seeds(joined) == [0, 1, 2]


def test_check_tier_other_tier_is_refused() -> None:
    check_tier(record(), CPU)
    with pytest.raises(RunFolderError, match=r"found results of tier gpu, expected those of cpu"):
        check_tier(record(GPU), CPU)
    with pytest.raises(RunFolderError, match=r"found results of other settings in evaluation, train, expected"):
        check_tier(record(), replace(CPU, settings={**CPU.settings, "train": {}, "evaluation": {}}))
    assert find_suite(None, SUITE) is None
    assert find_suite(record(), replace(SUITE, name="another")) is None
    assert find_suite(record(), SUITE) == suite()
    with pytest.raises(RunFolderError, match=r"found suite encoder_six over acl, pubmed, expected restaurant, acl, ai"):
        find_suite(record(), CPU.suites[0])
    with pytest.raises(RunFolderError, match=r"found suite encoder_six of 400 steps per domain, expected 40$"):
        find_suite(record(), replace(SUITE, steps=40))


def test_check_agreement_large_difference_is_refused() -> None:
    assert check_agreement(run_summary(0, 3.0, 1.0), run_summary(0, 3.0, 1.0)) == 0.0
    assert check_agreement(run_summary(0, 3.0, 1.0), run_summary(0, 3.01, 1.0)) == pytest.approx(0.01)
    with pytest.raises(RunFolderError, match=r"runs/0 was repeated and differs by 0.1 .* at most 0.05"):
        check_agreement(run_summary(0, 3.0, 1.0), run_summary(0, 3.0, 1.0 + 2 * AGREEMENT))
    assert find_run(None, NAIVE, 0) is None
    assert find_run(suite(), NAIVE, 7) is None
    assert find_run(suite(), NAIVE, 1) == run_summary(1, 3.1, 1.1)


def factory(*labels: str) -> RunFactory:
    tier = replace(
        CPU,
        variants=tuple(variant for variant in CPU.variants if variant.label in labels),
        contenders=("replay",),
        seeds=(0, 1),
        more_seeds=(2,),
    )
    return RunFactory(tier, SUITE, Path("runs"), Path("data"), Path("base"))


def search(setup: RunFactory, runner: RecordingRunner, *labels: str) -> LrSearch:
    return LrSearch(setup, runner, [Choice(label, RATES) for label in labels])


def test_search_known_candidates_are_not_repeated() -> None:
    runner = RecordingRunner()
    setup = factory(NAIVE, "replay")
    partial = LrSearch(setup, runner, [Choice("replay", RATES), Choice(NAIVE, RATES[1:3])])
    with pytest.raises(StoppedError, match="noted"):
        partial.run(setup.tier.variants)
    assert runner.names == ["encoder/ncl/0.0001", "encoder/ncl/0.0008"]


def first_names(setup: RunFactory, *labels: str, seed: int) -> list[str]:
    """Names of the runs of one seed, after all groups were planned."""
    runner = RecordingRunner()
    runs = SuiteRuns(setup, search(setup, runner, *labels), runner, suite())
    for label in labels:
        runs.plan(label)
    with pytest.raises(StoppedError, match="noted"):
        runs.train(seed)
    return runner.names


def test_train_repeats_only_the_first_naive_run() -> None:
    labels = (NAIVE, "replay", "lora")
    setup = factory(*labels)
    assert first_names(setup, *labels, seed=0) == [
        "encoder_six/ncl/seed0",
        "encoder_six/ncl_x_0.125/seed0",
        "encoder_six/ncl_x_0.25/seed0",
        "encoder_six/ncl_x_2/seed0",
        "encoder_six/lora/seed0",
    ]
    assert "encoder_six/ncl/seed1" not in first_names(setup, *labels, seed=1)
    assert first_names(setup, *labels, seed=2) == [
        "encoder_six/ncl/seed2",
        "encoder_six/ncl_x_0.125/seed2",
        "encoder_six/ncl_x_0.25/seed2",
        "encoder_six/ncl_x_0.5/seed2",
        "encoder_six/ncl_x_2/seed2",
        "encoder_six/replay/seed2",
    ]


def test_train_repeats_runs_whose_models_are_needed() -> None:
    setup = factory(NAIVE, "replay")
    tier = replace(setup.tier, task_variants=("replay",), sweep_factors=())
    assert first_names(replace(setup, tier=tier), NAIVE, "replay", seed=0) == ["encoder_six/ncl/seed0"]
    tuned = replace(setup, tier=replace(tier, fine_tunes=True))
    assert first_names(tuned, NAIVE, "replay", seed=0) == ["encoder_six/ncl/seed0", "encoder_six/replay/seed0"]
    assert first_names(tuned, NAIVE, "replay", seed=1) == []


def test_train_twice_plans_no_run_twice(tmp_path: Path) -> None:
    setup = replace(factory(NAIVE, "replay"), folder=tmp_path)
    tier = replace(setup.tier, sweep_factors=(), task_variants=("replay",), fine_tunes=True, contenders=("replay",))
    tuned = FakeRunner()
    runs = SuiteRuns(replace(setup, tier=tier), search(setup, RecordingRunner(), NAIVE, "replay"), tuned)
    runs.plan(NAIVE)
    runs.plan("replay")
    runs.train(0)
    runs.train(0)
    assert tuned.names == ["encoder_six/ncl/seed0", "encoder_six/replay/seed0"]
    result = runs.result()
    assert result is not None and [seeds(one) for one in result.comparison.groups] == [[0], [0]]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.json", "No such file or directory"), ("other.json", "--extend: found results of tier gpu")],
)
def test_main_unusable_results_to_extend_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, message: str
) -> None:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    write_result_file(tmp_path / "other.json", record(GPU))
    assert main(["cpu", "--folder", str(tmp_path / "runs"), "--extend", str(tmp_path / name)]) == 2
    output = capsys.readouterr().err
    assert output.startswith("das_ds: ") and message in output and output.count("\n") == 1
    assert not (tmp_path / "runs").exists()
