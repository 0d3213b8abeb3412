"""Rank of masks of directions: what low-rank and sketched projectors give instead of the exact one.

das_ds trains the base encoder on three domains with the method `directions`, a few steps each. The accumulated moments
of the inputs of its linear layers are masked exactly, with ranks d/12, d/6, d/3 and `auto`, and from sketches of these
ranks. Reported, relative to the exact mask and as a mean over layers: leak tr(P M P) / tr(M), the share of earlier
inputs' energy that an update can disturb; plasticity tr(P) / d; and leak / plasticity^2, which says how much more leaks
at equal learning, as it does not depend on the scale of P. They follow from eigenvalues; that the projectors have these
is what the tests of `das_ds.functional` show.

Run: `DAS_DS_DATA=... python -m benchmarks.direction_rank`
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.domains.base import HeadTraining, base_encoder
from benchmarks.domains.data import corpus, data_folder
from benchmarks.domains.jobs import TrainingRun
from benchmarks.domains.plan import merge_values
from benchmarks.domains.tiers import CPU as TIER
from benchmarks.moment_sketch import OVERSAMPLING, decompose_sketch, random_signs
from benchmarks.result_io import print_table, write_result
from das_ds.errors import TrainingError
from das_ds.functional.directions import MAX_FACTOR_ERROR, Flattening, best_flattening, smallest_flattening
from das_ds.run_dir import DIRECTIONS_FILE

DOMAINS = ("restaurant", "acl", "pubmed")
NUM_STEPS = 20
"""Per domain, of 16 sequences of 64 tokens."""
NUM_SAMPLES = 512
"""Sequences per domain that are measured: 21 tokens per direction of the widest input."""
SATURATIONS = (0.05, 0.2, 1.0, 3.0)
INPUTS = {
    "queries, keys, values": r"layer\.[035]\.attention\.self\.query\.weight$",
    "attention output": r"layer\.[035]\.attention\.output\.dense\.weight$",
    "up": r"layer\.[035]\.intermediate\.dense\.weight$",
    "down": r"layer\.[035]\.output\.dense\.weight$",
    "LM head transform": r"transform\.dense\.weight$",
    "LM head": r"word_embeddings\.weight$",
}
"""Input -> the end of the name of a weight that multiplies it; of the first, a middle and the last layer."""
PARTS = {"d/12": 12, "d/6": 6, "d/3": 3}
CPU = torch.device("cpu")


def train(base: Path, data: Path, folder: Path) -> Path:
    """The accumulated moments of a run over the domains, which is not repeated when it is done."""
    values = merge_values(
        {
            "model": {"name_or_path": str(base)},
            "domains": [corpus(data, domain) for domain in DOMAINS],
            "data": {"cache_dir": str(folder / "cache")},
            "train": {"learning_rate": 2e-4},
            "seed": 0,
            "method": {"name": "directions", "num_samples": NUM_SAMPLES},
        },
        TIER.settings,
        {"train": {"steps_per_domain": NUM_STEPS}},
    )
    run = TrainingRun(folder / "run", values, keeps_masks=True)
    if not run.is_done():
        command = run.command()
        with run.log.open("w") as log:
            ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        if ended.returncode:
            raise TrainingError(f"direction_rank: training ended with exit code {ended.returncode}; see {run.log}")
        run.finish()
    return run.folder / DIRECTIONS_FILE


def compare(moment: Tensor) -> Iterator[tuple[float, str, dict[str, float]]]:
    """Saturation, form of the mask, and its numbers for one layer."""
    width = len(moment)
    ascending = torch.linalg.eigvalsh(moment.double()).clamp_min(0.0)
    sketches = [sketch for part, divisor in PARTS.items() for sketch in sketched(moment, part, width // divisor)]
    for saturation in SATURATIONS:
        flattenings = {part: best_flattening(ascending, saturation, width // n) for part, n in PARTS.items()}
        # Without a flattening the dense form is cheaper, in which nothing is.
        auto = smallest_flattening(ascending, saturation) or Flattening(width, width, 1.0, 0.0)
        for form, flat in {"auto": auto, **flattenings}.items():
            factors = saturation / (saturation + ascending)
            factors[flat.start : flat.stop] = flat.tail
            leak = (ascending * factors.square()).sum()
            rank = width - (flat.stop - flat.start)
            yield saturation, form, relative_numbers(ascending, saturation, rank, leak, factors.sum())
        for form, eigenvalues, energies in sketches:
            num_flat = width - len(eigenvalues)
            tail = saturation / (saturation + (ascending.sum() - eigenvalues.sum()) / num_flat)
            factors = saturation / (saturation + eigenvalues)
            # P P = tau^2 I + V diag(s^2 - tau^2) V^T.
            leak = tail**2 * ascending.sum() + ((factors**2 - tail**2) * energies).sum()
            trace = factors.sum() + tail * num_flat
            yield saturation, form, relative_numbers(ascending, saturation, len(eigenvalues), leak, trace)


def relative_numbers(ascending: Tensor, saturation: float, rank: int, leak: Tensor, trace: Tensor) -> dict[str, float]:
    """Numbers of a mask from tr(P M P) and tr(P), next to those of the exact one."""
    exact = saturation / (saturation + ascending)
    exact_leak = (ascending * exact.square()).sum()
    leak_ratio = float(leak / exact_leak)
    learned_ratio = float(trace / exact.sum())
    return {
        "rank / d": rank / len(ascending),
        "exact leak": float(exact_leak / ascending.sum()),
        "exact plasticity": float(exact.mean()),
        "leak": leak_ratio,
        "plasticity": learned_ratio,
        "leak / plasticity^2": leak_ratio / learned_ratio**2,
    }


def sketched(moment: Tensor, part: str, rank: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Form, eigenvalues and v^T M v of their vectors v, from what sketches hold after all inputs."""
    for form, num_columns in {"sketch": rank + OVERSAMPLING, "sketch of 2 r columns": 2 * rank}.items():
        signs = random_signs(len(moment), num_columns)
        trace = float(moment.diagonal().double().sum())
        eigenvalues, vectors = decompose_sketch(signs, moment @ signs, trace, rank)
        yield f"{part}, {form}", eigenvalues, (vectors * (moment.double() @ vectors)).sum(dim=0)


