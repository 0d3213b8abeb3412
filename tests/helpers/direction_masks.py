"""Masks of directions of any number of ranks in one process: shards as ZeRO cuts them, exchanges by lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from das_ds.distributed.neighbor_exchange import Exchanges, Outgoing
from das_ds.distributed.state import Shard
from das_ds.functional.projectors import DenseProjector, Projector
from das_ds.models.size import MatrixSize, ModelSize
from das_ds.softmask.direction_mask import DirectionMask
from das_ds.softmask.fragments import find_fragments
from das_ds.softmask.mask_layout import MaskLayout, plan_layout
from das_ds.softmask.masked_matrix import MaskedMatrix
from das_ds.softmask.matrix_blocks import find_held_elements

CPU = torch.device("cpu")
# Of products of up to 31 numbers of size 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class TailProjector:
    """P = tau I + V diag(gains) V^T in plain products, V (d, r)."""

    basis: torch.Tensor
    gains: torch.Tensor
    tail: float

    @property
    def width(self) -> int:
        return len(self.basis)

    @property
    def num_bytes(self) -> int:
        return self.basis.nbytes + self.gains.nbytes

    def project(self, vectors: torch.Tensor) -> torch.Tensor:
        x = vectors.float()
        return (self.tail * x + ((x @ self.basis) * self.gains) @ self.basis.T).to(vectors.dtype)


SHAPES = {
    "bias": (5,),
    "query": (5, 7),
    "key": (3, 7),
    "conv": (7, 4),
    "experts": (3, 6, 5),
    "free": (4, 3),
    "wide": (2, 31),
    "embeddings": (9, 7),
    "norm": (6,),
}
"""Parameter -> its shape; `conv` is stored transposed, `bias`, `free` and `norm` are not masked."""
SIZES = {name: (torch.Size(shape).numel(), len(shape) > 1) for name, shape in SHAPES.items()}
"""Parameter -> its elements, and whether it is a matrix."""
MATRICES = [
    MaskedMatrix("query", "query", 0, 5, 7, "hidden"),
    MaskedMatrix("key", "key", 0, 3, 7, "hidden"),
    MaskedMatrix("conv", "conv", 0, 4, 7, "hidden", transposed=True),
    *(MaskedMatrix(f"experts[{i}]", "experts", 30 * i, 6, 5, f"expert {i}") for i in range(3)),
    MaskedMatrix("wide", "wide", 0, 2, 31, "neurons"),
    # The last three rows are those of added tokens.
    MaskedMatrix("embeddings", "embeddings", 0, 6, 7, "head"),
]


def model_size(matrices: Iterable[MatrixSize]) -> ModelSize:
    """What is planned of a network of these parameters and some matrices of them."""
    numel = sum(numel for numel, _ in SIZES.values())
    return ModelSize(
        trained=numel,
        total=numel,
        largest_layer=0,
        num_units=0,
        num_layers=1,
        hidden=7,
        inner=31,
        heads=1,
        vocabulary=9,
        parameters=tuple(SIZES.values()),
        matrices=tuple(matrices),
    )


def make_projectors() -> dict[str, Projector]:
    """Dense and of low rank; not symmetric where they need not be, so that P is not taken for its transpose."""
    generator = torch.Generator().manual_seed(3)
    projectors: dict[str, Projector] = {}
    for number, (name, width) in enumerate({matrix.input: matrix.width for matrix in MATRICES}.items()):
        if number % 2:
            basis = torch.linalg.qr(torch.randn(width, 3, generator=generator)).Q
            projectors[name] = TailProjector(basis, torch.rand(3, generator=generator) - 0.9, 0.9)
        else:
            projectors[name] = DenseProjector(torch.randn(width, width, generator=generator))
    return projectors


def dense(projector: Projector) -> torch.Tensor:
    """P in float64."""
    if isinstance(projector, DenseProjector):
        return projector.matrix.double()
    assert isinstance(projector, TailProjector)
    basis = projector.basis.double()
    return projector.tail * torch.eye(len(basis)).double() + (basis * projector.gains.double()) @ basis.T


def multiply(values: dict[str, torch.Tensor], projectors: dict[str, Projector]) -> dict[str, torch.Tensor]:
    """The masked matrices among complete parameters times their P, in float64; others as they are."""
    products = {name: value.double().clone() for name, value in values.items()}
    for matrix in MATRICES:
        flat = products[matrix.parameter].view(-1)[matrix.start : matrix.start + matrix.numel]
        product = dense(projectors[matrix.input])
        if matrix.transposed:
            flat.copy_((product.T @ flat.view(matrix.width, matrix.num_outputs)).flatten())
        else:
            flat.copy_((flat.view(matrix.num_outputs, matrix.width) @ product).flatten())
    return products


def random_values(seed: int) -> dict[str, torch.Tensor]:
    """Complete parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}


