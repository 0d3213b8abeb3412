"""A rehearsal: the first two stages of a run for a few steps and batches, on its ranks, to see how long they take."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch

from das_ds.checkpoint.store import CheckpointStore
from das_ds.config import RunConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.distributed.process_group import ProcessGroup, RankInfo
from das_ds.distributed.resumable import Batches, ResumableLoop, ResumableLoops
from das_ds.fault_tolerance.shutdown import ShutdownHandler
from das_ds.fault_tolerance.watchdog import Watchdog
from das_ds.preflight.timings import (
    LoopTiming,
    PhaseTiming,
    Rehearsal,
    StageLength,
    StepsTiming,
    TimeEstimate,
    estimate_time,
)
from das_ds.progress import disable_library_bars, format_duration
from das_ds.run_dir import RunDir, open_run_dir
from das_ds.tracking.names import CHECKPOINT_STALL_S, CHECKPOINTS
from das_ds.tracking.tracker import Tracker
from das_ds.training.console import RunSummary
from das_ds.training.data_module import DataModule, eval_corpora
from das_ds.training.earlier_run import open_earlier_run
from das_ds.training.evaluation_policy import EvaluationPolicy
from das_ds.training.hub_uploads import HubUploads
from das_ds.training.run_services import RunServices
from das_ds.training.run_summary import summarize_run
from das_ds.training.train import prepare_run
from das_ds.training.trainer import ContinualTrainer

T = TypeVar("T", covariant=True)

NUM_STEPS = 7
"""Of each stage: the first warms up, and the end of the last is not seen."""
NUM_BATCHES = 4
"""Of each loop, of which the first warms up."""
NUM_STAGES = 2
"""The first is learned without masks, replay or a teacher, the second with what all later ones have."""


def time_run(config: RunConfig, engine_config: EngineConfig, ranks: ProcessGroup) -> tuple[RunSummary, TimeEstimate]:
    """How long a run takes. Tokenizes all of its text, which the run then finds in the cache; a collective.

    Checkpoints, models and results go to a folder beside the run folder, which is removed at the end.

    Args:
        config: of the run.
        engine_config: DeepSpeed's merged settings.
        ranks: that the run will have.

    Returns:
        What the run prints when it begins, and the estimate.

    Raises:
        DasError: what would also end the run.
    """
    disable_library_bars()
    watchdog = Watchdog(ranks, config.runtime.hang_timeout, RunDir(config.output_dir))
    token = ranks.all_gather_object(secrets.token_hex(4))[0]
    folder = config.output_dir.resolve().with_name(f".{config.output_dir.name}.rehearsal-{token}")
    try:
        with watchdog, ShutdownHandler(RunDir(folder), config.runtime.stop_signals) as shutdown:
            elsewhere = config.model_copy(update={"output_dir": folder})
            run_dir = ranks.main_process_first(lambda: open_run_dir(elsewhere))
            earlier = None if config.continue_from is None else open_earlier_run(config, ranks)
            prepared, data = prepare_run(elsewhere, ranks, watchdog)
            short = short_config(prepared)
            services = RunServices(
                ranks,
                run_dir,
                Tracker(),
                CheckpointStore(run_dir.checkpoints_dir, 1),
                shutdown,
                watchdog,
                HubUploads(short, run_dir),
            )
            with watchdog.suspend_timeout("building the engine"):
                trainer = RehearsalTrainer(short, services, _shorten(data, short), engine_config, earlier)
            try:
                trainer.run(None)
                config = prepared.model_copy(update={"output_dir": config.output_dir})
                summary = summarize_run(config, trainer.context, data, None)
            finally:
                trainer.engine.close()
        # No rank may still write there.
        ranks.barrier()
    finally:
        if ranks.info.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    return summary, _estimate(config, data, trainer.rehearsal)


def short_config(config: RunConfig) -> RunConfig:
    """The first stages with `NUM_STEPS` steps, without what ends, repeats or reports steps."""
    joint = config.method.trains_jointly
    domains = config.domains if joint else config.domains[: config.num_earlier + NUM_STAGES]
    num_steps = -(-NUM_STEPS // len(domains)) if joint else NUM_STEPS
    model = config.model
    return config.model_copy(
        update={
            "domains": [
                domain.model_copy(update={"steps": num_steps, "epochs": None, "tokens": None})
                if number >= config.num_earlier
                else domain
                for number, domain in enumerate(domains)
            ],
            "model": model.model_copy(update={"head_warmup_steps": min(NUM_STEPS, model.head_warmup_steps)}),
            "checkpoint": config.checkpoint.model_copy(update={"interval": 10**9, "keep_last": 1}),
            "evaluation": config.evaluation.model_copy(
                update={"every_steps": None, "keep_best": False, "continue_from": "last", "early_stopping": None}
            ),
            "faults": config.faults.model_copy(update={"max_forgetting": None}),
            "tracking": [],
            "export": config.export.model_copy(update={"push_to_hub": False}),
        }
    )


def _shorten(data: DataModule, short: RunConfig) -> DataModule:
    names = {corpus.name for corpus in eval_corpora(short)}
    return replace(data, config=short, blocks={name: both for name, both in data.blocks.items() if name in names})


def _estimate(config: RunConfig, data: DataModule, rehearsal: Rehearsal) -> TimeEstimate:
    batches = {corpus.name: len(data.evaluation_batches(corpus.name)) for corpus in eval_corpora(config)}
    policy = EvaluationPolicy(config)
    lengths = []
    for stage in config.own_stages:
        every = config.evaluation.every_steps
        num_evaluations = 0 if every is None else -(-stage.num_steps // every)
        num_batches = sum(batches.get(corpus, 0) for corpus in policy.corpora(stage))
        num_saves = (stage.num_steps - 1) // config.checkpoint.interval
        lengths.append(StageLength(stage.name, stage.num_steps, num_evaluations * num_batches, num_saves))
    return estimate_time(rehearsal, lengths, sum(batches.values()), config.model.head_warmup_steps)


def describe_estimate(estimate: TimeEstimate, num_ranks: int, device: str) -> str:
    """The estimate as one line of text."""
    parts = {
        "steps": estimate.steps,
        "evaluation": estimate.evaluation,
        "before and after domains, with export": estimate.between,
        "waiting for checkpoints": estimate.checkpoints,
    }
    shown = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in parts.items() if seconds >= 1.0)
    steps = ", ".join(f"{seconds:.3g} s in {name}" for name, seconds in estimate.step_seconds.items())
    hours = estimate.total * num_ranks / 3600
    unit = "GPU hours" if device == "cuda" else "rank hours"
    return f"{format_duration(estimate.total)} ({hours:.3g} {unit}): {shown}; a step takes {steps}"


class RehearsalTrainer(ContinualTrainer):
    """A trainer that notes how long its phases, steps and batches take; it prints nothing."""

    prints_progress = False

    def __init__(self, *arguments: Any) -> None:
        self.rehearsal = Rehearsal()
        self._last_step_end = 0.0
        self._steps = StepsTiming()
        self._saves: list[tuple[float, float]] = []
        super().__init__(*arguments)

    def _build_loops(self) -> ResumableLoops:
        return TimedLoops(self._ranks.info)

    def _warm_up_head(self) -> None:
        self.rehearsal.head_warmup = self._time_steps(super()._warm_up_head)

    def _evaluate(self) -> None:
        self.rehearsal.evaluations.append(self._time_loops(super()._evaluate))

    def _before_domain(self) -> None:
        self.rehearsal.before.append(self._time_loops(super()._before_domain))

    def _train_domain(self) -> None:
        self.rehearsal.steps.append(self._time_steps(super()._train_domain))

    def _after_domain(self) -> None:
        self.rehearsal.after.append(self._time_loops(super()._after_domain))

    def on_step_end(self, step: int) -> bool:
        """Note the time of the step."""
        self._steps.steps.append(self._clock() - self._last_step_end)
        ends = super().on_step_end(step)
        self._last_step_end = self._clock()
        return ends

    def extra_metrics(self) -> dict[str, float]:
        """Note how long training waited for checkpoints."""
        metrics = super().extra_metrics()
        if metrics.get(CHECKPOINTS):
            self._saves.append((metrics[CHECKPOINTS], metrics[CHECKPOINT_STALL_S]))
            self.rehearsal.save_seconds = sum(s for _, s in self._saves) / sum(n for n, _ in self._saves)
        return metrics

    def _time_steps(self, phase: Callable[[], None]) -> StepsTiming:
        self._steps = StepsTiming()
        begin = self._last_step_end = self._clock()
        phase()
        self._steps.seconds = self._clock() - begin
        return self._steps

    def _time_loops(self, phase: Callable[[], None]) -> PhaseTiming:
        loops = self._loops
        assert isinstance(loops, TimedLoops)
        timing = PhaseTiming()
        loops.timings = timing.loops
        begin = self._clock()
        phase()
        timing.seconds = self._clock() - begin
        return timing

    def _clock(self) -> float:
        return _synchronized_time(self._ranks.info)


class TimedLoops(ResumableLoops):
    """Loops that end after `NUM_BATCHES` batches and note how long each takes.

    Args:
        info: of this rank.
    """

    def __init__(self, info: RankInfo) -> None:
        super().__init__(show_progress=False, device=info.device)
        self._info = info
        self.timings: dict[str, LoopTiming] = {}
        """Label -> of the loop; set by who wants them."""

    def start(self, batches: Batches[T], label: str) -> ResumableLoop[T]:
        """The loop over the first batches."""
        timing = self.timings[label] = LoopTiming(len(batches))
        loop = _TimedLoop(_First(batches), timing, self._info)
        self._loops[label] = loop
        return loop


class _First(Batches[T]):
    def __init__(self, batches: Batches[T]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return min(NUM_BATCHES, len(self._batches))

    def __getitem__(self, index: int, /) -> T:
        return self._batches[index]


class _TimedLoop(ResumableLoop[T]):
    def __init__(self, batches: Batches[T], timing: LoopTiming, info: RankInfo) -> None:
        super().__init__(batches)
        self._timing = timing
        self._info = info

    def __iter__(self) -> Iterator[T]:
        batches = super().__iter__()
        begin = _synchronized_time(self._info)
        for batch in batches:
            yield batch
            # Here the body of the loop has ended.
            end = _synchronized_time(self._info)
            self._timing.seconds.append(end - begin)
            begin = end


def _synchronized_time(info: RankInfo) -> float:
    """Seconds, after all work that the device was given."""
    if info.device.type == "cuda":
        torch.cuda.synchronize(info.device)
    return time.monotonic()
