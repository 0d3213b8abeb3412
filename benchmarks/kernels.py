"""Seconds, GB/s and share of the copy bandwidth of the kernels, compared with code that one would write without them.

The flat tensor is cut from a RoBERTa-base: as many of its layers as fit, from the middle of a row on, as a ZeRO
partition is. Bandwidth counts what has to be read and written at least.

Run: `python -m benchmarks.kernels [--sizes 1e6 1e7 1e8] [--repeats 10]`
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from benchmarks.result_io import default_device, print_table, write_result
from benchmarks.timing import fastest_in_turns
from das_ds.functional.masks import Segment, SegmentTable, fill_gaps
from das_ds.kernels.masked_adamw import masked_adamw_
from das_ds.kernels.masked_scale import MaskedScale
from das_ds.kernels.protection import Protection
from das_ds.kernels.soft_update import soft_update_
from das_ds.kernels.unit_gate import accumulate_, unit_gate

Form = Callable[[], object]
HIDDEN = 768
INTERMEDIATE = 3072
LAYER = (
    *((HIDDEN, HIDDEN, "rows"), (HIDDEN, 1, "rows")) * 3,
    *((HIDDEN, HIDDEN, "columns"), (HIDDEN, 1, ""), (HIDDEN, 1, ""), (HIDDEN, 1, "")),
    *((INTERMEDIATE, HIDDEN, "rows"), (INTERMEDIATE, 1, "rows")),
    *((HIDDEN, INTERMEDIATE, "rows"), (HIDDEN, 1, "rows"), (HIDDEN, 1, ""), (HIDDEN, 1, "")),
)
"""Rows, columns and masked axis of the parameters of one layer of RoBERTa-base."""
SHIFT = 1003
"""Elements that the partition lacks of its first parameter."""
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
COPY = "copy"
BYTES_PER_ELEMENT = 42
"""Peak memory: tensors and moments, DeepSpeed's moments, the mask written out, an old copy, uint8 importance."""
SLOW_TO_START = ("deepspeed", "compile")
"""Forms that are compiled on first use, for minutes: DeepSpeed's own optimizers, and torch.compile."""
POSITIONS = 128
"""Tokens of a sequence that passes the gates."""


def layer_segments(numel: int) -> tuple[Segment, ...]:
    """Segments of a partition of `numel` elements; row and column importances lie one after the other in the values."""
    segments = []
    position = 0
    value = 0
    for number, (rows, columns, axis) in enumerate(cycle(LAYER)):
        offset = SHIFT if number == 0 else 0
        length = min(rows * columns - offset, numel - position)
        where = {axis: value} if axis else {}
        segments.append(Segment(position, length, offset, columns, **where))
        position += length
        value += {"rows": rows, "columns": columns, "": 0}[axis]
        if position == numel:
            return fill_gaps(segments, numel)
    raise AssertionError("a cycle has no end")


def unit_protection(numel: int, device: torch.device) -> Protection:
    """Random unit importance over `layer_segments`."""
    segments = layer_segments(numel)
    values = torch.rand(sum(INTERMEDIATE for _ in segments), device=device)
    return Protection(numel, table=SegmentTable(numel, segments, values))


