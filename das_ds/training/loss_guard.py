"""When a loss is so far above the last ones that something must have gone wrong.

What to do with a step whose loss or gradient says that something has gone wrong; see `FaultsConfig`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from das_ds.config import FaultsConfig

RESOLUTION = 2.0**-20
"""Differences of losses that are mere rounding: a cross-entropy in float32 is a difference of logits of about 10, so
its error is about 1e-6 however small it is itself, and grows with it beyond 1."""


class SpikeDetector:
    """Mean mu and standard deviation sigma of the last accepted losses; a loss x is a spike if x > mu + d * sigma.

    Both are taken anew from the losses themselves, in float64 and in two passes: sums that are updated from step to
    step would drift, and a run that continues could not find the same numbers again. Sigma is divided by the number of
    losses. Where all of them are equal, or nearly, sigma counts as `RESOLUTION`, so that rounding is no spike.

    Args:
        window: number of losses; nothing is a spike before so many are known.
        deviations: d, the number of standard deviations.
    """

    def __init__(self, window: int, deviations: float) -> None:
        assert window > 1 and deviations > 0.0, f"found window {window}, deviations {deviations}"
        self._losses: deque[float] = deque(maxlen=window)
        self._window, self._deviations = window, deviations

    @property
    def mean(self) -> float:
        """Mean of the losses in the window, of which there is at least one."""
        return math.fsum(self._losses) / len(self._losses)

    @property
    def deviation(self) -> float:
        """Standard deviation of the losses in the window, of which there is at least one."""
        mean = self.mean
        return math.sqrt(math.fsum((loss - mean) ** 2 for loss in self._losses) / len(self._losses))

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss rises above what the window allows."""
        if len(self._losses) < self._window:
            return False
        mean = self.mean
        smallest = RESOLUTION * max(1.0, abs(mean))
        return loss > mean + self._deviations * max(self.deviation, smallest)

    def accept(self, loss: float) -> None:
        """Take a finite loss into the window, in place of the oldest; not to be called for a spike."""
        assert math.isfinite(loss), f"found {loss}, expected a finite loss"
        self._losses.append(loss)

    def clear(self) -> None:
        """Forget all losses."""
        self._losses.clear()

    def state(self) -> list[float]:
        """The losses in the window, oldest first."""
        return list(self._losses)

    def load(self, losses: Sequence[float]) -> None:
        """Continue from a `state`; of a longer window the newest losses count."""
        self._losses = deque(losses, maxlen=self._window)


Action = Literal["take", "skip", "stop", "rewind"]

MOST_IN_A_ROW = 20
"""Bad steps in a row that can still be accidents of single batches."""

GENTLER = "lower train.learning_rate or raise train.warmup_ratio"
REMEDIES = {
    "loss": f"{GENTLER}, clip with train.max_grad_norm or train in fp32",
    "gradient norm": f"{GENTLER}, or train in bf16 or fp32",
    "spike": f"look at the text of this step, {GENTLER}, or raise faults.spike_sigma",
}
"""What is wrong -> what helps against it."""


@dataclass(frozen=True)
class Verdict:
    """What is to become of a step."""

    action: Action
    """`take` it, `skip` it (train nothing, go on with the next batch), `stop` the run, or `rewind` to a checkpoint."""
    message: str | None = None
    """What was found and what helps, for the log and, with `stop`, for the error; None where all is well."""


