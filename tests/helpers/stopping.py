"""A loop of steps on two ranks that stops as a run does; started by a launcher: `python -m helpers.stopping FOLDER`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from das_ds.distributed.collectives import all_reduce_sum
from das_ds.distributed.flag_sync import Flags, FlagSync
from das_ds.distributed.process_group import hard_exit, init_process_group
from das_ds.errors import EXIT_STOPPED
from das_ds.fault_tolerance.shutdown import ShutdownHandler
from das_ds.run_dir import RunDir

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
STEP_S = 0.05


def main(folder: Path, save_s: float) -> int:
    """Steps until all ranks agree to stop; leaves `pid-<rank>`, then `stopped-<rank>`: the step and the reasons."""
    import torch

    ranks = init_process_group()
    flag_sync = FlagSync(ranks)
    with ShutdownHandler(RunDir(folder), SIGNALS) as handler:
        step = 0
        while True:
            step += 1
            # As in a real step, no rank gets far ahead of the others.
            all_reduce_sum(torch.ones(1))
            time.sleep(STEP_S * (1 + ranks.info.rank))
            if step == 2:
                _write(folder / f"pid-{ranks.info.rank}", str(os.getpid()))
            request = handler.poll(files=ranks.info.is_main)
            if flag_sync.exchange(Flags(stop=request.stop is not None, save=request.save)).stop:
                break
        flag_sync.wait()
        reasons = flag_sync.stop_reasons(request.stop)
        time.sleep(save_s)
        _write(folder / f"stopped-{ranks.info.rank}", f"{step}: {reasons}")
        if ranks.info.is_main:
            handler.remove_stop_file()
        ranks.barrier()
    hard_exit(EXIT_STOPPED)
    return EXIT_STOPPED


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--save-s", type=float, default=0.0)
    parser.add_argument("--local_rank")
    options = parser.parse_args()
    raise SystemExit(main(options.folder, options.save_s))
