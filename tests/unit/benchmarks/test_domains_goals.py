"""Families of tests and goals: each outcome follows from the values, and too little data is no outcome."""

from collections.abc import Sequence

import pytest

from benchmarks.domains.evidence.families import AGAINST_RIVALS, RIVALS, against_naive, describe_seeds, families
from benchmarks.domains.evidence.goals import Goal, check_goals
from benchmarks.domains.evidence.measures import MACRO_F1, forgetting_share, format_share
from benchmarks.domains.tiers import TIERS
from benchmarks.domains.variants import METHODS
from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.metrics import metric_values
from helpers.comparisons import comparison, group, with_scores

RATE = "train__learning_rate"
SIX = ["restaurant", "acl", "ai", "phone", "pubmed", "camera"]


def naive(num_seeds: int) -> list[Group]:
    """Between 3.0 and 4.0 a nat of learning costs a nat of forgetting, 1.0 at 3.0."""
    return [
        group("ncl", [(3.0, 1.0)] * num_seeds, **{RATE: "2e-4"}),
        group("ncl x 0.25", [(4.0, 0.0)] * num_seeds, **{RATE: "5e-5"}),
    ]


def runs(num_seeds: int = 8, ours: float = 0.04, rival: float = 0.4, six: bool = True) -> Comparison:
    """Our method at 3.5, where naive training forgets 0.5, and rivals that learn as much."""

    def seeds(label: str, forgetting: float, learned: float = 3.5) -> Group:
        places = [(learned, forgetting + 0.001 * seed) for seed in range(num_seeds)]
        return group(label, places, **{RATE: "2e-4", "method__key": label})

    rivals = [seeds(label, rival + 0.01 * index) for index, label in enumerate(RIVALS)]
    replay = [seeds("replay", 0.2), seeds("directions, replay", 0.01)]
    found = comparison(*naive(num_seeds), seeds("directions", ours), *rivals, *replay)
    return found.model_copy(update={"domains": SIX}) if six else found


def outcomes(goals: Sequence[Goal]) -> list[str]:
    return [goal.outcome for goal in goals]


def test_rivals_and_contenders_are_methods_of_the_benchmark() -> None:
    assert set(RIVALS) < {variant.group for variant in METHODS}


def test_forgetting_share_worked_example() -> None:
    found = comparison(*naive(2), group("das", [(3.5, 0.1), (3.2, 0.1)], **{RATE: "2e-4", "method__key": "das"}))
    share = forgetting_share(found, found.group("das"))
    # Naive training forgets 0.5 and 0.8.
    assert share is not None and share.mean == pytest.approx(0.2 / 1.3)
    assert share.by_seed == pytest.approx({0: 0.2, 1: 0.125})


@pytest.mark.parametrize(("forgetting", "text"), [(-0.1, "none"), (0.0, "none"), (0.05, "10%"), (0.75, "150%")])
def test_format_share_of_negative_forgetting_is_none(forgetting: float, text: str) -> None:
    found = comparison(*naive(1), group("das", [(3.5, forgetting)], **{RATE: "2e-4", "method__key": "das"}))
    assert format_share(forgetting_share(found, found.group("das"))) == text


def test_forgetting_share_without_naive_forgetting_is_undefined() -> None:
    # Naive training at the lowest rate forgets nothing, so no fraction of it can be left.
    found = comparison(*naive(1), group("das", [(4.0, 0.1)], **{RATE: "2e-4", "method__key": "das"}))
    assert forgetting_share(found, found.group("das")) is None
    outside = comparison(*naive(1), group("das", [(2.0, 0.1)], **{RATE: "2e-4", "method__key": "das"}))
    assert format_share(forgetting_share(outside, outside.group("das"))) == "-"


def test_family_corrects_for_all_planned_tests() -> None:
    tests = AGAINST_RIVALS.run(runs(num_seeds=8))
    # Eight pairs of one sign: p = 2 / 2^8, times four tests.
    assert [test.p_value for test in tests.values()] == pytest.approx([4 * 2 / 2**8] * 4)
    assert all(test.is_less for test in tests.values())
    assert AGAINST_RIVALS.describe(tests["osft"]) == "-72.0 percentage points, significantly less (p 0.031, 8 seeds)"
    fewer = runs(num_seeds=8)
    fewer = fewer.model_copy(update={"groups": [one for one in fewer.groups if one.label != "kd"]})
    tests = AGAINST_RIVALS.run(fewer)
    assert tests["osft"].p_value == pytest.approx(4 * 2 / 2**8) and tests["kd"].p_value is None


