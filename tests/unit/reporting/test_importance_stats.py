"""Statistics of importance files, against the values written into them."""

from __future__ import annotations

from pathlib import Path

import pytest

from das_ds.config import ModelConfig
from das_ds.errors import ImportanceError
from das_ds.models.architectures.from_config import spec_to_config
from das_ds.models.architectures.registry import spec_for
from das_ds.reporting.importance_stats import summarize_importance
from das_ds.softmask.importance_file import save_parameter_importance, stored_importance
from helpers.run_folders import write_unit_importance, write_weight_importance
from helpers.tiny_models import tiny_model

GENERAL = "importance_general.safetensors"
ACCUMULATED = "importance.safetensors"
ACL, PUBMED = (f"domains/{name}/importance.safetensors" for name in ("00_acl", "01_pub_med"))
MODEL = ModelConfig(name_or_path="unused")


def shorten(path: Path) -> None:
    """Leave out the last row of the token embedding, as in a file from before that token came."""
    with stored_importance(path) as stored:
        tensors = {name: stored.values(name) for name in stored.shapes}
    name = "roberta.embeddings.word_embeddings.weight"
    tensors[name] = tensors[name][:-24]
    save_parameter_importance(path, tensors, spec_for("roberta").layout(tiny_model()))


def test_summarize_importance_units_worked_example(tmp_path: Path) -> None:
    write_unit_importance(tmp_path, {GENERAL: 0.0, ACL: 0.95, PUBMED: 1.0, ACCUMULATED: 1.0})
    found = summarize_importance(tmp_path, MODEL)
    assert found is not None
    assert (found.granularity, found.threshold, found.sources) == ("unit", 0.9, ["before training", "acl", "pub_med"])
    intermediate = found.groups["intermediate"]
    assert intermediate.claimed == [0.0, 0.5, 0.5]
    assert intermediate.jaccard == [[0.0] * 3, [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    assert intermediate.cosine[0] == [0.0] * 3 and intermediate.cosine[1] == pytest.approx([0.0, 1.0, 1.0], abs=1e-6)
    assert intermediate.mask_saturation == [0.75, 0.75]


@pytest.mark.parametrize("own_table", [False, True])
def test_summarize_importance_weights_count_for_their_owner(tmp_path: Path, own_table: bool) -> None:
    layer = "layer.1.intermediate"
    sizes = write_weight_importance(
        tmp_path,
        {
            GENERAL: {"intermediate": 51},
            ACL: {"embeddings": 255},
            PUBMED: {layer: 255, "embeddings": 255},
            ACCUMULATED: {layer: 255, "embeddings": 255, "layer.0.intermediate": 51},
        },
        others=0,
    )
    section = spec_to_config(spec_for("roberta")) if own_table else None
    found = summarize_importance(
        tmp_path, ModelConfig.model_validate({"name_or_path": "unused", "architecture": section})
    )
    assert found is not None
    assert found.granularity == "parameter" and list(found.groups) == ["head", "intermediate", "output", "others"]
    assert found.groups["intermediate"].mask_saturation == [0.2, 1.0]
    assert found.groups["intermediate"].claimed == [0.0, 0.0, 0.5]
    # 0.2 in both layers against 1 in one of them, which are of one size.
    assert found.groups["intermediate"].cosine[0][2] == pytest.approx(0.5**0.5, abs=1e-6)
    assert found.groups["head"].mask_saturation == [0.0, 0.0]
    embeddings = sum(size for name, size in sizes.items() if "embeddings" in name)
    # The bias after the heads belongs to none of them.
    unowned = ("LayerNorm", "attention.output.dense.bias")
    owned = sum(size for name, size in sizes.items() if "layer." in name and not any(u in name for u in unowned))
    assert found.groups["others"].mask_saturation == [
        pytest.approx(embeddings / (sum(sizes.values()) - owned), abs=1e-6)
    ]
    assert found.groups["others"].jaccard[1][2] == 1.0


def test_summarize_importance_added_tokens_are_zero_before(tmp_path: Path) -> None:
    write_weight_importance(tmp_path, {ACL: {}, PUBMED: {}, ACCUMULATED: {}}, others=255)
    shorten(tmp_path / ACL)
    found = summarize_importance(tmp_path, MODEL)
    assert found is not None and found.sources == ["acl", "pub_med"]
    assert found.groups["others"].claimed[0] < found.groups["others"].claimed[1] == 1.0


def test_summarize_importance_without_files_is_none(tmp_path: Path) -> None:
    assert summarize_importance(tmp_path, MODEL) is None
    write_unit_importance(tmp_path, {ACL: 0.5})
    assert summarize_importance(tmp_path, MODEL) is None


def test_summarize_importance_damaged_file_is_named(tmp_path: Path) -> None:
    write_unit_importance(tmp_path, {ACL: 0.5, ACCUMULATED: 0.5})
    content = bytearray((tmp_path / ACL).read_bytes())
    content[-1] ^= 1
    (tmp_path / ACL).write_bytes(content)
    with pytest.raises(ImportanceError, match=r"00_acl/importance\.safetensors: was altered"):
        summarize_importance(tmp_path, MODEL)
