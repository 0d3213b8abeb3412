"""Data module: tokenizers, token blocks of every corpus, and the batches that one rank reads."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from das_ds.config import CorpusConfig, ObjectiveName, RunConfig, SampleSize
from das_ds.config.continuation import CONTINUE
from das_ds.config.stage import Stage
from das_ds.data.batch import Batch
from das_ds.data.blocks import Blocks, CorpusBlocks, MixedBlocks, prepare_corpus
from das_ds.data.loader import (
    AccumulatedBatches,
    EvaluationBatches,
    SampleDataset,
    SampleStream,
    evaluation_batches,
    training_steps,
)
from das_ds.data.mixture import MixedDomains, SingleDomain
from das_ds.data.objectives import Collator, build_collator
from das_ds.data.replay import NO_REPLAY, Replay
from das_ds.data.stream_blocks import StreamBlocks
from das_ds.data.subsets import random_subset
from das_ds.data.tokenizers import build_tokenizers
from das_ds.distributed.process_group import RankInfo
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import DataError, RunFolderError
from das_ds.functional.token_ids import num_tokens, tokens_by_id
from das_ds.models.loading import load_tokenizer, num_embedding_rows
from das_ds.models.vocabulary import Vocabulary
from das_ds.training.stream_feed import StreamPositions, feed_steps


@dataclass(frozen=True)
class DataModule:
    """Everything a run reads: the same batches for any number of ranks, divided among them."""

    config: RunConfig
    """With steps in place of epochs."""
    info: RankInfo
    base_tokenizer: PreTrainedTokenizerBase
    """The tokenizer before the first domain."""
    tokenizers: dict[str, PreTrainedTokenizerBase]
    """Corpus name -> tokenizer, to which domains may have added tokens."""
    objectives: dict[str, Collator]
    """Corpus name -> what its batches predict."""
    blocks: dict[str, CorpusBlocks]
    """Corpus name -> blocks, in the order of `eval_corpora`."""
    vocabulary: Vocabulary | None
    """Sizes of the vocabulary from corpus to corpus; None where no tokens are added."""

    def num_rows(self, corpus: str) -> int | None:
        """Rows of the vocabulary that this corpus is read with; None: all rows."""
        return None if self.vocabulary is None else self.vocabulary.rows(corpus)

    def num_tokens(self, corpus: str) -> int | None:
        """Tokens that this corpus is read with; None: the vocabulary does not grow."""
        return None if self.vocabulary is None else self.vocabulary.num_tokens[corpus]

    @property
    def base_tokens(self) -> int | None:
        """Tokens before the first domain; None: the vocabulary does not grow."""
        return None if self.vocabulary is None else self.vocabulary.base_tokens

    @property
    def all_tokens(self) -> tuple[str, ...]:
        """The vocabulary by id, with the tokens that all domains add."""
        return tokens_by_id(max((tokenizer.get_vocab() for tokenizer in self.tokenizers.values()), key=num_tokens))

    @cached_property
    def fingerprints(self) -> dict[str, list[str]]:
        """Corpus -> fingerprints of text and tokenizer, of its training and its held-out split."""
        splits = {name: [blocks.train, blocks.valid] for name, blocks in self.blocks.items()}
        return {
            name: [part.name for split in both if split is not None for part in split.parts]
            for name, both in splits.items()
        }

    @cached_property
    def stream_positions(self) -> StreamPositions | None:
        """Where training is in the text that is streamed; None where none is."""
        training = [part for both in self.blocks.values() if both.train is not None for part in both.train.parts]
        streams = {part.name: part.stream for part in training if isinstance(part, StreamBlocks)}
        return StreamPositions(streams) if streams else None

    def state_dict(self) -> ComponentState:
        """Fingerprints of the text; which batch comes next follows from the step."""
        return ComponentState(metadata=self.fingerprints)

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Check that the text is that of the checkpoint.

        Raises:
            RunFolderError: a corpus, or the tokens it is read with, changed since.
        """
        fingerprints = saved.metadata
        changed = [name for name, saved_splits in fingerprints.items() if self.fingerprints.get(name) != saved_splits]
        if changed:
            raise RunFolderError(
                f"{self.config.output_dir}: the text or the tokens of {', '.join(changed)} changed since the run was "
                "saved; put files and data.add_tokens back as they were or use another folder"
            )

    def require_windows(
        self, stage: Stage, first_step: int = 0, *, generated: tuple[Blocks, Collator] | None = None
    ) -> None:
        """Make what a stage needs first of text that is streamed; the other ranks of a node wait for the first one.

        That is the window that a step begins in, and the first window of each stream that is measured on or replayed.

        Raises:
            DataError: text that cannot be read, see `TokenStream.require`.
        """
        if self.stream_positions is None:
            return
        general = self.config.general
        replayed = [] if len(stage.domains) > 1 else self.config.replayed(stage.only_domain)
        names = [*stage.domains, *replayed, *([] if general is None or not general.train else [general.name])]
        for part in (part for name in names for part in self._training_blocks(name).parts):
            if isinstance(part, StreamBlocks):
                part.require(0)
        samples = self._sample_stream(stage, generated)
        for stream, window in samples.windows(first_step * self.config.train.global_batch_size):
            stream.require(window)

    def training_steps(
        self, stage: Stage, first_step: int = 0, *, generated: tuple[Blocks, Collator] | None = None
    ) -> Generator[list[Batch]]:
        """One list of micro-batches per optimizer step; to be closed where they are not read to the end.

        Args:
            stage: what is learned.
            first_step: steps that are done.
            generated: blocks and collator of generated text that is replayed; None: none.
        """
        train = self.config.train
        samples = self._sample_stream(stage, generated)
        steps = training_steps(
            samples,
            first_step=first_step,
            num_steps=stage.num_steps,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            rank=self.info.rank,
            world_size=self.info.world_size,
            num_workers=self.config.data.num_workers,
            pin_memory=self.info.device.type == "cuda",
        )
        if self.stream_positions is None or not list(samples.windows(0)):
            return steps
        return feed_steps(
            steps,
            samples,
            first_step=first_step,
            global_batch_size=train.global_batch_size,
            positions=self.stream_positions,
            is_feeding=self.info.local_rank == 0,
        )

    def importance_batches(self, corpus: str, num_samples: int | None = None) -> EvaluationBatches:
        """A fixed random subset of the training sequences, of the size that the config gives; else of `num_samples`."""
        blocks = self._training_blocks(corpus)
        return self._batches(
            corpus,
            blocks,
            f"importance/{corpus}",
            self._sample_size.batch_size,
            indices=self._importance_subset(blocks, num_samples),
        )

    def generated_batches(
        self, generated: tuple[Blocks, Collator], domain: str, num_samples: int | None = None
    ) -> EvaluationBatches:
        """A fixed random subset of what the model wrote before a domain, of the size of `importance_batches`."""
        blocks, collator = generated
        return evaluation_batches(
            blocks,
            collator,
            seed=self.config.seed,
            stream=f"importance/generated/{domain}",
            batch_size=self._sample_size.batch_size or self.config.train.micro_batch_size,
            rank=self.info.rank,
            world_size=self.info.world_size,
            indices=self._importance_subset(blocks, num_samples),
        )

    def probe_batches(self, corpus: str, num_sequences: int) -> EvaluationBatches:
        """A fixed random subset of at most so many training sequences, all of which every rank reads."""
        blocks = self._training_blocks(corpus)
        return evaluation_batches(
            blocks,
            self.objectives[corpus],
            seed=self.config.seed,
            stream=f"importance/{corpus}",
            batch_size=self._sample_size.batch_size or self.config.train.micro_batch_size,
            rank=0,
            world_size=1,
            indices=random_subset(blocks, num_sequences, self.config.seed),
        )

    def importance_steps(self, corpus: str) -> AccumulatedBatches:
        """The same subset as micro-batches of `gradient_batch_size` sequences together, as large as in training."""
        blocks = self._training_blocks(corpus)
        batch_size = self.config.gradient_batch_size
        rank_batch_size = batch_size // self.info.world_size
        # The largest divisor of this rank's sequences that is no larger than a micro-batch of training.
        largest = min(rank_batch_size, self.config.train.micro_batch_size)
        micro_batch_size = max(rows for rows in range(1, largest + 1) if rank_batch_size % rows == 0)
        return AccumulatedBatches(
            SampleDataset(blocks, self.objectives[corpus], self.config.seed, f"importance/{corpus}"),
            self._importance_subset(blocks),
            batch_size,
            micro_batch_size,
            self.info.rank,
            self.info.world_size,
        )

    def evaluation_batches(self, corpus: str) -> EvaluationBatches:
        """Held-out sequences."""
        evaluation = self.config.evaluation
        return self._batches(
            corpus,
            self.blocks[corpus].valid,
            f"evaluation/{corpus}",
            evaluation.batch_size,
            max_sequences=evaluation.max_sequences,
        )

    def tokens_per_byte(self) -> dict[str, float]:
        """Corpus -> tokens per UTF-8 byte of its evaluated text."""
        limit = self.config.evaluation.max_sequences
        counts = {name: blocks.valid.count_documents(limit) for name, blocks in self.blocks.items()}
        return {name: num_tokens / num_bytes for name, (num_tokens, num_bytes) in counts.items()}

    def _importance_subset(self, blocks: Blocks, num_samples: int | None = None) -> Sequence[int]:
        size = self._sample_size.num_samples or num_samples or len(blocks)
        return random_subset(blocks, size, self.config.seed)

    @property
    def _sample_size(self) -> SampleSize:
        sample_size = self.config.method.sample_size
        assert sample_size is not None, f"method {self.config.method.name} measures nothing"
        return sample_size

    def _sample_stream(self, stage: Stage, generated: tuple[Blocks, Collator] | None) -> SampleStream:
        samples = tuple(
            SampleDataset(self._training_blocks(name), self.objectives[name], self.config.seed, f"train/{name}")
            for name in stage.domains
        )
        if len(samples) > 1:
            return MixedDomains(samples, stage.weights)
        return SingleDomain(samples[0], self.config.train.global_batch_size, self._replay(stage.only_domain, generated))

    def _replay(self, corpus: str, generated: tuple[Blocks, Collator] | None) -> Replay:
        # Earlier text keeps its own tokenizer, as in evaluation; every later tokenizer has all of its tokens.
        names = self.config.replayed(corpus)
        sources = [(self._training_blocks(name), self.objectives[name]) for name in names]
        if generated is not None:
            sources.append(generated)
        return Replay(self.config.num_replayed(corpus), tuple(sources)) if sources else NO_REPLAY

    def num_training_blocks(self, corpus: str) -> int | None:
        """Sequences that one epoch of a domain has; None: it is streamed, in full or in part."""
        blocks = self._training_blocks(corpus)
        return None if any(isinstance(part, StreamBlocks) for part in blocks.parts) else len(blocks)

    def source_visits(self, domain: str, num_samples: int) -> dict[str, tuple[int | None, int]]:
        """Source -> its training sequences, and how many of a domain's first samples are theirs; {} for one source.

        A source that is streamed has None in place of its sequences.
        """
        blocks = self._training_blocks(domain)
        if not isinstance(blocks, MixedBlocks):
            return {}
        counts = blocks.turns.counts(num_samples)
        sizes = [None if isinstance(part, StreamBlocks) else len(part) for part in blocks.parts]
        return dict(zip(blocks.names, zip(sizes, counts, strict=True), strict=True))

    def _training_blocks(self, corpus: str) -> Blocks:
        blocks = self.blocks[corpus].train
        assert blocks is not None, f"{corpus} is only evaluated"
        return blocks

    def _batches(
        self, corpus: str, blocks: Blocks, stream: str, batch_size: int | None, **choice: Any
    ) -> EvaluationBatches:
        return evaluation_batches(
            blocks,
            self.objectives[corpus],
            seed=self.config.seed,
            stream=stream,
            batch_size=batch_size or self.config.train.micro_batch_size,
            rank=self.info.rank,
            world_size=self.info.world_size,
            **choice,
        )


