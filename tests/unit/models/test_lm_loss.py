"""Chunked LM loss, compared with the unchunked loss in float64, and its memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from das_ds.functional.losses import top_k_entropy
from das_ds.kernels.linear_cross_entropy import Weigh
from das_ds.models.lm_loss import ChunkedLMLoss, Distillation, positions_per_chunk
from helpers.token_losses import Wrapped

# H below the chunk: the transposed gradient of the (V, H) weight would pass for logits of H positions.
H = 3
V = 37
CHUNK = 4
MOST = 16
POSITIONS = [0, 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 3]


class Head(nn.Module):
    """A transform and a projection, as encoders have it."""

    def __init__(self, *, bias: bool, wrapped: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transform = nn.Linear(H, H, dtype=dtype)
        projection = nn.Linear(H, V, bias=bias, dtype=dtype)
        self.decoder = Wrapped(projection) if wrapped else projection

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder(functional.gelu(self.transform(hidden)))


class LargestLogits(TorchDispatchMode):
    """Records the most positions of any tensor that operators return with the vocabulary as its last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        returned = func(*args, **(kwargs or {}))
        for tensor in returned if isinstance(returned, tuple | list) else (returned,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == V:
                self.positions = max(self.positions, tensor.shape[0])
        return returned


def case(num_positions: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, targets and an upstream gradient that differs between positions."""
    generator = torch.Generator().manual_seed(1)
    hidden = (3.0 * torch.randn(num_positions, H, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (num_positions,), generator=generator)
    return hidden, targets, torch.randn(num_positions, generator=generator)


def losses_and_gradients(
    compute_losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], head: nn.Module, num_positions: int
) -> list[torch.Tensor]:
    """Losses and the gradients of hidden states and of all weights."""
    dtype = next(head.parameters()).dtype
    hidden, targets, upstream = case(num_positions, dtype)
    losses = compute_losses(hidden, targets)
    return [losses, *torch.autograd.grad(losses, [hidden, *head.parameters()], upstream.to(losses.dtype))]


def entropy_weight(logits: torch.Tensor) -> torch.Tensor:
    """A weight that depends on the logits."""
    return top_k_entropy(logits, 5).square()


def reference(
    head: nn.Module, soft_cap: float | None, num_positions: int, weigh: Weigh | None = None
) -> list[torch.Tensor]:
    """All logits at once, in float64."""
    double = Head(bias=any("decoder" in n and "bias" in n for n, _ in head.named_parameters()), wrapped=False).double()
    double.load_state_dict({name.replace("inner.", ""): weight for name, weight in head.state_dict().items()})

    def compute_losses(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = double(hidden)
        if soft_cap is not None:
            logits = torch.tanh(logits / soft_cap) * soft_cap
        losses = -logits.log_softmax(dim=1)[torch.arange(len(targets)), targets]
        return losses if weigh is None else losses * weigh(logits).detach()

    return losses_and_gradients(compute_losses, double, num_positions)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_positions", POSITIONS)
def test_chunked_lm_loss_equals_unchunked(
    num_positions: int, bias: bool, soft_cap: float | None, wrapped: bool
) -> None:
    head = Head(bias=bias, wrapped=wrapped)
    compute_losses = ChunkedLMLoss(head, head.decoder, chunk=CHUNK, soft_cap=soft_cap)
    found = losses_and_gradients(lambda h, t: compute_losses(h, t, max_positions=MOST), head, num_positions)
    assert found[0].dtype == torch.float32 and found[0].shape == (num_positions,)
    for value, expected in zip(found, reference(head, soft_cap, num_positions), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("num_positions", POSITIONS)
def test_weighted_lm_loss_equals_unchunked(num_positions: int, soft_cap: float | None, wrapped: bool) -> None:
    head = Head(bias=True, wrapped=wrapped)
    compute_losses = ChunkedLMLoss(head, head.decoder, chunk=CHUNK, soft_cap=soft_cap)
    found = losses_and_gradients(
        lambda h, t: compute_losses(h, t, max_positions=MOST, weigh=entropy_weight), head, num_positions
    )
    for value, expected in zip(found, reference(head, soft_cap, num_positions, entropy_weight), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("taught", [[], [0], [1, 3, 4, 5, 6, 7, 8, 9, 10, 12], list(range(13))])
def test_distilled_lm_loss_equals_unchunked(taught: list[int], soft_cap: float | None) -> None:
    """Some of 13 positions learn what another head predicts, the others their tokens, weighted."""
    student, teacher = (Head(bias=True, wrapped=False, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        teacher.decoder.weight.mul_(1.5).add_(0.1)
        teacher.transform.bias.sub_(0.3)
    hidden, targets, upstream = case(13, torch.float64)
    positions = torch.tensor(taught, dtype=torch.int64)
    of_student, of_teacher = (
        ChunkedLMLoss(head, head.decoder, chunk=CHUNK, soft_cap=soft_cap) for head in (student, teacher)
    )
    distillation = Distillation(positions, of_teacher.linear_logits(2.0 * hidden[positions]))
    found = of_student.distilled(hidden, targets, distillation, entropy_weight)

    def logits(head: Head, inputs: torch.Tensor) -> torch.Tensor:
        return head(inputs) if soft_cap is None else soft_cap * torch.tanh(head(inputs) / soft_cap)

    own = logits(student, hidden)
    expected = functional.cross_entropy(own, targets, reduction="none") * entropy_weight(own).detach()
    with torch.no_grad():
        answers = logits(teacher, 2.0 * hidden[positions]).log_softmax(dim=1)
    divergence = functional.kl_div(own[positions].log_softmax(dim=1), answers, reduction="none", log_target=True)
    expected = expected.index_put((positions,), divergence.sum(dim=1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    inputs = [hidden, *student.parameters()]
    for value, gradient in zip(
        torch.autograd.grad(found, inputs, upstream.double()),
        torch.autograd.grad(expected, inputs, upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(value, gradient, rtol=1e-11, atol=1e-12)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_distilled_lm_loss_memory_is_half_a_chunk_of_each() -> None:
    head = Head(bias=True, wrapped=False)
    compute_losses = ChunkedLMLoss(head, head.decoder, chunk=2 * CHUNK)
    hidden, targets, upstream = case(MOST)
    with LargestLogits() as seen:
        distillation = Distillation(torch.arange(MOST), compute_losses.linear_logits(hidden))
        compute_losses.distilled(hidden, targets, distillation, None).backward(upstream)
    assert seen.positions == CHUNK


def test_distilled_lm_loss_needs_linear_projection() -> None:
    plain, wrapped = (Head(bias=True, wrapped=is_wrapped) for is_wrapped in (False, True))
    assert ChunkedLMLoss(plain, plain.decoder, chunk=CHUNK).can_distill
    assert not ChunkedLMLoss(wrapped, wrapped.decoder, chunk=CHUNK).can_distill


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_chunked_lm_loss_float64_is_exact(soft_cap: float | None) -> None:
    head = Head(bias=True, wrapped=False, dtype=torch.float64)
    compute_losses = ChunkedLMLoss(head, head.decoder, chunk=CHUNK, soft_cap=soft_cap)
    found = losses_and_gradients(lambda h, t: compute_losses(h, t, max_positions=MOST), head, 2 * CHUNK + 1)
    for value, expected in zip(found, reference(head, soft_cap, 2 * CHUNK + 1), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("wrapped", [False, True])
def test_chunked_lm_loss_bf16_error_is_rounding(wrapped: bool) -> None:
    head = Head(bias=True, wrapped=wrapped, dtype=torch.bfloat16)
    compute_losses = ChunkedLMLoss(head, head.decoder, chunk=CHUNK)
    found = losses_and_gradients(lambda h, t: compute_losses(h, t, max_positions=MOST), head, MOST)
    assert found[0].dtype == torch.float32
    assert all(value.dtype == torch.bfloat16 for value in found[1:])
    for value, expected in zip(found, reference(head, None, MOST), strict=True):
        assert (value.double() - expected).norm() <= 2**-7 * expected.norm()


def test_chunked_lm_loss_bf16_gradients_independent_of_chunks() -> None:
    # Summed in bfloat16, those of 512 chunks are off by several times the rounding of one.
    head = Head(bias=True, wrapped=False, dtype=torch.bfloat16)
    expected = reference(head, None, 512)

    def error(chunk: int) -> list[float]:
        compute_losses = ChunkedLMLoss(head, head.decoder, chunk=chunk)
        found = losses_and_gradients(lambda h, t: compute_losses(h, t, max_positions=512), head, 512)
        return [float((value.double() - e).norm() / e.norm()) for value, e in zip(found[2:], expected[2:], strict=True)]

    for one_by_one, at_once in zip(error(1), error(512), strict=True):
        assert one_by_one <= 2.0 * at_once


@pytest.mark.parametrize("wrapped", [False, True])
def test_chunked_lm_loss_memory_is_one_chunk(wrapped: bool) -> None:
    head = Head(bias=True, wrapped=wrapped)
    for chunk, largest in ((CHUNK, CHUNK), (MOST, MOST)):
        compute_losses = ChunkedLMLoss(head, head.decoder, chunk=chunk, soft_cap=2.0)
        hidden, targets, upstream = case(MOST)
        with LargestLogits() as seen:
            compute_losses(hidden, targets, max_positions=MOST).backward(upstream)
        assert seen.positions == largest


@pytest.mark.parametrize("wrapped", [False, True])
def test_chunked_lm_loss_single_chunk_does_not_recompute(wrapped: bool) -> None:
    head = Head(bias=True, wrapped=wrapped)
    calls = []
    head.transform.register_forward_hook(lambda *_: calls.append(1))
    hidden, targets, upstream = case(CHUNK)
    ChunkedLMLoss(head, head.decoder, chunk=CHUNK)(hidden, targets, max_positions=CHUNK).backward(upstream)
    assert len(calls) == 1


def test_chunked_lm_loss_head_calls_independent_of_positions() -> None:
    for wrapped, expected in ((False, 1), (True, 2 * MOST // CHUNK)):
        head = Head(bias=True, wrapped=wrapped)
        for num_positions in POSITIONS:
            calls: list[int] = []
            handle = head.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            hidden, targets, upstream = case(num_positions)
            compute_losses = ChunkedLMLoss(head, head.decoder, chunk=CHUNK)
            compute_losses(hidden, targets, max_positions=MOST).backward(upstream)
            handle.remove()
            assert len(calls) == expected, (wrapped, num_positions)


def test_chunked_lm_loss_restores_projection_after_error() -> None:
    head = Head(bias=True, wrapped=False)
    hidden, targets, _ = case(MOST)
    with pytest.raises(RuntimeError):
        ChunkedLMLoss(head, head.decoder, chunk=CHUNK)(hidden[:, 1:], targets, max_positions=MOST)
    assert "forward" not in vars(head.decoder)
    assert head(hidden).shape == (MOST, V)


def test_chunked_lm_loss_gradient_reaches_hidden_states() -> None:
    head = Head(bias=True, wrapped=False)
    hidden, targets, upstream = case(MOST)
    anchor = torch.ones(H, requires_grad=True)
    chunked, at_once = (ChunkedLMLoss(head, head.decoder, chunk=chunk) for chunk in (CHUNK, MOST))
    found, expected = (
        torch.autograd.grad(of(hidden.detach() * anchor, targets, max_positions=MOST), anchor, upstream)[0]
        for of in (chunked, at_once)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in head.parameters())


def test_positions_per_chunk_fill_budget() -> None:
    assert positions_per_chunk(128_000, 256) == 524
    assert positions_per_chunk(256 * 1024, 1) == 1
    assert positions_per_chunk(10**9, 1) == 1
