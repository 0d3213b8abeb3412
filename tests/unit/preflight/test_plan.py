"""Plans of runs: large models against formulas, time and cost by hand, one-line errors, and the page about clusters."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from das_ds.cli import main
from das_ds.config import RunConfig
from das_ds.config.deepspeed import build_engine_config, with_zero_stage
from das_ds.config.io import load_config
from das_ds.errors import ConfigError
from das_ds.methods import method_measured_sequences
from das_ds.models.size import MeasuredSequences
from das_ds.preflight.cluster import Cluster
from das_ds.preflight.memory import estimate_run_memory
from das_ds.preflight.plan import GIB, Plan, plan_run
from das_ds.preflight.planned_model import PlannedModel, read_model

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "guide" / "clusters.md"
GENERATED = re.compile(r"^```\n(das-ds plan [^\n]+)\n```\n\n((?:\|[^\n]*\n)+)", re.MULTILINE)
OVERHEADS = re.compile(r"^\| `(full|\d+)` \|([^\n]+)\|$", re.MULTILINE)
BILLION = 1e9


def llama(name: str) -> RunConfig:
    return load_config(ROOT / "launch" / "configs" / f"llama_{name}.yaml", [])


@cache
def model(name: str) -> PlannedModel:
    return read_model(llama(name))


def cluster(**changes: float) -> Cluster:
    values = {
        "memory_gib": 80.0,
        "peak": 1e15,
        "mfu": 0.5,
        "gpus_per_node": 8,
        "link": 450e9,
        "network": 50e9,
        "disk": 1e9,
        **changes,
    }
    return Cluster(gpu="test", **values)  # type: ignore[arg-type]


def test_sizes_of_llama() -> None:
    assert model("8b").size.total == 8_030_261_248
    assert model("70b").size.total == 70_553_706_496


def test_plan_has_the_steps_of_each_domain() -> None:
    overrides = ["domains.0.steps=3", "domains.1.tokens=1e12"]
    config = load_config(ROOT / "launch" / "configs" / "llama_8b.yaml", overrides)
    plan = plan_run(config, model("8b"), cluster(), 8)
    tokens = config.train.global_batch_size * config.data.sequence_length
    assert [domain.steps for domain in plan.domains][:2] == [3, -(-(10**12) // tokens)]
    assert plan.domains[0].tokens == 3 * tokens
    kept = load_config(ROOT / "launch" / "configs" / "llama_8b.yaml", ["train.reset_optimizer=false"])
    # Two moments in fp32 in the checkpoint that every domain keeps.
    added = plan_run(kept, model("8b"), cluster(), 8).disk.domain - plan.disk.domain
    assert added == 8 * model("8b").size.total
    in_epochs = load_config(ROOT / "launch" / "configs" / "llama_8b.yaml", ["domains.0.epochs=2"])
    with pytest.raises(ConfigError, match=r"domains.0.epochs: found 2, which are steps only once the text is read"):
        plan_run(in_epochs, model("8b"), cluster(), 8)


@pytest.mark.parametrize("num_ranks", [8, 64, 512])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["8b", "70b"])
def test_memory_of_plain_training_agrees_with_formulas(name: str, stage: int, num_ranks: int) -> None:
    """Bytes per weight, written out: bf16 weights and gradients, fp32 sums, fp32 weights and two moments."""
    config = with_zero_stage(llama(name), stage)
    sizes = model(name).size
    estimate = estimate_run_memory(config, sizes, build_engine_config(config, num_ranks), num_ranks)
    weights = sizes.total
    expected = {
        1: 2 * weights + 2 * weights + 4 * weights / num_ranks + 12 * weights / num_ranks,
        2: 2 * weights + 8 * weights / num_ranks + 12 * weights / num_ranks,
        # A billion gathered weights, or the embedding if that is larger.
        3: (2 + 8 + 12) * weights / num_ranks + 2 * max(BILLION, 128256 * (8192 if name == "70b" else 4096)),
    }[stage]
    # Buckets, and at stages 2 and 3 the gradient of the embedding before it is reduced, are beyond these formulas.
    beyond = estimate.device["buckets"] + (estimate.device["gradients"] if stage > 1 else 0)
    assert sum(estimate.device.values()) - beyond == pytest.approx(expected, rel=0.02)


def test_time_and_cost_by_hand() -> None:
    config = llama("8b")
    plan = plan_run(config, model("8b"), cluster(price=2.0), 64)
    tokens = 1024 * 2048
    # 6 operations per weight and token without the embedding, and attention of 32 layers of width 4096.
    weights = model("8b").size.total - 128256 * 4096
    flops = 6 * tokens * weights + 12 * tokens * 2048 * 32 * 4096
    assert plan.flops == pytest.approx(flops, rel=1e-3)
    assert plan.compute_seconds == pytest.approx(flops / (64 * 0.5 * 1e15), rel=1e-3)
    # Eight micro-steps: gradients once, weights for the forward and the backward pass, without the last half billion.
    sent = 63 / 64 * 2 * 8 * (3 * model("8b").size.total - 0.5 * BILLION)
    assert plan.traffic_seconds == pytest.approx(sent / 50e9, rel=0.01)
    assert plan.step_seconds == max(plan.compute_seconds, plan.traffic_seconds)
    # Seven files of 5 GB, by seven ranks.
    assert 6 * 5e9 < 4 * model("8b").size.total <= 7 * 5e9
    export = 4 * model("8b").size.total / 7 / 1e9
    seconds = 2500 * plan.step_seconds + export
    assert [domain.seconds for domain in plan.domains] == pytest.approx([seconds] * 2)
    assert plan.gpu_hours == pytest.approx(2 * 64 * seconds / 3600)
    assert plan.domains[0].cost == pytest.approx(2.0 * 64 * seconds / 3600)


def test_views_of_the_contrast_cost_three_more_passes() -> None:
    naive = plan_run(llama("8b"), model("8b"), cluster(), 8)
    config = load_config(ROOT / "launch" / "configs" / "llama_8b.yaml", ["method=das"])
    with_views = plan_run(config, model("8b"), cluster(), 8)
    plain = model("8b").flops
    assert with_views.flops == plain.total + 3 * (plain.body + plain.attention)
    assert with_views.activations > naive.activations
    assert with_views.domains[0].seconds > 2500 * with_views.step_seconds


def test_fits_leaves_a_tenth_of_the_gpu_and_checks_the_host() -> None:
    config = llama("8b")
    plan = plan_run(config, model("8b"), cluster(), 8)
    assert plan.fits(cluster(memory_gib=1.01 * plan.peak / GIB / 0.9))
    assert not plan.fits(cluster(memory_gib=0.99 * plan.peak / GIB / 0.9))
    assert plan.memory.writers == (0, 1, 2, 3, 4, 5, 6)
    assert plan.host_per_node == 8 * plan.memory.host_bytes + 7 * plan.memory.host_export
    assert not plan.fits(cluster(host_memory_gib=plan.host_per_node / GIB))
    assert plan.fits(cluster(host_memory_gib=1.2 * plan.host_per_node / GIB))


def plan_directions(name: str, rank: str | int | None, num_gpus: int, stage: int, *overrides: str) -> Plan:
    """Of masks of directions; rank None: of plain training."""
    method = "method=ncl" if rank is None else f"method={{name: directions, rank: {rank}}}"
    config = load_config(ROOT / "launch" / "configs" / f"llama_{name}.yaml", [method, *overrides])
    return plan_run(with_zero_stage(config, stage), directions_model(name, *overrides), cluster(), num_gpus)


@cache
def directions_model(name: str, *overrides: str) -> PlannedModel:
    config = load_config(ROOT / "launch" / "configs" / f"llama_{name}.yaml", ["method=directions", *overrides])
    return read_model(config)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("name", "num_gpus"), [("8b", 8), ("8b", 64), ("70b", 64)])
def test_directions_keep_within_a_tenth_of_plain_training(name: str, num_gpus: int, stage: int) -> None:
    """In every phase of a run."""
    plain = plan_directions(name, None, num_gpus, stage)
    masked = plan_directions(name, 256, num_gpus, stage)
    assert masked.peaks.keys() == plain.peaks.keys() and len(plain.peaks) == 4
    for phase, num_bytes in masked.peaks.items():
        assert num_bytes <= 1.1 * plain.peak, phase


@pytest.mark.parametrize(("rank", "cells"), OVERHEADS.findall(PAGE.read_text(encoding="utf-8")))
def test_overheads_of_the_page_are_those_of_plans(rank: str, cells: str) -> None:
    found = []
    for stage in (2, 3):
        for num_gpus in (8, 64):
            plain = plan_directions("8b", None, num_gpus, stage)
            found.append(plan_directions("8b", rank, num_gpus, stage).peak / plain.peak - 1)
    batch = "train.global_batch_size=32"
    flops = [plan_directions("8b", each, 8, 3, batch).flops for each in (None, rank)]
    found.append(flops[1] / flops[0] - 1)
    assert [cell.strip() for cell in cells.split("|")] == [f"{100 * value:.1f} %" for value in found]


def test_directions_measured_before_and_after_domains() -> None:
    """Sequences by hand: 16 groups of inputs, general text, and 64 that every rank reads."""
    sizes = directions_model("8b").size
    config = load_config(ROOT / "launch" / "configs" / "llama_8b.yaml", ["method=directions"])
    # 97 inputs of 64 MiB, LM head included, and 32 of 784 MiB: two of these and seven others fit into 2 GiB.
    assert method_measured_sequences(config, sizes, 64) == MeasuredSequences(0, 64 * 64, 16 * 512)
    overrides = ["method={name: directions, num_samples: 100}", "general={name: g, train: [g.txt]}"]
    general = load_config(ROOT / "launch" / "configs" / "llama_8b.yaml", overrides)
    assert method_measured_sequences(general, sizes, 8) == MeasuredSequences(1600 + 512, 512, 1600)
    plan = plan_directions("8b", "full", 64, 3)
    # A forward pass gathers all weights, two bytes each, for 2 sequences of every rank: longer than it computes.
    seconds = 63 / 64 * 2 * sizes.total / (2 * 64) / 50e9
    expected = [16 * 512 * seconds, (64 * 64 + 16 * 512) * seconds]
    assert [domain.measured_seconds for domain in plan.domains] == pytest.approx(expected, rel=1e-3)
    # At stage 2 there is nothing to gather: a third of the operations of as many steps.
    stage_2 = plan_directions("8b", "full", 64, 2)
    plain = directions_model("8b").flops.total / (64 * 0.5 * 1e15)
    assert stage_2.domains[0].measured_seconds == pytest.approx(16 * 512 / 1024 / 3 * plain)


def test_das_measures_general_knowledge_before_the_first_domain() -> None:
    def sequences(method: str) -> MeasuredSequences:
        config = load_config(ROOT / "launch" / "configs" / "llama_8b.yaml", [f"method={method}"])
        return method_measured_sequences(config, model("8b").size, 8)

    # Two views of each.
    assert sequences("{name: das, importance: {num_samples: 100}}") == MeasuredSequences(200, 0, 100)
    assert sequences("{name: dga, importance: {num_samples: 100}}") == MeasuredSequences(200, 0, 0)
    known = "{name: das, importance: {num_samples: 100, init_from: file.safetensors}}"
    assert sequences(known) == MeasuredSequences(0, 0, 100)
    assert sequences("{name: ewc, num_samples: 100}") == MeasuredSequences(0, 0, 100)
    assert sequences("ncl") == MeasuredSequences()


def run_plan(*arguments: str) -> int:
    return main(["plan", "--config", str(ROOT / "launch" / "configs" / "llama_8b.yaml"), *arguments])


def test_plan_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan("--gpus", "64", "--gpu-memory", "80", "--price-per-gpu-hour", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["model", "run", "cluster"]
    assert any(line.startswith("fits") and " yes: " in line for line in lines)
    assert run_plan("--gpus", "64", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] and values["gpus"] == 64 and values["nodes"] == 8 and values["zero_stage"] == 3


def test_plan_of_lora_trains_adapters_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan("--gpus", "8", "--json", "model.lora={rank: 8}") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["model"]["trained"] < 0.01 * values["model"]["total"]
    gradients = next(item for item in values["traffic"] if item["content"] == "gradients")
    # In bf16, over 64 micro-steps of 8 ranks.
    assert gradients["num_bytes"] == pytest.approx(64 * 2 * values["model"]["trained"], rel=0.01)


@pytest.mark.parametrize(
    ("method", "stage", "share"),
    [
        ("kd", 3, 1.0),
        ("{name: ncl, replay: {fraction: 0.125, loss: kl}}", 2, 0.125),
        # One row of every rank and micro-step is as much as everything.
        ("{name: ncl, replay: {fraction: 0.125, loss: kl}}", 3, 1.0),
        ("{name: ncl, replay: {fraction: 0.125}}", 3, 0.0),
    ],
)
def test_plan_counts_forward_passes_of_teacher(method: str, stage: int, share: float) -> None:
    domains = "domains=[{name: first, train: [a.txt]}, {name: second, train: [b.txt]}]"
    file = ROOT / "launch" / "configs" / "llama_8b.yaml"
    config = load_config(file, [f"method={method}", domains, "train.micro_batch_size=1"])
    plain = load_config(file, ["method=ncl", domains, "train.micro_batch_size=1"])
    found, without = (
        plan_run(with_zero_stage(run, stage), model("8b"), cluster(memory_gib=1e4), 8) for run in (config, plain)
    )
    assert found.flops - without.flops == round(share * model("8b").flops.forward)


@pytest.mark.parametrize(
    ("embeddings", "body", "attention"),
    [("true", 1 - 8 / 32 * 2 / 3, 1 - 8 / 32 * 2 / 3), ("false", 1 - 8 / 32 / 3, 1)],
)
def test_plan_of_frozen_layers(embeddings: str, body: float, attention: float) -> None:
    """Eight of 32 layers have no optimizer state; above frozen embeddings they have no backward pass either."""
    method = f"method={{name: freeze, num_layers: 8, embeddings: {embeddings}}}"
    config = load_config(ROOT / "launch" / "configs" / "llama_8b.yaml", [method])
    found = read_model(config)
    plain = model("8b")
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    frozen = 8 * layer + (128256 * 4096 if embeddings == "true" else 0)
    assert plain.size.trained - found.size.trained == frozen and found.size.total == plain.size.total
    assert sum(found.weights.frozen) == frozen and sum(found.weights.trained) == found.size.trained
    assert found.flops.body == pytest.approx(plain.flops.body * body)
    assert found.flops.attention == pytest.approx(plain.flops.attention * attention)
    assert found.flops.head == plain.flops.head
    engine = build_engine_config(config, 8)
    memory, full = (estimate_run_memory(config, size, engine, 8) for size in (found.size, plain.size))
    assert full.device["moments"] - memory.device["moments"] == 8 * frozen // 8


def test_table_names_reasons_of_impossible_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan("train.micro_batch_size=16") == 0
    text = capsys.readouterr().out
    assert (
        "(1) train.global_batch_size: found 1024, expected a multiple of train.micro_batch_size 16 x 128 ranks" in text
    )
    assert "| 128 | (1) | (1) | (1) | (1) |" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "0"], "--gpus: found 0, expected at least 1"),
        (["--gpus", "12"], "--gpus: found 12, expected at most 8 or a multiple of it (--gpus-per-node)"),
        (["--gpu", "abacus"], "--gpu: found abacus, allowed: h200, h100"),
        (["--gpu", "v100"], "--gpu: found v100, whose data sheet names no peak for train.precision bf16; allowed with"),
        (["--gpu", "h100", "--gpu-tflops", "9"], "--gpu-tflops: found 9 with --gpu h100, which has a peak"),
        (["--mfu", "1.4"], "--mfu: found 1.4, expected more than 0 and at most 1"),
        (["--mfu", "nan"], "--mfu: found nan, expected more than 0"),
        (["--gpu-memory", "-3"], "--gpu-memory: found -3, expected more than 0"),
        (["--gpu-tflops", "0"], "--gpu-tflops: found 0, expected more than 0"),
        (["--gpus-per-node", "0"], "--gpus-per-node: found 0, expected more than 0"),
        (["--link-bandwidth", "0"], "--link-bandwidth: found 0, expected more than 0"),
        (["--network-bandwidth", "0"], "--network-bandwidth: found 0, expected more than 0"),
        (["--disk-bandwidth", "0"], "--disk-bandwidth: found 0, expected more than 0"),
        (["--host-memory", "0"], "--host-memory: found 0, expected more than 0"),
        (["--price-per-gpu-hour", "-1"], "--price-per-gpu-hour: found -1, expected 0 or more"),
        (["--gpus", "512", "train.micro_batch_size=4"], "train.global_batch_size: found 1024, expected a multiple of"),
        (["--gpus", "8", "data.sequence_length=200000"], "data.sequence_length: found 200000, but this llama has"),
        (["--gpus", "8", "data.add_tokens={law: [tort]}"], "data.tokenizer: a model with random weights needs a"),
        (["--gpus", "8", "model={name_or_path: /no/such/model}"], "/no/such/model"),
    ],
)
def test_impossible_plan_is_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run_plan(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("das_ds: ") and expected in error


@pytest.mark.parametrize("command, table", GENERATED.findall(PAGE.read_text(encoding="utf-8")))
def test_table_of_the_page_is_what_the_command_prints(
    command: str, table: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == table
