"""Directions: a soft mask on directions of the input of linear layers, instead of units or weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from das_ds.config import MethodConfig, RunConfig, SampleSize
from das_ds.config.section import PathText
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.methods.measured_inputs import MeasuredInputs, check_general_text, has_general_text, num_passed
from das_ds.models.size import MeasuredSequences, MemoryUse, ModelSize, Sharding, StepUse
from das_ds.run_dir import DIRECTIONS_FILE

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext
    from das_ds.functional.directions import OverDomains, Rank
    from das_ds.functional.projectors import Projector
    from das_ds.softmask.direction import DirectionImportance
    from das_ds.softmask.direction_memory import DirectionForm
    from das_ds.softmask.plasticity import DomainPlasticity, InputPlasticity, PlasticityReading

logger = logging.getLogger(__name__)

PLASTICITY = "plasticity"
NUM_PROBED = 64
"""Sequences of a domain by which it is measured how much of its input energy passes: a share of a sum over thousands
of tokens, which few of them tell to two digits."""


class DirectionsConfig(MethodConfig):
    """Directions: linear layers learn least along the input directions that earlier domains use most."""

    state_keys = ("num_samples", "general", "init_from")

    name: Literal["directions"] = "directions"
    half_saturation: float = Field(default=1.0, gt=0.0)
    """c of the mask P = (I + M / c)^-1; larger protects less: a direction with c times the average share of the input
    is halved."""
    over_domains: Literal["sum", "mean"] = "mean"
    """How M joins several domains: by their `mean`, so that as much stays open after many as after one, or by their
    `sum`, so that the mask closes further with each domain, and protects each as if it were the only one."""
    apply_to: Literal["gradient", "update", "both"] = "both"
    """What P multiplies: `gradient` before the optimizer, `update` after it, or `both`, which forgets least at equal
    learning and costs twice as much as `update`, or as `gradient` without `train.weight_decay`."""
    rank: Literal["auto", "full"] | Annotated[int, Field(ge=1)] = "full"
    """Directions of each input that have a factor of their own, all others sharing one; `auto`: as few as change no
    factor by more than a tenth; `full`: all."""
    freeze_unmasked: bool = True
    """Whether biases, normalization and embeddings of positions, which act on every text alike and have no directions,
    are trained only until there is something to protect."""
    num_samples: int | None = Field(default=None, ge=1)
    """Sequences per domain on which the inputs are measured, at most the complete corpus; null: as many as have 20
    tokens for each element of the widest input of a layer, and at least 512."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank and forward pass of that measurement; null: `train.micro_batch_size`."""
    general: bool | Literal["generated"] | None = None
    """Whether the inputs are also measured on the training text of `general` before the first domain, which then
    protects what the model knew; `generated`: on the text that the model writes there for `replay.source: generated`;
    null: where `general.train` is given."""
    init_from: PathText | None = None
    """Accumulated directions file of an earlier run, which the first domain protects; null: none. It contains the
    general text of that run, which counts twice if `general` measures it again."""
    min_passing: float | None = Field(default=0.02, gt=0.0, lt=1.0)
    """Share of a domain's input energy that has to pass the masks of earlier domains, or else a warning says what to
    change; null: never."""

    @property
    def in_words(self) -> str:
        """The form of the masks."""
        masked = "gradient and update" if self.apply_to == "both" else self.apply_to
        frozen = "; biases, normalization and positions are frozen" if self.freeze_unmasked else ""
        return (
            f"masks on {masked}, half_saturation {self.half_saturation:g}, {self.over_domains} over domains, "
            f"rank {self.rank}{frozen}"
        )

    @property
    def sample_size(self) -> SampleSize:
        """Size of the sample of inputs."""
        return SampleSize(self.num_samples, self.batch_size)


