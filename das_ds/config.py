"""The run config: frozen, typed, one docstring per field, checked when it is built.

The docstrings are the text that `--help` prints; reading, overriding and writing configs is `config_io.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


ObjectiveName = Literal["mlm", "clm"]
"""Masked or causal language modelling."""
GroupName = Literal["head", "intermediate", "output"]
"""Attention heads, neurons of the MLP, outputs of its second map."""

DEFAULT_REPLAY_SHARE = 1 / 16
"""What method replay replays at the default share, up to a whole number of sequences."""


class Section(BaseModel):
    """A group of keys; unknown keys are errors and values never change after construction."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )


class LoraConfig(Section):
    """Low-rank adapters, W = W0 + (alpha / rank) B A; needs peft."""

    rank: int = Field(default=8, ge=1)
    """Rank r of the update of each linear map; at most the smaller side of the smallest one."""
    alpha: float = Field(default=16.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on what enters the adapters."""
    target_modules: list[str] = []
    """Modules by the end of their name, such as query or attention.output.dense; empty: all that units own."""
    initial: str | None = None
    """Adapter folder of an earlier run over the same network to begin with; null: a fresh adapter."""


class UnitCountsConfig(Section):
    """Units per layer of each group; a group that is left out is not protected."""

    head: str | None = None
    """Attention heads: an attribute of the model config, a product `a*b`, or alternatives `a|b` (the first it has)."""
    intermediate: str | None = None
    """Neurons of the MLP, written like heads; numbers may stand in a product, as in `4*hidden_size`."""
    output: str | None = None
    """Outputs of the MLP's second map, written like heads."""


class RuleConfig(Section):
    """Which stretch of one parameter the units of a group own."""

    group: GroupName
    """Whose units own it."""
    parameter: str
    """Parameter name, `{base}` for the base model's prefix and `{layer}` for the layer number."""
    axis: int = Field(ge=0, le=1)
    """0: units own rows of the stored tensor; 1: they own columns."""
    spread: Literal["evenly", "halves", "key_value", "query_key_value", "experts", "expert_halves"] = "evenly"
    """How the units lie along the axis: equal runs, gate and up halves, key/value heads, fused q-k-v, or by expert."""
    reader: bool = False
    """The parameter only reads the units: protected with them under `method.softmask.readers` alone."""
    optional: bool = False
    """Models without this parameter are fine."""


class SiteConfig(Section):
    """Where the units of one group can be multiplied."""

    group: GroupName
    """Whose units are multiplied."""
    module: str
    """Module name, with the placeholders of a rule."""
    position: Literal["input", "output", "experts"]
    """The module's input or output, or inside a module that runs all experts."""


class AdapterConfig(Section):
    """A table of units: what they own, where they are gated, what belongs to none (see docs/adapters.md)."""

    objective: ObjectiveName
    """What these networks are pre-trained with."""
    units: UnitCountsConfig
    rules: list[RuleConfig] = Field(min_length=1)
    """Parameters that units own or read."""
    sites: list[SiteConfig] = Field(min_length=1)
    """One gate per group and layer."""
    unmasked: list[str]
    """Parameters that no unit owns, on purpose; placeholders as in rules, `*` matches anything."""
    lm_head: list[str] = Field(min_length=1)
    """Modules that turn hidden states into logits, one after the other."""
    embedding_head: str | None = None
    """Module that does so in place of `lm_head` in models that have it, given the input embeddings as well."""
    key_value_heads: str | None = None
    """Number of key/value heads, written like heads; null: as many as heads."""
    logit_cap_attribute: str | None = None
    """Attribute of the model config with the cap c of logits c * tanh(logits / c); null: no cap."""
    position_offset: int = Field(default=0, ge=0)
    """Rows of the position embedding that no token of a block can use."""
    dropouts: list[str] | None = None
    """Attributes of the model config that are dropout probabilities of the network; null: the usual names."""

    @model_validator(mode="after")
    def _names_are_patterns(self) -> AdapterConfig:
        for key, names in (
            ("rules", [rule.parameter for rule in self.rules]),
            ("sites", [site.module for site in self.sites]),
        ):
            for index, name in enumerate(names):
                _check_placeholders(f"{key}.{index}", name, {"base", "layer"})
                if "{layer}" not in name:
                    raise ValueError(f"{key}.{index}: found {name!r}, expected a name with the placeholder {{layer}}")
        for index, name in enumerate(self.unmasked):
            _check_placeholders(f"unmasked.{index}", name, {"base", "layer"})
        return self

    @model_validator(mode="after")
    def _groups_fit_together(self) -> AdapterConfig:
        counted = {group for group, count in self.units if count is not None}
        ruled, gated = {rule.group for rule in self.rules}, [site.group for site in self.sites]
        if not counted == ruled == set(gated) or len(gated) != len(set(gated)):
            raise ValueError(
                f"units, rules and sites must name the same groups, each with one site; found units: "
                f"{_listed(counted)}, rules: {_listed(ruled)}, sites: {_listed(gated)}"
            )
        axes = [(rule.parameter, rule.axis) for rule in self.rules]
        twice = next((axis for axis in axes if axes.count(axis) > 1), None)
        if twice is not None:
            raise ValueError(f"rules: axis {twice[1]} of {twice[0]} found twice, allowed: one rule per axis")
        return self


def _check_placeholders(key: str, name: str, allowed: set[str]) -> None:
    found = set(re.findall(r"\{(.*?)\}", name))
    if found - allowed or name.count("{") != name.count("}"):
        raise ValueError(
            f"{key}: found {name!r}, allowed placeholders: {', '.join(f'{{{name}}}' for name in sorted(allowed))}"
        )


def _listed(groups: Iterable[str]) -> str:
    return ", ".join(sorted(groups)) or "none"


class ModelConfig(Section):
    """Which network is trained; exactly one of `name_or_path` and `config` is given."""

    name_or_path: str | None = None
    """Folder or hub name of pre-trained weights."""
    config: dict[str, Any] | None = None
    """Hugging Face model config (with `model_type`) for a network with random weights."""
    objective: Literal["auto", "mlm", "clm"] = "auto"
    """Pre-training loss: masked or causal language modelling; `auto` is what the architecture is pre-trained with."""
    attention: str = "sdpa"
    """Attention implementation of the network, one that transformers knows, such as sdpa, eager, flash_attention_2."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of linear maps in place of the weights themselves; null: train the weights."""
    adapter: AdapterConfig | None = None
    """Your own table of units for this model; null: the registered one. `das-ds units MODEL --yaml` proposes one."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("give exactly one of name_or_path (pre-trained weights) and config (random weights)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example model_type: roberta")
        return self


class CorpusConfig(Section):
    """One corpus: files, globs or hub data sets, for training and for held-out evaluation."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name in folders, tables and metric names (letters, digits, - and _)."""
    train: list[str] = []
    """Training text: .txt, .jsonl (also .gz, .xz) or .parquet files, globs, hub names `owner/name[:config][@split]`."""
    valid: list[str] = []
    """Held-out text in the same forms; empty: `valid_fraction` of the blocks of `train` is cut off its end."""
    valid_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Share of the training blocks that is held out when `valid` is empty."""
    text_column: str = "text"
    """Column that holds the text in .jsonl, .parquet and hub data sets."""

    @model_validator(mode="after")
    def _has_text(self) -> CorpusConfig:
        if not self.train and not self.valid:
            raise ValueError("needs train or valid text")
        return self


class DomainConfig(CorpusConfig):
    """A corpus that the model is pre-trained on."""

    @model_validator(mode="after")
    def _has_train(self) -> DomainConfig:
        if not self.train:
            raise ValueError("a domain needs train text")
        return self


class DataConfig(Section):
    """How text becomes blocks of tokens."""

    sequence_length: int = Field(default=128, ge=8)
    """Tokens per block."""
    tokenizer: str | None = None
    """Folder or hub name of the tokeniser; null: that of `model.name_or_path`."""
    add_tokens: dict[str, list[str] | str] = {}
    """Domain -> tokens, or a file with one a line, that tokeniser and model gain before the domain is learned."""
    mlm_probability: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Share of tokens that is predicted in masked language modelling."""
    isolate_documents: bool = False
    """Causal only: positions start anew and attention stops at each document of a block, no prediction crosses one."""
    cache_dir: str | None = None
    """Folder of tokenised corpora; null: `$DAS_DS_CACHE`, else `~/.cache/das_ds`."""
    num_workers: int = Field(default=0, ge=0)
    """Loader processes per rank; 0 loads in the training process."""


class TrainConfig(Section):
    """Optimisation; the same for every domain."""

    steps_per_domain: int = Field(default=2500, ge=1)
    """Optimizer steps on each domain."""
    global_batch_size: int = Field(default=256, ge=1)
    """Sequences per optimizer step over all ranks and accumulation steps."""
    micro_batch_size: int = Field(default=32, ge=1)
    """Sequences per rank and forward pass."""
    optimizer: Literal["adamw", "cpu_adam", "lion"] = "adamw"
    """`adamw` steps and masks in one pass; `cpu_adam` (DeepSpeed's, for offload) and `lion` are pulled back after."""
    learning_rate: float = Field(default=1e-4, gt=0.0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant_with_warmup", "wsd", "infinite"] = "linear"
    """Learning-rate schedule, started anew for each domain; `wsd`: warm-up, stable, decay; `infinite`: the same over
    the whole run, with warm-up in the first domain and decay in the last."""
    warmup_ratio: float = Field(default=0.06, ge=0.0, lt=1.0)
    """Share of a domain's steps over which the learning rate rises from 0."""
    decay_ratio: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of a domain's steps, its last, over which the learning rate falls to 0 in `wsd` and `infinite`."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay; biases and normalisation layers are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the optimizer's moments."""
    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW's denominator offset."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of weights and activations; the optimizer always keeps fp32. `fp16` scales the loss (ZeRO 1-3)."""
    grad_clip: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm; 0 does not clip."""
    logits_mib: int = Field(default=256, ge=1)
    """Largest chunk of float32 logits in MiB; more positions are done in chunks, each again in the backward pass."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl."""

    @model_validator(mode="after")
    def _valid_betas(self) -> TrainConfig:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), found {list(self.betas)}")
        return self

    @model_validator(mode="after")
    def _ratios_fit(self) -> TrainConfig:
        if self.schedule in ("wsd", "infinite") and self.warmup_ratio + self.decay_ratio > 1.0:
            raise ValueError(
                f"warmup_ratio + decay_ratio: found {self.warmup_ratio:g} + {self.decay_ratio:g} with schedule "
                f"{self.schedule}, allowed: at most 1 together"
            )
        return self


class SoftmaskConfig(Section):
    """How important units are protected."""

    apply_to: Literal["update", "gradient"] = "update"
    """`update` scales the optimizer's whole step by 1 - I; `gradient` is the published form, which Adam cancels."""
    readers: bool = False
    """Also protect weights that only read a unit (columns of the second FFN matrix), by the larger importance."""
    shared_scale: float = Field(default=1.0, ge=0.0, le=1.0)
    """Scale of the update of every parameter no unit owns (embeddings, normalisation, LM head); 1 is the paper."""


class ImportanceConfig(Section):
    """How importance is measured."""

    granularity: Literal["unit", "parameter"] = "unit"
    """`unit`: one number per head, neuron and output (DAS); `parameter`: one per weight (SPG), sharded, 1 byte each."""
    normalisation: Literal["abs_tanh", "tanh_positive"] = "abs_tanh"
    """`abs_tanh` = |tanh z| (the paper); `tanh_positive` = tanh(max(z, 0)) protects only what is above the average."""
    samples: int = Field(default=10_000, ge=1)
    """Sequences per importance pass (at most the whole corpus is used)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank and forward pass at unit level; null: `train.micro_batch_size`."""
    initial: str | None = None
    """Accumulated importance file of an earlier run; null: measure general knowledge before the first domain."""


class ContrastConfig(Section):
    """The contrastive loss that integrates old and new knowledge."""

    weight: float = Field(default=1.0, ge=0.0)
    """Factor of the contrastive loss; 0 leaves it (and its three extra views) out."""
    temperature: float = Field(default=0.05, gt=0.0)
    """Temperature of the cosine similarities."""
    pooling: Literal["auto", "mean", "last"] = "auto"
    """One vector per sequence: the mean over its tokens or its last token (of each isolated document); `auto` is mean
    for masked and last for causal models."""


class ReplayConfig(Section):
    """Earlier text in every global batch, beside any method."""

    share: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Share of each global batch that is text of earlier domains, a whole number of sequences; null: with method
    `replay` the number nearest to 1 of 16, at least one, and none with other methods."""
    general: bool = False
    """Replay the training text of `general` as well, in the first domain too."""


class MethodConfig(Section):
    """The continual-learning method."""

    name: Literal["das", "ncl", "one", "replay"] = "das"
    """`das` soft masks and contrasts, `ncl` is naive continual training, `one` trains each domain from the base,
    `replay` is naive with earlier text in every batch."""
    view_dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout at the units where views are made (contrast, general knowledge), for networks without dropout."""
    softmask: SoftmaskConfig = SoftmaskConfig()
    importance: ImportanceConfig = ImportanceConfig()
    contrast: ContrastConfig = ContrastConfig()
    replay: ReplayConfig = ReplayConfig()

    @model_validator(mode="after")
    def _mask_fits_granularity(self) -> MethodConfig:
        if self.importance.granularity == "parameter" and (self.softmask.readers or self.softmask.shared_scale != 1.0):
            raise ValueError(
                f"softmask.readers and softmask.shared_scale need importance.granularity: unit, found "
                f"readers: {self.softmask.readers}, shared_scale: {self.softmask.shared_scale} with parameter, where "
                "every weight has its own importance; allowed there: readers: false, shared_scale: 1.0"
            )
        return self


class EvaluationConfig(Section):
    """Held-out evaluation before training and after each domain."""

    batch_size: int | None = Field(default=None, ge=1)
    """Sequences per rank and forward pass; null: `train.micro_batch_size`."""
    max_sequences: int | None = Field(default=None, ge=1)
    """Use at most this many held-out sequences per corpus; null: all."""


class CheckpointConfig(Section):
    """Saving what is needed to continue."""

    every_steps: int = Field(default=500, ge=1)
    """Optimizer steps between two checkpoints; also batches, within importance passes and evaluation."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept, besides the one at the end of every domain."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory (one checkpoint's size); false: wait for the disk."""


class FaultsConfig(Section):
    """What to do when training goes wrong."""

    nonfinite: Literal["skip", "stop", "rewind"] = "stop"
    """On a loss or gradient norm that is not finite: `skip` leaves the step out, `stop` ends with exit code 2, `rewind`
    goes back to the newest checkpoint and leaves the step out when it comes again."""
    spike: Literal["warn", "skip", "stop", "rewind"] = "warn"
    """The same for a loss that rises suddenly; `warn` says so and takes the step."""
    spike_deviations: float = Field(default=6.0, gt=0.0)
    """Standard deviations above the mean of the last steps that make a spike."""
    spike_window: int = Field(default=128, ge=8)
    """Steps over which mean and deviation are taken; until so many are seen nothing is a spike."""
    max_rewinds: int = Field(default=3, ge=1)
    """Rewinds of one run before it stops."""


class JobConfig(Section):
    """How the processes of a run live and end."""

    hang_timeout: float = Field(default=600.0, ge=1.0)
    """Seconds without progress after which all ranks end with a message that names the rank that is stuck."""
    stop_signals: list[Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]] = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]
    """Signals that make the run save a checkpoint at the next step and end with exit code 75."""


