"""The models of a run that benchmarks are scored on: the one it starts from, and those it has exported so far."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from das_ds.config import RunConfig
from das_ds.functional.token_ids import num_tokens
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.loading import check_files, load_model, load_tokenizer, open_tokenizer, weights_folder
from das_ds.models.run_models import RunModel, list_run_models, list_weight_files
from das_ds.run_dir import BENCHMARKS_FILE
from das_ds.storage import CHECKSUM_FILE, checksum


def list_models(config: RunConfig) -> list[RunModel]:
    """The models of a run that exist, in the order of training; see `list_run_models`."""
    return list_run_models(config, BENCHMARKS_FILE)


def load_run_model(
    config: RunConfig, model: RunModel
) -> tuple[PreTrainedModel, ArchitectureSpec, PreTrainedTokenizerBase]:
    """The network in float32, in evaluation mode, with its architecture spec and tokenizer.

    Raises:
        DasError: it cannot be loaded.
    """
    tokenizer = load_tokenizer(config) if model.is_base else open_tokenizer(str(model.source.name_or_path))
    network, spec = load_model(model.source, seed=config.seed, vocab_size=num_tokens(tokenizer.get_vocab()))
    network.eval()
    return network, spec, tokenizer


def identify_weights(config: RunConfig, model: RunModel) -> str:
    """Checksum of a model's weights: of its files, or of what random weights are made from.

    Raises:
        ModelError: files are missing, or not as exported.
    """
    check_files(model.source)
    folder = weights_folder(model.source)
    if folder is None:
        described = json.dumps([model.source.config, config.seed], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()
    paths = list_weight_files(Path(folder))
    recorded = _read_checksums(Path(folder) / CHECKSUM_FILE)
    digests = "".join(recorded.get(path.name) or checksum(path) for path in paths)
    return hashlib.sha256(digests.encode()).hexdigest()


def _read_checksums(path: Path) -> dict[str, str]:
    """File -> checksum as recorded at the export, and compared with the files by `check_files`."""
    if not path.exists():
        return {}
    lines = (line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: digest for digest, name in lines}
