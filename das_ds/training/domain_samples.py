"""Samples of the text of one domain, and of general text, as a method asks for them."""

from __future__ import annotations

from dataclasses import dataclass

from das_ds.config.stage import Stage
from das_ds.context import CorpusSample
from das_ds.data.batch import Batch
from das_ds.data.blocks import Blocks
from das_ds.data.objectives import Collator
from das_ds.distributed.resumable import ResumableLoop, ResumableLoops
from das_ds.training.data_module import DataModule


@dataclass(frozen=True)
class DomainSamples:
    """Resumable loops over samples of one domain, which a run that was stopped continues.

    Args:
        data: batches of all corpora.
        loops: of the present phase.
        stage: of the domain.
        generated_text: that the model wrote before the domain, and its collator; None: none.
    """

    data: DataModule
    loops: ResumableLoops
    stage: Stage
    generated_text: tuple[Blocks, Collator] | None = None

    def batches(self, label: str, *, num_samples: int | None = None) -> ResumableLoop[Batch]:
        """A loop over batches of single sequences."""
        return self.loops.start(self.data.importance_batches(self.stage.only_domain, num_samples), label)

    def probe(self, label: str, num_sequences: int) -> ResumableLoop[Batch]:
        """A loop over a few sequences that every rank reads."""
        return self.loops.start(self.data.probe_batches(self.stage.only_domain, num_sequences), label)

    def steps(self, label: str) -> ResumableLoop[list[Batch]]:
        """A loop over the same sequences as micro-batches of optimizer steps."""
        return self.loops.start(self.data.importance_steps(self.stage.only_domain), label)

    @property
    def general(self) -> CorpusSample | None:
        """The sample of the general corpus; None where it is only evaluated, or there is none."""
        corpus = self.data.config.general
        if corpus is None or not corpus.train:
            return None

        def batches(label: str, *, num_samples: int | None = None) -> ResumableLoop[Batch]:
            return self.loops.start(self.data.importance_batches(corpus.name, num_samples), label)

        return CorpusSample(f"inputs of {corpus.name}", batches, self.data.num_tokens(corpus.name))

    @property
    def generated(self) -> CorpusSample | None:
        """The sample of what the model wrote before the domain; None where it wrote nothing."""
        source = self.generated_text
        if source is None:
            return None

        def batches(label: str, *, num_samples: int | None = None) -> ResumableLoop[Batch]:
            return self.loops.start(self.data.generated_batches(source, self.stage.only_domain, num_samples), label)

        # The model knew no token that the domain adds.
        index = self.stage.index
        known = self.data.base_tokens if index == 0 else self.data.num_tokens(self.data.config.domains[index - 1].name)
        return CorpusSample("inputs of generated text", batches, known)
