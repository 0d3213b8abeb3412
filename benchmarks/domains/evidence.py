"""Writes docs/results/evidence.md and its pictures from the committed result files: `make evidence`.

Every variant of a result file is in every table; which of them did well decides nothing but the words.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.domains.ablation_groups import NOTHING, Restored
from benchmarks.domains.conclusions import between, compare_with_baseline, compared_groups, goal
from benchmarks.domains.jobs import ROOT
from benchmarks.domains.lr_matching import Match
from benchmarks.domains.lr_search import Candidate, Choice, is_naive, naive_front
from benchmarks.domains.plan import NAIVE
from benchmarks.domains.result_file import Record, SuiteResult, read_result_file
from benchmarks.domains.tiers import TIERS
from benchmarks.result_io import RESULTS
from das_ds.errors import EXIT_USER_ERROR, DasError, RunFolderError
from das_ds.reporting import comparison_tables as tables
from das_ds.reporting.comparison import Comparison, Group, RunSummary
from das_ds.reporting.comparison_plots import plot_pareto
from das_ds.reporting.comparison_report import interval_sentences
from das_ds.reporting.metrics import baseline_sweep
from das_ds.reporting.statistics import Point, interpolate_front
from das_ds.reporting.tables import Row, format_markdown

PAGE = ROOT / "docs" / "results" / "evidence.md"
IMAGES = "images"
REPLAY = "replay"
RIVALS = (REPLAY, "ewc", "kd", "derpp", "merge", "dga")
"""Methods that a variant of das whose learning was matched is held beside."""


def main() -> int:
    """Write the page; a result file that cannot be used is one line and exit code 2."""
    try:
        write_page(sorted(RESULTS.glob("domains_*.json")), PAGE)
    except DasError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"written to {PAGE.relative_to(ROOT)}")
    return 0


def write_page(paths: Sequence[Path], page: Path) -> None:
    """The page of these result files, and a picture per track beside it.

    Raises:
        RunFolderError: there is none, or one is damaged.
    """
    if not paths:
        raise RunFolderError(f"{RESULTS}: found no domains_*.json, expected results of `make bench-domains`")
    records = [in_order(read_result_file(path)) for path in paths]
    (page.parent / IMAGES).mkdir(parents=True, exist_ok=True)
    for record in records:
        for track in record.tracks:
            plot_pareto(track.comparison, page.parent / picture(record, track))
    page.write_text(page_text(records), encoding="utf-8")


def page_text(records: Sequence[Record]) -> str:
    """The whole page in Markdown."""
    return "\n".join([INTRODUCTION, *(_record(record) for record in records)])


def in_order(record: Record) -> Record:
    """Choices and groups in the order of the tier's variants, whenever they were run; all others after them."""
    labels = [variant.label for variant in TIERS[record.tier].variants] if record.tier in TIERS else []
    place = {label: index for index, label in enumerate(labels)}

    def key(labelled: Choice | Group) -> int:
        return place.get(labelled.label, len(labels))

    tracks = [
        track.model_copy(
            update={
                "comparison": track.comparison.model_copy(update={"groups": sorted(track.comparison.groups, key=key)})
            }
        )
        for track in record.tracks
    ]
    choices = {base: sorted(found, key=key) for base, found in record.choices.items()}
    return record.model_copy(update={"tracks": tracks, "choices": choices})


def picture(record: Record, track: SuiteResult) -> str:
    """The file of a track's picture, relative to the page."""
    return f"{IMAGES}/evidence_{record.tier}_{track.name}.png"


def _record(record: Record) -> str:
    train, environment = record.settings["train"], record.environment
    seconds = sum(run.cost.wall_seconds for track in record.tracks for run in _runs(track.comparison))
    parts = [
        f"## Tier {record.tier}\n\n"
        f"{_where(environment)}. "
        f"{train['steps_per_domain']} steps per domain of {train['global_batch_size']} x "
        f"{record.settings['data']['sequence_length']} tokens, {train['precision']}. "
        f"The compared runs took {seconds / 3600:.1f} hours.\n",
        _extended(record),
        _repeated(record),
        _missing(record),
        *(_track(record, track) for track in record.tracks),
    ]
    return "\n".join(part for part in parts if part)


def _where(environment: dict[str, Any]) -> str:
    versions = (f"{name} {number}" for name, number in environment["versions"].items())
    return ", ".join([environment["device"], environment["date"], *versions])


