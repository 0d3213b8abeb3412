"""The same training by das_ds's trainer and by others with its masks: torch, DDP, and Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from das_ds.config import ImportanceConfig, RunConfig, SoftmaskConfig
from das_ds.context import CorpusSample, RunContext
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import ProcessGroup, init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.integrations import Protector
from das_ds.integrations.huggingface import ProtectionCallback
from das_ds.methods import build_method
from das_ds.softmask.apply import apply_masks
from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.granularities import load_granularity
from das_ds.softmask.input_layout import build_input_layout
from das_ds.softmask.linear_inputs import find_masked_matrices
from das_ds.softmask.measure import PRETRAINING
from das_ds.tracking.tracker import Tracker
from das_ds.training.domain_trainer import DomainProgress, DomainTrainer
from helpers.masked_training import ACCUMULATION, MAX_NORM, NUM_STEPS, ROWS, WEIGHT_DECAY, masked_config, steps
from helpers.parity import EPS
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import LENGTH, build, no_text_domain, random_batch, rank_part

RATE = 1e-2
ROUNDING_ONLY = "key.bias"
"""Attention does not depend on it: its gradient is rounding, which importance that is normalized by parameter enlarges.
Where matrices lie in memory decides on it."""
Weights = dict[str, torch.Tensor]
Kind = Literal["directions", "unit", "parameter"]
Inputs = dict[str, torch.Tensor]


def sample() -> list[Batch]:
    """Joined batches that importance is measured on."""
    return [random_batch(ROWS, 900 + number) for number in range(3)]


def parts(batches: list[Batch], ranks: ProcessGroup) -> list[Batch]:
    """This rank's rows."""
    return [rank_part(batch, ranks.info.rank, ranks.info.world_size) for batch in batches]


def as_inputs(batch: Batch) -> Inputs:
    """A batch as transformers' collators give it."""
    labels = torch.full((batch.input_ids.numel(),), -100)
    labels[batch.predicted] = batch.targets
    return {
        "input_ids": batch.corrupted_ids,
        "attention_mask": torch.ones_like(batch.input_ids),
        "labels": labels.view_as(batch.input_ids),
    }


# das_ds's own trainer.


def train_own(folder: Path, zero: dict[str, Any], kind: Kind) -> tuple[Weights, Weights]:
    """Final fp32 weights, and what was measured before the first step, by das_ds's own engine."""
    ranks = init_process_group()
    config = masked_config(folder, ranks.info.world_size, zero)
    run = build(config, ranks, **NO_DROPOUT)
    run.engine.start_domain(NUM_STEPS)
    path = folder / "own.safetensors"
    if kind == "directions":
        _mask_directions(run, path)
    else:
        _mask_elements(run, config, kind, path)
    _train(run, config)
    weights = {name: weight.detach().cpu().clone() for name, weight in run.engine.weights.fp32_weights()}
    run.engine.close()
    return weights, load_file(path)


def _mask_directions(run: RunContext, path: Path) -> None:
    inputs = build_input_layout(find_masked_matrices(run), run.engine.weights.shards, run.engine.ranks)
    importance = DirectionImportance(run, inputs, {}, None)
    importance.measure(
        CorpusSample("sample", lambda label, **_: ResumableLoop(parts(sample(), run.engine.ranks)), None)
    )
    importance.save(path, ())
    importance.mask(importance.build_projectors(1.0), apply_to="both", freeze_unmasked=True)


def _mask_elements(run: RunContext, config: RunConfig, kind: str, path: Path) -> None:
    domain = no_text_domain(config.output_dir)
    batches = parts(sample(), run.engine.ranks)
    sampled = {
        "sample_batches": lambda label, **_: ResumableLoop(batches),
        "sample_steps": lambda label: ResumableLoop([[batch] for batch in batches]),
    }
    domain = type(domain)(**{**vars(domain), **sampled})
    settings = ImportanceConfig(granularity=kind)
    importance = load_granularity(kind).measure(run, domain, "sample", PRETRAINING, settings)
    importance.save(path, ())
    apply_masks(run.engine, importance, SoftmaskConfig())


def _train(run: RunContext, config: RunConfig) -> None:
    progress = DomainProgress("domain", 0, 0, config.train.global_batch_size * LENGTH, NUM_STEPS)
    own = [parts(step, run.engine.ranks) for step in steps()]
    DomainTrainer(run.engine, build_method(run), Tracker([]), config.train).run(iter(own), progress)


# Plain torch and DDP.


def train_torch(folder: Path, kind: Kind, *, ddp: bool = False) -> tuple[Weights, Weights]:
    """The same by a loop in plain torch; with several ranks under DDP."""
    ranks = init_process_group()
    model = tiny_model(**NO_DROPOUT).train()
    runner = DistributedDataParallel(model) if ddp else model
    protector = Protector(runner, kind)
    protector.measure([as_inputs(batch) for batch in parts(sample(), ranks)])
    path = folder / "plugin.safetensors"
    protector.save(path)
    optimizer = protector.wrap(build_adamw(model))
    for number, step in enumerate(steps()):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (NUM_STEPS - number) / NUM_STEPS
        num_predicted = sum(batch.num_predicted for batch in step)
        for batch in parts(step, ranks):
            inputs = as_inputs(batch)
            labels = inputs.pop("labels")
            logits = runner(**inputs).logits
            total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (total * ranks.info.world_size / num_predicted).backward()
        protector.mask_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, load_file(path)


