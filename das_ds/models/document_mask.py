"""Whether a network keeps documents apart that share a row, asked of the network itself."""

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
    """Raises ConfigError where the second document of a row sees the first one.

    Position ids that start anew are a request which an architecture or an attention implementation may ignore without
    a word. So two rows that differ in nothing but their first document are encoded in one batch; where documents are
    isolated, the hidden states of the second are the same.

    Args:
        encode: the network without dropout and as it is used in training; input ids (B, S) and position ids (B, S),
            both int64, to hidden states (B, S, H). Under ZeRO-3 all ranks call this together.
        model_type: architecture, for the message.
        attention: attention implementation, for the message.
        device: where the network is.
    """
    first, other, second = torch.arange(NUM_PROBED_TOKENS, device=device).view(3, DOCUMENT_LENGTH)
    input_ids = torch.stack((torch.cat((first, second)), torch.cat((other, second))))
    position_ids = torch.arange(DOCUMENT_LENGTH, device=device).repeat(2, 2)
    with torch.no_grad():
        hidden = encode(input_ids, position_ids)[:, DOCUMENT_LENGTH:]
    # Experts see their tokens in another order in each row, so that equal hidden states differ by rounding.
    tolerance = max(1e-3, 4 * torch.finfo(hidden.dtype).eps)
    one, two = hidden.float()
    if (one - two).norm() > tolerance * one.norm():
        raise ConfigError(
            f"data.document_mask: found true, but {model_type} with {attention} attention lets a document see the "
            "one before it in its block; expected false, or another model or model.attention (docs/objectives.md)"
        )
