"""Linear inputs: the masked matrices of a run, and the values that they multiply in each forward pass.

Shape legend: d width of an input, n vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from das_ds.data.batch import Batch
from das_ds.errors import ModelError
from das_ds.models.find_readers import embedding_names, find_readers
from das_ds.models.matrix_readers import MatrixReader, Remove
from das_ds.models.moe import RoutedTokens
from das_ds.softmask.layer_inputs import InputKind, LayerInputs
from das_ds.softmask.masked_matrix import MaskedMatrix

if TYPE_CHECKING:
    from das_ds.context import RunContext

ReceiveInput = Callable[[str, torch.Tensor, torch.Tensor | None, bool], None]
"""(name of an input, vectors x (n, d), weights (n,) float32 or None: all 1, whether x is a table)."""


B = TypeVar("B")
B_contra = TypeVar("B_contra", contravariant=True)


class WeighVectors(Protocol[B_contra]):
    """Weights of the vectors that a layer reads in a forward pass on a batch."""

    def __call__(
        self, batch: B_contra, kind: InputKind, num_vectors: int, routed: RoutedTokens | None, /
    ) -> torch.Tensor | None:
        """(n,) float32, or None for 1."""


def weigh_by_row(batch: Batch, kind: InputKind, num_vectors: int, routed: RoutedTokens | None) -> torch.Tensor | None:
    """The weight of the vectors' row, for batches of das_ds; see `record_inputs`."""
    if routed is not None:
        rows = routed.tokens // batch.input_ids.shape[1]
        return batch.row_weights[rows] * routed.weights.float().square()
    if kind is not InputKind.TOKENS:
        return None
    # Vectors of one row follow each other, however many a layer makes of a token.
    per_row, rest = divmod(num_vectors, len(batch.row_weights))
    assert rest == 0, f"found {num_vectors} vectors of {len(batch.row_weights)} rows, expected as many in each"
    return batch.row_weights.repeat_interleave(per_row)


class InputRecorder(Generic[B]):
    """Gives the inputs of a forward pass to a function, with the weights of their vectors."""

    def __init__(self, receive: ReceiveInput, weigh: WeighVectors[B]) -> None:
        self._receive = receive
        self._weigh = weigh
        self._batch: B | None = None
        self._num_calls: dict[str, int] = {}

    def start(self, batch: B) -> None:
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
        self._receive(name, vectors, self._weigh(self._batch, kind, len(vectors), routed), kind is InputKind.TABLE)


@contextmanager
def record_layer_inputs(
    layers: LayerInputs, inputs: Iterable[str], receive: ReceiveInput, weigh: WeighVectors[B]
) -> Iterator[InputRecorder[B]]:
    """`record_inputs` for a network that was traced, and batches of any kind.

    Args:
        layers: of the network.
        inputs, receive: see `record_inputs`.
        weigh: gives the weights of vectors.
    """
    recorder = InputRecorder(receive, weigh)
    wanted = set(inputs)
    unknown = wanted - set(layers.sites)
    assert not unknown, f"found inputs {sorted(unknown)}, expected names of inputs of masked matrices"
    # A reader is hooked once, also where several of its matrices are wanted, as with experts.
    names: dict[MatrixReader, dict[int, str]] = {}
    for name, sites in layers.sites.items():
        for site in sites:
            if name in wanted:
                names.setdefault(site.reader, {})[site.index] = name
    removes: list[Remove] = []
    try:
        for reader, names_by_index in names.items():
            removes.append(reader.hook(partial(_pass_on, recorder, layers.kinds, names_by_index)))
        yield recorder
    finally:
        for remove in removes:
            remove()


def _pass_on(
    recorder: InputRecorder[B],
    kinds: dict[str, list[InputKind]],
    names: dict[int, str],
    index: int,
    x: torch.Tensor,
    routed: RoutedTokens | None,
) -> None:
    name = names.get(index)
    if name is not None:
        recorder.add(name, kinds[name], x, routed)


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
    return crop_vocabulary(_layer_inputs(run).matrices, run.layout.vocabulary, num_tokens)


