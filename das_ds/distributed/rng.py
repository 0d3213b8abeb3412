"""The random generators of one rank, behind dropout and noise."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def get_rng_state() -> dict[str, torch.Tensor]:
    """States of Python's, NumPy's and torch's generators, those of the current GPU among them."""
    version, words, gauss = random.getstate()
    generator: dict[str, Any] = numpy.random.get_state(legacy=False)
    assert version == 3 and generator["bit_generator"] == "MT19937", "the generators that this format is made for"
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
    """Put all generators back to where `get_rng_state` found them."""
    gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
