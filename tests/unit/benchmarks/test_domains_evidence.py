"""The evidence page: every variant is on it, and its conclusions follow from the values."""

from pathlib import Path

import pytest

from benchmarks.domains.ablation_groups import NOTHING, RestoredLosses
from benchmarks.domains.conclusions import (
    baseline_p_values,
    check_goal,
    compare_pairs,
    compare_with_baseline,
    describe_difference,
)
from benchmarks.domains.evidence import page_text, sort_by_tier, summary_rows, write_page
from benchmarks.domains.lr_matching import Match, Probe
from benchmarks.domains.lr_search import Candidate, Choice, naive_front
from benchmarks.domains.result_file import (
    Extended,
    Repeated,
    SuiteResult,
    TierResult,
    read_result_file,
    write_result_file,
)
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison, Group
from das_ds.reporting.statistics import paired_difference
from helpers.comparisons import comparison, group, pooled


def naive_and_others() -> Comparison:
    """Naive training at two rates: learning to 3.0 costs 1.0, to 3.5 costs 0.5; in between 1 nat costs 1 nat."""
    rate = "train__learning_rate"
    return comparison(
        group("ncl", [(3.0, 1.0), (3.0, 1.0)], **{rate: "2e-4"}),
        group("ncl x 0.5", [(3.5, 0.5), (3.5, 0.5)], **{rate: "1e-4"}),
        group("das", [(3.2, 0.3), (3.2, 0.2)], **{rate: "2e-4"}),
        group("das weights", [(3.2, 0.7), (3.2, 0.9)], **{rate: "2e-4"}),
        group("das weights, replay", [(3.1, 0.15), (3.1, 0.14)], **{rate: "2e-4"}),
        group("replay", [(3.1, 0.1), (3.1, 0.2)], **{rate: "2e-4"}),
        group("ewc", [(2.0, 0.4), (2.0, 0.6)], **{rate: "2e-4"}),
        pooled("pool", [2.5]),
    )


def record() -> TierResult:
    """Results of a tier with one suite."""
    choice = Choice("das", (Candidate(1e-4, 3.4, 0.2), Candidate(2e-4, 3.2, 0.3)))
    suite = SuiteResult(
        name="encoder",
        base="encoder",
        comparison=naive_and_others(),
        matches=[Match("das", 3.2, 0.01, (Probe(2e-4, 3.0), Probe(1.5e-4, 3.205)))],
        groups=[
            RestoredLosses(NOTHING, {"acl": 4.0, "pubmed": 3.0, "general": 5.0}),
            RestoredLosses("FFN", {"acl": 3.5, "pubmed": 3.6, "general": 4.5}),
        ],
    )
    return TierResult(
        tier="cpu",
        environment={"device": "a processor", "date": "2026-01-01", "versions": {"torch": "2.0"}},
        settings={
            "train": {"steps_per_domain": 7, "global_batch_size": 4, "precision": "fp32"},
            "data": {"sequence_length": 8},
        },
        choices={"encoder": [choice]},
        repeated=Repeated(label="das", learning_rate=1e-4, is_equal=True),
        suites=[suite],
    )


def test_write_page_from_stored_result(tmp_path: Path) -> None:
    path = tmp_path / "domains_cpu.json"
    page = tmp_path / "docs" / "evidence.md"
    write_result_file(path, record())
    assert read_result_file(path) == record()
    page.parent.mkdir()
    write_page([path], page)
    assert page.read_text() == page_text([sort_by_tier(record())])
    assert (page.parent / "images" / "evidence_cpu_encoder.png").stat().st_size > 1000


def test_page_text_has_every_group_and_section() -> None:
    text = page_text([record()])
    for found in naive_and_others().groups:
        assert f"| {found.label} " in text
    assert "7 steps per domain of 4 x 8 tokens, fp32" in text
    assert "gave identical results, to the last digit" in text
    assert "3.5000 (-0.5000)" in text and "0.0001: 3.4000 (+0.2000), 0.0002: 3.2000 (+0.3000)" in text
    assert (
        "| das             |                     3.2000 |                ncl |     3.0000 |      0.01 |      no |"
        in text
    )
    assert "images/evidence_cpu_encoder.png" in text
    assert "`pool`: forgetting is undefined." in text