def test_family_with_six_seeds_of_several_tests_is_not_significant() -> None:
    tests = AGAINST_RIVALS.run(runs(num_seeds=6))
    assert tests["ewc"].describe() == "not significantly less (p 0.12, 6 seeds)"


def test_family_with_fewer_than_six_seeds_is_not_tested() -> None:
    test = AGAINST_RIVALS.run(runs(num_seeds=5))["ewc"]
    assert test.p_value is None and test.describe() == "not tested: 5 seeds"
    assert AGAINST_RIVALS.run(runs(num_seeds=1))["ewc"].describe() == "not tested: 1 seed"


def test_families_are_those_whose_groups_are_contenders() -> None:
    assert [len(family.labels) for family in families(TIERS["cpu"])] == [2, 4, 1, 4]
    assert [len(family.labels) for family in families(TIERS["masks"])] == [5]
    assert families(TIERS["length"]) == families(None) == []
    # Eight seeds are enough for one significant test in each.
    assert all(len(family.labels) * 2 / 2**8 <= 0.05 for family in families(TIERS["cpu"]))
    first = against_naive(["directions", "ewc"]).run(runs())
    assert first["directions"].is_less and first["ewc"].is_less


@pytest.mark.parametrize(("counts", "text"), [([1], "1 seed"), ([2, 2], "2 seeds"), ([8, 2, 2], "2 to 8 seeds")])
def test_describe_seeds(counts: list[int], text: str) -> None:
    assert describe_seeds(counts) == text


def test_goals_held() -> None:
    tasks = comparison(
        with_scores(group("ncl", [(3.0, 1.0)]), 0.70), with_scores(group("directions", [(3.0, 1.0)]), 0.714)
    )
    goals = check_goals(runs(), tasks)
    assert outcomes(goals) == ["held"] * 5
    assert "It forgets 9% (95 % interval of the seeds' shares: 8% to 9%), 8 seeds." in goals[0].describe()
    assert goals[1].describe().startswith("- **held**: `directions` forgets less than `osft`, `ewc`, `kd` and")
    assert "Difference: +1.40 points, not tested: 1 seed." in goals[3].values
    assert "At most: +0.100, the least; next is `osft` with +0.404." in goals[4].values.replace(
        "General loss, at", "At"
    )


def test_goal_of_end_tasks_needs_the_tasks_of_all_domains() -> None:
    scored = with_scores(group("ncl", [(3.0, 1.0)]), 0.70)
    assert metric_values(scored, MACRO_F1) == {0: pytest.approx(70.0)}
    run = scored.runs[0].model_copy(update={"learned_rows": [1, 2, 2]})
    assert metric_values(scored.model_copy(update={"runs": [run]}), MACRO_F1) == {}


def test_goals_not_held() -> None:
    tasks = comparison(
        with_scores(group("ncl", [(3.0, 1.0)]), 0.70), with_scores(group("directions", [(3.0, 1.0)]), 0.712)
    )
    goals = check_goals(runs(ours=0.45), tasks)
    assert outcomes(goals) == ["not held", "not held", "held", "not held", "not held"]
    assert "It forgets 91%" in goals[0].values
    assert "significantly more" in goals[1].values
    assert "not less than `osft`, `ewc`, `kd` and `first moment`" in goals[4].values


def test_goals_of_few_seeds_are_not_tested() -> None:
    goals = check_goals(runs(num_seeds=2), None)
    assert outcomes(goals) == ["held", "not tested: 2 seeds", "not tested: 2 seeds", "not measured", "held"]


def test_goals_with_six_seeds_are_limited_by_the_correction() -> None:
    assert outcomes(check_goals(runs(num_seeds=6), None))[1:3] == ["not held", "held"]


def test_goals_without_results_are_not_measured() -> None:
    assert outcomes(check_goals(None, None)) == ["not measured"] * 5
    assert outcomes(check_goals(runs(six=False), None))[0] == "not measured"
    without = runs().model_copy(update={"groups": naive(8)})
    assert outcomes(check_goals(without, None)) == ["not measured"] * 5


def test_goal_of_a_method_that_forgets_nothing_is_held() -> None:
    goal = check_goals(runs(ours=-0.05), None)[0]
    assert goal.outcome == "held" and "It forgets none" in goal.values


def test_goal_of_general_text_leaves_out_replay() -> None:
    found = runs(ours=0.3)
    # replay drifts by 0.2, but it sees earlier text.
    assert outcomes(check_goals(found, None))[4] == "held"