class WandbConfig(Section):
    """Weights & Biases."""

    project: str = "das_ds"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null: the account's default."""
    name: str | None = None
    """Run name; null: the name of the output folder."""
    group: str | None = None
    """W&B group; null: the name of the output folder's parent."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where an API key is configured, else offline."""


class TaskConfig(Section):
    """A task with labels, which exported models are fine-tuned on; `das-ds finetune` alone reads it."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name in tables and files (letters, digits, - and _)."""
    train: str
    """Training rows: a .jsonl file (also .gz, .xz), one object per line."""
    dev: str
    """Rows that choose the best epoch, in the same form."""
    test: str
    """Rows that are scored at the best epoch only, in the same form."""
    kind: Literal["text", "pair", "entities"] = "text"
    """One text; two texts, such as an aspect and a sentence; one text with marked entities."""
    text_column: str = "text"
    """Column of the text."""
    pair_column: str = "aspect"
    """Kind `pair`: column of what stands before the text."""
    label_column: str = "label"
    """Column of the label, a text or a whole number."""
    labels: list[str] = []
    """Classes, each with rows in train; empty: the labels of train."""
    markers: list[str] = Field(default=["[[", "]]", "<<", ">>"], min_length=1)
    """Kind `entities`: what stands around the entities of every text; each becomes one token."""
    metric: Literal["accuracy", "macro_f1", "micro_f1"] = "macro_f1"
    """The score that is reported and that chooses the best epoch."""
    epochs: int = Field(default=10, ge=1)
    """Passes over train at most."""
    patience: int = Field(default=3, ge=1)
    """Epochs without a better dev score after which training stops."""
    learning_rate: float = Field(default=3e-5, gt=0.0)
    """Peak learning rate; it rises over `warmup_ratio` of all steps, then falls linearly to 0."""
    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps of all epochs over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay of matrices."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step."""
    sequence_length: int = Field(default=128, ge=8)
    """Tokens per row at most; longer rows are cut at their end."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default=[0, 1, 2, 3, 4], min_length=1)
    """One training each: seed of the classifier's weights, the order of rows and dropout."""

    @model_validator(mode="after")
    def _lists_have_no_repeats(self) -> TaskConfig:
        for key in ("labels", "markers", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: found {values}, allowed: each once")
        return self

    @model_validator(mode="after")
    def _several_labels(self) -> TaskConfig:
        if len(self.labels) == 1 or "" in self.labels or "" in self.markers:
            raise ValueError(
                f"found labels {self.labels} and markers {self.markers}, allowed: no labels or at least two, none empty"
            )
        return self


class RunConfig(Section):
    """A whole run: a model, a sequence of domains, a method."""

    output_dir: Path
    """Run folder; a new one, an empty one, or that of the same run (which is then continued)."""
    model: ModelConfig
    domains: list[DomainConfig] = Field(min_length=1)
    """Domains in the order in which they are learned."""
    general: CorpusConfig | None = None
    """General-language corpus; evaluated, and trained on by `method.replay.general` alone (to pre-train a base on it,
    list it as a domain)."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    method: MethodConfig = MethodConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tasks: list[TaskConfig] = []
    """End tasks that exported models are fine-tuned on, for `das-ds finetune`; training leaves them alone."""
    deepspeed: str | dict[str, Any] = "ds_configs/zero2.json"
    """DeepSpeed file (engine knobs only) or its content."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultsConfig = FaultsConfig()
    run: JobConfig = JobConfig()
    wandb: WandbConfig = WandbConfig()
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of weights, data order, corruption and dropout."""

    @property
    def num_replayed(self) -> int:
        """Sequences of each global batch that are earlier text, in domains that have some."""
        share, size = self.method.replay.share, self.train.global_batch_size
        if share is None:
            return max(1, round(DEFAULT_REPLAY_SHARE * size)) if self.method.name == "replay" else 0
        return round(share * size)

    def replayed(self, domain: str) -> list[str]:
        """Corpora that sequences are replayed from while a domain is learned: earlier domains, general text."""
        if not self.num_replayed:
            return []
        names = [domain.name for domain in self.domains]
        general = [self.general.name] if self.general is not None and self.method.replay.general else []
        return names[: names.index(domain)] + general

    @model_validator(mode="after")
    def _names_are_unique(self) -> RunConfig:
        names = [domain.name for domain in self.domains] + ([self.general.name] if self.general else [])
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"corpus names must differ, found more than once: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _tasks_are_unique(self) -> RunConfig:
        names = [task.name for task in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks: names must differ, found more than once: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _tokens_fit(self) -> RunConfig:
        domains = [domain.name for domain in self.domains]
        unknown = [name for name in self.data.add_tokens if name not in domains]
        if unknown:
            raise ValueError(f"data.add_tokens: found {unknown[0]}, allowed: a domain ({', '.join(domains)})")
        if self.data.add_tokens and self.model.lora is not None:
            raise ValueError(
                "data.add_tokens: found tokens with model.lora, under which embeddings are frozen and new tokens would "
                "never be learned; allowed: one of the two"
            )
        return self

    @model_validator(mode="after")
    def _replay_is_possible(self) -> RunConfig:
        replay, size = self.method.replay, self.train.global_batch_size
        if replay.share is not None:
            _check_share(replay.share, size)
        elif self.num_replayed >= size:
            raise ValueError("method.name: found replay with train.global_batch_size 1, expected at least 2")
        if self.num_replayed and self.method.name == "one":
            raise ValueError(
                f"method.replay.share: found {replay.share:g} with method one, where no domain comes after another; "
                "allowed there: 0"
            )
        if replay.general and (self.general is None or not self.general.train):
            raise ValueError("method.replay.general: found true without training text, expected general: {train: ...}")
        if replay.general and not self.num_replayed:
            raise ValueError("method.replay.general: found true with nothing to replay, expected method.replay.share")
        return self


def _check_share(share: float, global_batch_size: int) -> None:
    """A share is as good as whole where it was rounded to six digits."""
    count = share * global_batch_size
    if math.isclose(count, round(count), rel_tol=1e-5) and round(count) < global_batch_size:
        return
    nearest = [number for number in (math.floor(count), math.floor(count) + 1) if number < global_batch_size]
    allowed = " or ".join(f"{number / global_batch_size:.6g} ({number} of them)" for number in nearest)
    raise ValueError(
        f"method.replay.share: found {share}, {count:g} of {global_batch_size} sequences (train.global_batch_size); "
        f"nearest allowed: {allowed}"
    )
