"""Masked steps of optimizers that another trainer builds and calls, by hooks around `step`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from das_ds.config import ImportanceScore
from das_ds.distributed.collectives import all_reduce_sum, world_size
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.state import Flats, Shard, zeros_by_flat
from das_ds.engine.mask import DecayMasks, GradientMask, UpdateMasks
from das_ds.engine.step_masks import StepMasks, frozen_spans
from das_ds.errors import ConfigError, ModelError
from das_ds.functional.importance import importance_score

DECOUPLED = "adamw"
"""In the name of an optimizer that multiplies weights by 1 - rate * weight decay."""
Backward = Callable[[torch.Tensor], None]
"""Loss of this rank's batch -> None; its gradient, averaged over ranks, is scored."""
_masked_by: WeakKeyDictionary[torch.optim.Optimizer, ReferenceType[HookedSteps]] = WeakKeyDictionary()
"""Whose hooks an optimizer has: two masks of the same steps would act one after the other."""


class WeightsOfSteps:
    """The weights that are stepped, see `softmask.apply.StepWeights`."""

    def __init__(self, shards: list[Shard], flats: dict[str, torch.Tensor]) -> None:
        self.shards = shards
        self._flats = flats

    def flats_by_parameter(self) -> dict[str, torch.Tensor]:
        """Parameter -> the tensor that it is stepped in."""
        return self._flats

    @property
    def named_shards(self) -> dict[str, Shard]:
        """Parameter -> this rank's shard, of those that it has a shard of."""
        return {shard.name: shard for shard in self.shards}


