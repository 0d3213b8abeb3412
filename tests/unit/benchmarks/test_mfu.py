"""FLOPs of a step, compared with torch's count, and peaks of devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import build_model
from benchmarks.mfu import METHODS, MODELS, Workload, build_batch, build_config, build_domain, model_flops
from benchmarks.peaks import PEAK_TFLOPS, TERA, measured_peak, vendor_peak
from das_ds.models.architectures.registry import spec_for
from das_ds.models.language_model import LanguageModel
from helpers.training import random_batch


@pytest.mark.parametrize("name", ["tiny-encoder", "tiny-decoder"])
def test_model_flops_agree_with_torch(name: str) -> None:
    work = Workload(name, batch_size=3, sequence_length=24, precision="fp32", zero_stage=1, steps=1)
    model = build_model(build_config(work, "ncl"))
    spec = spec_for(model.config.model_type)
    batch = build_batch(work, spec.objective)
    # Of several implementations of attention, torch counts the one that is written out in matrix products.
    model.set_attn_implementation("eager")
    network = LanguageModel(model, spec)
    with FlopCounterMode(display=False) as counter:
        network(batch.corrupted_ids, batch.predicted, batch.targets)[1].sum().backward()
    assert model_flops(model, batch) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_model_flops_need_no_weights() -> None:
    work = Workload("llama-1.5b", batch_size=1, sequence_length=8, precision="bf16", zero_stage=1, steps=1)
    with torch.device("meta"):
        model = build_model(build_config(work, "ncl"))
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    assert 1.3e9 < num_weights < 1.6e9
    batch = build_batch(work, "clm")
    embedding = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    # The last token of the row predicts nothing.
    expected = 6 * 8 * (num_weights - embedding - head) + 6 * 7 * head
    assert model_flops(model, batch) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
    ],
)
def test_vendor_peak_known_device_has_its_peak(name: str, precision: str, tflops: float) -> None:
    assert vendor_peak(name, precision) == tflops * TERA


def test_vendor_peak_unknown_device_or_format_is_none() -> None:
    assert vendor_peak("AMD EPYC 9354", "fp32") is None
    assert vendor_peak("Tesla V100-SXM2-16GB", "bf16") is None


def test_peak_tflops_halve_with_the_width_of_the_format() -> None:
    """A number with sparsity among dense ones would be twice too large."""
    for name, peaks in PEAK_TFLOPS.items():
        if "tf32" in peaks:
            assert peaks["bf16"] == pytest.approx(2 * peaks["tf32"], rel=0.03), name


def test_measured_peak_is_plausible() -> None:
    assert measured_peak(torch.device("cpu"), "fp32", size=64) > 1e6


def test_build_config_every_method_is_valid() -> None:
    for model, method in ((model, method) for model in MODELS for method in METHODS):
        work = Workload(model, batch_size=2, sequence_length=16, precision="fp32", zero_stage=1, steps=1)
        assert build_config(work, method).method.name in ("ncl", "das", "directions")


def test_domain_has_batch_as_sample_of_any_size(tmp_path: Path) -> None:
    batch = random_batch(2, 1)
    domain = build_domain(batch, tmp_path)
    assert list(domain.sample_batches("inputs", num_samples=512)) == [batch]
    assert list(domain.sample_batches("inputs")) == [batch]