class Problem:
    """A flat tensor with gradient and moments, and every form of work on it."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self.numel = numel
        self.device = device
        self.param = torch.randn(numel, device=device)
        self.grad = torch.randn(numel, device=device)
        self.moments = torch.zeros(numel, device=device), torch.zeros(numel, device=device)
        self.step = torch.tensor(3.0, device=device)
        self.units = unit_protection(numel, device)
        levels = torch.randint(0, 256, (numel,), dtype=torch.uint8, device=device)
        self.weights = Protection(numel, importance=levels)
        self.unprotected = Protection(numel)
        self.to_dense = self.units.to_dense()

    def forms(self, without: Collection[str] = ()) -> dict[str, tuple[int, Form]]:
        """Name -> (bytes per element that have to move, work).

        Args:
            without: forms to leave out, of `SLOW_TO_START`.
        """
        old = self.grad
        grads = list(self.grad.split(-(-self.numel // 64)))
        scale = MaskedScale([_part(self.units, start, len(g)) for start, g in _starts(grads)])
        return {
            COPY: (8, lambda: self.moments[0].copy_(self.grad)),
            "AdamW: torch fused, unmasked": (28, self._fused),
            "AdamW: das_ds, unmasked": (28, lambda: self._masked(self.unprotected)),
            "AdamW: das_ds, unit mask": (28, lambda: self._masked(self.units)),
            "AdamW: das_ds, parameter mask (uint8)": (29, lambda: self._masked(self.weights)),
            "AdamW: torch fused, then a mask pass over the flat tensor": (28, self._then_pass(self._fused)),
            **({} if "deepspeed" in without else self._deepspeed_forms()),
            "AdamW: torch fused, then broadcasting per parameter": (28, self._fused_and_broadcast),
            **({} if "compile" in without else {"AdamW: torch.compile, mask written out": (32, self._compiled())}),
            "soft_update: unit mask": (12, lambda: soft_update_(self.param, old, self.units)),
            "soft_update: parameter mask (uint8)": (13, lambda: soft_update_(self.param, old, self.weights)),
            "masked_scale: unit mask, 64 tensors": (8, lambda: scale(grads)),
            **self._gate_forms(),
        }

    def _fused(self) -> None:
        adamw(
            [self.param],
            [self.grad],
            [self.moments[0]],
            [self.moments[1]],
            [],
            [self.step.clone()],
            fused=True,
            amsgrad=False,
            beta1=ADAMW["betas"][0],
            beta2=ADAMW["betas"][1],
            lr=ADAMW["lr"],
            weight_decay=ADAMW["weight_decay"],
            eps=ADAMW["eps"],
            maximize=False,
        )

    def _masked(self, protection: Protection) -> None:
        masked_adamw_(self.param, self.grad, *self.moments, protection, num_steps=4, **ADAMW)

    def _then_pass(self, step: Form) -> Form:
        """A step, and a mask of the weights' size that undoes a share of it."""

        def work() -> None:
            old = self.param.clone()
            step()
            self.param.lerp_(old, self.to_dense)

        return work

    def _deepspeed_forms(self) -> dict[str, tuple[int, Form]]:
        """DeepSpeed's own AdamW for this device, alone and with a separate mask pass."""
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        param = torch.nn.Parameter(self.param)
        param.grad = self.grad
        if self.device.type == "cuda":
            name = "FusedAdam"
            adam = FusedAdam([param], **ADAMW, adam_w_mode=True)
        else:
            name = "CPUAdam"
            adam = DeepSpeedCPUAdam([param], **ADAMW, adamw_mode=True)
        return {
            f"AdamW: DeepSpeed {name}, unmasked": (28, adam.step),
            f"AdamW: DeepSpeed {name}, then a mask pass over the flat tensor": (28, self._then_pass(adam.step)),
        }

    def _gate_forms(self) -> dict[str, tuple[int, Form]]:
        """Gates on heads of 64 features, of all rows; and their forms in eager torch."""
        num_rows = max(1, self.numel // (POSITIONS * HIDDEN))
        num_heads = HIDDEN // 64
        size = num_rows * POSITIONS * HIDDEN
        if size > self.numel:
            return {}
        x, dy = (t[:size].view(num_rows, POSITIONS, HIDDEN) for t in (self.param, self.grad))
        gate = torch.rand(1, num_heads, device=self.device)
        weights = torch.ones(num_rows, device=self.device)
        sums = torch.zeros(num_rows, num_heads, device=self.device)
        by_head = (num_rows, POSITIONS, num_heads, 64)

        def eager_measure() -> None:
            sums.add_((x * dy).view(by_head).sum(dim=(1, 3)).abs() * weights[:, None])

        return {
            "unit_gate: forward": (8, lambda: unit_gate(x, gate, 0)),
            "unit_gate: eager torch": (8, lambda: x * gate.repeat_interleave(64, dim=1)),
            "measure_gate: backward": (8, lambda: accumulate_(x, dy, sums, weights, 1)),
            "measure_gate: eager torch": (8, eager_measure),
        }

    def _fused_and_broadcast(self) -> None:
        assert self.units.table is not None
        old = self.param.clone()
        values = self.units.table.values
        self._fused()
        for segment in self.units.segments:
            # Complete rows only: what a partition cuts off would need more code and hardly more time.
            rows = segment.numel // segment.num_columns
            if not segment.is_protected or not rows:
                continue
            window = slice(segment.start, segment.start + rows * segment.num_columns)
            if segment.rows >= 0:
                importance = values[segment.rows : segment.rows + rows, None]
            else:
                importance = values[None, segment.columns : segment.columns + segment.num_columns]
            shape = (rows, segment.num_columns)
            self.param[window].view(shape).lerp_(old[window].view(shape), importance)

    def _compiled(self) -> Form:
        beta1, beta2 = ADAMW["betas"]

        @torch.compile
        def step(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, importance: Tensor) -> None:
            m.lerp_(grad, 1 - beta1)
            v.lerp_(grad * grad, 1 - beta2)
            direction = m / (1 - beta1**4) / ((v / (1 - beta2**4)).sqrt() + ADAMW["eps"])
            param.sub_(ADAMW["lr"] * (1 - importance) * (ADAMW["weight_decay"] * param + direction))

        return lambda: step(self.param, self.grad, *self.moments, self.to_dense)


def _starts(tensors: list[Tensor]) -> list[tuple[int, Tensor]]:
    starts = [0]
    for tensor in tensors[:-1]:
        starts.append(starts[-1] + len(tensor))
    return list(zip(starts, tensors, strict=True))


def _part(full: Protection, start: int, numel: int) -> Protection:
    """Protection of elements [start, start + numel) of a flat tensor."""
    assert full.table is not None
    parts = []
    for s in full.segments:
        first = max(s.start, start)
        stop = min(s.stop, start + numel)
        if first < stop:
            offset = s.offset + first - s.start
            parts.append(Segment(first - start, stop - first, offset, s.num_columns, s.rows, s.columns))
    return Protection(numel, table=SegmentTable(numel, fill_gaps(parts, numel), full.table.values))


def available_bytes(device: torch.device) -> int:
    """Memory that is free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def measure(numel: int, device: torch.device, repeats: int, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """One row per form but those of `without`."""
    forms = Problem(numel, device).forms(without)
    seconds = fastest_in_turns({name: work for name, (_, work) in forms.items()}, device, repeats=repeats)
    copy, unmasked = (seconds[name] for name in (COPY, "AdamW: torch fused, unmasked"))
    return [
        {
            "elements": numel,
            "kernel": name,
            "seconds": seconds[name],
            "GB/s": size * numel / seconds[name] / 1e9,
            "share of copy": size / 8 * copy / seconds[name],
            "over torch fused AdamW": seconds[name] / unmasked if name.startswith("AdamW") else "",
        }
        for name, (size, _) in forms.items()
    ]


@contextmanager
def compiled_apart() -> Iterator[None]:
    """DeepSpeed compiles its optimizers in a folder of its own, where no lock of a killed compilation lies."""
    with TemporaryDirectory() as folder:
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        yield


def main() -> None:
    """Measures every size that fits into memory, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7, 1e8, 1e9], help="elements")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls per form; the fastest counts")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU; as many as there are cores")
    parser.add_argument("--without", nargs="+", choices=SLOW_TO_START, default=[], help="forms to leave out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    device = default_device()
    rows = []
    with compiled_apart():
        for numel in map(int, options.sizes):
            needed = BYTES_PER_ELEMENT * numel
            if needed > available_bytes(device):
                print(f"{numel:.0e} elements left out: they need {needed / 1e9:.0f} GB")
                continue
            rows += measure(numel, device, options.repeats, options.without)
            print_table([row for row in rows if row["elements"] == numel])
            print()
    settings = {"repeats": options.repeats, "layer": "RoBERTa-base", "shift": SHIFT}
    name = f"kernels_{options.threads}_threads" if options.threads else "kernels"
    print(f"written to {write_result(name, device, settings, rows).name}")


if __name__ == "__main__":
    main()
