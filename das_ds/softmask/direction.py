"""Direction importance: how much earlier domains use each direction of the inputs of masked matrices.

Shape legend: d width of an input, o of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from das_ds.context import CorpusSample, RunContext
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import DasError
from das_ds.functional.directions import Rank, build_projector, projector_work_bytes
from das_ds.functional.projectors import Projector
from das_ds.softmask.apply import DirectionTarget, clear_masks, mask_directions
from das_ds.softmask.directions_file import load_directions, save_directions
from das_ds.softmask.input_layout import InputLayout
from das_ds.softmask.input_moments import measure_moments
from das_ds.softmask.linear_inputs import find_masked_matrices, find_unmasked_elements
from das_ds.softmask.projector_exchange import find_room, move_projector, share_projector

MEASURED = "measured"
NUM_TOKENS = "num_tokens"


class DirectionImportance:
    """M of every input: the sum over domains of its normalized second moments. Each is held by one rank, its owner.

    It is to `methods.directions` what an `Importance` is to other methods, but measured by forward passes without a
    loss, and where a moment is depends on the layout of the inputs over the ranks.

    Args:
        run: the engine and its network.
        inputs: layout of the inputs.
        moments: input -> M, (d, d) float32 in host memory on its owner, None on other ranks; with the same names on
            every rank. The tensors are never changed, as a checkpoint that is being written may still read them.
        num_tokens: of the vocabulary that the moments were measured with; None: the vocabulary does not grow.
    """

    def __init__(
        self,
        run: RunContext,
        inputs: InputLayout,
        moments: dict[str, torch.Tensor | None],
        num_tokens: int | None,
    ) -> None:
        self.run = run
        self.inputs = inputs
        self._moments = moments
        self.num_tokens = num_tokens

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """Input -> M, of the inputs that this rank owns."""
        return {name: moment for name, moment in self._moments.items() if moment is not None}

    @property
    def names(self) -> list[str]:
        """The inputs that have a moment, on whichever rank; all but where measuring was interrupted."""
        return list(self._moments)

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

    def accumulate(self, earlier: DirectionImportance | None) -> DirectionImportance:
        """The sum with the moments of earlier domains, which is all that is left: both are used up.

        A sum takes the place of what it adds, one at a time: new tensors, because a checkpoint that is being written
        may still read the others.
        """
        if earlier is None:
            return self
        total: dict[str, torch.Tensor | None] = {}
        for name in self.names:
            latest = self._moments.pop(name)
            before = earlier._moments.pop(name)
            total[name] = None if latest is None or before is None else latest + before
        numbers = [self.num_tokens, earlier.num_tokens]
        num_tokens = None if None in numbers else max(number for number in numbers if number is not None)
        return DirectionImportance(self.run, self.inputs, total, num_tokens)

    def projectors(self, compute: Callable[[torch.Tensor], Projector]) -> Iterator[tuple[str, Projector]]:
        """(input, projector) of each input that this rank steps a matrix of, in turn; a collective.

        All ranks walk through the inputs in one order. An owner computes the projector on its device, one at a time,
        and sends it to the other ranks that step a matrix of the input: 4 d^2 bytes to each where it is dense. Its next
        one is computed before it waits for those of others, so that owners compute at the same time.
        At ZeRO stages 1 and 2 these are the few ranks whose shards meet there, at 0 and 3 all ranks (a broadcast). The
        caller has to take all: ranks wait for each other.

        Args:
            compute: M, (d, d) in host memory -> its projector on the device.
        """
        device = self.run.engine.ranks.info.device
        computed = map(compute, self.moments.values())
        own_next = next(computed, None)
        for name, moment in self._moments.items():
            own = None if moment is None else own_next
            projector = share_projector(own, self.inputs.owners[name], self.inputs.users[name], device)
            if moment is not None:
                own_next = next(computed, None)
            if projector is not None:
                yield name, projector

    def build_projectors(self, half_saturation: float, rank: Rank = "full") -> dict[str, Projector]:
        """P = (I + M / c)^-1 of each input that this rank steps a matrix of; a collective.

        Further steps of the engine are not masked until `mask` is called.

        Args:
            half_saturation: c.
            rank: of the projectors, see `build_projector`.
        """
        # Earlier masks may be as large as the new ones: both need not fit in memory.
        clear_masks(self.run.engine)
        return dict(self.projectors(lambda moment: self._compute(moment, half_saturation, rank)))

    def own_projectors(self, half_saturation: float, rank: Rank = "full") -> Iterator[tuple[str, Projector]]:
        """(input, P) of each input that this rank owns, in turn; no other rank is asked.

        Args:
            half_saturation, rank: as for `build_projectors`.
        """
        for name, moment in self.moments.items():
            yield name, self._compute(moment, half_saturation, rank)

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

    def _compute(self, moment: torch.Tensor, half_saturation: float, rank: Rank) -> Projector:
        """The projector of a moment in host memory, on this rank's device."""
        device = self.run.engine.ranks.info.device
        # Gradients in 16 bits have no more digits than a basis in bfloat16.
        dtype = torch.float32 if self.run.config.train.precision == "fp32" else torch.bfloat16
        where = find_room(device, projector_work_bytes(len(moment)))
        return move_projector(build_projector(moment, half_saturation, rank, dtype, where), device)

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
        save_directions(path, self.moments, self.inputs, self.run.layout, self.run.engine.ranks, tokens)

    @classmethod
    def load(cls, run: RunContext, inputs: InputLayout, path: Path) -> DirectionImportance:
        """Each owner reads its moments; a collective.

        Raises:
            ImportanceError: on every rank, when any cannot read them.
        """
        ranks = run.engine.ranks
        own = inputs.owned_by(ranks.info.rank)
        failure: DasError | None = None
        found: dict[str, torch.Tensor] = {}
        num_tokens = 0
        try:
            found, num_tokens = load_directions(path, own, inputs.widths, run.layout, run.tokens)
        except DasError as error:
            failure = error
        ranks.raise_on_all_ranks(failure)
        return cls(run, inputs, {name: found.get(name) for name in inputs.widths}, num_tokens)
