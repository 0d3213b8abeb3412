"""The evidence page: every group is on it, and it and the README are what the committed results say."""

from pathlib import Path

import pytest

from benchmarks.domains.ablation_groups import NOTHING, RestoredLosses
from benchmarks.domains.evidence.__main__ import PAGE, README
from benchmarks.domains.evidence.headline import headline_rows, limits, select_columns, sentences
from benchmarks.domains.evidence.length import length_rows, shares_by_length
from benchmarks.domains.evidence.page import (
    BEGIN,
    END,
    find_tasks,
    headline,
    page_text,
    read_results,
    readme_text,
    sort_by_tier,
    write_evidence,
)
from benchmarks.domains.lr_search import Candidate, Choice, naive_front
from benchmarks.domains.result_file import (
    Extended,
    Repeated,
    SuiteResult,
    TierResult,
    read_result_file,
    write_result_file,
)
from benchmarks.result_io import RESULTS
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison, Group
from helpers.comparisons import comparison, group, pooled, with_scores

RATE = "train__learning_rate"
OUTLINE = f"# das_ds\n\n{BEGIN}\nold\n{END}\n\nmore\n"


def naive_and_others() -> Comparison:
    """Naive training at two rates: learning to 3.0 costs 1.0, to 3.5 costs 0.5; in between 1 nat costs 1 nat."""
    return comparison(
        group("ncl", [(3.0, 1.0), (3.0, 1.0)], **{RATE: "2e-4"}),
        group("ncl x 0.5", [(3.5, 0.5), (3.5, 0.5)], **{RATE: "1e-4"}),
        group("ewc", [(3.2, 0.7), (3.2, 0.9)], **{RATE: "2e-4"}),
        group("directions", [(3.2, 0.1), (3.2, 0.06)], **{RATE: "2e-4"}),
        # The helper takes the first word for the method.
        group("directions, replay", [(3.1, -0.1), (3.1, -0.2)], **{RATE: "2e-4"}).model_copy(
            update={"method": "directions"}
        ),
        group("osft", [(2.0, 0.4), (2.0, 0.6)], **{RATE: "2e-4"}),
        pooled("pool", [2.5]),
    )


def suite(runs: Comparison, name: str = "encoder_six", steps: int = 400) -> SuiteResult:
    return SuiteResult(
        name=name,
        base="encoder",
        steps_per_domain=steps,
        comparison=runs,
        groups=[
            RestoredLosses(NOTHING, {"acl": 4.0, "pubmed": 3.0, "general": 5.0}),
            RestoredLosses("FFN", {"acl": 3.5, "pubmed": 3.6, "general": 4.5}),
        ],
    )


def record(tier: str = "cpu") -> TierResult:
    """Results of a tier with one suite."""
    return TierResult(
        tier=tier,
        environment={"device": "a processor", "date": "2026-01-01", "versions": {"torch": "2.0"}},
        settings={
            "train": {"steps_per_domain": 400, "global_batch_size": 4, "precision": "fp32"},
            "data": {"sequence_length": 8},
        },
        choices={
            "encoder": [
                Choice("ewc 10000", (Candidate(1e-4, 3.4, 0.2), Candidate(2e-4, 3.2, 0.3))),
                Choice("directions", (Candidate(1e-4, 3.4, 0.2), Candidate(2e-4, 3.2, 0.3))),
            ]
        },
        strengths={"encoder": {"ewc": "ewc 10000"}},
        repeated=Repeated(label="directions", learning_rate=1e-4, is_equal=True),
        suites=[suite(naive_and_others())],
    )


def test_committed_page_and_readme_are_those_of_the_committed_results() -> None:
    results = read_results(RESULTS)
    assert PAGE.read_text() == page_text(results)
    readme = README.read_text()
    assert readme == readme_text(results, readme)


def test_write_evidence_from_stored_results(tmp_path: Path) -> None:
    path = tmp_path / "domains_cpu_cpu.json"
    write_result_file(path, record())
    assert read_result_file(path) == record()
    page = tmp_path / "docs" / "evidence.md"
    page.parent.mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(OUTLINE)
    write_evidence(read_results(tmp_path), page, readme)
    assert page.read_text() == page_text([sort_by_tier(record())])
    assert (page.parent / "images" / "evidence_cpu_encoder_six.png").stat().st_size > 1000
    text = readme.read_text()
    assert text.startswith(f"# das_ds\n\n{BEGIN}\n\nAn encoder learns 2 domains") and text.endswith(f"{END}\n\nmore\n")
    # Contenders only, with their strength.
    assert "| ewc 10000 " in text and "| pool " not in text and "old" not in text


