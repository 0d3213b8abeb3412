"""Extend the results of a tier without its run folders: runs that a result file already has are not repeated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from benchmarks.domains.plan import Suite, Tier
from benchmarks.domains.result_file import SuiteResult, TierResult
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison, Group, RunSummary

Settings = dict[str, str]

AGREEMENT = 0.05
"""Nats by which a loss of a repeated run may differ, for instance on another machine."""


def check_tier(result: TierResult, tier: Tier) -> None:
    """Check that results belong to a tier.

    Raises:
        RunFolderError: they are of another tier, or of other settings.
    """
    if result.tier != tier.name:
        raise RunFolderError(f"--extend: found results of tier {result.tier}, expected those of {tier.name}")
    expected = tier.recorded_settings
    keys = sorted({*result.settings, *expected})
    if differing := [key for key in keys if result.settings.get(key) != expected.get(key)]:
        raise RunFolderError(
            f"--extend: found results of other settings in {', '.join(differing)}, expected those of tier {tier.name}"
        )


def find_suite(result: TierResult | None, suite: Suite) -> SuiteResult | None:
    """Known results of a suite, if any.

    Raises:
        RunFolderError: a suite of this name has other domains, or another length.
    """
    known = next((one for one in result.suites if one.name == suite.name), None) if result else None
    if known is not None and suite.steps not in (None, known.steps_per_domain):
        raise RunFolderError(
            f"--extend: found suite {suite.name} of {known.steps_per_domain} steps per domain, expected {suite.steps}"
        )
    if known is not None and tuple(known.comparison.domains) != suite.domains:
        raise RunFolderError(
            f"--extend: found suite {suite.name} over {', '.join(known.comparison.domains)}, "
            f"expected {', '.join(suite.domains)}"
        )
    return known


def find_run(suite: SuiteResult | None, label: str, seed: int) -> RunSummary | None:
    """The known run of a label and seed, if any."""
    groups = suite.comparison.groups if suite else []
    return next((run for group in groups if group.label == label for run in group.runs if run.seed == seed), None)


def check_agreement(known: RunSummary, repeated: RunSummary) -> float:
    """Largest difference in nats of any loss of a repeated run.

    Raises:
        RunFolderError: it is too large for the same base model, corpora and code.
    """
    pairs = zip(chain.from_iterable(known.loss_matrix), chain.from_iterable(repeated.loss_matrix), strict=True)
    difference = max(abs(first - second) for first, second in pairs)
    if difference > AGREEMENT:
        raise RunFolderError(
            f"--extend: {repeated.folder} was repeated and differs by {difference:.3g} from the results to extend, "
            f"expected at most {AGREEMENT:g}: the base model, corpora or method have changed"
        )
    return difference


def join_comparisons(known: Comparison, new: Comparison) -> Comparison:
    """All runs of both comparisons; of a run that both have, the known one.

    It gets new scores of end tasks if it has none. Both comparisons have the baseline. If a config key distinguishes
    groups in only one of them, all groups of the other get the baseline's value of that key.

    Raises:
        RunFolderError: runs of one label have other settings.
    """
    reference = known.group(known.reference).settings | new.group(known.reference).settings
    labels = dict.fromkeys(group.label for group in [*known.groups, *new.groups])
    groups = []
    for label in labels:
        same_label = [group for comparison in (known, new) for group in comparison.groups if group.label == label]
        settings = _check_settings([reference | group.settings for group in same_label], label)
        runs: dict[int, RunSummary] = {}
        for run in (run for group in same_label for run in group.runs):
            earlier = runs.setdefault(run.seed, run)
            if earlier.end_tasks is None:
                runs[run.seed] = earlier.model_copy(update={"end_tasks": run.end_tasks})
        sorted_runs = [runs[seed] for seed in sorted(runs)]
        groups.append(same_label[0].model_copy(update={"settings": settings, "runs": sorted_runs}))
    return Comparison(
        domains=known.domains,
        eval_domains=known.eval_domains,
        groups=[Group.model_validate(group.model_dump()) for group in groups],
        reference=known.reference,
        notes=list(dict.fromkeys([*known.notes, *new.notes])),
    )


def _check_settings(settings: Sequence[Settings], label: str) -> Settings:
    """Settings of one label in both comparisons; a key is only recorded where groups differ, so one may lack it."""
    expected = settings[0]
    found = settings[-1]
    if differing := [key for key in expected if expected[key] != found.get(key, expected[key])]:
        key = differing[0]
        raise RunFolderError(
            f"--extend: {label}: found {key} {found.get(key)}, expected {expected[key]} as in the results to extend"
        )
    return found | expected