def _extended(record: Record) -> str:
    """Where the results are from that were gone on from, and how well they agree with the later ones."""
    lines = [
        f"Earlier results are among these: {_where(part.environment)}. Since then the first run of `{NAIVE}` was made "
        f"again, and its losses differ by {part.difference:.2g} at most.\n"
        for part in record.extended
    ]
    return "".join([*dict.fromkeys(lines), LATER]) if lines else ""


def _missing(record: Record) -> str:
    """What the tier has and the results lack, since a part of it was run, or variants or seeds came later."""
    if record.tier not in TIERS:
        return ""
    tier, chosen = TIERS[record.tier], {choice.label for choices in record.choices.values() for choice in choices}
    runs = {group.label: len(group.runs) for track in record.tracks for group in track.comparison.groups}
    missing = [v.label for v in tier.variants if v.label not in (runs if v.is_compared else chosen)]
    partly = [v.label for v in tier.compared if v.label in runs and runs[v.label] < len(tier.run_seeds(v.label))]
    return _labels("Not run yet", missing) + _labels("Not run yet with all seeds", partly)


def _labels(what: str, labels: Sequence[str]) -> str:
    return f"{what}: {', '.join(f'`{label}`' for label in labels)}.\n" if labels else ""


def _repeated(record: Record) -> str:
    if record.repeated is None:
        return ""
    equal = "the same numbers to the last digit" if record.repeated.is_equal else "**other numbers**"
    return f"The same config and seed run twice (`{record.repeated.label}`) gave {equal}.\n"


def _track(record: Record, track: SuiteResult) -> str:
    comparison, family = track.comparison, _family(record.tier)
    parts = [
        f"### {track.base.capitalize()}: {' -> '.join(comparison.domains)}\n\n{_words(track, family)}",
        f"#### Learning and forgetting\n\n{interval_sentences(comparison)}\n{_table(tables.summary_rows(comparison))}",
        f"![learning against forgetting]({picture(record, track)})\n",
        f"#### At equal learning\n\n{LINE}\n{_table(tables.matched_baseline_rows(comparison, family))}",
        f"#### Against {NAIVE}\n\n{_table(tables.difference_rows(comparison, family))}",
        _matches(track.matches, comparison),
        _groups(track.groups, comparison),
        f"#### Cost\n\n{_table(tables.cost_rows(comparison))}",
        _choices(record.choices.get(track.base, [])),
    ]
    return "\n".join(part for part in parts if part)


def _family(tier: str) -> tuple[str, ...]:
    """Variants that a tier was planned to test, whatever came of them."""
    return TIERS[tier].contenders if tier in TIERS else ()


def _words(track: SuiteResult, family: Sequence[str]) -> str:
    """The goal first, then every variant against the line, then what was matched beside its rivals."""
    comparison, labels = track.comparison, [group.label for group in track.comparison.groups]
    protected = [group.label for group in comparison.groups if group.method == "das"]
    replaying = [label for label in protected if REPLAY in label]
    matched = [match.label for match in track.matches if match.label in protected]
    sentences = [goal(comparison, label) for label in protected if label not in replaying]
    sentences += [compare_with_baseline(comparison, group, family) for group in compared_groups(comparison)]
    rivals = [label for label in labels if label.split()[0] in RIVALS]
    pairs = [*product(matched, rivals), *((label, REPLAY) for label in replaying if REPLAY in labels)]
    sentences += between(comparison, pairs, family)
    return "".join(f"- {sentence}\n" for sentence in sentences)


def _matches(matches: Sequence[Match], comparison: Comparison) -> str:
    if not matches:
        return ""
    header: Row = ["matched to", "its loss (2..T)", "nearest naive runs", "their loss (2..T)", "within", "met"]
    rows: list[Row] = []
    for match in matches:
        # From the runs themselves, so that a match sought by another measure shows how well it holds by this one.
        runs = comparison.group(match.label).runs
        target = statistics.fmean(run.loss_after_learning_later for run in runs)
        seeds = {run.seed for run in runs}
        learned = {
            group.label: statistics.fmean(run.loss_after_learning_later for run in group.runs if run.seed in seeds)
            for group in baseline_sweep(comparison)
            if seeds <= {run.seed for run in group.runs}
        }
        if not learned:
            rows.append([match.label, f"{target:.4f}", "-", "-", f"{match.tolerance:g}", "no"])
            continue
        nearest = min(learned, key=lambda label: abs(learned[label] - target))
        is_met = abs(learned[nearest] - target) <= match.tolerance
        learns_more = target < min(learned.values())
        met = "yes" if is_met else ("no: it learns more than naive training" if learns_more else "no")
        rows.append([match.label, f"{target:.4f}", nearest, f"{learned[nearest]:.4f}", f"{match.tolerance:g}", met])
    return f"#### Naive training matched in what it learns\n\n{MATCHED}\n{_table([header, *rows])}"


