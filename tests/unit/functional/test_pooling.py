"""Pooling against loops in float64: padding anywhere, packed documents, rows that begin inside a document."""

from __future__ import annotations

import pytest
import torch

from das_ds.functional.losses import Pooling, pool, pooling_weights

POSITIONS = torch.tensor(
    [
        [0, 1, 2, 3, 4, 5],
        [0, 0, 0, 1, 2, 0],
        [3, 4, 0, 1, 0, 1],
        [0, 1, 0, 1, 2, 3],
    ]
)
PADDING = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
        [1, 0, 0, 1, 0, 1],
    ]
).bool()


def brute_force(
    kind: Pooling, hidden: torch.Tensor, positions: torch.Tensor | None, padding: torch.Tensor | None
) -> torch.Tensor:
    """(B, H) float64, the mean of the rows that `kind` names, found by walking over the documents of each row."""
    pooled = []
    for b, row in enumerate(hidden.double()):
        documents: list[list[int]] = [[]]
        for s in range(len(row)):
            if positions is not None and positions[b, s] == 0:
                documents.append([])
            if padding is None or not padding[b, s]:
                documents[-1].append(s)
        filled = [document for document in documents if document]
        chosen = [s for document in filled for s in (document if kind == "mean" else document[-1:])]
        pooled.append(torch.stack([row[s] for s in chosen]).mean(0))
    return torch.stack(pooled)


@pytest.mark.parametrize("kind", ["mean", "last"])
@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["full", "packed"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
def test_pooling_equals_loop(kind: Pooling, positions: torch.Tensor | None, padding: torch.Tensor | None) -> None:
    hidden = torch.randn(4, 6, 5)
    weights = pooling_weights(kind, num_rows=4, num_positions=6, position_ids=positions, padding=padding)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    torch.testing.assert_close(pool(hidden, weights), brute_force(kind, hidden, positions, padding).float())


def test_pooling_last_token_of_documents_by_hand() -> None:
    weights = pooling_weights("last", num_rows=4, num_positions=6, position_ids=POSITIONS, padding=PADDING)
    # Row 1 has documents of tokens [0], [] (padding only), [2, 3] (the last one is padding) and [5].
    third = 1 / 3
    half = 1 / 2
    expected = [[0, 0, 0, 0, 0, 1], [third, 0, 0, third, 0, third], [0, 0, 0, half, half, 0], [0, half, 0, 0, half, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_pooling_row_without_tokens_has_no_weight(kind: Pooling) -> None:
    padding = torch.tensor([[True, True], [False, True]])
    weights = pooling_weights(kind, num_rows=2, num_positions=2, padding=padding)
    assert weights.tolist() == [[0, 0], [1, 0]]


def test_pooling_float32_passes_gradient() -> None:
    hidden = torch.randn(2, 3, 4).bfloat16().requires_grad_()
    weights = pooling_weights("mean", num_rows=2, num_positions=3)
    pooled = pool(hidden, weights)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, hidden.float().mean(1))
    pooled.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.float(), torch.full((2, 3, 4), 1 / 3), rtol=1e-2, atol=0)


def test_pooling_weights_on_given_device() -> None:
    weights = pooling_weights("mean", num_rows=2, num_positions=3, device=torch.device("meta"))
    assert weights.device.type == "meta"
