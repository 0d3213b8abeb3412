"""Replay distillation: replayed text teaches what the model before the domain predicts there, not its tokens.

Shape legend: B local sequences, S positions, R replayed sequences among them, Q positions that these predict, H hidden
size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from das_ds.config import RunConfig
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.methods.base import Losses, Method
from das_ds.methods.teacher import Teacher, teacher_memory
from das_ds.methods.wrapper import MethodWrapper
from das_ds.models.lm_loss import Distillation
from das_ds.models.size import MemoryUse, ModelSize, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.context import DomainContext
    from das_ds.data.batch import Batch
    from das_ds.kernels.linear_divergence import LinearLogits

DIVERGENCE_LOSS = "replay_kl"
REPLAY_TEACHER = "replay_teacher"


class ReplayDistillation(MethodWrapper):
    """Any method that replays earlier text, which is learned by the divergence from an earlier model:

        L = (1/N) [ sum_new l_p(theta) + w sum_replayed KL(q_p(theta*) || q_p(theta)) ]          w = replay.kl_weight

    over the N predicted tokens of the global batch; q_p are the probabilities of all tokens at position p, l_p is the
    cross-entropy, and theta* the model before the domain, which reads the same corrupted rows without dropout. The
    method adds its own losses, and everything else it does is unchanged.

    It is the regularization of Marek et al. (*Forgetting in Language Models: Capacity, Optimization, and Self-Generated
    Replay*, 2026, arXiv 2605.26097) on replayed text instead of text that theta* writes; Learning without Forgetting
    (Li & Hoiem, 2018) has it on new data. With a fraction f of replay, w = b (1 - f) / f gives the two means a ratio
    of 1 : b.

    Keeps the teacher (see `TeacherMethod`), in domains that replay something; at ZeRO 3 its LM head is gathered in
    full until the end of the backward pass. Extra compute: its forward pass over the replayed rows, at ZeRO 3 over at
    least one row per rank and micro-step, and the LM head there.

    Args:
        method: the method that trains; its forward passes predict the positions of the batch before any others.

    Raises:
        ConfigError: the LM head does not end in a plain linear layer.
    """

    def __init__(self, method: Method[Any]) -> None:
        super().__init__(method)
        if not self.run.network.can_distill:
            raise ConfigError(
                "method.replay.loss: found kl with an LM head that does not end in a plain linear layer, because of "
                "its architecture or because LoRA wraps it; allowed there: ce"
            )
        self._weight = self.run.config.method.replay.kl_weight
        self._teacher = Teacher(self.run)

    def before_domain(self, domain: DomainContext) -> None:
        """The present model becomes the teacher, where something is replayed."""
        if self.run.config.replays(domain.name):
            self._teacher.begin()
        self._method.before_domain(domain)

    @contextmanager
    def losses(self, batch: Batch, token_scale: torch.Tensor) -> Iterator[Losses]:
        """The method's losses without those of replayed tokens, and the divergence in their place."""
        if not self._teacher.exists:
            with self._method.losses(batch, token_scale) as losses:
                yield losses
            return
        distillation = self._ask_teacher(batch)
        distilling = nullcontext() if distillation is None else self.run.network.distilling(distillation)
        with distilling, self._method.losses(batch, token_scale) as losses:
            divergence = token_scale.new_zeros(())
            if distillation is not None:
                assert distillation.divergences is not None, "the method has called the model"
                divergence = distillation.divergences.sum()
            yield {**losses, DIVERGENCE_LOSS: self._weight * divergence * token_scale}

    def _ask_teacher(self, batch: Batch) -> Distillation | None:
        """What replayed rows are to learn; None where this rank has no position in any."""
        positions = batch.replayed
        if positions is not None and positions.numel() > 0:
            return Distillation(positions, self._logits(*_teacher_inputs(batch)))
        if self.run.engine.zero_stage == 3:
            # All ranks gather the weights together, so that those without replayed rows take part.
            self._logits(*_one_row(batch))
        return None

    def _logits(
        self, input_ids: torch.Tensor, predicted: torch.Tensor, position_ids: torch.Tensor | None
    ) -> LinearLogits:
        """The teacher's logits (Q, V) at these positions of these rows, as inputs and weights of its last layer."""
        with self._teacher.active() as module, self.run.network.capturing_logits() as captured:
            # There are no tokens to predict; any will do.
            module(input_ids, predicted, predicted, position_ids)
        return captured[0]

    def after_domain(self, domain: DomainContext) -> None:
        """The next domain has another teacher."""
        self._teacher.end()
        self._method.after_domain(domain)

    def state_dict(self) -> ComponentState:
        """State of the method, and the teacher while there is one."""
        state = self._method.state_dict()
        if not self._teacher.exists:
            return state
        return replace(state, sharded={**state.sharded, REPLAY_TEACHER: self._teacher.flats()})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue with the same teacher."""
        self._method.load_state_dict(saved)
        if saved.has_sharded(REPLAY_TEACHER):
            self._teacher.begin(saved.sharded(REPLAY_TEACHER))
        else:
            self._teacher.end()


def _teacher_inputs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Replayed rows (R, S), their predicted positions (Q,) as indices into the flattened rows, and position ids."""
    rows = batch.replayed_rows
    assert rows is not None and batch.replayed is not None
    length = batch.input_ids.shape[1]
    positions = batch.predicted.index_select(0, batch.replayed)
    predicted = torch.searchsorted(rows, positions // length) * length + positions % length
    position_ids = None if batch.position_ids is None else batch.position_ids.index_select(0, rows)
    return batch.corrupted_ids.index_select(0, rows), predicted, position_ids


def _one_row(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The first row, at which nothing is predicted."""
    position_ids = None if batch.position_ids is None else batch.position_ids[:1]
    return batch.corrupted_ids[:1], batch.predicted[:0], position_ids


def replay_distillation_memory(size: ModelSize, sharding: Sharding) -> MemoryUse:
    """The teacher, and at ZeRO 3 its gathered LM head."""
    use = teacher_memory(size, sharding)
    if sharding.stage < 3:
        return use
    return use + MemoryUse(device={"LM head of the teacher": sharding.weight_bytes * size.vocabulary * size.hidden})


def replay_distillation_step_use(config: RunConfig, sharding: Sharding) -> StepUse:
    """The teacher's forward pass over replayed rows, of which the LM head is not counted."""
    batch_size = config.train.global_batch_size
    num_rows = max(config.num_replayed(domain.name) for domain in config.domains)
    if sharding.stage == 3:
        # At least one row of every rank and micro-step.
        num_rows = max(num_rows, batch_size // config.train.micro_batch_size)
    return StepUse(forward_passes=1, forward_rows=num_rows / batch_size, num_losses=1)
