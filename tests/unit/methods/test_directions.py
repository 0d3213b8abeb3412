"""Directions: the inputs measured, the state kept, and the networks refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from das_ds.config import LoraConfig, parse_method
from das_ds.config.deepspeed import build_engine_config
from das_ds.context import CorpusSample, DomainContext
from das_ds.data.batch import Batch
from das_ds.distributed.resumable import ResumableLoop
from das_ds.errors import ConfigError, ImportanceError, TrainingError
from das_ds.functional.projectors import Projector
from das_ds.methods import METHODS, build_method
from das_ds.methods.directions import Directions
from das_ds.methods.merge import MergingWrapper
from das_ds.models.architectures.registry import ARCHITECTURES, spec_for
from das_ds.models.loading import WEIGHTS_RECORD
from das_ds.run_dir import DIRECTIONS_FILE
from das_ds.softmask import direction, direction_moments, input_moments
from das_ds.softmask.direction import DirectionImportance
from das_ds.softmask.directions_file import save_directions
from das_ds.softmask.input_layout import InputLayout, build_input_layout
from das_ds.softmask.input_moments import default_num_samples, measure_moments
from das_ds.softmask.linear_inputs import find_masked_matrices, find_unmasked_elements
from das_ds.softmask.masked_matrix import MaskedMatrix
from helpers.architectures import causal_batch
from helpers.configs import make_config
from helpers.fake_run import make_run as make_fake_run
from helpers.training import LENGTH, no_text_domain, random_batch, rank_part

METHOD: dict[str, Any] = {"name": "directions", "half_saturation": 2.0}


def make_run(folder: Path, method: dict[str, Any] = METHOD, model_type: str = "roberta", **changes: Any) -> Any:
    return make_fake_run(folder, method, model_type, **changes)


def layout_of(run: Any) -> InputLayout:
    return build_input_layout(find_masked_matrices(run), run.engine.weights.shards, run.engine.ranks)


def save_identities(path: Path, run: Any, tokens: tuple[str, ...] = ()) -> list[str]:
    """Write a file in which every direction of every input of a run counts alike, and give the inputs."""
    layout = layout_of(run)
    moments = {name: torch.eye(width) for name, width in layout.widths.items()}
    save_directions(path, moments, layout, run.layout, run.engine.ranks, tokens)
    return list(moments)


def measured(run: Any, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Weight -> the moment of its input."""
    layout = layout_of(run)
    moments: dict[str, torch.Tensor | None] = {}
    measure_moments(run, layout, lambda _: ResumableLoop(batches), "inputs", moments)
    found = {matrix.name: moments[matrix.input] for matrix in layout.matrices}
    return {name: moment for name, moment in found.items() if moment is not None}


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
    filled = measured(run, [first])
    expected = measured(run, [alone])
    assert filled.keys() == {matrix.name for matrix in find_masked_matrices(run)}
    for name, moment in filled.items():
        torch.testing.assert_close(moment, expected[name])
    assert any(not torch.allclose(filled[n], m, rtol=1e-3) for n, m in measured(run, [full]).items())


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_second_moments_do_not_depend_on_batches(model_type: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, model_type=model_type)
    batch = (causal_batch if spec_for(model_type).objective == "clm" else random_batch)(8, 1)
    expected = measured(run, [batch])
    for num_batches in (2, 8):
        found = measured(run, [rank_part(batch, number, num_batches) for number in range(num_batches)])
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
    found = measured(run, [rank_part(batch, row, num_rows) for row in range(num_rows)])
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
        measured(run, [random_batch(2, 1)])


def test_directions_init_from_protects_first_domain(tmp_path: Path) -> None:
    inputs = save_identities(tmp_path / DIRECTIONS_FILE, make_run(tmp_path))
    method = build_method(make_run(tmp_path, {**METHOD, "init_from": str(tmp_path / DIRECTIONS_FILE)}))
    method.before_domain(no_text_domain(tmp_path))
    assert isinstance(method, Directions)
    assert method.state_dict().owned.keys() == {f"total/{name}" for name in inputs}


