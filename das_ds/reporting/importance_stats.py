"""The importance files of a run as the few numbers a comparison shows.

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
from das_ds.reporting.comparison import GroupOverlap, ImportanceNumbers, Matrix
from das_ds.reporting.overlap import Overlap
from das_ds.reporting.run_report import PROTECTED
from das_ds.run_dir import GENERAL_IMPORTANCE_FILE, IMPORTANCE_FILE
from das_ds.softmask.importance_file import PARAMETER, StoredImportance, stored_importance

BEFORE = "before training"
"""General knowledge, or what `method.importance.init_from` brought along; no domain can have a name with a space."""
OTHERS = "others"
"""Weights that no unit owns: embeddings, normalisation, LM head."""
CHUNK = 1 << 21
"""Weights that exist as float64 at a time."""
LORA = re.compile(r"\.lora_[AB]\.default(?=\.)")
LEVELS = 255
DIGITS = 6
"""Decimals that are kept: more would only fill the file."""


def importance_numbers(folder: Path, model: ModelConfig) -> ImportanceNumbers | None:
    """Overlap between the sources of a run and how full its mask is; None where it has no importance files.

    Args:
        folder: of the run.
        model: of the run, for a table of units of its own.

    Raises:
        ImportanceError: a file is damaged.
        ModelError: weights of a model type without a table.
    """
    sources = _sources(folder)
    if not sources or not (folder / IMPORTANCE_FILE).exists():
        return None
    with ExitStack() as stack:
        files = [stack.enter_context(stored_importance(path)) for path in sources.values()]
        accumulated = stack.enter_context(stored_importance(folder / IMPORTANCE_FILE))
        if accumulated.granularity == PARAMETER:
            stretches = _of_weights(files, accumulated, _select_spec(model, accumulated.model_type))
        else:
            stretches = _of_units(files, accumulated)
        groups: dict[str, _GroupSums] = {}
        for group, layer, values in stretches:
            groups.setdefault(group, _GroupSums(len(sources))).add(layer, values)
    return ImportanceNumbers(
        granularity="parameter" if accumulated.granularity == PARAMETER else "unit",
        threshold=PROTECTED,
        sources=list(sources),
        groups={name: sums.numbers() for name, sums in sorted(groups.items(), key=lambda item: item[0] == OTHERS)},
    )


class _GroupSums:
    """Sums of one unit group."""

    def __init__(self, num_sources: int) -> None:
        self._overlap = Overlap(num_sources, PROTECTED)
        self._by_layer: dict[int, tuple[float, int]] = {}

    def add(self, layer: int, values: torch.Tensor) -> None:
        """Count (D + 1, N) of a layer: the sources, then what is accumulated."""
        self._overlap.add(values[:-1])
        total, count = self._by_layer.get(layer, (0.0, 0))
        self._by_layer[layer] = total + values[-1].sum(dtype=torch.float64).item(), count + values.shape[1]

    def numbers(self) -> GroupOverlap:
        """What they come to."""
        return GroupOverlap(
            claimed=_rounded(self._overlap.shares()[None])[0],
            jaccard=_rounded(self._overlap.jaccard()),
            cosine=_rounded(self._overlap.cosine()),
            fullness=[round(total / count, DIGITS) for _, (total, count) in sorted(self._by_layer.items())],
        )


def _sources(folder: Path) -> dict[str, Path]:
    """What was important before the first domain, then the domains in order -> file."""
    general = folder / GENERAL_IMPORTANCE_FILE
    domains = sorted(folder.glob(f"domains/*/{IMPORTANCE_FILE}"))
    by_domain = {path.parent.name.partition("_")[2]: path for path in domains}
    return {**({BEFORE: general} if domains and general.exists() else {}), **by_domain}


def _of_units(files: list[StoredImportance], accumulated: StoredImportance) -> Iterator[tuple[str, int, torch.Tensor]]:
    for group in accumulated.shapes:
        values = torch.stack([file.values(group) for file in [*files, accumulated]])
        for layer, of_layer in enumerate(values.unbind(dim=1)):
            yield group, layer, of_layer


def _of_weights(
    files: list[StoredImportance], accumulated: StoredImportance, spec: ArchitectureSpec
) -> Iterator[tuple[str, int, torch.Tensor]]:
    owners = [(re.compile(_pattern(rule.parameter)), rule.group) for rule in spec.rules if not rule.consumer]
    for name, (size,) in accumulated.shapes.items():
        group, layer = _place(name, owners)
        # Rows of tokens that came with a later domain have importance 0 before it.
        tensors = [file.values(name) for file in [*files, accumulated]]
        values = torch.stack([functional.pad(tensor, (0, size - len(tensor))) for tensor in tensors])
        for part in values.split(CHUNK, dim=1):
            yield group, layer, part.float() / LEVELS


def _place(name: str, owners: list[tuple[re.Pattern[str], str]]) -> tuple[str, int]:
    """Group that owns a weight, through its adapter under LoRA, and its layer."""
    plain = LORA.sub("", name)
    for pattern, group in owners:
        if found := pattern.fullmatch(plain):
            return group, int(found[1])
    return OTHERS, 0


def _pattern(parameter: str) -> str:
    """A rule's parameter name as a regular expression whose group is the layer."""
    return re.escape(parameter).replace(r"\{base\}", ".+").replace(r"\{layer\}", r"(\d+)", 1)


def _select_spec(model: ModelConfig, model_type: str) -> ArchitectureSpec:
    return spec_for(model_type) if model.architecture is None else spec_from_config(model.architecture, model_type)


def _rounded(values: torch.Tensor) -> Matrix:
    return [[round(value, DIGITS) for value in row] for row in values.tolist()]
