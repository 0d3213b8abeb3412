"""Experts run one after the other compute what transformers computes, and their inputs are those of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from das_ds.models.moe import RoutedTokens, is_transposed, observed_experts_forward

WIDTH = 8
INNER = 6
NUM_EXPERTS = 4


def make_experts(kind: str) -> Any:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_local_experts": NUM_EXPERTS}
    experts: Any
    if kind == "mixtral":
        experts = MixtralExperts(MixtralConfig(**sizes, experts_implementation="eager"))
    else:
        # Stored as (inputs, outputs), with biases, gate and up projection interleaved.
        experts = GptOssExperts(GptOssConfig(**sizes, experts_implementation="eager"))
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts.double().eval()


def route(num_tokens: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, two experts for each token, of which the last gets none, and their weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    index = torch.stack([torch.randperm(NUM_EXPERTS - 1, generator=generator)[:2] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, 2, generator=generator, dtype=torch.float64)
    return hidden, index, weights


@pytest.mark.parametrize(("kind", "transposed"), [("mixtral", False), ("gpt_oss", True)])
def test_observed_experts_compute_what_transformers_does(kind: str, transposed: bool) -> None:
    experts = make_experts(kind)
    seen: list[RoutedTokens] = []
    with torch.no_grad():
        expected = experts(*route())
        found = observed_experts_forward(experts, seen.append, *route())
    torch.testing.assert_close(found, expected)
    assert is_transposed(experts) is transposed
    assert [routed.expert for routed in seen] == list(range(NUM_EXPERTS))
    assert len(seen[-1].tokens) == 0


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_observed_inner_inputs_give_the_output(kind: str) -> None:
    """The layer's output is the weighted sum of the down projections of what was observed."""
    experts = make_experts(kind)
    hidden, index, weights = route()
    output = torch.zeros_like(hidden)

    def add(routed: RoutedTokens) -> None:
        down = experts.down_proj[routed.expert]
        outer = routed.inner @ (down if kind == "gpt_oss" else down.T)
        if kind == "gpt_oss":
            outer = outer + experts.down_proj_bias[routed.expert]
        torch.testing.assert_close(routed.inputs, hidden[routed.tokens])
        output[routed.tokens] += routed.weights[:, None] * outer

    with torch.no_grad():
        observed_experts_forward(experts, add, hidden, index, weights)
        torch.testing.assert_close(output, experts(hidden, index, weights))
