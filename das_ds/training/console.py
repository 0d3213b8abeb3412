"""Output of rank 0 during a run: a start-up summary, one line per logged step, and one after every evaluation.

Everything goes to standard error, so that the standard output of a command stays what scripts read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from das_ds.checkpoint.manifest import DomainEnd, DomainEvaluation, EndReason, RunState
from das_ds.config.stage import Stage
from das_ds.progress import format_duration, is_terminal, say
from das_ds.reporting.plasticity import format_share
from das_ds.reporting.results import BEFORE_TRAINING
from das_ds.softmask.plasticity import DomainPlasticity, PlasticityReading
from das_ds.training.callbacks import LoggedStep

WITHIN = "within"
"""Name of evaluations within domains, for the estimate of the remaining time."""
END_REASONS: dict[EndReason, str] = {
    "steps": "took all of its steps",
    "early_stopping": "ended early, as its held-out loss hardly fell any more (evaluation.early_stopping)",
    "max_forgetting": "ended early, as other text lost too much (faults.max_forgetting)",
}
"""Why a domain ended, in words."""


@dataclass(frozen=True)
class SourceSummary:
    """One source of a domain that is a mixture."""

    name: str
    num_blocks: int | None
    """Training sequences; None: the text is streamed, in full or in part."""
    num_samples: int
    """Sequences of the domain's steps that come from it."""


@dataclass(frozen=True)
class DomainSummary:
    """The training text of one stage."""

    name: str
    num_blocks: int | None
    """Training sequences; None: the text is streamed, in full or in part."""
    num_steps: int
    """Optimizer steps."""
    num_samples: int
    """Sequences of these steps that are not replayed."""
    sources: Sequence[SourceSummary] = ()
    """Empty: one corpus."""


@dataclass(frozen=True)
class RunSummary:
    """The plan of a run, for `lines`."""

    method: str
    model: str
    """Source of the weights and the model type."""
    num_parameters: int
    num_trained: int
    objective: str
    device: str
    num_ranks: int
    zero_stage: int
    precision: str
    optimizer: str
    micro_batch_size: int
    global_batch_size: int
    sequence_length: int
    domains: Sequence[DomainSummary]
    eval_corpora: Sequence[str]
    output_dir: str
    continues: str | None
    """Which earlier run it continues, and after which domain; None: none."""
    resumes: str | None
    """Where the run continues, in words; None: it starts."""

    def lines(self) -> list[str]:
        """The summary, a line per fact."""
        tokens_per_step = self.global_batch_size * self.sequence_length
        micro_steps = self.global_batch_size // (self.micro_batch_size * self.num_ranks)
        trained = "" if self.num_trained == self.num_parameters else f", {_count(self.num_trained)} trained"
        ranks = f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}"
        facts = [
            ("model", f"{self.model}, {_count(self.num_parameters)} parameters{trained}, {self.objective}"),
            ("hardware", f"{ranks} on {self.device}, ZeRO {self.zero_stage}, {self.precision}, {self.optimizer}"),
            (
                "batch",
                f"{self.global_batch_size} sequences of {self.sequence_length} tokens = {tokens_per_step:,} tokens a "
                f"step ({ranks} x {self.micro_batch_size} sequences x {micro_steps} micro-steps)",
            ),
            *(("domains" if not number else "", line) for number, line in enumerate(self._text_lines())),
            ("phases", "evaluate; then per domain: prepare, train, update the method, export, evaluate"),
            ("evaluates", ", ".join(self.eval_corpora)),
            ("results", f"{self.output_dir} (results.json, report/, domains/*/model)"),
            *([] if self.continues is None else [("continues", self.continues)]),
            ("start", "from the beginning" if self.resumes is None else f"resuming from {self.resumes}"),
        ]
        title = f"Continual pre-training with das_ds, method {self.method}"
        return [title, *(f"  {name:<11}{text}" for name, text in facts)]

    def _text_lines(self) -> Iterator[str]:
        """Every domain with its length, and below it its sources with their part of its sequences."""
        names = [
            name for domain in self.domains for name in (domain.name, *(f"  {one.name}" for one in domain.sources))
        ]
        width = max(map(len, names))
        for domain in self.domains:
            yield f"{domain.name:<{width}}  {self._describe_text(domain, f'{domain.num_steps:>7,} steps')}"
            for source in domain.sources:
                share = source.num_samples / max(1, domain.num_samples)
                yield f"{f'  {source.name}':<{width}}  {self._describe_text(source, f'{share:>7.1%} share')}"

    def _describe_text(self, text: DomainSummary | SourceSummary, part: str) -> str:
        """Size of a text, its part of the run, and how often it is seen."""
        if text.num_blocks is None:
            return f"{'streamed':>32}  {part}"
        num_tokens = _count(text.num_blocks * self.sequence_length)
        epochs = text.num_samples / max(1, text.num_blocks)
        return f"{text.num_blocks:>9,} blocks  {num_tokens:>7} tokens  {part}  {epochs:5.2f} epochs"


