"""The run that another one continues, found by the manifests of its checkpoints."""

import logging
from pathlib import Path
from typing import Any

import pytest

from das_ds.checkpoint.manifest import Manifest, Phase, RunState
from das_ds.config import RunConfig
from das_ds.config.io import dump_config, parse_config
from das_ds.errors import CheckpointError, ConfigError, RunFolderError
from das_ds.run_dir import model_run_dir
from das_ds.training.earlier_run import find_earlier_run
from helpers.configs import base_values

NAMES = ("acl", "pubmed", "law", "chemistry")


def first_run(folder: Path, num_domains: int = 2, **changes: Any) -> RunConfig:
    domains = [{"name": name, "train": [f"{name}.txt"]} for name in NAMES[:num_domains]]
    config = parse_config({**base_values(folder / "first"), "domains": domains, **changes}, [])
    config.output_dir.mkdir()
    dump_config(config, config.output_dir / "config.yaml")
    return config


def next_run(earlier: RunConfig, name: str, *overrides: str) -> RunConfig:
    """A run that learns one more domain."""
    values = {
        "output_dir": str(earlier.output_dir.parent / name),
        "continue_from": str(earlier.output_dir),
        "domains": [{"name": NAMES[len(earlier.domains)], "train": ["x.txt"]}],
    }
    config = parse_config(values, list(overrides))
    config.output_dir.mkdir(exist_ok=True)
    dump_config(config, config.output_dir / "config.yaml")
    return config


def save(config: RunConfig, number: int, domains_done: int, phase: Phase = "before", *, within: bool = False) -> str:
    """A checkpoint that has a manifest only."""
    name = f"{number:06d}_domain_{phase}_0"
    folder = config.output_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    matrix: list[list[float | None]] = [
        [10.0 * row + column for column in range(len(config.domains))] for row in range(domains_done + 1)
    ]
    run = RunState(domains_done=domains_done, phase=phase, within_phase=within, loss_matrix=matrix)
    manifest = Manifest(
        name=name,
        run=run,
        world_size=1,
        zero_stage=0,
        metadata={"data": {"acl": ["a"]}},
        metrics_bytes=0,
        wandb_run_id=None,
        saved_at="2026-01-01",
        versions={},
        files={},
    )
    manifest.write(folder)
    return name


def test_ends_of_domains_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    earlier = first_run(tmp_path)
    save(earlier, 0, 0)
    first_end = save(earlier, 1, 1)
    save(earlier, 2, 1, within=True)
    save(earlier, 3, 2, "evaluate")
    last = save(earlier, 4, 2, "finished")
    (tmp_path / "first" / "checkpoints" / "000005_damaged").mkdir()
    with caplog.at_level(logging.WARNING):
        found = find_earlier_run(next_run(earlier, "next"))
    assert "000005_damaged of the earlier run is damaged and is skipped" in caplog.text
    assert {number: end.manifest.name for number, end in found.ends.items()} == {1: first_end, 2: last}
    assert found.num_learned == 2
    assert found.losses(1) == {"acl": 10.0, "pubmed": 11.0}


def test_chain_reaches_back_to_the_first_run(tmp_path: Path) -> None:
    first = first_run(tmp_path, 3)
    save(first, 0, 1)
    save(first, 1, 2)
    save(first, 2, 3, "finished")
    values = {
        "output_dir": str(tmp_path / "second"),
        "continue_from": {"run": str(tmp_path / "first"), "after": "pubmed"},
    }
    second = parse_config({**values, "domains": [{"name": "law2", "train": ["x"]}]}, [])
    second.output_dir.mkdir()
    dump_config(second, second.output_dir / "config.yaml")
    own_start = save(second, 0, 2)
    save(second, 1, 3, "finished")
    third = next_run(second, "third")
    found = find_earlier_run(third)
    assert sorted(found.ends) == [1, 2, 3]
    # The nearest run counts, and nothing that the first one learned beyond its part.
    assert found.ends[1].folder == tmp_path / "first" / "checkpoints"
    assert found.ends[2].manifest.name == own_start and found.ends[2].folder == tmp_path / "second" / "checkpoints"
    assert found.ends[3].folder == tmp_path / "second" / "checkpoints"
    folders = [model_run_dir(third, row).root.name for row in range(5)]
    assert folders == ["first", "first", "first", "second", "third"]


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    earlier = first_run(tmp_path)
    save(earlier, 0, 1)
    with pytest.raises(CheckpointError) as caught:
        find_earlier_run(next_run(earlier, "next"))
    assert str(caught.value) == (
        f"continue_from: found no checkpoint from the end of pubmed in {tmp_path / 'first' / 'checkpoints'}, which has "
        "those after acl; finish that run, put the checkpoint back, or continue after a domain that has one "
        "(continue_from.after)"
    )