def test_readme_without_block_is_refused() -> None:
    with pytest.raises(RunFolderError, match=r"README.md: found no block for the evidence, expected it between <!--"):
        readme_text([record()], "# das_ds\n")


def test_headline_rows_worked_example() -> None:
    rows = {row[0]: list(row[1:]) for row in headline_rows(naive_and_others(), {"ewc": "ewc 10000"})}
    # General text: 3.0 before, 3.1 after acl, 3.0 + forgetting at the end.
    assert rows["ncl"] == ["2", "3.000", "+1.000", "100%", "+1.000", "+1.000", "1.00", "1.00"]
    assert rows["ewc 10000"] == ["2", "3.200", "+0.800", "100%", "+0.800", "+0.800", "1.00", "1.00"]
    # The line forgets 0.8 at 3.2.
    assert rows["directions"][:6] == ["2", "3.200", "+0.080", "10%", "+0.100", "+0.080"]
    assert rows["directions, replay"][3] == "none"
    assert rows["osft"][3] == rows["pool"][3] == "-"
    assert "ncl x 0.5" not in rows


def test_headline_rows_name_the_seeds_of_a_share() -> None:
    # Of the second seed naive training learned less at any rate.
    some = comparison(*naive_and_others().groups[:2], group("ewc", [(3.2, 0.4), (2.0, 0.1)], **{RATE: "2e-4"}))
    assert headline_rows(some, {})[2][4] == "50% (1 of 2 seeds)"


def test_headline_rows_end_tasks_come_from_other_runs() -> None:
    tasks = comparison(with_scores(group("ncl", [(3.0, 1.0)]), 0.70), with_scores(group("ewc", [(3.0, 1.0)]), 0.715))
    rows = headline_rows(naive_and_others(), {}, tasks)
    column = rows[0].index("end tasks (macro-F1)")
    assert {row[0]: row[column] for row in rows[1:4]} == {"ncl": "70.0", "ewc": "71.5", "directions": "-"}


def test_end_tasks_are_those_of_the_same_runs() -> None:
    tasks = comparison(with_scores(group("ncl", [(3.0, 1.0)]), 0.70), group("directions", [(3.2, 0.1)]))
    scored = [record(tier).model_copy(update={"suites": [suite(tasks)]}) for tier in ("gpu", "tasks")]
    assert find_tasks([record(), scored[0]], record(), record().suites[0]) is None
    assert find_tasks([record(), *scored], record(), record().suites[0]) == tasks
    assert "end tasks (macro-F1)" in page_text([record(), scored[1]])
    assert "end tasks (macro-F1)" not in page_text([record()])


def test_select_columns_keeps_the_order_of_titles() -> None:
    assert select_columns([["a", "b", "c"], ["1", "2", "3"]], ("c", "a", "x")) == [["c", "a"], ["3", "1"]]


def test_sentences_follow_from_the_results() -> None:
    setting, least, ours, rivals, costs = sentences(record(), record().suites[0])
    assert setting == (
        "An encoder learns 2 domains in sequence (acl, pubmed), each in 400 steps of 4 x 8 tokens, with 1 to 2 seeds "
        "per method on a processor."
    )
    assert least == (
        "Naive training (`ncl`) forgets +1.000 nats; of 3 methods that can be compared at equal learning, the least of "
        "it is left by `directions, replay` (none), `directions` (10%), `ewc` (100%)."
    )
    assert ours == ("`directions` forgets 10% of what naive training forgets at equal learning: not tested: 2 seeds.")
    assert rivals == "It leaves a smaller share than 1 of the 1 other methods; not tested: 2 seeds."
    assert costs.startswith("It takes 1.00 times the time and 1.00 times the memory of naive training")


