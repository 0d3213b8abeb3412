"""Generated text: what the model writes before a domain, for replay while that domain is learned.

Sample n of a domain is a function of the run's seed, the domain, n, and the weights: every token is drawn by a uniform
of its own (`functional.token_sampling`), and no random generator of a rank is used. The same ranks write the same text
bit for bit, also when they are interrupted; other ranks, batches or ZeRO stages round the logits differently, which
changes a token only where its uniform is within that rounding of the next one's, and then the rest of its sequence.

Shape legend: N sequences, S tokens per sequence, R sequences of a rank and batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from das_ds.config import RunConfig
from das_ds.config.stage import Stage
from das_ds.data.blocks import Blocks
from das_ds.data.generated import document_prefix, ordinary_tokens, read_generated, write_generated
from das_ds.data.loader import SampleDataset
from das_ds.data.mixture import SingleDomain
from das_ds.data.objectives import Collator, MLMCollator, end_of_text
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.resumable import ResumableLoops
from das_ds.distributed.state import ComponentState, SavedComponentState
from das_ds.errors import ConfigError, RunFolderError
from das_ds.functional.token_sampling import document_starts, infill_groups, sample_uniforms
from das_ds.models.generation import DocumentTokens, TokenSampler, check_prompts, continue_rows, infill_rows
from das_ds.models.loading import get_weights_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from das_ds.context import RunContext
    from das_ds.training.data_module import DataModule
    from das_ds.training.run_services import RunServices

logger = logging.getLogger(__name__)

LEAST_DIFFERENT = 0.5
"""Share of the sequences below which a warning says that they repeat each other."""
TOKENS = "tokens"


@dataclass(frozen=True)
class SampleNumbers:
    """One rank's batches of sample numbers 0 .. N - 1; ranks have equally many batches, all of the same size.

    Args:
        num_samples: N.
        batch_size: largest number of samples per rank and batch.
        rank, world_size: of this rank.
    """

    num_samples: int
    batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return -(-self.num_samples // (self.world_size * self.batch_size))

    @property
    def num_rows(self) -> int:
        """Samples of a batch; distributed evenly, so that little is generated in vain."""
        return -(-self.num_samples // (self.world_size * len(self)))

    def __getitem__(self, number: int) -> range:
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = (number * self.world_size + self.rank) * self.num_rows
        # Numbers from N on fill up the last batch and are not kept.
        return range(start, start + self.num_rows)


class GeneratedText:
    """Generates text before a domain, stores it in the run folder, and gives it to the domain's steps.

    A component of checkpoints, which have the fingerprint of the text; within its generation they have the tokens so
    far, in a resumable loop.

    Args:
        config: of the run.
        context: the model.
        data: text to prompt with, or to fill in, and tokenizers.
        services: of the run.

    Raises:
        ConfigError: prompts of a masked language model, or streamed text to prompt with or to fill in.
    """

    def __init__(self, config: RunConfig, context: RunContext, data: DataModule, services: RunServices) -> None:
        if config.method.replay.source != "earlier":
            check_prompts(config.method.replay.generation, context.objective)
            _check_given_text(config, context, data)
        self._config = config
        self._settings = config.method.replay.generation
        self._context = context
        self._data = data
        self._services = services
        self._stage: Stage | None = None
        self._fingerprint: str | None = None
        self.source: tuple[Blocks, Collator] | None = None
        """Blocks to replay while the present domain is learned, and the collator for their tokenizer; None: none."""

    def before_domain(self, stage: Stage, loops: ResumableLoops) -> None:
        """Generate text by the present model, where the domain replays some; a collective."""
        self.clear()
        if self._config.method.trains_jointly or not self._config.replays_generated(stage.only_domain):
            return
        if stage.index == 0:
            self._warn_of_random_weights()
        tokens = self._generate(stage, loops)
        with self._services.watchdog.suspend_timeout("writing generated text"):
            self._services.process_group.run_on_main(lambda: self._write(stage, tokens))
            self._open(stage)

    def clear(self) -> None:
        """The domain is learned; its text stays in the run folder."""
        self._stage = None
        self._fingerprint = None
        self.source = None

    def state_dict(self) -> ComponentState:
        """Which text is replayed at present."""
        stage = None if self._stage is None else self._stage.index
        return ComponentState(metadata={"stage": stage, "fingerprint": self._fingerprint})

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Continue with the same text.

        Raises:
            RunFolderError: it is missing, or was altered.
        """
        self.clear()
        if saved.metadata["stage"] is None:
            return
        stage = self._config.stages[saved.metadata["stage"]]
        with self._services.watchdog.suspend_timeout("reading generated text"):
            self._open(stage)
        if self._fingerprint != saved.metadata["fingerprint"]:
            folder = self._services.run_dir.generated(stage.index, stage.name)
            raise RunFolderError(
                f"{folder}: found other generated text than the checkpoint was trained on; restore it, or resume from "
                "a checkpoint before it was generated"
            )

    def _tokenizer(self, stage: Stage) -> PreTrainedTokenizerBase:
        """That of the model before the domain, which does not know the tokens that the domain adds."""
        if stage.index == 0:
            return self._data.base_tokenizer
        return self._data.tokenizers[self._config.domains[stage.index - 1].name]

    def _collator(self, stage: Stage) -> Collator:
        # All text that is read with one tokenizer has the same collator; general text is read with the base one.
        name = stage.only_domain if stage.index == 0 else self._config.domains[stage.index - 1].name
        collator = self._data.objectives[name]
        if not isinstance(collator, MLMCollator):
            return collator
        return MLMCollator.from_tokenizer(self._tokenizer(stage), collator.probability)

    def _open(self, stage: Stage) -> None:
        folder = self._services.run_dir.generated(stage.index, stage.name)
        document_mask = self._config.data.document_mask
        # Rank 0 first: files on a network file system may appear later on other nodes.
        blocks, record = self._services.process_group.main_process_first(
            lambda: read_generated(folder, document_mask=document_mask)
        )
        self._stage = stage
        self._fingerprint = record.fingerprint
        self.source = (blocks, self._collator(stage))

    def _generate(self, stage: Stage, loops: ResumableLoops) -> torch.Tensor:
        """(N, S) tokens on the host, equal on all ranks."""
        info = self._data.info
        length = self._config.data.sequence_length
        batch_size = self._settings.batch_size or self._config.train.micro_batch_size
        batches = SampleNumbers(self._settings.num_sequences, batch_size, info.rank, info.world_size)
        loop = loops.start(batches, f"generate text before {stage.name}")
        shape = (len(batches), batches.num_rows, length)
        mine = loop.accumulators.setdefault(TOKENS, torch.zeros(shape, dtype=torch.int32, device=info.device))
        writer = _Writer(self._config, self._context, self._data, stage, self._tokenizer(stage), self._on_token)
        weights = self._context.engine.weights
        module = self._context.engine.module
        for index, numbers in enumerate(loop, start=loop.num_done):
            module.eval()
            with weights.gathered() if self._settings.gather_weights else nullcontext():
                mine[index] = writer.write(numbers)
            module.train()
        # (batches, ranks, rows, S) is the order of the sample numbers.
        every = torch.zeros((len(batches), info.world_size, *shape[1:]), dtype=torch.int32, device=info.device)
        every[:, info.rank] = mine
        tokens = all_reduce_sum(every).flatten(0, 2)[: self._settings.num_sequences]
        return tokens.long().cpu()

    def _on_token(self, position: int) -> None:
        self._services.watchdog.beat("generating text", position)

    def _warn_of_random_weights(self) -> None:
        record = get_weights_record(self._context.network.model)
        if self._data.info.is_main and (record is None or record["drawn"]):
            logger.warning(
                "method.replay.source %s: the model has random weights, so that the text it writes before the first "
                "domain is noise",
                self._config.method.replay.source,
            )

    def _write(self, stage: Stage, tokens: torch.Tensor) -> None:
        tokenizer = self._tokenizer(stage)
        if self._context.objective == "clm":
            documents = _document_tokens(tokenizer)
            starts = document_starts(tokens, documents.end, begins_with_end=documents.begins_with_end)
        else:
            starts = torch.zeros_like(tokens, dtype=torch.bool)
            starts[:, 0] = True
        folder = self._services.run_dir.generated(stage.index, stage.name)
        settings = {
            "domain": stage.name,
            "seed": self._config.seed,
            "objective": self._context.objective,
            **self._settings.model_dump(mode="json"),
        }
        write_generated(folder, tokens, starts, tokenizer, settings)
        num_different = len(torch.unique(tokens, dim=0))
        logger.info("%s: %d generated sequences, %d of them different", folder, len(tokens), num_different)
        if num_different < len(tokens) * LEAST_DIFFERENT:
            logger.warning(
                "method.replay.generation: of %d generated sequences only %d are different, so that little is "
                "rehearsed; use a higher temperature (now %g) or top_p (now %g)",
                len(tokens),
                num_different,
                self._settings.temperature,
                self._settings.top_p,
            )