class HookedSteps(ABC):
    """Steps that are masked by hooks of torch's optimizers; a `softmask.apply.MaskedSteps`.

    Before a step, gradients are masked unless `mask_gradients` did so already, and weights whose updates are masked are
    copied; after it, their updates are. So any optimizer steps as it always does, and sees the state that it made.

    Args:
        parameters: name -> parameter of everything that is trained.
        weights: what is stepped.
        ranks: the process group.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], weights: WeightsOfSteps, ranks: ProcessGroup) -> None:
        self.parameters = parameters
        self.weights = weights
        self.ranks = ranks
        self.prepare: Callable[[], None] = lambda: None
        """Called before each step, to renew masks that are out of date."""
        self._masks = StepMasks()
        self._gradient_mask: GradientMask | None = None
        self._frozen_elements: dict[int, int] = {}
        self._is_masked = False
        """Whether the present gradients are masked; subclasses reset it when there are others."""
        # An optimizer that nothing else refers to steps no more, and its state need not stay in memory.
        self._attached: WeakKeyDictionary[torch.optim.Optimizer, Callable[[], None]] = WeakKeyDictionary()
        self._removes: list[Callable[[], None]] = []
        self._old: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    # Masks, for `softmask.apply`.

    @property
    def decays_weights(self) -> bool:
        """Whether steps multiply weights by 1 - learning rate * weight decay."""
        groups = [group for optimizer in self._attached for group in optimizer.param_groups]
        return any(group.get("weight_decay", 0.0) > 0.0 for group in groups)

    def set_masks(self, masks: UpdateMasks, *, masks_decay: bool = True) -> None:
        """Mask the updates of these flat tensors from now on, and of no others."""
        assert masks_decay, "the optimizer's decay is part of its update"
        self._masks.set_updates(masks)

    def set_gradient_mask(self, mask: GradientMask | None, decay: DecayMasks | None = None) -> None:
        """Mask the gradients of `weights.shards` from now on; None: no longer."""
        self._gradient_mask = mask
        self._masks.set_decay(decay or {})

    def set_frozen(self, frozen: Mapping[str, int]) -> None:
        """Leave the first elements of parameters bitwise unchanged in all further steps, and no others."""
        self._frozen_elements, spans = frozen_spans(self.weights.shards, frozen)
        self._masks.set_frozen(spans)

    # Steps.

    @property
    def is_attached(self) -> bool:
        """Whether there is anything whose steps are masked."""
        return bool(self._attached)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask the steps of an optimizer from now on, beside those of others.

        Raises:
            ConfigError: others mask them.
        """
        earlier = _masked_by.get(optimizer, lambda: None)()
        if earlier is self:
            return
        if earlier is not None:
            raise ConfigError(
                f"optimizer: found {type(optimizer).__name__} whose steps another Protector masks, which would mask "
                "them twice; expected unwrap() of that one before, or a new optimizer"
            )
        # Without the compiler, where a caller compiles the step.
        before = optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step))
        after = optimizer.register_step_post_hook(torch.compiler.disable(self._after_step))

        def remove() -> None:
            before.remove()
            after.remove()

        self._attached[optimizer] = remove
        _masked_by[optimizer] = ref(self)

    def detach(self) -> None:
        """Mask no steps any more."""
        for optimizer, remove in list(self._attached.items()):
            remove()
            _masked_by.pop(optimizer, None)
        self._attached.clear()
        while self._removes:
            self._removes.pop()()

    def check_gradient_masks(self) -> None:
        """Check that masks of gradients alone protect.

        Raises:
            ConfigError: an optimizer that takes their signs, or whose decay is neither decoupled nor 0.
        """
        for optimizer in self._attached:
            kind = type(optimizer).__name__
            if "lion" in kind.lower():
                raise ConfigError(
                    f"apply_to: found gradient with {kind}, which steps by the sign of each element and so undoes the "
                    "mask; allowed with it: update, both"
                )
            for group in optimizer.param_groups:
                is_decoupled = group.get("decoupled_weight_decay", DECOUPLED in kind.lower())
                if group.get("weight_decay", 0.0) > 0.0 and not is_decoupled:
                    raise ConfigError(
                        f"apply_to: found gradient with {kind}, whose weight decay is no factor of the weights and "
                        "would not be masked; expected both or update, or weight_decay 0"
                    )

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Mask the gradients of the next step; a collective. They are masked once, however often this is called."""
        self.prepare()
        if self._is_masked or (self._gradient_mask is None and not self._frozen_elements):
            return
        gradients = self._gradients()
        if self._gradient_mask is not None:
            self._gradient_mask.apply_(gradients)
        if self._frozen_elements:
            torch._foreach_zero_([gradients[number][:numel] for number, numel in self._frozen_elements.items()])
        self._is_masked = True

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # The optimizer itself is the first of them.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:
            raise ConfigError(
                f"optimizer: found a closure in {type(optimizer).__name__}.step, whose gradients cannot be masked; "
                "expected step() after a backward pass"
            )
        self.mask_gradients()
        self._old = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                self._masks.remember_frozen_(param)
                self._masks.compensate_decay_(param, group)
                is_masked = self._masks.update_mask(param) is not None
                self._old.append((param, param.detach().clone() if is_masked else None))

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for param, old in self._old:
            mask = self._masks.update_mask(param)
            if mask is not None and old is not None:
                flat = param.data.view(-1)
                before = old.view(-1)
                for chunk in mask.chunks():
                    mask.blend_(flat[chunk], before[chunk], chunk)
                mask.finish_(flat)
            self._masks.restore_frozen_(param)
        self._old = []

    @abstractmethod
    def _gradients(self) -> Sequence[torch.Tensor]:
        """(numel,) averaged gradient of each of this rank's shards, views of what is stepped by."""

    # Measurements.

    @property
    @abstractmethod
    def runner(self) -> Callable[..., Any]:
        """What runs the network for a backward pass of all of its weights."""

    @abstractmethod
    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Shape of the complete parameter."""

    @abstractmethod
    def release_gathered(self) -> None:
        """Free the weights that a pass without a complete backward pass gathered."""

    @abstractmethod
    def accumulate_importance(self, kind: ImportanceScore) -> AbstractContextManager[tuple[Flats, Backward]]:
        """Sums, flat tensor -> (F,) float32, and a function that adds the score of a gradient; nothing is trained."""


class TorchSteps(HookedSteps):
    """Steps of torch's own parameters, on one rank or, with averaged gradients, on several (DDP).

    Args:
        parameters: name -> parameter of everything that is trained.
        runner: the module.
        ranks: the process group.

    Raises:
        ModelError: a parameter that cannot be masked in place.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], runner: nn.Module, ranks: ProcessGroup) -> None:
        for name, parameter in parameters.items():
            _check_parameter(name, parameter)
        shards = [Shard(name, parameter, 0, 0, parameter.numel()) for name, parameter in parameters.items()]
        super().__init__(parameters, WeightsOfSteps(shards, dict(parameters)), ranks)
        self._runner = runner
        for parameter in parameters.values():
            # A gradient that was added to since is masked only in part; the mask then acts before the next step.
            parameter.register_post_accumulate_grad_hook(self._note_backward)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._stepped: dict[str, TensorWeakRef] = {}
        """Masked gradients that a step has used; another one in their place was put there without a backward pass."""

    def _note_backward(self, _: torch.Tensor) -> None:
        self._is_masked = False

    def mask_gradients(self) -> None:
        """See `HookedSteps`."""
        gradients = {name: self.parameters[name].grad for name in self._stepped}
        if any(gradient is not None and gradient is not self._stepped[name]() for name, gradient in gradients.items()):
            self._is_masked = False
        if not self._is_masked:
            self._stepped = {}
        super().mask_gradients()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """See `HookedSteps`.

        Raises:
            ConfigError: an optimizer of other parameters, or one whose steps others mask.
        """
        stepped = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        if unknown := [param for param in stepped if id(param) not in self._names]:
            raise ConfigError(
                f"optimizer: found {len(unknown)} of its {len(stepped)} tensors, the first of shape "
                f"{tuple(unknown[0].shape)}, that are no trained parameters of the protected model; expected an "
                "optimizer of model.parameters(), built after the model was moved or wrapped"
            )
        super().attach(optimizer)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._check_stepped(optimizer)
        super()._before_step(optimizer, args, kwargs)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for param, _ in self._old:
            if param.grad is not None:
                self._stepped[self._names[id(param)]] = TensorWeakRef(param.grad)
        super()._after_step(optimizer, args, kwargs)

    def _check_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that what was added to an optimizer, unfrozen or converted since it was attached is masked as well.

        Raises:
            ConfigError: a parameter that was not trained when the masks were built.
            ModelError: one that is masked in place no more.
        """
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                name = self._names.get(id(param))
                if name is None:
                    raise ConfigError(
                        f"optimizer: found a gradient of a tensor of shape {tuple(param.shape)} that was no trained "
                        "parameter of the model when the Protector was built, so that nothing masks it; expected "
                        "requires_grad as it will be trained before Protector(model)"
                    )
                _check_parameter(name, param)

    def _gradients(self) -> list[torch.Tensor]:
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:
                gradients.append(torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device))
                continue
            if not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
            gradients.append(parameter.grad.view(-1))
        return gradients

    @property
    def runner(self) -> Callable[..., Any]:
        """The module itself."""
        return self._runner

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """Its shape."""
        return parameter.shape

    def release_gathered(self) -> None:
        """Nothing is gathered."""

    @contextmanager
    def accumulate_importance(self, kind: ImportanceScore) -> Iterator[tuple[Flats, Backward]]:
        """See `HookedSteps`; gradients of parameters stay as they are."""
        parameters = list(self.parameters.values())
        sums = zeros_by_flat(self.weights.shards, torch.float32)

        def backward(loss: torch.Tensor) -> None:
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
            ):
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                mean = all_reduce_sum(gradient.float().contiguous()) / world_size()
                sums[parameter] += importance_score(mean, parameter.detach(), kind).view(-1)

        yield sums, backward


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
        raise ModelError(
            f"{name}: found a DTensor, as of FSDP or tensor parallelism, expected a complete tensor; shard the model "
            "with DeepSpeed ZeRO instead"
        )
    if parameter.dtype != torch.float32:
        raise ModelError(
            f"{name}: found weights in {str(parameter.dtype).removeprefix('torch.')}, whose masked updates would be "
            "rounded away, expected float32; load the model in float32 and train under autocast (bf16=True)"
        )
    if not parameter.is_contiguous():
        raise ModelError(f"{name}: found a tensor of strides {parameter.stride()}, expected a contiguous one")
