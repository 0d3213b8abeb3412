"""What masks of directions leave of each input: measured on real ranks, and in plain torch in float64."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from das_ds.checkpoint.manifest import RunState
from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.functional.directions import Rank
from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.direction_plasticity import measure_plasticity, measure_protected
from das_ds.softmask.input_layout import build_input_layout
from das_ds.softmask.linear_inputs import find_masked_matrices
from das_ds.softmask.plasticity import InputPlasticity
from helpers.half import allow_fp16_on_cpu
from helpers.moments import SATURATION
from helpers.resume import BrokenOffError, Place, _breaking_run
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.training import build

Found = dict[str, InputPlasticity]


def random_moment(name: str, width: int, seed: int) -> Tensor:
    """A moment of fewer vectors than directions, with mean eigenvalue 1; of an input of this name."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    vectors = torch.randn(width // 2, width, generator=generator)
    moment = vectors.T @ vectors
    return moment / moment.diagonal().mean()


def find_plasticity(config: RunConfig, batches: list[Batch], rank: Rank) -> tuple[Found, Found]:
    """Before a domain whose text is in complete batches, and after one of other random moments."""
    ranks = init_process_group()
    run = build(config, ranks, **NO_DROPOUT)
    inputs = build_input_layout(find_masked_matrices(run), run.engine.weights.shards, ranks)
    own = inputs.owned_by(ranks.info.rank)
    sums = {n: random_moment(n, width, 0) if n in own else None for n, width in inputs.widths.items()}
    importance = DirectionImportance(run, inputs, sums, None)
    projectors = importance.build_projectors(SATURATION, rank)
    before = measure_plasticity(run, inputs, projectors, ResumableLoop(batches))
    latest = {n: random_moment(n, inputs.widths[n], 1) for n in own}
    after = measure_protected(run, inputs, importance.own_projectors(SATURATION, rank), latest)
    kept = measure_protected(run, inputs, projectors.items(), latest)
    assert kept == after, "projectors that a rank has for its steps are those that it computes as an owner"
    run.engine.close()
    return before, after


def expected_plasticity(batches: list[Batch]) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Weight -> (tr(P) / d, energy that passes), before and after, by the definitions: one vector after the other."""
    model: Any = nn.Module.to(copy.deepcopy(tiny_model(**NO_DROPOUT)), torch.float64).train(False)
    names = {module: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    energies = {name: [0.0, 0.0] for name in names.values()}
    first_readers = {name: name.replace(".key.", ".query.").replace(".value.", ".query.") for name in names.values()}
    first_readers["lm_head.decoder.weight"] = "roberta.embeddings.word_embeddings.weight"
    projectors = {}
    after = {}
    for module, name in names.items():
        width = module.in_features
        moment = random_moment(first_readers[name], width, 0).double()
        projector = torch.linalg.inv(torch.eye(width).double() + moment / SATURATION)
        projectors[module] = projector
        latest = random_moment(first_readers[name], width, 1).double()
        passing = (projector @ latest @ projector).trace() / latest.trace()
        after[name] = (projector.trace().item() / width, passing.item())

    def hear(module: nn.Linear, inputs: tuple[Tensor]) -> None:
        for x in inputs[0].detach().reshape(-1, module.in_features):
            energies[names[module]][0] += (x @ x).item()
            energies[names[module]][1] += (projectors[module] @ x).square().sum().item()

    handles = [module.register_forward_pre_hook(hear) for module in names]
    for batch in batches:
        hidden = model.base_model(input_ids=batch.corrupted_ids).last_hidden_state
        model.lm_head(hidden.flatten(0, 1)[batch.predicted])
    for handle in handles:
        handle.remove()
    before = {name: (after[name][0], passing / energy) for name, (energy, passing) in energies.items()}
    return before, after


def break_off_in(values: dict[str, Any], places: list[tuple[str, int]]) -> list[Place]:
    """Interrupt one start after the other in the second domain, each at the n-th save point in a phase."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    breaks: list[Place] = []
    for phase, number in places:
        passed = 0

        def is_there(run: RunState, phase: str = phase, number: int = number) -> bool:
            nonlocal passed
            passed += run.phase == phase and run.domains_done == 1
            return passed == number

        with suppress(BrokenOffError):
            _breaking_run(RunConfig(**values), ranks, is_there, breaks)
    return breaks
