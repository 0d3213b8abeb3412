"""Settings of single domains, their lengths and sources, and what contradicts each other in them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from das_ds.config import RunConfig
from das_ds.config.io import parse_config
from das_ds.config.stage import Stage
from das_ds.errors import ConfigError
from das_ds.methods.baselines import PerDomain

A, B = ({"train": [f"{name}.txt"], "weight": weight} for name, weight in (("a", 0.7), ("b", 0.3)))


def run(*domains: dict[str, Any], **changes: Any) -> RunConfig:
    """Domains d0, d1, ... of batches of 8 sequences of 16 tokens."""
    named = [
        {"name": f"d{number}", **({} if "sources" in domain else {"train": ["a.txt"]}), **domain}
        for number, domain in enumerate(domains)
    ]
    train = {"steps_per_domain": 7, "global_batch_size": 8, "micro_batch_size": 1, **changes.pop("train", {})}
    return RunConfig.model_validate(
        {
            "output_dir": "runs/x",
            "model": {"name_or_path": "some"},
            "domains": named,
            "data": {"sequence_length": 16},
            "train": train,
            **changes,
        }
    )


def test_stages_have_the_lengths_of_their_domains() -> None:
    config = run({}, {"steps": 3}, {"tokens": 1024}, {"tokens": 1025}, {"tokens": 10**12})
    assert [stage.num_steps for stage in config.stages] == [7, 3, 8, 9, 7_812_500_000]


@pytest.mark.parametrize(
    ("epochs", "num_blocks", "replayed", "expected"),
    # 8 sequences per step, or 6 where 2 are replayed; 0.1 of 240 is 24, which in floating point is a little more.
    [(1, 80, 0, 10), (1, 81, 0, 11), (2.5, 80, 0, 25), (0.1, 240, 0, 3), (0.7, 80, 0, 7), (3, 12, 0.25, 6)],
)
def test_epochs_are_complete_steps_of_own_text(epochs: float, num_blocks: int, replayed: float, expected: int) -> None:
    config = run({"steps": 1}, {"epochs": epochs}, method={"name": "ncl", "replay": {"fraction": replayed}})
    resolved = config.with_steps({"d0": 5, "d1": num_blocks})
    assert [stage.num_steps for stage in resolved.stages] == [1, expected]
    assert resolved.domains[1].epochs is None and config.domains[1].epochs == epochs


def test_epochs_without_text_are_no_steps() -> None:
    config = run({}, {"epochs": 2})
    assert config.learned == [("d0",), ("d1",)]
    with pytest.raises(
        ConfigError, match=r"domains.1.epochs: found 2, which are steps only once the text is read; exp"
    ):
        config.stages  # noqa: B018


def test_pool_learns_each_domain_as_long_as_in_sequence() -> None:
    assert run({"steps": 2}, {"tokens": 256}, {}, method="pool").stages == [Stage(0, ("d0", "d1", "d2"), 11, (2, 2, 7))]
    assert run({}, {}, method="pool").stages == [Stage(0, ("d0", "d1"), 14)]


def test_train_settings_are_those_of_the_domain() -> None:
    own = {"learning_rate": 3e-4, "lr_scheduler": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.1, "min_lr_ratio": 0.2}
    config = run({}, own)
    assert config.train_settings("d0") == config.train
    changed = config.train_settings("d1")
    assert {key: getattr(changed, key) for key in own} == own
    assert changed.model_copy(update={key: getattr(config.train, key) for key in own}) == config.train


def test_num_replayed_is_that_of_the_domain() -> None:
    config = run({}, {"replay": {"fraction": 0.25}}, {"replay": {"fraction": 0}}, {}, method="replay")
    assert [config.num_replayed(f"d{number}") for number in range(4)] == [1, 2, 0, 1]
    assert [config.replayed(f"d{number}") for number in range(4)] == [[], ["d0"], [], ["d0", "d1", "d2"]]
    assert [config.own_samples_per_step(f"d{number}") for number in range(4)] == [8, 6, 8, 7]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((0.7, 0.3), (7, 3)), ((1, 1), (1, 1)), ((2, 6, 4), (1, 3, 2)), ((0.1, 1e-4), (1000, 1)), ((0.35, 0.65), (7, 13))],
)
def test_source_weights_are_the_smallest_integers(weights: tuple[float, ...], expected: tuple[int, ...]) -> None:
    config = run({"sources": [{"train": ["a.txt"], "weight": weight} for weight in weights]})
    assert config.domains[0].source_weights == expected


def test_training_sources_have_names_and_columns() -> None:
    named = {**B, "name": "pubmed", "text_column": "abstract"}
    sources = run({"sources": [A, named], "text_column": "body"}).domains[0].training_sources
    assert [(source.name, source.text_column) for source in sources] == [("source0", "body"), ("pubmed", "abstract")]
    (plain,) = run({}).domains[0].training_sources
    assert (plain.name, plain.text_column, plain.train) == (None, "text", ["a.txt"])


def test_overrides_reach_domains_and_sources() -> None:
    values = run({"sources": [A, B]}).model_dump(mode="json", by_alias=True)
    config = parse_config(
        values, ["domains.0.sources.1.weight=0.6", "domains.0.replay.fraction=0", "domains.0.steps=4"]
    )
    assert config.domains[0].source_weights == (7, 6) and config.stages[0].num_steps == 4
    with pytest.raises(
        ConfigError, match=r"domains.0.sources.0.wieght: unknown key; did you mean domains.0.sources.0.w"
    ):
        parse_config(values, ["domains.0.sources.0.wieght=1"])
    with pytest.raises(ConfigError, match=r"domains.0.sources.1.weight: found 0, allowed: number > 0"):
        parse_config(values, ["domains.0.sources.1.weight=0"])
    with pytest.raises(ConfigError, match=r"train.min_lr_ratio: found 1.5, allowed: number >= 0 and <= 1"):
        parse_config(values, ["train.min_lr_ratio=1.5"])


@pytest.mark.parametrize(
    ("domains", "changes", "message"),
    [
        ([{"steps": 3, "tokens": 99}], {}, "found steps and tokens, allowed: one of steps, epochs and tokens"),
        ([{"epochs": 3, "tokens": 99}], {}, "found epochs and tokens, allowed: one of steps, epochs and tokens"),
        ([{"steps": 0}], {}, "greater than or equal to 1"),
        ([{"steps": 2**32}], {}, "found 4294967296, allowed: at most 4294967295"),
        ([{"tokens": 10**15 + 1}], {}, "found 1000000000000001, allowed: at most 1000000000000000"),
        ([{"epochs": 0}], {}, "greater than 0"),
        (
            [{"lr_scheduler": "infinite"}],
            {},
            "found infinite, one schedule for all domains; allowed in a domain: linear",
        ),
        (
            [{}, {"lr_scheduler": "wsd"}],
            {"train": {"lr_scheduler": "infinite"}},
            "domains.1.lr_scheduler: found wsd with train.lr_scheduler infinite, one schedule .*; allowed there: null",
        ),
        (
            [{}, {"lr_scheduler": "wsd", "warmup_ratio": 0.9}],
            {},
            r"domains.1: warmup_ratio \+ decay_ratio: found 0.9 \+ 0.2 with lr_scheduler wsd, allowed: at most 1",
        ),
        (
            [{}, {"warmup_ratio": 0.9, "learning_rate": 1e-3}],
            {"method": "pool"},
            "domains.1.learning_rate: found 0.001 with method pool, where all domains share one schedule; allowed",
        ),
        (
            [{}, {"replay": {"fraction": 0.3}}],
            {},
            r"domains.1.replay.fraction: found 0.3, 2.4 of 8 sequences .* nearest allowed: 0.25 \(2 of them\)",
        ),
        ([{"replay": {"fraction": 0.25}}], {}, "domains.0.replay.fraction: found 0.25 where there is no earlier text"),
        (
            [{}, {"replay": {"fraction": 0.25}}],
            {"method": "one"},
            "domains.1.replay.fraction: found 0.25 with method one, where no domain comes after another",
        ),
        ([{"sources": [A], "train": ["a.txt"]}], {}, "found train and sources, allowed: one of the two"),
        ([{"sources": []}], {}, "needs train or valid text"),
        ([{"sources": [], "valid": ["v.txt"]}], {}, "a domain needs train text"),
        (
            [{"sources": [{**A, "name": "x"}, {**B, "name": "x"}]}],
            {},
            "names must differ, found more than once: x",
        ),
        ([{"sources": [A, {"train": [], "weight": 1}]}], {}, "at least 1 item"),
        ([{"sources": [A, {"train": ["b.txt"]}]}], {}, "Field required"),
        (
            [{"sources": [{**A, "weight": 1234567}, {**B, "weight": 98765}]}],
            {},
            "sources: found weights 1234567.0, 98765.0, allowed: proportions of integers with a sum of at most 100000, "
            "such as 0.926, 0.074",
        ),
        (
            [{}],
            {"evaluate_on": [{"name": "x", "train": ["a.txt"]}]},
            r"train: found \['a.txt'\] in a corpus that is only evaluated, allowed: valid",
        ),
        ([{}], {"evaluate_on": [{"name": "d0", "valid": ["a.txt"]}]}, "found more than once: d0"),
    ],
)
def test_domain_contradiction_is_error(domains: list[dict[str, Any]], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run(*domains, **changes)


def test_moments_are_not_kept_from_model_to_model() -> None:
    config = run({}, {}, method="one", train={"reset_optimizer": False})
    with pytest.raises(
        ConfigError, match=r"train.reset_optimizer: found false with method one, .* allowed there: true"
    ):
        PerDomain.validate(config, None)  # type: ignore[arg-type]


VALID = {"valid": ["valid.txt"]}
STREAM = {"streaming": True}


def test_streamed_domains_and_sources_have_steps_or_tokens() -> None:
    mixed = {"sources": [A | STREAM, B], **VALID}
    config = run(VALID | STREAM, mixed | {"tokens": 1024}, general={"name": "g", "train": ["g.txt"], **VALID, **STREAM})
    assert [stage.num_steps for stage in config.stages] == [7, 8]
    assert [[source.streaming for source in domain.training_sources] for domain in config.domains] == [
        [True],
        [True, False],
    ]
    assert all(domain.is_streamed for domain in config.domains) and not run({}).domains[0].is_streamed


@pytest.mark.parametrize(
    ("domain", "changes", "message"),
    [
        (STREAM, {}, r"streaming: found true without valid, expected held-out text in valid; a stream has no last"),
        ({"sources": [A, B | STREAM]}, {}, r"streaming: found true without valid, expected held-out text"),
        (
            {"sources": [A, B], **VALID, **STREAM},
            {},
            r"streaming: found true without train, expected text in train \(or streaming in `sources`\)",
        ),
        (VALID | STREAM | {"epochs": 2}, {}, r"epochs: found 2 with streaming, .* unknown; allowed: steps or tokens"),
        (
            {"sources": [A | STREAM, B], **VALID, "epochs": 0.5},
            {},
            r"epochs: found 0.5 with streaming, .* unknown; allowed: steps or tokens",
        ),
        (
            VALID | STREAM,
            {"data": {"shuffle_buffer": 7}},
            r"data.shuffle_buffer: found 7 with streaming, expected at least 8 blocks, one global batch",
        ),
        (
            {},
            {
                "data": {"shuffle_buffer": 7},
                "general": {"name": "g", "train": ["g.txt"], **VALID, **STREAM},
            },
            r"data.shuffle_buffer: found 7 with streaming, expected at least 8 blocks, one global batch",
        ),
        (
            {},
            {"evaluate_on": [{"name": "law", **VALID, **STREAM}]},
            r"streaming: found true without train, expected text in train",
        ),
    ],
)
def test_stream_settings_that_do_not_fit_raise(domain: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run(domain, **changes)
    # Without a stream its size does not matter.
    assert run({}, data={"shuffle_buffer": 1}).data.shuffle_buffer == 1
