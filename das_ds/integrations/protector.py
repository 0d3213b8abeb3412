"""Protector: measures what a network needs for its text, and masks the steps of any trainer by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from das_ds.distributed.process_group import adopt_process_group
from das_ds.errors import ConfigError, ImportanceError, ModelError
from das_ds.functional.token_ids import tokens_by_id
from das_ds.integrations.direction_protection import DirectionProtection
from das_ds.integrations.network import Forward, FullShape, Network, named_objective
from das_ds.integrations.parameter_protection import ParameterProtection
from das_ds.integrations.protection import Protection
from das_ds.integrations.settings import (
    DEFAULT_METHOD,
    DirectionsSettings,
    MethodName,
    parse_architecture,
    parse_settings,
)
from das_ds.integrations.steps import HookedSteps, TorchSteps
from das_ds.integrations.unit_protection import UnitProtection
from das_ds.models.architectures.from_config import spec_from_config
from das_ds.models.architectures.registry import ARCHITECTURES
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.user_files import expand_path

METHOD = "method"
TENSORS = "tensors"
NUM_TOKENS = "num_tokens"


class Protector:
    """Protects what a model knows while another trainer trains it.

        protector = Protector(model, method="directions")
        protector.measure(dataloader_of_what_must_stay)
        optimizer = protector.wrap(torch.optim.AdamW(model.parameters()))

    All further `optimizer.step()` are masked. Measured again after the next domain, a protector protects both. With
    several ranks, all of them call every method together.

    Args:
        model: a module of supported layers, alone or wrapped (DDP, `torch.compile`), on its device and in float32, with
            `requires_grad` set as it will be trained; or a DeepSpeed engine, in any precision.
        method: `directions`, `unit` (importance of heads, neurons and outputs; needs a table of units) or `parameter`
            (importance of weights).
        architecture: table of units of a model that das_ds does not know, as `model.architecture` of a run config.
        tokenizer: compares vocabularies of files; rows of tokens that were added since a file was written are free.
        forward: (model, batch) -> anything, runs the model on a batch; None: a mapping has the model's keyword
            arguments, and of a list or tuple the first entry is its input.
        loss: (model, batch) -> scalar, for `parameter`; None: that of a language model and the batch's labels, or
            what the model's output has as `loss`.
        settings: of the method's mask, by the names of the section `method` of a run config.

    Raises:
        ConfigError: unknown method, or a setting that it does not take; an engine that cannot be masked.
        ModelError: a layer that the method cannot protect, or weights that are not masked in place.
    """

    def __init__(
        self,
        model: nn.Module,
        method: MethodName = DEFAULT_METHOD,
        *,
        architecture: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        forward: Forward | None = None,
        loss: Forward | None = None,
        **settings: Any,
    ) -> None:
        parsed = parse_settings(method, settings)
        self.method = method
        module = unwrap_model(model)
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not trained:
            raise ModelError(f"model: found no trained parameter in {type(module).__name__}, expected at least one")
        device = next(iter(trained.values())).device
        ranks = adopt_process_group(device)
        self._engine = model if is_engine(model) else None
        self._steps: HookedSteps
        if self._engine is not None:
            from das_ds.integrations.zero_steps import ZeroSteps

            self._steps = ZeroSteps(self._engine, trained, ranks)
        else:
            self._steps = TorchSteps(trained, module, ranks)
        spec = _find_spec(module, method, architecture, self._steps.full_shape)
        network = Network(module, trained, spec, forward, loss, self._steps.full_shape)
        tokens = () if tokenizer is None else tokens_by_id(tokenizer.get_vocab())
        self._protection: Protection
        if isinstance(parsed, DirectionsSettings):
            self._protection = DirectionProtection(network, self._steps, tokens, parsed)
        else:
            build = UnitProtection if method == "unit" else ParameterProtection
            self._protection = build(network, self._steps, tokens, parsed)
            _check_groups(network, parsed.softmask.groups)
        self._is_stale = False
        self._had_decay = False
        """Whether weights decayed when masks were applied, which depend on it."""
        self._steps.prepare = self._renew

    @property
    def is_empty(self) -> bool:
        """Whether nothing is protected yet, so that steps are those of the optimizer alone."""
        return self._protection.is_empty

    def measure(self, dataloader: Iterable[Any]) -> None:
        """Protect what the model needs for this text, in addition to what is protected already; a collective.

        The model runs without dropout; its weights, gradients and optimizer stay as they are. Measure after the model
        has learned the text, or, for what it knew before, in the beginning.

        Args:
            dataloader: batches as for training, those of this rank, all of which are read; `parameter` takes one
                gradient of each. `directions` may read it several times, so it is no iterator.

        Raises:
            DataError: a rank without batches, or batches without the loss that the method needs.
            TrainingError: an input or a gradient that is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            self._protection.measure(dataloader)
        self._is_stale = True

    def wrap(self, optimizer: Any = None) -> Any:
        """Mask all further steps, by all that is protected when they begin; a collective with the first step.

        Steps of optimizers that were passed before stay masked, so that several may step parts of a model.

        Args:
            optimizer: any of torch, or one that accelerate wraps, which steps the model's parameters by `step()`; None,
                or the engine, where the model is a DeepSpeed engine. A copy of it (`copy.deepcopy`, pickle) has no
                masks: torch does not copy hooks.

        Returns:
            The optimizer itself, whose state and schedule stay its own.

        Raises:
            ConfigError: an optimizer of other parameters, none of torch, or one whose steps another Protector masks.
        """
        # Masks depend on how the optimizer decays weights.
        self._is_stale = not self.is_empty
        if self._engine is not None:
            if optimizer is not None and optimizer is not self._engine:
                raise ConfigError(
                    f"optimizer: found {type(optimizer).__name__}, but DeepSpeed steps its own; expected wrap() alone"
                )
            self._steps.detach()
            self._steps.attach_engine()  # type: ignore[attr-defined]
            return self._engine
        inner = unwrap_optimizer(optimizer)
        if not isinstance(inner, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer: found {type(optimizer).__name__}, expected a torch.optim.Optimizer, whose steps have hooks"
            )
        self._steps.attach(inner)
        return optimizer

    def unwrap(self) -> None:
        """Mask no steps any more."""
        self._steps.detach()

    def mask_gradients(self) -> None:
        """Mask the gradients now, to be called before they are clipped: the norm is then that of masked gradients.

        Not needed with DeepSpeed, nor without clipping: gradients that were not masked are masked by `step()`.
        """
        self._steps.mask_gradients()

    def save(self, path: str | Path) -> None:
        """Write what is protected to one file, atomically, which runs of das_ds read too; a collective.

        Raises:
            ImportanceError: nothing is protected yet.
            RunFolderError: the file cannot be written.
        """
        self._check_not_empty("save")
        self._protection.save(_as_path(path))

    def load(self, path: str | Path) -> None:
        """Protect what a file says, of this class or of a run of das_ds, in place of what was measured; a collective.

        Raises:
            ImportanceError: missing or damaged file, or one of another model, method or vocabulary.
        """
        self._protection.load(_as_path(path))
        self._is_stale = True

    def trace(self, batch: Any) -> None:
        """Find the layers by a forward pass on a batch, before `load` or `load_state_dict` of a model that reads no
        token ids; a collective."""
        if isinstance(self._protection, DirectionProtection):
            self._protection.trace(batch)

    def state_dict(self) -> dict[str, Any]:
        """What is protected, complete and in host memory on every rank; a collective."""
        tensors = {} if self.is_empty else self._protection.tensors()
        return {METHOD: self.method, TENSORS: tensors, NUM_TOKENS: self._protection.num_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Protect what `state_dict` gave, in place of what was measured, on any number of ranks; a collective.

        Raises:
            ImportanceError: it is of another model or method.
        """
        if not isinstance(state, Mapping):
            raise ImportanceError(f"state_dict: found a {type(state).__name__}, expected what state_dict() gives")
        if state.get(METHOD) != self.method:
            raise ImportanceError(f"state_dict: found method {state.get(METHOD)}, expected {self.method}")
        tensors = state.get(TENSORS)
        if not isinstance(tensors, Mapping) or not all(map(torch.is_tensor, tensors.values())):
            raise ImportanceError(
                f"state_dict: found no tensors by name in {TENSORS}, expected what state_dict() gives"
            )
        if tensors:
            self._protection.load_tensors(dict(tensors), state.get(NUM_TOKENS))
        else:
            self._protection.clear()
        self._is_stale = True

    def __getstate__(self) -> Any:
        # Masks belong to parameters by identity, and hooks of parameters and optimizers are not copied.
        raise ConfigError(
            "Protector: found a copy or a pickle of one, which would mask nothing; expected state_dict(), and a "
            "Protector of the other model"
        )

    def _renew(self) -> None:
        decays = self._steps.decays_weights
        if self._is_stale or (decays != self._had_decay and not self.is_empty):
            self._protection.apply()
            # Not earlier: steps after an error must not be without masks.
            self._is_stale = False
            self._had_decay = decays

    def _check_not_empty(self, what: str) -> None:
        if self.is_empty:
            raise ImportanceError(f"{what}: found nothing that is protected, expected measure() or load() before")


def unwrap_model(model: nn.Module) -> nn.Module:
    """A model without DDP, `torch.compile` and DeepSpeed's engine around it.

    Raises:
        ModelError: FSDP, whose parameters are not those of the model.
    """
    while True:
        inner: Any = model
        if "FullyShardedDataParallel" in type(model).__name__ or type(model).__name__.startswith("FSDP"):
            raise ModelError(
                "model: found one that FSDP shards, expected a complete one (DDP) or a DeepSpeed engine (ZeRO)"
            )
        if hasattr(model, "_orig_mod"):
            model = inner._orig_mod
        elif is_engine(model) or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = inner.module
        else:
            return model


def is_engine(model: Any) -> bool:
    """Whether a model is a DeepSpeed engine, without loading DeepSpeed."""
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def unwrap_optimizer(optimizer: Any) -> Any:
    """An optimizer without what accelerate puts around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _find_spec(
    model: nn.Module, method: str, architecture: Mapping[str, Any] | None, full_shape: FullShape
) -> ArchitectureSpec | None:
    """The table of a model; None where the method needs none and das_ds has none that fits, as of another head."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if architecture is not None:
        spec: ArchitectureSpec | None = spec_from_config(parse_architecture(architecture), model_type)
    else:
        spec = ARCHITECTURES.get(model_type)
        # Of a causal encoder, such as BertLMHeadModel, not that of its type.
        if spec is not None and (objective := named_objective(model)) is not None:
            spec = replace(spec, objective=objective)
    if method == "unit" or architecture is not None:
        if spec is None or not isinstance(model, PreTrainedModel):
            raise ModelError(
                f"model: found {type(model).__name__}, which has no table of units, expected a model of transformers "
                f"without adapters, of type {', '.join(sorted(ARCHITECTURES))}, or with architecture=TABLE (`das-ds "
                "inspect MODEL` proposes one)"
            )
        return spec
    if spec is None or not isinstance(model, PreTrainedModel):
        return None
    try:
        spec.layout(model, full_shape)
    except ModelError:
        return None
    return spec


def _check_groups(network: Network, groups: Any) -> None:
    allowed = [*network.layout.num_units, "unowned"]
    if unknown := [group for group in groups or () if group not in allowed]:
        raise ConfigError(
            f"groups: found {unknown[0]}, which this model has no units of; allowed: {', '.join(allowed)}"
        )


def _as_path(path: str | Path) -> Path:
    return Path(expand_path(str(path)))