def test_sentences_of_a_method_that_loses_say_so() -> None:
    worse = comparison(
        *naive_and_others().groups[:2],
        group("ewc", [(3.2, 0.2)], **{RATE: "2e-4"}),
        group("directions", [(3.2, 1.2)], **{RATE: "2e-4"}),
    )
    _, least, ours, rivals, _ = sentences(record(), suite(worse))
    assert least.endswith("is left by `ewc` (25%), `directions` (150%).")
    assert "forgets 150% of what naive training forgets" in ours
    assert rivals.startswith("It leaves a smaller share than 0 of the 1 other methods (not than `ewc`)")


def test_sentences_name_what_is_significant() -> None:
    def seeds(label: str, forgetting: float) -> Group:
        return group(label, [(3.2, forgetting + 0.001 * seed) for seed in range(8)], **{RATE: "2e-4"})

    sweep = [group("ncl", [(3.0, 1.0)] * 8, **{RATE: "2e-4"}), group("ncl x 0.5", [(3.5, 0.5)] * 8, **{RATE: "1e-4"})]
    runs = comparison(*sweep, seeds("directions", 0.1), seeds("ewc", 0.3), seeds("kd", 0.1))
    _, _, ours, rivals, _ = sentences(record(), suite(runs))
    # Two planned tests, of which one can be made: 2 / 2^8 times two.
    assert ours.endswith(": significantly less (p 0.016, 8 seeds).")
    assert rivals.endswith("; significantly, after correction: `ewc`.")
    first = comparison(*sweep, seeds("directions, first form", 0.1), seeds("ewc", 0.3))
    assert sentences(record(), suite(first))[3].endswith("; these comparisons are not among the planned tests.")


def test_sentences_without_the_method() -> None:
    without = comparison(*naive_and_others().groups[:3])
    assert sentences(record(), suite(without))[2:] == ["`directions` was not run yet."]


def test_limits_name_what_is_missing() -> None:
    found = limits([record()], record().suites[0])
    assert "Not run yet: tiers `short`, `length`, `decoder`, `tasks`, `masks`, `gpu`." in found
    without = next(limit for limit in found if limit.startswith("No naive baseline at equal learning: "))
    assert "`osft` (learns more than naive training at any rate); `pool` (has no order of domains)" in without
    older = comparison(*naive_and_others().groups[:2], group("directions, first form", [(3.2, 0.1)], **{RATE: "2e-4"}))
    assert limits([record()], suite(older))[0].startswith("`directions, first form` is an [earlier form]")


def test_headline_is_that_of_the_deciding_tier() -> None:
    results = [record("another"), record("masks"), record("short"), record("cpu")]
    found = [headline(results[:count])[0].tier for count in range(1, 5)]
    assert found == ["another", "masks", "short", "cpu"]


def test_page_text_has_every_group_and_section() -> None:
    text = page_text([record()])
    for found in naive_and_others().groups:
        assert f"| {found.label} " in text
    assert "400 steps per domain of 4 x 8 tokens, fp32" in text
    assert "gave identical results, to the last digit" in text
    assert "3.5000 (-0.5000)" in text and "0.0001: 3.4000 (+0.2000), 0.0002: 3.2000 (+0.3000)" in text
    assert "| **ewc 10000** " in text
    assert text.index("Final loss, `directions, replay` compared") < text.index("- **not measured**: over 6 domains")
    assert "- osft" not in text and "  - `osft`: nothing to compare (not tested: 0 seeds)" in text


def test_page_text_goals_of_other_tiers_are_not_measured() -> None:
    text = page_text([record("masks")])
    assert text.count("- **not measured**:") == 5
    assert text.count("- **not measured**:") > page_text([record()]).count("- **not measured**:")


def test_page_text_candidates_are_compared_with_naive_front() -> None:
    def choice(label: str, *places: tuple[float, float | None]) -> Choice:
        return Choice(label, tuple(Candidate(rate, *place) for rate, place in zip((1.0, 2.0), places, strict=True)))

    choices = [
        choice("ncl", (3.4, 0.4), (3.0, 1.2)),
        # It learns less and forgets more than another: no point of the line.
        choice("ncl, faster", (3.2, 2.0), (2.8, 2.2)),
        # A method of its own.
        choice("ncl, layer decay", (3.2, 0.1), (3.1, 0.1)),
        choice("das", (3.2, 0.2), (3.5, 0.1)),
        choice("pool", (3.2, None), (2.9, None)),
    ]
    assert naive_front(choices) == [(2.8, 2.2), (3.0, 1.2), (3.4, 0.4)]
    text = page_text([record().model_copy(update={"choices": {"encoder": choices}})])
    # The line forgets 0.8 at 3.2, and ends at 3.4.
    assert "| 1: 3.2000 (+0.2000; 25%), 2: 3.5000 (+0.1000) " in text
    assert "| 1: 3.4000 (+0.4000), 2: 3.0000 (+1.2000) " in text
    assert "| 1: 3.2000, 2: 2.9000 " in text


