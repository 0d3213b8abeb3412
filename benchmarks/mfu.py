"""Tokens per second and model FLOPs utilization (MFU) of a training step, by method, on one rank.

Plain training (`ncl`), and das with importance of units (with its contrast), of single weights, and of directions; the
masks are those that the method itself measures on the benchmark's batch, so the end of a domain is timed as well. Every
method has a process of its own, so that its peak of memory is its own.

MFU (Chowdhery et al., *PaLM*, 2022, appendix B) is the FLOP/s that plain training would need for the tokens trained
per second, over the device's peak: recomputation, contrast and masks are not useful work in its sense.

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
from torch import nn

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
    # The shape of Llama-3.2-1B with an LM head of its own: 1.50 B weights.
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
FIRST_WORD, LAST_WORD = 5, 499
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
    """Timed, after two that are not."""


def build_config(work: Workload, method: str) -> RunConfig:
    """A run of one method; the optimizer's settings are the package's own."""
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
    """Random words: every token predicts the next one (`clm`), or a share of them is masked (`mlm`)."""
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
    """FLOPs of the matrix products of a plain step, forward and backward.

        6 T sum(body weights) + 6 P sum(head weights) + 12 T S sum over layers of heads x head size

    A weight of a linear layer takes 2 FLOPs per token forward and 4 backward; attention takes 4 S x width per token
    and layer forward, and twice that backward. T tokens, S of them in a row, of which P are predicted, since the head
    runs at those alone; causal attention is counted whole, as in PaLM.

    Args:
        model: a Hugging Face network with its LM head, on any device.
        batch: of a plain step.
    """
    num_tokens, length = batch.input_ids.numel(), batch.input_ids.shape[1]
    in_body = {id(module) for module in model.base_model.modules()}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    body = sum(module.weight.numel() for module in linear if id(module) in in_body)
    head = sum(module.weight.numel() for module in linear if id(module) not in in_body)
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_width = config.num_hidden_layers * config.num_attention_heads * head_size
    return 6 * num_tokens * body + 6 * batch.num_predicted * head + 12 * num_tokens * length * attention_width


def measured(work: Workload, method_name: str) -> dict[str, Any]:
    """One method: steps before and after what it protects is measured; to be called in a process of its own."""
    ranks, device = init_process_group(), default_device()
    config = build_config(work, method_name)
    with torch.device("meta"):
        skeleton = build_model(config)
    batch = build_batch(work, spec_for(skeleton.config.model_type).objective)
    flops = model_flops(skeleton, batch)
    batch = batch.to(device)
    with TemporaryDirectory() as folder:
        domain = _domain(batch, Path(folder))
        method = build_method(config, ranks, domain)
        token_scale = torch.tensor(1 / batch.num_predicted, device=device)
        _step_seconds(method, batch, token_scale, device)
        begin = now(device)
        method.after_domain(domain)
        end_of_domain = now(device) - begin
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


def _domain(batch: Batch, folder: Path) -> DomainContext:
    """A domain whose sample is the benchmark's batch."""
    return DomainContext(
        0, "random", lambda label: ResumableLoop([batch]), lambda label: ResumableLoop([[batch]]), folder, folder
    )


def _step_seconds(method: Method, batch: Batch, token_scale: torch.Tensor, device: torch.device) -> float:
    begin = now(device)
    for _ in optimizer_step(method, batch, token_scale):
        pass
    return now(device) - begin


def _child(work: Workload, method: str, results: Any) -> None:
    results.put(measured(work, method))


def in_own_process(work: Workload, method: str, timeout: float) -> dict[str, Any] | None:
    """The row of one method; None where its process failed, which has then said why."""
    # A forked process could not use a GPU that its parent has looked at.
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
    """Measures all methods, prints the table and writes the result file after each of them."""
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
    methods, timeout = options.pop("methods"), options.pop("timeout")
    work, device = Workload(**options), default_device()
    peak = vendor_peak(device_name(device), work.precision)
    source = "data sheet"
    if peak is None:
        peak, source = measured_peak(device, work.precision, size=1024), "largest matrix product measured here"
    rows: list[dict[str, Any]] = []
    for method in methods:
        row = in_own_process(work, method, timeout)
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