def test_page_text_candidates_are_compared_with_naive_front() -> None:
    def choice(label: str, *places: tuple[float, float | None]) -> Choice:
        return Choice(label, tuple(Candidate(rate, *place) for rate, place in zip((1.0, 2.0), places, strict=True)))

    choices = [
        choice("ncl", (3.4, 0.4), (3.0, 1.2)),
        # It learns less and forgets more than another: no point of the line.
        choice("ncl, faster", (3.2, 2.0), (2.8, 2.2)),
        choice("das", (3.2, 0.2), (3.5, 0.1)),
        choice("pool", (3.2, None), (2.9, None)),
    ]
    assert naive_front(choices) == [(2.8, 2.2), (3.0, 1.2), (3.4, 0.4)]
    text = page_text([record().model_copy(update={"choices": {"encoder": choices}})])
    # The line forgets 0.8 at 3.2, and ends at 3.4.
    assert "| 1: 3.2000 (+0.2000; 25%), 2: 3.5000 (+0.1000) " in text
    assert "| 1: 3.4000 (+0.4000), 2: 3.0000 (+1.2000) " in text
    assert "| 1: 3.2000, 2: 2.9000 " in text


def test_sort_by_tier_follows_the_variants() -> None:
    others = [Choice(label, (Candidate(1e-4, 3.4, 0.2),)) for label in ("merge", "mine", "replay")]
    found = sort_by_tier(record().model_copy(update={"choices": {"encoder": others}}))
    assert [choice.label for choice in found.choices["encoder"]] == ["replay", "merge", "mine"]
    labels = [group.label for group in found.suites[0].comparison.groups]
    assert labels == ["ncl", "pool", "replay", "ewc", "ncl x 0.5", "das", "das weights", "das weights, replay"]
    unknown = record().model_copy(update={"tier": "another"})
    assert sort_by_tier(unknown) == unknown


def test_summary_rows_worked_example() -> None:
    rows = {row[0]: list(row[1:]) for row in summary_rows(naive_and_others(), family=["das"])}
    assert rows["ncl"] == ["2", "3.000", "+1.000", "3.500", "100% (baseline)", "-"]
    assert rows["das"] == ["2", "3.200", "+0.250", "3.325", "31%", "no clear difference (the interval contains 0)"]
    assert rows["ewc"][-2:] == rows["pool"][-2:] == ["-", "no baseline at equal learning"]
    assert "ncl x 0.5" not in rows


def test_page_text_extended_results_are_named() -> None:
    earlier = Extended(environment=record().environment | {"date": "2025-01-01"}, difference=0.00012)
    text = page_text([record().model_copy(update={"extended": [earlier, earlier]})])
    assert text.count("Includes earlier results: a processor, 2025-01-01, torch 2.0.") == 1
    assert "differ by at most 0.00012" in text
    assert "their costs only roughly" in text
    assert "Includes earlier" not in page_text([record()])


def test_page_text_missing_variants_are_listed() -> None:
    lines = page_text([record()]).splitlines()
    missing = next(line for line in lines if line.startswith("Not run yet: "))
    # ncl, replay and pool are compared; variants that are only searched have no choice.
    assert "`kd 1000`" in missing and "`directions 10`" in missing
    assert not any(f"`{label}`" in missing for label in ("ncl", "replay", "pool"))
    assert "Not run yet with all seeds: `ncl`, `pool`, `replay`." in lines
    assert "Not run yet" not in page_text([record().model_copy(update={"tier": "another"})])


def test_page_text_irreproducible_run_is_reported() -> None:
    other = record().model_copy(update={"repeated": Repeated(label="das", learning_rate=1e-4, is_equal=False)})
    assert "gave **different results**" in page_text([other])