def test_changed_text_is_named(tmp_path: Path) -> None:
    earlier = first_run(tmp_path)
    save(earlier, 0, 2, "finished")
    found = find_earlier_run(next_run(earlier, "next"))
    found.check_text({"acl": ["a"], "law": ["l"]})
    with pytest.raises(RunFolderError, match=r"^continue_from: found other text or tokens of acl than "):
        found.check_text({"acl": ["b"], "law": ["l"]})


def test_settings_that_may_differ(tmp_path: Path) -> None:
    earlier = first_run(tmp_path, general={"name": "general", "valid": ["g.txt"]})
    save(earlier, 0, 2, "finished")
    free = ("train.learning_rate=3", "train.global_batch_size=4", "train.optimizer=lion", "train.steps_per_domain=9")
    other = ("deepspeed={zero_optimization: {stage: 3}}", "method.softmask.exponent=2", "general.valid=[moved.txt]")
    find_earlier_run(next_run(earlier, "next", *free, *other, "evaluate_on=[{name: new, valid: [n.txt]}]"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", "seed: found 1, expected 0, as in"),
        ("data.sequence_length=24", "data.sequence_length: found 24, expected 12"),
        ("model.config.model_type=bert", "model.config.model_type: found 'bert', expected 'roberta'"),
        ("train.precision=bf16", "train.precision: found 'bf16', expected 'fp32'"),
        ("method.importance.num_samples=3", "method.importance.num_samples: found 3, expected"),
        ("method=ncl", "method.name: found 'ncl', expected 'das'"),
        ("general={name: g, valid: [g.txt]}", "general.name: found 'g', expected nothing"),
        ("evaluation.max_sequences=3", "evaluation.max_sequences: found 3, expected None"),
        ("train.reset_optimizer=false", "train.reset_optimizer: found False, expected True"),
    ],
)
def test_setting_that_has_to_agree_is_named(tmp_path: Path, override: str, expected: str) -> None:
    earlier = first_run(tmp_path)
    save(earlier, 0, 2, "finished")
    with pytest.raises(ConfigError) as caught:
        find_earlier_run(next_run(earlier, "next", override))
    assert expected in str(caught.value)
    assert str(tmp_path / "first" / "config.yaml") in str(caught.value)


def test_optimizer_has_to_agree_where_moments_are_kept(tmp_path: Path) -> None:
    train = {**base_values(tmp_path)["train"], "reset_optimizer": False}
    earlier = first_run(tmp_path, train=train)
    save(earlier, 0, 2, "finished")
    with pytest.raises(ConfigError, match=r"^train.optimizer: found 'lion', expected 'adamw'"):
        find_earlier_run(next_run(earlier, "next", "train.optimizer=lion"))


def test_other_domains_are_named(tmp_path: Path) -> None:
    earlier = first_run(tmp_path)
    save(earlier, 0, 2, "finished")
    config = next_run(earlier, "next")
    swapped = config.model_copy(update={"domains": [config.domains[number] for number in (0, 2, 1)]})
    swapped = swapped.model_copy(update={"continue_from": config.continue_from.model_copy(update={"after": "law"})})
    with pytest.raises(ConfigError, match=r"^domains: found acl, law up to continue_from.after, expected those of the"):
        find_earlier_run(swapped)
