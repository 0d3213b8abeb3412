"""Loading the network and its tokenizer, as the run config names them."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from das_ds.config import ModelConfig, ObjectiveName, RunConfig
from das_ds.errors import ConfigError, DasError, ModelError, first_line
from das_ds.hub import HubError, resolve_model_folder
from das_ds.models.architectures.from_config import spec_from_config
from das_ds.models.architectures.registry import spec_for
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.stored_tensors import abbreviate, find_file
from das_ds.models.weights import HEAD, StoredWeights
from das_ds.storage import CHECKSUM_FILE, find_corrupted
from das_ds.user_files import find_lfs_pointers

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS_RECORD = "das_ds_weights"
"""Attribute of a network's config that records how its weights were read (`StoredWeights.record`)."""
EXCEPTION_TEXTS = {
    "surplus": "left out",
    "drawn": f"of the LM head drawn by seed (model.allow_missing: [{HEAD}])",
}
"""Key of the record that lists tensors -> text."""
AUTO_CLASSES: dict[ObjectiveName, Any] = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM}


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `data.tokenizer`, else of the model.

    Raises:
        ConfigError: a model with random weights and no `data.tokenizer`.
        ModelError: it cannot be loaded.
    """
    source = config.data.tokenizer
    revision = config.data.tokenizer_revision
    if source is None:
        source = config.model.name_or_path
        revision = config.model.revision
    if source is None:
        raise ConfigError(
            "data.tokenizer: a model with random weights needs a tokenizer folder or hub name, found null"
        )
    return open_tokenizer(source, revision)


def open_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a hub name at a revision.

    Raises:
        ModelError: it cannot be loaded.
    """
    _refuse_pointers(source, *_tokenizer_patterns(source))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_model_folder(source, revision))
    except DasError:
        raise
    # Libraries raise anything over a damaged file; tokenizers, for example, a bare Exception.
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer {source!r} (a folder or hub name): {first_line(error)}") from error
    # Without tokenizer files, transformers builds a tokenizer of the model's type that has only special tokens.
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(
            f"tokenizer {source!r}: found no token but special ones, expected the files of a tokenizer there "
            "(tokenizer.json, vocab.txt, vocab.json and merges.txt ...); data.tokenizer can name another folder"
        )
    return tokenizer


