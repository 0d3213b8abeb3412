"""AdamW that DeepSpeed steps on its flat fp32 shards, with the step of important units scaled by 1 - I."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from das_ds.functional.adamw import masked_adamw_
from das_ds.functional.masks import Piece, fill_gaps


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay and, per flat tensor, a list of masked pieces (see `functional.adamw`).

    State keys are those of `torch.optim.AdamW` (`step`, `exp_avg`, `exp_avg_sq`), which DeepSpeed's checkpoints know.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        # Keyed by identity: DeepSpeed swaps its flat tensors in and out of param_groups but keeps the objects.
        self._pieces: dict[int, list[Piece]] = {}

    def set_pieces(self, pieces: dict[torch.Tensor, list[Piece]]) -> None:
        """Mask these flat tensors from now on, and no others."""
        self._pieces = {id(flat): fill_gaps(masked, flat.numel()) for flat, masked in pieces.items()}

    def reset_state(self) -> None:
        """Forget moments and step counts, as at the start of a new domain."""
        for state in self.state.values():
            for value in state.values():
                value.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, group)
        return loss

    def _step_one(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        if id(param) not in self._pieces:
            self._pieces[id(param)] = fill_gaps([], param.numel())
        masked_adamw_(
            param.view(-1),
            param.grad.view(-1),  # type: ignore[union-attr]
            state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1),
            state["step"],
            self._pieces[id(param)],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        state["step"] += 1