class LossGuardState(BaseModel):
    """What a checkpoint has to hold of a guard."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    domain: str = ""
    losses: list[float] = []
    """Window of the detector."""
    last_bad_step: int = -1
    """Number of the newest bad step of the domain."""
    num_in_a_row: int = 0
    """Bad steps up to it without a good one between them."""
    num_rewinds: int = 0
    """Rewinds of the run."""
    left_out: list[tuple[str, int]] = []
    """Domain and number of every step that a rewind leaves out."""


class LossGuard:
    """Judges every step of a run, the same on every rank if the losses are.

    Per step: `is_skipped` before anything is computed, `check_loss` before the optimizer steps, and `check_gradient`
    where the gradient turned out not to be finite after that.

    Args:
        faults: what to do.
    """

    def __init__(self, faults: FaultsConfig) -> None:
        self._faults = faults
        self._detector = SpikeDetector(faults.spike_window, faults.spike_sigma)
        self._domain = ""
        self._last_bad_step, self._num_in_a_row, self._num_rewinds = -1, 0, 0
        self._left_out: set[tuple[str, int]] = set()

    def start_domain(self, name: str) -> None:
        """Losses of another text are on another level, so nothing that was seen of them counts."""
        self._domain, self._last_bad_step, self._num_in_a_row = name, -1, 0
        self._detector.clear()

    def is_skipped(self, step: int) -> bool:
        """Whether a rewind was to get rid of this step of the domain."""
        return (self._domain, step) in self._left_out

    def check_loss(self, loss: float, step: int, *, norm_is_finite: bool | None = None) -> Verdict:
        """Judge a step before it is taken; a good loss enters the window.

        Args:
            loss: of the whole step, over all ranks.
            step: its number in the domain.
            norm_is_finite: whether the gradient norm is; None: not known yet, or not measured.
        """
        if not math.isfinite(loss):
            return self._bad(self._faults.nonfinite, "loss", f"loss is {loss}, expected a finite number", step)
        if norm_is_finite is False:
            return self.check_gradient(step)
        if not self._detector.is_spike(loss):
            self._detector.accept(loss)
            return Verdict("take")
        found = (
            f"loss rose to {loss:.4g}, more than {self._faults.spike_sigma:g} standard deviations above the last "
            f"{self._faults.spike_window} steps (mean {self._detector.mean:.4g}, standard deviation "
            f"{self._detector.deviation:.3g})"
        )
        return self._bad(self._faults.spike, "spike", found, step)

    def check_gradient(self, step: int) -> Verdict:
        """Judge a step whose gradient norm is not finite, so that the engine did not or shall not take it."""
        return self._bad(self._faults.nonfinite, "gradient norm", "gradient norm is not finite", step)

    def state(self) -> LossGuardState:
        """For a checkpoint."""
        return LossGuardState(
            domain=self._domain,
            losses=self._detector.state(),
            last_bad_step=self._last_bad_step,
            num_in_a_row=self._num_in_a_row,
            num_rewinds=self._num_rewinds,
            left_out=sorted(self._left_out),
        )

    def load(self, state: LossGuardState) -> None:
        """Continue from a checkpoint; what this guard knows of rewinds since it was saved stays known."""
        self._domain = state.domain
        self._detector.load(state.losses)
        self._last_bad_step, self._num_in_a_row = state.last_bad_step, state.num_in_a_row
        self._num_rewinds = max(self._num_rewinds, state.num_rewinds)
        self._left_out |= set(state.left_out)

    def _bad(self, policy: str, kind: str, found: str, step: int) -> Verdict:
        found, remedy = f"{self._domain}, step {step}: {found}", REMEDIES[kind]
        # A step that is tried again, or that comes next, has no good one before it.
        follows = 0 <= step - self._last_bad_step <= 1
        self._last_bad_step, self._num_in_a_row = step, self._num_in_a_row + 1 if follows else 1
        if policy == "warn":
            return self._warn(found, remedy)
        if policy == "skip" and self._num_in_a_row < MOST_IN_A_ROW:
            return Verdict("skip", f"{found}; the step is left out")
        if policy == "rewind" and self._num_rewinds < self._faults.max_rewinds:
            self._num_rewinds += 1
            self._left_out.add((self._domain, step))
            return Verdict(
                "rewind",
                f"{found}; going back to the newest checkpoint, after which this step is left out (rewind "
                f"{self._num_rewinds} of at most {self._faults.max_rewinds})",
            )
        reasons = {
            "skip": f" for the {self._num_in_a_row}th step in a row, which leaving steps out does not mend",
            "rewind": f" after {self._num_rewinds} rewinds (faults.max_rewinds)",
        }
        return Verdict("stop", f"{found}{reasons.get(policy, '')}; {remedy}")

    def _warn(self, found: str, remedy: str) -> Verdict:
        if self._num_in_a_row < MOST_IN_A_ROW:
            return Verdict("take", f"{found}; {remedy}")
        self._num_in_a_row = 0
        self._detector.clear()
        return Verdict("take", f"{found}, for the {MOST_IN_A_ROW}th step in a row: from here on this is the usual loss")
