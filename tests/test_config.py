"""The run config checks itself: what one field cannot say about another."""

from typing import Any

import pytest
from pydantic import ValidationError

from das_ds.config import CorpusConfig, DomainConfig, ModelConfig, RunConfig, TrainConfig

SMALL: dict[str, Any] = {
    "output_dir": "runs/papers",
    "model": {"name_or_path": "roberta-base"},
    "domains": [{"name": "acl", "train": ["acl.txt"]}],
}


def test_three_keys_are_enough() -> None:
    config = RunConfig.model_validate(SMALL)
    assert config.train.learning_rate == 1e-4
    assert config.method.softmask.apply_to == "update"
    assert config.deepspeed == "ds_configs/zero2.json"


def test_values_cannot_change() -> None:
    config = RunConfig.model_validate(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.learning_rate = 1.0


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
            {"schedule": "wsd", "warmup_ratio": 0.4, "decay_ratio": 0.7},
            r"warmup_ratio \+ decay_ratio: found 0.4 \+ 0.7 with schedule wsd, allowed: at most 1 together",
        ),
        (RunConfig, {**SMALL, "domains": SMALL["domains"] * 2}, "found more than once: acl"),
        (RunConfig, {**SMALL, "general": {"name": "acl", "valid": ["a.txt"]}}, "found more than once: acl"),
        (RunConfig, {**SMALL, "domains": []}, "at least 1 item"),
        (RunConfig, {**SMALL, "epochs": 3}, "Extra inputs"),
    ],
)
def test_contradiction_is_refused(section: type[Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section.model_validate(values)


def test_every_key_says_what_it_means() -> None:
    schema = RunConfig.model_json_schema()
    for definition in [schema, *schema["$defs"].values()]:
        assert definition["description"]
        for name, node in definition["properties"].items():
            assert "$ref" in node or node.get("description"), f"{definition['title']}.{name} has no docstring"
