"""The network of another trainer as measurements see it: its layers, its forward pass, its losses and its batches.

Shape legend: B rows of a batch, S positions, n vectors that a layer reads, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from das_ds.config import ObjectiveName
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import all_reduce_max, world_size
from das_ds.errors import DataError, ModelError
from das_ds.functional.losses import sequence_token_loss
from das_ds.functional.units import UnitLayout, block_shape
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.find_readers import embedding_names, find_readers
from das_ds.models.gates import UnitGates
from das_ds.models.matrix_readers import MatrixReader
from das_ds.models.moe import RoutedTokens
from das_ds.models.vocabulary import vocabulary_parameters
from das_ds.softmask.layer_inputs import InputKind, LayerInputs, classify_traced
from das_ds.softmask.linear_inputs import check_readers_complete

IGNORED = -100
"""Label of positions that predict nothing."""

Forward = Callable[[Any, Any], Any]
"""(module or what wraps it, batch) -> output."""
FullShape = Callable[[nn.Parameter], torch.Size]


@dataclass(frozen=True)
class TextBatch:
    """Which vectors of a batch count."""

    tokens: torch.Tensor | None
    """(B, S) float32, 1 for tokens and 0 for padding; None: everything counts."""
    predicted: torch.Tensor | None
    """(B, S) float32, 1 where a token is predicted; None: where `tokens` is 1."""


class Network:
    """A network of supported layers.

    Args:
        model: without wrappers.
        trained: name -> parameter of everything that is trained.
        spec: table of units; None: the network has none.
        forward: runs it on a batch; None: mappings are its keyword arguments, of a sequence the first is its argument.
        loss: scalar loss of a batch; None: that of language models with labels, or what the output has as `loss`.
        full_shape: gives the shape of a complete parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: dict[str, nn.Parameter],
        spec: ArchitectureSpec | None,
        forward: Forward | None,
        loss: Forward | None,
        full_shape: FullShape,
    ) -> None:
        self.model = model
        self.trained = trained
        self.spec = spec
        self._forward = forward
        self._loss = loss
        self._full_shape = full_shape
        self._layers: LayerInputs | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(iter(self.trained.values())).device

    @cached_property
    def text_model(self) -> PreTrainedModel | None:
        """The Hugging Face model that reads token ids, without adapters around it; None: it is another network."""
        find_base: Any = getattr(self.model, "get_base_model", lambda: self.model)
        inner = find_base()
        if self._forward is not None or not isinstance(inner, PreTrainedModel):
            return None
        is_text = inner.main_input_name == "input_ids" and not getattr(inner.config, "is_encoder_decoder", False)
        return inner if is_text else None

    @cached_property
    def objective(self) -> ObjectiveName | None:
        """`clm` or `mlm`; None: it is no language model."""
        return named_objective(self.text_model) if self.spec is None else self.spec.objective

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Trained parameter -> its complete shape."""
        return {name: self._full_shape(parameter) for name, parameter in self.trained.items()}

    @cached_property
    def layout(self) -> UnitLayout:
        """Units, of a network with a table; else none, and only sizes."""
        if self.spec is not None and isinstance(self.model, PreTrainedModel):
            layout = self.spec.layout(self.model, self._full_shape)
            return layout.without({name for name in layout.shapes if name not in self.trained})
        config = getattr(self.model, "config", None)
        model_type = str(getattr(config, "model_type", type(self.model).__name__))
        shapes = {name: block_shape(shape) for name, shape in self.shapes.items()}
        vocabulary = vocabulary_parameters(self.model) if isinstance(self.model, PreTrainedModel) else []
        return UnitLayout(model_type, 0, {}, (), shapes, frozenset(vocabulary) & frozenset(shapes))

    @cached_property
    def gates(self) -> UnitGates:
        """Gates on its units."""
        assert self.spec is not None and isinstance(self.model, PreTrainedModel), "a network with a table of units"
        return UnitGates(self.model, self.spec)

    # Passes.

    def run(self, batch: Any, through: Callable[..., Any] | None = None) -> Any:
        """The output of a batch on the network's device; labels, which would only cost a loss, are left out.

        Args:
            batch: as data loaders give it.
            through: what runs the network; None: itself.
        """
        runner: Any = self.model if through is None else through
        if self._forward is not None:
            return self._forward(runner, batch)
        if isinstance(batch, Mapping):
            return runner(**{key: value for key, value in batch.items() if key != "labels" and self._takes(key)})
        return runner(batch[0] if isinstance(batch, list | tuple) else batch)

    def _takes(self, key: str) -> bool:
        # Of the class, as accelerate and DeepSpeed wrap the method of an object; and without adapters, which pass on
        # all that they get.
        parameters = inspect.signature(type(self.text_model or self.model).forward).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        # Models of transformers pass on whatever they do not know, which is not always harmless.
        return key in parameters or (takes_any and self.text_model is None)

    def loss(self, batch: Any, through: Callable[..., Any] | None = None) -> torch.Tensor:
        """Scalar loss of a batch.

        Raises:
            DataError: there is none.
        """
        if self._loss is not None:
            return torch.as_tensor(self._loss(self.model if through is None else through, batch))
        if self.objective is not None and isinstance(batch, Mapping) and "labels" in batch:
            return self.sequence_losses(batch, through).mean()
        runner: Any = self.model if through is None else through
        output = runner(**batch) if isinstance(batch, Mapping) else self.run(batch, through)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise DataError(
                f"loss: found an output of {type(self.model).__name__} without loss, expected one; pass labels in the "
                "batches, or loss=FUNCTION, which gets (model, batch)"
            )
        return torch.as_tensor(loss)

    def sequence_losses(self, batch: Any, through: Callable[..., Any] | None = None) -> torch.Tensor:
        """(B,) mean loss of each row over its own predicted positions.

        Raises:
            DataError: the network is no language model, or the batch has no labels.
        """
        self.num_sequences(batch)
        logits = self.run(batch, through).logits
        labels = batch["labels"]
        if self.objective == "clm":
            logits = logits[:, :-1]
            labels = labels[:, 1:]
        chosen = labels != IGNORED
        losses = functional.cross_entropy(logits[chosen].float(), labels[chosen], reduction="none")
        return sequence_token_loss(losses, chosen.nonzero()[:, 0], len(labels))

    def num_sequences(self, batch: Any) -> int:
        """B of a batch of a language model.

        Raises:
            DataError: the network is no language model, or the batch has no labels.
        """
        if self.objective is None or not isinstance(batch, Mapping) or "labels" not in batch:
            raise DataError(
                f"loss: found {type(self.model).__name__} with batches {_describe(batch)}, expected a causal or masked "
                "language model and batches with labels, whose rows have a loss each"
            )
        return len(batch["labels"])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the network runs without dropout; afterwards every module as before."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    def batches(self, dataloader: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """(batch on the network's device, whether it counts), equally many on every rank; a collective.

        A rank whose batches are at their end repeats its last one, which does not count, until all others are.

        Raises:
            DataError: a rank has no batch.
        """
        source = iter(dataloader)
        batch: Any = None
        while True:
            latest = next(source, None)
            # Bits: some rank has a batch; some rank has none and never had.
            state = torch.tensor([latest is not None, latest is None and batch is None], dtype=torch.float32)
            has_batch, lacks_batch = all_reduce_max(state.to(self.device)).bool().tolist()
            if lacks_batch:
                raise DataError(
                    "dataloader: found no batch" + (" on a rank" if world_size() > 1 else "") + ", expected at least "
                    "one on every rank; iterators are used up after one pass"
                )
            if not has_batch:
                return
            if latest is not None:
                batch = to_device(latest, self.device)
            yield batch, latest is not None

    # Inputs of layers.

    def layers(self, batch: Any) -> LayerInputs:
        """The masked matrices and where their inputs are read; found by one forward pass, at first.

        Args:
            batch: any, for networks that read something else than token ids.

        Raises:
            ModelError: a trained layer of a kind that is not known, or one that does not run.
        """
        if self._layers is None:
            readers = find_readers(self.model, self.trained, None, self._full_shape)  # type: ignore[arg-type]
            embeddings = embedding_names(self.model, self.trained)  # type: ignore[arg-type]
            check_readers_complete(readers, self.shapes, embeddings, "method: found directions")
            with self.evaluating(), torch.no_grad():
                self._layers = LayerInputs.trace(readers, lambda tiny: self._run_tiny(tiny, batch), self._classify)
            if not self._layers.matrices:
                raise ModelError(
                    f"model: found no trained linear layer in {type(self.model).__name__}, expected at least one"
                )
        return self._layers

    def _run_tiny(self, tiny: Batch, batch: Any) -> None:
        if self.text_model is not None:
            self.model(input_ids=tiny.input_ids.to(self.device))
        else:
            self.run(batch)

    @cached_property
    def _head(self) -> set[nn.Module]:
        """Modules after the last hidden states."""
        assert self.text_model is not None, "a model that reads token ids"
        return set(self.text_model.modules()) - set(self.text_model.base_model.modules())

    def _classify(self, name: str, reader: MatrixReader, x: torch.Tensor) -> InputKind:
        if self.text_model is None:
            # Nothing is known of the vectors: all of them count.
            return InputKind.PREDICTED
        return InputKind.PREDICTED if reader.module in self._head else classify_traced(name, reader, x)

    def text_batch(self, batch: Any) -> TextBatch:
        """Which vectors of a batch count."""
        if self.text_model is None or not isinstance(batch, Mapping):
            return TextBatch(None, None)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        labels = batch.get("labels")
        tokens = mask.float() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids).float()
        if self.objective is None or labels is None or labels.shape != ids.shape:
            return TextBatch(tokens, tokens)
        if self.objective == "clm":
            # A position predicts the next token.
            labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return TextBatch(tokens, (labels != IGNORED).float())


def named_objective(model: nn.Module | None) -> ObjectiveName | None:
    """The objective whose loss the class of a Hugging Face model has, by its name; None: it is no language model."""
    name = type(model).__name__
    return "clm" if name.endswith(("ForCausalLM", "LMHeadModel")) else "mlm" if name.endswith("ForMaskedLM") else None


def weigh_tokens(
    batch: TextBatch, kind: InputKind, num_vectors: int, routed: RoutedTokens | None
) -> torch.Tensor | None:
    """Weights of vectors by token, see `linear_inputs.record_inputs`; 0 for padding.

    Raises:
        ModelError: vectors that belong neither to tokens nor to rows.
    """
    weights = batch.predicted if kind is InputKind.PREDICTED else batch.tokens
    if weights is None or kind is InputKind.TABLE:
        return None
    if routed is not None:
        return weights.flatten()[routed.tokens] * routed.weights.float().square()
    if num_vectors == weights.numel():
        return weights.flatten()
    per_row, rest = divmod(num_vectors, len(weights))
    if not rest:
        return weights.amax(dim=1).repeat_interleave(per_row)
    # Some models leave out padding before their first layer.
    if num_vectors == int(weights.sum()):
        return None
    raise ModelError(
        f"model: found a layer that reads {num_vectors} vectors of a batch {tuple(weights.shape)}, expected one for "
        "each token, or as many for each row"
    )


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with all of its tensors on a device."""
    if torch.is_tensor(value):
        # Autograd keeps no tensors of inference mode.
        return value.clone().to(device) if value.is_inference() else value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(item, device) for item in value]
    return value


def _describe(batch: Any) -> str:
    return f"of {', '.join(batch)}" if isinstance(batch, Mapping) else f"that are {type(batch).__name__}s"
