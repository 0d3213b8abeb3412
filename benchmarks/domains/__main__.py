"""Compare methods over real domains: `python -m benchmarks.domains cpu` or `gpu`.

Corpora are read from the folder that `DAS_DS_DATA` names. What is broken off goes on with the same command.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.domains import data
from benchmarks.domains.benchmark import Benchmark
from benchmarks.domains.plan import NAIVE, Tier
from benchmarks.domains.result_file import read_result_file, result_path
from benchmarks.domains.resume_results import check_tier
from benchmarks.domains.runner import Runner
from benchmarks.domains.tiers import TIERS
from benchmarks.result_io import default_device
from das_ds.engine.loss_scaler import emulated_precision_warning
from das_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, ConfigError, DasError, StoppedError

FOLDER = Path("runs/domains")


def main(arguments: list[str] | None = None) -> int:
    """Run a tier; a user's error is one line and exit code 2, a stop for want of time exit code 75."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domains", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tier", choices=TIERS, help="size of the benchmark")
    parser.add_argument("--minutes", type=float, help="save and end after so many; default: when all is done")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"of base models and runs; default: {FOLDER}")
    parser.add_argument("--only", action="append", default=[], metavar="LABEL", help="a variant, may be repeated")
    parser.add_argument("--extend", type=Path, metavar="RESULT", help="results whose runs are not made again")
    parser.add_argument("--output", type=Path, help="result file; default: benchmarks/results/domains_<tier>_<device>")
    options = parser.parse_args(arguments)
    try:
        tier = only(TIERS[options.tier], options.only)
        run(tier, options.folder.resolve(), options.minutes, options.output, options.extend)
    except StoppedError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except DasError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def run(tier: Tier, folder: Path, minutes: float | None, output: Path | None, extend: Path | None = None) -> None:
    """The whole tier.

    Raises:
        DasError: corpora that are missing, results to extend that are of another tier, a number format that this device
            computes in software, or anything that fails on the way.
        StoppedError: time is up.
    """
    known = None if extend is None else read_result_file(extend)
    if known is not None:
        check_tier(known, tier)
    corpora = data.data_folder()
    data.check_files(corpora, [data.GENERAL, *tier.corpora], data.TASKS if tier.task_variants else ())
    precision = tier.settings["train"]["precision"]
    if slow := emulated_precision_warning(precision):
        allowed = ", ".join(one.name for one in TIERS.values() if one.settings["train"]["precision"] != precision)
        raise ConfigError(f"tier {tier.name} trains in {precision}: {slow}; expected another device, or tier {allowed}")
    runs, device = folder / tier.name, default_device()
    runs.mkdir(parents=True, exist_ok=True)
    runner = Runner(runs, threads=tier.threads, parallel=tier.parallel, minutes=minutes)
    runner.stop_on_signals()
    result = output or result_path(tier.name, device)
    Benchmark(tier, runs, corpora, runner, device, result, known).run()
    print(f"written to {result}")


def only(tier: Tier, labels: list[str]) -> Tier:
    """The tier with some of its variants; naive training is always among them.

    Raises:
        ConfigError: a variant that it does not have.
    """
    known = [variant.label for variant in tier.variants]
    if unknown := [label for label in labels if label not in known]:
        raise ConfigError(f"--only: found {unknown[0]!r}, allowed: {', '.join(map(repr, known))}")
    if not labels:
        return tier
    chosen = tuple(variant for variant in tier.variants if variant.label in (NAIVE, *labels))
    left = {variant.label for variant in chosen}
    return replace(
        tier,
        variants=chosen,
        matched=tuple(label for label in tier.matched if label in left),
        contenders=tuple(label for label in tier.contenders if label in left),
        task_variants=tuple(label for label in tier.task_variants if label in left),
        repeated=tier.repeated if tier.repeated in left else NAIVE,
    )


if __name__ == "__main__":
    sys.exit(main())
