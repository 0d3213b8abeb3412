"""Document mask check: whether attention stays within each document of a row, tested on the network itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from das_ds.errors import ConfigError

DOCUMENT_LENGTH = 4
NUM_PROBED_TOKENS = 3 * DOCUMENT_LENGTH


def check_document_mask(
    encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    model_type: str,
    attention: str,
    device: torch.device | str = "cpu",
) -> None:
    """Raises ConfigError if the second document of a row sees the first one.

    Position ids that restart at 0 ask for a document mask, which an architecture or attention implementation may ignore
    silently. So two rows that differ only in their first document are encoded in one batch; with a document mask, the
    hidden states of their second documents are equal.

    Args:
        encode: the network as in training but without dropout; input ids (B, S) and position ids (B, S), both int64,
            to hidden states (B, S, H). Under ZeRO-3 all ranks call this together.
        model_type: architecture, for the message.
        attention: attention implementation, for the message.
        device: where the network is.
    """
    first_a, first_b, second = torch.arange(NUM_PROBED_TOKENS, device=device).view(3, DOCUMENT_LENGTH)
    input_ids = torch.stack((torch.cat((first_a, second)), torch.cat((first_b, second))))  # (2, 2 * DOCUMENT_LENGTH)
    position_ids = torch.arange(DOCUMENT_LENGTH, device=device).repeat(2, 2)
    with torch.no_grad():
        hidden = encode(input_ids, position_ids)[:, DOCUMENT_LENGTH:]
    # Experts process the tokens of the rows in different orders, so that equal hidden states may differ by rounding.
    tolerance = max(1e-3, 4 * torch.finfo(hidden.dtype).eps)
    row_a, row_b = hidden.float()
    if (row_a - row_b).norm() > tolerance * row_a.norm():
        raise ConfigError(
            f"data.document_mask: found true, but {model_type} with {attention} attention lets a document see the "
            "one before it in its block; expected false, another model or model.attention (docs/methods/objectives.md)"
        )
