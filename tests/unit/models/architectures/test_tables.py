"""Every registered architecture spec, verified on a tiny random model of the real class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from das_ds.errors import ModelError
from das_ds.functional.units import GROUPS, HEAD
from das_ds.models import language_model
from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.architectures.spec import has_dropout
from das_ds.models.gates import UnitGates
from das_ds.models.language_model import LanguageModel
from helpers.closed_units import (
    NEGLIGIBLE,
    Units,
    gradient_sizes,
    gradients_of_gates,
    hold_statistics,
    list_slices,
    sequence_losses,
    token_ids,
)
from helpers.matrix import record
from helpers.tiny_models import random_importance, tiny_model, without_dropout

pytestmark = pytest.mark.matrix

# (label, model type, changes of its tiny config): config switches that change the spec are tested too.
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *((model_type, model_type, {}) for model_type in ARCHITECTURES),
    ("deberta-v2 own position maps", "deberta-v2", {"share_att_key": False}),
    (
        "deberta-v2 new head",
        "deberta-v2",
        {"legacy": False, "position_biased_input": True, "conv_kernel_size": 3, "type_vocab_size": 2},
    ),
    ("modernbert without biases", "modernbert", {"attention_bias": False, "mlp_bias": False, "norm_bias": False}),
    ("gpt2 default inner size", "gpt2", {"n_inner": None}),
    ("opt post norm", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24, "enable_bias": False}),
    ("gpt_neox sequential", "gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("llama without biases", "llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}),
]
LABELS = [label for label, _, _ in VARIANTS]
# Softmax ignores what is added to all keys alike: key biases get no gradient but rounding, where no rotation or
# relative position makes a difference between them.
KEY_BIASES = ("key.bias", "k_lin.bias", "k_proj.bias", "pos_key_proj.bias", "c_attn.bias", "query_key_value.bias")
# Special tokens, positions and relative distances that the batch does not contain.
EMBEDDINGS = ("embeddings", "embed_tokens", "embed_in", "wte", "wpe", "embed_positions")


# With other seeds a ReLU of OPT is dead on the complete batch.
SEEDS = {"opt": 1}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take longer than a tiny network does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def built(label: str) -> tuple[str, nn.Module, Any]:
    """Model type, model without dropout, architecture spec."""
    _, model_type, changes = VARIANTS[LABELS.index(label)]
    model = tiny_model(model_type, seed=SEEDS.get(model_type, 0), **without_dropout(model_type), **changes)
    return model_type, model, spec_for(model_type)


@pytest.mark.parametrize("label", LABELS)
def test_spec_closed_unit_only_its_weights_lose_gradient(label: str) -> None:
    model_type, model, spec = built(label)
    if model_type == "olmo2":
        hold_statistics(model)
    layout = spec.layout(model)
    never = {where for where, size in gradient_sizes(model, spec, layout, set()).items() if size < NEGLIGIBLE}
    silent = {where.parameter for where in never}
    assert not {name for name in silent if not name.endswith(KEY_BIASES) and not any(e in name for e in EMBEDDINGS)}
    last = layout.num_layers - 1
    closings: list[Units] = []
    for group in GROUPS:
        units = layout.num_units[group]
        closings += [{(group, 0, 1)}, {(group, last, units - 1)}, {(group, last, units // 2)}]
    key_value_heads = getattr(model.config, "num_key_value_heads", None) or layout.num_units[HEAD]
    sharers = layout.num_units[HEAD] // key_value_heads
    # All query heads of one key/value head, and all of them but one.
    closings += [{(HEAD, 0, sharers + head) for head in range(count)} for count in (sharers, sharers - 1)]
    for closed in closings:
        sizes = gradient_sizes(model, spec, layout, closed)
        expected = list_slices(layout, closed)
        assert {where for where in expected if sizes[where] != 0.0} == set()
        assert {where for where, size in sizes.items() if size == 0.0} - never <= expected, closed
    if label == model_type:
        record(model_type, "rules")
        record(model_type, "units", ", ".join(str(layout.num_units[group]) for group in GROUPS))


def test_spec_shared_kv_head_keeps_gradient_until_all_queries_close() -> None:
    layout = spec_for("llama").layout(tiny_model("llama"))
    alone = {where.parameter.split(".", 3)[3] for where in list_slices(layout, {(HEAD, 0, 3)})}
    assert alone == {"self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.o_proj.weight"}
    together = list_slices(layout, {(HEAD, 0, head) for head in (3, 4, 5)})
    rows = {where.entry for where in together if where.parameter == "model.layers.0.self_attn.v_proj.weight"}
    assert rows == set(range(8, 16))


def test_spec_olmo2_qk_norms_mix_heads_by_statistics_only() -> None:
    """A closed head's rows of W_q still scale the queries of the others; nothing else of the head matters to them."""
    _, model, spec = built("olmo2")
    layout = spec.layout(model)
    closed: Units = {(HEAD, 1, head) for head in (3, 4, 5)}
    sizes = gradient_sizes(model, spec, layout, closed)
    moving = {where.parameter.split("self_attn.")[1] for where in list_slices(layout, closed) if sizes[where] != 0.0}
    assert moving == {"q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"}


