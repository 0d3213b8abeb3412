"""Search of rates and strengths, the order of runs, and results of which every prefix can be continued."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.domains.benchmark import Benchmark
from benchmarks.domains.evidence.page import page_text, readme_text, sort_by_tier
from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.lr_search import Candidate, Choice, LrSearch, missing_rates
from benchmarks.domains.plan import NAIVE, Suite, Tier
from benchmarks.domains.result_file import TierResult, read_result_file
from benchmarks.domains.runs import RunFactory
from benchmarks.domains.tiers import CPU
from benchmarks.domains.variants import DIRECTIONS, EWC, NAIVE_TRAINING, REPLAYING
from das_ds.errors import StoppedError
from helpers.domain_runs import FakeRunner

SUITE = Suite("encoder", "encoder", ("acl", "ai", "pubmed"))
TIER = replace(
    CPU,
    suites=(SUITE,),
    variants=(NAIVE_TRAINING, DIRECTIONS, REPLAYING, *EWC),
    learning_rates=(1e-4, 2e-4, 4e-4),
    sweep_factors=(0.5,),
    contenders=("directions", "ewc"),
    more_seeds=(2,),
    restores_groups=False,
    task_variants=(),
)
SEARCH_RUNS = 3 * 6 + 2 + 3
"""Three rates of six variants, two further ones of directions, and one below the range of each ewc."""
README = "<!-- evidence: `make evidence` writes what is between these lines -->\n<!-- evidence: end -->\n"


def factory(folder: Path, tier: Tier = TIER) -> RunFactory:
    return RunFactory(tier, SUITE, folder, Path("data"), Path("base"))


def choice(*losses: float, first: float = 1.0) -> Choice:
    return Choice("das", tuple(Candidate(first * 2**index, loss, 0.1) for index, loss in enumerate(losses)))


@pytest.mark.parametrize(
    ("found", "rates"),
    [
        (choice(), [1.0, 2.0, 4.0, 8.0]),
        (choice(4.0, 3.0), [4.0, 8.0]),
        (choice(4.0, 3.0, 3.5, 3.6), []),
        (choice(4.0, 3.5, 3.4, 3.3), [16.0]),
        (choice(4.0, 3.5, 3.4, 3.3, 3.2), [32.0]),
        (choice(4.0, 3.5, 3.4, 3.3, 3.2, 3.1), []),
        (choice(3.0, 3.5, 3.6, 3.7), [0.5]),
        (choice(2.9, 3.0, 3.5, 3.6, 3.7, first=0.5), [0.25]),
        (choice(2.8, 2.9, 3.0, 3.5, 3.6, 3.7, first=0.25), []),
        # Equal losses: the smaller rate.
        (choice(3.0, 3.0, 3.0, 3.0), [0.5]),
    ],
)
def test_missing_rates_go_on_beyond_a_best_rate_at_the_edge(found: Choice, rates: list[float]) -> None:
    assert missing_rates(found, [1.0, 2.0, 4.0, 8.0], max_extensions=2) == rates


def test_missing_rates_without_extensions() -> None:
    assert missing_rates(choice(4.0, 3.5), [1.0, 2.0], max_extensions=0) == []


def test_search_chooses_rates_by_learning_and_strengths_by_the_end(tmp_path: Path) -> None:
    runner = FakeRunner()
    search = LrSearch(factory(tmp_path), runner)
    search.run(TIER.variants)
    assert len(runner.names) == SEARCH_RUNS
    rates = {one.label: [candidate.learning_rate for candidate in one.candidates] for one in search.choices}
    assert rates["ncl"] == [1e-4, 2e-4, 4e-4]
    assert rates["directions"] == [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]
    assert rates["ewc 1000"] == [5e-5, 1e-4, 2e-4, 4e-4]
    # All strengths learn equally well; the middle one forgets least.
    assert search.chosen("ewc") == (EWC[1], 1e-4)
    assert search.strengths == {"ewc": "ewc 10000"}
    assert search.chosen(NAIVE) == (NAIVE_TRAINING, 2e-4)
    assert search.chosen("directions") == (DIRECTIONS, 1.6e-3)


def test_search_is_as_short_as_the_tier_says(tmp_path: Path) -> None:
    run = factory(tmp_path).lr_search_run(NAIVE_TRAINING, 1e-4)
    assert run.values["train"]["steps_per_domain"] == 100
    assert [domain["name"] for domain in run.values["domains"]] == ["acl", "ai"]
    short = replace(factory(tmp_path), suite=replace(SUITE, steps=40))
    assert short.lr_search_run(NAIVE_TRAINING, 1e-4).values["train"]["steps_per_domain"] == 40
    assert factory(tmp_path).run(NAIVE_TRAINING, 1e-4, 0, NAIVE).values["train"]["steps_per_domain"] == 400


def test_search_of_unfinished_strengths_chooses_none(tmp_path: Path) -> None:
    search = LrSearch(factory(tmp_path), FakeRunner(limit=4))
    with pytest.raises(StoppedError):
        search.run(EWC)
    assert search.strengths == {} and [one.label for one in search.choices] == ["ewc 1000", "ewc 10000"]


class Sitting:
    """A benchmark over made-up runs in a folder of its own."""

    def __init__(self, folder: Path, known: TierResult | None = None, limit: int | None = None) -> None:
        self.runner = FakeRunner(limit)
        self.path = folder / "result.json"
        folder.mkdir()
        self._benchmark = Benchmark(
            TIER, folder / "runs", Path("data"), self.runner, torch.device("cpu"), self.path, known
        )

    def run(self) -> TierResult:
        try:
            self._benchmark.run()
        except StoppedError:
            assert self.runner.names
        return read_result_file(self.path)


@pytest.fixture(autouse=True)
def _no_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Benchmark, "_build_base", lambda self, name: Path("base"))


def runs_of(result: TierResult) -> dict[tuple[str, int], list[list[float]]]:
    return {
        (group.label, run.seed): run.loss_matrix
        for suite in result.suites
        for group in suite.comparison.groups
        for run in group.runs
    }


def test_runs_are_made_seed_by_seed_and_contenders_first(tmp_path: Path) -> None:
    sitting = Sitting(tmp_path / "all")
    result = sitting.run()
    names = sitting.runner.names
    trained = [name for name in names if "seed" in name]
    first = ["ncl", "ncl_x_0.5", "directions", "ewc"]
    assert trained == [
        *(f"encoder/{label}/seed0" for label in first),
        "encoder/replay/seed0",
        *(f"encoder/{label}/seed1" for label in (*first, "replay")),
        *(f"encoder/{label}/seed2" for label in first),
    ]
    # The search of the others is after the first runs of the contenders; one run is made twice.
    assert names.index("encoder/ewc/seed0") < names.index("encoder/replay/0.0001")
    assert len(names) == SEARCH_RUNS + 1 + len(trained)
    assert result.strengths == {"encoder": {"ewc": "ewc 10000"}}
    assert result.repeated is not None and result.repeated.is_equal
    assert result.settings["lr_search_steps"] == 100
    ewc = result.suites[0].comparison.group("ewc")
    assert ewc.settings["method.lambda"] == "1e4" and ewc.settings["train.learning_rate"] == "1e-4"


def test_every_prefix_is_a_page_and_can_be_continued_elsewhere(tmp_path: Path) -> None:
    complete = Sitting(tmp_path / "all")
    expected = runs_of(complete.run())
    num_runs = len(complete.runner.names)
    known = None
    made: list[str] = []
    # A few runs in every sitting, each in an empty folder: only the result file is carried over.
    sizes = [3, 9, 11, 6, 4]
    for index, size in enumerate([*sizes, num_runs]):
        sitting = Sitting(tmp_path / str(index), known, limit=size)
        known = sitting.run()
        made += sitting.runner.names
        if known.suites:
            page = page_text([sort_by_tier(known)])
            assert "## Goals" in page and readme_text([known], README).count("| ncl ") == 1
    assert known is not None and runs_of(known) == expected
    # Beside the naive run that checks the known results, nothing is made twice.
    repeated = {name for name in made if made.count(name) > 1}
    assert repeated <= {"encoder/ncl/seed0", "encoder/directions/0.0001"}
    assert [one.difference for one in known.extended][-1] == 0.0


def test_results_keep_suites_that_were_not_reached(tmp_path: Path) -> None:
    result = Sitting(tmp_path / "all").run()
    other = result.suites[0].model_copy(update={"name": "later"})
    known = result.model_copy(update={"suites": [*result.suites, other]})
    sitting = Sitting(tmp_path / "again", known, limit=1)
    assert [suite.name for suite in sitting.run().suites] == ["encoder", "later"]


def test_models_are_kept_where_tasks_need_them(tmp_path: Path) -> None:
    tier = replace(TIER, task_variants=("ewc",), task_runs=(0,))

    def keeps(label: str, seed: int) -> bool:
        return factory(tmp_path, tier).run(NAIVE_TRAINING, 1e-4, seed, label).keeps_models

    assert keeps("ewc", 0) and keeps(NAIVE, 0)
    assert not keeps("ewc", 1) and not keeps(NAIVE, 1) and not keeps("replay", 0)


def test_fine_tuning_has_a_config_of_its_own(tmp_path: Path) -> None:
    tier = replace(TIER, task_seeds=2, task_settings={"epochs": 3})
    run = TrainingRun(tmp_path / "ewc" / "seed0", {"seed": 0}, keeps_models=True)
    for index, name in enumerate(SUITE.domains):
        (run.folder / f"domains/{index:02d}_{name}/model").mkdir(parents=True)
    final = factory(tmp_path, tier).final_tasks(run)
    assert [task["name"] for task in final.tasks] == ["acl_arc", "scierc", "chemprot"]
    assert {(task["epochs"], tuple(task["seeds"])) for task in final.tasks} == {(3, (0, 1))}
    assert [(job.domain, job.tasks[0]["name"]) for job in factory(tmp_path, tier).earlier_tasks(run)] == [
        (0, "acl_arc"),
        (1, "scierc"),
    ]
    command = final.command()
    assert command[-2:] == ["--model", str(run.folder / "domains/02_pubmed/model")]
    assert final.config.name == "seed0_tasks_02.yaml" and "chemprot" in final.config.read_text()
    assert not final.is_done()
