"""What an exported model is made of: its stored tensors, and the safetensors files that they are divided into.

Names, forms and files are those of transformers' `save_pretrained`: weights that it converts when it loads a network
(stacked experts, for example) are stored in their original form, tied weights once, and files have a largest size. All
of it follows from shapes, so that ranks agree on it before any weight is gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    apply_converters,
    dot_natural_key,
    revert_weight_conversion,
)

FILE_PATTERN = "model{suffix}.safetensors"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class WeightGroup:
    """Weights of the network that become stored tensors together; most are alone."""

    sources: tuple[str, ...]
    """In the network."""
    targets: tuple[str, ...]
    """In the files."""


@dataclass(frozen=True)
class ExportPlan:
    """Which tensors are stored in which file."""

    files: dict[str, tuple[str, ...]]
    """File -> its tensors."""
    groups: tuple[WeightGroup, ...]
    """What tensors are made of, in the order of the files."""
    index: dict[str, Any] | None
    """Content of model.safetensors.index.json; None where there is one file."""

    def groups_of(self, tensors: Iterable[str]) -> list[WeightGroup]:
        """The groups that some of these tensors are made of."""
        wanted = set(tensors)
        return [group for group in self.groups if not wanted.isdisjoint(group.targets)]


def main_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Each name -> the one of its tied names that transformers loads a network by, such as that of the embedding.

    Args:
        model: the network.
        names: of weights, tied ones once.
    """
    known = list(names)
    tied: dict[str, str] = model.all_tied_weights_keys
    return {name: main if (main := tied.get(name, name)) not in known else name for name in known}


def plan_export(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], max_shard_bytes: int) -> ExportPlan:
    """The plan for a network.

    Args:
        model: the network.
        weights: name in the network -> a tensor on the meta device of the shape and dtype to store; tied weights once.
        max_shard_bytes: of a file; a larger tensor has a file for itself.
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = {name: weight for name, weight in weights.items() if name not in ignored}
    stored: Weights = {}
    groups = []
    for sources in _group_sources(model, kept):
        converted = to_stored(model, {name: kept[name] for name in sources})
        groups.append(WeightGroup(tuple(sources), tuple(converted)))
        # Without what several of them may be views of, whose size would count for each.
        stored |= {
            name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in converted.items()
        }
    split = split_torch_state_dict_into_shards(stored, filename_pattern=FILE_PATTERN, max_shard_size=max_shard_bytes)
    total = sum(weight.numel() for weight in weights.values())
    index = {
        "metadata": {"total_parameters": total, **split.metadata},
        "weight_map": dict(sorted(split.tensor_to_filename.items())),
    }
    files = {name: tuple(tensors) for name, tensors in split.filename_to_tensors.items()}
    return ExportPlan(files, tuple(groups), index if split.is_sharded else None)


def writer_ranks(num_files: int, num_ranks: int) -> list[int]:
    """The rank that writes each of at most `num_ranks` files at once, spread over all ranks and so over all nodes."""
    return [number * num_ranks // num_files for number in range(num_files)]


def to_stored(model: PreTrainedModel, weights: Weights) -> Weights:
    """The stored tensors that the weights of complete groups become; views of them where nothing is computed."""
    return revert_weight_conversion(model, weights)


def _group_sources(model: PreTrainedModel, names: Iterable[str]) -> list[list[str]]:
    """Names in groups that are converted together, in the order in which transformers stores them."""
    converters = _reverse_converters(model)
    if converters is None:
        return [[name] for name in names]
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = apply_converters(name, converters)
        groups.setdefault(name if pattern is None else f"{pattern} {target}", []).append(name)
    return list(groups.values())


def _reverse_converters(model: PreTrainedModel) -> list[Any] | None:
    """What `revert_weight_conversion` applies to several weights at once; None: it leaves all weights as they are."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        transforms = [transform for transform in transforms if not isinstance(transform, PrefixChange)]
    if not transforms:
        return None
    reverse = [transform.reverse_transform() for transform in reversed(transforms)]
    return [transform for transform in reverse if isinstance(transform, WeightConverter)]