@pytest.mark.parametrize("label", LABELS)
def test_spec_covers_all_parameters_and_refuses_new_one(label: str) -> None:
    model_type, model, spec = built(label)
    layout = spec.layout(model)
    assert set(layout.shapes) == {name for name, _ in model.named_parameters()}
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layout.num_layers]
    places = {name: module for name, module in model.named_modules() if module in (layers[0][1], model.base_model)}
    for name, module in places.items():
        module.register_parameter("novel", nn.Parameter(torch.ones(3)))
        with pytest.raises(
            ModelError, match=rf"{model_type} architecture spec does not know 1 parameters.*: {name}\.novel;"
        ):
            spec.layout(model)
        del module.novel
    spec.layout(model)


@pytest.mark.parametrize("label", LABELS)
def test_gates_act_on_their_rows_only(label: str) -> None:
    model_type, model, spec = built(label)
    importance = random_importance(model)
    ids = token_ids(rows=5, length=30)
    gates = UnitGates(model, spec)
    wrapped = LanguageModel(model, spec)
    nothing = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        plain, _ = wrapped(ids, nothing, nothing)
        with gates.active({g: torch.ones_like(v)[:, None] for g, v in importance.items()}, num_rows=5):
            ones, _ = wrapped(ids, nothing, nothing)
        with gates.active({g: v[:, None] for g, v in importance.items()}, num_rows=5, first_row=3):
            gated, _ = wrapped(ids, nothing, nothing)
        with gates.active({g: v[:, None] for g, v in importance.items()}, num_rows=2):
            alone, _ = wrapped(ids[3:], nothing, nothing)
    torch.testing.assert_close(ones, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gated[:3], plain[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gated[3:], alone, rtol=1e-4, atol=1e-4)
    assert ((gated[3:] - plain[3:]).abs().amax(dim=(1, 2)) > 1e-2).all()
    if label == model_type:
        record(model_type, "gates")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_dropout_gates_act_on_their_rows_only(model_type: str) -> None:
    _, model, spec = built(model_type)
    ids = token_ids()[:1].repeat(4, 1)
    nothing = torch.zeros(0, dtype=torch.int64)
    wrapped = LanguageModel(model, spec)
    torch.manual_seed(0)
    with torch.no_grad():
        plain, _ = wrapped(ids, nothing, nothing)
        with UnitGates(model, spec).noise(0.1, num_rows=4, first_row=2):
            hidden, _ = wrapped(ids, nothing, nothing)
    torch.testing.assert_close(hidden[:2], plain[:2], rtol=1e-5, atol=1e-5)
    for first, second in ((2, 0), (3, 0), (3, 2)):
        assert (hidden[first] - hidden[second]).abs().amax() > 1e-2


@pytest.mark.parametrize("label", LABELS)
def test_measure_gates_equal_autograd_per_sequence(label: str) -> None:
    _, model, spec = built(label)
    layout = spec.layout(model)
    ids = token_ids(rows=5, length=30)
    targets = ids.roll(1, dims=1)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0])
    sums = {group: torch.zeros(layout.num_layers, 5, units) for group, units in layout.num_units.items()}
    wrapped = LanguageModel(model, spec)
    with UnitGates(model, spec).measuring(sums, weights) as anchor:
        _, losses = wrapped(ids, torch.arange(ids.numel()), targets.flatten())
        torch.autograd.grad(losses.view(5, -1).mean(dim=1).sum(), anchor)
    for row in range(5):
        one = slice(row, row + 1)
        alone = gradients_of_gates(
            model, spec, lambda one=one: sequence_losses(model(ids[one]).logits, targets[one]).sum()
        )
        for group, gradient in alone.items():
            torch.testing.assert_close(sums[group][:, row], weights[row] * gradient, rtol=1e-3, atol=1e-5)
    assert all((values.amax(dim=1) > 0).all() for values in sums.values())


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("label", LABELS)
def test_language_model_losses_equal_hugging_face(label: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "positions_per_chunk", lambda vocab_size, logits_mib: chunk)
    model_type, model, spec = built(label)
    ids = token_ids(rows=5, length=30)
    targets = ids.flatten().roll(1)
    wrapped = LanguageModel(model, spec)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.flatten(0, 1)
        _, losses = wrapped(ids, torch.arange(ids.numel()), targets)
    torch.testing.assert_close(losses, nn.functional.cross_entropy(expected, targets, reduction="none"))
    if label == model_type:
        record(model_type, "logits")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_max_sequence_length_runs(model_type: str) -> None:
    model = tiny_model(model_type)
    spec = spec_for(model_type)
    longest = spec.max_sequence_length(model)
    assert longest == 38 if "roberta" in model_type else 40
    assert model(torch.full((1, longest), 7)).logits.isfinite().all()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_has_dropout_iff_two_passes_differ(model_type: str) -> None:
    spec = spec_for(model_type)
    off = without_dropout(model_type)
    ids = token_ids()
    # Every attribute of the config that could be meant, whether the table knows it or not.
    config = tiny_model(model_type).config.to_dict()
    candidates = [name for name in config if "drop" in name or "jitter" in name]
    # Layer dropout is refused; see below.
    for name in {*off, *candidates} - {"layerdrop"}:
        model = tiny_model(model_type, **{**off, name: 0.5}).train()
        first, second = (model.base_model(input_ids=ids).last_hidden_state for _ in range(2))
        assert has_dropout(model.config, spec.dropouts) == (not torch.equal(first, second)), name
    assert not has_dropout(tiny_model(model_type, **off).config, spec.dropouts)


