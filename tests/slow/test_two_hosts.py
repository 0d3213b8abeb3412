"""Two hosts with a network of their own: a run over two addresses, and one whose cable is pulled."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from das_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR
from helpers.commands import write_config
from helpers.resume import assert_same_run
from helpers.run_ranks import run_ranks
from helpers.runs import last_step, run_all, small_run
from helpers.two_hosts import TwoHosts, missing_requirement, two_hosts

pytestmark = pytest.mark.multirank

TRAIN = {"steps_per_domain": 100, "micro_batch_size": 2}
HANG_TIMEOUT_S = 5.0
BOUND_S = 120.0
"""Far above the time-out, for machines under load, and far below torch's own of half an hour."""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    """Two hosts and a cable between them."""
    reason = missing_requirement()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts() as joined:
        yield joined


def test_a_pulled_cable_ends_both_sides_and_a_restart_is_the_undisturbed_run(hosts: TwoHosts, tmp_path: Path) -> None:
    values = small_run(tmp_path, train=TRAIN, checkpoint={"interval": 20}, runtime={"hang_timeout": HANG_TIMEOUT_S})
    config = write_config(tmp_path, values)
    with ExitStack() as stack:
        ranks = _start(hosts, stack, config, tmp_path, "cut", port=29500)
        _wait_for_step(values["output_dir"], 30, ranks)
        hosts.plug(in_=False)
        codes = [rank.wait(BOUND_S) for rank in ranks]
    logs = [(tmp_path / f"cut-{rank}").read_text() for rank in range(2)]
    assert not {0, EXIT_USER_ERROR, EXIT_STOPPED} & set(codes), (codes, logs)
    for rank, log in enumerate(logs):
        assert f"rank {1 - rank} (pid " in log, log[-3000:]
    hosts.plug(in_=True)
    with ExitStack() as stack:
        ranks = _start(hosts, stack, config, tmp_path, "again", port=29501)
        codes = [rank.wait(BOUND_S) for rank in ranks]
    assert codes == [0, 0], (tmp_path / "again-0").read_text()[-3000:]
    run_ranks(run_all, 2, [{**values, "output_dir": tmp_path / "complete"}])
    assert_same_run(values["output_dir"], tmp_path / "complete")


def _start(
    hosts: TwoHosts, stack: ExitStack, config: Path, folder: Path, name: str, *, port: int
) -> list[subprocess.Popen[bytes]]:
    """Both ranks of a run; those that live at the end of the stack are killed."""
    ranks = []
    for rank in range(2):
        log = stack.enter_context((folder / f"{name}-{rank}").open("wb"))
        ranks.append(hosts.start(rank, log, "launch/train.py", "--config", config, port=port))
        stack.callback(ranks[-1].kill)
    return ranks


def _wait_for_step(run: Path, step: int, ranks: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + BOUND_S
    while last_step(run) < step:
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks), "the run does not train"
        time.sleep(0.1)
