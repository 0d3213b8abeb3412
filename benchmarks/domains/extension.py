"""Results that a tier goes on from without the folders of their runs: what they hold is not made again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from benchmarks.domains.plan import Tier, Track
from benchmarks.domains.record import Record, TrackRecord
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison import Comparison, Group, RunNumbers

Values = dict[str, str]

AGREEMENT = 0.05
"""Nats by which a loss of a run that is made again may differ, on another machine for instance."""


def check_tier(record: Record, tier: Tier) -> None:
    """Whether results are those of this tier.

    Raises:
        RunFolderError: of another tier, or of other settings.
    """
    if record.tier != tier.name:
        raise RunFolderError(f"--extend: found results of tier {record.tier}, expected those of {tier.name}")
    expected = tier.recorded_settings
    keys = sorted({*record.settings, *expected})
    if differing := [key for key in keys if record.settings.get(key) != expected.get(key)]:
        raise RunFolderError(
            f"--extend: found results of other settings in {', '.join(differing)}, expected those of tier {tier.name}"
        )


def track_of(record: Record | None, track: Track) -> TrackRecord | None:
    """What is known of a track.

    Raises:
        RunFolderError: a track of this name has other domains.
    """
    found = next((one for one in record.tracks if one.name == track.name), None) if record else None
    if found is not None and tuple(found.comparison.domains) != track.domains:
        raise RunFolderError(
            f"--extend: found track {track.name} over {', '.join(found.comparison.domains)}, "
            f"expected {', '.join(track.domains)}"
        )
    return found


def known_run(track: TrackRecord | None, label: str, seed: int) -> RunNumbers | None:
    """A run that is known."""
    groups = track.comparison.groups if track else []
    return next((run for group in groups if group.label == label for run in group.runs if run.seed == seed), None)


def check_agreement(known: RunNumbers, again: RunNumbers) -> float:
    """Largest difference in any loss of a run that was made again.

    Raises:
        RunFolderError: it is too large for one base model, corpora and code.
    """
    pairs = zip(chain.from_iterable(known.loss_matrix), chain.from_iterable(again.loss_matrix), strict=True)
    largest = max(abs(first - second) for first, second in pairs)
    if largest > AGREEMENT:
        raise RunFolderError(
            f"--extend: {again.folder} was made again and differs by {largest:.3g} from the results to extend, "
            f"expected at most {AGREEMENT:g}: base model, corpora or method are no longer those"
        )
    return largest


def joined(known: Comparison, new: Comparison) -> Comparison:
    """All runs of both; of a run that both have, the known one.

    Both have the reference. A key of the config that tells groups apart in one of them alone has the reference's value
    in all groups of the other.

    Raises:
        RunFolderError: runs of one label have other settings.
    """
    reference = known.group(known.reference).settings | new.group(known.reference).settings
    labels = dict.fromkeys(group.label for group in [*known.groups, *new.groups])
    groups = []
    for label in labels:
        parts = [group for comparison in (known, new) for group in comparison.groups if group.label == label]
        settings = _settings([reference | part.settings for part in parts], label)
        runs = {run.seed: run for part in reversed(parts) for run in part.runs}
        groups.append(parts[0].model_copy(update={"settings": settings, "runs": [runs[seed] for seed in sorted(runs)]}))
    return Comparison(
        domains=known.domains,
        eval_domains=known.eval_domains,
        groups=[Group.model_validate(group.model_dump()) for group in groups],
        reference=known.reference,
        notes=list(dict.fromkeys([*known.notes, *new.notes])),
    )


def _settings(found: Sequence[Values], label: str) -> Values:
    # Keys of a method are there where groups of the method differ in them.
    if differing := [key for key in found[0] if found[0][key] != found[-1].get(key, found[0][key])]:
        key = differing[0]
        raise RunFolderError(
            f"--extend: {label}: found {key} {found[-1].get(key)}, expected {found[0][key]} as in the results to extend"
        )
    return found[-1] | found[0]
