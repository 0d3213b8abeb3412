"""Small networks of every architecture with their inputs traced, without an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from das_ds.config import LoraConfig
from das_ds.data.batch import Batch
from das_ds.models.architectures.registry import spec_for
from das_ds.models.find_readers import find_readers
from das_ds.models.language_model import LanguageModel
from das_ds.models.lora import Lora
from das_ds.softmask.layer_inputs import LayerInputs
from das_ds.softmask.linear_inputs import ReceiveInput, record_layer_inputs, weigh_by_row
from das_ds.softmask.masked_matrix import MaskedMatrix
from helpers.lora import adapted
from helpers.tiny_models import CONFIGS, tiny_model

CONVOLUTION: dict[str, Any] = {"conv_kernel_size": 3, "conv_groups": 2, "share_att_key": False, "legacy": False}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in CONFIGS},
    "deberta-v2, convolution and newer head": ("deberta-v2", CONVOLUTION),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False}),
}
"""Name -> architecture and changes of its small config."""


@dataclass
class Traced:
    """A network and its inputs."""

    model: PreTrainedModel
    network: LanguageModel
    layers: LayerInputs
    lora: Lora | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def matrices(self) -> dict[str, MaskedMatrix]:
        """By name."""
        return {matrix.name: matrix for matrix in self.layers.matrices}

    def run(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and losses, without gradients."""
        with torch.no_grad():
            hidden, losses = self.network(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        return hidden, losses

    def record(self, batch: Batch, receive: ReceiveInput, inputs: set[str] | None = None) -> torch.Tensor:
        """Hidden states of one forward pass whose inputs are received."""
        wanted = set(self.layers.sites) if inputs is None else inputs
        with record_layer_inputs(self.layers, wanted, receive, weigh_by_row) as recorder:
            recorder.start(batch)
            hidden, _ = self.run(batch)
        return hidden


def traced(model_type: str, lora: LoraConfig | None = None, folder: Path | None = None, **changes: Any) -> Traced:
    """A network in float64, in evaluation mode."""
    model = tiny_model(model_type, **changes)
    spec = spec_for(model_type)
    adapters: Lora | None = None
    if lora is not None:
        assert folder is not None
        adapters, _ = adapted(model, spec, lora, folder)
    # transformers' grouped product of experts has no float64.
    model.config._experts_implementation = "eager"
    model.double().eval()
    network = LanguageModel(model, spec).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run_network(batch: Batch) -> None:
        with torch.no_grad():
            network(batch.corrupted_ids, batch.predicted, batch.targets)

    return Traced(model, network, LayerInputs.trace(find_readers(model, trained, adapters), run_network), adapters)


def padded_batch(seed: int = 0) -> Batch:
    """Four rows of twelve tokens, of which the last only fills the batch; some tokens of the others are predicted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 100, (4, 12), generator=generator)
    predicted = torch.randperm(36, generator=generator)[:10].sort().values
    return Batch(ids, ids, predicted, ids.flatten()[predicted], torch.tensor([1.0, 1.0, 1.0, 0.0]))
