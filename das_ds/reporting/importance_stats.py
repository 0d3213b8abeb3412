"""Statistics of a run's importance files: overlap between sources, and mask saturation by layer.

Shape legend: D sources (before training, then domains), L layers, N units or weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.nn import functional

from das_ds.config import ModelConfig
from das_ds.models.architectures.from_config import spec_from_config
from das_ds.models.architectures.registry import spec_for
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.reporting.comparison import GroupOverlap, ImportanceSummary, Matrix
from das_ds.reporting.overlap import Overlap
from das_ds.reporting.run_report import PROTECTED
from das_ds.run_dir import GENERAL_IMPORTANCE_FILE, IMPORTANCE_FILE
from das_ds.softmask.importance_file import PARAMETER, StoredImportance, stored_importance

BEFORE = "before training"
"""General knowledge, or the importance that a run starts from; a domain name cannot contain a space."""
OTHERS = "others"
"""Weights that no unit owns: embeddings, normalization, LM head."""
CHUNK = 1 << 21
"""Weights converted to float at a time."""
LORA = re.compile(r"\.lora_[AB]\.default(?=\.)")
NUM_LEVELS = 255
"""Importance of weights is stored as uint8 in [0, 255]."""
DIGITS = 6
"""Decimals kept in the file."""

LayerValues = tuple[str, int, torch.Tensor]
"""Unit group, layer, and importance (D + 1, N): the sources, then the accumulated importance."""


def summarize_importance(folder: Path, model: ModelConfig) -> ImportanceSummary | None:
    """Overlap between the sources of a run, and the saturation of its mask; None without importance files.

    Args:
        folder: the run folder.
        model: config of the run's model, which may define its own unit table.

    Raises:
        ImportanceError: a file is damaged.
        ModelError: weights of a model type without a unit table.
    """
    sources = _find_sources(folder)
    if not sources or not (folder / IMPORTANCE_FILE).exists():
        return None
    with ExitStack() as stack:
        files = [stack.enter_context(stored_importance(path)) for path in sources.values()]
        accumulated = stack.enter_context(stored_importance(folder / IMPORTANCE_FILE))
        if accumulated.granularity == PARAMETER:
            chunks = _iterate_weights(files, accumulated, _architecture(model, accumulated.model_type))
        else:
            chunks = _iterate_units(files, accumulated)
        sums: dict[str, _GroupSums] = {}
        for group, layer, values in chunks:
            sums.setdefault(group, _GroupSums(len(sources))).add(layer, values)
    return ImportanceSummary(
        granularity="parameter" if accumulated.granularity == PARAMETER else "unit",
        threshold=PROTECTED,
        sources=list(sources),
        # Unowned weights come last.
        groups={name: group.result() for name, group in sorted(sums.items(), key=lambda item: item[0] == OTHERS)},
    )


class _GroupSums:
    """Sums over the chunks of one unit group."""

    def __init__(self, num_sources: int) -> None:
        self._overlap = Overlap(num_sources, PROTECTED)
        self._layers: dict[int, tuple[float, int]] = {}
        """Layer -> (sum of accumulated importance, number of values)."""

    def add(self, layer: int, values: torch.Tensor) -> None:
        """Add values (D + 1, N) of a layer: the sources, then the accumulated importance."""
        self._overlap.add(values[:-1])
        total, count = self._layers.get(layer, (0.0, 0))
        self._layers[layer] = (total + values[-1].sum(dtype=torch.float64).item(), count + values.shape[1])

    def result(self) -> GroupOverlap:
        return GroupOverlap(
            claimed=_round(self._overlap.unit_shares()[None])[0],
            jaccard=_round(self._overlap.jaccard()),
            cosine=_round(self._overlap.cosine()),
            mask_saturation=[round(total / count, DIGITS) for _, (total, count) in sorted(self._layers.items())],
        )


def _find_sources(folder: Path) -> dict[str, Path]:
    """Source -> file: importance from before the first domain, if any, then the domains in order."""
    general = folder / GENERAL_IMPORTANCE_FILE
    domains = sorted(folder.glob(f"domains/*/{IMPORTANCE_FILE}"))
    # Folders are named <index>_<domain>.
    by_domain = {path.parent.name.partition("_")[2]: path for path in domains}
    return {**({BEFORE: general} if domains and general.exists() else {}), **by_domain}


def _iterate_units(files: list[StoredImportance], accumulated: StoredImportance) -> Iterator[LayerValues]:
    for group in accumulated.shapes:
        values = torch.stack([file.values(group) for file in [*files, accumulated]])  # (D + 1, L, N)
        for layer, layer_values in enumerate(values.unbind(dim=1)):
            yield group, layer, layer_values


def _iterate_weights(
    files: list[StoredImportance], accumulated: StoredImportance, architecture: ArchitectureSpec
) -> Iterator[LayerValues]:
    owners = [(re.compile(_to_regex(rule.parameter)), rule.group) for rule in architecture.rules if not rule.consumer]
    for name, (size,) in accumulated.shapes.items():
        group, layer = _find_owner(name, owners)
        # A file from before a domain added tokens is shorter: its missing rows have importance 0.
        tensors = [file.values(name) for file in [*files, accumulated]]
        values = torch.stack([functional.pad(tensor, (0, size - len(tensor))) for tensor in tensors])
        for chunk in values.split(CHUNK, dim=1):
            yield group, layer, chunk.float() / NUM_LEVELS


def _find_owner(name: str, owners: list[tuple[re.Pattern[str], str]]) -> tuple[str, int]:
    """(unit group, layer) of a weight; a LoRA weight belongs to the weight that it adapts."""
    adapted = LORA.sub("", name)
    for pattern, group in owners:
        if match := pattern.fullmatch(adapted):
            return group, int(match[1])
    return OTHERS, 0


def _to_regex(parameter: str) -> str:
    """A rule's parameter name as a regular expression whose group 1 is the layer."""
    return re.escape(parameter).replace(r"\{base\}", ".+").replace(r"\{layer\}", r"(\d+)", 1)


def _architecture(model: ModelConfig, model_type: str) -> ArchitectureSpec:
    return spec_for(model_type) if model.architecture is None else spec_from_config(model.architecture, model_type)


def _round(values: torch.Tensor) -> Matrix:
    return [[round(value, DIGITS) for value in row] for row in values.tolist()]
