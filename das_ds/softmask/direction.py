"""Direction importance: how much earlier domains use each direction of the inputs of masked matrices.

Shape legend: d width of an input, o of an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from das_ds.context import CorpusSample, RunContext
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.functional.directions import OverDomains, Rank
from das_ds.functional.projectors import Projector
from das_ds.softmask.apply import DirectionTarget, clear_masks, mask_directions
from das_ds.softmask.direction_moments import DirectionMoments, read_moments
from das_ds.softmask.input_layout import InputLayout
from das_ds.softmask.input_moments import measure_moments
from das_ds.softmask.linear_inputs import find_masked_matrices, find_unmasked_elements

MEASURED = "measured"
NUM_TOKENS = "num_tokens"


class DirectionImportance(DirectionMoments):
    """The moments of a run of `methods.directions`.

    It is to that method what an `Importance` is to others, but measured by forward passes without a loss, and where a
    moment is depends on the layout of the inputs over the ranks.

    Args:
        run: the engine and its network.
        inputs, moments, num_tokens: see `DirectionMoments`.
    """

    def __init__(
        self,
        run: RunContext,
        inputs: InputLayout,
        moments: dict[str, torch.Tensor | None],
        num_tokens: int | None,
    ) -> None:
        # Gradients in 16 bits have no more digits than a basis in bfloat16.
        dtype = torch.float32 if run.config.train.precision == "fp32" else torch.bfloat16
        super().__init__(run.engine.ranks, inputs, moments, num_tokens, dtype)
        self.run = run

    def _replaced(self, moments: dict[str, torch.Tensor | None], num_tokens: int | None) -> Self:
        return type(self)(self.run, self.inputs, moments, num_tokens)

    def measure(self, corpus: CorpusSample, num_samples: int | None = None) -> None:
        """Add the moments of a corpus that are missing, by forward passes over its sample; see `measure_moments`.

        A run that is saved meanwhile saves those that are complete with this object, and the others in the loop.

        Args:
            corpus: whose sample is read.
            num_samples: see `SampleBatches`.
        """
        measure_moments(
            self.run,
            self.inputs,
            lambda part: corpus.batches(part, num_samples=num_samples),
            corpus.label,
            self._moments,
        )

    def build_projectors(
        self, half_saturation: float, rank: Rank = "full", over_domains: OverDomains = "sum"
    ) -> dict[str, Projector]:
        """P = (I + M / c)^-1 of each input that this rank steps a matrix of; a collective.

        Further steps of the engine are not masked until `mask` is called.

        Args:
            half_saturation, rank, over_domains: see `shared_projectors`.
        """
        # Earlier masks may be as large as the new ones: both need not fit in memory.
        clear_masks(self.run.engine)
        return self.shared_projectors(half_saturation, rank, over_domains)

    def mask(
        self,
        projectors: Mapping[str, Projector],
        *,
        apply_to: DirectionTarget = "gradient",
        freeze_unmasked: bool = False,
    ) -> None:
        """Mask all further steps of the engine, and by nothing else; a collective.

        Rows of tokens that were added since are not masked: no earlier text has them.

        Args:
            projectors: of `build_projectors`.
            apply_to: what P multiplies, see `mask_directions`.
            freeze_unmasked: whether what acts on every text alike is not trained, see `find_unmasked_elements`.
        """
        matrices = find_masked_matrices(self.run, self.num_tokens)
        frozen = find_unmasked_elements(self.run, self.num_tokens) if freeze_unmasked else {}
        mask_directions(self.run.engine, matrices, projectors, apply_to=apply_to, frozen=frozen)

    def state_dict(self, prefix: str = "") -> ComponentState:
        """Each owner its moments, under names that begin with `prefix`."""
        return ComponentState(
            owned={f"{prefix}{name}": moment for name, moment in self.moments.items()},
            metadata={f"{prefix}{MEASURED}": self.names, f"{prefix}{NUM_TOKENS}": self.num_tokens},
        )

    @classmethod
    def load_state_dict(
        cls, run: RunContext, inputs: InputLayout, saved: SavedComponentState, prefix: str = ""
    ) -> DirectionImportance | None:
        """Each owner reads its moments, whoever owned them; None where nothing was saved under this prefix."""
        names: list[str] = saved.metadata.get(f"{prefix}{MEASURED}", [])
        if not names:
            return None
        own = [name for name in inputs.owned_by(run.engine.ranks.info.rank) if name in names]
        found = saved.owned(f"{prefix}{name}" for name in own)
        moments = {name: found.get(f"{prefix}{name}") for name in names}
        num_tokens = saved.metadata[f"{prefix}{NUM_TOKENS}"]
        # An earlier run to whose vocabulary nothing was added knew the tokens that this one begins with.
        return cls(run, inputs, moments, run.num_base_tokens if num_tokens is None else num_tokens)

    def save(self, path: Path, tokens: Sequence[str]) -> None:
        """Owners write their moments into one file; see `save_directions`."""
        self.write(path, self.run.layout, tokens)

    @classmethod
    def load(cls, run: RunContext, inputs: InputLayout, path: Path) -> DirectionImportance:
        """Each owner reads its moments; a collective.

        Raises:
            ImportanceError: on every rank, when any cannot read them.
        """
        return cls(run, inputs, *read_moments(path, run.engine.ranks, inputs, run.layout, run.tokens))
