"""Configs that continue an earlier run: what they take from it, and every mistake names its key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from das_ds.config import RunConfig, parse_method
from das_ds.config.io import dump_config, load_config, parse_config
from das_ds.errors import ConfigError


@pytest.fixture
def earlier(tmp_path: Path) -> RunConfig:
    """The recorded config of a run over two domains."""
    values = {
        "output_dir": str(tmp_path / "papers"),
        "model": {"config": {"model_type": "roberta"}},
        "domains": [
            {"name": "acl", "train": ["acl.txt"], "tokens": 6400},
            {"name": "pubmed", "train": ["pubmed.txt"], "replay": {"fraction": 0.25}},
        ],
        "data": {"sequence_length": 64, "add_tokens": {"acl": ["parse"], "pubmed": ["gene"]}},
        "train": {"steps_per_domain": 30, "global_batch_size": 4, "micro_batch_size": 1},
        "method": {"name": "das", "importance": {"num_samples": 7}},
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "tasks": [{"name": "t", "train": "a", "dev": "b", "test": "c"}],
        "seed": 5,
    }
    config = parse_config(values, [])
    config.output_dir.mkdir()
    dump_config(config, config.output_dir / "config.yaml")
    return config


def further(earlier: RunConfig, **changes: Any) -> dict[str, Any]:
    """What a user writes to continue it."""
    values = {
        "output_dir": str(earlier.output_dir.parent / "law"),
        "continue_from": str(earlier.output_dir),
        "domains": [{"name": "law", "train": ["law.txt"]}],
    }
    return {**values, **changes}


def test_left_out_keys_are_those_of_the_earlier_run(earlier: RunConfig) -> None:
    config = parse_config(further(earlier, train={"learning_rate": 1.0, "steps_per_domain": 50}, method="das"), [])
    assert config.continue_from is not None and config.continue_from.after == "pubmed"
    assert [domain.name for domain in config.domains] == ["acl", "pubmed", "law"]
    assert config.num_earlier == 2
    for name in ("model", "data", "method", "seed", "deepspeed", "general"):
        assert getattr(config, name) == getattr(earlier, name)
    assert config.train == earlier.train.model_copy(update={"learning_rate": 1.0, "steps_per_domain": 50})
    # 6400 tokens in batches of 4 x 64; 30 steps, of which the new config knows nothing.
    assert [stage.num_steps for stage in config.stages] == [25, 30, 50]
    assert [(stage.index, stage.name) for stage in config.own_stages] == [(2, "law")]
    assert config.tasks == []


def test_domains_may_be_listed_again(earlier: RunConfig) -> None:
    domains = [*earlier.model_dump(mode="json")["domains"], {"name": "law", "train": ["law.txt"]}]
    assert parse_config(further(earlier, domains=domains), []).domains[:2] == earlier.domains


def test_run_is_continued_after_another_of_its_domains(earlier: RunConfig) -> None:
    config = parse_config(further(earlier), ["continue_from.after=acl", "data.add_tokens.law=[tort]"])
    assert [domain.name for domain in config.domains] == ["acl", "law"]
    assert config.data.add_tokens == {"acl": ["parse"], "law": ["tort"]}


def test_section_of_another_method_is_not_completed(earlier: RunConfig) -> None:
    method = parse_config(further(earlier, method={"name": "ewc", "num_samples": 3}), []).method
    assert method == parse_method({"name": "ewc", "num_samples": 3})


def test_settings_of_earlier_domains_are_not_checked_again(earlier: RunConfig) -> None:
    # A fourth of 2 sequences is none.
    config = parse_config(further(earlier, train={"global_batch_size": 2}), [])
    assert config.domains[1].replay.fraction == 0.25


def test_recorded_config_is_complete(earlier: RunConfig, tmp_path: Path) -> None:
    config = parse_config(further(earlier), [])
    path = tmp_path / "law" / "config.yaml"
    path.parent.mkdir()
    dump_config(config, path)
    assert load_config(path) == config
    (earlier.output_dir / "config.yaml").unlink()
    assert load_config(path) == config
    # The command that started the run still resumes it.
    assert parse_config(further(earlier), []) == config


def test_damaged_config_of_the_earlier_run_is_one_line_until_the_run_has_its_own(
    earlier: RunConfig, tmp_path: Path
) -> None:
    config = parse_config(further(earlier), [])
    recorded = earlier.output_dir / "config.yaml"
    recorded.write_text(recorded.read_text()[:200])
    with pytest.raises(ConfigError, match=r"^continue_from.run: .*papers/config.yaml: "):
        parse_config(further(earlier), [])
    path = tmp_path / "law" / "config.yaml"
    path.parent.mkdir()
    dump_config(config, path)
    # It was taken over when the run started.
    assert load_config(path) == config
    assert parse_config(further(earlier), []) == config


@pytest.mark.parametrize(
    ("changes", "after", "expected"),
    [
        ({"domains": None}, None, "domains: found None, allowed: list of mappings, at least 1"),
        ({"domains": []}, None, "domains: found [], allowed: list of mappings, at least 1"),
        ({"domains": ["acl"]}, None, "domains.0: found 'acl', allowed: mapping"),
        ({"domains": [{"name": "acl", "train": ["x"], "tokens": "many"}]}, None, "domains.0.tokens: found 'many'"),
        ({"train": None}, None, "train: found None, allowed: mapping"),
        ({"data": None}, "acl", "data: found None, allowed: mapping"),
        ({"data": {"add_tokens": [1]}}, "acl", "data.add_tokens: found [1], allowed: mapping"),
    ],
)
def test_unusable_value_in_the_earlier_config_is_named(
    earlier: RunConfig, changes: dict[str, Any], after: str | None, expected: str
) -> None:
    recorded = earlier.output_dir / "config.yaml"
    recorded.write_text(yaml.safe_dump({**yaml.safe_load(recorded.read_text()), **changes}))
    section = {"run": str(earlier.output_dir), "after": after}
    with pytest.raises(ConfigError) as caught:
        parse_config(further(earlier, continue_from=section), [])
    assert str(caught.value).startswith(f"continue_from.run: {recorded}: {expected}")


def test_path_is_expanded(earlier: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", str(earlier.output_dir.parent))
    config = parse_config(further(earlier, continue_from="$RUNS/papers"), [])
    assert config.continue_from is not None and config.continue_from.run == earlier.output_dir


def test_replay_needs_text(earlier: RunConfig) -> None:
    section = {"run": str(earlier.output_dir), "evaluate": False}
    config = parse_config(further(earlier, continue_from=section), [])
    assert [domain.name for domain in config.readable_domains] == ["law"]
    with pytest.raises(ConfigError, match=r"^continue_from.evaluate: found false where law replays earlier text"):
        parse_config(further(earlier, continue_from=section), ["method.replay.fraction=0.25"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("continue_from=nowhere", "continue_from.run: nowhere: found no such folder, expected the folder of the run"),
        ("continue_from=$NOT_SET_HERE/x", "continue_from.run: found '$NOT_SET_HERE/x', but the variable"),
        ("continue_from=.", "found no config.yaml in it, expected the folder of the run to continue"),
        ("continue_from.after=law", "domains: found none after law, expected the domains to continue continue_from"),
        ("continue_from.after=chemistry", "continue_from.after: found chemistry, allowed: a domain of"),
        ("continue_from={after: acl}", "continue_from.run: not given, expected: text"),
        ("continue_from.form=x", "continue_from.form: unknown key; allowed in continue_from: run, after, evaluate"),
        ("output_dir=papers/../papers", "output_dir: found papers/../papers, the run that is continued, which is only"),
        ("domains.0.name=acl", "corpus names must differ, found more than once: acl"),
        ("method=pool", "continue_from: found a run with method pool, which learns all domains at once"),
    ],
)
def test_mistake_names_key(
    earlier: RunConfig, override: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    if override == "domains.0.name=acl":
        overrides = ["domains.1={name: acl, train: [x]}"]
    elif override == "continue_from.after=law":
        overrides = ["continue_from.after=pubmed", "domains=[{name: acl, train: [a]}, {name: pubmed, train: [a]}]"]
        expected = expected.replace("law", "pubmed")
    else:
        overrides = [override]
    with pytest.raises(ConfigError) as caught:
        parse_config(further(earlier), overrides)
    assert expected in str(caught.value)


def test_config_that_was_not_completed_is_refused(earlier: RunConfig) -> None:
    values = {**earlier.model_dump(mode="json"), "continue_from": str(earlier.output_dir)}
    with pytest.raises(ValueError, match="expected a domain of the earlier run"):
        RunConfig(**values)
