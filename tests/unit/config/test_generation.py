"""Sources of replayed text in the config: what each domain replays, and settings that would not be used."""

from __future__ import annotations

import re
from typing import Any

import pytest

from das_ds.config import RunConfig
from das_ds.config.io import parse_config
from das_ds.errors import ConfigError
from helpers.configs import base_values

GENERAL = {"name": "general", "train": ["general.txt"]}


def run(replay: dict[str, Any], num_domains: int = 2, **changes: Any) -> RunConfig:
    domains = [{"name": f"d{number}", "train": [f"{number}.txt"]} for number in range(num_domains)]
    method = {"name": changes.pop("method", "ncl"), "replay": replay}
    return parse_config({**base_values("run"), "domains": domains, "method": method, **changes}, [])


@pytest.mark.parametrize(
    ("source", "replayed", "generated"),
    [("earlier", [[], ["d0"]], False), ("generated", [[], []], True), ("both", [[], ["d0"]], True)],
)
def test_sources_of_each_domain(source: str, replayed: list[list[str]], generated: bool) -> None:
    config = run({"fraction": 0.25, "source": source})
    assert [config.replayed(name) for name in ("d0", "d1")] == replayed
    assert [config.replays_generated(name) for name in ("d0", "d1")] == [generated, generated]
    assert [config.own_samples_per_step(name) for name in ("d0", "d1")] == [6 if generated else 8, 6]
    assert not config.distills_replay


def test_generated_text_is_replayed_with_general_text() -> None:
    config = run({"fraction": 0.25, "source": "generated", "general": True}, general=GENERAL)
    assert config.replayed("d1") == ["general"] and config.replays_generated("d1")


def test_generated_text_in_the_only_domain_is_distilled() -> None:
    replay = {"fraction": 0.25, "source": "generated", "loss": "kl"}
    assert run(replay, num_domains=1).distills_replay
    assert not run({**replay, "source": "earlier"}, num_domains=1).distills_replay


def test_generated_text_only_where_a_domain_replays() -> None:
    domains = [{"name": "d0", "train": ["0.txt"], "replay": {"fraction": 0}}, {"name": "d1", "train": ["1.txt"]}]
    config = run({"fraction": 0.25, "source": "generated"}, domains=domains)
    assert [config.replays_generated(name) for name in ("d0", "d1")] == [False, True]
    own = [{"name": "d0", "train": ["0.txt"], "replay": {"fraction": 0.5}}]
    assert run({"source": "generated"}, domains=own).replays_generated("d0")


@pytest.mark.parametrize(
    ("replay", "changes", "message"),
    [
        (
            {"fraction": 0.25, "generation": {"num_sequences": 5}},
            {},
            "method.replay.generation: found settings with method.replay.source earlier, which generates nothing; "
            "expected method.replay.source generated or both",
        ),
        (
            {"source": "generated"},
            {},
            "method.replay.source: found generated with nothing to replay, expected method.replay.fraction",
        ),
        ({"source": "both"}, {"method": "pool"}, "method.replay.source: found both with nothing to replay"),
        (
            {"source": "generated", "fraction": 0.25},
            {"method": "one"},
            "method.replay.fraction: found 0.25 with method one",
        ),
        (
            {"source": "generated", "fraction": 0.25, "generation": {"prompt_tokens": 12}},
            {"general": GENERAL},
            "method.replay.generation.prompt_tokens: found 12, expected fewer than data.sequence_length, 12",
        ),
        (
            {"source": "generated", "fraction": 0.25, "generation": {"prompt_tokens": 4}},
            {},
            "method.replay.generation.prompt_tokens: found 4 without training text to take them from, expected "
            "general: {train: ...}",
        ),
        ({"source": "generated", "fraction": 0.25, "generation": {"temperature": 0}}, {}, "generation.temperature"),
        ({"source": "generated", "fraction": 0.25, "generation": {"top_p": 1.5}}, {}, "generation.top_p"),
    ],
)
def test_unused_or_impossible_generation_is_error(replay: dict[str, Any], changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(replay, **changes)
