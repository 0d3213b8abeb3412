"""The continual-learning method: the keys that all methods have, and the lookup of the others' own keys.

The section `method` is a union that `method.name` discriminates: each method declares its keys in a subclass of
`MethodConfig`, in its own file in `das_ds/methods`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from das_ds.config.generation import GenerationConfig, ReplaySource
from das_ds.config.section import Section

DEFAULT_REPLAY_FRACTION = 1 / 16
"""Of a global batch, up to an integer number of sequences: default of methods that replay."""


class MergeConfig(Section):
    """Averaging of the weights before and after each domain, with any method."""

    weight: Annotated[float, Field(ge=0.0, lt=1.0)] | Literal["average"] | None = None
    """Weight of the model from before the domain; the trained model has the rest. `average` is t / (t + 1) after domain
    t = 1, 2, ..., so that the base model and all models so far have equal weight; null: the method's default, which is
    no merging for all but the method that does nothing else."""


class ReplayConfig(Section):
    """Earlier text in every global batch, with any method."""

    fraction: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Fraction of each global batch that is text of earlier domains, an integer number of sequences; null: the method's
    default, which is no replay for all but the method that does nothing else."""
    source: ReplaySource = "earlier"
    """What is replayed: `earlier` text of earlier domains; `generated` text that the model writes before each domain,
    which needs no earlier text and protects what it knew before the first domain as well; `both`, in equal shares of
    each earlier domain and of generated text."""
    generation: GenerationConfig = GenerationConfig()
    general: bool = False
    """Replay the training text of `general` as well, in the first domain too."""
    loss: Literal["ce", "kl"] = "ce"
    """What replayed text teaches: `ce` its tokens; `kl` what the model before the domain predicts there, by the
    divergence KL(that model || model), which needs a copy of that model."""
    kl_weight: float = Field(default=1.0, gt=0.0)
    """Factor of the divergence, as a mean over all predicted tokens of the batch."""


@dataclass(frozen=True)
class SampleSize:
    """How many training sequences a method measures on, and how they are batched."""

    num_samples: int | None
    """Sequences (at most the complete corpus is used); None: the method says how many when it measures."""
    batch_size: int | None = None
    """Sequences per rank and forward pass; None: `train.micro_batch_size`."""
    gradient_batch_size: int | None = None
    """Sequences per gradient, over all ranks; None: `train.global_batch_size`."""


@dataclass(frozen=True)
class FrozenPart:
    """The part of a network that a method does not train."""

    embeddings: bool
    """Embeddings, and an LM head that is tied to them."""
    num_layers: int
    """Layers from the first one on."""


class MethodConfig(Section):
    """The continual-learning method; `method: NAME` is short for `method: {name: NAME}`."""

    trains_jointly: ClassVar[bool] = False
    """All domains are one stage, learned at once."""
    supports_replay: ClassVar[bool] = True
    """False where no domain comes after another."""
    has_teacher: ClassVar[bool] = False
    """The method asks the model before the domain about all text."""
    default_merge_weight: ClassVar[float | None] = None
    """`merge.weight` where the config gives none; None: no merging."""
    state_keys: ClassVar[tuple[str, ...]] = ()
    """Keys, or sections of them, that decide what the method keeps of a domain; a run that continues another one
    (`continue_from`) has to have the same values."""
    default_replay_fraction: ClassVar[float | None] = None
    """`replay.fraction` where the config gives none, up to an integer number of sequences; None: no replay."""

    name: str
    """Method, see `das-ds methods`; its other keys are those that `das-ds methods NAME` prints."""
    merge: MergeConfig = MergeConfig()
    replay: ReplayConfig = ReplayConfig()

    @property
    def sample_size(self) -> SampleSize | None:
        """Size of the sample that the method measures on; None: it measures nothing."""
        return None

    @property
    def view_noise(self) -> float:
        """Dropout at the units where the method makes views of a sequence, for networks without dropout."""
        return 0.0

    @property
    def frozen_part(self) -> FrozenPart | None:
        """What the method does not train; None: it trains everything."""
        return None

    @property
    def merge_weight(self) -> float | Literal["average"] | None:
        """c by which weights are merged after each domain; None: they are not."""
        return self.default_merge_weight if self.merge.weight is None else self.merge.weight


class MethodClass(Protocol):
    """The part of a method class that the config uses."""

    Config: type[MethodConfig]


class MethodRegistry(Protocol):
    """The part of the methods package that the config uses."""

    METHODS: dict[str, MethodClass]
    DEFAULT_METHOD: str
    FIRST_CHOICE: str

    def validate_method(self, config: Any, engine_config: Any) -> None:
        """See `das_ds.methods.validate_method`."""


def load_methods() -> MethodRegistry:
    """The package of methods, loaded at its first use.

    This is a plug-in lookup, by name: methods are a layer above the config and build on it, and yet each declares the
    keys of its own section. The package imports torch, but neither DeepSpeed nor transformers.
    """
    registry: Any = importlib.import_module("das_ds.methods")
    return registry


def method_configs() -> dict[str, type[MethodConfig]]:
    """Name -> class of the section `method`, for every method."""
    return {name: method.Config for name, method in load_methods().METHODS.items()}


def parse_method(value: Any) -> MethodConfig:
    """The section `method` from its values, or from only a name.

    Raises:
        ValidationError: unknown name, or values that this method does not take.
    """
    if isinstance(value, MethodConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise PydanticCustomError("method_type", "expected the name of a method or a mapping")
    configs = method_configs()
    name = value.get("name", load_methods().DEFAULT_METHOD)
    if not isinstance(name, str) or name not in configs:
        unknown = PydanticCustomError("method_name", "allowed: {names}", {"names": " | ".join(configs)})
        raise ValidationError.from_exception_data(
            "MethodConfig", [InitErrorDetails(type=unknown, loc=("name",), input=name)]
        )
    return configs[name].model_validate(value)


AnyMethodConfig = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(parse_method)]
"""The section of any method."""
