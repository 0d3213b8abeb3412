"""Building the network and its tokenizer from the run config."""

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
"""Attribute of a network's config that says what was done with the files it was read from."""
AUTO_CLASSES: dict[ObjectiveName, Any] = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM}


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `data.tokenizer`, else of the model.

    Raises:
        ConfigError: a model with random weights and no tokenizer named.
        ModelError: it cannot be loaded.
    """
    source, revision = config.data.tokenizer, config.data.tokenizer_revision
    if source is None:
        source, revision = config.model.name_or_path, config.model.revision
    if source is None:
        raise ConfigError(
            "data.tokenizer: a model with random weights needs a tokenizer folder or hub name, found null"
        )
    return open_tokenizer(source, revision)


def open_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, there at a revision.

    Raises:
        ModelError: it cannot be loaded.
    """
    _refuse_pointers(source, *_tokenizer_files(source))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_model_folder(source, revision))
    except DasError:
        raise
    # A damaged file makes libraries raise anything: tokenizers, for one, a bare Exception.
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer {source!r} (a folder or hub name): {first_line(error)}") from error
    # Without the files of a tokenizer transformers makes one of the model's type that knows special tokens alone.
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ModelError(
            f"tokenizer {source!r}: found no token but special ones, expected the files of a tokenizer there "
            "(tokenizer.json, vocab.txt, vocab.json and merges.txt ...); data.tokenizer can name another folder"
        )
    return tokenizer


class Construction(Protocol):
    """A way to build a network other than whole on every rank."""

    def random(self, construct: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The network of `construct()`."""

    def pretrained(self, construct: Callable[[], PreTrainedModel], weights: StoredWeights) -> PreTrainedModel:
        """The network of `construct()` with stored weights; those that are missing stay as it drew them."""


def load_model(
    config: ModelConfig,
    *,
    seed: int,
    vocab_size: int,
    construction: Construction | None = None,
) -> tuple[PreTrainedModel, ArchitectureSpec]:
    """The network in float32, with its adapter.

    Args:
        config: what to build.
        seed: seed of random weights.
        vocab_size: tokens of the tokenizer; sets the embedding of a random model, checked against a pre-trained one.
        construction: builds the network in parts; its weights are the same.

    Raises:
        ModelError: not loadable, no adapter, weights of another network, or fewer embeddings than tokens.
    """
    own_config = model_config(config, vocab_size=vocab_size)
    spec = find_spec(config)
    auto_class = AUTO_CLASSES[spec.objective]
    options: dict[str, Any] = {"attn_implementation": config.attention, "dtype": torch.float32}

    def construct() -> PreTrainedModel:
        torch.manual_seed(seed)
        network: PreTrainedModel = auto_class.from_config(own_config, **options)
        return network

    own_config.__dict__.pop(WEIGHTS_RECORD, None)
    try:
        source = weights_folder(config)
        with torch.random.fork_rng():
            if source is not None:
                model = _pretrained(config, source, construct, construction)
            else:
                model = construction.random(construct) if construction else construct()
    except DasError:
        raise
    except Exception as error:
        raise ModelError(
            f"cannot load the model {config.name_or_path or config.config!r} (model.attention: {config.attention}): "
            f"{first_line(error)}"
        ) from error
    check_embeddings(model, vocab_size)
    if config.gradient_checkpointing:
        # Reentrant checkpointing breaks torch.autograd.grad, which the importance passes use.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, spec


def weights_folder(config: ModelConfig) -> str | None:
    """The folder of pre-trained weights, fetched from the hub where it has to be; None: random weights.

    Raises:
        ModelError: there is no such model, or it cannot be fetched.
    """
    if config.name_or_path is None:
        return None
    try:
        return resolve_model_folder(config.name_or_path, config.revision, weights=True)
    except HubError as error:
        raise ModelError(f"cannot load the model {config.name_or_path!r} (a folder or hub name): {error}") from error


def check_files(config: ModelConfig) -> None:
    """Compare the files of an exported model with the checksums that were written with them.

    Raises:
        ModelError: files are missing or were altered.
    """
    folder = Path(config.name_or_path or "")
    if config.name_or_path and folder.is_dir() and (altered := find_corrupted(folder)):
        raise ModelError(
            f"{folder}: {', '.join(altered)} missing or not as exported (see {CHECKSUM_FILE}); put back a sound copy, "
            f"or remove {CHECKSUM_FILE} if the change was meant"
        )


def find_spec(config: ModelConfig) -> ArchitectureSpec:
    """The adapter of a run's model, whose objective is that of the run.

    Raises:
        ModelError: no model config, or no adapter for its type, neither registered nor in the run config.
        ConfigError: the run config asks for an objective that the architecture is not made for.
    """
    spec = _select_spec(config)
    if config.objective not in ("auto", spec.objective):
        raise ConfigError(
            f"model.objective: found {config.objective}, but {spec.model_type} is made for {spec.objective}; "
            f"allowed: auto, {spec.objective}"
        )
    return spec


def num_embedding_rows(config: ModelConfig, vocab_size: int) -> int:
    """Rows of the embedding that `load_model` gives."""
    return int(model_config(config, vocab_size=vocab_size).get_text_config().vocab_size)


def check_sequence_length(model: PreTrainedModel, spec: ArchitectureSpec, sequence_length: int) -> None:
    """Raises ConfigError when blocks are longer than the model's positions."""
    longest = spec.max_sequence_length(model)
    if sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length: found {sequence_length}, but this {spec.model_type} has positions for at most "
            f"{longest} tokens"
        )


