"""Loss guard: detects loss spikes and non-finite losses, and decides what to do with such a step (`FaultsConfig`)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from das_ds.config import FaultsConfig
from das_ds.distributed.state import ComponentState, SavedComponentState

RESOLUTION = 2.0**-20
"""Differences of losses that are mere rounding: a cross-entropy in float32 is a difference of logits of about 10, so
its error is about 1e-6 however small it is itself, and grows with it beyond 1."""


class SpikeDetector:
    """Mean mu and standard deviation sigma of the last accepted losses; a loss x is a spike if x > mu + d * sigma.

    Both are computed from the losses in the window at every step, in float64 and in two passes: running sums would
    drift, and a resumed run could not reproduce them. Sigma is the population standard deviation (divided by the number
    of losses), and at least `RESOLUTION`, so that rounding is no spike where all losses are nearly equal.

    Args:
        window: number of losses; there are no spikes until the window is full.
        deviations: d, the number of standard deviations.
    """

    def __init__(self, window: int, deviations: float) -> None:
        assert window > 1 and deviations > 0.0, f"found window {window}, deviations {deviations}"
        self._losses: deque[float] = deque(maxlen=window)
        self._window = window
        self._deviations = deviations

    @property
    def mean(self) -> float:
        """Mean of the losses in the window, which is not empty."""
        return math.fsum(self._losses) / len(self._losses)

    @property
    def deviation(self) -> float:
        """Standard deviation of the losses in the window, which is not empty."""
        mean = self.mean
        return math.sqrt(math.fsum((loss - mean) ** 2 for loss in self._losses) / len(self._losses))

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss exceeds mu + d * sigma."""
        if len(self._losses) < self._window:
            return False
        mean = self.mean
        resolution = RESOLUTION * max(1.0, abs(mean))
        return loss > mean + self._deviations * max(self.deviation, resolution)

    def accept(self, loss: float) -> None:
        """Add a finite loss to the window, in place of the oldest; not to be called for a spike."""
        assert math.isfinite(loss), f"found {loss}, expected a finite loss"
        self._losses.append(loss)

    def clear(self) -> None:
        """Forget all losses."""
        self._losses.clear()

    def state(self) -> list[float]:
        """The losses in the window, oldest first."""
        return list(self._losses)

    def load(self, losses: Sequence[float]) -> None:
        """Restore a `state`; of a longer window only the newest losses count."""
        self._losses = deque(losses, maxlen=self._window)


Action = Literal["accept", "skip", "stop", "rewind"]

MAX_CONSECUTIVE = 20
"""Consecutive bad steps from which on they can no longer be accidents of single batches."""

GENTLER = "lower train.learning_rate or raise train.warmup_ratio"
REMEDIES = {
    "loss": f"{GENTLER}, clip with train.max_grad_norm or train in fp32",
    "gradient norm": f"{GENTLER}, or train in bf16 or fp32",
    "spike": f"look at the text of this step, {GENTLER}, or raise faults.spike_sigma",
}
"""Kind of problem -> remedy."""


@dataclass(frozen=True)
class Verdict:
    """Decision on a step."""

    action: Action
    """`accept` the step, `skip` it (continue with the next batch), `stop` the run, or `rewind` to a checkpoint."""
    message: str | None = None
    """Problem and remedy, for the log and, with `stop`, for the error; None where there is no problem."""


