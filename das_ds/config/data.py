"""Data: corpora, and how their text becomes blocks of tokens."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from das_ds.config.section import NAME_PATTERN, PathText, Section
from das_ds.user_files import expand_path


class SourceConfig(Section):
    """One of the corpora that a domain mixes."""

    name: str | None = Field(default=None, pattern=NAME_PATTERN)
    """Name in messages; null: `source` and its position."""
    train: list[PathText] = Field(min_length=1)
    """Training text: files, globs and hub names as in `domains.0.train`."""
    weight: float = Field(gt=0.0)
    """Part of the domain's samples that come from it, relative to the weights of the other sources."""
    text_column: str | None = None
    """Text column of .jsonl, .parquet and hub data sets; null: that of the domain."""
    streaming: bool = False
    """Read its text while it is trained on, as `domains.0.streaming`."""


class CorpusConfig(Section):
    """A corpus: files, globs or hub data sets, for training and for held-out evaluation."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name in folders, tables and metric names (letters, digits, - and _)."""
    train: list[PathText] = Field(default=[])
    """Training text: .txt, .jsonl (also .gz, .xz) or .parquet files, globs, hub names
    `owner/name[:config][@split][#revision]`; without a revision the commit of the first start is recorded and kept."""
    valid: list[PathText] = Field(default=[])
    """Held-out text in the same forms, without files of `train`; empty: the last `valid_fraction` of the blocks of
    `train`, or of each source."""
    valid_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Fraction of the training blocks that is held out when `valid` is empty."""
    text_column: str = "text"
    """Text column of .jsonl, .parquet and hub data sets."""
    streaming: bool = False
    """Read and tokenize the text of `train` while it is trained on, some windows of `data.shuffle_buffer` blocks ahead,
    in place of all of it before; needs `valid`, and a length in steps or tokens."""

    @property
    def training_sources(self) -> list[SourceConfig]:
        """Where training samples come from: `train` as one source; empty if the corpus is only evaluated."""
        if not self.train:
            return []
        return [SourceConfig(train=self.train, weight=1.0, text_column=self.text_column, streaming=self.streaming)]

    @property
    def is_streamed(self) -> bool:
        """Whether any of its training text is read while it is trained on."""
        return any(source.streaming for source in self.training_sources)

    @property
    def training_text(self) -> list[str]:
        """All training text."""
        return [text for source in self.training_sources for text in source.train]

    @model_validator(mode="after")
    def _has_text(self) -> CorpusConfig:
        if not self.training_text and not self.valid:
            raise ValueError("needs train or valid text")
        return self

    @model_validator(mode="after")
    def _stream_has_valid(self) -> CorpusConfig:
        if self.streaming and not self.train:
            raise ValueError("streaming: found true without train, expected text in train (or streaming in `sources`)")
        if self.is_streamed and not self.valid:
            raise ValueError(
                "streaming: found true without valid, expected held-out text in valid; a stream has no last blocks to "
                "hold out"
            )
        return self


class EvaluationCorpusConfig(CorpusConfig):
    """A corpus that models are evaluated on, and no method trains on."""

    @model_validator(mode="after")
    def _is_only_evaluated(self) -> EvaluationCorpusConfig:
        if self.train:
            raise ValueError(f"train: found {self.train} in a corpus that is only evaluated, allowed: valid")
        return self


class DataConfig(Section):
    """Tokenization and blocks."""

    sequence_length: int = Field(default=128, ge=8)
    """Tokens per block."""
    tokenizer: PathText | None = None
    """Folder or hub name of the tokenizer; null: that of `model.name_or_path`."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of a hub tokenizer, recorded like `model.revision`; null: its default branch."""
    add_tokens: dict[str, list[str] | str] = Field(default={})
    """Domain -> tokens that tokenizer and model gain before it is learned: a list, or a file with one per line."""
    mlm_probability: float = Field(default=0.15, gt=0.0, lt=1.0)
    """Fraction of tokens that is predicted in masked language modeling."""
    document_mask: bool = False
    """Causal only: positions restart and attention stops at document boundaries within a block, and no prediction
    crosses them."""
    cache_dir: PathText | None = None
    """Cache folder of tokenized corpora; null: `$DAS_DS_CACHE`, else `~/.cache/das_ds`."""
    shuffle_buffer: int = Field(default=8192, ge=1)
    """Blocks of a streamed corpus that are tokenized and shuffled together; at least `train.global_batch_size`."""
    num_workers: int = Field(default=0, ge=0)
    """Data loader processes per rank; 0 loads in the training process."""

    @field_validator("add_tokens")
    @classmethod
    def _files_are_expanded(cls, value: dict[str, list[str] | str]) -> dict[str, list[str] | str]:
        return {name: expand_path(tokens) if isinstance(tokens, str) else tokens for name, tokens in value.items()}

    @model_validator(mode="after")
    def _revision_is_of_a_tokenizer(self) -> DataConfig:
        if self.tokenizer_revision is not None and self.tokenizer is None:
            raise ValueError(
                f"tokenizer_revision: found {self.tokenizer_revision} without a tokenizer; the model's tokenizer "
                "follows model.revision"
            )
        return self