def test_page_text_length_is_one_table() -> None:
    short = comparison(*naive_and_others().groups)
    long = comparison(*naive_and_others().groups[:2], group("directions", [(3.2, 0.2), (3.2, 0.2)], **{RATE: "2e-4"}))
    by_length = record("length").model_copy(
        update={"suites": [suite(long, "encoder_600", 600), suite(short, "encoder_40", 40)]}
    )
    assert shares_by_length(by_length)["directions"] == pytest.approx({40: 0.1, 600: 0.25})
    rows = [row for row in length_rows(by_length) if row[0] in ("directions", "osft")]
    assert rows == [
        ["directions", "40", "2", "3.200", "10%"],
        ["directions", "600", "2", "3.200", "25%"],
        ["osft", "40", "2", "2.000", "learns more than naive training at any rate"],
    ]
    text = page_text([record(), by_length])
    assert "## Length of training" in text and "images/evidence_length.png" in text
    assert "## Length of training" not in page_text([record()])


def test_write_evidence_plots_the_length(tmp_path: Path) -> None:
    write_result_file(tmp_path / "domains_length_cpu.json", record("length"))
    (tmp_path / "README.md").write_text(OUTLINE)
    write_evidence(read_results(tmp_path), tmp_path / "evidence.md", tmp_path / "README.md")
    assert (tmp_path / "images" / "evidence_length.png").stat().st_size > 1000


def test_sort_by_tier_follows_the_groups() -> None:
    others = [Choice(label, (Candidate(1e-4, 3.4, 0.2),)) for label in ("lora", "mine", "replay")]
    found = sort_by_tier(record().model_copy(update={"choices": {"encoder": others}}))
    assert [choice.label for choice in found.choices["encoder"]] == ["replay", "lora", "mine"]
    labels = [group.label for group in found.suites[0].comparison.groups]
    assert labels == ["ncl", "directions", "directions, replay", "osft", "ewc", "pool", "ncl x 0.5"]
    unknown = record("another")
    assert sort_by_tier(unknown) == unknown


def test_page_text_extended_results_are_named() -> None:
    earlier = Extended(environment=record().environment | {"date": "2025-01-01"}, difference=0.00012)
    text = page_text([record().model_copy(update={"extended": [earlier, earlier]})])
    assert text.count("Includes earlier results: a processor, 2025-01-01, torch 2.0.") == 1
    assert "differ by at most 0.00012" in text
    assert "their costs only roughly" in text
    assert "Includes earlier" not in page_text([record()])


def test_page_text_missing_groups_are_listed() -> None:
    lines = page_text([record()]).splitlines()
    missing = next(line for line in lines if line.startswith("Not run yet: `"))
    assert "`kd`" in missing and "`first moment, units`" in missing
    assert not any(f"`{label}`" in missing for label in ("ncl", "osft", "pool"))
    assert "Not run yet with all seeds: `ncl`, `directions`, `directions, replay`, `osft`, `ewc`, `pool`." in lines
    assert "no longer run" in page_text([record("another")])


def test_page_text_irreproducible_run_is_reported() -> None:
    other = record().model_copy(update={"repeated": Repeated(label="das", learning_rate=1e-4, is_equal=False)})
    assert "gave **different results**" in page_text([other])


def test_read_results_unusable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"found no domains_\*\.json, expected results of `make bench-domains`"):
        read_results(tmp_path)
    path = tmp_path / "domains_cpu.json"
    write_result_file(path, record())
    path.write_text(path.read_text().replace("a processor", "another"))
    with pytest.raises(RunFolderError, match="was altered"):
        read_results(tmp_path)
    write_result_file(path, record().model_copy(update={"format_version": 9}))
    with pytest.raises(RunFolderError, match=r"format_version: Input should be 2; expected results of the benchmark"):
        read_results(tmp_path)
