"""OSFT: orthogonal subspace fine-tuning (Nayak et al., ICLR 2026, arXiv 2504.07097), in weight space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from das_ds.config import MethodConfig, RunConfig
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.methods.base import Method
from das_ds.models.size import MemoryUse, ModelSize, Sharding, StepUse

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext
    from das_ds.softmask.frozen_subspaces import FrozenSubspaces


class OsftConfig(MethodConfig):
    """Orthogonal subspace fine-tuning: the leading singular directions of the weights are frozen, without any data."""

    name: Literal["osft"] = "osft"
    unfreeze_rank_ratio: float = Field(default=0.25, ge=0.0, le=1.0)
    """Fraction of the singular directions of each matrix that may change, those with the smallest singular values; 1
    freezes nothing, and 0 all but one direction."""


class OSFT(Method[OsftConfig]):
    """Freezes the k leading singular directions of each weight matrix W = U S V^T (o, d) of attention and MLPs:

        G <- (I - U_k U_k^T) G (I - V_k V_k^T)          before the step, and before the norm is taken for clipping
        dW <- (I - U_k U_k^T) dW (I - V_k V_k^T)        after the step, weight decay included
        k = floor((1 - unfreeze_rank_ratio) min(o, d))

    U and V are those of the fp32 weights at the start of each domain, the first one too: what the base model knows is
    protected without any text. W_k = U_k S_k V_k^T does not change within a domain. The second projection is needed
    because Adam divides every element by its own size, which takes the update out of the subspace.

    mini_trainer 0.9.0 trains the factors U', S', V' of the remaining directions and projects dU' and dV' before and the
    factors after the step; PEFT's `OSFConfig` projects the gradients of the factors only. The matrices W_k + X that can
    be reached are the same, but the optimizer's moments belong to factors there, and to the weights here. The targets
    are those of mini_trainer, and the experts of a layer in addition; embeddings, LM head, routers, normalization and
    biases are trained without a projection.

    A matrix is projected by one rank, which has its subspaces, 4 (o r_o + d r_d) bytes in fp32; a side is stored with
    its k frozen vectors, or the min(o, d) - k others where these are fewer and enough. At ZeRO stage 0 every rank
    has all of them. Matrices that shards cut travel to that rank and back, for gradients and for updates. Extra
    compute: 8 o d (r_o + r_d) operations per matrix and step, and a singular value decomposition of every matrix per
    domain.

    Raises:
        ConfigError: LoRA, whose matrices hold nothing of the base model.
    """

    Config = OsftConfig
    planned_matrices = "hidden"

    def __init__(self, run: RunContext) -> None:
        from das_ds.softmask.frozen_subspaces import build_subspace_layout
        from das_ds.softmask.hidden_matrices import find_hidden_matrices

        super().__init__(run)
        engine = run.engine
        self._layout = build_subspace_layout(find_hidden_matrices(run.layout), engine.weights.shards, engine.ranks)
        self._subspaces: FrozenSubspaces | None = None

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """All weights are trained."""
        if config.model.lora is not None:
            raise ConfigError(
                "model.lora: found adapters with method osft, which freezes directions of the weights themselves and "
                "would find nothing of the base model in adapters; expected null, or another method"
            )

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """Subspaces, products in a step, and a decomposition at the start of a domain; see `subspaces_memory`."""
        from das_ds.softmask.subspace_memory import subspaces_memory

        return subspaces_memory(size, sharding, cls.settings_in(config).unfreeze_rank_ratio)

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """Projections of gradients and updates, and exchanges of cut matrices; see `subspaces_step_use`."""
        from das_ds.softmask.subspace_memory import subspaces_step_use

        return subspaces_step_use(size, sharding, cls.settings_in(config).unfreeze_rank_ratio)

    def before_domain(self, domain: DomainContext) -> None:
        """Decompose the weights as they are."""
        from das_ds.softmask.frozen_subspaces import FrozenSubspaces

        self._subspaces = None
        with domain.suspend_timeout("singular value decomposition of the weights"):
            self._subspaces = FrozenSubspaces.decompose(
                self.run.engine, self._layout, self.settings.unfreeze_rank_ratio
            )

    def on_train_start(self, domain: DomainContext) -> None:
        """Project all further steps."""
        assert self._subspaces is not None, "before_domain comes before on_train_start"
        self._subspaces.mask()

    def after_domain(self, domain: DomainContext) -> None:
        """Free the subspaces: those of the next domain are found in its first weights."""
        from das_ds.softmask.apply import clear_masks

        clear_masks(self.run.engine)
        self._subspaces = None

    def state_dict(self) -> ComponentState:
        """The subspaces, within a domain."""
        return ComponentState() if self._subspaces is None else self._subspaces.state_dict()

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue with the same subspaces on any number of ranks: they are not those of the present weights."""
        from das_ds.softmask.frozen_subspaces import FrozenSubspaces

        self._subspaces = FrozenSubspaces.load_state_dict(self.run.engine, self._layout, saved)