def test_layout_unsupported_config_raises() -> None:
    for changes in ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}):
        with pytest.raises(
            ModelError, match=r"qwen3_moe architecture spec does not support models of which only some layers"
        ):
            spec_for("qwen3_moe").layout(tiny_model("qwen3_moe", **changes))
    with pytest.raises(ModelError, match=r"opt architecture spec does not support layerdrop: found 0.1, allowed: 0"):
        spec_for("opt").layout(tiny_model("opt", layerdrop=0.1))


@pytest.mark.parametrize("label", LABELS)
def test_spec_depth_is_the_first_layer_whose_output_changes(label: str) -> None:
    """Layer l is the first that a parameter of depth l + 1 changes; embeddings change the first, the head none."""
    _, model, spec = built(label)
    layers = next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList))
    assert len(layers) == model.config.num_hidden_layers == 2
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    def run() -> list[torch.Tensor]:
        outputs.clear()
        with torch.no_grad():
            model(input_ids=token_ids(3))
        return list(outputs)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    depths = spec.depths(model)
    before = run()
    for name, parameter in model.named_parameters():
        # No difference, or rounding alone: keys' biases. A convolution over embeddings enters after the first layer.
        if name.endswith(KEY_BIASES) or ".conv." in name:
            continue
        values = parameter.data.clone()
        parameter.data.add_(torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))
        changed = [not torch.allclose(x, y, atol=1e-5) for x, y in zip(before, run(), strict=True)]
        parameter.data.copy_(values)
        first = changed.index(True) + 1 if any(changed) else 3
        assert first == max(depths[name], 1), name
    for handle in handles:
        handle.remove()
    # Nothing follows the layers where norms come after them and the LM head is tied.
    assert set(depths.values()) == {0, 1, 2} | ({3} if label != "opt post norm" else set())
    assert all(depths[name] == 0 for name in depths if ".conv." in name)