def model_config(config: ModelConfig, **defaults: int) -> Any:
    """The Hugging Face config of a model, `defaults` under what a bare `model.config` says.

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
    # A value of another type may fail anywhere in the class of the config.
    except Exception as error:
        source = config.name_or_path or config.config
        raise ModelError(f"cannot load the model config of {source!r}: {first_line(error)}") from error


def _check_config_keys(model_type: str, values: dict[str, Any]) -> None:
    """Raises ModelError for a key that transformers would keep without using it, and another network be trained."""
    if "quantization_config" in values:
        raise ModelError(
            "model.config.quantization_config: found with weights that are drawn at random, which are 32 bits wide; "
            "expected no such key"
        )
    known = AutoConfig.for_model(model_type)
    # Read, though no attribute: rotary settings of before transformers 5 become `rope_parameters`.
    rotary = ("rope_theta", "partial_rotary_factor") if hasattr(known, "rope_parameters") else ()
    for key in values:
        if not hasattr(known, key) and key not in (*rotary, WEIGHTS_RECORD) and not _reads(known, key):
            near = difflib.get_close_matches(key, vars(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ModelError(f"model.config.{key}: unknown key of a {model_type} config{hint}")
    layers = values.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise ModelError(f"model.config.num_hidden_layers: found {layers!r}, allowed: at least 1")


def _reads(config: Any, key: str) -> bool:
    """Whether the code of a config's network names a key, which it may read without declaring it."""
    network: Any = AutoModel._model_mapping.get(type(config), None)
    module = inspect.getmodule(network[0] if isinstance(network, tuple) else network)
    # Without its code nothing can be said against a key.
    return module is None or re.search(rf"\b{re.escape(key)}\b", inspect.getsource(module)) is not None


def _stored_config(config: ModelConfig) -> Any:
    """The config of a folder or hub name whose weights are those of one whole network.

    Raises:
        ModelError: they are quantized, or belong to an adapter.
    """
    source = config.name_or_path
    folder = resolve_model_folder(str(source), config.revision)
    if find_file(folder, ADAPTER_CONFIG) is not None:
        raise ModelError(
            f"model.name_or_path: found {ADAPTER_CONFIG} in {source}, expected a whole model; merge the adapter into "
            "its base model first, or move it away if the weights beside it are meant without it (model.lora.init_from "
            "continues an adapter)"
        )
    stored = AutoConfig.from_pretrained(folder)
    quantization = getattr(stored, "quantization_config", None)
    if quantization is not None:
        values = quantization if isinstance(quantization, dict) else vars(quantization)
        method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
        raise ModelError(
            f"model.name_or_path: found weights quantized by {method or 'an unknown method'} (quantization_config in "
            f"config.json) in {source}, expected weights of 16 or 32 bits, which training moves"
        )
    return stored