def _check_given_text(config: RunConfig, context: RunContext, data: DataModule) -> None:
    """Text that samples begin with or fill in is read in another order than a stream is made in."""
    if context.objective == "mlm":
        names = [domain.name for domain in config.domains if config.replays_generated(domain.name)]
    else:
        general = config.general if config.method.replay.generation.prompt_tokens else None
        names = [] if general is None else [general.name]
    if streamed := [name for name in names if name in data.blocks and data.num_training_blocks(name) is None]:
        raise ConfigError(
            f"method.replay.source: found {config.method.replay.source}, for which the model reads text of "
            f"{streamed[0]}, which is streamed; expected streaming: false there, or method.replay.source earlier"
        )


class _Writer:
    """Writes batches of samples.

    Args:
        config, context, data: of the run.
        stage: of the domain.
        tokenizer: of the model.
        on_token: called with every position of a batch that is reached.
    """

    def __init__(
        self,
        config: RunConfig,
        context: RunContext,
        data: DataModule,
        stage: Stage,
        tokenizer: PreTrainedTokenizerBase,
        on_token: Callable[[int], None],
    ) -> None:
        self._on_token = on_token
        self._config = config
        self._settings = config.method.replay.generation
        self._context = context
        self._data = data
        self._is_causal = context.objective == "clm"
        self._stream = f"generate/{stage.only_domain}"
        self._tokenizer = tokenizer
        self._documents = _document_tokens(tokenizer) if self._is_causal else None
        ends = set() if self._documents is None else {self._documents.end}
        device = data.info.device
        self._sampler = TokenSampler(
            ordinary_tokens(tokenizer, ends).to(device), self._settings.temperature, self._settings.top_p
        )
        self._given = self._given_text(stage)

    def write(self, numbers: Sequence[int]) -> torch.Tensor:
        """The samples of these numbers, (R, S)."""
        module = self._context.engine.module
        network = self._context.network
        device = self._data.info.device
        length = self._config.data.sequence_length
        seed = self._config.seed
        uniforms = torch.from_numpy(sample_uniforms(seed, self._stream, numbers, length)).to(device)
        if self._documents is not None:
            return continue_rows(
                module,
                network,
                self._prompts(numbers, self._documents).to(device),
                uniforms,
                self._sampler,
                self._documents,
                isolated=self._config.data.document_mask,
                on_token=self._on_token,
            )
        tokens = self._rows(numbers)
        # As many groups as leave the share of masked tokens that the model was trained with.
        count = math.ceil(1 / self._config.data.mlm_probability)
        groups = torch.from_numpy(infill_groups(seed, self._stream, numbers, length, count))
        is_special = torch.isin(tokens, torch.tensor(self._tokenizer.all_special_ids))
        groups = groups.masked_fill(is_special, -1)
        mask_id = self._tokenizer.mask_token_id
        assert isinstance(mask_id, int), "the collator needs a mask token"
        return infill_rows(
            module,
            network,
            tokens.to(device),
            groups.to(device),
            uniforms,
            self._sampler,
            num_groups=count,
            mask_id=mask_id,
        )

    def _given_text(self, stage: Stage) -> SingleDomain | None:
        """Text of which samples take their prompts, or whose tokens they fill in; None: they need none."""
        if self._is_causal and not self._settings.prompt_tokens:
            return None
        name = stage.only_domain
        if self._is_causal:
            assert self._config.general is not None, "prompts are taken from general text"
            name = self._config.general.name
        blocks = self._data.blocks[name].train
        assert blocks is not None, f"{name} is only evaluated"
        return SingleDomain(
            SampleDataset(blocks, self._data.objectives[name], self._config.seed, self._stream), global_batch_size=1
        )

    def _rows(self, numbers: Sequence[int]) -> torch.Tensor:
        """A block of the given text for each sample, shuffled anew for every pass over the text; (R, S)."""
        assert self._given is not None, "there is text"
        return self._given.samples.blocks.index_select([self._given.ref(number).block for number in numbers])

    def _prompts(self, numbers: Sequence[int], documents: DocumentTokens) -> torch.Tensor:
        """First tokens of each sample, (R, k)."""
        if self._settings.prompt_tokens:
            return self._rows(numbers)[:, : self._settings.prompt_tokens]
        # Without special tokens before documents the end of one is all that comes before the next.
        tokens = documents.prefix or (documents.end,)
        return torch.tensor(tokens[: self._config.data.sequence_length]).expand(len(numbers), -1)


def _document_tokens(tokenizer: PreTrainedTokenizerBase) -> DocumentTokens:
    return DocumentTokens(end_of_text(tokenizer), tuple(document_prefix(tokenizer)))