class Construction(Protocol):
    """A way to build a network other than in full on every rank."""

    def from_config(self, construct: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The network of `construct()`, randomly initialized."""

    def from_pretrained(self, construct: Callable[[], PreTrainedModel], weights: StoredWeights) -> PreTrainedModel:
        """The network of `construct()` with stored weights; missing weights keep their random initialization."""


def load_model(
    config: ModelConfig,
    *,
    seed: int,
    vocab_size: int,
    construction: Construction | None = None,
) -> tuple[PreTrainedModel, ArchitectureSpec]:
    """The network in float32, with its architecture spec.

    Args:
        config: the model to load.
        seed: seed of random weights.
        vocab_size: tokens of the tokenizer; sets the embedding of a random model, checked against a pre-trained one.
        construction: builds the network sharded, with equal weights.

    Raises:
        ModelError: the model cannot be loaded, has no architecture spec, has weights of another network, or has fewer
            embeddings than there are tokens.
    """
    network_config = model_config(config, vocab_size=vocab_size)
    spec = find_spec(config)
    auto_class = AUTO_CLASSES[spec.objective]
    options: dict[str, Any] = {"attn_implementation": config.attention, "dtype": torch.float32}

    def construct() -> PreTrainedModel:
        torch.manual_seed(seed)
        network: PreTrainedModel = auto_class.from_config(network_config, **options)
        return network

    # An exported model carries the record of the files that its run started from.
    network_config.__dict__.pop(WEIGHTS_RECORD, None)
    try:
        source = weights_folder(config)
        with torch.random.fork_rng():
            if source is not None:
                model = _pretrained(config, source, construct, construction)
            else:
                model = construction.from_config(construct) if construction else construct()
    except DasError:
        raise
    except Exception as error:
        raise ModelError(
            f"cannot load the model {config.name_or_path or config.config!r} (model.attention: {config.attention}): "
            f"{first_line(error)}"
        ) from error
    check_embeddings(model, vocab_size)
    if config.gradient_checkpointing:
        # Reentrant checkpointing does not support torch.autograd.grad, which measuring importance uses.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, spec


def weights_folder(config: ModelConfig) -> str | None:
    """The folder of pre-trained weights, downloaded from the hub if necessary; None: random weights.

    Raises:
        ModelError: the model does not exist or cannot be downloaded.
    """
    if config.name_or_path is None:
        return None
    try:
        return resolve_model_folder(config.name_or_path, config.revision, weights=True)
    except HubError as error:
        raise ModelError(f"cannot load the model {config.name_or_path!r} (a folder or hub name): {error}") from error


def check_files(config: ModelConfig) -> None:
    """Compare the files of an exported model with the checksums exported with them.

    Raises:
        ModelError: files are missing or were modified.
    """
    folder = Path(config.name_or_path or "")
    if config.name_or_path and folder.is_dir() and (corrupted := find_corrupted(folder)):
        raise ModelError(
            f"{folder}: {', '.join(corrupted)} missing or not as exported (see {CHECKSUM_FILE}); restore an intact "
            f"copy, or remove {CHECKSUM_FILE} if the change was intended"
        )


def find_spec(config: ModelConfig) -> ArchitectureSpec:
    """The architecture spec of a run's model, checked against the run's objective.

    Raises:
        ModelError: the model config cannot be read, or its type has no spec, neither registered nor in the run config.
        ConfigError: the run config asks for another objective than that of the architecture.
    """
    spec = _select_spec(config)
    if config.objective not in ("auto", spec.objective):
        raise ConfigError(
            f"model.objective: found {config.objective}, but {spec.model_type} is made for {spec.objective}; "
            f"allowed: auto, {spec.objective}"
        )
    return spec


def num_embedding_rows(config: ModelConfig, vocab_size: int) -> int:
    """Rows of the embedding of the model that `load_model` returns."""
    return int(model_config(config, vocab_size=vocab_size).get_text_config().vocab_size)


def check_sequence_length(model: PreTrainedModel, spec: ArchitectureSpec, sequence_length: int) -> None:
    """Raises ConfigError if blocks are longer than the model has positions."""
    longest = spec.max_sequence_length(model)
    if sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length: found {sequence_length}, but this {spec.model_type} has positions for at most "
            f"{longest} tokens"
        )


def model_config(config: ModelConfig, **defaults: int) -> Any:
    """The Hugging Face config of a model; `defaults` apply to `model.config` where it lacks a key.

    Raises:
        ModelError: it cannot be loaded or built.
    """
    if config.name_or_path is not None:
        _refuse_pointers(config.name_or_path, "config.json")
    try:
        if config.name_or_path is not None:
            return _stored_config(config)
        assert config.config is not None
        values = {**defaults, **config.config}
        model_type = values.pop("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ModelError(f"model type: found {model_type!r}, which transformers does not know")
        _check_config_keys(model_type, values)
        return AutoConfig.for_model(model_type, **values)
    except DasError:
        raise
    # A value of a wrong type may fail anywhere in the config class.
    except Exception as error:
        source = config.name_or_path or config.config
        raise ModelError(f"cannot load the model config of {source!r}: {first_line(error)}") from error


def _check_config_keys(model_type: str, values: dict[str, Any]) -> None:
    """Raises ModelError for a key that transformers would silently ignore, so that another network would be trained."""
    if "quantization_config" in values:
        raise ModelError(
            "model.config.quantization_config: found with random weights, which are 32 bits wide; expected no such key"
        )
    known = AutoConfig.for_model(model_type)
    # Not attributes, but read: rotary settings of transformers < 5 become `rope_parameters`.
    rotary = ("rope_theta", "partial_rotary_factor") if hasattr(known, "rope_parameters") else ()
    for key in values:
        if not hasattr(known, key) and key not in (*rotary, WEIGHTS_RECORD) and not _mentions(known, key):
            near = difflib.get_close_matches(key, vars(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ModelError(f"model.config.{key}: unknown key of a {model_type} config{hint}")
    layers = values.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise ModelError(f"model.config.num_hidden_layers: found {layers!r}, allowed: at least 1")


def _mentions(config: Any, key: str) -> bool:
    """Whether the code of a config's network mentions a key; it may read keys that the config does not declare."""
    network: Any = AutoModel._model_mapping.get(type(config), None)
    module = inspect.getmodule(network[0] if isinstance(network, tuple) else network)
    # Without source code, allow every key.
    return module is None or re.search(rf"\b{re.escape(key)}\b", inspect.getsource(module)) is not None


def _stored_config(config: ModelConfig) -> Any:
    """The config in a folder or on the hub, of a model with complete, unquantized weights.

    Raises:
        ModelError: the weights are quantized, or belong to a LoRA adapter.
    """
    source = config.name_or_path
    folder = resolve_model_folder(str(source), config.revision)
    if find_file(folder, ADAPTER_CONFIG) is not None:
        raise ModelError(
            f"model.name_or_path: found {ADAPTER_CONFIG} in {source}, expected a complete model; merge the adapter "
            "into its base model first, or move it away to use the weights next to it without it (model.lora.init_from "
            "continues an adapter)"
        )
    stored = AutoConfig.from_pretrained(folder)
    quantization = getattr(stored, "quantization_config", None)
    if quantization is not None:
        values = quantization if isinstance(quantization, dict) else vars(quantization)
        method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
        raise ModelError(
            f"model.name_or_path: found weights quantized by {method or 'an unknown method'} (quantization_config in "
            f"config.json) in {source}, expected trainable weights of 16 or 32 bits"
        )
    return stored


def _select_spec(config: ModelConfig) -> ArchitectureSpec:
    values = model_config(config).to_dict() if config.config is None else config.config
    model_type = values["model_type"]
    if config.architecture is not None:
        return spec_from_config(config.architecture, model_type)
    return spec_for(model_type, values.get("is_decoder", False))


def _pretrained(
    config: ModelConfig, source: str, construct: Callable[[], PreTrainedModel], construction: Construction | None
) -> PreTrainedModel:
    with torch.device("meta"):
        meta_model = construct()
    _refuse_pointers(source, *_weight_patterns(source))
    with closing(StoredWeights(source, meta_model)) as weights:
        weights.check(config.allow_missing)
        record = {**weights.record(), "source": config.name_or_path}
        model = construction.from_pretrained(construct, weights) if construction else weights.fill(construct)
    setattr(model.config, WEIGHTS_RECORD, record)
    if model.can_generate():
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(source)
    model.eval()
    return model


def describe_stored_weights(config: ModelConfig, meta_model: PreTrainedModel) -> str:
    """What `load_model` would do with the stored weights, in one line; no values are read.

    Args:
        config: of a model with pre-trained weights.
        meta_model: the network on the meta device.

    Raises:
        ModelError: `load_model` would refuse the weights.
    """
    name = str(config.name_or_path)
    try:
        source = resolve_model_folder(name, config.revision)
        _refuse_pointers(source, *_weight_patterns(source))
        with closing(StoredWeights(source, meta_model, local_only=True)) as weights:
            weights.check(config.allow_missing)
            return _format_record({**weights.record(), "source": name})
    except DasError:
        raise
    # As in `load_model`: libraries raise anything over a damaged file.
    except Exception as error:
        if isinstance(error, OSError) and not Path(name).is_dir():
            return f"weights of {name} are not in the local cache yet and were not checked"
        raise ModelError(f"cannot read the weights of {name!r}: {first_line(error)}") from error


def get_weights_record(model: PreTrainedModel) -> dict[str, Any] | None:
    """The record of how a network's weights were read from files; None: they are random."""
    record: dict[str, Any] | None = getattr(model.config, WEIGHTS_RECORD, None)
    return record


def print_weights_summary(model: PreTrainedModel) -> None:
    """Print one line about the weights, to stderr, because stdout is for the results of a command."""
    if (record := get_weights_record(model)) is not None:
        print(f"das_ds: {_format_record(record)}", file=sys.stderr, flush=True)


def _format_record(record: dict[str, Any]) -> str:
    changed = [f"{record[key]} {key}" for key in ("renamed", "converted") if record[key]]
    exceptions = [
        f"{len(record[key])} {text}: {abbreviate(record[key])}" for key, text in EXCEPTION_TEXTS.items() if record[key]
    ]
    return (
        f"weights of {record['source']}: {record['num_tensors']} tensors ({', '.join(record['dtypes'])}) of "
        f"{abbreviate(record['files'])} as float32" + "".join(f"; {text}" for text in (*changed, *exceptions))
    )


def check_embeddings(model: PreTrainedModel, vocab_size: int) -> None:
    """Raises ModelError if there are more tokens than rows of the embedding."""
    embeddings: Any = model.get_input_embeddings()
    num_embeddings = embeddings.num_embeddings
    if vocab_size > num_embeddings:
        raise ModelError(
            f"the tokenizer has {vocab_size} tokens, but the model has embeddings for only {num_embeddings}"
        )


def _tokenizer_patterns(source: str) -> tuple[str, ...]:
    """Glob patterns of the files that a tokenizer is read from; tokenizer.json replaces the vocabulary files."""
    settings = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    if (Path(source) / "tokenizer.json").is_file():
        return settings
    return (*settings, "vocab.*", "merges.txt", "*.model", "*.tiktoken")


def _weight_patterns(source: str) -> tuple[str, ...]:
    """Glob patterns of the files that weights are read from: safetensors if there are any."""
    return ("*.safetensors", "*.index.json") if any(Path(source).glob("*.safetensors")) else ("*.bin", "*.index.json")


def _refuse_pointers(source: str, *patterns: str) -> None:
    """Raises ModelError if files are Git LFS pointers, which some readers would accept as a small vocabulary."""
    folder = Path(source)
    try:
        pointers = find_lfs_pointers(folder, *patterns) if folder.is_dir() else []
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror or error})") from error
    if pointers:
        raise ModelError(
            f"{folder}: found Git LFS pointers in place of {', '.join(pointers)}, expected the files themselves; fetch "
            "them with: git lfs pull"
        )
