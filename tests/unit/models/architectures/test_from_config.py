"""Custom architecture specs: from YAML to training, and every mistake in them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from das_ds.cli import main
from das_ds.config import ArchitectureConfig, GroupName, ModelConfig, RuleConfig
from das_ds.config.help import describe_config
from das_ds.config.io import dump_config, load_config
from das_ds.errors import ConfigError, ModelError
from das_ds.functional.axis_layouts import AXIS_LAYOUTS
from das_ds.functional.units import GROUPS
from das_ds.models.architectures.from_config import spec_from_config, spec_to_config
from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.loading import find_spec, load_model
from das_ds.reporting.results import Results
from das_ds.run_dir import RESULTS_FILE
from helpers.commands import program, write_config
from helpers.runs import exported_weights, small_run
from helpers.tiny_models import SIZES

MODELS: dict[str, dict[str, Any]] = {
    "stablelm": {**SIZES, "vocab_size": 300, "num_attention_heads": 6, "num_key_value_heads": 2},
    # Its FFN has a key of its own.
    "falcon": {key: size for key, size in SIZES.items() if key != "intermediate_size"}
    | {"vocab_size": 300, "ffn_hidden_size": 40},
}


def llama_section() -> dict[str, Any]:
    return copy.deepcopy(spec_to_config(spec_for("llama")))


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_spec_config_round_trip_of_registered_specs(model_type: str) -> None:
    known = spec_for(model_type)
    read = spec_from_config(ArchitectureConfig.model_validate(spec_to_config(known)), model_type)
    assert replace(read, unsupported=known.unsupported) == known


def test_config_names_equal_code_names() -> None:
    assert get_args(GroupName) == GROUPS
    assert get_args(RuleConfig.model_fields["layout"].annotation) == tuple(AXIS_LAYOUTS)


def test_spec_config_survives_run_folder(tmp_path: Path) -> None:
    path = write_config(tmp_path, small_run(tmp_path, model={"architecture": llama_section()}))
    config = load_config(path, ["model.architecture.position_offset=1"])
    assert config.model.architecture is not None and config.model.architecture.position_offset == 1
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_help_explains_spec_keys() -> None:
    text = describe_config()
    for key in ("model.architecture.objective", "model.architecture.rules.0.layout", "model.architecture.units.head"):
        assert f"\n{key} " in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rules.0.layout=even", "rules.0.layout: found 'even', allowed: contiguous | gate_up | kv | qkv"),
        ("rules.0.group=neuron", "rules.0.group: found 'neuron', allowed: head | intermediate | output"),
        ("rules.0.axis=2", "rules.0.axis: found 2, allowed: integer >= 0 and <= 1"),
        ("rules.0.parameter=a.weight", "rules.0: found 'a.weight', expected a name with the placeholder {layer}"),
        (
            "rules.0.parameter='{block}.{layer}'",
            "rules.0: found '{block}.{layer}', allowed placeholders: {base}, {layer}",
        ),
        ("sites.0.module='{base}.o_proj'", "sites.0: found '{base}.o_proj', expected a name with the placeholder"),
        ("unmasked.0='{head}.norm'", "unmasked.0: found '{head}.norm', allowed placeholders: {base}, {layer}"),
        ("unmasked.0='{base.norm'", "unmasked.0: found '{base.norm', allowed placeholders: {base}"),
        ("sites.0.position=inside", "sites.0.position: found 'inside', allowed: input | output | experts"),
        (
            "units.neuron=x",
            "units.neuron: unknown key; allowed in model.architecture.units: head, intermediate, output",
        ),
        (
            "units.head=",
            "must name the same groups, each with one site; found units: intermediate, output, rules: head",
        ),
        (
            "sites.0.group=output",
            "found units: head, intermediate, output, rules: head, intermediate, output, sites: in",
        ),
        (
            "rules.1.parameter='{base}.layers.{layer}.self_attn.q_proj.weight'",
            "q_proj.weight found twice, allowed: one",
        ),
        ("lm_head=[]", "lm_head: found [], allowed: list of text, at least 1"),
        ("objective=auto", "objective: found 'auto', allowed: mlm | clm"),
    ],
)
def test_spec_config_mistake_names_key(tmp_path: Path, override: str, expected: str) -> None:
    path = write_config(tmp_path, small_run(tmp_path, model={"architecture": llama_section()}))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [f"model.architecture.{override}"])
    assert "model.architecture" in str(caught.value) and expected in str(caught.value)


def test_find_spec_config_overrides_registered() -> None:
    section = llama_section()
    section["units"]["output"] = "hidden_size|x"
    config = ModelConfig(config={"model_type": "llama", **SIZES}, architecture=ArchitectureConfig(**section))
    assert find_spec(config).units["output"] == "hidden_size|x"


def test_layout_spec_of_other_architecture_raises() -> None:
    section = ArchitectureConfig(**llama_section())
    config = ModelConfig(config={"model_type": "starcoder2", **SIZES, "num_key_value_heads": 3}, architecture=section)
    model, spec = load_model(config, seed=0, vocab_size=100)
    with pytest.raises(ModelError, match=r"names a parameter that this model lacks: model.layers.0.mlp.gate_proj"):
        spec.layout(model)


def test_find_spec_missing_suggests_command() -> None:
    with pytest.raises(
        ModelError, match=r"'stablelm'; known: bert.*`das-ds inspect MODEL` proposes a table for model.ar"
    ):
        find_spec(ModelConfig(config={"model_type": "stablelm"}))


def test_spec_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ArchitectureConfig(**llama_section()).position_offset = 3


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_train_with_proposed_spec(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `das-ds inspect --yaml` prints is pasted into a run config; das then trains, exports and evaluates."""
    model = {"model_type": model_type, **MODELS[model_type]}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    assert main(["inspect", str(tmp_path / "model.yaml"), "--yaml"]) == 0
    pasted = yaml.safe_load(capsys.readouterr().out)["model"]
    values = small_run(tmp_path)
    values |= {"domains": values["domains"][:1], "model": {"config": model, **pasted}}
    values["train"] |= {"steps_per_domain": 2}
    values["method"] |= {"view_dropout": 0.1}
    path = write_config(tmp_path, values)
    done = program("launch/train.py", "--config", path)
    assert done.returncode == 0, done.stderr
    run = values["output_dir"]
    results = Results.read(run / RESULTS_FILE)
    assert results.complete and (run / "importance.safetensors").exists()
    assert exported_weights(run, "00_food")
    folder = run / "domains" / "00_food" / "model"
    shown = program("launch/evaluate.py", "--config", path, "--model", folder)
    assert shown.returncode == 0, shown.stderr
    losses = json.loads(shown.stdout.splitlines()[-1])
    assert losses == pytest.approx(dict(zip(results.eval_domains, results.loss_matrix[-1], strict=True)), rel=1e-6)


def test_inspect_command_prints_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.json"
    path.write_text('{"model_type": "falcon", "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}')
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for part in ("falcon, clm, 2 layers: proposed table", "verified", "40x24  head", "stays unmasked", "LM head"):
        assert part in text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.yaml", None, "no such file; expected a model config in YAML or JSON"),
        ("list.yaml", "[1]", "found [1], expected a mapping with model_type"),
        ("bare.yaml", "hidden_size: 8", "found no model_type, expected a Hugging Face model config"),
        ("other.yaml", "model_type: no_such_type", "found 'no_such_type', which transformers does not know"),
        ("t5.yaml", "model_type: t5", "no masked and no causal language model of type 't5'"),
        ("no_such_folder", None, "cannot load the model config of"),
    ],
)
def test_inspect_command_bad_model_is_one_line(
    name: str, content: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["inspect", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("das_ds: ") and error.count("\n") == 1 and expected in error
