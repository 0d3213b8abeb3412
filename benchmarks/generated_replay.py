"""Forgetting of a small decoder with and without text that it generates itself, replayed or protected by directions.

A LLaMA of about a million parameters is pre-trained on the general corpus, and then learns two domains from there.
Reported are the losses on held-out text in nats per token: what each domain is learned to, how far the loss on general
text rises, which only `real text` and `general text` may read again, and how far that on the first domain rises.

The base model is the same for all seeds; a seed decides on the order of text and on what is generated.

Run: `DAS_DS_DATA=... python -m benchmarks.generated_replay [--seeds 3] [--steps 60] [--base-steps 700]`
"""

from __future__ import annotations

import argparse
import lzma
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.domains.data import GENERAL, check_files, corpus, data_folder
from benchmarks.result_io import print_table, write_result
from das_ds.config import RunConfig
from das_ds.distributed.process_group import ProcessGroup, init_process_group
from das_ds.reporting.results import Results
from das_ds.training.train import train
from launch.demo_corpora import train_tokenizer

DOMAINS = ("restaurant", "acl")
VOCAB_SIZE = 2000
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 352,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
FRACTION = 0.25
GENERATED = {"fraction": FRACTION, "source": "generated", "generation": {"num_sequences": 512, "batch_size": 128}}
GENERATED_KL = {**GENERATED, "loss": "kl", "kl_weight": 3.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "naive": {"name": "ncl"},
    "naive, 0.5 x rate": {"name": "ncl"},
    "generated, ce": {"name": "ncl", "replay": GENERATED},
    "generated, kl x 3": {"name": "ncl", "replay": GENERATED_KL},
    "real text, ce": {"name": "ncl", "replay": {"fraction": FRACTION, "general": True}},
    "directions": {"name": "directions", "general": False},
    "directions, general text": {"name": "directions", "general": True},
    "directions, generated, kl x 3": {"name": "directions", "general": False, "replay": GENERATED_KL},
    "directions, general: generated, kl x 3": {"name": "directions", "general": "generated", "replay": GENERATED_KL},
}
"""Name -> section `method`. Naive training at a lower rate learns and forgets less: to compare with at equal learning.
With `kl_weight` 3 the means over new and replayed text have equal weights. `real text` is that of earlier domains and
the general corpus, in equal shares. `directions` protects earlier domains, and with `general` also the general text, or
what the base model wrote."""

RATES = {"naive, 0.5 x rate": 0.5}
"""Name -> factor of the learning rate, if it is not 1."""


def run_values(
    folder: Path, data: Path, domains: tuple[str, ...], *, steps: int, rate: float, seed: int
) -> dict[str, Any]:
    """Config of a run; the caller adds the model."""
    return {
        "output_dir": str(folder),
        "domains": [corpus(data, name) for name in domains],
        "data": {"sequence_length": 64},
        "train": {
            "steps_per_domain": steps,
            "global_batch_size": 16,
            "micro_batch_size": 16,
            "learning_rate": rate,
            "precision": "fp32",
            "log_interval": 50,
        },
        "evaluation": {"batch_size": 64, "max_sequences": 256},
        "checkpoint": {"interval": 10**6},
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "wandb": {"mode": "disabled"},
        "seed": seed,
    }


def pretrain(folder: Path, data: Path, steps: int, ranks: ProcessGroup) -> Path:
    """The base model's folder."""
    tokenizer = folder / "tokenizer"
    text = lzma.decompress(Path(corpus(data, GENERAL)["train"][0]).read_bytes()).decode()
    train_tokenizer(text.splitlines(), VOCAB_SIZE).save_pretrained(tokenizer)
    values = run_values(folder / "base", data, (GENERAL,), steps=steps, rate=2e-3, seed=0)
    values["model"] = {"config": MODEL}
    values["method"] = "ncl"
    values["data"] = {**values["data"], "tokenizer": str(tokenizer), "cache_dir": str(folder / "cache")}
    train(RunConfig.model_validate(values), ranks)
    return folder / "base" / "domains" / f"00_{GENERAL}" / "model"


def continue_on_domains(
    folder: Path, data: Path, base: Path, name: str, seed: int, steps: int, rate: float, ranks: ProcessGroup
) -> Results:
    """The results of one variant with one seed."""
    rate *= RATES.get(name, 1.0)
    values = run_values(folder / name.replace(" ", "_") / str(seed), data, DOMAINS, steps=steps, rate=rate, seed=seed)
    values["model"] = {"name_or_path": str(base)}
    values["general"] = corpus(data, GENERAL)
    values["method"] = VARIANTS[name]
    values["data"] = {**values["data"], "cache_dir": str(folder / "cache")}
    return train(RunConfig.model_validate(values), ranks)


def summarize(name: str, runs: list[Results]) -> dict[str, Any]:
    """Means over seeds, and the standard deviations of what is forgotten."""
    matrices = [run.loss_matrix for run in runs]
    learned = [statistics.mean(matrix[i + 1][i] for i in range(len(DOMAINS))) for matrix in matrices]
    general = [matrix[-1][len(DOMAINS)] - matrix[0][len(DOMAINS)] for matrix in matrices]
    earlier = [
        statistics.mean(matrix[-1][i] - matrix[i + 1][i] for i in range(len(DOMAINS) - 1)) for matrix in matrices
    ]
    spread = statistics.stdev if len(runs) > 1 else lambda _: 0.0
    return {
        "variant": name,
        "loss after learning": statistics.mean(learned),
        "general loss, change": statistics.mean(general),
        "sd": spread(general),
        "first domain, change": statistics.mean(earlier),
        "sd of first": spread(earlier),
        "final loss, all": statistics.mean(statistics.mean(matrix[-1][: len(DOMAINS) + 1]) for matrix in matrices),
        "seconds": statistics.mean(run.wall_seconds for run in runs),
        "seeds": len(runs),
    }


def main() -> None:
    """Print a table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--steps", type=int, default=60, help="steps of each domain")
    parser.add_argument("--base-steps", type=int, default=700, help="steps of pre-training")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the domains")
    parser.add_argument("--folder", type=Path, help="for models and runs, which are continued there (a temporary one)")
    options = parser.parse_args()
    data = data_folder()
    check_files(data, (GENERAL, *DOMAINS))
    ranks = init_process_group()
    with TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        base = pretrain(folder, data, options.base_steps, ranks)
        results: dict[str, list[Results]] = {name: [] for name in VARIANTS}
        # Seeds outermost: a machine that gets slower does so for every variant.
        for seed in range(options.seeds):
            for name, runs in results.items():
                runs.append(continue_on_domains(folder, data, base, name, seed, options.steps, options.rate, ranks))
        rows = [summarize(name, runs) for name, runs in results.items()]
    print_table(rows)
    settings = {
        "model": MODEL,
        "vocab_size": VOCAB_SIZE,
        "domains": list(DOMAINS),
        "variants": VARIANTS,
        "rates": RATES,
        "steps": options.steps,
        "base_steps": options.base_steps,
        "learning_rate": options.rate,
        "base_loss_matrix_row": {
            name: loss
            for name, loss in zip(results["naive"][0].eval_domains, results["naive"][0].loss_matrix[0], strict=True)
        },
    }
    print(write_result("generated_replay", ranks.info.device, settings, rows))


if __name__ == "__main__":
    main()
