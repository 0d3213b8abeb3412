"""A method over two domains of given batches on real ranks, and in plain torch on one process.

G sequences of a global batch, N of a domain.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from das_ds.config import RunConfig
from das_ds.context import DomainContext
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.methods import build_method
from das_ds.tracking.sinks import Metrics
from das_ds.tracking.tracker import Tracker
from das_ds.training.domain_trainer import DomainProgress, DomainTrainer
from helpers.parity import ACCUMULATION, EPS, ROWS
from helpers.reference import adamw_step, reference_batch_gradients, step_losses, unit_ones
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import LENGTH, Recorder, build, random_batch, rank_part

NUM_STEPS = 3
Weights = dict[str, Tensor]
Steps = list[list[Batch]]
ShardSlice = tuple[str, int, Tensor]


@dataclass(frozen=True)
class Learned:
    """What a run over two domains left; weights as after each domain's last hook, frozen ones on rank 0 only."""

    weights: list[Weights]
    lines: list[Metrics]
    sharded: dict[str, list[ShardSlice]]
    """This rank's shards of the tensors that the method would save at the end."""


def make_domains(num_rows: int = ROWS) -> list[Steps]:
    """Joined micro-batches of `NUM_STEPS` steps of each domain."""
    numbers = range(2 * NUM_STEPS * ACCUMULATION)
    batches = [random_batch(num_rows, 50 + number) for number in numbers]
    steps = [batches[first : first + ACCUMULATION] for first in range(0, len(batches), ACCUMULATION)]
    return [steps[:NUM_STEPS], steps[NUM_STEPS:]]


def learn_all(configs: list[RunConfig], domains: list[Steps]) -> list[Learned]:
    """Per config, all of one ZeRO stage: the method over the domains, by this rank's part of each batch."""
    return [_learn(config, domains) for config in configs]


def _learn(config: RunConfig, domains: list[Steps]) -> Learned:
    ranks = init_process_group()
    run = build(config, ranks, **NO_DROPOUT)
    engine = run.engine
    method = build_method(run)
    recorder = Recorder()
    weights = []
    for index, steps in enumerate(domains):
        parts = [[rank_part(batch, ranks.info.rank, ranks.info.world_size) for batch in step] for step in steps]
        folder = config.output_dir
        batches = [batch for step in parts for batch in step]
        measured = [[batch] for batch in batches]
        domain = DomainContext(
            index,
            "domain",
            lambda _, b=batches, **__: ResumableLoop(b),
            lambda _, m=measured: ResumableLoop(m),
            folder,
            folder,
        )
        method.before_domain(domain)
        engine.start_domain(len(steps))
        method.on_train_start(domain)
        trainer = DomainTrainer(engine, method, Tracker([recorder]), config.train)
        tokens_per_step = config.train.global_batch_size * LENGTH
        trainer.run(iter(parts), DomainProgress("domain", 0, 0, tokens_per_step, len(parts)))
        method.after_domain(domain)
        gathered = {name: engine.gather_weight(name, {0}) for name in engine.frozen_names}
        frozen = {name: weight for name, weight in gathered.items() if weight is not None}
        weights.append(frozen | {name: weight.detach().clone() for name, weight in engine.weights.fp32_weights()})
    sharded = {
        name: [(s.name, s.param_start, flats[s.flat][s.span].clone()) for s in engine.weights.shards]
        for name, flats in method.state_dict().sharded.items()
    }
    engine.close()
    return Learned(weights, recorder.lines, sharded)


@dataclass(frozen=True)
class Expected:
    """Results in float64; one penalty per step, nothing in the first domain."""

    weights: list[Weights]
    penalties: list[float]
    grad_norms: list[float]
    fisher: Weights