def mean_rows(moments: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row per input, saturation and form: means over layers."""
    rows: list[dict[str, Any]] = []
    for name, pattern in INPUTS.items():
        layers = [moment for layer, moment in moments.items() if re.search(pattern, layer)]
        found: dict[tuple[float, str], list[dict[str, float]]] = defaultdict(list)
        for moment in layers:
            for saturation, form, numbers in compare(moment):
                found[saturation, form].append(numbers)
        for (saturation, form), of_layers in found.items():
            means = {key: sum(one[key] for one in of_layers) / len(of_layers) for key in of_layers[0]}
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
    """Trains, compares, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/direction_rank"), help="for the base model and the run"
    )
    parser.add_argument("--base", type=Path, help="folder of base encoders; default: base/ in the folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.resolve()
    data = data_folder()
    bases = (options.base or folder / "base").resolve()
    base = base_encoder(bases, data, folder / "cache", HeadTraining(epochs=6), CPU)
    moments = {
        name: moment
        for name, moment in load_file(train(base, data, folder)).items()
        if any(re.search(pattern, name) for pattern in INPUTS.values())
    }
    rows = mean_rows(moments)
    print_table(rows)
    settings = {
        "base": base.name,
        "domains": DOMAINS,
        "steps_per_domain": NUM_STEPS,
        "samples_per_domain": NUM_SAMPLES,
        "tokens_per_sample": TIER.settings["data"]["sequence_length"],
        "auto_error": MAX_FACTOR_ERROR,
        "oversampling": OVERSAMPLING,
        **eigenvalue_errors(moments),
    }
    print(f"written to {write_result('direction_rank', CPU, settings, rows).name}")


if __name__ == "__main__":
    main()
