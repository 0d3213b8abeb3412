"""Where the kernels run: on the GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from das_ds.kernels import tiles

DEVICE = pytest.param("cuda", marks=pytest.mark.gpu) if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[DEVICE])
def device(request: pytest.FixtureRequest) -> str:
    """With a GPU, tests that use it belong to those of `pytest -m gpu`."""
    return str(request.param)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of few elements, so that small tensors have many and the interpreter stays quick."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 128)
