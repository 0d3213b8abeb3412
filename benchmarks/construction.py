"""Peak host memory per rank while a model is built at ZeRO-3: complete on every rank, or initialized sharded.

Every measurement starts two new processes; the baseline is the memory after importing the packages.

Run: `python -m benchmarks.construction`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_io import print_table, write_result
from das_ds.config.deepspeed import build_engine_config

NUM_RANKS = 2
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 514,
}
MIB = 2**20
# glibc returns large blocks to the system immediately, at the latest from 32 MiB on. The matrices of this model are
# smaller than those of real models; without this setting, the holes between them would be measured.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}


def main() -> None:
    """Measure and write the table."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model_mib = _save_model(Path(folder))
        for source in ("random", "pretrained"):
            for way in ("nothing", "whole", "shards", "whole, engine", "shards, engine"):
                peaks = _measure(way, source, folder)
                rows.append({"weights": source, "built": way, "peak MiB per rank": max(peaks)})
    for row in rows:
        baseline = next(r for r in rows if r["weights"] == row["weights"] and r["built"] == "nothing")
        row["of which model MiB"] = row["peak MiB per rank"] - baseline["peak MiB per rank"]
    settings = {
        "model": MODEL,
        "model_mib": round(model_mib),
        "num_ranks": NUM_RANKS,
        "precision": "bf16",
        "zero_stage": 3,
    } | MALLOC
    print_table(rows)
    print(write_result("construction", torch.device("cpu"), settings, rows))


def _save_model(folder: Path) -> float:
    """Write the weights and return their size in MiB."""
    model = _load("random", str(folder), None)
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(parameter.numel() * 4 for parameter in model.parameters()) / MIB


def _measure(way: str, source: str, folder: str) -> list[int]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={NUM_RANKS}",
        "--no-python",
    ]
    command = [*launcher, sys.executable, "-m", "benchmarks.construction", way, source, folder]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC})
    if process.returncode:
        raise RuntimeError(f"{way}, {source}: exit code {process.returncode}\n{process.stderr[-2000:]}")
    return json.loads((Path(folder) / "peaks.json").read_text())


def _load(source: str, folder: str, construction: Any) -> Any:
    from das_ds.config import ModelConfig
    from das_ds.models.loading import load_model

    random = ModelConfig(config={"model_type": "roberta", **MODEL})
    config = random if source == "random" else ModelConfig(name_or_path=folder)
    return load_model(config, seed=0, vocab_size=MODEL["vocab_size"], construction=construction)[0]


def _rank(way: str, source: str, folder: str) -> None:
    """One rank of one measurement."""
    from benchmarks.harness import run_config
    from das_ds.distributed.process_group import init_process_group
    from das_ds.engine.engine import Engine
    from das_ds.engine.sharded_init import sharded_init
    from das_ds.models.architectures.registry import spec_for
    from das_ds.models.language_model import LanguageModel

    ranks = init_process_group()
    train = {"precision": "bf16", "micro_batch_size": 1, "global_batch_size": NUM_RANKS}
    config = run_config(MODEL, train, {"name": "ncl"}, sequence_length=128, zero_stage=3)
    engine_config = build_engine_config(config, NUM_RANKS)
    _build_tiny_model()
    if way != "nothing":
        construction = sharded_init(engine_config, ranks) if way.startswith("shards") else None
        model = _load(source, folder, construction)
        if way.endswith("engine"):
            exact = construction.take_exact_weights() if construction else None
            module = LanguageModel(model, spec_for("roberta"))
            Engine(module, dict(model.named_parameters()), config.train, engine_config, ranks, exact)
    peaks = ranks.all_gather_cpu(torch.tensor([_peak_mib()]), 1).tolist()
    if ranks.info.is_main:
        (Path(folder) / "peaks.json").write_text(json.dumps(peaks))
    ranks.barrier()


def _build_tiny_model() -> None:
    """Import everything that building a model imports, so that it counts in the baseline."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    RobertaForMaskedLM(RobertaConfig(vocab_size=16, **sizes))


def _peak_mib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 // MIB


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _rank(*sys.argv[1:])
    else:
        main()
