"""Random generators of one rank: their state, which drives dropout and noise, as tensors that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from das_ds.distributed.state import ComponentState, SavedComponentState


def get_rng_state() -> dict[str, torch.Tensor]:
    """States of the generators of Python, NumPy and torch, and of the current GPU if there is one."""
    version, words, gauss = random.getstate()
    generator: dict[str, Any] = numpy.random.get_state(legacy=False)
    assert version == 3 and generator["bit_generator"] == "MT19937", "the generators that this format is made for"
    # As tensors, because safetensors files contain nothing else; int64 fits the unsigned words of both generators.
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(generator["state"]["key"].astype(numpy.int64)),
        "numpy_position": torch.tensor([generator["state"]["pos"], generator["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([generator["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Set all generators to a state from `get_rng_state`."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class RngState:
    """The random generators of this rank as a component of checkpoints."""

    def state_dict(self) -> ComponentState:
        """The generators as they are now."""
        return ComponentState(rank_local=get_rng_state())

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Restore the generators; with another world size or ZeRO stage they stay as they are."""
        if state := saved.rank_local():
            set_rng_state(state)
