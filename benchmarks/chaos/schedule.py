"""Schedule of kills: every place in turn, at moments drawn at random from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from benchmarks.chaos.progress_log import BETWEEN, DOMAIN, EVALUATION, EXPORT, GENERAL, START, TRAINING, Spot
from benchmarks.chaos.timeline import Timeline

SAVING = "saving"
ANY = "any moment"
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
"""Place to hit -> places of the marks at which to start waiting for it."""
PLACES = (*SPOTS, START)
VICTIMS = ((0, 1), (0, 1), (0,), (1,))


@dataclass(frozen=True)
class Goal:
    """Where to kill which ranks."""

    place: str
    spot: Spot | None
    """The batch or step to wait for; None: kill while the job starts."""
    ranks: tuple[int, ...]
    fraction: float
    """Fraction of the duration of the spot, the save or the start after which to kill."""


def build_schedule(timeline: Timeline, num_runs: int, seed: int) -> list[list[Goal]]:
    """Goals of each run, sorted by time: every place in turn, and sometimes one or two more."""
    generator = Random(seed)
    runs = []
    for run in range(num_runs):
        more = generator.choices((0, 1, 2), weights=(6, 3, 2))[0]
        chosen = [PLACES[run % len(PLACES)], *generator.choices(PLACES, k=more)]
        goals = [draw_goal(place, timeline, generator) for place in chosen if place != START]
        goals.sort(key=lambda goal: timeline.position(goal.spot))
        for _ in range(chosen.count(START)):
            # After another kill if possible, so that the start finds a checkpoint.
            goals = goals or [draw_goal(ANY, timeline, generator)]
            goals.insert(generator.randint(0, len(goals)), draw_goal(START, timeline, generator))
        runs.append(goals)
    return runs


def draw_goal(place: str, timeline: Timeline, generator: Random) -> Goal:
    """A random moment at one place."""
    spot = None if place == START else timeline.random_spot(SPOTS[place], generator)
    return Goal(place, spot, generator.choice(VICTIMS), generator.random())