def _groups(groups: Sequence[Restored], comparison: Comparison) -> str:
    if not groups:
        return ""
    corpora = comparison.eval_domains
    nothing = next(row for row in groups if row.group == NOTHING)
    rows = [
        [
            row.group,
            *(
                f"{row.losses[corpus]:.4f}"
                + ("" if row is nothing else f" ({row.losses[corpus] - nothing.losses[corpus]:+.4f})")
                for corpus in corpora
            ),
        ]
        for row in groups
    ]
    return f"#### Which parameters carry the forgetting\n\n{GROUPS}\n{_table([['put back', *corpora], *rows])}"


def _choices(choices: Sequence[Choice]) -> str:
    line = naive_front(choices)
    header: Row = ["variant", "candidates: loss when learned (forgetting; share)", "chosen", "at the edge"]
    rows = [
        [
            choice.label,
            ", ".join(
                f"{one.learning_rate:g}: {one.learned:.4f}" + _forgets(one, () if is_naive(choice) else line)
                for one in choice.candidates
            ),
            f"{choice.learning_rate:g}",
            "yes" if choice.is_at_edge else "no",
        ]
        for choice in choices
    ]
    is_early = any(one.learned_later is None for choice in choices for one in choice.candidates)
    text = CHOICE + (EARLY_CHOICE if is_early else "")
    return f"#### Choice of learning rates\n\n{text}\n{_table([header, *rows], text_columns=(0, 1))}"


def _forgets(candidate: Candidate, line: Sequence[Point]) -> str:
    if candidate.forgetting is None:
        return ""
    on_line = interpolate_front(line, candidate.place)
    share = f"; {candidate.forgetting / on_line:.0%}" if on_line is not None and on_line > 0 else ""
    return f" ({candidate.forgetting:+.4f}{share})"


def _runs(comparison: Comparison) -> list[RunSummary]:
    return [run for group in comparison.groups for run in group.runs]


def _table(rows: Sequence[Row], text_columns: tuple[int, ...] = (0,)) -> str:
    return format_markdown(rows, text_columns) + "\n"


INTRODUCTION = """\
# Evidence

Does das_ds forget less than the simple alternatives, at equal learning, and what does it cost? This page is written by
`make evidence` from the result files in `benchmarks/results/`; [benchmarks](benchmarks.md) says how they are made. All
losses are nats per predicted token on held-out text, lower is better; *loss when learned* is the mean over the domains,
each right after it was learned, and *(2..T)* that over all but the first. *Equal learning* means the latter: earlier
domains are forgotten by learning later ones, and the first domain can be learned at its full rate by any method.

Brackets are 95 % t intervals over seeds, paired by seed where they are of differences; p is that of the exact sign-flip
test, after Holm's correction within a family of tests. The families were fixed with the plan of a tier
(`contenders` in `benchmarks/domains/tiers.py`): each contender against the line of naive training; those that naive
training was matched to beside the other contenders, in three aspects each; and, in the table against naive training,
the contenders in each column. What is in no family is not tested, whatever its interval. A difference is called
significant only where p is at most 0.05; with six seeds p is 0.03 times the number of tests at the least, so that none
can be in a family of more than one. Nothing is left out: what did not work stands here as well.
"""
LINE = f"""\
A run that learns less also forgets less. The line goes through naive runs (`{NAIVE}`) of several learning rates; each
run is held against the line of its seed at the same loss when learned on domains 2..T. Below 0 it forgets less than it
has to.
"""
MATCHED = """\
The learning rate of naive training, lowered until it learns domains 2..T as well as a variant does. These runs are
points of the line above.
"""
LATER = """\
Rows that were run at different times are comparable in losses, but in cost only roughly.
"""
GROUPS = f"""\
The last model of the first `{NAIVE}` run, with one group of parameters put back to what it was before the last domain.
What the loss on an earlier domain falls by is what the group's change has cost it; shares need not add up.
"""
CHOICE = """\
Equally many candidates per variant, one seed that no compared run has, the first two domains only; the best mean loss
when learned is chosen. Some variants were tried here alone and are in no other table. The held-out text is that of the
comparison. At the edge of the candidates a better rate may lie beyond. The share is that of the forgetting of naive
training that learns the second domain as well, on the line between its own candidates; none where they learn more, or
less.
"""
EARLY_CHOICE = """\
These choices were made before the loss on the second domain was recorded by itself, so that here the line is held at
the mean over both domains, which favors what learns the first one at its full rate.
"""

if __name__ == "__main__":
    sys.exit(main())