class LossGuardState(BaseModel):
    """State of a guard in checkpoints."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    domain: str = ""
    losses: list[float] = []
    """Window of the detector."""
    last_bad_step: int = -1
    """Number of the newest bad step of the domain."""
    num_consecutive: int = 0
    """Consecutive bad steps up to it."""
    num_rewinds: int = 0
    """Rewinds of the run."""
    skipped: list[tuple[str, int]] = []
    """Domain and number of every step that is skipped after a rewind."""


class LossGuard:
    """Checks every step of a run; ranks with equal losses decide equally.

    Per step: `is_skipped` before anything is computed, `check_loss` before the optimizer steps, and `check_gradient` if
    the gradient turns out not to be finite after that.

    Args:
        faults: the policy for each kind of problem.
    """

    def __init__(self, faults: FaultsConfig) -> None:
        self._faults = faults
        self._detector = SpikeDetector(faults.spike_window, faults.spike_sigma)
        self._domain = ""
        self._last_bad_step = -1
        self._num_consecutive = 0
        self._num_rewinds = 0
        self._skipped: set[tuple[str, int]] = set()

    def start_domain(self, name: str) -> None:
        """Forget the losses of the domain before, which have another mean."""
        self._domain = name
        self._last_bad_step = -1
        self._num_consecutive = 0
        self._detector.clear()

    def is_skipped(self, step: int) -> bool:
        """Whether the run was rewound because of this step of the domain."""
        return (self._domain, step) in self._skipped

    def check_loss(self, loss: float, step: int, *, norm_is_finite: bool | None = None) -> Verdict:
        """Check a step before the optimizer steps; an accepted loss enters the window.

        Args:
            loss: mean over the step, all ranks included.
            step: its number in the domain.
            norm_is_finite: whether the gradient norm is finite; None: not measured, or not yet.
        """
        if not math.isfinite(loss):
            return self._handle(self._faults.nonfinite, "loss", f"loss is {loss}, expected a finite number", step)
        if norm_is_finite is False:
            return self.check_gradient(step)
        if not self._detector.is_spike(loss):
            self._detector.accept(loss)
            return Verdict("accept")
        problem = (
            f"loss rose to {loss:.4g}, more than {self._faults.spike_sigma:g} standard deviations above the last "
            f"{self._faults.spike_window} steps (mean {self._detector.mean:.4g}, standard deviation "
            f"{self._detector.deviation:.3g})"
        )
        return self._handle(self._faults.spike, "spike", problem, step)

    def check_gradient(self, step: int) -> Verdict:
        """Decide on a step whose gradient norm is not finite, and which the engine therefore does not apply."""
        return self._handle(self._faults.nonfinite, "gradient norm", "gradient norm is not finite", step)

    def state_dict(self) -> ComponentState:
        """A `LossGuardState` as metadata."""
        state = LossGuardState(
            domain=self._domain,
            losses=self._detector.state(),
            last_bad_step=self._last_bad_step,
            num_consecutive=self._num_consecutive,
            num_rewinds=self._num_rewinds,
            skipped=sorted(self._skipped),
        )
        return ComponentState(metadata=state.model_dump(mode="json"))

    def load_state_dict(self, saved: SavedComponentState) -> None:
        """Restore a checkpoint; rewinds since it was saved stay counted, and the steps they skip stay skipped."""
        state = LossGuardState.model_validate(saved.metadata)
        self._domain = state.domain
        self._detector.load(state.losses)
        self._last_bad_step = state.last_bad_step
        self._num_consecutive = state.num_consecutive
        self._num_rewinds = max(self._num_rewinds, state.num_rewinds)
        self._skipped |= set(state.skipped)

    def _handle(self, policy: str, kind: str, problem: str, step: int) -> Verdict:
        """Apply the policy to a bad step."""
        found = f"{self._domain}, step {step}: {problem}"
        remedy = REMEDIES[kind]
        # A difference of 0 is a step that is checked again, after its gradient or a rewind.
        is_consecutive = 0 <= step - self._last_bad_step <= 1
        self._num_consecutive = self._num_consecutive + 1 if is_consecutive else 1
        self._last_bad_step = step
        if policy == "warn":
            return self._warn(found, remedy)
        if policy == "skip" and self._num_consecutive < MAX_CONSECUTIVE:
            return Verdict("skip", f"{found}; the step is skipped")
        if policy == "rewind" and self._num_rewinds < self._faults.max_rewinds:
            self._num_rewinds += 1
            self._skipped.add((self._domain, step))
            return Verdict(
                "rewind",
                f"{found}; going back to the latest checkpoint, after which this step is skipped (rewind "
                f"{self._num_rewinds} of at most {self._faults.max_rewinds})",
            )
        reasons = {
            "skip": f" for {self._num_consecutive} consecutive steps; skipping steps does not help",
            "rewind": f" after {self._num_rewinds} rewinds (faults.max_rewinds)",
        }
        return Verdict("stop", f"{found}{reasons.get(policy, '')}; {remedy}")

    def _warn(self, found: str, remedy: str) -> Verdict:
        if self._num_consecutive < MAX_CONSECUTIVE:
            return Verdict("accept", f"{found}; {remedy}")
        self._num_consecutive = 0
        self._detector.clear()
        return Verdict(
            "accept", f"{found}, for {MAX_CONSECUTIVE} consecutive steps: from now on this counts as the usual loss"
        )
