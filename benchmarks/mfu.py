"""Tokens per second and model FLOPs utilization (MFU) of a training step, by method, on one rank.

Measured are plain training (`ncl`), and das with importance of units (with its contrastive loss), of single weights,
and of directions. Masks are measured by the method itself on the benchmark's batch, so the end of a domain is timed as
well. Every method runs in a separate process, so that its memory peak is measured separately.

MFU (Chowdhery et al., *PaLM*, 2022, appendix B) is the FLOP/s that plain training needs for the tokens trained per
second, divided by the device's peak; recomputation, the contrastive loss and masks do not count as useful work.

Run: `python -m benchmarks.mfu --model roberta-base [--batch-size 64 --sequence-length 512] [--precision bf16]`
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import build_method, build_model, optimizer_step, run_config
from benchmarks.peaks import TERA, measured_peak, vendor_peak
from benchmarks.result_io import default_device, device_name, print_table, write_result
from benchmarks.timing import now
from das_ds.config import RunConfig
from das_ds.context import DomainContext
from das_ds.data.batch import Batch
from das_ds.data.objectives import CausalLMCollator
from das_ds.distributed.process_group import init_process_group
from das_ds.distributed.resumable import ResumableLoop
from das_ds.methods.base import Method
from das_ds.models.architectures.registry import spec_for
from das_ds.models.flops import step_flops
from das_ds.tracking.throughput import peak_memory_gib

NAIVE = "ncl"
METHODS: dict[str, dict[str, Any]] = {
    NAIVE: {"name": "ncl"},
    "das unit": {"name": "das"},
    "das parameter": {"name": "das", "importance": {"granularity": "parameter"}, "contrastive": {"weight": 0.0}},
    "directions": {"name": "directions", "half_saturation": 3.0},
}
MODELS: dict[str, dict[str, Any]] = {
    "roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    # The shape of Llama-3.2-1B with an untied LM head: 1.50 B weights.
    "llama-1.5b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "tiny-encoder": {
        "model_type": "roberta",
        "vocab_size": 500,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
    },
    "tiny-decoder": {
        "model_type": "llama",
        "vocab_size": 500,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
}
MLM_PROBABILITY = 0.15
FIRST_WORD = 5
LAST_WORD = 499
WARM_UP = 2


@dataclass(frozen=True)
class Workload:
    """Sizes of one step."""

    model: str
    batch_size: int
    sequence_length: int
    precision: str
    zero_stage: int
    steps: int
    """Timed steps, after two warm-up steps."""


def build_config(work: Workload, method: str) -> RunConfig:
    """A run of one method with the default optimizer settings."""
    train = {
        "global_batch_size": work.batch_size,
        "micro_batch_size": work.batch_size,
        "precision": work.precision,
        "max_grad_norm": 1.0,
    }
    return run_config(
        MODELS[work.model],
        train,
        METHODS[method],
        sequence_length=work.sequence_length,
        zero_stage=work.zero_stage,
    )


def build_batch(work: Workload, objective: str) -> Batch:
    """Random tokens: each predicts the next one (`clm`), or a fraction of them is masked (`mlm`)."""
    generator = torch.Generator().manual_seed(1)
    shape = (work.batch_size, work.sequence_length)
    input_ids = torch.randint(FIRST_WORD, LAST_WORD, shape, generator=generator)
    if objective == "clm":
        return CausalLMCollator()(input_ids, range(work.batch_size), seed=0, stream="")
    flat = input_ids.flatten()
    predicted = torch.randperm(len(flat), generator=generator)[: round(MLM_PROBABILITY * len(flat))]
    return Batch(
        input_ids=input_ids,
        corrupted_ids=flat.index_fill(0, predicted, LAST_WORD).view(shape),
        predicted=predicted,
        targets=flat[predicted],
        row_weights=torch.ones(work.batch_size),
    )


def model_flops(model: Any, batch: Batch) -> int:
    """FLOPs of the matrix products of a plain step, forward and backward; see `das_ds.models.flops`.

    Args:
        model: a Hugging Face model with its LM head, on any device.
        batch: of a plain step.
    """
    return step_flops(
        model,
        num_tokens=batch.input_ids.numel(),
        num_predicted=batch.num_predicted,
        sequence_length=batch.input_ids.shape[1],
    ).total


def measure(work: Workload, method_name: str) -> dict[str, Any]:
    """Result row of one method: steps after its masks are measured; to be called in a new process."""
    ranks = init_process_group()
    device = default_device()
    config = build_config(work, method_name)
    with torch.device("meta"):
        skeleton = build_model(config)
    batch = build_batch(work, spec_for(skeleton.config.model_type).objective)
    flops = model_flops(skeleton, batch)
    batch = batch.to(device)
    with TemporaryDirectory() as folder:
        domain = build_domain(batch, Path(folder))
        method = build_method(config, ranks, domain)
        token_scale = torch.tensor(1 / batch.num_predicted, device=device)
        # One step first, to warm up libraries before the end of the domain is timed.
        _step_seconds(method, batch, token_scale, device)
        start = now(device)
        method.after_domain(domain)
        end_of_domain = now(device) - start
        method.on_train_start(domain)
        if device.type == "cuda":
            end_peak = peak_memory_gib()
            torch.cuda.reset_peak_memory_stats(device)
        else:
            end_peak = None
        for _ in range(WARM_UP):
            _step_seconds(method, batch, token_scale, device)
        timed = [_step_seconds(method, batch, token_scale, device) for _ in range(work.steps)]
    seconds = statistics.median(timed)
    row = {
        "method": method_name,
        "seconds": seconds,
        "fastest": min(timed),
        "tokens/s": batch.input_ids.numel() / seconds,
        "model TFLOP/s": flops / seconds / TERA,
        "end of domain (s)": end_of_domain,
        "peak GiB": peak_memory_gib(),
        "peak GiB before the masked steps": end_peak,
    }
    ranks.close()
    return row


def build_domain(batch: Batch, folder: Path) -> DomainContext:
    """A domain whose sample is the benchmark's batch."""
    return DomainContext(
        0, "random", lambda label, **_: ResumableLoop([batch]), lambda label: ResumableLoop([[batch]]), folder, folder
    )


