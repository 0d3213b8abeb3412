"""Directions: the inputs measured, the state kept, and the networks refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from das_ds.config import parse_method
from das_ds.distributed.process_group import RankInfo
from das_ds.distributed.resumable import ResumableLoop
from das_ds.errors import ImportanceError, ModelError, TrainingError
from das_ds.methods import METHODS, build_method
from das_ds.methods.directions import Directions
from das_ds.methods.merge import MergingWrapper
from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.language_model import LanguageModel
from das_ds.run_dir import DIRECTIONS_FILE
from das_ds.softmask.importance_file import load_directions, save_directions
from das_ds.softmask.input_covariance import input_second_moments, linear_layers
from helpers.architectures import causal_batch
from helpers.tiny_models import tiny_model, without_dropout
from helpers.training import LENGTH, no_text_domain, random_batch, rank_part, run_config

WITHOUT_LINEAR_LAYERS = ("gpt2", "mixtral", "qwen3_moe")
METHOD: dict[str, Any] = {"name": "directions", "half_saturation": 2.0}


def make_run(folder: Path, method: dict[str, Any] = METHOD, model_type: str = "roberta", **changes: Any) -> Any:
    """The part of a run that directions need before training, without an engine; `changes` are keys of the model's."""
    model = tiny_model(model_type, **without_dropout(model_type), **changes)
    spec = spec_for(model_type)
    network = LanguageModel(model, spec)
    engine = SimpleNamespace(
        parameters=dict(model.named_parameters()),
        module=network,
        ranks=SimpleNamespace(info=RankInfo(0, 0, 1, torch.device("cpu"))),
    )
    config = run_config(folder, method=method)
    return SimpleNamespace(config=config, engine=engine, network=network, layout=spec.layout(model), tokens=())


def test_second_moments_ignore_padding_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    full = random_batch(4, 1)
    first = random_batch(4, 1)
    first.row_weights[2:] = 0.0
    is_first = first.predicted < 2 * first.input_ids.shape[1]
    first = type(first)(
        first.input_ids, first.corrupted_ids, first.predicted[is_first], first.targets[is_first], first.row_weights
    )
    alone = type(full)(
        *(v[:2] for v in (first.input_ids, first.corrupted_ids)), first.predicted, first.targets, torch.ones(2)
    )
    filled = input_second_moments(run, ResumableLoop([first]))
    expected = input_second_moments(run, ResumableLoop([alone]))
    assert filled.keys() == linear_layers(run).keys()
    for name, moment in filled.items():
        torch.testing.assert_close(moment, expected[name])
    assert any(
        not torch.allclose(filled[n], m, rtol=1e-3) for n, m in input_second_moments(run, ResumableLoop([full])).items()
    )


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name not in WITHOUT_LINEAR_LAYERS])
def test_second_moments_do_not_depend_on_batches(model_type: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, model_type=model_type)
    batch = (causal_batch if spec_for(model_type).objective == "clm" else random_batch)(8, 1)
    expected = input_second_moments(run, ResumableLoop([batch]))
    for num_batches in (2, 8):
        found = input_second_moments(
            run, ResumableLoop([rank_part(batch, number, num_batches) for number in range(num_batches)])
        )
        for name, moment in found.items():
            torch.testing.assert_close(moment, expected[name], rtol=1e-4, atol=1e-5, msg=f"{num_batches}: {name}")


