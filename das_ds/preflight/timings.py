"""How long a run takes, from the times of a few of its steps and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass
class LoopTiming:
    """A loop over batches of which only the first were read."""

    num_batches: int
    """Of the complete loop."""
    seconds: list[float] = field(default_factory=list)
    """Of each batch that was read."""

    @property
    def seconds_per_batch(self) -> float:
        """The median, without the first batch, which also warms up; 0 for a loop without batches."""
        return median(self.seconds[1:] or self.seconds or [0.0])


@dataclass
class PhaseTiming:
    """A phase between domains, or before or after one: loops, and what takes as long for any length of them."""

    seconds: float = 0.0
    loops: dict[str, LoopTiming] = field(default_factory=dict)
    """Label -> loop."""

    @property
    def fixed_seconds(self) -> float:
        """Time outside of loops: projectors, normalization, export, checkpoint, results."""
        return max(0.0, self.seconds - sum(sum(loop.seconds) for loop in self.loops.values()))

    @property
    def full_seconds(self) -> float:
        """Time of the phase with complete loops."""
        return self.fixed_seconds + sum(loop.num_batches * loop.seconds_per_batch for loop in self.loops.values())


@dataclass
class StepsTiming:
    """A phase of optimizer steps, of which a few were taken."""

    seconds: float = 0.0
    """Of the phase."""
    steps: list[float] = field(default_factory=list)
    """Seconds of each step but the last, whose end nothing shows."""

    @property
    def seconds_per_step(self) -> float:
        """The median, without the first step, which also compiles and allocates."""
        return median(self.steps[1:] or self.steps)


@dataclass
class Rehearsal:
    """Times of the first two stages of a run, short ones, on the ranks, model, text and method of the run."""

    head_warmup: StepsTiming | None = None
    evaluations: list[PhaseTiming] = field(default_factory=list)
    """Before training, and after each stage."""
    before: list[PhaseTiming] = field(default_factory=list)
    """Of each stage: what the method does before it."""
    steps: list[StepsTiming] = field(default_factory=list)
    """Of each stage."""
    after: list[PhaseTiming] = field(default_factory=list)
    """Of each stage: what the method does after it, and the export."""
    save_seconds: float = 0.0
    """For which training waits for one checkpoint."""


@dataclass(frozen=True)
class StageLength:
    """What a run does in one stage."""

    name: str
    num_steps: int
    num_evaluated: int
    """Batches of the evaluations within it, all together."""
    num_saves: int
    """Checkpoints within it."""


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a run, by what takes them."""

    steps: float
    evaluation: float
    between: float
    """What the method does before and after domains, and exports."""
    checkpoints: float
    step_seconds: Mapping[str, float]
    """First stage, and where there are more the second -> seconds of one step."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.steps + self.evaluation + self.between + self.checkpoints


def estimate_time(
    rehearsal: Rehearsal, stages: Sequence[StageLength], num_eval_batches: int, num_head_steps: int
) -> TimeEstimate:
    """The time of a run; stages after the second take what the second one takes, by steps and batches.

    Args:
        rehearsal: the times of its first stages.
        stages: all of them.
        num_eval_batches: batches of one evaluation of all corpora, on this rank.
        num_head_steps: steps of the warm-up of a new LM head.
    """
    last = len(rehearsal.steps) - 1
    of_stage = [min(number, last) for number in range(len(stages))]
    loops = [loop for evaluation in rehearsal.evaluations for loop in evaluation.loops.values()]
    seconds_per_batch = median(loop.seconds_per_batch for loop in loops)
    fixed_evaluation = median(evaluation.fixed_seconds for evaluation in rehearsal.evaluations)
    warmup = rehearsal.head_warmup
    steps = [rehearsal.steps[number].seconds_per_step for number in of_stage]
    return TimeEstimate(
        steps=sum(seconds * stage.num_steps for seconds, stage in zip(steps, stages, strict=True))
        + (warmup.seconds_per_step * num_head_steps if warmup is not None else 0.0),
        evaluation=(len(stages) + 1) * (fixed_evaluation + num_eval_batches * seconds_per_batch)
        + sum(stage.num_evaluated for stage in stages) * seconds_per_batch,
        between=sum(rehearsal.before[number].full_seconds + rehearsal.after[number].full_seconds for number in of_stage)
        + sum(max(0.0, rehearsal.steps[number].seconds - sum(rehearsal.steps[number].steps)) for number in of_stage),
        checkpoints=rehearsal.save_seconds * sum(stage.num_saves for stage in stages),
        step_seconds={stage.name: seconds for stage, seconds in list(zip(stages, steps, strict=True))[: last + 1]},
    )
