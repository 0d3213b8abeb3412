"""Sample numbers of ranks, batches that replay generated text, and what it costs in estimates."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.config import RunConfig
from das_ds.data.generated import read_generated, write_generated
from das_ds.data.objectives import CausalLMCollator
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import ConfigError, RunFolderError
from das_ds.models.flops import StepFlops
from das_ds.models.loading import WEIGHTS_RECORD
from das_ds.models.size import ModelSize, Sharding
from das_ds.preflight.generation import MEMORY_BANDWIDTH, generation_memory, generation_seconds
from das_ds.run_dir import RunDir
from das_ds.training.data_module import prepare_data
from das_ds.training.generated_text import GeneratedText, SampleNumbers
from das_ds.training.model_card import model_card
from helpers.configs import make_config
from helpers.runs import small_run
from helpers.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize(("num_samples", "batch_size", "world_size"), [(10, 2, 2), (1, 4, 3), (12, 4, 1), (7, 2, 4)])
def test_sample_numbers_of_all_ranks_are_all_samples_in_order(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    ranks = [SampleNumbers(num_samples, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({(len(batches), batches.num_rows) for batches in ranks}) == 1
    assert ranks[0].num_rows <= batch_size
    numbers = [n for index in range(len(ranks[0])) for batches in ranks for n in batches[index]]
    assert numbers[:num_samples] == list(range(num_samples))
    assert len(numbers) < num_samples + world_size * ranks[0].num_rows * len(ranks[0])
    with pytest.raises(IndexError):
        ranks[0][len(ranks[0])]


@pytest.mark.parametrize(("source", "num_generated"), [("generated", 4), ("both", 2)])
def test_training_steps_replay_generated_text(source: str, num_generated: int, tmp_path: Path) -> None:
    replay = {"fraction": 0.5, "source": source}
    values = small_run(tmp_path, method={"name": "replay", "replay": replay})
    text = prepare_data(RunConfig(**values), RankInfo(0, 0, 1, torch.device("cpu")), "mlm")
    # Rows that no corpus has.
    tokens = torch.full((3, 16), 7) + torch.arange(3)[:, None]
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    write_generated(tmp_path / "generated", tokens, starts, tiny_tokenizer(), {})
    blocks, _ = read_generated(tmp_path / "generated", document_mask=False)
    stage = text.config.stages[1]
    seen = set()
    for step in text.training_steps(stage, generated=(blocks, text.objectives["food"])):
        rows = [tuple(row) for batch in step for row in batch.input_ids.tolist()]
        generated = [row for row in rows if row in set(map(tuple, tokens.tolist()))]
        assert len(generated) == num_generated
        seen |= set(generated)
        assert sum(0 if batch.replayed_rows is None else len(batch.replayed_rows) for batch in step) == 4
    assert len(seen) == 3
    assert "text that the model before it generated" in model_card(text.config, 2, "mlm")


def component(folder: Path, *, is_main: bool = True, record: dict[str, Any] | None = None) -> GeneratedText:
    """Of a run whose ranks, model and text are stand-ins."""
    values = small_run(folder, method={"name": "replay", "replay": {"fraction": 0.5, "source": "generated"}})
    network = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(**{WEIGHTS_RECORD: record})))
    services: Any = SimpleNamespace(
        run_dir=RunDir(folder),
        process_group=SimpleNamespace(main_process_first=lambda do: do()),
        watchdog=SimpleNamespace(suspend_timeout=lambda _: nullcontext()),
    )
    data: Any = SimpleNamespace(
        base_tokenizer=tiny_tokenizer(),
        objectives={"food": CausalLMCollator()},
        info=SimpleNamespace(is_main=is_main),
    )
    context: Any = SimpleNamespace(objective="clm", network=network)
    return GeneratedText(RunConfig(**values), context, data, services)


def write_rows(folder: Path, token: int) -> str:
    tokens = torch.full((2, 16), token)
    write_generated(folder, tokens, torch.ones_like(tokens, dtype=torch.bool), tiny_tokenizer(), {})
    return read_generated(folder, document_mask=False)[1].fingerprint


def test_load_state_dict_reads_the_same_text_or_names_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "domains" / "00_food" / "generated"
    saved: Any = SimpleNamespace(metadata={"stage": 0, "fingerprint": write_rows(folder, 7)})
    text = component(tmp_path)
    text.load_state_dict(saved)
    assert text.state_dict().metadata == saved.metadata and text.source is not None
    assert torch.equal(text.source[0].index_select([1]), torch.full((1, 16), 7))
    text.clear()
    assert text.state_dict().metadata == {"stage": None, "fingerprint": None} and text.source is None
    write_rows(folder, 8)
    with pytest.raises(RunFolderError, match=r"generated: found other generated text than .*; restore it, or resume"):
        text.load_state_dict(saved)
    text.load_state_dict(SimpleNamespace(metadata={"stage": None, "fingerprint": None}))  # type: ignore[arg-type]
    assert text.source is None


@pytest.mark.parametrize(
    ("record", "is_main", "warns"),
    [
        (None, True, True),
        ({"drawn": ["lm_head.weight"]}, True, True),
        ({"drawn": []}, True, False),
        (None, False, False),
    ],
)
def test_random_weights_are_warned_of(
    record: dict[str, Any] | None, is_main: bool, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    component(tmp_path, is_main=is_main, record=record)._warn_of_random_weights()
    assert ("method.replay.source generated: the model has random weights" in caplog.text) == warns


SIZE = ModelSize(
    trained=100, total=120, largest_layer=10, num_units=5, num_layers=2, hidden=8, inner=16, heads=2, vocabulary=50
)
RUN = "method={name: ncl, replay: {fraction: 0.5, source: generated, generation: {num_sequences: 20, batch_size: 3}}}"


def sharding(stage: int) -> Sharding:
    return Sharding(stage=stage, num_ranks=2, weight_bytes=2, gradient_bytes=2, num_moments=2)


def test_generation_memory_counts_cache_and_gathered_weights() -> None:
    config = make_config("run", RUN)
    causal = generation_memory(config, SIZE, sharding(3), "clm")
    # Of 3 rows of 12 positions, keys and values of 8 numbers in 2 layers.
    assert causal.device_at_start == {"keys and values": 2 * 3 * 12 * 2 * 8 * 2, "gathered weights": 240}
    assert causal.domain == causal.checkpoint == 20 * 12 * 4
    assert generation_memory(config, SIZE, sharding(2), "mlm").device_at_start == {}


def test_generation_seconds_by_hand() -> None:
    config = make_config("run", RUN)
    flops = StepFlops(body=600, attention=300, head=100)

    def seconds(objective: str, run: RunConfig = config) -> float:
        return generation_seconds(run, SIZE, sharding(3), objective, flops=flops, rate=1e3, gather_seconds=5.0)  # type: ignore[arg-type]

    # Four batches of 2 x 3 sequences; each token of 12 reads 240 bytes.
    assert seconds("clm") == pytest.approx(4 * 12 * 240 / MEMORY_BANDWIDTH + 4 * 5.0)
    # Seven groups of masked tokens, each a forward pass over 20 sequences where a step has 8.
    assert seconds("mlm") == pytest.approx(7 * 20 / 8 * 300 / 1e3 + 4 * 5.0)
    by_layer = make_config("run", RUN.replace("batch_size: 3", "batch_size: 3, gather_weights: false"))
    assert seconds("clm", by_layer) == pytest.approx(4 * 12 * (240 / MEMORY_BANDWIDTH + 5.0))


def test_streamed_text_to_fill_in_is_refused(tmp_path: Path) -> None:
    values = small_run(tmp_path)
    values["domains"][0] |= {"streaming": True, "valid": values["general"]["valid"]}
    values["domains"][0].pop("valid_fraction", None)
    values["method"] = {"name": "replay", "replay": {"fraction": 0.25, "source": "generated"}}
    config = RunConfig(**values)
    data = prepare_data(config, RankInfo(0, 0, 1, torch.device("cpu")), "mlm")
    context: Any = SimpleNamespace(objective="mlm")
    services: Any = None
    with pytest.raises(ConfigError, match=r"^method.replay.source: found generated, .* of food, which is streamed"):
        GeneratedText(data.config, context, data, services)
