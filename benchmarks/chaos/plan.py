"""Where the killed runs are killed: every place in turn, the moment drawn at random from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from benchmarks.chaos.track import Track
from benchmarks.chaos.trail import BETWEEN, DOMAIN, EVALUATION, EXPORT, GENERAL, START, TRAINING, Spot

SAVING, ANY = "saving", "any moment"
BATCHES = (EVALUATION, GENERAL, TRAINING, DOMAIN)
SPOTS = {
    EVALUATION: (EVALUATION,),
    GENERAL: (GENERAL,),
    TRAINING: (TRAINING,),
    DOMAIN: (DOMAIN,),
    EXPORT: (EXPORT,),
    BETWEEN: (BETWEEN,),
    # A save may follow every batch.
    SAVING: BATCHES,
    ANY: (*BATCHES, EXPORT, BETWEEN),
}
"""Place to hit -> spots at which to begin to wait for it."""
PLACES = (*SPOTS, START)
VICTIMS = ((0, 1), (0, 1), (0,), (1,))


@dataclass(frozen=True)
class Goal:
    """Where to kill whom."""

    place: str
    spot: Spot | None
    """The batch or step to wait for; None: kill while the job starts."""
    ranks: tuple[int, ...]
    fraction: float
    """Share of the time that the spot, the save or the start takes, after which to kill."""


def plan(track: Track, num_runs: int, seed: int) -> list[list[Goal]]:
    """Goals of each run in the order of the track; every place in turn, and now and then one or two more."""
    generator, runs = Random(seed), []
    for run in range(num_runs):
        more = generator.choices((0, 1, 2), weights=(6, 3, 2))[0]
        chosen = [PLACES[run % len(PLACES)], *generator.choices(PLACES, k=more)]
        goals = [draw_goal(place, track, generator) for place in chosen if place != START]
        goals.sort(key=lambda goal: track.position(goal.spot))
        for _ in range(chosen.count(START)):
            # Mostly a start that finds a checkpoint.
            goals = goals or [draw_goal(ANY, track, generator)]
            goals.insert(generator.randint(0, len(goals)), draw_goal(START, track, generator))
        runs.append(goals)
    return runs


def draw_goal(place: str, track: Track, generator: Random) -> Goal:
    """A random moment at one place."""
    spot = None if place == START else track.random_spot(SPOTS[place], generator)
    return Goal(place, spot, generator.choice(VICTIMS), generator.random())
