"""Rank of masks of directions: what low-rank and sketched projectors give instead of the exact one.

das_ds trains the base encoder on three domains, a few steps each. The moments of the inputs of its linear layers after
each domain, summed as the method `directions` sums them, are masked exactly, with ranks d/12, d/6, d/3 and `auto`, and
from sketches of these ranks. Reported, relative to the exact mask and as a mean over layers: leak tr(P M P) / tr(M),
the share of earlier inputs' energy that an update can disturb; plasticity tr(P) / d; and leak / plasticity^2, which
says how much more leaks at equal learning, as it does not depend on the scale of P.

Run: `DAS_DS_DATA=... python -m benchmarks.direction_rank`
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from benchmarks.domains.base import HeadTraining, base_encoder
from benchmarks.domains.data import corpus, data_folder
from benchmarks.domains.jobs import TrainingRun
from benchmarks.result_io import print_table, write_result
from das_ds.config import RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import TrainingError
from das_ds.functional.directions import (
    MAX_FACTOR_ERROR,
    build_projector,
    direction_projector,
    normalized_second_moment,
    passing_energy,
    plasticity,
)
from das_ds.functional.moment_sketch import OVERSAMPLING, MomentSketch, RandomSigns
from das_ds.functional.projectors import DenseProjector, Projector
from das_ds.training.data_module import prepare_data

DOMAINS = ("restaurant", "acl", "pubmed")
STEPS = 32
"""Per domain, of 16 sequences of 64 tokens: 21 tokens per direction of the widest input, to train and to measure."""
SATURATIONS = (0.05, 0.2, 1.0, 3.0)
INPUTS = {
    "queries, keys, values": r"layer\.[035]\.attention\.self\.query$",
    "attention output": r"layer\.[035]\.attention\.output\.dense$",
    "up": r"layer\.[035]\.intermediate\.dense$",
    "down": r"layer\.[035]\.output\.dense$",
    "LM head transform": r"transform\.dense$",
    "LM head": r"decoder$",
}
"""Input -> the end of the name of a layer that reads it; of the first, a middle and the last layer."""
PARTS = {"d/12": 12, "d/6": 6, "d/3": 3}
CPU = torch.device("cpu")


def train(base: Path, data: Path, folder: Path) -> TrainingRun:
    """Naive training over the domains, unless it is done."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(base)},
        "domains": [corpus(data, domain) for domain in DOMAINS],
        "data": {"sequence_length": 64, "cache_dir": str(folder / "cache")},
        "train": {"steps_per_domain": STEPS, "global_batch_size": 16, "micro_batch_size": 16, "learning_rate": 2e-4},
        "evaluation": {"max_sequences": 32},
        "checkpoint": {"keep_last": 1},
        "method": {"name": "ncl"},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    run = TrainingRun(folder / "run", values, keeps_models=True)
    if not run.is_done():
        command = run.command()
        with run.log.open("w") as log:
            ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        if ended.returncode:
            raise TrainingError(f"direction_rank: training ended with exit code {ended.returncode}; see {run.log}")
        run.finish()
    return run


def accumulated_moments(run: TrainingRun) -> dict[str, Tensor]:
    """M by name of a layer: the sum over domains of the normalized second moments after each of them."""
    config = RunConfig.model_validate({"output_dir": "unused", **run.values})
    text = prepare_data(config, RankInfo(0, 0, 1, CPU), "mlm")
    total: dict[str, Tensor] = {}
    for index, stage in enumerate(config.stages):
        model = BertForMaskedLM.from_pretrained(str(run.model(index)), dtype=torch.float32).eval()
        for name, moment in second_moments(model, (batch for (batch,) in text.training_steps(stage))).items():
            total[name] = total.get(name, 0.0) + normalized_second_moment(moment)
    return total


@torch.no_grad()
def second_moments(model: BertForMaskedLM, batches: Iterator[Batch]) -> dict[str, Tensor]:
    """Sum of x x^T by name of a layer; layers of the LM head see predicted positions only."""
    sums: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        sums[name] = sums.get(name, 0.0) + rows.T @ rows

    for name, module in model.named_modules():
        if any(re.search(pattern, name) for pattern in INPUTS.values()):
            module.register_forward_pre_hook(partial(add, name))
    for batch in batches:
        hidden = model.bert(batch.corrupted_ids).last_hidden_state
        model.cls(hidden.flatten(0, 1)[batch.predicted])
    return sums


