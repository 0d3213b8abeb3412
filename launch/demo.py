"""`make demo` and `make demo-clm`: a small base model learns three domains with and without protection; one table.

Naive training that learns less also forgets less, so it runs twice: at the rate of the protected runs, and at a lower
one at which it fits new domains about as well as `directions` does.

Runs on two CPU ranks, or on all GPUs. Everything it writes is under `runs/demo/` (the corpora and the tokenizer, which
both demos share, and the masked language model) and `runs/demo_clm/` (the causal one).
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from das_ds.config import RunConfig
from das_ds.config.io import load_config
from das_ds.errors import EXIT_USER_ERROR, DasError, TrainingError
from das_ds.models.architectures.registry import spec_for
from das_ds.reporting import comparison_tables as tables
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.comparison_report import write_comparison_report
from das_ds.reporting.group_runs import compare_runs
from das_ds.reporting.load_runs import load_run
from das_ds.reporting.results import Results
from das_ds.reporting.tables import format_plain
from das_ds.run_dir import RESULTS_FILE
from launch.demo_bounds import corpus_bounds
from launch.demo_corpora import CORPORA, TOKENIZER_FOLDER, build_corpora

ROOT = Path(__file__).resolve().parents[1]
CORPORA_FOLDER = Path("runs/demo/corpora")
COMPARISON_FOLDER = "comparison"
BASE_RUN = "base"
PROTECTED = "directions"
NAIVE = "ncl"
NUM_CPU_RANKS = 2
MAX_THREADS_PER_RANK = 4


@dataclass(frozen=True)
class Run:
    """One run over the demo's domains."""

    label: str
    """In the tables."""
    name: str
    """Folder within the demo's."""
    overrides: tuple[str, ...]
    """Of the demo's config."""


@dataclass(frozen=True)
class Demo:
    """One demo: a base model and the domains it learns."""

    folder: Path
    base_config: Path
    config: Path
    """Of the runs over the domains."""
    matched_rate: str
    """Learning rate at which naive training fits new domains about as well as the protected run."""
    das: str
    """Section `method` of the run with method das."""

    @property
    def matched_label(self) -> str:
        return f"{NAIVE} {self.matched_rate}"

    @property
    def runs(self) -> tuple[Run, ...]:
        """In the order of the tables."""
        return (
            Run(PROTECTED, PROTECTED, ()),
            Run("das", "das", (f"method={self.das}",)),
            Run(NAIVE, NAIVE, (f"method={NAIVE}",)),
            Run(
                self.matched_label,
                f"{NAIVE}_matched",
                (f"method={NAIVE}", f"train.learning_rate={self.matched_rate}"),
            ),
        )


DEMOS = {
    "mlm": Demo(
        folder=Path("runs/demo"),
        base_config=Path("launch/configs/demo_base.yaml"),
        config=Path("launch/configs/demo.yaml"),
        matched_rate="9e-4",
        das="{name: das, importance: {num_samples: 2048, batch_size: 128}, softmask: {unowned_update_scale: 0.5}}",
    ),
    "clm": Demo(
        folder=Path("runs/demo_clm"),
        base_config=Path("launch/configs/demo_clm_base.yaml"),
        config=Path("launch/configs/demo_clm.yaml"),
        matched_rate="8.5e-4",
        das="{name: das, importance: {num_samples: 2048, batch_size: 64}}",
    ),
}


def num_ranks(num_gpus: int, global_batch_size: int) -> int:
    """Two ranks without a GPU; else the largest power of two of the GPUs, which divides the demo's batches."""
    if num_gpus == 0:
        return NUM_CPU_RANKS
    return min(1 << (num_gpus.bit_length() - 1), global_batch_size)


def launch_command(config_path: Path, overrides: list[str], num_gpus: int, port: int) -> list[str]:
    """The command of one run; the batch of a step is split evenly over the ranks."""
    global_batch_size = load_config(config_path, overrides).train.global_batch_size
    ranks = num_ranks(num_gpus, global_batch_size)
    # Without GPUs the launcher would count the machine's memory nodes and start a rank for each.
    which = [] if num_gpus == ranks else ["--num_accelerators", str(ranks)]
    micro_batch = f"train.micro_batch_size={global_batch_size // ranks}"
    job = ["launch/train.py", "--config", str(config_path), *overrides, micro_batch]
    return ["deepspeed", *which, "--master_port", str(port), *job]


def remove_earlier_runs(demo: Demo) -> None:
    """Remove the runs of an earlier demo, which started from another base model."""
    for name in (BASE_RUN, *(run.name for run in demo.runs)):
        if (demo.folder / name).exists():
            print(f"removing {demo.folder / name}, left by an earlier demo", flush=True)
            shutil.rmtree(demo.folder / name)


