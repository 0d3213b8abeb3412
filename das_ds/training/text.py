"""The text of a run on one rank: tokeniser, blocks of every corpus, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from das_ds.config import CorpusConfig, ObjectiveName, RunConfig
from das_ds.data.batches import Batch
from das_ds.data.blocks import CorpusBlocks, TokenBlocks, prepare_corpus
from das_ds.data.loader import AccumulatedBatches, Samples, evaluation_batches, training_steps
from das_ds.data.objectives import Objective, make_objective
from das_ds.distributed.launch import RankInfo
from das_ds.functional.sampling import subset_indices
from das_ds.models.loading import load_tokenizer


@dataclass(frozen=True)
class RunText:
    """Everything a run reads; the same batches for any number of ranks, split between them."""

    config: RunConfig
    info: RankInfo
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    blocks: dict[str, CorpusBlocks]
    """Corpus name -> blocks: the domains in order, then the general corpus."""

    def training_steps(self, corpus: str, first_step: int = 0) -> Iterator[list[Batch]]:
        """One list of micro-batches per optimizer step."""
        train = self.config.train
        return training_steps(
            self._training_blocks(corpus),
            self.objective,
            seed=self.config.seed,
            stream=f"train/{corpus}",
            first_step=first_step,
            num_steps=train.steps_per_domain,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            rank=self.info.rank,
            world_size=self.info.world_size,
            num_workers=self.config.data.num_workers,
            pin_memory=self.info.device.type == "cuda",
        )

    def importance_batches(self, corpus: str, label: str) -> Iterable[Batch]:
        """A fixed random subset of `importance.samples` training sequences, under a progress bar."""
        blocks, batch_size = self._training_blocks(corpus), self.config.method.importance.batch_size
        return self._batches(blocks, f"importance/{corpus}", batch_size, label, indices=self._importance_subset(blocks))

    def importance_steps(self, corpus: str, label: str) -> Iterable[list[Batch]]:
        """The same subset as micro-batches of whole optimizer steps, under a progress bar."""
        train, blocks = self.config.train, self._training_blocks(corpus)
        steps = AccumulatedBatches(
            Samples(blocks, self.objective, self.config.seed, f"importance/{corpus}"),
            self._importance_subset(blocks),
            train.global_batch_size,
            train.micro_batch_size,
            self.info.rank,
            self.info.world_size,
        )
        return tqdm(steps, label, disable=not self.info.is_main, unit="step", dynamic_ncols=True, leave=False)

    def evaluation_batches(self, corpus: str, label: str) -> Iterable[Batch]:
        """Held-out sequences, under a progress bar."""
        evaluation, blocks = self.config.evaluation, self.blocks[corpus].valid
        stream = f"evaluation/{corpus}"
        return self._batches(blocks, stream, evaluation.batch_size, label, max_sequences=evaluation.max_sequences)

    def _importance_subset(self, blocks: TokenBlocks) -> Sequence[int]:
        return subset_indices(len(blocks), self.config.method.importance.samples, self.config.seed)

    def _training_blocks(self, corpus: str) -> TokenBlocks:
        blocks = self.blocks[corpus].train
        assert blocks is not None, f"{corpus} is only evaluated"
        return blocks

    def _batches(
        self, blocks: TokenBlocks, stream: str, batch_size: int | None, label: str, **choice: Any
    ) -> Iterable[Batch]:
        batches = evaluation_batches(
            blocks,
            self.objective,
            seed=self.config.seed,
            stream=stream,
            batch_size=batch_size or self.config.train.micro_batch_size,
            rank=self.info.rank,
            world_size=self.info.world_size,
            **choice,
        )
        return tqdm(batches, label, disable=not self.info.is_main, unit="batch", dynamic_ncols=True, leave=False)


def prepare_text(config: RunConfig, info: RankInfo, objective: ObjectiveName) -> RunText:
    """Load the tokeniser and tokenise every corpus, or find it in the cache.

    Raises:
        DasError: a tokeniser or corpus that cannot be used, or not for this objective.
    """
    tokenizer = load_tokenizer(config)
    # Before the corpora, so that a tokeniser without the needed token fails in seconds.
    maker = make_objective(objective, tokenizer, config.data)

    def blocks(corpus: CorpusConfig) -> CorpusBlocks:
        return prepare_corpus(corpus, config.data, tokenizer, objective=objective, progress=info.is_main)

    return RunText(
        config=config,
        info=info,
        tokenizer=tokenizer,
        objective=maker,
        blocks={corpus.name: blocks(corpus) for corpus in evaluated(config)},
    )


def evaluated(config: RunConfig) -> list[CorpusConfig]:
    """Corpora in the order of the loss matrix's columns: the domains, then the general corpus."""
    return [*config.domains, *([config.general] if config.general else [])]
