"""How far masked units really move: masks on the gradient against masks on the update, under Adam and SGD.

Adam divides by the root of the squared gradient, so a constant factor on the gradient cancels: m -> c m, v -> c^2 v.
A small RoBERTa with random weights learns to predict tokens of a fixed stream, once with and once without the mask;
the table gives the movement of FFN rows with the mask over that without, next to what was intended, 1 - I.

Run: `python -m benchmarks.adam_mask`
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, RobertaConfig, RobertaForMaskedLM

from benchmarks.environment import print_table, write_result
from tests.helpers.reference import Batch, Units, full_masks, normalise, unit_ones

MASK_TOKEN = 4
FIRST_WORD = 5


@dataclass(frozen=True)
class Sizes:
    """The task: a network that is large enough for a table and small enough for a minute."""

    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 512
    num_layers: int = 2
    vocab_size: int = 1000
    batch_size: int = 8
    sequence_length: int = 64
    num_steps: int = 60


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    optimizer: Literal["adamw", "sgd"]
    learning_rate: float
    eps: float
    apply_to: Literal["update", "gradient"]

    @property
    def title(self) -> str:
        """The optimizer as the table names it."""
        return "SGD" if self.optimizer == "sgd" else f"AdamW eps {self.eps:.0e}"


# The rates are small so that free and masked rows see nearly the same loss; a free row that has learned its part slows
# down, and its masked twin then seems to move too far (AdamW, update, all units: 0.51 at 1e-4, 0.45 at 2e-5).
SETTINGS = (
    Setting("adamw", 2e-5, 1e-8, "gradient"),
    Setting("adamw", 2e-5, 1e-6, "gradient"),
    Setting("adamw", 2e-5, 1e-8, "update"),
    Setting("sgd", 1e-1, 0.0, "gradient"),
    Setting("sgd", 1e-1, 0.0, "update"),
)

Train = Callable[[PreTrainedModel, list[Batch], Units | None, Setting], dict[str, Tensor]]
"""Trains a copy of the model (mask only, no contrast) and returns its parameters by name."""


def build_model(sizes: Sizes) -> PreTrainedModel:
    """RoBERTa with random weights and without dropout."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_heads,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        max_position_embeddings=sizes.sequence_length + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return RobertaForMaskedLM(config)


def build_batches(sizes: Sizes) -> list[Batch]:
    """One batch per step; word frequencies follow Zipf's law and 15 % of the tokens are masked."""
    generator = torch.Generator().manual_seed(1)
    weights = 1 / torch.arange(1, sizes.vocab_size - FIRST_WORD + 1)
    shape, num_tokens = (sizes.batch_size, sizes.sequence_length), sizes.batch_size * sizes.sequence_length
    batches: list[Batch] = []
    for _ in range(sizes.num_steps):
        flat = FIRST_WORD + torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
        predicted = torch.randperm(num_tokens, generator=generator)[: round(0.15 * num_tokens)]
        corrupted = flat.index_fill(0, predicted, MASK_TOKEN)
        batches.append(
            {
                "input_ids": flat.view(shape),
                "corrupted_ids": corrupted.view(shape),
                "predicted": predicted,
                "targets": flat[predicted],
            }
        )
    return batches


def draw_importance(model: PreTrainedModel) -> Units:
    """|tanh z| of standard normal importance, for all unit groups."""
    generator = torch.Generator().manual_seed(2)
    return {group: normalise(torch.randn(ones.shape, generator=generator)) for group, ones in unit_ones(model).items()}


def train_plain(
    model: PreTrainedModel, batches: list[Batch], importance: Units | None, setting: Setting
) -> dict[str, Tensor]:
    """The `Train` function in one process, with torch's optimizers and full tensors."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    scales = full_masks(model, importance) if importance else {name: torch.ones(()) for name in parameters}
    if setting.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters.values(), lr=setting.learning_rate)
    else:
        optimizer = torch.optim.AdamW(parameters.values(), lr=setting.learning_rate, eps=setting.eps)
    for batch in batches:
        optimizer.zero_grad()
        torch.autograd.backward(mlm_loss(model, batch))
        before = {name: value.detach().clone() for name, value in parameters.items()}
        if setting.apply_to == "gradient":
            scale_gradients(parameters, scales)
        optimizer.step()
        if setting.apply_to == "update":
            for name, value in parameters.items():
                value.data = before[name] + scales[name] * (value.data - before[name])
    return {name: value.detach() for name, value in parameters.items()}


def mlm_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy at the predicted positions."""
    logits = model(input_ids=batch["corrupted_ids"]).logits.flatten(0, 1)[batch["predicted"]]
    return cross_entropy(logits, batch["targets"])


def scale_gradients(parameters: dict[str, nn.Parameter], scales: dict[str, Tensor]) -> None:
    """g <- (1 - I) * g."""
    for name, value in parameters.items():
        if value.grad is not None:
            value.grad *= scales[name]


def ffn_movement(start: dict[str, Tensor], end: dict[str, Tensor]) -> Tensor:
    """Euclidean movement of each row of the FFN's weights, intermediate rows and then output rows, (L * (F + H),)."""
    names = [
        name
        for part in ("intermediate.dense.weight", "output.dense.weight")
        for name in start
        if name.endswith(part) and "attention" not in name
    ]
    return torch.cat([(end[name] - start[name]).norm(dim=1) for name in names])


def measure(train: Train, sizes: Sizes, settings: tuple[Setting, ...] = SETTINGS) -> list[dict[str, Any]]:
    """One row per setting: mean ratio of movement over all units and over units with I >= 0.9."""
    model, batches = build_model(sizes), build_batches(sizes)
    importance = draw_importance(model)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    units = torch.cat([importance["intermediate"].flatten(), importance["output"].flatten()])
    protected = units >= 0.9
    rows: list[dict[str, Any]] = []
    free: dict[str, Tensor] = {}
    for setting in settings:
        if setting.title not in free:
            free[setting.title] = ffn_movement(start, train(model, batches, None, setting))
        ratio = ffn_movement(start, train(model, batches, importance, setting)) / free[setting.title]
        rows.append(
            {
                "optimizer": setting.title,
                "mask applied to": setting.apply_to,
                "all units": ratio.mean().item(),
                "all units, intended": (1 - units).mean().item(),
                "I >= 0.9": ratio[protected].mean().item(),
                "I >= 0.9, intended": (1 - units[protected]).mean().item(),
            }
        )
    return rows


def main() -> None:
    """Measures in one process on the CPU, prints the table and writes the result file."""
    torch.set_num_threads(1)
    sizes = Sizes()
    rows = measure(train_plain, sizes)
    print_table(rows)
    settings = {**asdict(sizes), "rows": [asdict(setting) for setting in SETTINGS]}
    print(f"written to {write_result('adam_mask', torch.device('cpu'), settings, rows).name}")


if __name__ == "__main__":
    main()