@dataclass
class RunClock:
    """Estimates the remaining time of a run.

    The remaining steps cost what steps of this start cost on average; every other phase that is still to come
    costs what the last one of its kind did. A kind that has not been seen yet counts nothing, so that the first
    estimates are low.
    """

    _step_seconds: float = 0.0
    _steps_seen: int = 0
    _num_intervals: int = 0
    _phase_seconds: dict[str, float] = field(default_factory=dict)

    def add_steps(self, num_steps: int, seconds: float) -> None:
        """Steps that were taken since the last call, and the time they took."""
        if self._num_intervals == 1:
            # The first interval includes start-up, so it counts only until there is another.
            self._steps_seen = 0
            self._step_seconds = 0.0
        self._num_intervals += 1
        self._steps_seen += num_steps
        self._step_seconds += seconds

    def add_phase(self, phase: str, seconds: float) -> None:
        """A phase that is not training has ended."""
        self._phase_seconds[phase] = seconds

    def seconds_left(self, steps_left: int, phases_left: Mapping[str, int]) -> float | None:
        """Seconds until the run ends; None until a step was taken.

        Args:
            steps_left: optimizer steps of all domains.
            phases_left: other phase -> how many are still to come.
        """
        if not self._steps_seen:
            return None
        training = self._step_seconds / self._steps_seen * steps_left
        others = sum(count * self._phase_seconds.get(phase, 0.0) for phase, count in phases_left.items())
        return training + others


def step_line(logged: LoggedStep, seconds_left: float | None) -> str:
    """One logged step: `acl 20/75 | loss 5.612 | lr 4.00e-05 | 1,234 tokens/s | run ends in 12m40s`."""
    parts = [
        f"{logged.domain} {logged.step}/{logged.num_steps}",
        f"loss {logged.loss:.3f}",
        f"lr {logged.learning_rate:.2e}",
        f"{logged.tokens_per_s:,.0f} tokens/s",
    ]
    if seconds_left is not None:
        parts.append(f"run ends in {format_duration(seconds_left)}")
    return " | ".join(parts)


