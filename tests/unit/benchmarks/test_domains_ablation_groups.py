"""Ablation of parameter groups: every parameter has a group, and restoring one changes the losses."""

from pathlib import Path

import pytest
import torch

from benchmarks.domains.ablation_groups import NOTHING, PATTERNS, TOGETHER, group_parameters, measure_restored_losses
from benchmarks.domains.jobs import TrainingRun
from das_ds.config import ModelConfig
from das_ds.config.io import load_config
from das_ds.distributed.process_group import RankInfo
from das_ds.distributed.resumable import ResumableLoops
from das_ds.errors import ModelError
from das_ds.models.language_model import LanguageModel
from das_ds.models.loading import load_model
from das_ds.reporting.results import build_results
from das_ds.run_dir import RESULTS_FILE
from das_ds.training.data_module import prepare_data
from das_ds.training.evaluate import evaluate_corpora
from helpers.runs import small_run
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize(("model_type", "missing"), [("bert", set()), ("llama", {"LM-head transform", "decoder bias"})])
def test_group_parameters_each_has_one_group(model_type: str, missing: set[str]) -> None:
    names = [name for name, _ in tiny_model(model_type, tie_word_embeddings=True).named_parameters()]
    groups = group_parameters(names)
    alone = {group: members for group, members in groups.items() if group not in TOGETHER}
    assert sorted(name for members in alone.values() for name in members) == sorted(names)
    assert set(alone) == set(PATTERNS) - missing
    assert set(groups["attention + FFN"]) == {*groups["attention"], *groups["FFN"]}
    assert all("orm" in name for name in groups["layer norms"])
    assert not any("orm" in name for group in ("attention", "FFN", "embeddings") for name in groups[group])


def test_group_parameters_unknown_is_named() -> None:
    with pytest.raises(ModelError, match=r"found parameter classifier\.weight, expected one of layer norms"):
        group_parameters(["classifier.weight"])


def finished_run(folder: Path) -> TrainingRun:
    """A run whose two models differ in one LM-head transform and nothing else."""
    values = small_run(folder)
    values["model"]["config"]["model_type"] = "bert"
    run = TrainingRun(values.pop("output_dir") / "seed0", values)
    run.command()
    model = tiny_model("bert", vocab_size=len(tiny_tokenizer()))
    for index, name in enumerate(("food", "papers")):
        path = run.folder / "domains" / f"{index:02d}_{name}" / "model"
        model.save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        model.get_parameter("cls.predictions.transform.dense.bias").data += 1.0
    results = build_results(
        method="ncl",
        domains=["food", "papers"],
        eval_domains=["food", "papers", "general"],
        loss_matrix=[[1.0] * 3] * 3,
        tokens_seen=1,
        wall_seconds=1.0,
        world_size=1,
        zero_stage=0,
    )
    results.write(run.folder / RESULTS_FILE)
    return run


def compute_losses(run: TrainingRun, index: int) -> dict[str, float]:
    """Held-out losses of an exported model as it is."""
    config = load_config(run.config)
    text = prepare_data(config, RankInfo(0, 0, 1, torch.device("cpu")), "mlm")
    source = ModelConfig(name_or_path=str(run.model(index)))
    model, spec = load_model(source, seed=0, vocab_size=len(text.base_tokenizer))
    return evaluate_corpora(LanguageModel(model, spec), text, ResumableLoops(show_progress=False))


def test_measure_restored_losses_restores_the_earlier_model(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    found = {row.group: row.losses for row in measure_restored_losses(run, torch.device("cpu"))}
    before, after = (compute_losses(run, index) for index in range(2))
    assert before != after
    assert found.pop("LM-head transform") == pytest.approx(before)
    assert set(found) == {NOTHING, "layer norms", "embeddings", "attention", "FFN", "decoder bias", "attention + FFN"}
    assert all(losses == pytest.approx(after) for losses in found.values())
