"""Every policy on every kind of bad step, and what survives a checkpoint and a rewind."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from das_ds.config import FaultsConfig
from das_ds.training.loss_guard import MAX_CONSECUTIVE, LossGuard, Verdict

WINDOW = 8
LOSSES = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 2.0]


def guard(*, warm: bool = True, **faults: Any) -> LossGuard:
    made = LossGuard(FaultsConfig(**{"spike_window": WINDOW, **faults}))
    made.start_domain("papers")
    for step, loss in enumerate(LOSSES if warm else [], start=1):
        assert made.check_loss(loss, step) == Verdict("accept")
    return made


def saved_state(made: LossGuard) -> Any:
    """The state of a guard as a checkpoint gives it back, from JSON."""
    return SimpleNamespace(metadata=json.loads(json.dumps(made.state_dict().metadata)))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", ["skip", "stop", "rewind"])
def test_check_loss_nonfinite_follows_policy(loss: float, policy: str) -> None:
    verdict = guard(warm=False, nonfinite=policy).check_loss(loss, 3)
    assert verdict.action == policy
    assert verdict.message is not None and verdict.message.startswith(f"papers, step 3: loss is {loss}, expected")


@pytest.mark.parametrize("policy", ["skip", "stop", "rewind"])
def test_check_gradient_nonfinite_follows_policy(policy: str) -> None:
    for verdict in (
        guard(nonfinite=policy).check_loss(2.0, 9, norm_is_finite=False),
        guard(nonfinite=policy).check_gradient(9),
    ):
        assert verdict.action == policy
        assert verdict.message is not None and verdict.message.startswith("papers, step 9: gradient norm")
    assert guard(nonfinite=policy).check_loss(2.0, 9, norm_is_finite=True) == Verdict("accept")


@pytest.mark.parametrize(
    ("policy", "action"), [("warn", "accept"), ("skip", "skip"), ("stop", "stop"), ("rewind", "rewind")]
)
def test_check_loss_spike_follows_policy_and_is_explained(policy: str, action: str) -> None:
    verdict = guard(spike=policy).check_loss(3.0, 9)
    assert verdict.action == action
    mean = np.mean(LOSSES)
    deviation = np.std(LOSSES)
    assert verdict.message is not None
    for part in ("papers, step 9", "rose to 3", f"mean {mean:.4g}", f"standard deviation {deviation:.3g})", "8 steps"):
        assert part in verdict.message


def test_stop_message_names_remedies() -> None:
    for verdict, key in (
        (guard(spike="stop").check_loss(3.0, 9), "faults.spike_sigma"),
        (guard(nonfinite="stop").check_loss(math.nan, 9), "train.max_grad_norm"),
        (guard(nonfinite="stop").check_gradient(9), "train in bf16 or fp32"),
    ):
        assert verdict.message is not None and key in verdict.message and "train.learning_rate" in verdict.message


def test_check_loss_bad_losses_stay_out_of_window() -> None:
    made = guard(spike="warn", nonfinite="skip")
    made.check_loss(3.0, 9)
    made.check_loss(math.nan, 10)
    made.check_loss(2.0, 11, norm_is_finite=False)
    assert made.state_dict().metadata["losses"] == LOSSES
    made.check_loss(2.2, 12)
    assert made.state_dict().metadata["losses"] == [*LOSSES[1:], 2.2]


def test_skip_max_consecutive_stops() -> None:
    made = guard(nonfinite="skip")
    actions = [made.check_loss(math.nan, 9 + i).action for i in range(MAX_CONSECUTIVE)]
    assert actions == ["skip"] * (MAX_CONSECUTIVE - 1) + ["stop"]


def test_skip_alternating_bad_steps_continues() -> None:
    made = guard(nonfinite="skip")
    actions = [made.check_loss(2.0 if i % 2 else math.nan, 9 + i).action for i in range(4 * MAX_CONSECUTIVE)]
    assert actions == ["skip", "accept"] * (2 * MAX_CONSECUTIVE)


def test_check_gradient_max_consecutive_stops() -> None:
    made = guard(nonfinite="skip")
    actions = []
    for step in range(9, 9 + MAX_CONSECUTIVE):
        assert made.check_loss(2.0, step).action == "accept"
        actions.append(made.check_gradient(step).action)
    assert actions == ["skip"] * (MAX_CONSECUTIVE - 1) + ["stop"]


def test_warn_persistent_level_becomes_usual() -> None:
    made = guard(spike="warn")
    verdicts = [made.check_loss(3.0, 9 + i) for i in range(MAX_CONSECUTIVE + 2 * WINDOW)]
    assert all(verdict.action == "accept" for verdict in verdicts)
    assert all(verdict.message for verdict in verdicts[:MAX_CONSECUTIVE])
    assert not any(verdict.message for verdict in verdicts[MAX_CONSECUTIVE:])
    assert "from now on this counts as the usual loss" in str(verdicts[MAX_CONSECUTIVE - 1].message)


def test_rewind_step_is_skipped_afterwards() -> None:
    made = guard(spike="rewind")
    saved = saved_state(made)
    assert not made.is_skipped(9)
    assert made.check_loss(3.0, 9).action == "rewind"
    made.load_state_dict(saved)
    assert made.is_skipped(9) and not made.is_skipped(10)
    # The step of the same number of another domain is another step.
    made.start_domain("food")
    assert not made.is_skipped(9)


def test_rewind_count_survives_load_of_older_state() -> None:
    made = guard(nonfinite="rewind", max_rewinds=2)
    saved = saved_state(made)
    for step in (9, 30):
        assert made.check_loss(math.nan, step).action == "rewind"
        made.load_state_dict(saved)
    verdict = made.check_loss(math.nan, 50)
    assert verdict.action == "stop" and "after 2 rewinds (faults.max_rewinds)" in str(verdict.message)


def test_state_dict_round_trip_through_json() -> None:
    made = guard(spike="rewind", nonfinite="skip")
    made.check_loss(math.nan, 9)
    made.check_loss(3.0, 10)
    continued = LossGuard(FaultsConfig(spike_window=WINDOW, spike="rewind", nonfinite="skip"))
    continued.load_state_dict(saved_state(made))
    assert continued.state_dict() == made.state_dict()
    assert continued.is_skipped(10) and not continued.is_skipped(9)
    assert continued.check_loss(3.0, 11) == made.check_loss(3.0, 11)


def test_start_domain_empties_window() -> None:
    made = guard(spike="stop")
    made.start_domain("food")
    assert made.check_loss(50.0, 1) == Verdict("accept")
    assert made.state_dict().metadata["losses"] == [50.0]