def evaluation_line(stage: str, losses: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Held-out losses after a stage, with their change since the evaluation before: `after acl: acl 5.61 (-0.47), ...`.

    Args:
        stage: row name of the loss matrix.
        losses: corpus -> loss in nats per predicted token.
        before: the row before, as far as it was measured; {}: this is the first.
    """
    parts = [
        f"{corpus} {loss:.3f}" + (f" ({loss - before[corpus]:+.3f})" if corpus in before else "")
        for corpus, loss in losses.items()
    ]
    return f"held-out loss {stage}: {', '.join(parts)}"


def protection_line(measured: DomainPlasticity) -> str:
    """What masks protect while a domain is learned, and how.

    `protected while acl is learned: general, restaurant (masks on gradient and update, half_saturation 1, rank full)`.
    """
    if not measured.protected:
        return f"protected while {measured.domain} is learned: nothing yet"
    return f"protected while {measured.domain} is learned: {', '.join(measured.protected)} ({measured.form})"


def plasticity_line(measured: DomainPlasticity) -> str:
    """What is free before a domain, or after it what is left of that.

    `plasticity before acl: 61% of all directions are open; 24% of the input energy of acl passes (least: MLP output
    12%)`.
    """
    if measured.after is None:
        return f"plasticity before {measured.domain}: {_open_text(measured.before, measured.domain, 'passes')}"
    return f"plasticity after {measured.domain}: {_open_text(measured.after, measured.domain, 'still passes')}"


def _open_text(reading: PlasticityReading, domain: str, verb: str) -> str:
    text = f"{format_share(reading.plasticity)} of all directions are open"
    if reading.passing is None or reading.least_passing is None:
        return text
    group, least = reading.least_passing
    return (
        f"{text}; {format_share(reading.passing)} of the input energy of {domain} {verb} "
        f"(least: {group} {format_share(least)})"
    )


class RunConsole:
    """Prints the progress of a run on rank 0, and estimates when the run ends.

    Args:
        stages: of the run.
        is_main: whether this is rank 0.
        every_steps: see `EvaluationConfig`.
    """

    def __init__(self, stages: Sequence[Stage], *, is_main: bool, every_steps: int | None = None) -> None:
        self._stages = stages
        self._is_main = is_main
        self._every_steps = every_steps
        self._clock = RunClock()

    def run_started(self, summary: RunSummary) -> None:
        """Print the summary of the run."""
        for line in summary.lines():
            self._say(line)

    def phase_ended(self, phase: str, seconds: float) -> None:
        """Note how long a phase took, for the estimate."""
        self._clock.add_phase(phase, seconds)

    def step_logged(self, logged: LoggedStep, state: RunState) -> str:
        """Print a logged step where there is no progress bar; returns the text to show behind one.

        Args:
            logged: the step.
            state: of the run before it.
        """
        self._clock.add_steps(logged.steps_since_last, logged.seconds)
        steps_left = logged.num_steps - logged.step + self._later_steps(state)
        phases_left = {**self._phases_left(state), WITHIN: self._evaluations_left(logged.step, state)}
        seconds_left = self._clock.seconds_left(steps_left, phases_left)
        if not is_terminal():
            self._say(step_line(logged, seconds_left))
        text = f"loss={logged.loss:.3f}"
        return text if seconds_left is None else f"{text}, run ends in {format_duration(seconds_left)}"

    def evaluated(self, losses: dict[str, float], before: Mapping[str, float | None], num_learned: int) -> None:
        """Print held-out losses.

        Args:
            losses: corpus -> loss.
            before: the same after the stage before, or None where it was not measured; {} before training.
            num_learned: stages learned.
        """
        row = f"after {self._stages[num_learned - 1].name}" if num_learned else BEFORE_TRAINING
        self._say(evaluation_line(row, losses, {name: loss for name, loss in before.items() if loss is not None}))

    def evaluated_within(self, record: DomainEvaluation, *, before: DomainEvaluation) -> None:
        """Print held-out losses within a domain, with their change since the evaluation before."""
        self._say(evaluation_line(f"at step {record.step} of {record.domain}", record.losses, before.losses))

    def divergence_measured(self, stage: str, divergence: float) -> None:
        """Print how far the model's predictions are from those of the base model."""
        self._say(f"KL(base || model) on held-out text of {stage}: {divergence:.4f}")

    def domain_ended(self, end: DomainEnd) -> None:
        """Print how a domain ended, unless it took all of its steps and the run goes on with the last model."""
        if end.reason == "steps" and end.model_step == end.step:
            return
        text = f"{end.domain} {END_REASONS[end.reason]}, at step {end.step}"
        self._say(text if end.model_step == end.step else f"{text}; going on with the model of step {end.model_step}")

    def plasticity_measured(self, measured: DomainPlasticity) -> None:
        """Print what a method measured of the capacity left."""
        if measured.after is None:
            self._say(protection_line(measured))
        self._say(plasticity_line(measured))

    def exported(self, stage: str, folder: Path) -> None:
        """Print where a model was exported to."""
        self._say(f"exported {stage} to {folder}")

    def _later_steps(self, state: RunState) -> int:
        """Optimizer steps of all stages after the current one; a warm-up of the head comes before the first."""
        is_warmup = state.phase == "head_warmup"
        later = self._stages[state.domains_done + (0 if is_warmup else 1) :]
        return sum(stage.num_steps for stage in later)

    def _evaluations_left(self, step: int, state: RunState) -> int:
        """Evaluations within domains that come after a logged step; one at that step itself is still to come."""
        if self._every_steps is None:
            return 0
        later = sum(-(-stage.num_steps // self._every_steps) for stage in self._stages[state.domains_done + 1 :])
        stage = self._stages[min(state.domains_done, len(self._stages) - 1)]
        total = -(-stage.num_steps // self._every_steps)
        if state.phase == "head_warmup":
            return total + later
        return total - min((step - 1) // self._every_steps, total) + later

    def _phases_left(self, state: RunState) -> dict[str, int]:
        """Phases without optimizer steps that come after the current one, which has steps."""
        stages_left = len(self._stages) - state.domains_done
        return {
            "before": stages_left - 1 if state.phase == "train" else stages_left,
            "after": stages_left,
            "evaluate": len(self._stages) + 1 - len(state.loss_matrix),
        }

    def _say(self, text: str) -> None:
        if self._is_main:
            say(text)


def _count(number: int) -> str:
    """`950`, `12.3 K`, `124 M`, `8.03 B`: three significant digits."""
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)
