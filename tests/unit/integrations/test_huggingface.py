"""The callback in a Trainer of one process, and the examples; ranks and ZeRO are in `tests/smoke` and `tests/full`."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

from das_ds.errors import ConfigError, DataError, ImportanceError
from das_ds.integrations import Protector
from das_ds.integrations.huggingface import PROTECTION_FILE, ProtectionCallback
from helpers.commands import ROOT
from helpers.integrations import build_trainer, full_weights, rows, sample
from helpers.masked_training import ROWS
from helpers.tiny_models import NO_DROPOUT, tiny_model
from helpers.tiny_tokenizer import TEXT, tiny_tokenizer

EXAMPLE_OPTIONS = ("--batch-size", "4", "--length", "32")


def add(trainer: Any, *arguments: Any, **options: Any) -> ProtectionCallback:
    callback = ProtectionCallback(trainer, *arguments, **options)
    trainer.add_callback(callback)
    return callback


@pytest.mark.parametrize("method", ["directions", "unit", "parameter"])
def test_resumed_training_equals_uninterrupted(method: Any, tmp_path: Path) -> None:
    general: Any = rows(sample())
    options = {"before": general, "measure": False}
    whole = build_trainer(tmp_path / "run", None, 1, save_strategy="steps", save_steps=2)
    add(whole, method, **options)
    whole.train()
    expected = full_weights(whole)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / PROTECTION_FILE).exists()
    resumed = build_trainer(tmp_path / "run", None, 1)
    add(resumed, method, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    found = full_weights(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (checkpoint / PROTECTION_FILE).unlink()
    resumed = build_trainer(tmp_path / "run", None, 1)
    add(resumed, method, **options)
    with pytest.raises(ImportanceError, match="before: found a run that resumes at step 2 without protection"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_training_is_measured_in_the_end_and_protected_by_the_next(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path / "first", None, 1)
    callback = add(trainer, num_samples=12)
    trainer.train()
    measured = load_file(tmp_path / "first" / PROTECTION_FILE)
    alone = Protector(trainer.model)
    alone.measure(DataLoader(trainer.train_dataset[:12], batch_size=6))  # type: ignore[index]
    assert all(torch.equal(measured[name], moment) for name, moment in alone.state_dict()["tensors"].items())
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    # The same callback again, and a new one that loads its file.
    bias = "roberta.encoder.layer.0.attention.self.query.bias"
    before = full_weights(trainer)
    trainer.train()
    assert torch.equal(full_weights(trainer)[bias], before[bias])
    assert callback.protector is not None and not callback.protector.is_empty
    second = build_trainer(tmp_path / "second", None, 1)
    add(second, load=tmp_path / "first" / PROTECTION_FILE, measure=DataLoader(rows(sample()), batch_size=6))  # type: ignore[arg-type]
    start = full_weights(second)
    second.train()
    assert torch.equal(full_weights(second)[bias], start[bias])
    total = load_file(tmp_path / "second" / PROTECTION_FILE)
    assert all((total[name].diagonal() > measured[name].diagonal()).all() for name in total)


def test_unprotected_training_is_that_without_callback(tmp_path: Path) -> None:
    weights = []
    for has_callback in (False, True):
        trainer = build_trainer(tmp_path, None, 1)
        if has_callback:
            add(trainer, measure=False)
        trainer.train()
        weights.append(full_weights(trainer))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Failure(TrainerCallback):
    """Ends training by an error after the second step, once."""

    def __init__(self) -> None:
        self.is_due = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_due and state.global_step == 2:
            self.is_due = False
            raise RuntimeError("failed")


def test_training_after_a_failed_one_is_masked_once(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path / "failed", None, 1)
    general: Any = rows(sample())
    add(trainer, before=general, measure=False)
    trainer.add_callback(Failure())
    with pytest.raises(RuntimeError, match="failed"):
        trainer.train()
    start = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
    trainer.train()
    protector = Protector(tiny_model(**NO_DROPOUT))
    protector.measure(DataLoader(general, batch_size=ROWS))
    protector.save(tmp_path / "general.safetensors")
    # The same steps from where the failed ones ended, with one mask.
    fresh = build_trainer(tmp_path / "fresh", None, 1)
    fresh.model.load_state_dict(start[0])
    fresh.create_optimizer()
    fresh.optimizer.load_state_dict(start[1])
    add(fresh, load=tmp_path / "general.safetensors", measure=False)
    fresh.train()
    found, expected = full_weights(trainer), full_weights(fresh)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_measured_is_not_the_evaluation_set_of_persistent_workers(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, None, 1, dataloader_num_workers=1, dataloader_persistent_workers=True)
    trainer.eval_dataset = rows(sample())  # type: ignore[assignment]
    loss = trainer.evaluate()["eval_loss"]
    callback = add(trainer, before=trainer.train_dataset, num_samples=6, measure=False)
    trainer.args.learning_rate = 0.0
    trainer.train()
    assert callback.protector is not None
    alone = Protector(trainer.model)
    alone.measure(DataLoader(trainer.train_dataset[:6], batch_size=6))  # type: ignore[index]
    measured = callback.protector.state_dict()["tensors"]
    assert all(torch.equal(measured[name], moment) for name, moment in alone.state_dict()["tensors"].items())
    assert trainer.evaluate()["eval_loss"] == loss


def test_resuming_without_protection_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_trainer(tmp_path, None, 1, save_strategy="steps", save_steps=2)
    add(trainer, measure=False)
    trainer.train()
    assert "are not masked" not in caplog.text
    resumed = build_trainer(tmp_path / "other", None, 1)
    add(resumed, measure=False)
    with caplog.at_level("WARNING"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "found no such file at step 2 where this run resumes, so that its steps are not masked" in caplog.text


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(rows(sample()))


def test_bad_input_is_an_error(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, None, 1)
    with pytest.raises(ConfigError, match="num_samples: found 0, expected at least 1"):
        ProtectionCallback(trainer, num_samples=0)
    with pytest.raises(ConfigError, match="method: found 'ewc'"):
        ProtectionCallback(trainer, "ewc")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rate: found with method unit"):
        ProtectionCallback(trainer, "unit", rate=1)
    with patch.object(trainer, "is_fsdp_enabled", True), pytest.raises(ConfigError, match="trainer: found FSDP"):
        ProtectionCallback(trainer)
    add(trainer, before=Endless(), num_samples=3)
    with pytest.raises(DataError, match="num_samples: found 3 with a Endless without length"):
        trainer.train()
    trainer = build_trainer(tmp_path, None, 1)
    add(trainer, before=iter(rows(sample())))
    with pytest.raises(DataError, match="measure, before: found a list_iterator, expected a dataset"):
        trainer.train()
    trainer = build_trainer(tmp_path, None, 1)
    add(trainer, measure=False)
    add(trainer, measure=False)
    with pytest.raises(ConfigError, match="optimizer: found AdamW whose steps another Protector masks"):
        trainer.train()
    trainer = build_trainer(tmp_path, None, 1)
    add(trainer, load=tmp_path / "missing.safetensors")
    with pytest.raises(ImportanceError, match="cannot read directions"):
        trainer.train()


# Examples.


@pytest.fixture(scope="module")
def example_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    tiny_model("llama", vocab_size=300, max_position_embeddings=256).save_pretrained(folder / "model")
    tiny_tokenizer(300).save_pretrained(folder / "model")
    (folder / "first.txt").write_text(TEXT * 2)
    (folder / "second.txt").write_text(TEXT[::-1] * 2)
    lines = [json.dumps({"prompt": line, "completion": line[::-1]}) for line in TEXT.splitlines()]
    (folder / "tasks.jsonl").write_text("\n".join(lines))
    return folder


def run_example(name: str, *words: object) -> None:
    # In this process, where the libraries are loaded.
    argv = [name, *map(str, words), *EXAMPLE_OPTIONS]
    with patch.object(sys, "argv", argv), torch.random.fork_rng():
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_example_in_plain_torch(example_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"--earlier": "first.txt", "--new": "second.txt", "--output": "plain", "--model": "model"}
    run_example("plain_torch.py", *(word for key, name in files.items() for word in (key, example_files / name)))
    assert "loss on earlier text:" in capsys.readouterr().out
    assert (example_files / "plain" / PROTECTION_FILE).exists()


def test_example_with_trainer(example_files: Path) -> None:
    texts = [example_files / "first.txt", example_files / "second.txt"]
    output = example_files / "runs"
    run_example("huggingface_trainer.py", "--model", example_files / "model", "--texts", *texts, "--output", output)
    first, second = (load_file(output / name / PROTECTION_FILE) for name in ("00_first", "01_second"))
    assert all((second[name].diagonal() >= first[name].diagonal()).all() for name in first)
    shutil.rmtree(output)


def test_example_with_sft_trainer(example_files: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed; pip install trl")
    files = {"--general": "first.txt", "--data": "tasks.jsonl", "--output": "tuned", "--model": "model"}
    run_example("sft_trainer.py", *(word for key, name in files.items() for word in (key, example_files / name)))
    assert (example_files / "tuned" / PROTECTION_FILE).exists()