def prepare_data(config: RunConfig, info: RankInfo, objective: ObjectiveName, *, num_processes: int = 1) -> DataModule:
    """Load the tokenizer, and tokenize every corpus or find it in the cache.

    Args:
        config: of the run.
        info: this rank.
        objective: what batches predict.
        num_processes: processes that tokenize; 1: this one.

    Raises:
        DasError: a tokenizer or corpus that cannot be used, or not for this objective.
    """
    base = load_tokenizer(config)
    tokenizers = build_tokenizers(config, base)
    # Before the corpora, so that a tokenizer without the needed token fails in seconds.
    objectives = {name: build_collator(objective, tokenizer, config.data) for name, tokenizer in tokenizers.items()}

    def blocks(corpus: CorpusConfig) -> CorpusBlocks:
        tokenizer = tokenizers[corpus.name]
        try:
            return prepare_corpus(
                corpus,
                config.data,
                tokenizer,
                objective=objective,
                progress=info.is_main,
                num_processes=num_processes,
                seed=config.seed,
            )
        except DataError as error:
            raise explain_missing_text(config, corpus, error) from error

    prepared = {corpus.name: blocks(corpus) for corpus in eval_corpora(config)}
    return DataModule(
        config=config.with_steps({name: len(both.train) for name, both in prepared.items() if both.train is not None}),
        info=info,
        base_tokenizer=base,
        tokenizers=tokenizers,
        objectives=objectives,
        blocks=prepared,
        vocabulary=_vocabulary(config, base, tokenizers) if config.data.add_tokens else None,
    )


