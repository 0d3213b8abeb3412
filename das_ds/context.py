"""Run context: the objects that a method works with, the engine over a network, its units and its gates."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from das_ds.config import ObjectiveName, RunConfig
from das_ds.config.deepspeed import EngineConfig
from das_ds.data.batch import Batch
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.resumable import ResumableLoop
from das_ds.engine.engine import Engine
from das_ds.engine.sharded_init import ExactWeights
from das_ds.engine.zero import full_shape
from das_ds.functional.units import UnitLayout
from das_ds.models.architectures.spec import ArchitectureSpec, has_dropout
from das_ds.models.depths import frozen_parameters, known_depths
from das_ds.models.document_mask import check_document_mask
from das_ds.models.gates import UnitGates
from das_ds.models.language_model import LanguageModel
from das_ds.models.lora import Lora


@dataclass(frozen=True)
class RunContext:
    """Objects that a method may use during a run."""

    config: RunConfig
    engine: Engine
    layout: UnitLayout
    gates: UnitGates
    objective: ObjectiveName
    """Pre-training loss, and its name in metrics."""
    network: LanguageModel
    """The module that the engine runs."""
    view_dropout: float
    """Dropout at the units where views are made; 0 for networks that have dropout of their own."""
    lora: Lora | None = None
    """The adapters that are trained in place of the weights."""
    tokens: tuple[str, ...] = ()
    """The vocabulary by id, with the tokens that domains are to add at its end."""
    num_base_tokens: int | None = None
    """Tokens before the first domain; None: the vocabulary does not grow."""


class SampleBatches(Protocol):
    """Passes over this rank's batches of a sample of training sequences."""

    def __call__(self, label: str, *, num_samples: int | None = None) -> ResumableLoop[Batch]:
        """The pass of this label, always over the same sequences.

        Args:
            label: of the loop, by which a run that resumes finds it.
            num_samples: sequences, where the config gives no number; None: that of the config.
        """


@dataclass(frozen=True)
class CorpusSample:
    """A sample of the training text of one corpus."""

    label: str
    """Of loops over it, by which a run that resumes finds them; unique within a phase of the run."""
    batches: SampleBatches
    num_tokens: int | None
    """Tokens that the corpus is read with; None: the vocabulary does not grow."""


class ProbeBatches(Protocol):
    """Passes over a few training sequences that every rank reads in full."""

    def __call__(self, label: str, num_sequences: int) -> ResumableLoop[Batch]:
        """The pass of this label, the same batches on every rank and for any number of ranks.

        Args:
            label: of the loop, by which a run that resumes finds it.
            num_sequences: at most.
        """


def _do_not_suspend(_: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class DomainContext:
    """Objects that a method may use while it learns one domain."""

    index: int
    name: str
    sample_batches: SampleBatches
    """A pass over this rank's batches of `importance.num_samples` training sequences."""
    sample_steps: Callable[[str], ResumableLoop[list[Batch]]]
    """The same sequences as this rank's micro-batches of `gradient_batch_size` sequences of all ranks together."""
    run_folder: Path
    """For files of the run."""
    folder: Path
    """For files of the domain."""
    suspend_timeout: Callable[[str], AbstractContextManager[None]] = _do_not_suspend
    """Description of the work -> a context in which it may take any time; for writing while other ranks wait."""
    num_tokens: int | None = None
    """Tokens that the domain is read with; None: the vocabulary does not grow."""
    general: CorpusSample | None = None
    """The general corpus, where it has training text."""
    generated: CorpusSample | None = None
    """Text that the model wrote before the domain, where it is replayed."""
    probe_batches: ProbeBatches | None = None
    """A pass over a few training sequences of the domain; None: it has no text to look at."""


def build_context(
    config: RunConfig,
    model: PreTrainedModel,
    spec: ArchitectureSpec,
    engine_config: EngineConfig,
    ranks: ProcessGroup,
    *,
    exact: ExactWeights | None = None,
    tokens: tuple[str, ...] = (),
    num_base_tokens: int | None = None,
) -> RunContext:
    """Put a network under an engine, with LoRA or frozen layers where the config asks for them.

    Args:
        config, model, spec: of the run; LoRA changes the network.
        engine_config: DeepSpeed's settings.
        ranks: the process group.
        exact: see `Engine`.
        tokens, num_base_tokens: see `RunContext`.

    Raises:
        ConfigError: LoRA that does not fit the network, or without peft; layers to be frozen that it lacks; rates
            by layer in an architecture without embeddings; documents are to be isolated, and the network does not.
        ModelError: an architecture spec, or LoRA weights, that do not fit the network.
    """
    layout = spec.layout(model, full_shape)
    lora = None
    if config.model.lora is not None:
        lora = Lora.plan(model, layout, config.model.lora)
        initial = config.model.lora.init_from
        lora.attach(model, seed=config.seed, weights=Path(initial) if initial else None)
        layout = lora.layout(layout)
        if exact is not None:
            exact = exact.rename(lora.base_names(model))
    elif frozen := frozen_parameters(model, spec, config.method.frozen_part):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        layout = layout.without(frozen)
    # Not earlier: LoRA wraps the modules that have gates.
    gates = UnitGates(model, spec)
    network = LanguageModel(model, spec, logits_mib=config.train.max_logits_mib)
    parameters = dict(model.named_parameters())
    decay = config.train.layer_lr_decay
    depths = known_depths(model, spec, f"train.layer_lr_decay: found {decay:g}") if decay < 1.0 else None
    engine = Engine(
        network,
        {name: parameter for name, parameter in parameters.items() if parameter.requires_grad},
        config.train,
        engine_config.without_leaf_modules() if spec.has_experts else engine_config,
        ranks,
        exact,
        {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad},
        depths,
    )
    if config.data.document_mask:
        _check_document_mask(engine, model, spec, ranks)
    view_dropout = 0.0 if has_dropout(model.config, spec.dropouts) else config.method.view_noise
    return RunContext(
        config, engine, layout, gates, spec.objective, network, view_dropout, lora, tokens, num_base_tokens
    )


def _check_document_mask(engine: Engine, model: PreTrainedModel, spec: ArchitectureSpec, ranks: ProcessGroup) -> None:
    nothing = torch.zeros(0, dtype=torch.int64, device=ranks.info.device)
    engine.module.eval()
    check_document_mask(
        lambda input_ids, position_ids: engine.module(input_ids, nothing, nothing, position_ids)[0],
        model_type=spec.model_type,
        attention=model.config._attn_implementation,
        device=ranks.info.device,
    )
    engine.module.train()
    engine.weights.release_gathered()