def cut_by_parameter(num_ranks: int) -> list[list[Shard]]:
    """Shards of all ranks as at ZeRO 3: an equal part of each parameter, padded at the end."""
    shards = []
    for rank in range(num_ranks):
        own = []
        for name, shape in SHAPES.items():
            numel = torch.Size(shape).numel()
            padded = -(-numel // num_ranks)
            begin = min(rank * padded, numel)
            own.append((name, begin, min(padded, numel - begin)))
        shards.append(lay_out([item for item in own if item[2]]))
    return shards


def cut_flat(num_ranks: int) -> list[list[Shard]]:
    """Shards of all ranks as at ZeRO 1 and 2: an equal part of all parameters in a row."""
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    padded = -(-total // num_ranks)
    shards = []
    for rank in range(num_ranks):
        own = []
        start = 0
        for name, shape in SHAPES.items():
            stop = start + torch.Size(shape).numel()
            begin = max(start, rank * padded)
            end = min(stop, (rank + 1) * padded)
            if begin < end:
                own.append((name, begin - start, end - begin))
            start = stop
        shards.append(lay_out(own))
    return shards


CUTS: dict[str, Callable[[int], list[list[Shard]]]] = {"by parameter": cut_by_parameter, "flat": cut_flat}


def lay_out(parts: Sequence[tuple[str, int, int]]) -> list[Shard]:
    """(parameter, first element, number of elements) in one flat tensor, with a gap before each."""
    flat = torch.nn.Parameter(torch.zeros(sum(numel + 1 for *_, numel in parts) + 2))
    shards = []
    position = 1
    for name, begin, numel in parts:
        shards.append(Shard(name, flat, position, begin, numel))
        position += numel + 1
    return shards


def layouts_of(shards_by_rank: list[list[Shard]]) -> list[MaskLayout]:
    """The layout of every rank."""
    held_by_rank = [find_held_elements(shards, MATRICES) for shards in shards_by_rank]
    fragments = find_fragments(MATRICES, held_by_rank).values()
    return [plan_layout(MATRICES, held, fragments, rank, len(held_by_rank)) for rank, held in enumerate(held_by_rank)]


def masks_of(shards_by_rank: list[list[Shard]], projectors: dict[str, Projector]) -> list[DirectionMask]:
    """The mask of every rank."""
    layouts = layouts_of(shards_by_rank)
    return [
        DirectionMask(shards, layout, projectors, CPU) for shards, layout in zip(shards_by_rank, layouts, strict=True)
    ]


def run_together(exchanges: Sequence[Exchanges]) -> list[torch.Tensor]:
    """Run what every rank does, with lists in place of communication; (ranks, ranks) elements of each exchange."""
    answers: list[Any] = [None] * len(exchanges)
    volumes = []
    while True:
        outgoing: list[Outgoing] = []
        for running, answer in zip(exchanges, answers, strict=True):
            try:
                outgoing.append(next(running) if answer is None else running.send(answer))
            except StopIteration:
                assert not outgoing, "ranks have as many exchanges"
        if len(outgoing) < len(exchanges):
            assert not outgoing, "ranks have as many exchanges"
            return volumes
        parts = [sent.values.split(sent.send_sizes) for sent in outgoing]
        answers = [torch.cat([part[rank] for part in parts]) for rank in range(len(exchanges))]
        for rank, sent in enumerate(outgoing):
            assert sent.receive_sizes == [len(part[rank]) for part in parts]
        volumes.append(torch.tensor([sent.send_sizes for sent in outgoing]))


def collect(shards_by_rank: list[list[Shard]], tensors: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Complete parameters from the shards of all ranks."""
    values = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name, shape in SHAPES.items()}
    for shards, own in zip(shards_by_rank, tensors, strict=True):
        for shard, tensor in zip(shards, own, strict=True):
            values[shard.name].view(-1)[shard.param_span] = tensor.double()
    return values


def cut_values(shards_by_rank: list[list[Shard]], values: dict[str, torch.Tensor]) -> list[list[torch.Tensor]]:
    """A tensor of its own for every shard."""
    return [[values[shard.name].flatten()[shard.param_span].clone() for shard in shards] for shards in shards_by_rank]


def mask_gradients(
    cut: str, num_ranks: int, values: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Complete gradients from all ranks' masked ones; (ranks, ranks) elements of each exchange."""
    shards_by_rank = CUTS[cut](num_ranks)
    masks = masks_of(shards_by_rank, make_projectors())
    gradients = cut_values(shards_by_rank, values)
    volumes = run_together([m.steps(g, torch._foreach_copy_) for m, g in zip(masks, gradients, strict=True)])
    return collect(shards_by_rank, gradients), volumes


def check_gradients(cut: str, num_ranks: int) -> None:
    """Masked gradients are complete products; of vectors that are cut travels only what their owners lack."""
    values = random_values(1)
    found, volumes = mask_gradients(cut, num_ranks, values)
    for name, value in multiply(values, make_projectors()).items():
        torch.testing.assert_close(found[name], value, **TOLERANCE, msg=f"{name} on {num_ranks} ranks")
    of_rows, of_columns = _count_travelling(CUTS[cut](num_ranks))
    if not of_rows and not of_columns:
        assert not volumes, "no exchange where nothing is cut"
        return
    there, back = volumes
    assert torch.equal(there, back.T)
    travelling = int(there.sum() - there.diagonal().sum())
    assert of_rows <= travelling <= of_rows + of_columns


def _count_travelling(shards_by_rank: list[list[Shard]]) -> tuple[int, int]:
    """(of rows all elements but those of the largest fragment, all elements of transposed matrices that are cut)."""
    holders = {name: torch.zeros(torch.Size(shape).numel(), dtype=torch.int64) for name, shape in SHAPES.items()}
    for rank, shards in enumerate(shards_by_rank):
        for shard in shards:
            holders[shard.name][shard.param_span] = rank
    of_rows = 0
    of_columns = 0
    for matrix in MATRICES:
        ranks = holders[matrix.parameter][matrix.start : matrix.start + matrix.numel]
        if matrix.transposed:
            of_columns += matrix.numel if len(ranks.unique()) > 1 else 0
        else:
            rows = ranks.view(matrix.num_outputs, matrix.width)
            of_rows += sum(matrix.width - int(row.bincount().max()) for row in rows)
    return of_rows, of_columns