def compare(moment: Tensor, saturation: float) -> Iterator[tuple[str, dict[str, float]]]:
    """Form of the mask -> its numbers for one layer."""
    width = len(moment)
    exact = direction_projector(moment, saturation)
    leak = passing_energy(DenseProjector(exact), moment)
    learned = plasticity(DenseProjector(exact))
    for form, projector in build_forms(moment, saturation).items():
        leak_ratio = passing_energy(projector, moment) / leak
        learned_ratio = plasticity(projector) / learned
        difference = projector.project(torch.eye(width)) - exact
        yield (
            form,
            {
                "rank / d": projector.code_width / width,
                "exact leak": leak,
                "exact plasticity": learned,
                "leak": leak_ratio,
                "plasticity": learned_ratio,
                "leak / plasticity^2": leak_ratio / learned_ratio**2,
                "error": float(torch.linalg.eigvalsh(difference).abs().max()),
            },
        )


def build_forms(moment: Tensor, saturation: float) -> dict[str, Projector]:
    """Low-rank projectors and those of sketches."""
    width = len(moment)
    forms: dict[str, Projector] = {"auto": build_projector(moment, saturation, "auto")}
    for part, divisor in PARTS.items():
        rank = width // divisor
        forms[part] = build_projector(moment, saturation, rank)
        forms[f"{part}, sketch"] = sketched(moment, rank + OVERSAMPLING).projector(saturation, rank)
        forms[f"{part}, sketch of 2 r columns"] = sketched(moment, 2 * rank).projector(saturation, rank)
    forms["d/6, V in bfloat16"] = build_projector(moment, saturation, width // PARTS["d/6"], torch.bfloat16)
    return forms


def sketched(moment: Tensor, num_columns: int) -> MomentSketch:
    """What a sketch holds after all inputs: it is linear in the moment."""
    signs = RandomSigns(len(moment), num_columns, seed=0)
    return MomentSketch(signs, moment @ signs.on(CPU).float(), moment.diagonal().double().sum())


def mean_rows(moments: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row per input, saturation and form: means over layers, the largest of their errors."""
    rows: list[dict[str, Any]] = []
    for name, pattern in INPUTS.items():
        layers = [moment for layer, moment in moments.items() if re.search(pattern, layer)]
        for saturation in SATURATIONS:
            found: dict[str, list[dict[str, float]]] = defaultdict(list)
            for moment in layers:
                for form, numbers in compare(moment, saturation):
                    found[form].append(numbers)
            for form, of_layers in found.items():
                means = {key: sum(one[key] for one in of_layers) / len(of_layers) for key in of_layers[0]}
                means["error"] = max(one["error"] for one in of_layers)
                rows.append({"input": name, "d": len(layers[0]), "c": saturation, "form": form, **means})
    return rows


def eigenvalue_errors(moments: dict[str, Tensor]) -> dict[str, float]:
    """Largest eigenvalue of all moments, and how far eigenvalues in float32 are off, relative to the own largest."""
    largest = 0.0
    error = 0.0
    for moment in moments.values():
        exact = torch.linalg.eigvalsh(moment.double())
        largest = max(largest, float(exact[-1]))
        error = max(error, float((torch.linalg.eigvalsh(moment).double() - exact).abs().max() / exact[-1]))
    return {"largest_eigenvalue": largest, "float32_eigenvalue_error": error}


def main() -> None:
    """Trains, measures, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/direction_rank"), help="for the base model and runs")
    parser.add_argument("--base", type=Path, help="folder of base encoders; default: base/ in the folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.resolve()
    data = data_folder()
    bases = (options.base or folder / "base").resolve()
    base = base_encoder(bases, data, folder / "cache", HeadTraining(), CPU)
    moments = accumulated_moments(train(base, data, folder))
    rows = mean_rows(moments)
    print_table(rows)
    settings = {
        "base": base.name,
        "domains": DOMAINS,
        "steps_per_domain": STEPS,
        "tokens_per_step": 1024,
        "auto_error": MAX_FACTOR_ERROR,
        "oversampling": OVERSAMPLING,
        **eigenvalue_errors(moments),
    }
    print(f"written to {write_result('direction_rank', CPU, settings, rows).name}")


if __name__ == "__main__":
    main()
