"""Checks of the run config between its fields."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from das_ds.config import (
    CorpusConfig,
    DomainConfig,
    EvaluationConfig,
    FaultsConfig,
    ImportanceConfig,
    ModelConfig,
    RunConfig,
    SoftmaskConfig,
    TrainConfig,
)
from das_ds.config.method import method_configs
from das_ds.config.stage import Stage
from das_ds.methods import DEFAULT_METHOD

SMALL: dict[str, Any] = {
    "output_dir": "runs/papers",
    "model": {"name_or_path": "roberta-base"},
    "domains": [{"name": "acl", "train": ["acl.txt"]}],
}


def test_run_config_needs_three_keys() -> None:
    config = RunConfig.model_validate(SMALL)
    assert config.train.learning_rate == 1e-4
    assert config.method.name == DEFAULT_METHOD
    assert config.deepspeed == "zero2"


def test_run_config_is_frozen() -> None:
    config = RunConfig.model_validate(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.learning_rate = 1.0


def test_one_text_is_a_list_of_one() -> None:
    values = {
        **SMALL,
        "domains": [{"name": "acl", "train": "acl.txt", "valid": "valid.txt"}],
        "tracking": "tensorboard",
        "runtime": {"stop_signals": "SIGTERM"},
        "method": {"name": "das", "softmask": {"groups": "head"}},
    }
    config = RunConfig.model_validate(values)
    assert (config.domains[0].train, config.domains[0].valid) == (["acl.txt"], ["valid.txt"])
    assert (config.tracking, config.runtime.stop_signals) == (["tensorboard"], ["SIGTERM"])
    assert config.model_dump(mode="json", by_alias=True)["method"]["softmask"]["groups"] == ["head"]
    assert RunConfig.model_validate(config.model_dump(mode="json", by_alias=True)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": "acl.txt"}, "list"),
        ({"domains": [{"name": "acl", "train": 5}]}, "list"),
        ({"domains": [{"name": "acl", "train": {"a": "b"}}]}, "list"),
        ({"tracking": "csv"}, "tensorboard"),
        ({"method": {"name": "directions", "half_saturation": "one"}}, "number"),
    ],
)
def test_one_value_of_another_type_is_no_list(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate({**SMALL, **changes})


def test_text_with_a_meaning_of_its_own_stays_text() -> None:
    values = {**SMALL, "data": {"add_tokens": {"acl": "tokens.txt"}}, "deepspeed": "zero.json"}
    config = RunConfig.model_validate(values)
    assert config.data.add_tokens == {"acl": "tokens.txt"} and config.deepspeed == "zero.json"


def replaying(share: float | None, size: int = 256, name: str = "ncl", **changes: Any) -> dict[str, Any]:
    method = {"name": name, "replay": {"fraction": share}}
    return {**SMALL, "train": {"global_batch_size": size, "micro_batch_size": 1}, "method": method, **changes}


@pytest.mark.parametrize(
    ("name", "share", "size", "expected"),
    [
        ("replay", None, 256, 16),
        ("replay", None, 8, 1),
        ("replay", None, 40, 2),
        ("das", None, 256, 0),
        ("das", 0.0625, 256, 16),
        ("replay", 0.25, 8, 2),
        ("replay", 0.0, 8, 0),
        ("ncl", 0.333333, 12, 4),
    ],
)
def test_num_replayed_is_integer(name: str, share: float | None, size: int, expected: int) -> None:
    assert RunConfig.model_validate(replaying(share, size, name)).num_replayed("acl") == expected


def test_replayed_lists_earlier_domains_and_general() -> None:
    domains = [{"name": name, "train": ["a.txt"]} for name in ("acl", "pubmed", "phone")]
    general = {"name": "general", "train": ["b.txt"]}
    values = replaying(0.5, domains=domains, general=general)
    config = RunConfig.model_validate(values)
    assert [config.replayed(name) for name in ("acl", "phone")] == [[], ["acl", "pubmed"]]
    with_general = RunConfig.model_validate({**values, "method": {"replay": {"fraction": 0.5, "general": True}}})
    assert [with_general.replayed(name) for name in ("acl", "pubmed")] == [["general"], ["acl", "general"]]
    assert RunConfig.model_validate({**values, "method": {}}).replayed("phone") == []


def test_stages_are_domains_or_their_pool() -> None:
    domains = [{"name": name, "train": ["a.txt"]} for name in ("acl", "pubmed", "phone")]
    values = {**SMALL, "domains": domains, "train": {"steps_per_domain": 7}}
    stages = RunConfig.model_validate(values).stages
    assert stages == [Stage(0, ("acl",), 7), Stage(1, ("pubmed",), 7), Stage(2, ("phone",), 7)]
    assert [(stage.name, stage.last_domain, stage.only_domain) for stage in stages][1] == ("pubmed",) * 3
    (pool,) = RunConfig.model_validate({**values, "method": {"name": "pool"}}).stages
    assert pool == Stage(0, ("acl", "pubmed", "phone"), 21)
    assert (pool.name, pool.last_domain) == ("pool", "phone")
    with pytest.raises(AssertionError, match="pool is 3 domains, expected one"):
        pool.only_domain  # noqa: B018
    (alone,) = RunConfig.model_validate({**values, "domains": domains[:1], "method": {"name": "pool"}}).stages
    assert alone == stages[0]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ModelConfig, {}, "exactly one of name_or_path"),
        (ModelConfig, {"name_or_path": "a", "config": {"model_type": "roberta"}}, "exactly one of name_or_path"),
        (ModelConfig, {"config": {"hidden_size": 8}}, "config needs model_type"),
        (CorpusConfig, {"name": "acl"}, "needs train or valid text"),
        (DomainConfig, {"name": "acl", "valid": ["a.txt"]}, "a domain needs train text"),
        (CorpusConfig, {"name": "a/b", "valid": ["a.txt"]}, "match pattern"),
        (TrainConfig, {"betas": [0.9, 1.0]}, r"betas must lie in \[0, 1\), found \[0.9, 1.0\]"),
        (TrainConfig, {"learning_rate": float("nan")}, "finite"),
        (
            TrainConfig,
            {"lr_scheduler": "wsd", "warmup_ratio": 0.4, "decay_ratio": 0.7},
            r"warmup_ratio \+ decay_ratio: found 0.4 \+ 0.7 with lr_scheduler wsd, allowed: at most 1 together",
        ),
        (EvaluationConfig, {"keep_best": True}, "keep_best: needs evaluations within domains, expected every_steps"),
        (EvaluationConfig, {"continue_from": "best"}, "continue_from: needs evaluations within domains"),
        (EvaluationConfig, {"early_stopping": {}}, "early_stopping: needs evaluations within domains"),
        (FaultsConfig, {"max_forgetting": {"action": "stop"}}, "found no limit, expected general, earlier or both"),
        (
            RunConfig,
            {**SMALL, "faults": {"max_forgetting": {"earlier": 0.2}}},
            "faults.max_forgetting: needs evaluations within domains, expected evaluation.every_steps",
        ),
        (
            RunConfig,
            {**SMALL, "evaluation": {"every_steps": 5}, "faults": {"max_forgetting": {"general": 0.1}}},
            "faults.max_forgetting.general: found 0.1 without a corpus, expected general",
        ),
        (
            RunConfig,
            {
                **SMALL,
                "evaluation": {"every_steps": 5},
                "faults": {"max_forgetting": {"earlier": 0.2}},
                "method": {"name": "one"},
            },
            "faults.max_forgetting.earlier: found 0.2 with method one, where no domain comes after another; allowed "
            "there: null",
        ),
        (RunConfig, {**SMALL, "domains": SMALL["domains"] * 2}, "found more than once: acl"),
        (RunConfig, {**SMALL, "general": {"name": "acl", "valid": ["a.txt"]}}, "found more than once: acl"),
        (
            RunConfig,
            replaying(0.05),
            r"method.replay.fraction: found 0.05, 12.8 of 256 sequences \(train.global_batch_size\); "
            r"nearest allowed: 0.046875 \(12 of them\) or 0.0507812 \(13 of them\)",
        ),
        (RunConfig, replaying(0.001, 8), r"nearest allowed: 0 \(0 of them\) or 0.125 \(1 of them\)"),
        (RunConfig, replaying(0.9, 8), r"nearest allowed: 0.875 \(7 of them\) \["),
        (RunConfig, replaying(0.9999999, 8), r"nearest allowed: 0.875 \(7 of them\) \["),
        (RunConfig, replaying(None, 1, "replay"), "found replay with train.global_batch_size 1, expected at least 2"),
        (RunConfig, replaying(0.25, 8, "one"), "method.replay.fraction: found 0.25 with method one"),
        (RunConfig, replaying(0.25, 8, "pool"), "found 0.25 with method pool, where no domain comes after another"),
        (
            RunConfig,
            {**SMALL, "method": {"name": "replay", "replay": {"general": True}}},
            "method.replay.general: found true without training text",
        ),
        (
            RunConfig,
            {**SMALL, "method": {"replay": {"general": True}}, "general": {"name": "general", "train": ["b.txt"]}},
            "method.replay.general: found true with nothing to replay, expected method.replay.fraction",
        ),
        (
            RunConfig,
            {**SMALL, "method": {"replay": {"loss": "kl"}}},
            "method.replay.loss: found kl with nothing to replay, expected method.replay.fraction",
        ),
        (
            RunConfig,
            {**SMALL, "method": {"name": "kd", "replay": {"loss": "kl", "fraction": 0.5}}},
            "method.replay.loss: found kl with method kd, which asks the same teacher about all text; allowed there: ",
        ),
        (RunConfig, {**SMALL, "method": {"name": "eaft", "top_k": 1}}, "greater than or equal to 2"),
        (
            RunConfig,
            {
                **SMALL,
                "method": {"importance": {"granularity": "parameter"}, "softmask": {"include_consumers": True}},
            },
            "softmask.include_consumers needs importance.granularity: unit, found true with parameter",
        ),
        (
            RunConfig,
            {**SMALL, "method": {"importance": {"granularity": "direction"}}},
            r"importance.granularity: found 'direction', allowed: unit \| parameter; .* method: directions",
        ),
        (SoftmaskConfig, {"groups": ["heads"]}, "should be 'head', 'intermediate', 'output' or 'unowned'"),
        (
            ImportanceConfig,
            {"score": "grad_x_weight"},
            "score: found grad_x_weight with granularity unit, .* allowed there: abs_grad, squared_grad",
        ),
        (RunConfig, {**SMALL, "method": {"name": "derpp", "max_positions": 7}}, "multiple of 2"),
        (RunConfig, {**SMALL, "domains": []}, "at least 1 item"),
        (RunConfig, {**SMALL, "epochs": 3}, "Extra inputs"),
    ],
)
def test_section_contradiction_is_error(section: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section.model_validate(values)


@pytest.mark.parametrize("section", [RunConfig, *method_configs().values()])
def test_section_every_key_has_docstring(section: type[BaseModel]) -> None:
    schema = section.model_json_schema()
    for definition in [schema, *schema["$defs"].values()]:
        assert definition["description"]
        for name, node in definition["properties"].items():
            is_described = "$ref" in node or node.get("description") or name == "name"
            assert is_described, f"{definition['title']}.{name} has no docstring"
