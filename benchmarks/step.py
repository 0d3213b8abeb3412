"""Seconds per optimizer step, by phase: plain MLM and the released code's DAS step, at RoBERTa-base sizes.

All forms have the same sizes, batch, precision and optimizer, and are timed in one run; the best repeat counts.

Run: `python -m benchmarks.step [--repeats 3] [--precision bf16]`
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import RobertaConfig, RobertaForMaskedLM

from benchmarks.environment import default_device, print_table, write_result
from benchmarks.released_form import ATTENTION, ReleasedForm
from tests.helpers.reference import Units

MASK_TOKEN = 50264
FIRST_WORD = 5
IGNORED = -100
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Workload:
    """Sizes of one step; the network is RoBERTa-base with random weights unless `num_layers` says less."""

    batch_size: int = 4
    sequence_length: int = 164
    mlm_probability: float = 0.15
    num_layers: int = 12
    precision: str = "fp32"


class Form(Protocol):
    """One way to do an optimizer step."""

    def forward(self) -> Tensor:
        """The total loss."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""

    def update(self) -> None:
        """Optimizer step; clears gradients."""


Build = Callable[[Workload, torch.device], Form]


class PlainForm:
    """MLM training with the LM head at predicted positions only: the unit in which the other forms are counted."""

    def __init__(self, model: RobertaForMaskedLM, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
        self.model, self.optimizer, self.batch = model, optimizer, batch

    def forward(self) -> Tensor:
        """Mean cross-entropy at the predicted positions."""
        hidden = self.model.roberta(input_ids=self.batch["corrupted_ids"]).last_hidden_state
        logits = self.model.lm_head(hidden.flatten(0, 1)[self.batch["predicted"]])
        return cross_entropy(logits, self.batch["targets"])

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss."""
        torch.autograd.backward(loss)

    def update(self) -> None:
        """Optimizer step."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_batch(work: Workload, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Random words, a share of them masked; `labels` say the same as `predicted` and `targets`."""
    generator = torch.Generator().manual_seed(1)
    shape, num_tokens = (work.batch_size, work.sequence_length), work.batch_size * work.sequence_length
    flat = torch.randint(FIRST_WORD, vocab_size - 1, (num_tokens,), generator=generator)
    predicted = torch.randperm(num_tokens, generator=generator)[: round(work.mlm_probability * num_tokens)]
    targets = flat[predicted]
    batch = {
        "input_ids": flat.view(shape),
        "corrupted_ids": flat.index_fill(0, predicted, MASK_TOKEN).view(shape),
        "labels": torch.full_like(flat, IGNORED).index_put((predicted,), targets).view(shape),
        "predicted": predicted,
        "targets": targets,
    }
    return {name: value.to(device) for name, value in batch.items()}


def build_model(work: Workload, device: torch.device, attention: str) -> RobertaForMaskedLM:
    """RoBERTa-base sizes, random weights, dropout on."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_hidden_layers=work.num_layers,
    )
    model = RobertaForMaskedLM(config)
    model.set_attn_implementation(attention)
    nn.Module.to(model, device)
    model.train()
    return model


def build_optimizer(model: RobertaForMaskedLM) -> torch.optim.Optimizer:
    """AdamW in torch's fused form."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def build_importance(model: RobertaForMaskedLM, device: torch.device) -> Units:
    """Uniform importance in [0, 1)."""
    config, generator = model.config, torch.Generator().manual_seed(2)
    sizes = {"head": config.num_attention_heads, "intermediate": config.intermediate_size, "output": config.hidden_size}
    return {
        group: torch.rand(config.num_hidden_layers, size, generator=generator).to(device)
        for group, size in sizes.items()
    }


def build_plain(work: Workload, device: torch.device) -> Form:
    """Plain MLM with SDPA attention."""
    model = build_model(work, device, "sdpa")
    return PlainForm(model, build_optimizer(model), build_batch(work, model.config.vocab_size, device))


def build_released(work: Workload, device: torch.device) -> Form:
    """The released code's DAS step."""
    model = build_model(work, device, ATTENTION)
    batch = build_batch(work, model.config.vocab_size, device)
    return ReleasedForm(model, build_optimizer(model), batch, build_importance(model, device))


FORMS: dict[str, Build] = {"plain MLM": build_plain, "DAS, released form": build_released}


def time_step(form: Form, work: Workload, device: torch.device) -> dict[str, float]:
    """Seconds of each phase of one step."""
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=work.precision == "bf16")
    marks = [now(device)]
    with autocast:
        loss = form.forward()
    marks.append(now(device))
    form.backward(loss)
    marks.append(now(device))
    form.update()
    marks.append(now(device))
    return {phase: marks[index + 1] - marks[index] for index, phase in enumerate(PHASES)}


def now(device: torch.device) -> float:
    """The clock, once the device has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(work: Workload, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per form: seconds of its fastest step after one to warm up, and the ratio to the first form."""
    forms = {name: build(work, device) for name, build in FORMS.items()}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    # In turns, so that other load on the machine falls on every form alike.
    for _ in range(repeats + 1):
        for name, form in forms.items():
            steps[name].append(time_step(form, work, device))
    rows: list[dict[str, Any]] = []
    for name, timed in steps.items():
        best = min(timed[1:], key=lambda step: sum(step.values()))
        total = sum(best.values())
        rows.append({"step": name, "seconds": total, "ratio": total / rows[0]["seconds"] if rows else 1.0, **best})
    return rows


def main() -> None:
    """Times all forms, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per form; the fastest counts")
    parser.add_argument("--batch-size", type=int, default=Workload.batch_size, help="sequences per step")
    parser.add_argument("--num-layers", type=int, default=Workload.num_layers, help="12 is RoBERTa-base")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default=Workload.precision)
    options = parser.parse_args()
    work = Workload(batch_size=options.batch_size, num_layers=options.num_layers, precision=options.precision)
    device = default_device()
    rows = measure(work, device, options.repeats)
    print_table(rows)
    settings = {**asdict(work), "repeats": options.repeats}
    print(f"written to {write_result('step', device, settings, rows).name}")


if __name__ == "__main__":
    main()