def learn_plainly(
    domains: list[Steps],
    *,
    strength: float = 0.0,
    decay: float = 1.0,
    l2: float = 0.0,
    frozen: tuple[str, ...] = (),
    rates: dict[str, float] | None = None,
    max_perplexity: float | None = None,
    shares: tuple[float, ...] = (0.0, 0.0),
    saturation: float | None = None,
    apply_to: str = "update",
    unfreeze_rank_ratio: float | None = None,
) -> Expected:
    """AdamW on the loss and its penalties by autograd, then theta <- (1 - share) theta + share theta_before.

    `strength` is that of EWC, `l2` that of the plain distance; parameters that begin with `frozen` stay as they are;
    `rates` are factors of the learning rate, by the beginning of a name, 1 for all others; tokens of a higher
    perplexity than `max_perplexity` at the start of a domain have no loss.
    With a saturation c gradients or steps of linear layers, or both, are multiplied by (I + M / c)^-1, and so is their
    weight decay; from the second domain on all other parameters stay as they are.

    With a ratio the leading singular directions of the encoder's linear layers are taken out of gradients, steps and
    weight decay.
    """
    moments_of_inputs: Weights = {}
    model = nn.Module.to(copy.deepcopy(tiny_model(**NO_DROPOUT)), torch.float64).train(False)
    parameters = dict(model.named_parameters())
    result = Expected([], [], [], {name: torch.zeros_like(value) for name, value in parameters.items()})
    for steps, share in zip(domains, shares, strict=True):
        before = {name: value.detach().clone() for name, value in parameters.items()}
        teacher = copy.deepcopy(model)
        moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in before.items()}
        subspaces = {
            name: leading_directions(value, unfreeze_rank_ratio)
            for name, value in before.items()
            if unfreeze_rank_ratio is not None and value.ndim == 2 and ".encoder." in name
        }
        for number, micro_batches in enumerate(steps):
            inputs = [vars(batch) for batch in micro_batches]
            num_predicted = sum(batch.num_predicted for batch in micro_batches)
            if max_perplexity is not None:
                inputs = [_without_surprising(teacher, batch, max_perplexity) for batch in inputs]
            loss, _ = step_losses(model, inputs, unit_ones(model), 1.0, contrast=False)
            loss = loss * (sum(len(batch["targets"]) for batch in inputs) / num_predicted)
            squares = {n: (parameters[n] - before[n]) ** 2 for n in parameters}
            distances = [((strength * result.fisher[n] + l2) / 2 * squares[n]).sum() for n in parameters]
            penalty = torch.stack(distances).sum()
            gradients = torch.autograd.grad(loss + penalty, list(parameters.values()))
            if frozen:
                stays = [name.startswith(frozen) for name in parameters]
                gradients = tuple(g * 0.0 if stay else g for g, stay in zip(gradients, stays, strict=True))
            masks = {
                name: torch.linalg.inv(torch.eye(len(moment)).double() + moment / saturation)
                for name, moment in moments_of_inputs.items()
                if saturation is not None
            }
            if masks:
                pairs = zip(parameters, gradients, strict=True)
                gradients = tuple(gradient * (name in masks) for name, gradient in pairs)
            if apply_to != "update":
                pairs = zip(parameters, gradients, strict=True)
                gradients = tuple(gradient @ masks[name] if name in masks else gradient for name, gradient in pairs)
            gradients = tuple(
                project_out(gradient, *subspaces[name]) if name in subspaces else gradient
                for name, gradient in zip(parameters, gradients, strict=True)
            )
            norm = torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum().sqrt().item()
            clip = min(1.0, 0.5 / (norm + 1e-6))
            scheduled = 1e-2 * (len(steps) - number) / len(steps)
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
                factors = [factor for start, factor in (rates or {}).items() if name.startswith(start)]
                rate = scheduled * (factors[0] if factors else 1.0)
                weight_decay = 0.01 if value.ndim > 1 and not (frozen and name.startswith(frozen)) else 0.0
                # Without decay, which the mask holds back wherever it acts.
                step = adamw_step(value, gradient * clip, *moments[name], number + 1, rate, (0.9, 0.999), EPS, 0.0)
                decay_step = -rate * weight_decay * value.data
                if name in masks:
                    decay_step = decay_step @ masks[name]
                    step = step if apply_to == "gradient" else step @ masks[name]
                if name in subspaces:
                    step, decay_step = (project_out(part, *subspaces[name]) for part in (step, decay_step))
                if not masks or name in masks:
                    value.data += step + decay_step
            result.penalties.append(penalty.item())
            result.grad_norms.append(norm)
        for name, gradients_squared in _squares(model, steps).items():
            result.fisher[name].mul_(decay).add_(gradients_squared)
            parameters[name].data.lerp_(before[name], share)
        result.weights.append({name: value.detach().clone() for name, value in parameters.items()})
        for name, moment in _normalized_moments(model, [batch for step in steps for batch in step]).items():
            moments_of_inputs[name] = moments_of_inputs.get(name, 0.0) + moment
    return result


