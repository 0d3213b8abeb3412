"""RegMean: what is refused, and that a domain is merged once; its numbers are in `tests/smoke/test_regmean.py`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from das_ds.config.deepspeed import build_engine_config
from das_ds.context import CorpusSample, DomainContext
from das_ds.data.batch import Batch
from das_ds.distributed.resumable import ResumableLoop
from das_ds.distributed.state import ComponentState
from das_ds.errors import ConfigError
from das_ds.methods import build_method, method_measured_sequences
from das_ds.methods.regmean import RegMean
from das_ds.models.size import MeasuredSequences
from helpers.configs import make_config
from helpers.fake_run import make_run
from helpers.training import no_text_domain, random_batch
from unit.methods.test_memory import WITH_MATRICES

METHOD: dict[str, Any] = {"name": "regmean", "num_samples": 4}
GENERAL = "general={name: general, train: [unused.txt], valid: [unused.txt]}"


@pytest.mark.parametrize("value", ["0", "1.1", "-0.5"])
def test_regmean_off_diagonal_out_of_range_is_error(value: str) -> None:
    message = rf"method.off_diagonal: found {value}, allowed: number > 0 and <= 1"
    with pytest.raises(ConfigError, match=message):
        make_config("run", f"method={{name: regmean, off_diagonal: {value}}}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["model.lora={rank: 2}"],
            "model.lora: found adapters with method regmean, whose .*; expected null, or meth",
        ),
        (["method.merge.weight=0.5"], "method.merge.weight: found 0.5 with method regmean, which merges by itself; ex"),
        (["method.general=true"], "method.general: found true without training text, expected general: {train: ...}"),
    ],
)
def test_regmean_with_unsupported_settings_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_engine_config(make_config("run", "method=regmean", *changes), world_size=1)
    build_engine_config(make_config("run", "method={name: regmean, general: true}", GENERAL), world_size=1)


def test_regmean_general_generated_is_error() -> None:
    with pytest.raises(ConfigError, match=r"method.general: found 'generated', allowed: true \| false or null"):
        make_config("run", "method={name: regmean, general: generated}")


@pytest.mark.parametrize(("changes", "before"), [([], 0), ([GENERAL], 40), ([GENERAL, "method.general=false"], 0)])
def test_regmean_measures_one_sample_per_domain(changes: list[str], before: int) -> None:
    config = make_config("run", "method={name: regmean, num_samples: 40}", *changes)
    assert method_measured_sequences(config, WITH_MATRICES, 2) == MeasuredSequences(before, 0, 40)


def make_method(folder: Path, **settings: Any) -> RegMean:
    run = make_run(folder, {**METHOD, **settings})
    weights = run.engine.weights
    weights.flats = lambda: {shard.flat: shard.flat.data.view(-1) for shard in weights.shards}
    weights.writable_flats = nullcontext
    method = build_method(run)
    assert isinstance(method, RegMean)
    return method


def domain_of(folder: Path, batch: Batch) -> DomainContext:
    return replace(no_text_domain(folder), sample_batches=lambda label, **_: ResumableLoop([batch]))


def change_weights(method: RegMean) -> None:
    for parameter in method.run.engine.parameters.values():
        parameter.data.mul_(1.1)


def weights_of(method: RegMean) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in method.run.engine.parameters.items()}


def as_saved(state: ComponentState) -> Any:
    return SimpleNamespace(
        metadata=state.metadata,
        owned=lambda names: {name: state.owned[name] for name in names},
        has_sharded=lambda name: name in state.sharded,
        sharded=lambda name: state.sharded[name],
    )


def test_regmean_first_domain_is_not_merged(tmp_path: Path) -> None:
    method = make_method(tmp_path)
    domain = domain_of(tmp_path, random_batch(4, 1))
    method.before_domain(domain)
    assert method.state_dict().sharded == {}
    change_weights(method)
    trained = weights_of(method)
    method.after_domain(domain)
    assert all(value.equal(trained[name]) for name, value in weights_of(method).items())


def test_regmean_general_text_merges_first_domain_with_base(tmp_path: Path) -> None:
    general = CorpusSample("inputs of general", lambda label, **_: ResumableLoop([random_batch(4, 3)]), None)
    without, merged = make_method(tmp_path, general=False), make_method(tmp_path)
    for method, is_merged in ((without, False), (merged, True)):
        domain = replace(domain_of(tmp_path, random_batch(4, 1)), general=general)
        base = weights_of(method)
        method.before_domain(domain)
        change_weights(method)
        trained = weights_of(method)
        method.after_domain(domain)
        name = "lm_head.layer_norm.weight"
        expected = (base[name] + trained[name]) / 2 if is_merged else trained[name]
        torch.testing.assert_close(weights_of(method)[name], expected)


def test_regmean_merges_once_also_after_resuming(tmp_path: Path) -> None:
    """A checkpoint that is saved after the merge, and before the next phase, has nothing to merge."""
    method = make_method(tmp_path)
    for seed in (1, 2):
        domain = domain_of(tmp_path, random_batch(4, seed))
        method.before_domain(domain)
        change_weights(method)
        trained = weights_of(method)
        method.after_domain(domain)
    merged = weights_of(method)
    state = method.state_dict()
    assert state.sharded == {} and state.metadata["num_terms"] == 2
    assert any(not value.equal(trained[name]) for name, value in merged.items())
    method.load_state_dict(as_saved(state))
    method.after_domain(domain)
    assert all(value.equal(merged[name]) for name, value in weights_of(method).items())
    assert method.state_dict().metadata == state.metadata
