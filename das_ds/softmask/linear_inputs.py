"""Inputs of matrices: every trained matrix that multiplies an input, which of them read the same one, and its values.

Shape legend: R rows of a batch, S positions, T = R S tokens, P predicted positions, d width of an input; n vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn

from das_ds.context import RunContext
from das_ds.data.batch import Batch
from das_ds.engine.zero import full_shape
from das_ds.errors import ModelError
from das_ds.models.matrix_readers import MatrixReader, Remove, StoredMatrix, embedding_names, find_readers
from das_ds.models.moe import RoutedTokens
from das_ds.softmask.masked_matrix import MaskedMatrix

ReceiveInput = Callable[[str, torch.Tensor, torch.Tensor | None, bool], None]
"""(name of an input, vectors x (n, d), weights (n,) float32 or None: all 1, whether x is a table)."""

TRACED_ROWS = 2
TRACED_POSITIONS = 3
"""Of the batch that inputs are traced with, which predicts one position: no two kinds of inputs have equal shapes."""


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


@dataclass(frozen=True, eq=False)
class _Site:
    """One matrix of one reader."""

    reader: MatrixReader
    index: int


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The masked matrices of a network, and where their inputs can be recorded."""

    matrices: list[MaskedMatrix]
    """In a fixed order."""
    _sites: dict[str, list[_Site]]
    """Input -> the readers of the matrix that it is named after; several where modules share one parameter."""
    _kinds: dict[str, list[InputKind]]
    """Input -> of each call in a forward pass."""

    @classmethod
    def trace(cls, readers: Iterable[MatrixReader], run_network: Callable[[Batch], object]) -> LayerInputs:
        """Find out which matrices read the same input by one forward pass.

        Two inputs are the same if they are the same elements in memory, unchanged in between; equal values are not
        enough. Where a layer runs several times in a forward pass, the inputs of all calls have to be the same.

        Args:
            readers: of the network, in the order that the matrices are to have.
            run_network: runs the network on a tiny batch, without gradients and dropout. A forward pass on the meta
                device is enough.

        Raises:
            ModelError: a layer that does not run, or whose input belongs neither to tokens nor to predicted positions
                nor to a table.
        """
        stored: dict[str, StoredMatrix] = {}
        sites: dict[str, list[_Site]] = {}
        calls: dict[str, list[_Call]] = {}
        removes: list[Remove] = []
        try:
            for reader in readers:
                names = [matrix.name for matrix in reader.matrices]
                for index, matrix in enumerate(reader.matrices):
                    stored.setdefault(matrix.name, matrix)
                    sites.setdefault(matrix.name, []).append(_Site(reader, index))
                removes.append(reader.trace(partial(_note_call, calls, names)))
            run_network(_traced_batch())
        finally:
            for remove in removes:
                remove()
        return cls._group(stored, sites, calls)

    @classmethod
    def _group(
        cls, stored: dict[str, StoredMatrix], sites: dict[str, list[_Site]], calls: dict[str, list[_Call]]
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
        kinds = {name: [call.kind(name) for call in calls[name]] for name in inputs.values()}
        return cls(matrices, {name: sites[name] for name in kinds}, kinds)

    @contextmanager
    def record(self, inputs: Iterable[str], receive: ReceiveInput) -> Iterator[InputRecorder]:
        """Inside, each forward pass gives `receive` these inputs; see `record_inputs`."""
        recorder = InputRecorder(receive)
        wanted = set(inputs)
        unknown = wanted - set(self._sites)
        assert not unknown, f"found inputs {sorted(unknown)}, expected names of inputs of masked matrices"
        # A reader is hooked once, also where several of its matrices are wanted, as with experts.
        names: dict[MatrixReader, dict[int, str]] = {}
        for name, sites in self._sites.items():
            for site in sites:
                if name in wanted:
                    names.setdefault(site.reader, {})[site.index] = name
        removes: list[Remove] = []
        try:
            for reader, names_by_index in names.items():
                removes.append(reader.hook(partial(self._pass_on, recorder, names_by_index)))
            yield recorder
        finally:
            for remove in removes:
                remove()

    def _pass_on(
        self, recorder: InputRecorder, names: dict[int, str], index: int, x: torch.Tensor, routed: RoutedTokens | None
    ) -> None:
        name = names.get(index)
        if name is not None:
            recorder.add(name, self._kinds[name], x, routed)


class InputRecorder:
    """Gives the inputs of a forward pass to a function, with the weights of their vectors."""

    def __init__(self, receive: ReceiveInput) -> None:
        self._receive = receive
        self._batch: Batch | None = None
        self._num_calls: dict[str, int] = {}

    def start(self, batch: Batch) -> None:
        """Begin a forward pass on this batch, which is on the network's device."""
        self._batch = batch
        self._num_calls.clear()

    def add(self, name: str, kinds: list[InputKind], x: torch.Tensor, routed: RoutedTokens | None) -> None:
        """Pass on what one call of a layer multiplies.

        Args:
            name: of the input.
            kinds: of its calls in one forward pass; further calls are like the last: a head runs in chunks.
            x: (..., d).
            routed: the tokens that x belongs to; None: x was not routed.
        """
        assert self._batch is not None, "start(batch) comes before each forward pass"
        assert not torch.is_grad_enabled(), "activation checkpointing would run layers a second time"
        call = self._num_calls.get(name, 0)
        self._num_calls[name] = call + 1
        kind = kinds[min(call, len(kinds) - 1)]
        vectors = x.detach().flatten(0, -2)
        self._receive(name, vectors, self._weights(self._batch, kind, len(vectors), routed), kind is InputKind.TABLE)

    @staticmethod
    def _weights(batch: Batch, kind: InputKind, num_vectors: int, routed: RoutedTokens | None) -> torch.Tensor | None:
        """(n,) float32, or None for 1."""
        if routed is not None:
            rows = routed.tokens // batch.input_ids.shape[1]
            return batch.row_weights[rows] * routed.weights.float().square()
        if kind is not InputKind.TOKENS:
            return None
        # Vectors of one row follow each other, however many a layer makes of a token.
        per_row, rest = divmod(num_vectors, len(batch.row_weights))
        assert rest == 0, f"found {num_vectors} vectors of {len(batch.row_weights)} rows, expected as many in each"
        return batch.row_weights.repeat_interleave(per_row)


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

    def kind(self, name: str) -> InputKind:
        """What the vectors belong to, from the shape that it has for the traced batch."""
        shape = tuple(self.x.shape)
        if self.is_routed:
            return InputKind.ROUTED
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
    ids = torch.zeros(TRACED_ROWS, TRACED_POSITIONS, dtype=torch.int64)
    nothing = torch.zeros(1, dtype=torch.int64)
    return Batch(ids, ids, nothing, nothing, torch.ones(TRACED_ROWS))


_TRACED: WeakKeyDictionary[nn.Module, LayerInputs] = WeakKeyDictionary()
"""Network -> its inputs: they are traced once."""


def find_masked_matrices(run: RunContext, num_tokens: int | None = None) -> list[MaskedMatrix]:
    """Every trained matrix that multiplies an input, in the order of the network's modules; a collective at first.

    These are linear layers (`nn.Linear`, `Conv1D`; LoRA's A and B; routers of experts), each expert of a layer,
    convolutions over positions, and embeddings that the LM head shares. Other embeddings are not: a row that is taken
    from a table is not multiplied by an input. An input is named after the first matrix that reads it, on every rank
    and at every ZeRO stage.

    Args:
        run: the engine and its network.
        num_tokens: rows of the vocabulary that were there when the inputs were measured; None: all.

    Raises:
        ModelError: a trained matrix in a layer of a kind that das_ds does not know, which would stay unprotected; see
            `LayerInputs.trace` for others.
    """
    matrices = _layer_inputs(run).matrices
    if num_tokens is None:
        return list(matrices)
    vocabulary = run.layout.vocabulary
    return [replace(m, num_outputs=num_tokens) if m.parameter in vocabulary else m for m in matrices]


@contextmanager
def record_inputs(run: RunContext, inputs: Iterable[str], receive: ReceiveInput) -> Iterator[InputRecorder]:
    """Inside, each forward pass calls `receive` once for every call of a layer that reads one of these inputs.

    The input's second moment over a sample is A = sum_i w_i x_i x_i^T / sum_i w_i over the vectors x_i of all calls.

    - An input of tokens: w = 1, or 0 in rows that only fill the batch. A layer that makes several vectors of a token
      counts each of them.
    - The LM head's: the predicted positions, w = 1. Where its loss is computed in chunks, there are several calls.
    - A table, which is the same in every forward pass (DeBERTa's relative positions): w = 1, and `is_table` is true.
      The caller counts it once in all.
    - An expert's: the tokens that are routed to it. Its output is multiplied by the routing weight p before it is added
      to the layer's, and so is the change p dW x of a change dW; hence the squared change is weighted by w = p^2 (times
      0 in rows that fill the batch). n may be 0.

    To be used without gradients and without dropout; a batch is announced by `start`:

        with record_inputs(run, inputs, receive) as recorder, torch.no_grad():
            for batch in batches:
                recorder.start(batch)
                run.engine.module(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)

    Args:
        run: the engine and its network.
        inputs: names, `MaskedMatrix.input`.
        receive: gets (name, x (n, d) as the layer reads it, w (n,) float32 or None for 1, is_table).
    """
    with _layer_inputs(run).record(inputs, receive) as recorder:
        yield recorder


def _layer_inputs(run: RunContext) -> LayerInputs:
    if run.network not in _TRACED:
        trained = run.engine.parameters
        readers = find_readers(run.network.model, trained, run.lora, full_shape)
        _check_complete(run, readers)
        _TRACED[run.network] = LayerInputs.trace(readers, partial(_run_network, run))
    return _TRACED[run.network]


def _check_complete(run: RunContext, readers: Iterable[MatrixReader]) -> None:
    known = {matrix.parameter for reader in readers for matrix in reader.matrices}
    known |= embedding_names(run.network.model, run.engine.parameters)
    for name, parameter in run.engine.parameters.items():
        shape = tuple(full_shape(parameter))
        if name not in known and sum(size > 1 for size in shape) > 1:
            raise ModelError(
                f"method.name: found {run.config.method.name}, but {name} {shape} is a matrix of a kind of layer that "
                "has no directions; allowed are linear layers, stacked experts with gate_up_proj and down_proj, and "
                "convolutions over positions that are padded with zeros, by a number; for this network: masks of units "
                "or weights"
            )


def _run_network(run: RunContext, batch: Batch) -> None:
    module = run.engine.module
    batch = batch.to(run.engine.ranks.info.device)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            module(batch.corrupted_ids, batch.predicted, batch.targets)
    finally:
        module.train(was_training)
    run.engine.weights.release_gathered()
