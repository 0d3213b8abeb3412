"""Sampling: order, subsets and corruption of samples, and reservoir sampling, as pure functions of a seed.

Every draw comes from Philox, a counter-based generator (Salmon et al., SC 2011), keyed by seed and stream, with the
sample number as its counter. Nothing depends on rank, batch or call order, so any split of the work sees the same data.

Shape legend: S tokens per block, N samples, B sequences, P predicted positions, K stored positions of a sequence.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

MASKED_SHARE = 0.8
REPLACED_SHARE = 0.1


@lru_cache
def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")


def sample_generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """Generator of one sample: Philox with key (seed, stream) and the index in the counter's highest word.

    Args:
        seed: seed of the run, in [0, 2**64).
        stream: name of the use, such as `train/acl`; different names give unrelated draws.
        index: sample number, in [0, 2**64); samples are 2**192 counts apart and never overlap.
    """
    key = np.array([seed, _stream_key(stream)], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def epoch_order(num_samples: int, seed: int, stream: str, epoch: int) -> NDArray[np.int64]:
    """Permutation of 0 .. num_samples - 1 for one pass over the data; (num_samples,) int64, read-only."""
    order = sample_generator(seed, f"{stream}/order", epoch).permutation(num_samples)
    order.flags.writeable = False
    return order


class SampleOrder:
    """Index of every sample of a stream: number k is position k mod n of the order of epoch k div n.

    Args:
        num_samples: n.
        seed: seed of the run.
        stream: name of the use.
    """

    def __init__(self, num_samples: int, seed: int, stream: str) -> None:
        self._num_samples = num_samples
        # Two orders are kept because a step can straddle two epochs.
        self._order = lru_cache(maxsize=2)(partial(epoch_order, num_samples, seed, stream))

    def __getitem__(self, number: int) -> int:
        epoch, position = divmod(number, self._num_samples)
        return int(self._order(epoch)[position])


def replay_number(number: int, global_batch_size: int, num_replayed: int) -> tuple[bool, int]:
    """Whether global sample k is replayed, and its number among the replayed samples, or among the others.

    Sample j of step t is replayed where (t + j) R mod G < R, with R of G samples replayed. Of any B consecutive samples
    floor(B R / G) or ceil(B R / G) are replayed, so that micro-batches share them evenly; the indices move with the
    step, so that in G steps each is replayed R times, whichever rank has it.
    """
    step, index = divmod(number, global_batch_size)
    is_replayed = (step + index) * num_replayed % global_batch_size < num_replayed
    # For t + j from 0 to x - 1 the condition is true floor((x - 1) R / G) + 1 times; here for x = t + j and x = t.
    count_to_sample = (step + index - 1) * num_replayed // global_batch_size
    count_to_step = (step - 1) * num_replayed // global_batch_size
    earlier = step * num_replayed + count_to_sample - count_to_step
    return is_replayed, earlier if is_replayed else number - earlier


def subset_indices(num_blocks: int, num_samples: int, seed: int) -> list[int]:
    """Sorted indices of min(num_samples, num_blocks) different blocks, each subset equally likely."""
    generator = sample_generator(seed, "subset", num_blocks)
    size = min(num_samples, num_blocks)
    return sorted(generator.choice(num_blocks, size, replace=False, shuffle=False).tolist())


def mlm_corrupt(
    input_ids: Tensor,
    special_mask: Tensor,
    selection: Tensor,
    treatment: Tensor,
    replacements: Tensor,
    *,
    mask_id: int,
    probability: float,
) -> tuple[Tensor, Tensor]:
    """BERT's corruption (Devlin et al., 2019, section 3.1).

    A token is predicted where selection < probability and it is not special. Of the predicted tokens those with
    treatment < 0.8 become the mask token, those in [0.8, 0.9) the given replacement, the others stay.

    Args:
        input_ids: (..., S) long.
        special_mask: (..., S) bool, True where a token is never predicted.
        selection: (..., S) uniform in [0, 1).
        treatment: (..., S) uniform in [0, 1), independent of `selection`.
        replacements: (..., S) long, random token ids.
        mask_id: id of the mask token.
        probability: fraction of tokens to predict.

    Returns:
        corrupted ids (..., S) long and predicted positions (..., S) bool.
    """
    predicted = (selection < probability) & ~special_mask
    masked = predicted & (treatment < MASKED_SHARE)
    replaced = predicted & ~masked & (treatment < MASKED_SHARE + REPLACED_SHARE)
    corrupted = torch.where(replaced, replacements, input_ids).masked_fill(masked, mask_id)
    return corrupted, predicted


NOT_STORED = -1


def reservoir_slots(first: int, uniforms: NDArray[np.float64], capacity: int) -> NDArray[np.int64]:
    """Algorithm R (Vitter, Random Sampling with a Reservoir, 1985): of n samples each is stored with probability C / n.

    Sample n, counted from 0, goes to slot n while there are free ones, and then to slot floor(u (n + 1)), if it exists,
    replacing the sample there.

    Args:
        first: number of the first of N samples in the stream.
        uniforms: (N,) u of each sample, uniform in [0, 1).
        capacity: C.

    Returns:
        (N,) slot of each sample, or `NOT_STORED`; of two samples with one slot the later replaces the earlier.
    """
    numbers = first + np.arange(len(uniforms))
    drawn = (uniforms * (numbers + 1)).astype(np.int64)
    slots = np.where(numbers < capacity, numbers, drawn)
    return np.where(slots < capacity, slots, NOT_STORED)


def final_writes(slots: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the samples that remain when all N are stored in turn; every slot once."""
    # From the last sample to the first: np.unique gives the first index of every slot.
    stored = np.flatnonzero(slots != NOT_STORED)[::-1]
    _, first_indices = np.unique(slots[stored], return_index=True)
    return stored[first_indices]


def evenly_spaced(
    predicted: torch.Tensor, num_rows: int, length: int, count: int, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """At most K predicted positions of each sequence, spread over it: of n > K those at floor((i + u) n / K), i < K.

    All positions are equally likely, and no two are the same.

    Args:
        predicted: (P,) int64, indices into the flattened (B, length) positions, in order.
        num_rows: B.
        length: tokens per sequence.
        count: K.
        offsets: (B,) float64 u, uniform in [0, 1).

    Returns:
        (B, K) indices into `predicted`, at most P, and (B, K) bool, whether the position exists.
    """
    rows = predicted // length
    counts = predicted.new_zeros(num_rows).index_add(0, rows, torch.ones_like(rows))
    order = torch.arange(count, device=predicted.device).expand(num_rows, -1)
    # (B, K): positions within the sequence, then within `predicted`, where its sequence begins at `first`.
    spaced = ((order + offsets[:, None]) * counts[:, None] / count).long()
    within_sequence = torch.where(counts[:, None] > count, spaced, order)
    first = counts.cumsum(0) - counts
    indices = first[:, None] + within_sequence
    return indices.clamp_max(len(predicted)), order < counts[:, None]


def append_zero_row(values: torch.Tensor) -> torch.Tensor:
    """(P,) or (P, H) with one zero appended, so that index P exists."""
    return functional.pad(values, (0, 0) * (values.dim() - 1) + (0, 1))
