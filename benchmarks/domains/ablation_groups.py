"""Which parameters carry the forgetting: put back one group at a time to what it was before the last domain.

What the loss on an earlier domain falls by when a group is put back is what this group's change has cost it. Shares of
groups need not add up: they work on each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks.domains.jobs import TrainingRun
from das_ds.config import ModelConfig
from das_ds.config.io import load_config
from das_ds.distributed.process_group import RankInfo
from das_ds.distributed.resumable import ResumableLoops
from das_ds.errors import ModelError
from das_ds.functional.token_ids import num_tokens
from das_ds.models.language_model import LanguageModel
from das_ds.models.loading import find_spec, load_model
from das_ds.training.data_module import prepare_data
from das_ds.training.evaluate import evaluate_corpora

PATTERNS = {
    "layer norms": r"(?<!transform\.)LayerNorm\.|layernorm\.|(^|\.)norm\.",
    "embeddings": r"embeddings\.|embed_tokens\.",
    "attention": r"\.attention\.|\.self_attn\.",
    "FFN": r"\.intermediate\.|\.output\.|\.mlp\.",
    "LM-head transform": r"\.transform\.",
    "decoder bias": r"cls\.predictions\.(decoder\.)?bias$",
}
"""Group -> what the names of its parameters contain; the first that fits counts. BERT and LLaMA."""
TOGETHER = {"attention + FFN": ("attention", "FFN")}
NOTHING = "nothing"


@dataclass(frozen=True)
class Restored:
    """Held-out losses of a last model with one group of parameters as it was before the last domain."""

    group: str
    losses: dict[str, float]
    """By corpus."""


def group_parameters(names: list[str]) -> dict[str, list[str]]:
    """Group -> parameters; groups without any are left out.

    Raises:
        ModelError: a parameter that no group has.
    """
    found: dict[str, list[str]] = {group: [] for group in PATTERNS}
    for name in names:
        group = next((group for group, pattern in PATTERNS.items() if re.search(pattern, name)), None)
        if group is None:
            raise ModelError(f"groups: found parameter {name}, expected one of {', '.join(PATTERNS)}")
        found[group].append(name)
    found |= {name: [one for part in parts for one in found[part]] for name, parts in TOGETHER.items()}
    return {group: members for group, members in found.items() if members}


def measure_restored_losses(run: TrainingRun, device: torch.device) -> list[Restored]:
    """First with nothing put back, then group by group.

    Args:
        run: done, over at least two domains, with its models.
        device: to evaluate on, in float32.
    """
    config, last = load_config(run.config), len(run.results().domains) - 1
    earlier, after = (ModelConfig(name_or_path=str(run.model(index))) for index in (last - 1, last))
    text = prepare_data(config, RankInfo(0, 0, 1, device), find_spec(after).objective)
    vocab_size = num_tokens(text.base_tokenizer.get_vocab())
    old, _ = load_model(earlier, seed=config.seed, vocab_size=vocab_size)
    model, spec = load_model(after, seed=config.seed, vocab_size=vocab_size)
    network = LanguageModel(model, spec, logits_mib=config.train.max_logits_mib).to(device)
    old_weights, weights = dict(old.named_parameters()), dict(model.named_parameters())
    rows = [Restored(NOTHING, evaluate_corpora(network, text, ResumableLoops(show_progress=False)))]
    for group, names in group_parameters(list(weights)).items():
        with replaced({name: weights[name] for name in names}, old_weights):
            rows.append(Restored(group, evaluate_corpora(network, text, ResumableLoops(show_progress=False))))
    return rows


@contextmanager
def replaced(weights: dict[str, torch.nn.Parameter], others: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """The weights have the values of those of the same names within this block."""
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    _set(weights, others)
    yield
    _set(weights, kept)


@torch.no_grad()
def _set(weights: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])
