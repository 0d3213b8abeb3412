"""Compare methods over real domains: `python -m benchmarks.domains TIER`.

Corpora are read from the folder that `DAS_DS_DATA` names. The same command resumes an interrupted benchmark.
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
    """Run a tier; a user error is one line and exit code 2, a stop at the time limit is exit code 75."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domains", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tier", choices=TIERS, help="size of the benchmark")
    parser.add_argument("--minutes", type=float, help="save and stop after this time; default: no limit")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"for base models and runs; default: {FOLDER}")
    parser.add_argument("--only", action="append", default=[], metavar="LABEL", help="a group, may be repeated")
    parser.add_argument("--extend", type=Path, metavar="RESULT", help="result file whose runs are not repeated")
    parser.add_argument("--output", type=Path, help="result file; default: benchmarks/results/domains_<tier>_<device>")
    options = parser.parse_args(arguments)
    try:
        tier = select_variants(TIERS[options.tier], options.only)
        run(tier, options.folder.resolve(), options.minutes, options.output, options.extend)
    except StoppedError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except DasError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def run(tier: Tier, folder: Path, minutes: float | None, output: Path | None, extend: Path | None = None) -> None:
    """Run a tier.

    Raises:
        DasError: corpora are missing, the results to extend are of another tier, this device only emulates the
            precision, or a run fails.
        StoppedError: time is up.
    """
    known = None if extend is None else read_result_file(extend)
    if known is not None:
        check_tier(known, tier)
    corpora = data.data_folder()
    data.check_files(corpora, [data.GENERAL, *tier.corpora], data.TASKS if tier.fine_tunes else ())
    precision = tier.settings["train"]["precision"]
    if warning := emulated_precision_warning(precision):
        allowed = ", ".join(one.name for one in TIERS.values() if one.settings["train"]["precision"] != precision)
        raise ConfigError(
            f"tier {tier.name} trains in {precision}: {warning}; expected another device, or tier {allowed}"
        )
    device = default_device()
    runs = folder / tier.run_folder
    runs.mkdir(parents=True, exist_ok=True)
    runner = Runner(runs, threads=tier.threads, parallel=tier.parallel, minutes=minutes)
    runner.stop_on_signals()
    result = output or result_path(tier.name, device)
    Benchmark(tier, runs, corpora, runner, device, result, known).run()
    print(f"written to {result}")


def select_variants(tier: Tier, labels: list[str]) -> Tier:
    """The tier with some of its groups, naive training always among them; all of them without labels.

    Raises:
        ConfigError: the tier does not have a group.
    """
    if unknown := [label for label in labels if label not in tier.groups]:
        raise ConfigError(f"--only: found {unknown[0]!r}, allowed: {', '.join(map(repr, tier.groups))}")
    if not labels:
        return tier
    selected = (NAIVE, *labels)
    return replace(
        tier,
        variants=tuple(variant for variant in tier.variants if variant.is_compared and variant.group in selected),
        contenders=tuple(label for label in tier.contenders if label in selected),
        against_naive=tuple(label for label in tier.against_naive if label in selected),
        task_variants=tuple(label for label in tier.task_variants if label in selected),
        repeated=tier.repeated if tier.repeated in selected else NAIVE,
    )


if __name__ == "__main__":
    sys.exit(main())