def _vocabulary(
    config: RunConfig, base: PreTrainedTokenizerBase, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> Vocabulary:
    sizes = {name: num_tokens(tokenizer.get_vocab()) for name, tokenizer in tokenizers.items()}
    known = num_tokens(base.get_vocab())
    return Vocabulary(num_embedding_rows(config.model, known), known, sizes)


def eval_corpora(config: RunConfig) -> list[CorpusConfig]:
    """Corpora whose text is read, in the order of the loss matrix's columns."""
    return [*config.readable_domains, *([config.general] if config.general else []), *config.evaluate_on]


def loss_columns(config: RunConfig) -> list[str]:
    """Columns of the loss matrix: the domains, the general corpus, those of `evaluate_on`."""
    corpora = [*config.domains, *([config.general] if config.general else []), *config.evaluate_on]
    return [corpus.name for corpus in corpora]


def explain_missing_text(config: RunConfig, corpus: CorpusConfig, error: DataError) -> DataError:
    """The error of a corpus that cannot be read, with what to do if it is of an earlier run."""
    earlier = config.domains[: config.num_earlier]
    if config.continue_from is None or corpus.name not in [domain.name for domain in earlier]:
        return error
    return DataError(
        f"{error}; {corpus.name} was learned by {config.continue_from.run}: put its text back, or set "
        f"{CONTINUE}.evaluate: false, with which it is no longer evaluated"
    )
