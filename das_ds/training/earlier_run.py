"""The run that another one continues: its settings, results and checkpoints, which are only read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from das_ds.checkpoint.manifest import Manifest, RunState, read_manifest
from das_ds.checkpoint.store import CheckpointStore, validate_checkpoint
from das_ds.config import RunConfig
from das_ds.config.continuation import CONTINUE
from das_ds.config.io import config_values, load_config
from das_ds.distributed.process_group import ProcessGroup
from das_ds.errors import CheckpointError, ConfigError, RunFolderError
from das_ds.run_dir import RunDir, earlier_run_dirs
from das_ds.training.data_module import loss_columns

logger = logging.getLogger(__name__)

SHARED_KEYS = (
    "model",
    "data",
    "general",
    "evaluation.max_sequences",
    "seed",
    "train.precision",
    "train.reset_optimizer",
    "method.name",
)
"""Keys, or sections, that have to be those of the earlier run: they decide what its state and its losses mean."""
FREE_KEYS = (
    "model.gradient_checkpointing",
    "model.attention",
    "model.head_warmup_steps",
    "model.head_warmup_learning_rate",
    "data.add_tokens",
    "data.num_workers",
    "data.cache_dir",
)
"""Those of them that may differ. Text and added tokens of earlier domains are compared with what was trained on."""
TEXT_KEYS = ("train", "valid")
"""Keys of `general` that may differ in the same way: files may have moved."""
MOMENT_KEYS = ("train.optimizer",)
"""Keys that have to agree where moments outlive a domain."""


@dataclass(frozen=True)
class DomainEnd:
    """A checkpoint from right after a domain was learned."""

    folder: Path
    """Of all checkpoints of its run."""
    manifest: Manifest


@dataclass(frozen=True)
class EarlierRun:
    """What a run continues."""

    folder: Path
    """Of the earlier run."""
    after: str
    """Domain after which it is continued."""
    columns: tuple[str, ...]
    """Corpora of its loss matrix."""
    ends: Mapping[int, DomainEnd]
    """Domains learned -> the checkpoint from then; that after the last one is there, others may have been removed."""

    @property
    def num_learned(self) -> int:
        """Domains that it learned, of those that are continued."""
        return max(self.ends)

    @property
    def state(self) -> RunState:
        """Its progress when it had learned them."""
        return self.ends[self.num_learned].manifest.run

    def losses(self, num_learned: int) -> dict[str, float | None]:
        """Corpus -> its loss after so many domains, 0 before the first; None: it was not measured."""
        return dict(zip(self.columns, self.state.loss_matrix[num_learned], strict=True))

    def check_text(self, fingerprints: Mapping[str, list[str]]) -> None:
        """Check that text of earlier domains is that of the earlier run.

        Args:
            fingerprints: corpus -> those of its splits, see `DataModule`.

        Raises:
            RunFolderError: a corpus, or the tokens it is read with, changed since.
        """
        saved = self.ends[self.num_learned].manifest.metadata["data"]
        changed = [name for name, found in fingerprints.items() if name in saved and saved[name] != found]
        if changed:
            raise RunFolderError(
                f"{CONTINUE}: found other text or tokens of {', '.join(changed)} than {self.folder} was trained and "
                "evaluated on, expected the same; put its files and data.add_tokens back as they were"
            )


def find_earlier_run(config: RunConfig) -> EarlierRun:
    """The run that a config continues, after a check of its settings and of what it has kept; nothing is locked.

    Raises:
        ConfigError: settings that have to agree do not.
        RunFolderError: there is no such run.
        CheckpointError: the checkpoint from the end of its last domain is missing.
    """
    assert config.continue_from is not None, "the config continues a run"
    folder = config.continue_from.run
    earlier = _load_config(folder)
    _check_settings(config, earlier)
    after = str(config.continue_from.after)
    ends: dict[int, DomainEnd] = {}
    for run_dir, limit in earlier_run_dirs(config):
        for end in _domain_ends(run_dir):
            # Of a run that was itself continued, the nearest one counts.
            if end.manifest.run.domains_done <= limit:
                ends.setdefault(end.manifest.run.domains_done, end)
    if config.num_earlier not in ends:
        raise CheckpointError(
            f"{CONTINUE}: found no checkpoint from the end of {after} in {RunDir(folder).checkpoints_dir}, which has "
            f"{_describe(ends, config)}; finish that run, put the checkpoint back, or continue after a domain that has "
            f"one ({CONTINUE}.after)"
        )
    columns = tuple(loss_columns(earlier))
    return EarlierRun(folder, after, columns, ends)


def open_earlier_run(config: RunConfig, ranks: ProcessGroup) -> EarlierRun:
    """The same on all ranks, with checkpoints whose files are intact; a collective.

    Raises:
        DasError: see `find_earlier_run`; CheckpointError also where the last checkpoint is corrupt.
    """
    found = ranks.all_gather_object(ranks.run_on_main(lambda: find_earlier_run(config)))[0]
    assert found is not None, "rank 0 has it, or all ranks have raised"
    ends = {}
    for num_learned, end in found.ends.items():
        store = CheckpointStore(end.folder, keep=1)
        _, problems = validate_checkpoint(store, end.manifest.name, ranks)
        if not problems:
            ends[num_learned] = end
        elif num_learned == found.num_learned:
            raise CheckpointError(
                f"{CONTINUE}: {end.folder / end.manifest.name} is corrupt: {'; '.join(problems)}; restore an intact "
                f"copy, or continue after another domain ({CONTINUE}.after)"
            )
        elif ranks.info.is_main:
            logger.warning(
                "checkpoint %s is corrupt, so new corpora are not evaluated on its model: %s",
                end.folder / end.manifest.name,
                "; ".join(problems),
            )
    return EarlierRun(found.folder, found.after, found.columns, ends)


def _load_config(folder: Path) -> RunConfig:
    path = RunDir(folder).config_file
    if not path.exists():
        found = "no such folder" if not folder.is_dir() else f"no {path.name} in it"
        raise RunFolderError(f"{CONTINUE}.run: {folder}: found {found}, expected the folder of the run to continue")
    return load_config(path)


def _check_settings(config: RunConfig, earlier: RunConfig) -> None:
    names = [domain.name for domain in config.domains[: config.num_earlier]]
    before = [domain.name for domain in earlier.domains[: config.num_earlier]]
    if names != before:
        raise ConfigError(
            f"domains: found {', '.join(names)} up to {CONTINUE}.after, expected those of the earlier run, "
            f"{', '.join(before)}"
        )
    shared = (*SHARED_KEYS, *(f"method.{key}" for key in config.method.state_keys))
    if not config.train.reset_optimizer:
        shared = (*shared, *MOMENT_KEYS)
    found = config_values(config)
    expected = config_values(earlier)
    different = [
        f"{key}: found {found.get(key, 'nothing')}, expected {expected.get(key, 'nothing')}"
        for key in dict.fromkeys([*expected, *found])
        if _is_below(key, shared) and not _is_free(key) and found.get(key) != expected.get(key)
    ]
    if different:
        raise ConfigError(
            f"{'; '.join(different)}, as in {RunDir(earlier.output_dir).config_file}; a run continues another one with "
            "the same model, data, measurements and seed"
        )


def _is_below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _is_free(key: str) -> bool:
    is_text = _is_below(key, ("general",)) and key.rpartition(".")[2] in TEXT_KEYS
    return is_text or _is_below(key, FREE_KEYS)


def _domain_ends(run_dir: RunDir) -> list[DomainEnd]:
    """Checkpoints of a run from the ends of domains, the newest first; damaged ones are left out."""
    checkpoints = run_dir.checkpoints_dir
    ends = []
    for name in reversed(CheckpointStore(checkpoints, keep=1).names()):
        try:
            manifest = read_manifest(checkpoints / name)
        except CheckpointError as error:
            logger.warning("checkpoint %s of the earlier run is damaged and is skipped: %s", name, error)
            continue
        if manifest.run.ends_domain:
            ends.append(DomainEnd(checkpoints, manifest))
    return ends


def _describe(ends: Mapping[int, DomainEnd], config: RunConfig) -> str:
    names = [config.domains[number - 1].name for number in sorted(ends)]
    return f"those after {', '.join(names)}" if names else "none of any domain"
