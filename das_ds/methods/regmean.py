"""RegMean: weights merged after each domain by the second moments of layer inputs (Jin et al., ICLR 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from das_ds.config import MethodConfig, RunConfig, SampleSize
from das_ds.distributed.state import ComponentState, Flats, SavedComponentState
from das_ds.errors import ConfigError
from das_ds.methods.measured_inputs import MeasuredInputs, check_general_text, has_general_text, num_passed
from das_ds.methods.merge import BEFORE, copy_weights, load_weights, merging_memory
from das_ds.models.size import MeasuredSequences, MemoryUse, ModelSize, Sharding

if TYPE_CHECKING:
    from das_ds.config.deepspeed import EngineConfig
    from das_ds.context import DomainContext, RunContext

NUM_TERMS = "num_terms"
IS_MERGED = "is_merged"


class RegMeanConfig(MethodConfig):
    """Naive training with layers merged after each domain so that their outputs come nearest to those before."""

    # Moments are kept without `off_diagonal`.
    state_keys = ("num_samples", "general")

    name: Literal["regmean"] = "regmean"
    off_diagonal: float = Field(default=0.9, gt=0.0, le=1.0)
    """Factor of the entries off the diagonal of each moment, the paper's alpha (0.9 there, but 0.1 for T5); 1 is least
    squares as it is."""
    num_samples: int | None = Field(default=None, ge=1)
    """Sequences per domain on which the inputs are measured, at most the complete corpus; null: as many as have 20
    tokens for each element of the widest input of a layer, and at least 512."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank and forward pass of that measurement; null: `train.micro_batch_size`."""
    general: bool | None = None
    """Whether the base model takes part, by the inputs of the training text of `general`, which are measured before the
    first domain; null: where `general.train` is given."""

    @property
    def sample_size(self) -> SampleSize:
        """Size of the sample of inputs."""
        return SampleSize(self.num_samples, self.batch_size)


class RegMean(MeasuredInputs[RegMeanConfig]):
    """Naive training, and after each domain for every matrix W (o, d) that multiplies an input, with alpha =
    `off_diagonal` and k terms in M:

        W <- (W_old M + W A) (M + A)^-1        A = shrink(E[x x^T] / (tr / d))        M <- M + A
        theta <- (k theta_old + theta) / (k + 1)    for all other trained weights
        shrink(A) = alpha A + (1 - alpha) diag(A)

    W_old is the model from before the domain, E[x x^T] the second moment of the layer's input over `num_samples`
    sequences of the domain, under the model that has just learned it and is not merged yet. M is the sum over earlier
    domains, and begins with general text under the base model (`general`). Without any M, in the first domain, nothing
    is merged.

    Equation 2 of Jin, Ren, Preotiuc-Pietro & Cheng, *Dataless Knowledge Fusion by Merging Weights of Language Models*
    (ICLR 2023, arXiv 2212.09849), whose W is (d, o), one domain after another: W (M + A) is the sum of W_k A_k over all
    domains k so far, so that with alpha = 1 the merged W minimizes sum_k E|W x - W_k x|^2, W_k being the layer at the
    end of domain k. Unlike there, moments are normalized, so that domains weigh alike however long their text is, and
    the LM head is merged as well, and with it embeddings that are tied to it. Other embeddings, biases and
    normalization are averaged. Rows of tokens that M was measured without stay as they were learned.

    M + A gets a ridge of d times the precision of float32, relative to each element of its diagonal, which counts as
    part of A; elements of the input that are zero in all text keep W (`functional.regression_mean.merging_map`). The
    system is solved in float64, by the rank that owns the moments of the input, and (W_old - W) M (M + A)^-1 is added
    by the ranks that step W.

    Keeps one fp32 matrix (d, d) per input (queries, keys and values share one) in host memory of one rank, and a host
    copy of each rank's fp32 shard while a domain is learned. Extra compute per domain: one forward pass over the sample
    for every 2 GiB of moments, and 2 o d^2 operations in float64 per matrix.

    Raises:
        ConfigError: LoRA; `merge.weight`.
        ModelError: the network has layers whose inputs cannot be measured.
    """

    Config = RegMeanConfig
    untrained_weights = "have random values and are merged with what is learned"

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._num_terms = 0
        """k, moments in the sum."""
        self._before: Flats | None = None
        self._is_merged = False
        """Whether `after_domain` is done, which is never done twice."""

    @classmethod
    def validate(cls, config: RunConfig, engine_config: EngineConfig) -> None:
        """Weights are trained, and merged once; text to measure is there."""
        check_general_text(config, cls.settings_in(config).general)
        if config.model.lora is not None:
            raise ConfigError(
                "model.lora: found adapters with method regmean, whose merged product has a higher rank than adapters, "
                "and is not that of factors merged one by one; expected null, or method merge, which averages factors"
            )
        if config.method.merge_weight is not None:
            raise ConfigError(
                f"method.merge.weight: found {config.method.merge_weight} with method regmean, which merges by itself; "
                "expected null"
            )

    @classmethod
    def memory(cls, config: RunConfig, size: ModelSize, sharding: Sharding) -> MemoryUse:
        """Moments, the merge of one input, and the weights from before the domain; see `merge_memory`."""
        from das_ds.softmask.moment_merge import merge_memory

        return merge_memory(size, sharding) + merging_memory(size, sharding)

    @classmethod
    def measured_sequences(cls, config: RunConfig, size: ModelSize, num_ranks: int) -> MeasuredSequences:
        """The sample once for every group of inputs, also that of general text."""
        sample = num_passed(config, size)
        measures_general = has_general_text(config) and cls.settings_in(config).general is not False
        return MeasuredSequences(before_first=sample if measures_general else 0, after=sample)

    def before_domain(self, domain: DomainContext) -> None:
        """Copy the weights from which the domain starts; before the first one measure general text."""
        if not self._is_prepared:
            self._measure_known(None if self.settings.general is False else domain.general)
            self._num_terms = int(self._importance is not None)
        self._is_merged = False
        self._before = None if self._importance is None else copy_weights(self.run)

    def after_domain(self, domain: DomainContext) -> None:
        """Measure the domain's inputs, merge, and drop the copy with it; a run that resumes later does nothing."""
        from das_ds.context import CorpusSample
        from das_ds.softmask.moment_merge import merge_by_moments

        if self._is_merged:
            return
        latest = self._measure(CorpusSample(f"inputs of {domain.name}", domain.sample_batches, domain.num_tokens))
        if self._importance is not None:
            assert self._before is not None, "before_domain comes before after_domain"
            # Ranks wait for the owner of each input in turn; wide inputs take minutes.
            with domain.suspend_timeout("merging weights"):
                merge_by_moments(
                    self.run,
                    self._before,
                    self._importance,
                    latest,
                    num_earlier=self._num_terms,
                    off_diagonal=self.settings.off_diagonal,
                )
        self._importance = latest.accumulate(self._importance)
        self._num_terms += 1
        self._latest = self._before = None
        self._is_merged = True

    def state_dict(self) -> ComponentState:
        """Moments with their owners, and within a domain the weights from before it."""
        state = super().state_dict()
        metadata = {**state.metadata, NUM_TERMS: self._num_terms, IS_MERGED: self._is_merged}
        sharded = {} if self._before is None else {BEFORE: self._before}
        return replace(state, sharded=sharded, metadata=metadata)

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue from any sharding."""
        super().load_state_dict(saved)
        self._num_terms = saved.metadata[NUM_TERMS]
        self._is_merged = saved.metadata[IS_MERGED]
        self._before = load_weights(saved)
