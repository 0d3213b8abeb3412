"""Sequence classifier on an exported model: its layers, a new head, and one token per entity marker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from das_ds.config import ModelConfig
from das_ds.errors import ConfigError, ModelError, first_line
from das_ds.functional.token_ids import num_tokens, tokens_in_holes
from das_ds.models.loading import check_embeddings, find_spec, model_config, open_tokenizer
from das_ds.models.run_models import list_weight_files


class Classifier(NamedTuple):
    """A network with one logit per class, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_classifier(
    source: ModelConfig, labels: Sequence[str], markers: Sequence[str] = (), tokenizer_folder: str | None = None
) -> Classifier:
    """The network in float32; the head is initialized from torch's global generator.

    Args:
        source: folder of the model, and its attention implementation.
        labels: names of the classes.
        markers: become one token each, whose embedding is the mean of those of the tokens it was split into before.
        tokenizer_folder: where the tokenizer is; None: with the model.

    Raises:
        ModelError: no weights, quantized weights, a LoRA adapter next to them, weights of another network, a model
            type without classifier, or one whose classifier would see a single token.
    """
    # Its checks refuse adapters and quantized weights.
    _check_attention(model_config(source), str(source.name_or_path))
    tokenizer = open_tokenizer(str(source.name_or_path) if tokenizer_folder is None else tokenizer_folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = _load(source, labels)
    check_embeddings(model, num_tokens(tokenizer.get_vocab()))
    model.config.pad_token_id = tokenizer.pad_token_id
    _add_markers(model, tokenizer, markers)
    return Classifier(model, tokenizer)


def check_task_length(source: ModelConfig, model: PreTrainedModel, sequence_length: int, task: str) -> None:
    """Raises ConfigError if rows may be longer than the model has positions; no check without an architecture spec."""
    try:
        longest = find_spec(source).max_sequence_length(model)
    except ModelError:
        return
    if sequence_length > longest:
        raise ConfigError(
            f"tasks.sequence_length of {task}: found {sequence_length}, but this {model.config.model_type} has "
            f"positions for at most {longest} tokens"
        )


def check_model_folder(folder: Path) -> None:
    """Raises ModelError unless this is a model folder; transformers would look up any other name on the hub."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: found no config.json, expected the folder of a model as from save_pretrained")
    if not list_weight_files(folder):
        raise ModelError(f"{folder}: found no weights, expected model.safetensors or its shards")


def _check_attention(config: Any, name: str) -> None:
    """Raises ModelError for an encoder with causal attention: transformers classifies encoders by their first token."""
    if getattr(config, "is_decoder", False) and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise ModelError(
            f"{name}: found is_decoder true in config.json, but a classifier of type {config.model_type} reads the "
            "first token, which sees no other one under causal attention; expected false, or a decoder, whose "
            "classifier reads the last token"
        )


def _load(source: ModelConfig, labels: Sequence[str]) -> PreTrainedModel:
    names = dict(enumerate(labels))
    options: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": names,
        "label2id": {label: number for number, label in names.items()},
        "attn_implementation": source.attention,
        "dtype": torch.float32,
    }
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            str(source.name_or_path), output_loading_info=True, **options
        )
    # Libraries raise anything over a damaged file or an unusual config.
    except Exception as error:
        raise ModelError(
            f"cannot load a classifier from {source.name_or_path} (model.attention: {source.attention}): "
            f"{first_line(error)}"
        ) from error
    # The head is new, and masked language models are exported without the pooler that some heads start with.
    prefix = f"{model.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix) and "pooler" not in key)
    if missing:
        raise ModelError(
            f"{source.name_or_path}: found no weights for {missing[0]} and {len(missing) - 1} more, expected those of "
            f"a complete {model.config.model_type}"
        )
    return model


def _add_markers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, markers: Sequence[str]) -> None:
    """Add one token per marker, in place."""
    previous_ids = {marker: tokenizer(marker, add_special_tokens=False)["input_ids"] for marker in markers}
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(list(markers))
    if reused := tokens_in_holes(known, tokenizer.get_vocab()):
        raise ModelError(
            f"tokenizer of {tokenizer.name_or_path}: its ids have holes, and the marker {reused[0]!r} would get one "
            f"that is in use or has an old embedding; expected ids from 0 to {len(known) - 1} without a gap"
        )
    embedding: Any = model.get_input_embeddings()
    if (needed := num_tokens(tokenizer.get_vocab())) > embedding.num_embeddings:
        model.resize_token_embeddings(needed, mean_resizing=False)
        embedding = model.get_input_embeddings()
    with torch.no_grad():
        for marker, ids in previous_ids.items():
            embedding.weight[tokenizer.convert_tokens_to_ids(marker)] = embedding.weight[ids].mean(dim=0)