class Directions(MeasuredInputs[DirectionsConfig]):
    """Lets a layer W (o, d) learn least along the directions of its input that earlier domains use most:

        G <- G P, dW <- dW P        P = (I + M / c)^-1        M = mean over earlier domains k of A_k / (tr(A_k) / d),
                                                              or their sum (`over_domains`)

    A_k = E[x x^T] (d, d) is the second moment of the layer's input over `num_samples` sequences of domain k, under the
    model that has just learned it; c is `half_saturation`. For an input x of earlier text, dW P x is small for any dW:
    the layer's output barely changes. Directions that only new text uses learn freely. G is the gradient before it is
    clipped, dW the optimizer's complete step; `apply_to` can leave one of them as it is. (Adam undoes a mask on the
    gradient that scales single weights; P mixes columns, of which it undoes only a common factor.)

    In the eigenvectors of M this is DAS's mask 1 - I with importance I = a / (a + c): the complement of a conceptor (He
    & Jaeger, ICLR 2018). P is the projector of orthogonal weight modification (Zeng et al., Nature Machine Intelligence
    2019) with a larger constant; gradient projection memory (Saha et al., ICLR 2021) is its form with a threshold.

    Every trained matrix that multiplies an input is masked, but for rows of tokens that no earlier domain had. Biases,
    normalization and embeddings of positions act on every text alike and have no directions: they keep the values
    that they have when there is first something to protect (`freeze_unmasked`). Token embeddings that are not tied to
    the LM head are trained without a mask. What was known before the first domain is protected by the moments of
    general text (`general`) and of an earlier run (`init_from`). There is no contrast, which needs units.

    Each input of layers (queries, keys and values share one) has an fp32 matrix M (d, d), in the host memory of one
    rank. P is on the device of the ranks that step a layer of that input. Extra compute: d / (3 * tokens of the global
    batch) of a training step for each of gradient and update (or weight decay, where only gradients are masked), and
    per domain one forward pass over the sample for every 2 GiB of moments.

    Raises:
        ModelError: the network has layers whose directions cannot be masked.
    """

    Config = DirectionsConfig
    untrained_weights = "have random values and learn behind the masks"

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._projectors: dict[str, Projector] | None = None
        """Those of `_importance`, from the time when they are measured until the engine has them."""
        self._plasticity: DomainPlasticity | None = None

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """Check that text to measure and an optimizer to mask are there."""
        settings = cls.settings_in(config)
        check_general_text(config, settings.general)
        if settings.general == "generated" and not config.replays_generated(config.domains[0].name):
            raise ConfigError(
                "method.general: found generated where nothing is generated before the first domain, expected "
                "method.replay.source generated or both, and a fraction to replay there"
            )
        if config.train.optimizer == "lion" and settings.apply_to == "gradient":
            raise ConfigError(
                "method.apply_to: found gradient with train.optimizer: lion, which steps by the sign of each element "
                "and so undoes the mask; allowed with it: update, both"
            )

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """Moments, projectors, products in a step, and what exists only between two domains; `directions_memory`."""
        from das_ds.softmask.direction_memory import directions_memory

        return directions_memory(size, sharding, cls._form(config))

    @classmethod
    def step_use(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> StepUse:
        """Products of gradients, updates or both, and exchanges of cut vectors; see `directions_step_use`."""
        from das_ds.softmask.direction_step import directions_step_use

        return directions_step_use(size, sharding, cls._form(config))

    @classmethod
    def _form(cls, config: RunConfig) -> DirectionForm:
        from das_ds.softmask.direction_memory import DirectionForm

        settings = cls.settings_in(config)
        return DirectionForm(settings.rank, settings.apply_to, config.train.weight_decay > 0.0)

    @classmethod
    def measured_sequences(cls, config: RunConfig, size: ModelSize, num_ranks: int) -> MeasuredSequences:
        """The sample once for every group of inputs, also that of general text, and on each rank what is probed."""
        settings = cls.settings_in(config)
        sample = num_passed(config, size)
        probe = NUM_PROBED * num_ranks
        general = sample if _measures_general(config, settings) else 0
        protects_first = general > 0 or settings.init_from is not None
        return MeasuredSequences(general + probe * protects_first, probe, sample)

    @classmethod
    def check_files(cls, config: RunConfig) -> None:
        """Whether `init_from` is a directions file."""
        from das_ds.softmask.directions_file import check_directions_file

        path = cls.settings_in(config).init_from
        if path is not None:
            check_directions_file(Path(path))

    def on_run_start(self) -> None:
        """Check that the file of an earlier run belongs to this network; its moments are read in `before_domain`."""
        from das_ds.softmask.directions_file import load_directions

        path = self.settings.init_from
        if path is not None:
            layout = self.run.layout
            self.run.engine.ranks.run_on_main(
                lambda: load_directions(Path(path), (), self._inputs.widths, layout, self.run.tokens)
            )

    def before_domain(self, domain: DomainContext) -> None:
        """Measure what earlier domains leave free; before the first one also what is known already.

        That are the directions that earlier runs protect, and those that general text uses.
        """
        if not self._is_prepared:
            self._prepare(domain)
        self._measure_open(domain)

    def _prepare(self, domain: DomainContext) -> None:
        from das_ds.softmask.direction import DirectionImportance

        importance: DirectionImportance | None = None
        if self.settings.init_from is not None:
            with domain.suspend_timeout("reading directions"):
                importance = DirectionImportance.load(self.run, self._inputs, Path(self.settings.init_from))
            self._warn_of_new_adapters()
            # Without new tokens all rows are masked, also those that no token has.
            if domain.num_tokens is None and importance.num_tokens == len(self.run.tokens):
                importance.num_tokens = None
        sample = domain.generated if self.settings.general == "generated" else domain.general
        self._measure_known(None if self.settings.general is False else sample, importance)

    def _warn_of_new_adapters(self) -> None:
        lora = self.run.config.model.lora
        if lora is not None and lora.init_from is None and self.run.engine.ranks.info.is_main:
            logger.warning(
                "method.init_from: the directions of what B of an adapter reads were measured through A of the earlier "
                "run, which a new adapter does not have; expected model.lora.init_from, the adapter of that run"
            )

    def on_train_start(self, domain: DomainContext) -> None:
        """Protect what was learned so far; rows of tokens added since are not masked."""
        if self._importance is None:
            from das_ds.softmask.apply import clear_masks

            # A rollback may come here from a later domain, whose masks the engine still has.
            clear_masks(self.run.engine)
            return
        self._importance.mask(
            self._take_projectors(domain, self._importance),
            apply_to=self.settings.apply_to,
            freeze_unmasked=self.settings.freeze_unmasked,
        )

    def after_domain(self, domain: DomainContext) -> None:
        """Add the directions that the domain's text uses in every layer."""
        from das_ds.context import CorpusSample

        latest = self._measure(CorpusSample(f"inputs of {domain.name}", domain.sample_batches, domain.num_tokens))
        # Tensors that the sum does not change, so that no moment is copied.
        moments = latest.moments
        with domain.suspend_timeout("writing directions"):
            self._accumulate(domain, latest)
        self._measure_protected(domain, moments)

    def state_dict(self) -> ComponentState:
        """Sum of the moments, those of the present domain that are measured, and what is left to learn."""
        state = super().state_dict()
        measured = None if self._plasticity is None else self._plasticity.model_dump(mode="json")
        return replace(state, metadata={**state.metadata, PLASTICITY: measured})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """In host memory of the owners, where nothing but the next domain's mask needs it."""
        from das_ds.softmask.plasticity import DomainPlasticity

        super().load_state_dict(saved)
        self._projectors = None
        measured = saved.metadata.get(PLASTICITY)
        self._plasticity = None if measured is None else DomainPlasticity.model_validate(measured)

    def plasticity(self) -> DomainPlasticity | None:
        """tr(P) / d, and the energy of the domain's inputs that passes, by kind of layer."""
        return self._plasticity

    def _accumulate(self, domain: DomainContext, latest: DirectionImportance) -> None:
        """Save the latest moments and the sum, of which only the sum is kept."""
        tokens = self.run.tokens[: domain.num_tokens]
        domain_path = domain.folder / DIRECTIONS_FILE
        run_path = domain.run_folder / DIRECTIONS_FILE
        latest.save(domain_path, tokens)
        is_first = self._importance is None
        self._importance = latest.accumulate(self._importance)
        self._latest = None
        if is_first:
            from das_ds.softmask.importance_file import link_importance

            # The sum over one domain is its file.
            self.run.engine.ranks.run_on_main(lambda: link_importance(domain_path, run_path))
        else:
            self._importance.save(run_path, self.run.tokens[: self._importance.num_tokens])

    def _take_projectors(self, domain: DomainContext, importance: DirectionImportance) -> dict[str, Projector]:
        """Those that were kept, else new ones; a collective. They are computed once, and then belong to the caller."""
        projectors = self._projectors
        self._projectors = None
        if projectors is None:
            # Ranks wait for the owner of each input in turn; wide inputs take minutes.
            with domain.suspend_timeout("computing projectors"):
                projectors = importance.build_projectors(*self._projector_form)
        return projectors

    @property
    def _projector_form(self) -> tuple[float, Rank, OverDomains]:
        """Arguments of `shared_projectors`."""
        return self.settings.half_saturation, self.settings.rank, self.settings.over_domains

    def _measure_open(self, domain: DomainContext) -> None:
        """What earlier domains leave of the domain's inputs, by a forward pass over a few of its sequences."""
        from das_ds.softmask.direction_plasticity import everything_open, measure_plasticity
        from das_ds.softmask.plasticity import DomainPlasticity

        if self._importance is None:
            inputs = everything_open(self._inputs)
        else:
            self._projectors = self._take_projectors(domain, self._importance)
            label = f"energy of {domain.name} that passes"
            probe = None if domain.probe_batches is None else domain.probe_batches(label, NUM_PROBED)
            inputs = measure_plasticity(self.run, self._inputs, self._projectors, probe)
        self._plasticity = DomainPlasticity(
            domain=domain.name,
            protected=self._names_of_protected(domain),
            form=self.settings.in_words,
            before=self._summarize(inputs),
        )
        if self.run.engine.ranks.info.is_main:
            _warn_of_little_passing(self._plasticity, self.settings)

    def _measure_protected(self, domain: DomainContext, moments: Mapping[str, torch.Tensor]) -> None:
        """What is left of the domain's inputs now that it is protected itself, from their moments."""
        from das_ds.softmask.direction_plasticity import measure_protected
        from das_ds.softmask.plasticity import DomainPlasticity

        assert self._importance is not None, "the domain is in the sum"
        if domain.index + 1 < len(self.run.config.learned):
            # The next domain's, which are kept until it begins: in place of this one's, which the engine drops.
            self._projectors = self._take_projectors(domain, self._importance)
            projectors: Iterator[tuple[str, Projector]] = iter(self._projectors.items())
        else:
            projectors = self._importance.own_projectors(*self._projector_form)
        with domain.suspend_timeout("computing projectors"):
            after = self._summarize(measure_protected(self.run, self._inputs, projectors, moments))
        before = self._plasticity or DomainPlasticity(domain=domain.name, before=after)
        self._plasticity = before.model_copy(update={"after": after})

    def _names_of_protected(self, domain: DomainContext) -> list[str]:
        """What `_importance` has when a domain begins, in the order in which it was added."""
        config = self.run.config
        names = [] if self.settings.init_from is None else [Path(self.settings.init_from).name]
        if self.settings.general == "generated":
            names.append("generated text")
        elif _measures_general(config, self.settings):
            assert config.general is not None, "it has text"
            names.append(config.general.name)
        return names + [stage.name for stage in config.stages[: domain.index]]

    def _summarize(self, inputs: Mapping[str, InputPlasticity]) -> PlasticityReading:
        from das_ds.softmask.layer_groups import layer_groups
        from das_ds.softmask.plasticity import PlasticityReading

        groups = layer_groups(self._inputs.matrices, self.run.layout, self.run.lora)
        return PlasticityReading.summarize(inputs, groups)


def _warn_of_little_passing(measured: DomainPlasticity, settings: DirectionsConfig) -> None:
    passing = measured.before.passing
    if settings.min_passing is not None and passing is not None and passing < settings.min_passing:
        logger.warning(
            "method.min_passing: %.1f%% of the input energy of %s passes the masks of earlier domains, expected at "
            "least %g%%; it may learn little. Use a larger method.half_saturation (now %g)%s or a higher "
            "train.learning_rate",
            100 * passing,
            measured.domain,
            100 * settings.min_passing,
            settings.half_saturation,
            # Fewer terms change nothing in a mean of domains that are alike.
            ", method.over_domains: mean, fewer earlier domains in the sum (method.init_from, method.general),"
            if settings.over_domains == "sum"
            else "",
        )


def _measures_general(config: RunConfig, settings: DirectionsConfig) -> bool:
    """Whether what the model knew before the first domain is measured."""
    return settings.general == "generated" or (has_general_text(config) and settings.general is not False)