@torch.no_grad()
def _without_surprising(teacher: Any, batch: dict[str, Any], max_perplexity: float) -> dict[str, Any]:
    """The batch without the predictions whose inverse probability is above `max_perplexity`."""
    probabilities = teacher(input_ids=batch["corrupted_ids"]).logits.flatten(0, 1)[batch["predicted"]].softmax(-1)
    kept = 1 / probabilities[torch.arange(len(probabilities)), batch["targets"]] <= max_perplexity
    return {**batch, "predicted": batch["predicted"][kept], "targets": batch["targets"][kept]}


def leading_directions(weight: Tensor, unfreeze_rank_ratio: float) -> tuple[Tensor, Tensor]:
    """U_k (o, k) and V_k (d, k): eigenvectors of W W^T and W^T W, which come in ascending order."""
    num_frozen = int((1.0 - unfreeze_rank_ratio) * min(weight.shape))
    sides = (torch.linalg.eigh(gram).eigenvectors for gram in (weight @ weight.T, weight.T @ weight))
    left, right = (vectors[:, vectors.shape[1] - num_frozen :] for vectors in sides)
    return left, right


def project_out(update: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(I - U_k U_k^T) X (I - V_k V_k^T)."""
    update = update - left @ (left.T @ update)
    return update - (update @ right) @ right.T


def _normalized_moments(model: Any, batches: list[Batch]) -> Weights:
    """d / tr(A) * A, A = sum of x x^T over the inputs of every linear layer, one position at a time."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    total: Weights = {}

    def hear(module: nn.Linear, inputs: tuple[Tensor]) -> None:
        for x in inputs[0].detach().reshape(-1, module.in_features):
            total[names[module.weight]] = total.get(names[module.weight], 0.0) + torch.outer(x, x)

    handles = [m.register_forward_pre_hook(hear) for m in model.modules() if isinstance(m, nn.Linear)]
    for batch in batches:
        hidden = model.base_model(input_ids=batch.corrupted_ids).last_hidden_state
        model.lm_head(hidden.flatten(0, 1)[batch.predicted])
    for handle in handles:
        handle.remove()
    return {name: len(moment) / moment.trace() * moment for name, moment in total.items()}


def _squares(model: Any, steps: Steps) -> Weights:
    """(1/N) sum_b (sum_{n in b} g_n)^2 over micro-batches b, one sequence at a time."""
    batches = [batch for step in steps for batch in step]
    inputs, corrupted = (torch.cat([vars(batch)[key] for batch in batches]) for key in ("input_ids", "corrupted_ids"))
    labels = torch.full_like(inputs, -100)
    first = 0
    for batch in batches:
        labels[first : first + len(batch.input_ids)].view(-1)[batch.predicted] = batch.targets
        first += len(batch.input_ids)
    size = len(inputs) // len(batches)
    means = reference_batch_gradients(model, inputs, corrupted, labels, "mlm", size)
    return {name: sum((size * mean[name]) ** 2 for mean in means) / len(inputs) for name in means[0]}
