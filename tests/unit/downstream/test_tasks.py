"""Files of end tasks: rows, labels, and every malformed input."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from das_ds.config import TaskConfig
from das_ds.downstream.batches import encode_examples, shuffled_batches, sorted_batches
from das_ds.downstream.tasks import EndTask, read_task, select_tasks
from das_ds.errors import ConfigError, DataError
from helpers.end_tasks import small_task, write_rows
from helpers.tiny_tokenizer import tiny_tokenizer

ROWS = [{"text": "good soup", "label": "plus"}, {"text": "cold soup", "label": "minus"}]


def make_task(folder: Path, train: list[dict[str, Any]], dev: list[dict[str, Any]], **changes: Any) -> TaskConfig:
    files = {"train": train, "dev": dev, "test": ROWS}
    names = {part: write_rows(folder / f"{part}.jsonl", rows) for part, rows in files.items()}
    return TaskConfig(**{"name": "toy", **names, **changes})


def error_message(config: TaskConfig) -> str:
    with pytest.raises(DataError) as caught:
        read_task(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_read_task_keeps_order_and_sorts_labels(tmp_path: Path) -> None:
    task = read_task(make_task(tmp_path, ROWS, ROWS[:1]))
    assert task.labels == ["minus", "plus"]
    assert task.train.texts == ["good soup", "cold soup"] and task.train.pairs is None
    assert task.train.labels == [1, 0] and task.dev.labels == [1]
    assert len(set(task.fingerprints.values())) == 2  # train and test hold the same


def test_read_task_compressed_columns_and_integer_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"s": "fine", "of": "soup", "y": 1}\n\n{"s": "bad", "of": "bread", "y": 0}\n'))
    files = {part: str(path) for part in ("train", "dev", "test")}
    columns = {"text_column": "s", "pair_column": "of", "label_column": "y"}
    task = read_task(TaskConfig(name="toy", kind="pair", **files, **columns))
    assert task.labels == ["0", "1"] and task.test.labels == [1, 0]
    assert task.train.pairs == ["soup", "bread"]


def test_read_task_configured_labels_keep_order(tmp_path: Path) -> None:
    assert read_task(make_task(tmp_path, ROWS, ROWS, labels=["plus", "minus"])).train.labels == [0, 1]


@pytest.mark.parametrize(
    ("train", "dev", "changes", "expected"),
    [
        (
            ROWS,
            [{"text": "so so", "label": "even"}],
            {},
            "dev.jsonl) has the label even; expected a label of train: mi",
        ),
        (ROWS, ROWS, {"labels": ["plus", "minus", "even"]}, "train.jsonl) has no rows of even; expected some"),
        (ROWS, ROWS, {"labels": ["plus", "even"]}, "train.jsonl) has no rows of even"),
        (ROWS[:1], ROWS[:1], {}, "train.jsonl) has one label only, plus; expected two"),
        (
            [*ROWS, {"text": "x \ud800", "label": "plus"}],
            ROWS,
            {},
            "train.jsonl, line 3: column 'text' has a lone surrogate; expected Unicode text",
        ),
        (
            [*ROWS, {"text": "x", "label": ""}],
            ROWS,
            {},
            "train.jsonl, line 3: column 'label' contains ''; expected text",
        ),
        ([{"text": None, "label": "plus"}], ROWS, {}, "line 1: column 'text' contains None; expected text"),
        ([{"text": "x", "label": True}], ROWS, {}, "line 1: column 'label' contains True; expected text"),
        ([{"body": "x", "label": "a"}], ROWS, {}, "no column 'text' (tasks.text_column of toy); found columns: body, "),
        (ROWS, ROWS, {"kind": "pair"}, "no column 'aspect' (tasks.pair_column of toy); found columns: text, label"),
        (ROWS, ROWS, {"kind": "entities"}, "found no [[ ]] << >> in the text; task toy is of kind entities"),
    ],
)
def test_read_task_bad_row_raises(
    tmp_path: Path, train: list[dict[str, Any]], dev: list[dict[str, Any]], changes: dict[str, Any], expected: str
) -> None:
    assert expected in error_message(make_task(tmp_path, train, dev, **changes))


def test_read_task_bad_file_raises(tmp_path: Path) -> None:
    assert "train.jsonl has no rows; expected one object" in error_message(make_task(tmp_path, [], ROWS))
    named = make_task(tmp_path, ROWS, ROWS)
    (tmp_path / "rows.txt").write_text("text\n")
    (tmp_path / "list.jsonl").write_text("[]\n")
    for name, expected in (
        ("none.jsonl", "none.jsonl: found no such file; expected a .jsonl file"),
        ("rows.txt", "rows.txt: unknown file type; allowed are .jsonl, .jsonl.gz, .jsonl.xz"),
        ("list.jsonl", "list.jsonl, line 1: found list"),
    ):
        assert expected in error_message(named.model_copy(update={"dev": str(tmp_path / name)}))


def test_select_tasks_by_name_in_config_order() -> None:
    files = {"train": "a.jsonl", "dev": "b.jsonl", "test": "c.jsonl"}
    tasks = [TaskConfig(name=name, **files) for name in ("acl_arc", "scierc", "chemprot")]
    assert select_tasks(tasks, []) == tasks
    assert select_tasks(tasks, ["chemprot", "acl_arc"]) == [tasks[0], tasks[2]]
    with pytest.raises(ConfigError, match="--task rte: no such task, allowed: acl_arc, scierc, chemprot"):
        select_tasks(tasks, ["acl_arc", "rte"])
    with pytest.raises(ConfigError, match="tasks: found none"):
        select_tasks([], [])


def read_pairs(folder: Path) -> EndTask:
    return read_task(TaskConfig(**small_task(folder, "pair")))


def test_encode_examples_truncates_longer_of_pair(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    task = read_pairs(tmp_path)
    full = encode_examples(task.dev, tokenizer, 64)
    cut = encode_examples(task.dev, tokenizer, 12)
    assert task.dev.pairs is not None
    text = tokenizer.decode(full.rows[0]["input_ids"])
    assert text.find(task.dev.pairs[0]) < text.find(task.dev.texts[0])
    assert full.num_truncated == 0 and cut.num_truncated == len(task.dev.texts)
    assert max(len(row["input_ids"]) for row in cut.rows) == 12
    assert task.dev.pairs[0] in tokenizer.decode(cut.rows[0]["input_ids"])


def test_batches_contain_every_row_once(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    task = read_pairs(tmp_path)
    encoded = encode_examples(task.train, tokenizer, 64)
    generator = torch.Generator().manual_seed(0)
    orders = []
    for batches in (
        shuffled_batches(encoded, 7, tokenizer, generator),
        shuffled_batches(encoded, 7, tokenizer, generator),
        sorted_batches(encoded, 7, tokenizer),
    ):
        order = []
        for batch in batches:
            order += batch.positions.tolist()
            assert batch.labels.tolist() == [task.train.labels[i] for i in batch.positions]
            texts = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
            for i, (ids, mask) in zip(batch.positions.tolist(), texts, strict=True):
                assert ids[mask.bool()].tolist() == encoded.rows[i]["input_ids"]
        assert sorted(order) == list(range(len(task.train.labels)))
        orders.append(order)
    assert orders[0] != orders[1]
    lengths = [len(encoded.rows[i]["input_ids"]) for i in orders[2]]
    assert lengths == sorted(lengths)
