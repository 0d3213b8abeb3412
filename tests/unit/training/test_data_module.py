"""The text of a causal run, from config to batches, compared with batches made by hand."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from das_ds.config import RunConfig, parse_method
from das_ds.distributed.process_group import RankInfo
from das_ds.errors import ConfigError, ModelError
from das_ds.reporting.results import build_results
from das_ds.training.data_module import prepare_data
from tests.helpers.tiny_tokenizer import TEXT, tiny_tokenizer

LENGTH = 16
INFO = RankInfo(0, 0, 1, torch.device("cpu"))


def run_config(tmp_path: Path, *, isolate: bool, without: str | None = None) -> RunConfig:
    tokenizer = tiny_tokenizer()
    if without is not None:
        setattr(tokenizer, without, None)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "soup.txt").write_text(TEXT)
    return RunConfig.model_validate(
        {
            "output_dir": tmp_path / "run",
            "model": {"config": {"model_type": "gpt2"}},
            "domains": [{"name": "soup", "train": [str(tmp_path / "soup.txt")]}],
            "data": {
                "tokenizer": str(tmp_path / "tokenizer"),
                "sequence_length": LENGTH,
                "cache_dir": str(tmp_path / "cache"),
                "document_mask": isolate,
            },
            "train": {"steps_per_domain": 2, "global_batch_size": 4, "micro_batch_size": 2},
        }
    )


@pytest.mark.parametrize("isolate", [False, True])
def test_data_module_causal_predicts_next_tokens(tmp_path: Path, isolate: bool) -> None:
    text = prepare_data(run_config(tmp_path, isolate=isolate), INFO, "clm")
    tokenizer = tiny_tokenizer()
    pairs = set[tuple[int, int]]()
    for line in TEXT.splitlines():
        ids = tokenizer(line)["input_ids"]
        pairs |= set(pairwise(ids))
    crossing = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    batches = [batch for step in text.training_steps(text.config.stages[0]) for batch in step]
    batches += [*text.evaluation_batches("soup"), *text.importance_batches("soup")]
    found = set[tuple[int, int]]()
    for batch in batches:
        assert (batch.position_ids is not None) == isolate
        found |= set(zip(batch.input_ids.flatten()[batch.predicted].tolist(), batch.targets.tolist(), strict=True))
    assert found <= pairs | {crossing}
    assert (crossing in found) != isolate


def test_bits_per_byte_of_one_model_are_the_same_for_two_tokenizers(tmp_path: Path) -> None:
    """Each character has 3 bits; a tokenizer of pairs of characters has 6 for each of its tokens."""
    text = "abcd" * 40
    found = []
    for width, bits in ((1, 3.0), (2, 6.0)):
        words = sorted({text[start : start + width] for start in range(0, len(text), width)})
        backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*words, "<eos>"])}, "<eos>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("." * width), "isolated")
        folder = tmp_path / f"tokenizer{width}"
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
        values = run_config(tmp_path, isolate=False).model_dump()
        values["data"]["tokenizer"] = str(folder)
        values["domains"][0]["valid"] = [str(tmp_path / "held_out.txt")]
        for name, num_documents in (("soup", 2), ("held_out", 1)):
            (tmp_path / f"{name}.txt").write_text(f"{text}\n" * num_documents)
        ratio = prepare_data(RunConfig.model_validate(values), INFO, "clm").tokens_per_byte()["soup"]
        # One token ends the document.
        assert ratio == (160 // width + 1) / 160
        results = build_results(
            method="ncl",
            domains=["soup"],
            eval_domains=["soup"],
            loss_matrix=[[bits * math.log(2.0) * 160 / width / (160 / width + 1)]],
            tokens_seen=0,
            wall_seconds=0.0,
            world_size=1,
            zero_stage=0,
            tokens_per_byte={"soup": ratio},
        )
        assert results.bits_per_byte is not None
        found += results.bits_per_byte[0]
    assert found == pytest.approx([3.0, 3.0])


def test_prepare_data_missing_token_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no end-of-text token"):
        prepare_data(run_config(tmp_path, isolate=False, without="eos_token"), INFO, "clm")
    with pytest.raises(ModelError, match="has no mask token"):
        prepare_data(run_config(tmp_path, isolate=False, without="mask_token"), INFO, "mlm")


def test_prepare_data_isolated_documents_in_masked_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.document_mask: found true with objective mlm"):
        prepare_data(run_config(tmp_path, isolate=True), INFO, "mlm")


@pytest.mark.parametrize(
    ("size", "world_size", "rows"), [(None, 1, [2, 2]), (1, 1, [1]), (3, 1, [1, 1, 1]), (12, 2, [2, 2, 2]), (2, 2, [1])]
)
def test_importance_steps_have_gradient_batch_size(
    size: int | None, world_size: int, rows: list[int], tmp_path: Path
) -> None:
    config = run_config(tmp_path, isolate=False)
    method = parse_method({"importance": {"gradient_batch_size": size, "num_samples": 5}})
    config = config.model_copy(update={"method": method})
    measured: list[torch.Tensor] = []
    for rank in range(world_size):
        steps = prepare_data(config, RankInfo(rank, rank, world_size, INFO.device), "clm").importance_steps("soup")
        assert all([len(batch.input_ids) for batch in step] == rows for step in steps)
        measured += [batch.input_ids[batch.row_weights > 0] for step in steps for batch in step]
    full = prepare_data(config, INFO, "clm").importance_batches("soup")
    expected = torch.cat([batch.input_ids[batch.row_weights > 0] for batch in full])
    assert sorted(torch.cat(measured).tolist()) == sorted(expected.tolist())


@pytest.mark.parametrize(
    ("in_config", "given", "expected"), [(None, 5, 5), (3, 5, 3), (None, None, None), (3, None, 3)]
)
def test_importance_batches_size_is_that_of_the_config_or_given(
    in_config: int | None, given: int | None, expected: int | None, tmp_path: Path
) -> None:
    config = run_config(tmp_path, isolate=False)
    config = config.model_copy(update={"method": parse_method({"name": "directions", "num_samples": in_config})})
    data = prepare_data(config, INFO, "clm")
    batches = data.importance_batches("soup", given)
    assert len(batches.indices) == (data.num_training_blocks("soup") if expected is None else expected)


def test_data_module_probe_is_the_same_on_every_rank(tmp_path: Path) -> None:
    config = run_config(tmp_path, isolate=False).model_copy(update={"method": parse_method("directions")})
    texts = [prepare_data(config, RankInfo(rank, rank, 2, torch.device("cpu")), "clm") for rank in range(2)]
    num_blocks = texts[0].num_training_blocks("soup")
    assert num_blocks > 3
    for number in (3, num_blocks + 1):
        found = [[*text.probe_batches("soup", number)] for text in texts]
        for mine, theirs in zip(*found, strict=True):
            assert mine.input_ids.equal(theirs.input_ids) and mine.row_weights.equal(theirs.row_weights)
        # Rows that fill the last batch have no weight.
        assert sum(batch.row_weights.sum().item() for batch in found[0]) == min(number, num_blocks)
