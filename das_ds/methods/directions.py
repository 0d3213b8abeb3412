"""Directions: a soft mask on directions of the input of linear layers, instead of units or weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from das_ds.config import MethodConfig, RunConfig, SampleSize
from das_ds.config.section import PathText
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.methods.base import Method
from das_ds.models.size import FP32, MemoryUse, ModelSize, Sharding
from das_ds.run_dir import DIRECTIONS_FILE

if TYPE_CHECKING:
    from das_ds.context import DomainContext, RunContext
    from das_ds.softmask.direction import DirectionImportance


class DirectionsConfig(MethodConfig):
    """Directions: linear layers learn least along the input directions that earlier domains use most."""

    name: Literal["directions"] = "directions"
    half_saturation: float = Field(default=3.0, gt=0.0)
    """c of the mask (I + M / c)^-1; larger protects less: a direction with c times the average share of the input keeps
    half of its update."""
    num_samples: int = Field(default=10_000, ge=1)
    """Sequences per domain on which the inputs are measured (at most the complete corpus is used)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank and forward pass of that measurement; null: `train.micro_batch_size`."""
    init_from: PathText | None = None
    """Accumulated directions file of an earlier run; null: protect nothing in the first domain."""

    @property
    def sample_size(self) -> SampleSize:
        """Size of the sample of inputs."""
        return SampleSize(self.num_samples, self.batch_size)


class Directions(Method[DirectionsConfig]):
    """Lets a linear layer W (o, d) learn least along the directions of its input that earlier domains use most:

        dW <- dW P        P = (I + M / c)^-1        M = sum over earlier domains k of A_k / (tr(A_k) / d)

    A_k = E[x x^T] (d, d) is the second moment of the layer's input over `num_samples` sequences of domain k, under the
    model that has just learned it; c is `half_saturation`. For an input x of earlier text, dW P x is small for any dW:
    the layer's output barely changes. Directions that only new text uses learn freely. dW is the optimizer's complete
    step. (Adam undoes a mask on the gradient that scales single weights; P mixes columns, so it would not undo P.)

    In the eigenvectors of M this is DAS's mask 1 - I with importance I = a / (a + c). P is the projector of orthogonal
    weight modification (Zeng et al., Nature Machine Intelligence 2019) with a larger constant; gradient projection
    memory (Saha et al., ICLR 2021) is its form with a threshold. Both modify the gradient.

    Only weights of linear layers are masked: not biases, normalization and embeddings that are not tied to the LM head,
    nor rows of tokens that no earlier domain had. Knowledge from before the first domain is protected only by
    `init_from`. There is no contrast, which needs units.

    Keeps an fp32 matrix M (d, d) per linear layer in every rank's host memory, P for the layers that the rank steps
    next to the optimizer's state, and a copy of each flat tensor during its step. Extra compute: d / (3 * tokens of the
    global batch) of a training step, and one forward pass over the sample per domain.

    Raises:
        ModelError: the network has layers whose directions cannot be masked.
    """

    Config = DirectionsConfig

    def __init__(self, run: RunContext) -> None:
        from das_ds.softmask.input_covariance import linear_layers

        super().__init__(run)
        # Before anything is measured: a network whose layers cannot be masked is refused.
        linear_layers(run)
        self._importance: DirectionImportance | None = None

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """Moments and masks of all linear layers, and the weights before the step.

        Roughly: per layer five matrices read the hidden states and one the neurons; two more belong to the LM head.
        """
        moments = FP32 * (size.num_layers * (5 * size.hidden**2 + size.inner**2) + 2 * size.hidden**2)
        return MemoryUse(
            optimizer={
                "direction masks": moments,
                "weights before the step": FP32 * size.trained // sharding.optimizer_shards,
            },
            host={"moments of inputs": moments},
            checkpoint=moments,
            domain=moments,
            # The sum over all domains.
            run=moments,
        )

    def before_domain(self, domain: DomainContext) -> None:
        """Before the first domain: the directions that earlier runs protect."""
        path = self.settings.init_from
        if path is not None and self._importance is None:
            from das_ds.softmask.direction import DirectionImportance

            self._importance = DirectionImportance.load(self.run, Path(path))
            if domain.num_tokens is None:
                self._importance.num_tokens = None

    def on_train_start(self, domain: DomainContext) -> None:
        """Protect the domains learned so far; rows of tokens added since are not masked."""
        if self._importance is not None:
            from das_ds.softmask.apply import apply_masks

            apply_masks(self.run.engine, self._importance, self.settings.half_saturation)

    def after_domain(self, domain: DomainContext) -> None:
        """Add the directions that the domain's text uses in every layer."""
        from das_ds.softmask.direction import DirectionImportance

        latest = DirectionImportance.measure(self.run, domain, f"inputs of {domain.name}")
        is_first = self._importance is None
        self._importance = latest.accumulate(self._importance)
        with domain.suspend_timeout("writing directions"):
            self._save(domain, latest, self._importance, is_first=is_first)

    def state_dict(self) -> ComponentState:
        """Sum of the moments, equal on every rank."""
        if self._importance is None:
            return ComponentState(metadata={"num_tokens": None})
        return self._importance.state_dict()

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """In host memory, where nothing but the next domain's mask needs it."""
        from das_ds.softmask.direction import DirectionImportance

        importance = DirectionImportance.load_state_dict(self.run, saved)
        self._importance = importance if importance.moments else None

    def _save(
        self, domain: DomainContext, latest: DirectionImportance, total: DirectionImportance, *, is_first: bool
    ) -> None:
        tokens = self.run.tokens[: domain.num_tokens]
        domain_path = domain.folder / DIRECTIONS_FILE
        run_path = domain.run_folder / DIRECTIONS_FILE
        latest.save(domain_path, tokens)
        if is_first:
            from das_ds.softmask.importance_file import link_importance

            # The sum over one domain is its file.
            self.run.engine.ranks.run_on_main(lambda: link_importance(domain_path, run_path))
        else:
            total.save(run_path, tokens)
