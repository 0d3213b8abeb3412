"""The product's engine and method trained on given batches, on real ranks, for comparison with the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config
from das_ds.context import DomainContext, RunContext, build_context
from das_ds.data.batch import Batch
from das_ds.data.replay import mark_replayed
from das_ds.distributed.process_group import ProcessGroup, init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.methods import build_method
from das_ds.models.architectures.registry import spec_for
from das_ds.tracking.sinks import Metrics, Sink
from das_ds.tracking.tracker import Tracker
from das_ds.training.domain_trainer import DomainProgress, DomainTrainer
from helpers.configs import LENGTH, base_values, changed
from helpers.half import allow_fp16_on_cpu
from helpers.tiny_models import tiny_model

VOCABULARY = 100
MASK = 4


class Recorder(Sink):
    """Keeps every logged line."""

    def __init__(self) -> None:
        self.lines: list[Metrics] = []

    def log(self, metrics: Metrics, *, global_step: int) -> None:
        self.lines.append(metrics)


def random_batch(num_rows: int, seed: int) -> Batch:
    """Rows with a different number of predicted tokens each, some with none."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCABULARY, (num_rows, LENGTH), generator=generator)
    share = torch.rand(num_rows, 1, generator=generator) * 0.4
    chosen = torch.rand(num_rows, LENGTH, generator=generator) < share
    predicted = chosen.flatten().nonzero().squeeze(1)
    return Batch(
        input_ids=input_ids,
        corrupted_ids=input_ids.masked_fill(chosen, MASK),
        predicted=predicted,
        targets=input_ids.flatten()[predicted],
        row_weights=torch.ones(num_rows),
    )


def rank_part(batch: Batch, rank: int, world_size: int) -> Batch:
    """The rows of a joined batch that one rank reads."""
    num_rows = len(batch.input_ids) // world_size
    first = rank * num_rows
    rows = batch.predicted // LENGTH
    own = (rows >= first) & (rows < first + num_rows)
    window = slice(first, first + num_rows)
    part = Batch(
        batch.input_ids[window],
        batch.corrupted_ids[window],
        batch.predicted[own] - first * LENGTH,
        batch.targets[own],
        batch.row_weights[window],
    )
    replayed = [] if batch.replayed_rows is None else batch.replayed_rows.tolist()
    return mark_replayed(part, [row - first for row in replayed if first <= row < first + num_rows])


def run_config(output_dir: Path, **changes: Any) -> RunConfig:
    """The run of `make_config`; `changes` are nested dictionaries of keys."""
    return RunConfig(**changed(base_values(output_dir), changes))


def build(config: RunConfig, ranks: ProcessGroup, **model_changes: Any) -> RunContext:
    """Engine, layout and gates over a tiny model."""
    if config.train.precision == "fp16":
        allow_fp16_on_cpu()
    model = tiny_model(config.model.config["model_type"], **model_changes)  # type: ignore[index]
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    spec = spec_for(model.config.model_type)
    engine_config = build_engine_config(config, ranks.info.world_size)
    return build_context(config, model, spec, engine_config, ranks)


def no_text_domain(folder: Path) -> DomainContext:
    """A first domain whose sample is empty."""
    return DomainContext(
        0, "domain", lambda label, **_: ResumableLoop([]), lambda label: ResumableLoop([]), folder, folder / "domain"
    )


def train(
    config: RunConfig, steps: list[list[Batch]], **model_changes: Any
) -> tuple[dict[str, torch.Tensor], list[Metrics]]:
    """Final fp32 weights and the logged lines of one domain on joined batches, trained by this rank's part of them."""
    ranks = init_process_group()
    run = build(config, ranks, **model_changes)
    recorder = Recorder()
    method = build_method(run)
    domain = no_text_domain(config.output_dir)
    method.before_domain(domain)
    run.engine.start_domain(config.train.steps_per_domain)
    method.on_train_start(domain)
    info = ranks.info
    parts = [[rank_part(batch, info.rank, info.world_size) for batch in step] for step in steps]
    progress = DomainProgress("domain", 0, 0, config.train.global_batch_size * LENGTH, config.train.steps_per_domain)
    DomainTrainer(run.engine, method, Tracker([recorder]), config.train).run(iter(parts), progress)
    weights = {name: weight.detach().cpu().clone() for name, weight in run.engine.weights.fp32_weights()}
    run.engine.close()
    return weights, recorder.lines


def train_all(configs: list[RunConfig], steps: list[list[Batch]], model_changes: dict[str, Any]) -> list[Any]:
    """`train` for several configs in one process, which has to be of one ZeRO stage."""
    return [train(config, steps, **model_changes) for config in configs]
