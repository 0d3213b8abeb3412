"""Ablation of parameter groups: restore one group at a time to its values from before the last domain.

The fall in the loss on an earlier domain is the forgetting that the group's change has caused. The contributions of
groups interact, so they need not add up.
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
"""Group -> pattern in the names of its parameters; the first match counts. For BERT and LLaMA."""
TOGETHER = {"attention + FFN": ("attention", "FFN")}
NOTHING = "nothing"


@dataclass(frozen=True)
class RestoredLosses:
    """Held-out losses of a final model with one parameter group restored."""

    group: str
    losses: dict[str, float]
    """Corpus -> loss in nats."""


def group_parameters(names: list[str]) -> dict[str, list[str]]:
    """Group -> names of its parameters; empty groups are omitted.

    Raises:
        ModelError: a parameter belongs to no group.
    """
    groups: dict[str, list[str]] = {group: [] for group in PATTERNS}
    for name in names:
        group = next((group for group, pattern in PATTERNS.items() if re.search(pattern, name)), None)
        if group is None:
            raise ModelError(f"groups: found parameter {name}, expected one of {', '.join(PATTERNS)}")
        groups[group].append(name)
    for joint, members in TOGETHER.items():
        groups[joint] = [name for member in members for name in groups[member]]
    return {group: members for group, members in groups.items() if members}


def measure_restored_losses(run: TrainingRun, device: torch.device) -> list[RestoredLosses]:
    """Losses with nothing restored, then with each group restored.

    Args:
        run: finished, over at least two domains, with its exported models.
        device: to evaluate on, in float32.
    """
    config = load_config(run.config)
    last = len(run.results().domains) - 1
    before = ModelConfig(name_or_path=str(run.model(last - 1)))
    after = ModelConfig(name_or_path=str(run.model(last)))
    text = prepare_data(config, RankInfo(0, 0, 1, device), find_spec(after).objective)
    vocab_size = num_tokens(text.base_tokenizer.get_vocab())
    old_model, _ = load_model(before, seed=config.seed, vocab_size=vocab_size)
    model, spec = load_model(after, seed=config.seed, vocab_size=vocab_size)
    network = LanguageModel(model, spec, logits_mib=config.train.max_logits_mib).to(device)
    old_weights = dict(old_model.named_parameters())
    weights = dict(model.named_parameters())
    rows = [RestoredLosses(NOTHING, evaluate_corpora(network, text, ResumableLoops(show_progress=False)))]
    for group, names in group_parameters(list(weights)).items():
        with swapped_in({name: weights[name] for name in names}, old_weights):
            rows.append(RestoredLosses(group, evaluate_corpora(network, text, ResumableLoops(show_progress=False))))
    return rows


@contextmanager
def swapped_in(weights: dict[str, torch.nn.Parameter], values: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Within this block the weights have the values of the same names."""
    snapshot = {name: weight.detach().clone() for name, weight in weights.items()}
    _copy(weights, values)
    yield
    _copy(weights, snapshot)


@torch.no_grad()
def _copy(weights: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])