def _select_spec(config: ModelConfig) -> ArchitectureSpec:
    model_type = model_config(config).model_type if config.config is None else config.config["model_type"]
    return spec_for(model_type) if config.architecture is None else spec_from_config(config.architecture, model_type)


def _pretrained(
    config: ModelConfig, source: str, construct: Callable[[], PreTrainedModel], construction: Construction | None
) -> PreTrainedModel:
    with torch.device("meta"):
        outline = construct()
    _refuse_pointers(source, *_weight_files(source))
    with closing(StoredWeights(source, outline)) as weights:
        weights.check(config.allow_missing)
        record = {**weights.record(), "source": config.name_or_path}
        model = construction.pretrained(construct, weights) if construction else weights.fill(construct)
    setattr(model.config, WEIGHTS_RECORD, record)
    if model.can_generate():
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(source)
    model.eval()
    return model


def describe_stored_weights(config: ModelConfig, outline: PreTrainedModel) -> str:
    """What `load_model` would do with stored weights, in a line; none of them is read.

    Args:
        config: of a model with pre-trained weights.
        outline: the network, without values.

    Raises:
        ModelError: it would refuse them.
    """
    name = str(config.name_or_path)
    try:
        source = resolve_model_folder(name, config.revision)
        _refuse_pointers(source, *_weight_files(source))
        with closing(StoredWeights(source, outline, local_only=True)) as weights:
            weights.check(config.allow_missing)
            return weights_line({**weights.record(), "source": name})
    except DasError:
        raise
    # As in `load_model`: a damaged file makes libraries raise anything.
    except Exception as error:
        if isinstance(error, OSError) and not Path(name).is_dir():
            return f"weights of {name} are not on this machine yet and were not looked at"
        raise ModelError(f"cannot read the weights of {name!r}: {first_line(error)}") from error


def get_weights_record(model: PreTrainedModel) -> dict[str, Any] | None:
    """What was done with the files that a network was read from; None: its weights were drawn."""
    record: dict[str, Any] | None = getattr(model.config, WEIGHTS_RECORD, None)
    return record


def print_weights_summary(model: PreTrainedModel) -> None:
    """A line on the screen, on the error stream: that of answers belongs to whoever called the program."""
    if (record := get_weights_record(model)) is not None:
        print(f"das_ds: {weights_line(record)}", file=sys.stderr, flush=True)


def weights_line(record: dict[str, Any]) -> str:
    """The same for people."""
    changed = [f"{record[what]} {what}" for what in ("renamed", "converted") if record[what]]
    beside = [f"{len(record[key])} {what}: {abbreviate(record[key])}" for key, what in WHAT_ELSE.items() if record[key]]
    return (
        f"weights of {record['source']}: {record['num_tensors']} tensors ({', '.join(record['dtypes'])}) of "
        f"{abbreviate(record['files'])} as float32" + "".join(f"; {part}" for part in (*changed, *beside))
    )


WHAT_ELSE = {"surplus": "left out", "drawn": f"of the LM head drawn by seed (model.allow_missing: [{HEAD}])"}


def check_embeddings(model: PreTrainedModel, vocab_size: int) -> None:
    """Raises ModelError when there are more tokens than rows of the embedding."""
    embeddings: Any = model.get_input_embeddings()
    num_embeddings = embeddings.num_embeddings
    if vocab_size > num_embeddings:
        raise ModelError(
            f"the tokenizer has {vocab_size} tokens, but the model has embeddings for only {num_embeddings}"
        )


def _tokenizer_files(source: str) -> tuple[str, ...]:
    """Files of a folder that its tokenizer is made of; others, which tokenizer.json makes needless, are not read."""
    settings = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    if (Path(source) / "tokenizer.json").is_file():
        return settings
    return (*settings, "vocab.*", "merges.txt", "*.model", "*.tiktoken")


def _weight_files(source: str) -> tuple[str, ...]:
    """Files of a folder that its weights are read from: safetensors where there are some."""
    return ("*.safetensors", "*.index.json") if any(Path(source).glob("*.safetensors")) else ("*.bin", "*.index.json")


def _refuse_pointers(source: str, *patterns: str) -> None:
    """Raises ModelError where a folder's files are Git LFS pointers, which some readers take for a small vocabulary."""
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
