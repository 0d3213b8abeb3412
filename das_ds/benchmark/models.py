"""The models of a run that benchmarks are scored on: the one it starts from, and those it has exported so far."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from das_ds.config import ModelConfig, RunConfig
from das_ds.functional.token_ids import num_tokens
from das_ds.models.architectures.spec import ArchitectureSpec
from das_ds.models.loading import check_files, load_model, load_tokenizer, open_tokenizer, weights_folder
from das_ds.run_dir import BASE_FOLDER, BENCHMARKS_FILE, RunDir
from das_ds.storage import CHECKSUM_FILE, checksum

WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class RunModel:
    """A model of a run."""

    stage: str
    """The stage after which it was exported: a domain, or `pool`; `base` for the model that the run starts from."""
    source: ModelConfig
    is_base: bool
    """Whether the run starts from it."""
    scores_path: Path
    """File of its scores."""


def list_models(config: RunConfig) -> list[RunModel]:
    """The models of a run that exist, in the order of training.

    The model before training is left out where it is in no files: after a warm-up of its head, or with the adapter of
    an earlier run.
    """
    run_dir = RunDir(config.output_dir)
    lora = config.model.lora
    models = []
    if not config.model.head_warmup_steps and (lora is None or lora.init_from is None):
        path = run_dir.root / BASE_FOLDER / BENCHMARKS_FILE
        models.append(RunModel(BASE_FOLDER, config.model, True, path))
    for index, name in enumerate(config.stage_names):
        folder = run_dir.model(index, name)
        if folder.is_dir():
            source = ModelConfig(
                name_or_path=str(folder), attention=config.model.attention, architecture=config.model.architecture
            )
            path = run_dir.domain(index, name) / BENCHMARKS_FILE
            models.append(RunModel(name, source, False, path))
    return models


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
    paths = next((paths for pattern in WEIGHT_FILES if (paths := sorted(Path(folder).glob(pattern)))), [])
    recorded = _read_checksums(Path(folder) / CHECKSUM_FILE)
    digests = "".join(recorded.get(path.name) or checksum(path) for path in paths)
    return hashlib.sha256(digests.encode()).hexdigest()


def _read_checksums(path: Path) -> dict[str, str]:
    """File -> checksum as recorded at the export, and compared with the files by `check_files`."""
    if not path.exists():
        return {}
    lines = (line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {name: digest for digest, name in lines}