def crop_vocabulary(
    matrices: Iterable[MaskedMatrix], vocabulary: Collection[str], num_tokens: int | None
) -> list[MaskedMatrix]:
    """Matrices without rows of tokens that were added since their inputs were measured.

    Args:
        matrices: of a network.
        vocabulary: its parameters with one row per token.
        num_tokens: see `find_masked_matrices`.
    """
    if num_tokens is None:
        return list(matrices)
    return [replace(m, num_outputs=num_tokens) if m.parameter in vocabulary else m for m in matrices]


def find_unmasked_elements(run: RunContext, num_tokens: int | None = None) -> dict[str, int]:
    """What acts on every text alike: parameter -> number of its elements that do.

    These are all trained parameters that multiply no input of their own, but tables of token embeddings: biases,
    normalization, embeddings of positions. A change of them changes what the network makes of any text, so that they
    have no direction that earlier text leaves open.

    Args:
        run: the engine and its network.
        num_tokens: see `find_masked_matrices`; a bias of the LM head has an element for each token.
    """
    from das_ds.engine.zero import full_shape

    shapes = {name: full_shape(parameter) for name, parameter in run.engine.parameters.items()}
    return unmasked_elements(shapes, find_masked_matrices(run), run.layout.vocabulary, num_tokens)


def unmasked_elements(
    shapes: Mapping[str, torch.Size],
    matrices: Iterable[MaskedMatrix],
    vocabulary: Collection[str],
    num_tokens: int | None,
) -> dict[str, int]:
    """`find_unmasked_elements` of any network.

    Args:
        shapes: trained parameter -> its complete shape.
        matrices: all that are masked.
        vocabulary: parameters with one row per token.
        num_tokens: see `find_masked_matrices`.
    """
    masked = {matrix.parameter for matrix in matrices}
    elements = {}
    for name, shape in shapes.items():
        if name in masked or (name in vocabulary and len(shape) > 1):
            continue
        elements[name] = math.prod(shape)
        if name in vocabulary and num_tokens is not None:
            elements[name] = min(elements[name], num_tokens)
    return elements


@contextmanager
def record_inputs(run: RunContext, inputs: Iterable[str], receive: ReceiveInput) -> Iterator[InputRecorder[Batch]]:
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
    with record_layer_inputs(_layer_inputs(run), inputs, receive, weigh_by_row) as recorder:
        yield recorder


def _layer_inputs(run: RunContext) -> LayerInputs:
    if run.network not in _TRACED:
        from das_ds.engine.zero import full_shape

        trained = run.engine.parameters
        readers = find_readers(run.network.model, trained, run.lora, full_shape)
        shapes = {name: full_shape(parameter) for name, parameter in trained.items()}
        embeddings = embedding_names(run.network.model, trained)
        check_readers_complete(readers, shapes, embeddings, f"method.name: found {run.config.method.name}")
        _TRACED[run.network] = LayerInputs.trace(readers, partial(_run_network, run))
    return _TRACED[run.network]


def check_readers_complete(
    readers: Iterable[MatrixReader], shapes: Mapping[str, torch.Size], embeddings: Collection[str], found: str
) -> None:
    """Check that no trained matrix would stay unprotected because its kind of layer is not known.

    Args:
        readers: of the network.
        shapes: trained parameter -> its complete shape.
        embeddings: parameters from which rows are taken.
        found: beginning of the error's message.

    Raises:
        ModelError: one would.
    """
    known = {matrix.parameter for reader in readers for matrix in reader.matrices}
    known.update(embeddings)
    for name, shape in shapes.items():
        if name not in known and sum(size > 1 for size in shape) > 1:
            raise ModelError(
                f"{found}, but {name} {tuple(shape)} is a matrix of a kind of layer that has no directions; allowed "
                "are linear layers, stacked experts with gate_up_proj and down_proj, and convolutions over positions "
                "that are padded with zeros, by a number; for this network: masks of units or weights"
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