@pytest.mark.parametrize("has_adapter", [False, True])
def test_directions_init_from_warns_of_a_new_adapter(
    has_adapter: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What B reads depends on A."""
    save_identities(tmp_path / DIRECTIONS_FILE, make_run(tmp_path))
    run = make_run(tmp_path, {**METHOD, "init_from": str(tmp_path / DIRECTIONS_FILE)})
    lora = LoraConfig(init_from="adapter" if has_adapter else None)
    run.config = run.config.model_copy(update={"model": run.config.model.model_copy(update={"lora": lora})})
    build_method(run).before_domain(no_text_domain(tmp_path))
    expected = [
        "method.init_from: the directions of what B of an adapter reads were measured through A of the earlier run, "
        "which a new adapter does not have; expected model.lora.init_from, the adapter of that run"
    ]
    assert caplog.messages == ([] if has_adapter else expected)


def test_directions_init_from_is_checked_before_the_run(tmp_path: Path) -> None:
    """Without its moments, and also where a wrapper merges; what is altered there is found when they are read."""
    path = tmp_path / DIRECTIONS_FILE
    method = build_method(make_run(tmp_path, {**METHOD, "init_from": str(path), "merge": {"weight": 0.5}}))
    assert isinstance(method, MergingWrapper)
    with pytest.raises(ImportanceError, match=rf"{path}: cannot read directions"):
        method.on_run_start()
    save_identities(path, make_run(tmp_path, intermediate_size=48))
    with pytest.raises(ImportanceError, match=rf"{path}: importance of another model"):
        method.on_run_start()
    save_identities(path, make_run(tmp_path))
    method.on_run_start()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ImportanceError, match=rf"{path}: cannot read directions"):
        method.on_run_start()


@pytest.mark.parametrize(("num_measured", "num_masked"), [(90, 90), (95, 100)])
def test_directions_init_from_tokens_without_text_are_not_masked(
    num_measured: int, num_masked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of tokens that the tokenizer has gained since; where it has gained none, rows without token are masked."""
    path = tmp_path / DIRECTIONS_FILE
    tokens = tuple(f"token {number}" for number in range(95))
    save_identities(path, make_run(tmp_path), tokens[:num_measured])
    run = make_run(tmp_path, {**METHOD, "init_from": str(path)})
    run.tokens = tokens
    masked: list[MaskedMatrix] = []
    monkeypatch.setattr(direction, "mask_directions", lambda _, matrices, *args, **kwargs: masked.extend(matrices))
    method = build_method(run)
    method.before_domain(no_text_domain(tmp_path))
    method.on_train_start(no_text_domain(tmp_path))
    rows = {matrix.name: matrix.num_outputs for matrix in masked}
    assert rows["roberta.embeddings.word_embeddings.weight"] == num_masked


@pytest.mark.parametrize("is_tied", [True, False])
def test_find_unmasked_elements_are_all_but_matrices_and_token_tables(is_tied: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path, tie_word_embeddings=is_tied)
    matrices = {matrix.parameter for matrix in find_masked_matrices(run)}
    table = "roberta.embeddings.word_embeddings.weight"
    assert (table in matrices) is is_tied
    expected = {n: p.numel() for n, p in run.engine.parameters.items() if n not in matrices and n != table}
    assert {"lm_head.bias", "roberta.embeddings.position_embeddings.weight"} < expected.keys()
    assert find_unmasked_elements(run) == expected
    # Without tied embeddings the bias is another parameter.
    bias = "lm_head.bias" if is_tied else "lm_head.decoder.bias"
    assert find_unmasked_elements(run, 90) == {**expected, bias: 90}


def test_find_unmasked_elements_of_adapters_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    adapters = {matrix.parameter for matrix in find_masked_matrices(run)}
    run.engine.parameters = {name: p for name, p in run.engine.parameters.items() if name in adapters}
    assert find_unmasked_elements(run) == {}


@pytest.mark.parametrize("freezes", [True, False])
def test_unmasked_parameters_are_frozen_once_there_is_something_to_protect(
    freezes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, {**METHOD, "freeze_unmasked": freezes})
    frozen: list[dict[str, int]] = []
    monkeypatch.setattr(direction, "mask_directions", lambda *args, **kwargs: frozen.append(kwargs["frozen"]))
    method = build_method(run)
    assert isinstance(method, Directions)
    method.on_train_start(no_text_domain(tmp_path))
    assert not frozen
    layout = layout_of(run)
    moments: dict[str, torch.Tensor | None] = {name: torch.eye(width) for name, width in layout.widths.items()}
    method._importance = DirectionImportance(run, layout, moments, None)
    method.on_train_start(no_text_domain(tmp_path))
    assert frozen == [find_unmasked_elements(run) if freezes else {}]


def test_nothing_stays_masked_after_a_return_to_a_domain_with_nothing_to_protect(tmp_path: Path) -> None:
    """As in a rollback, where only an earlier domain has a valid checkpoint."""
    run = make_run(tmp_path)
    states: dict[str, Any] = {"masks": "earlier", "gradient_mask": "earlier", "frozen": "earlier"}
    for name in states:
        setattr(run.engine, f"set_{name}", lambda value, name=name: states.update({name: value}))
    method = build_method(run)
    assert isinstance(method, Directions)
    saved: Any = SimpleNamespace(metadata={"is_prepared": True})
    method.load_state_dict(saved)
    method.on_train_start(no_text_domain(tmp_path))
    assert states == {"masks": {}, "gradient_mask": None, "frozen": {}}


def test_general_text_is_protected_from_first_domain_on(tmp_path: Path) -> None:
    """Its moments come before those of any domain, are added to an earlier run's, and are not measured again."""
    run = make_run(tmp_path)
    general = random_batch(4, 3)
    sample = CorpusSample("inputs of general", lambda label, **_: ResumableLoop([general]), None)
    domain = replace(no_text_domain(tmp_path), general=sample)
    method = build_method(run)
    assert isinstance(method, Directions)
    method.before_domain(domain)
    assert method._importance is not None
    expected = measured(run, [general])
    for name, moment in method._importance.moments.items():
        torch.testing.assert_close(moment, expected[name])
    first = method._importance
    method.before_domain(domain)
    assert method._importance is first


@pytest.mark.parametrize(
    ("drawn", "warmup", "warns"),
    [(["lm_head.bias", "lm_head.dense.weight"], 0, True), ([], 0, False), (["a"], 5, False)],
)
def test_general_text_with_random_weights_warns(
    drawn: list[str], warmup: int, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path)
    setattr(run.network.model.config, WEIGHTS_RECORD, {"drawn": drawn})
    model = run.config.model.model_copy(update={"head_warmup_steps": warmup})
    run.config = run.config.model_copy(update={"model": model})
    sample = CorpusSample("inputs of general", lambda label, **_: ResumableLoop([random_batch(4, 3)]), None)
    build_method(run).before_domain(replace(no_text_domain(tmp_path), general=sample))
    message = (
        "method.general: protects general text from the first step on, but no file held lm_head.bias and 1 more, which "
        "have random values and learn behind the masks; set model.head_warmup_steps, or method.general=false"
    )
    assert caplog.messages == ([message] if warns else [])


def test_generated_text_is_protected_in_place_of_general_text(tmp_path: Path) -> None:
    replay = {"fraction": 0.5, "source": "generated"}
    run = make_run(tmp_path, {**METHOD, "general": "generated", "replay": replay})
    generated = random_batch(4, 3)
    samples = [
        CorpusSample(label, lambda label, batch=batch, **_: ResumableLoop([batch]), None)
        for label, batch in (("general", random_batch(4, 5)), ("generated", generated))
    ]
    method = build_method(run)
    assert isinstance(method, Directions)
    method.before_domain(replace(probed_domain(tmp_path), general=samples[0], generated=samples[1]))
    assert method._importance is not None
    expected = measured(run, [generated])
    for name, moment in method._importance.moments.items():
        torch.testing.assert_close(moment, expected[name])
    plasticity = method.plasticity()
    assert plasticity is not None and plasticity.protected == ["generated text"]


def test_general_text_is_ignored_on_request(tmp_path: Path) -> None:
    run = make_run(tmp_path, {**METHOD, "general": False})
    sample = CorpusSample("inputs of general", lambda label, **_: ResumableLoop([random_batch(4, 3)]), None)
    method = build_method(run)
    assert isinstance(method, Directions)
    method.before_domain(replace(no_text_domain(tmp_path), general=sample))
    assert method._importance is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method={name: directions, general: true}"], "method.general: found true without training text"),
        (
            ["method={name: directions, general: true}", "general={name: general, valid: [unused.txt]}"],
            "method.general: found true without training text",
        ),
        (
            ["method={name: directions, general: generated}"],
            "method.general: found generated where nothing is generated before the first domain, expected "
            "method.replay.source generated or both, and a fraction",
        ),
        (
            ["method={name: directions, apply_to: gradient}", "train.optimizer=lion"],
            "method.apply_to: found gradient with train.optimizer: lion",
        ),
    ],
)
def test_directions_without_text_or_optimizer_is_refused(changes: list[str], message: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, *changes)
    with pytest.raises(ConfigError, match=message):
        Directions.validate(config, build_engine_config(config, 1))


