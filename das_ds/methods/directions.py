"""DAS whose soft mask lies on directions instead of units or weights (`importance.granularity: direction`)."""

from __future__ import annotations

from pathlib import Path

import torch

from das_ds.context import DomainContext, RunContext
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.functional.directions import direction_projector
from das_ds.methods.base import Method
from das_ds.run_dir import DIRECTIONS_FILE
from das_ds.softmask.apply import SoftMasks
from das_ds.softmask.importance_file import link_importance, load_directions, save_directions
from das_ds.softmask.input_covariance import input_second_moments, linear_layers


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
        self._moments: dict[str, torch.Tensor] = {}
        self._num_tokens: int | None = None
        self._widths = {name: layer.in_features for name, layer in linear_layers(run).items()}

    def before_domain(self, domain: DomainContext) -> None:
        """What earlier runs protect, before the first domain."""
        initial = self.run.config.method.importance.init_from
        if initial is not None and not self._moments:
            self._moments, num_tokens = load_directions(Path(initial), self._widths, self.run.layout, self.run.tokens)
            self._num_tokens = None if domain.num_tokens is None else num_tokens

    def on_train_start(self, domain: DomainContext) -> None:
        """Protect what was learned so far; not the rows of tokens that came since, which have nothing to answer yet."""
        if self._moments:
            saturation, device = self.run.config.method.importance.half_saturation, self.run.engine.ranks.info.device
            masks = _Masks(self._moments, saturation, device)
            sizes = self.run.layout.sizes_with(self._num_tokens)
            SoftMasks(self.run.engine).protect_directions(self._widths, masks.of, sizes)

    def after_domain(self, domain: DomainContext) -> None:
        """Add what the domain's text brings into every layer."""
        batches = domain.sample_batches(f"inputs of {domain.name}")
        latest, is_first = input_second_moments(self.run, batches), not self._moments
        # New tensors: a checkpoint that is being written may still read the old ones.
        self._moments = {name: moment + self._moments.get(name, 0.0) for name, moment in latest.items()}
        self._num_tokens = domain.num_tokens
        with domain.suspend_timeout("writing directions"):
            self.run.engine.ranks.run_on_main(lambda: self._write(domain, latest, is_first=is_first))

    def state(self) -> ComponentState:
        """Sum of the moments, equal on every rank."""
        return ComponentState(shared=self._moments, numbers={"num_tokens": self._num_tokens})

    def load_state(self, saved: SavedComponentState) -> None:
        """In host memory, where nothing but the next domain's mask needs it."""
        self._moments, self._num_tokens = saved.shared(), saved.numbers["num_tokens"]

    def _write(self, domain: DomainContext, latest: dict[str, torch.Tensor], *, is_first: bool) -> None:
        of_domain, of_run = domain.folder / DIRECTIONS_FILE, domain.run_folder / DIRECTIONS_FILE
        layout, tokens = self.run.layout, self.run.tokens[: domain.num_tokens]
        save_directions(of_domain, latest, layout, tokens)
        if is_first:
            link_importance(of_domain, of_run)
        else:
            save_directions(of_run, self._moments, layout, tokens)


class _Masks:
    """Masks from moments, one at a time.

    Layers that follow each other and read the same input (queries, keys, values; gate, up) share one mask.
    """

    def __init__(self, moments: dict[str, torch.Tensor], saturation: float, device: torch.device) -> None:
        self._moments, self._saturation, self._device = moments, saturation, device
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, name: str) -> torch.Tensor:
        """P of a layer, (d, d) float32."""
        moment = self._moments[name]
        if self._last is None or not torch.equal(moment, self._last[0]):
            self._last = moment, direction_projector(moment.to(self._device), self._saturation)
        return self._last[1]