def test_conclusions_follow_from_the_results() -> None:
    runs = naive_and_others()
    # At 3.2 the line forgets 0.8: das 0.25 on average, a third of it; das weights exactly as much.
    assert compare_with_baseline(runs, runs.group("das")) == (
        "`das` forgets +0.250; naive training at equal learning forgets +0.800 (31% of it): no clear difference (the "
        "interval contains 0)."
    )
    same = comparison(runs.group("ncl"), runs.group("ncl x 0.5"), group("das", [(3.2, 0.3), (3.2, 0.3)]))
    assert compare_with_baseline(same, same.group("das")).endswith(
        "(38% of it): less (the interval excludes 0; not tested)."
    )
    tested = compare_with_baseline(same, same.group("das"), family=["das"])
    assert tested.endswith("(38% of it): less, but not significantly (the interval excludes 0; p 0.5).")
    assert "it has no baseline at equal learning" in compare_with_baseline(runs, runs.group("ewc"))
    assert check_goal(runs, "das") == (
        "Goal for `das`, at most half of the naive forgetting at equal learning: reached (31%)."
    )
    assert check_goal(runs, "das weights").endswith(": not reached (100%).")
    assert check_goal(runs, "ewc").endswith(": undecided, without a baseline at equal learning.")
    better = comparison(runs.group("ncl"), runs.group("ncl x 0.5"), group("das", [(3.2, -0.1)]))
    assert check_goal(better, "das").endswith("reached (0%).") and "% of it" not in compare_with_baseline(
        better, better.group("das")
    )
    # Of two domains the first is forgotten, so half of the difference in forgetting is left at the end: 1.2 - 0.125.
    assert compare_pairs(runs, [("das", "ewc")]) == [
        "`das` compared with `ewc`: forgetting -0.250, no clear difference (the interval contains 0); loss after "
        "learning (2..T) +1.200, higher (the interval excludes 0; not tested); final loss +1.075, higher (the interval "
        "excludes 0; not tested)."
    ]


def test_describe_difference_depends_on_corrected_p_value() -> None:
    assert describe_difference(paired_difference([1.0], [2.0]), None) == "less, based on a single seed"
    assert (
        describe_difference(paired_difference([3.0, 1.0], [2.0, 2.0]), 0.01)
        == "no clear difference (the interval contains 0)"
    )
    six = paired_difference([3.0] * 6, [2.0] * 6)
    assert describe_difference(six, six.p_value) == "significantly more (p 0.031)"
    assert describe_difference(six, 2 * six.p_value) == "more, but not significantly (the interval excludes 0; p 0.062)"
    assert describe_difference(six, None) == "more (the interval excludes 0; not tested)"


def test_compare_pairs_corrects_for_all_aspects_and_pairs() -> None:
    def seeds(label: str, learned: float, forgetting: float, num_seeds: int = 9) -> Group:
        return group(label, [(learned + 0.1 * seed, forgetting) for seed in range(num_seeds)])

    runs = comparison(seeds("ncl", 3.0, 0.9), seeds("das", 3.5, 0.1), seeds("ewc", 3.4, 0.2), seeds("kd", 3.3, 0.3))
    pairs = [("das", "ewc"), ("das", "kd")]
    # Nine pairs of one sign: p = 2 / 2^9 = 0.0039, times six tests.
    assert compare_pairs(runs, pairs, family=["das", "ewc", "kd"])[0].startswith(
        "`das` compared with `ewc`: forgetting -0.100, significantly less (p 0.023)"
    )
    # A pair with a group outside the family is not tested and is no test of it.
    first, second = compare_pairs(runs, pairs, family=["das", "ewc"])
    assert "significantly less (p 0.012)" in first and "not tested" in second and "significantly" not in second


def test_baseline_p_values_count_the_complete_family() -> None:
    places = {"ncl": (3.0, 1.0), "ncl x 0.5": (3.5, 0.5), "das": (3.2, 0.1)}
    groups = [
        group(label, [place] * 6, train__learning_rate=f"{index}e-4")
        for index, (label, place) in enumerate(places.items())
    ]
    runs = comparison(*groups)
    assert baseline_p_values(runs, ["das"]) == pytest.approx({"das": 2 / 2**6})
    assert baseline_p_values(runs, ["das", "ewc", "kd"]) == pytest.approx({"das": 3 * 2 / 2**6})


def test_read_result_file_unusable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"found no domains_\*\.json, expected results of `make bench-domains`"):
        write_page([], tmp_path / "evidence.md")
    path = tmp_path / "domains_cpu.json"
    write_result_file(path, record())
    path.write_text(path.read_text().replace("a processor", "another"))
    with pytest.raises(RunFolderError, match="was altered"):
        read_result_file(path)
    write_result_file(path, record().model_copy(update={"format_version": 9}))
    with pytest.raises(RunFolderError, match=r"format_version: Input should be 1; expected results of the benchmark"):
        read_result_file(path)
