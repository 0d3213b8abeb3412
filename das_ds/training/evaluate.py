"""Evaluation: held-out loss per predicted token on every corpus, with fixed corruption, so that it is repeatable."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from das_ds.config import ModelConfig, RunConfig
from das_ds.data.batch import Batch
from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.process_group import ProcessGroup
from das_ds.distributed.resumable import ResumableLoop, ResumableLoops
from das_ds.errors import ConfigError, DataError, ModelError
from das_ds.functional.losses import bits_per_byte
from das_ds.functional.token_ids import num_tokens
from das_ds.models.language_model import LanguageModel
from das_ds.models.loading import (
    check_files,
    check_sequence_length,
    find_spec,
    load_model,
    open_tokenizer,
    print_weights_summary,
)
from das_ds.models.vocabulary import reserve_embedding_rows
from das_ds.training.data_module import DataModule, prepare_data
from das_ds.training.revisions import with_recorded_revisions

TOTAL = "total"


@torch.no_grad()
def compute_eval_loss(model: nn.Module, batches: ResumableLoop[Batch], device: torch.device) -> float:
    """Mean cross-entropy over the predicted tokens of all ranks, in nats; perplexity is its exponential.

    Args:
        model: `LanguageModel`; left in the mode it was in.
        batches: this rank's batches; every rank has the same number of them.
        device: where the model is.

    Raises:
        DataError: there is no predicted token on any rank.
    """
    was_training = model.training
    model.eval()
    # (sum of losses, number of tokens), in float64, so that sums over many batches do not lose digits.
    total = batches.accumulators.setdefault(TOTAL, torch.zeros(2, dtype=torch.float64, device=device))
    for batch in batches:
        batch = batch.to(device)
        _, losses = model(batch.corrupted_ids, batch.predicted, batch.targets, batch.position_ids)
        total[0] += losses.sum()
        total[1] += batch.num_predicted
    model.train(was_training)
    loss_sum, count = all_reduce_sum(total.clone()).tolist()
    if count == 0:
        raise DataError(
            "found no predicted token in the held-out text, expected some: a loss of nothing says nothing "
            "(data.mlm_probability, evaluation.max_sequences)"
        )
    return float(loss_sum / count)


def evaluate_corpora(
    network: LanguageModel, data: DataModule, loops: ResumableLoops, corpora: Iterable[str] | None = None
) -> dict[str, float]:
    """Corpus -> loss in nats per predicted token, equal on every rank.

    Each corpus is read and predicted with its own vocabulary, even if the network has gained tokens since, so that its
    losses always refer to the same targets; the network is left with that of the last one.

    Args:
        network: to evaluate.
        data: its held-out text.
        loops: that a run which was stopped continues.
        corpora: names of corpora; None: all.
    """
    losses = {}
    for corpus in data.blocks if corpora is None else corpora:
        network.num_rows = data.num_rows(corpus)
        batches = loops.start(data.evaluation_batches(corpus), f"evaluate {corpus}")
        losses[corpus] = compute_eval_loss(network, batches, data.info.device)
    return losses


def evaluate_model(
    config: RunConfig, ranks: ProcessGroup, folder: Path, *, in_bits_per_byte: bool = False
) -> dict[str, float]:
    """Losses of an exported model in float32; the ranks share the batches.

    Args:
        config: names the corpora.
        ranks: the process group.
        folder: of the model.
        in_bits_per_byte: instead of nats per predicted token.

    Raises:
        ConfigError: bits per byte of a masked language model.
        DasError: a model or corpus that cannot be used.
    """
    config = with_recorded_revisions(config)
    source = ModelConfig(
        name_or_path=str(folder), attention=config.model.attention, architecture=config.model.architecture
    )
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    ranks.run_on_main(lambda: check_files(source))
    objective = find_spec(source).objective
    if in_bits_per_byte and objective != "clm":
        raise ConfigError(
            f"--bits-per-byte: found objective {objective}, whose loss on some tokens, given all others, is no code "
            "length of the text; allowed: clm"
        )
    data = ranks.main_process_first(lambda: prepare_data(config, ranks.info, objective))
    vocabulary = data.base_tokenizer.get_vocab()
    ranks.run_on_main(lambda: _check_same_tokens(vocabulary, folder))
    model, spec = load_model(source, seed=config.seed, vocab_size=num_tokens(vocabulary))
    if ranks.info.is_main:
        print_weights_summary(model)
    if data.vocabulary is not None:
        reserve_embedding_rows(model, num_tokens(open_tokenizer(str(folder)).get_vocab()), data.vocabulary.total)
    check_sequence_length(model, spec, config.data.sequence_length)
    losses = evaluate_corpora(
        LanguageModel(model, spec, logits_mib=config.train.max_logits_mib).to(ranks.info.device),
        data,
        ResumableLoops(show_progress=ranks.info.is_main),
    )
    if not in_bits_per_byte:
        return losses
    ratios = data.tokens_per_byte()
    return {corpus: bits_per_byte(loss, ratios[corpus]) for corpus, loss in losses.items()}


def _check_same_tokens(vocabulary: dict[str, int], folder: Path) -> None:
    """Check that a model's own tokenizer gives the config's tokens the same ids.

    Raises:
        ModelError: a token has another id, or is missing.
    """
    try:
        own = open_tokenizer(str(folder)).get_vocab()
    except ModelError:
        # A model may come without a tokenizer; then the config's is used.
        return
    different = [token for token, token_id in vocabulary.items() if own.get(token) != token_id]
    if different:
        first = min(different, key=lambda token: vocabulary[token])
        raise ModelError(
            f"{folder}: the model's tokenizer gives other ids than that of the config (data.tokenizer or "
            f"model.name_or_path): found {own.get(first)} for {first!r}, expected {vocabulary[first]}"
        )