def test_queries_keys_and_values_share_one_input(tmp_path: Path) -> None:
    matrices = find_masked_matrices(make_run(tmp_path))
    prefix = "roberta.encoder.layer.1.attention.self."
    inputs = {matrix.name.removeprefix(prefix): matrix.input for matrix in matrices if prefix in matrix.name}
    assert inputs == dict.fromkeys((f"{kind}.weight" for kind in ("query", "key", "value")), f"{prefix}query.weight")
    # Two layers of four inputs, the LM head's dense layer, and its decoder.
    assert len({matrix.input for matrix in matrices}) == 10


@pytest.mark.parametrize("budget", [1, 3 * 4 * 24**2, 4 * (24**2 + 40**2)])
def test_several_passes_equal_one_bitwise(budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    batches = [random_batch(4, seed) for seed in range(3)]
    expected = measured(run, batches)
    monkeypatch.setattr(input_moments, "SUMS_BYTES", budget)
    labels: list[str] = []

    def start(label: str) -> ResumableLoop[Batch]:
        labels.append(label)
        return ResumableLoop(batches)

    layout = layout_of(run)
    found: dict[str, torch.Tensor | None] = {}
    measure_moments(run, layout, start, "inputs", found)
    assert len(labels) > 1 and labels[0] == f"inputs, part 1 of {len(labels)}"
    for matrix in layout.matrices:
        moment = found[matrix.input]
        assert moment is not None and moment.equal(expected[matrix.name])


def test_measured_inputs_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes in a later pass finds those before it complete, and reads the sample for the others only."""
    monkeypatch.setattr(input_moments, "SUMS_BYTES", 3 * 4 * 24**2)
    run = make_run(tmp_path)
    layout = layout_of(run)
    batches = [random_batch(4, 1)]
    all_labels: list[str] = []
    labels: list[str] = []
    complete: dict[str, torch.Tensor | None] = {}
    loops: list[ResumableLoop[Batch]] = []

    def start(label: str) -> ResumableLoop[Batch]:
        all_labels.append(label)
        loops.append(ResumableLoop(batches))
        return loops[-1]

    measure_moments(run, layout, start, "inputs", complete)
    # The sums are gone as soon as their owners have them.
    assert all(loop.accumulators == {} for loop in loops)
    resumed = dict(list(complete.items())[:3])
    measure_moments(run, layout, lambda label: labels.append(label) or ResumableLoop(batches), "inputs", resumed)
    assert labels == all_labels[1:]
    for name, moment in resumed.items():
        again = complete[name]
        assert moment is not None and again is not None and moment.equal(again)


@pytest.mark.parametrize(
    ("widest", "length", "expected"), [(1536, 64, 512), (14_336, 2048, 512), (14_336, 512, 560), (768, 1, 15_360)]
)
def test_default_sample_has_20_tokens_per_width(widest: int, length: int, expected: int) -> None:
    assert default_num_samples(widest, length) == expected


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


def protecting(folder: Path, strength: float, **settings: Any) -> Directions:
    """A method that protects every direction of every input alike: P = c / (c + strength) I."""
    method = build_method(make_run(folder, {**METHOD, "over_domains": "sum", **settings}))
    assert isinstance(method, Directions)
    moments: dict[str, torch.Tensor | None] = {n: strength * torch.eye(w) for n, w in method._inputs.widths.items()}
    method._importance = DirectionImportance(method.run, method._inputs, moments, None)
    method._is_prepared = True
    return method


def probed_domain(folder: Path) -> DomainContext:
    return replace(no_text_domain(folder), probe_batches=lambda label, number: ResumableLoop([random_batch(2, number)]))


def test_plasticity_of_equal_directions_is_their_factor(tmp_path: Path) -> None:
    method = protecting(tmp_path, 6.0)
    assert method.plasticity() is None
    method.before_domain(probed_domain(tmp_path))
    measured = method.plasticity()
    # c = 2: a quarter of any update passes, and a sixteenth of any energy.
    assert measured is not None and measured.domain == "domain" and measured.after is None
    assert measured.before.plasticity == pytest.approx(1 / 4)
    assert measured.before.passing == pytest.approx(1 / 16)
    assert sum(group.num_inputs for group in measured.before.groups.values()) == 10


def test_plasticity_of_the_mean_is_that_of_one_domain(tmp_path: Path) -> None:
    # Six domains that use every direction alike: the sum is 6 I, the mean I.
    method = protecting(tmp_path, 6.0, over_domains="mean")
    method.before_domain(probed_domain(tmp_path))
    measured = method.plasticity()
    assert measured is not None and measured.before.plasticity == pytest.approx(2 / 3)
    assert measured.before.passing == pytest.approx(4 / 9)
    assert measured.form is not None and "half_saturation 2, mean over domains" in measured.form
    method._measure_protected(no_text_domain(tmp_path), method._importance.moments)
    after = method.plasticity()
    assert after is not None and after.after is not None and after.after.plasticity == pytest.approx(2 / 3)


@pytest.mark.parametrize("index", [0, 1])
def test_plasticity_names_what_is_protected_and_how(index: int, tmp_path: Path) -> None:
    """In the order in which it was added: a file, general text, earlier domains."""
    save_identities(tmp_path / "earlier.safetensors", make_run(tmp_path))
    settings = {**METHOD, "init_from": str(tmp_path / "earlier.safetensors"), "rank": 2}
    run = make_run(tmp_path, settings)
    first = run.config.domains[0]
    general = first.model_copy(update={"name": "general", "train": ["general.txt"]})
    run.config = run.config.model_copy(update={"general": general})
    method = build_method(run)
    assert isinstance(method, Directions)
    method._is_prepared = True
    method.before_domain(replace(probed_domain(tmp_path), index=index))
    measured = method.plasticity()
    assert measured is not None
    assert measured.protected == ["earlier.safetensors", "general", first.name][: 2 + index]
    assert measured.form == (
        "masks on gradient and update, half_saturation 2, mean over domains, rank 2; biases, normalization and "
        "positions are frozen"
    )


def test_plasticity_nothing_learned_is_all(tmp_path: Path) -> None:
    method = build_method(make_run(tmp_path))
    method.before_domain(probed_domain(tmp_path))
    measured = method.plasticity()
    assert measured is not None and measured.before.plasticity == measured.before.passing == 1.0


def test_plasticity_domain_without_text_has_no_energy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method = protecting(tmp_path, 1e6)
    method.before_domain(no_text_domain(tmp_path))
    measured = method.plasticity()
    assert measured is not None and measured.before.passing is None and caplog.messages == []


@pytest.mark.parametrize(
    ("over_domains", "passing", "advice"),
    [
        ("sum", "6.2%", ", method.over_domains: mean, fewer earlier domains in the sum (method.init_from, "
         "method.general), or"),
        # Fewer domains in a mean leave no more.
        ("mean", "44.4%", " or"),
    ],
)  # fmt: skip
def test_little_passing_energy_warns_once(
    over_domains: str, passing: str, advice: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = protecting(tmp_path, 6.0, min_passing=0.5, over_domains=over_domains)
    method.before_domain(probed_domain(tmp_path))
    method._importance = None
    method.on_train_start(probed_domain(tmp_path))
    assert caplog.messages == [
        f"method.min_passing: {passing} of the input energy of domain passes the masks of earlier domains, expected at "
        f"least 50%; it may learn little. Use a larger method.half_saturation (now 2){advice} a higher "
        "train.learning_rate"
    ]


@pytest.mark.parametrize("min_passing", [0.06, None])
def test_enough_passing_energy_or_no_limit_does_not_warn(
    min_passing: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    protecting(tmp_path, 6.0, min_passing=min_passing).before_domain(probed_domain(tmp_path))
    assert caplog.messages == []


def test_owners_compute_next_projector_before_they_wait_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    layout = layout_of(run)
    # The second and third input belong to other ranks.
    names = list(layout.widths)[:4]
    moments = {name: None if number in (1, 2) else torch.eye(24) for number, name in enumerate(names)}
    events: list[str] = []
    monkeypatch.setattr(direction_moments, "share_projector", lambda own, *_: events.append(f"share {own}") or own)
    importance = DirectionImportance(run, layout, moments, None)
    found = importance.projectors(lambda _: events.append("compute") or "P")  # type: ignore[arg-type, func-returns-value]
    assert [name for name, _ in found] == [names[0], names[3]]
    assert events == ["compute", "share P", "compute", "share None", "share None", "share P"]


@pytest.mark.parametrize(
    ("latest", "earlier", "expected"), [(90, 95, 95), (95, 90, 95), (None, 90, None), (90, None, None)]
)
def test_sum_of_moments_has_every_token_of_either(
    latest: int | None, earlier: int | None, expected: int | None, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    layout = layout_of(run)
    first, second = (DirectionImportance(run, layout, {}, number) for number in (latest, earlier))
    assert first.accumulate(second).num_tokens == expected


def test_projectors_are_computed_once_for_measuring_and_masking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    masked: list[Any] = []
    build_projector = direction_moments.build_projector
    monkeypatch.setattr(
        direction_moments, "build_projector", lambda m, *a: made.append(len(m)) or build_projector(m, *a)
    )
    monkeypatch.setattr(DirectionImportance, "mask", lambda self, projectors, **_: masked.append(projectors))
    method = protecting(tmp_path, 6.0)
    method.before_domain(probed_domain(tmp_path))
    method.on_train_start(probed_domain(tmp_path))
    assert len(made) == len(masked[0]) == 10 and method._projectors is None
    # A run that continues within the domain has to compute them again, but measures nothing.
    method.on_train_start(probed_domain(tmp_path))
    assert len(made) == 20 and masked[1].keys() == masked[0].keys()


@pytest.mark.parametrize("num_domains", [1, 2])
def test_projectors_may_take_any_time(num_domains: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every hook, also after the last domain: the hang watchdog sees no progress meanwhile."""
    work: list[str] = []
    made: list[str] = []

    @contextmanager
    def suspend(location: str) -> Iterator[None]:
        work.append(location)
        yield
        work.pop()

    def counted(moment: torch.Tensor, *args: Any) -> Projector:
        made.append(work[-1] if work else "under the watchdog")
        return build_projector(moment, *args)

    build_projector = direction_moments.build_projector
    monkeypatch.setattr(direction_moments, "build_projector", counted)
    method = protecting(tmp_path, 6.0)
    monkeypatch.setattr(DirectionImportance, "mask", lambda *_, **__: None)
    method.run.config = method.run.config.model_copy(update={"domains": [method.run.config.domains[0]] * num_domains})
    sample = replace(probed_domain(tmp_path), suspend_timeout=suspend)
    domain = replace(sample, sample_batches=lambda label, **_: ResumableLoop([random_batch(2, 0)]))
    method.before_domain(domain)
    method.on_train_start(domain)
    # A run that continues within the domain.
    method.on_train_start(domain)
    method.after_domain(domain)
    assert made == 3 * 10 * ["computing projectors"]


def test_plasticity_is_saved_with_the_state_and_missing_in_older_ones(tmp_path: Path) -> None:
    method = protecting(tmp_path, 6.0)
    method.before_domain(probed_domain(tmp_path))
    state = method.state_dict()
    saved: Any = SimpleNamespace(
        metadata=state.metadata, owned=lambda names: {name: state.owned[name] for name in names}
    )
    resumed = build_method(make_run(tmp_path))
    resumed.load_state_dict(saved)
    assert resumed.plasticity() == method.plasticity() is not None
    del saved.metadata["plasticity"]
    resumed.load_state_dict(saved)
    assert resumed.plasticity() is None


def test_merging_passes_plasticity_on(tmp_path: Path) -> None:
    method = MergingWrapper(protecting(tmp_path, 6.0), 0.5)
    method._method.before_domain(probed_domain(tmp_path))
    assert method.plasticity() == method._method.plasticity() is not None