def build_adamw(model: PreTrainedModel) -> torch.optim.AdamW:
    """Matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=EPS)


# Hugging Face's Trainer.


class InOrderTrainer(Trainer):
    """Reads its rows in order."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def rows(batches: list[Batch]) -> list[Inputs]:
    """A dataset of all rows."""
    return [
        {key: value[number] for key, value in inputs.items()}
        for inputs in map(as_inputs, batches)
        for number in range(len(inputs["input_ids"]))
    ]


def build_trainer(folder: Path, zero: dict[str, Any] | None, world_size: int, **changes: Any) -> InOrderTrainer:
    """A Trainer of the same steps; `zero` is DeepSpeed's section, None: no DeepSpeed."""
    # The config of an earlier Trainer would shard the model while it is built.
    unset_hf_deepspeed_config()
    model = tiny_model(**NO_DROPOUT)
    deepspeed = None
    if zero is not None:
        deepspeed = {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        }
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        deepspeed=deepspeed,
        per_device_train_batch_size=ROWS // world_size,
        per_device_eval_batch_size=ROWS // world_size,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=NUM_STEPS,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        weight_decay=WEIGHT_DECAY,
        adam_epsilon=EPS,
        max_grad_norm=MAX_NORM,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **changes},
    )
    dataset: Any = rows([batch for step in steps() for batch in step])
    return InOrderTrainer(model=model, args=arguments, train_dataset=dataset, compute_loss_func=token_mean)


def token_mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """Loss per predicted token of the global batch, as in das_ds; RoBERTa's own is per micro-batch."""
    total = functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / num_items_in_batch


def train_huggingface(folder: Path, zero: dict[str, Any] | None, kind: Kind) -> tuple[Weights, Weights]:
    """The same by Hugging Face's Trainer with the callback."""
    ranks = init_process_group()
    trainer = build_trainer(folder, zero, ranks.info.world_size)
    before: Any = rows(sample())
    callback = ProtectionCallback(trainer, kind, before=before, measure=False)
    trainer.add_callback(callback)
    saved: dict[str, Weights] = {}

    trainer.train()
    assert callback.protector is not None
    callback.protector.save(folder / "plugin.safetensors")
    saved["measured"] = load_file(folder / "plugin.safetensors")
    return full_weights(trainer), saved["measured"]


def full_weights(trainer: Trainer) -> Weights:
    """Complete fp32 weights, at every stage; a collective."""
    engine: Any = trainer.model_wrapped
    model: Any = trainer.model
    if not hasattr(engine, "zero_optimization_stage"):
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}
    from das_ds.engine.zero import full_fp32_weight

    return {name: full_fp32_weight(engine, weight).cpu().clone() for name, weight in model.named_parameters()}


def compare(folder: Path, kind: Kind, trainer: str, zero: dict[str, Any] | None) -> tuple[float, float, float]:
    """Largest relative difference of measurements and of weights to das_ds's own trainer, and how far training moved.

    Differences are relative to the largest change of a weight of the tensor; the last is that of an unmasked run.
    """
    own_folder, other_folder = folder / f"own_{kind}", folder / f"{trainer}_{kind}"
    for path in (own_folder, other_folder):
        path.mkdir(exist_ok=True)
    unset_hf_deepspeed_config()
    initial = dict(tiny_model(**NO_DROPOUT).named_parameters())
    own, own_measured = train_own(own_folder, zero or {"stage": 0}, kind)
    if trainer == "huggingface":
        other, measured = train_huggingface(other_folder, zero, kind)
    else:
        other, measured = train_torch(other_folder, kind, ddp=trainer == "ddp")
    assert own_measured.keys() == measured.keys() and own.keys() == other.keys()
    measured_difference = max(
        float(
            (own_measured[name].double() - measured[name].double()).abs().max()
            / own_measured[name].double().abs().max()
        )
        for name in measured
        if not (kind == "parameter" and name.endswith(ROUNDING_ONLY))
    )
    moved = max(float((own[name] - initial[name].detach()).abs().max()) for name in own)
    difference = max(float((own[name] - other[name]).abs().max()) for name in own)
    return measured_difference, difference / moved, moved


def compare_all(folder: Path, trainer: str, zero: dict[str, Any] | None) -> dict[str, tuple[float, float, float]]:
    """`compare` for every method."""
    kinds: tuple[Kind, ...] = ("directions", "unit", "parameter")
    return {kind: compare(folder, kind, trainer, zero) for kind in kinds}
