"""Layer inputs: which trained matrices of a network read the same input, found by one forward pass over a tiny batch.

Shape legend: R rows of a batch, S positions, T = R S tokens, P predicted positions, d width of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from das_ds.data.batch import Batch
from das_ds.errors import ModelError
from das_ds.models.language_model import LanguageModel
from das_ds.models.matrix_readers import MatrixReader, Remove, StoredMatrix
from das_ds.models.moe import RoutedTokens
from das_ds.softmask.masked_matrix import MaskedMatrix

TRACED_ROWS = 2
TRACED_POSITIONS = 3
"""Of the batch that inputs are traced with, which predicts one position: no two kinds of inputs have equal shapes."""
TRACED_TOKEN = 3
"""A token that is seldom the one for padding, of which transformers warns."""


class InputKind(StrEnum):
    """What the vectors of an input belong to."""

    TOKENS = "tokens"
    """All tokens, row by row: (R, ..., d) or (T, ..., d)."""
    PREDICTED = "predicted"
    """Predicted positions: (P, d)."""
    TABLE = "table"
    """No token: the same in every forward pass, (1, ..., d)."""
    ROUTED = "routed"
    """The tokens of one expert."""


Classify = Callable[[str, MatrixReader, torch.Tensor], InputKind]
"""(name of an input, the reader of its first matrix, x (..., d) of one call) -> what the vectors belong to."""


@dataclass(frozen=True, eq=False)
class Site:
    """One matrix of one reader."""

    reader: MatrixReader
    index: int


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The masked matrices of a network, and where their inputs can be recorded."""

    matrices: list[MaskedMatrix]
    """In a fixed order."""
    sites: dict[str, list[Site]]
    """Input -> the readers of the matrix that it is named after; several where modules share one parameter."""
    kinds: dict[str, list[InputKind]]
    """Input -> of each call in a forward pass."""

    @classmethod
    def trace(
        cls,
        readers: Iterable[MatrixReader],
        run_network: Callable[[Batch], object],
        classify: Classify | None = None,
    ) -> LayerInputs:
        """Find out which matrices read the same input by one forward pass.

        Two inputs are the same if they are the same elements in memory, unchanged in between; equal values are not
        enough. Where a layer runs several times in a forward pass, the inputs of all calls have to be the same.

        Args:
            readers: of the network, in the order that the matrices are to have.
            run_network: runs the network on a tiny batch, without gradients and dropout. A forward pass on the meta
                device is enough.
            classify: tells what vectors belong to; None: `classify_traced`.

        Raises:
            ModelError: a layer that does not run, or whose input belongs neither to tokens nor to predicted positions
                nor to a table.
        """
        stored: dict[str, StoredMatrix] = {}
        sites: dict[str, list[Site]] = {}
        calls: dict[str, list[_Call]] = {}
        removes: list[Remove] = []
        try:
            for reader in readers:
                names = [matrix.name for matrix in reader.matrices]
                for index, matrix in enumerate(reader.matrices):
                    stored.setdefault(matrix.name, matrix)
                    sites.setdefault(matrix.name, []).append(Site(reader, index))
                removes.append(reader.trace(partial(_note_call, calls, names)))
            run_network(_traced_batch())
        finally:
            for remove in removes:
                remove()
        return cls._group(stored, sites, calls, classify or classify_traced)

    @classmethod
    def _group(
        cls,
        stored: dict[str, StoredMatrix],
        sites: dict[str, list[Site]],
        calls: dict[str, list[_Call]],
        classify: Classify,
    ) -> LayerInputs:
        matrices = []
        inputs: dict[tuple[object, ...], str] = {}
        for name, matrix in stored.items():
            if name not in calls:
                raise ModelError(
                    f"{name}: found no call of its layer in a forward pass, expected that every trained layer runs; "
                    "its input cannot be measured"
                )
            # The first matrix that reads an input gives it its name.
            read = inputs.setdefault(tuple(call.identity for call in calls[name]), name)
            matrices.append(
                MaskedMatrix(
                    name=name,
                    parameter=matrix.parameter,
                    start=matrix.start,
                    num_outputs=matrix.num_outputs,
                    width=matrix.width,
                    input=read,
                    transposed=matrix.transposed,
                )
            )
        kinds = {
            name: [
                InputKind.ROUTED if call.is_routed else classify(name, sites[name][0].reader, call.x)
                for call in calls[name]
            ]
            for name in inputs.values()
        }
        return cls(matrices, {name: sites[name] for name in kinds}, kinds)


@dataclass(frozen=True, eq=False)
class _Call:
    """The input of one call of a layer; it is kept, so that no other one gets its memory."""

    x: torch.Tensor
    version: int
    """How often its elements had been changed in place."""
    is_routed: bool

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for equal elements in memory, also of views that merely flatten rows and positions."""
        x = self.x
        # Address of the storage's record, not of its elements: meta tensors have none.
        elements = (x.untyped_storage()._cdata, x.storage_offset(), x.numel(), x.shape[-1], x.dtype, self.version)
        return elements if x.is_contiguous() else (*elements, x.shape, x.stride())


def classify_traced(name: str, _: MatrixReader, x: torch.Tensor) -> InputKind:
    """What the vectors belong to, from the shape that an input has for the traced batch.

    Raises:
        ModelError: neither to tokens nor to predicted positions nor to a table.
    """
    shape = tuple(x.shape)
    if shape[0] in (TRACED_ROWS, TRACED_ROWS * TRACED_POSITIONS):
        return InputKind.TOKENS
    if shape[0] == 1:
        return InputKind.PREDICTED if len(shape) == 2 else InputKind.TABLE
    raise ModelError(
        f"{name}: found an input of shape {shape} for {TRACED_ROWS} rows of {TRACED_POSITIONS} tokens that predict "
        "one position, expected (rows, ..., d), (tokens, ..., d), (predicted, d) or a table (1, ..., d)"
    )


def _note_call(
    calls: dict[str, list[_Call]], names: list[str], index: int, x: torch.Tensor, routed: RoutedTokens | None
) -> None:
    calls.setdefault(names[index], []).append(_Call(x, x._version, routed is not None))


def _traced_batch() -> Batch:
    ids = torch.full((TRACED_ROWS, TRACED_POSITIONS), TRACED_TOKEN)
    nothing = torch.zeros(1, dtype=torch.int64)
    return Batch(ids, ids, nothing, nothing, torch.ones(TRACED_ROWS))


def trace_without_values(network: LanguageModel, readers: Iterable[MatrixReader]) -> LayerInputs:
    """The inputs of a network on the meta device, which has shapes and no values: for estimates.

    Args:
        network: on the meta device.
        readers: of its trained matrices.
    """

    def run_network(batch: Batch) -> None:
        batch = batch.to("meta")
        with torch.no_grad(), _AnyAnswer():
            network(batch.corrupted_ids, batch.predicted, batch.targets)

    was_training = network.training
    network.eval()
    try:
        return LayerInputs.trace(readers, run_network)
    finally:
        network.train(was_training)


class _AnyAnswer(TorchDispatchMode):
    """Answers what transformers asks about values (is there padding? are documents packed?), which shapes ignore."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        return function(*args, **(kwargs or {}))