def train(config_path: Path, overrides: list[str]) -> Results:
    """Start a run, show its progress, and read its results.

    Raises:
        TrainingError: the run failed.
    """
    command = launch_command(config_path, overrides, torch.cuda.device_count(), free_port())
    print(f"\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run([*runner(), *command[1:]], env=environment()).returncode
    if code != 0:
        raise TrainingError(
            f"demo: the run of {config_path} ended with exit code {code}, expected 0; see its output above"
        )
    print(f"done in {time.monotonic() - started:.0f} s", flush=True)
    return Results.read(load_config(config_path, overrides).output_dir / RESULTS_FILE)


def runner() -> list[str]:
    """The `deepspeed` command of this Python; it need not be on the path."""
    return [sys.executable, "-m", "deepspeed.launcher.runner"]


def environment() -> dict[str, str]:
    """The launcher's environment: this Python first on the path, the cores divided among the CPU ranks."""
    threads = max(1, min(MAX_THREADS_PER_RANK, len(os.sched_getaffinity(0)) // NUM_CPU_RANKS))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true", **os.environ, "PATH": path}


def free_port() -> int:
    """A port that no other job of this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plateau_line(results: Results, config: RunConfig) -> str:
    """The base model's held-out loss, and the bounds of a model that ignores its context."""
    name = results.domains[0]
    bounds = corpus_bounds(CORPORA_FOLDER / name, AutoTokenizer.from_pretrained(config.data.tokenizer))
    # A causal model never sees the position it predicts: without context the unigram loss is its best.
    best = "" if is_causal(config) else f"best without context {bounds.context_free:.2f}, "
    return (
        f"base model on held-out '{name}', nats per predicted token: unigram {bounds.unigram:.2f}, {best}before "
        f"training {results.loss_matrix[0][0]:.2f}, after {config.train.steps_per_domain} steps "
        f"{results.loss_matrix[-1][0]:.2f}"
    )


def is_causal(config: RunConfig) -> bool:
    """Whether the demo's base model is a causal one."""
    assert config.model.config is not None, "the base model has random weights"
    return spec_for(config.model.config["model_type"]).objective == "clm"


def compare(demo: Demo) -> str:
    """The verdict and the main tables of the demo's runs; the full comparison is written to the demo's folder."""
    runs = [load_run(f"{run.label}={demo.folder / run.name}") for run in demo.runs]
    comparison = compare_runs(runs, baseline=NAIVE)
    write_comparison_report(comparison, demo.folder / COMPARISON_FOLDER)
    return (
        f"{format_plain(tables.summary_rows(comparison))}\n\n"
        f"{verdict(comparison, demo.matched_label)}\n\n"
        f"{format_plain(tables.stage_rows(comparison), text_columns=(0, 1))}\n\n"
        "forgetting by domain\n\n"
        f"{format_plain(tables.forgetting_rows(comparison))}"
    )


def verdict(comparison: Comparison, matched_label: str) -> str:
    """Who learned and who forgot, in one line: the protected run against naive training that learns about as much.

    Args:
        comparison: of the demo's runs, one run per group.
        matched_label: group of the naive run at the matched rate.
    """
    protected = comparison.group(PROTECTED).runs[0]
    matched = comparison.group(matched_label).runs[0]
    assert protected.forgetting is not None and matched.forgetting is not None, "the demo has several domains"
    losses = [run.loss_after_learning_later for run in (protected, matched)]
    ratio = ""
    if matched.forgetting > 0:  # a base model of too few steps still gains from every text
        less = 1 - protected.forgetting / matched.forgetting
        ratio = f"{abs(less):.0%} {'less' if less > 0 else 'more'}: "
    return (
        f"{PROTECTED} against {matched_label}: loss on new domains {losses[0]:.2f} against {losses[1]:.2f}; "
        f"forgets {ratio}{protected.forgetting:.2f} against {matched.forgetting:.2f}; "
        f"final loss {protected.final_loss:.2f} against {matched.final_loss:.2f}"
    )


def show(demo: Demo) -> None:
    """Run a complete demo from the repository's root.

    Raises:
        DasError: a corpus that is too small, or a run that failed.
    """
    started = time.monotonic()
    os.chdir(ROOT)
    print(f"preparing corpora in {CORPORA_FOLDER}", flush=True)
    built = build_corpora(CORPORA_FOLDER)
    names = ", ".join(corpus.name for corpus in CORPORA)
    state = f"built in {time.monotonic() - started:.0f} s" if built else "up to date"
    print(f"corpora ({names}) and {TOKENIZER_FOLDER} in {CORPORA_FOLDER}: {state}", flush=True)
    remove_earlier_runs(demo)
    plateau = plateau_line(train(demo.base_config, []), load_config(demo.base_config))
    print(plateau, flush=True)
    for run in demo.runs:
        train(demo.config, [*run.overrides, f"output_dir={demo.folder / run.name}"])
    print(f"\n{plateau}\n\n{compare(demo)}")
    print(f"\nreports: {demo.folder / COMPARISON_FOLDER}/report.md, {demo.folder / PROTECTED}/report/report.md")
    print(f"total: {time.monotonic() - started:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    """Run a demo; a failure is one line and an exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("objective", nargs="?", choices=DEMOS, default="mlm", help="masked or causal model")
    options = parser.parse_args(arguments)
    try:
        show(DEMOS[options.objective])
    except DasError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