def _step_seconds(method: Method, batch: Batch, token_scale: torch.Tensor, device: torch.device) -> float:
    start = now(device)
    for _ in optimizer_step(method, batch, token_scale):
        pass
    return now(device) - start


def _child(work: Workload, method: str, results: Any) -> None:
    results.put(measure(work, method))


def measure_in_new_process(work: Workload, method: str, timeout: float) -> dict[str, Any] | None:
    """Result row of one method; None if its process failed, which has then printed why."""
    # A forked process cannot use a GPU that its parent has initialized.
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_child, args=(work, method, results))
    process.start()
    deadline = time.monotonic() + timeout
    try:
        while results.empty() and process.is_alive() and time.monotonic() < deadline:
            process.join(0.2)
        return None if results.empty() else results.get()
    finally:
        process.kill()
        process.join()


def main() -> int:
    """Measure all methods and print the table; the result file is written after each of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="roberta-base")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences per step")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each method; their median counts")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each method")
    options = vars(parser.parse_args())
    methods = options.pop("methods")
    timeout = options.pop("timeout")
    work = Workload(**options)
    device = default_device()
    peak = vendor_peak(device_name(device), work.precision)
    source = "data sheet"
    if peak is None:
        peak = measured_peak(device, work.precision, size=1024)
        source = "largest matrix product measured here"
    rows: list[dict[str, Any]] = []
    for method in methods:
        row = measure_in_new_process(work, method, timeout)
        if row is None:
            print(f"{method}: failed or ran past {timeout:g} s")
            continue
        naive = next((other for other in (*rows, row) if other["method"] == NAIVE), None)
        row["over ncl"] = None if naive is None else row["seconds"] / naive["seconds"]
        row["MFU"] = row["model TFLOP/s"] * TERA / peak
        rows.append(row)
        settings = {**asdict(work), "peak TFLOP/s": peak / TERA, "peak from": source}
        path = write_result(f"mfu_{work.model}", device, settings, rows)
    if rows:
        print_table(rows)
        print(f"peak: {peak / TERA:.1f} TFLOP/s ({source}); written to {path.name}")
    return 0 if len(rows) == len(methods) else 1


if __name__ == "__main__":
    raise SystemExit(main())
