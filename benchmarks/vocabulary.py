"""Peak memory and time of a CLM step with a large vocabulary: all logits at once, or in chunks.

A two-layer Llama with random weights predicts every position of a batch; forward and backward pass, no update. The
peak is the memory of a step in addition to weights and gradients, measured in a separate process per form: on a CPU the
growth of the resident set, on a GPU that of the allocator's peak. Times are those of the fastest step, taken in turns.

* at once: one chunk with every position;
* in chunks: the package's default, for a projection that is a plain linear layer;
* in chunks, wrapped: the same for any other projection, which is recomputed under activation checkpointing.

Run: `python -m benchmarks.vocabulary [--precision bf16] [--logits-mib 256]`
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.result_io import default_device, print_table, write_result
from benchmarks.timing import fastest_in_turns
from das_ds.config import TrainConfig
from das_ds.kernels.dispatch import use_liger
from das_ds.models.lm_loss import ChunkedLMLoss, positions_per_chunk

AT_ONCE = "at once"
IN_CHUNKS = "in chunks"
WRAPPED = "in chunks, wrapped"
FORMS = (AT_ONCE, IN_CHUNKS, WRAPPED)
MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """Sizes of one step."""

    vocab_size: int = 128_000
    hidden_size: int = 512
    num_layers: int = 2
    batch_size: int = 8
    sequence_length: int = 512
    precision: str = "fp32"
    logits_mib: int = TrainConfig().max_logits_mib
    repeats: int = 3


class Wrapped(nn.Module):
    """A projection that is not an `nn.Linear`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the inner projection."""
        return self.inner(hidden)


def build_model(work: Workload) -> PreTrainedModel:
    """A Llama with an untied LM head."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=4 * work.hidden_size,
        num_hidden_layers=work.num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=work.sequence_length,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=DTYPES[work.precision])


def step(model: PreTrainedModel, compute_losses: ChunkedLMLoss, input_ids: torch.Tensor) -> float:
    """Forward and backward pass over all positions; the mean loss."""
    hidden = model.base_model(input_ids=input_ids).last_hidden_state.flatten(0, 1)
    loss = compute_losses(hidden, input_ids.roll(-1, dims=1).flatten(), max_positions=input_ids.numel()).mean()
    loss.backward()
    return loss.item()


def resident_mib(key: str) -> float:
    """`VmRSS` (current) or `VmHWM` (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def chunk_size(form: str, work: Workload) -> int:
    """Positions per chunk of one form."""
    if form == AT_ONCE:
        return work.batch_size * work.sequence_length
    return positions_per_chunk(work.vocab_size, work.logits_mib)


def build_step(form: str, work: Workload, model: PreTrainedModel) -> Callable[[], float]:
    """The step of one form, after a warm-up on a few positions, which allocates gradients and loads libraries."""
    device = next(model.parameters()).device
    head = Wrapped(model.lm_head) if form == WRAPPED else model.lm_head
    compute_losses = ChunkedLMLoss(head, head, chunk=chunk_size(form, work))
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(work.vocab_size, (work.batch_size, work.sequence_length), generator=generator).to(device)
    step(model, compute_losses, input_ids[:1, :8])
    return partial(step, model, compute_losses, input_ids)


def measure_peak(form: str, work: Workload) -> dict[str, Any]:
    """Peak memory and loss of one step, in a fresh process."""
    device = default_device()
    run_step = build_step(form, work, build_model(work).to(device))
    if device.type != "cuda":
        before = resident_mib("VmRSS")
        loss = run_step()
        return {"peak MiB": round(resident_mib("VmHWM") - before), "loss": loss}
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss = run_step()
    return {"peak MiB": round((torch.cuda.max_memory_allocated(device) - before) / MIB), "loss": loss}


def measure_seconds(work: Workload) -> dict[str, float]:
    """Form -> seconds of its fastest step."""
    device = default_device()
    model = build_model(work).to(device)
    steps = {form: build_step(form, work, model) for form in FORMS}
    return fastest_in_turns(steps, device, repeats=work.repeats, warm_up=0)


def run_in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """The result of `function(*args)` in a new process, because the peak of a resident set is that of its process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(work: Workload) -> list[dict[str, Any]]:
    """One row per form."""
    peaks = {form: run_in_new_process(measure_peak, form, work) for form in FORMS}
    seconds = run_in_new_process(measure_seconds, work)
    is_fused = use_liger("linear_cross_entropy", torch.empty(0, dtype=DTYPES[work.precision], device=default_device()))
    return [
        {
            "logits": form,
            "kernel": "Liger" if is_fused and form == IN_CHUNKS else "torch",
            "positions per chunk": chunk_size(form, work),
            **peaks[form],
            "seconds": seconds[form],
            "peak over at once": peaks[form]["peak MiB"] / peaks[AT_ONCE]["peak MiB"],
            "seconds over at once": seconds[form] / seconds[AT_ONCE],
        }
        for form in FORMS
    ]


def main() -> None:
    """Measures all forms, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--precision", choices=tuple(DTYPES), default=Workload.precision)
    for name in ("vocab_size", "hidden_size", "num_layers", "batch_size", "sequence_length", "logits_mib", "repeats"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Workload, name))
    work = replace(Workload(), **vars(parser.parse_args()))
    rows = measure(work)
    print_table(rows)
    path = write_result("vocabulary", default_device(), asdict(work), rows)
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