@pytest.mark.parametrize("num_rows", [1, 4])
def test_second_moments_count_relative_positions_once(num_rows: int, tmp_path: Path) -> None:
    """Also where it has as many rows as the batch has positions; by hand, from what the layers are given."""
    run = make_run(tmp_path, model_type="deberta-v2", position_buckets=LENGTH // 2)
    model = run.network.model
    batch = random_batch(num_rows, 1)
    table = model.base_model.encoder.get_rel_embedding()
    assert len(table) == LENGTH
    states = model.base_model(batch.corrupted_ids, output_hidden_states=True).hidden_states
    found = input_second_moments(run, ResumableLoop([rank_part(batch, row, num_rows) for row in range(num_rows)]))
    for layer, hidden in enumerate(states[:-1]):
        inputs = torch.cat((hidden.flatten(0, 1), table)).detach().double()
        moment = inputs.T @ inputs
        expected = (moment / moment.diagonal().mean()).float()
        for kind in ("query", "key"):
            name = f"deberta.encoder.layer.{layer}.attention.self.{kind}_proj.weight"
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_second_moments_non_finite_input_is_error(value: float, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.network.model.roberta.encoder.layer[0].output.LayerNorm.bias.data[3] = value
    message = (
        r"importance: found an input of roberta\.\S+ that is not finite, expected finite numbers; the model diverged"
    )
    with pytest.raises(TrainingError, match=message):
        input_second_moments(run, ResumableLoop([random_batch(2, 1)]))


@pytest.mark.parametrize(
    ("value", "fault"), [(float("nan"), "not finite"), (-1.0, "negative"), (float("inf"), "not finite")]
)
def test_load_directions_invalid_moments_are_error(value: float, fault: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    path = tmp_path / DIRECTIONS_FILE
    widths = {name: layer.in_features for name, layer in linear_layers(run).items()}
    moments = {name: torch.eye(width) for name, width in widths.items()}
    name = "roberta.encoder.layer.1.output.dense.weight"
    moments[name][3, 3] = value
    save_directions(path, moments, run.layout)
    with pytest.raises(ImportanceError, match=rf"{path}: {name}: found .*{fault}.*, expected a second moment"):
        load_directions(path, widths, run.layout)
    moments[name] = torch.eye(widths[name])
    moments[name][3, 4] = 0.5
    save_directions(path, moments, run.layout)
    with pytest.raises(ImportanceError, match=r"found a matrix that is not symmetric, expected"):
        load_directions(path, widths, run.layout)


def test_load_directions_reads_own_files_only(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    widths = {name: layer.in_features for name, layer in linear_layers(run).items()}
    inputs = {name: torch.randn(width, width) for name, width in widths.items()}
    moments = {name: values.T @ values for name, values in inputs.items()}
    path = tmp_path / DIRECTIONS_FILE
    save_directions(path, moments, run.layout)
    for name, moment in load_directions(path, widths, run.layout)[0].items():
        assert torch.equal(moment, moments[name])
    with pytest.raises(ImportanceError, match="importance of another model: found roberta with"):
        load_directions(path, {**widths, next(iter(widths)): 7}, run.layout)
    with pytest.raises(ImportanceError, match="cannot read importance"):
        load_directions(tmp_path / "missing", widths, run.layout)


def test_directions_init_from_protects_first_domain(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    widths = {name: layer.in_features for name, layer in linear_layers(run).items()}
    save_directions(tmp_path / DIRECTIONS_FILE, {name: torch.eye(width) for name, width in widths.items()}, run.layout)
    method = build_method(make_run(tmp_path, {**METHOD, "init_from": str(tmp_path / DIRECTIONS_FILE)}))
    method.before_domain(no_text_domain(tmp_path))
    assert isinstance(method, Directions) and method.state_dict().replicated.keys() == widths.keys()


def test_directions_without_linear_layers_is_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, model_type="gpt2")
    with pytest.raises(ModelError, match=r"found directions, but .*c_attn.weight is no weight of a torch.nn.Linear"):
        build_method(run)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "merge"])
def test_merge_weight_any_method_merges_on_request(name: str) -> None:
    assert parse_method(name).merge_weight is None
    assert parse_method({"name": name, "merge": {"weight": 0.25}}).merge_weight == 0.25


def test_merge_weight_default_of_merge(tmp_path: Path) -> None:
    assert parse_method("merge").merge_weight == 0.5
    assert isinstance(build_method(make_run(tmp_path, {"name": "merge"})), MergingWrapper)


@pytest.mark.parametrize("key", ["contrastive", "softmask", "importance", "view_dropout"])
def test_directions_keys_of_das_are_error(key: str) -> None:
    with pytest.raises(ValidationError, match=rf"{key}\n +Extra inputs"):
        parse_method({**METHOD, key: {}})
