"""DAS whose soft mask lies on directions instead of units or weights (`importance.granularity: direction`)."""

from __future__ import annotations

from pathlib import Path

from das_ds.context import DomainContext, RunContext
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.methods.base import Method
from das_ds.run_dir import DIRECTIONS_FILE
from das_ds.softmask.apply import apply_masks
from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.importance_file import link_importance
from das_ds.softmask.input_covariance import linear_layers


class Directions(Method):
    """Lets a linear layer W (o, d) learn least along the directions of its input that earlier domains use most:

        dW <- dW P        P = (I + M / c)^-1        M = sum over earlier domains k of A_k / (tr(A_k) / d)

    A_k = E[x x^T] (d, d) is the second moment of the layer's input over `importance.num_samples` sequences of domain k,
    by the model that has just learned it; c is `importance.half_saturation`. For an input x of earlier text, dW P x is
    small, whatever dW is: the layer goes on answering as it did. Directions that only new text uses learn freely. dW is
    the optimizer's whole step, since a mask on the gradient would be undone by Adam.

    In the eigenvectors of M that is DAS's mask 1 - I of an importance I = a / (a + c). P is the projector of orthogonal
    weight modification (Zeng et al., Nature Machine Intelligence 2019) with a larger constant; gradient projection
    memory (Saha et al., ICLR 2021) is its form with a threshold. Both modify the gradient.

    What is not the weight of a linear layer (biases, normalisation, embeddings that are not tied to the LM head) is not
    masked, nor are rows of tokens that no earlier domain had. Knowledge from before the first domain is known only from
    `importance.init_from`; there is no contrast, which needs units.

    Keeps an fp32 matrix M (d, d) per linear layer in every rank's host memory, P for the layers that the rank steps
    where the optimizer is, and, while a flat tensor is stepped, a copy of it.
    Extra compute: d / (3 * tokens of the global batch) of a step's, and a forward pass over the sample per domain.

    Raises:
        ModelError: the network has layers whose directions cannot be masked.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        # Before anything is measured: a network whose layers cannot be masked is refused.
        linear_layers(run)
        self._importance: DirectionImportance | None = None

    def before_domain(self, domain: DomainContext) -> None:
        """Before the first domain: the directions that earlier runs protect."""
        path = self.run.config.method.importance.init_from
        if path is not None and self._importance is None:
            self._importance = DirectionImportance.load(self.run, Path(path))
            if domain.num_tokens is None:
                self._importance.num_tokens = None

    def on_train_start(self, domain: DomainContext) -> None:
        """Protect what was learned so far; rows of tokens that were added since are left free."""
        if self._importance is not None:
            apply_masks(self.run.engine, self._importance, self.run.config.method.importance.half_saturation)

    def after_domain(self, domain: DomainContext) -> None:
        """Add the directions that the domain's text uses in every layer."""
        latest = DirectionImportance.measure(self.run, domain, f"inputs of {domain.name}")
        is_first = self._importance is None
        self._importance = latest.accumulate(self._importance)
        with domain.suspend_timeout("writing directions"):
            self._save(domain, latest, self._importance, is_first=is_first)

    def state(self) -> ComponentState:
        """Sum of the moments, equal on every rank."""
        if self._importance is None:
            return ComponentState(numbers={"num_tokens": None})
        return self._importance.state_dict()

    def load_state(self, saved: SavedComponentState) -> None:
        """In host memory, where nothing but the next domain's mask needs it."""
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
            # The sum over one domain is its file.
            self.run.engine.ranks.run_on_main(lambda: link_importance(domain_path, run_path))
        else:
            total.save(run_path, tokens)
