"""`das-ds report` on run folders: comparison, rejected input, and W&B logging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from das_ds.cli import main
from das_ds.errors import RunFolderError
from das_ds.reporting import run as command
from das_ds.reporting.comparison import Comparison
from das_ds.reporting.group_runs import compare_runs
from das_ds.reporting.load_runs import load_run
from das_ds.tracking.sinks import Sink
from das_ds.tracking.tracker import Tracker
from helpers.run_folders import write_run, write_task, write_unit_importance

DAS = {"method": {"name": "das"}}
OVERALL, ACL, PUBMED = (f"{place}importance.safetensors" for place in ("", "domains/00_acl/", "domains/01_pubmed/"))


def compare(*arguments: object, baseline: str | None = None) -> Comparison:
    return compare_runs([load_run(str(argument)) for argument in arguments], baseline)


def test_compare_runs_has_all_values_of_a_run(tmp_path: Path) -> None:
    das = write_run(tmp_path / "das" / "seed0", shift=0.5, **DAS)
    write_unit_importance(das, {OVERALL: 0.8, ACL: 0.8, PUBMED: 0.8})
    pool = write_run(tmp_path / "pool", method={"name": "pool"})
    found = compare(write_run(tmp_path / "ncl"), write_run(tmp_path / "ncl1", seed=1), das, pool, baseline="das")
    assert found.domains == ["acl", "pubmed"] and found.reference == "das" and found.notes == []
    ncl, protected, at_once = found.groups
    assert [run.seed for run in ncl.runs] == [0, 1]
    (run,) = protected.runs
    assert (
        run.folder == "das/seed0"
        and run.loss_after_learning == pytest.approx(4.0)
        and run.final_loss == pytest.approx(4.25)
    )
    assert run.forgetting == pytest.approx(0.5) and run.general_drift == pytest.approx(0.4)
    assert run.forward_transfer == pytest.approx(0.5)
    assert (run.cost.tokens_per_s, run.cost.peak_memory_gib, run.cost.rank_hours) == (200.0, 0.8, 0.05)
    assert run.importance is not None and run.importance.sources == ["acl", "pubmed"]
    assert ncl.runs[0].importance is None and run.end_tasks is None
    (run,) = at_once.runs
    assert at_once.stages == ["before training", "after pool"]
    assert (
        run.loss_after_learning == run.final_loss == pytest.approx(4.25)
        and run.forgetting is None
        and run.forward_transfer is None
    )


def test_compare_runs_end_task_scores_are_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "ncl" / "seed0")
    write_task(run, "domains/00_acl", 0.8)
    write_task(run, "domains/01_pubmed", 0.5)
    found = compare(run)
    scores = found.groups[0].runs[0].scores
    assert scores is not None and scores.scores == [[None], [0.8], [0.5]]
    assert scores.forgetting.average == pytest.approx(0.3)
    assert found.notes == ["ncl/seed0: acl_arc was not measured before training."]


def test_compare_runs_omissions_are_noted(tmp_path: Path) -> None:
    half = write_run(tmp_path / "a" / "half", num_rows=2)
    silent = write_run(tmp_path / "a" / "silent", metrics=False)
    found = compare(half, silent)
    assert [run.folder for run in found.groups[0].runs] == ["a/silent"]
    assert found.notes == [
        "a/half is not complete and is omitted.",
        "a/silent has no metrics.jsonl: its speed and memory are omitted.",
    ]
    with_files, without = (write_run(tmp_path / "das" / str(seed), seed=seed, **DAS) for seed in (0, 1))
    write_unit_importance(with_files, {OVERALL: 0.8, ACL: 0.8})
    assert compare(with_files, without).notes == [
        "das/1 has no importance files, unlike other runs of its group: it is omitted from means of importance."
    ]
    other = write_run(tmp_path / "a" / "other", seed=1, train={"learning_rate": 0.5})
    assert (
        "Runs of both differ in more than the seed: train.learning_rate."
        in compare(f"both={silent}", f"both={other}").notes
    )


def test_compare_runs_incomparable_runs_are_rejected(tmp_path: Path) -> None:
    ncl = write_run(tmp_path / "ncl")
    half = write_run(tmp_path / "half", num_rows=2)
    with pytest.raises(RunFolderError, match=r"nowhere: found no such folder, expected the folder of a run"):
        compare(ncl, tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"found no results\.json in it"):
        compare(tmp_path)
    with pytest.raises(RunFolderError, match=r"found no complete run among .*half, expected at least one"):
        compare(half)
    other = write_run(tmp_path / "other", domains=("acl", "phone"))
    with pytest.raises(
        RunFolderError, match=r"other: found corpora acl, phone, general, .*only one .* phone, pubmed\)"
    ):
        compare(ncl, other)
    turned = write_run(tmp_path / "turned", domains=("pubmed", "acl"))
    with pytest.raises(RunFolderError, match=r"turned: .*their order differs"):
        compare(ncl, turned)
    pool = write_run(tmp_path / "pool", method={"name": "pool"}, seed=1)
    das = write_run(tmp_path / "das", **DAS, seed=1)
    with pytest.raises(
        RunFolderError, match=r"pool: found other stages than in .*ncl, so group 'one' cannot be averaged"
    ):
        compare(f"one={ncl}", f"one={pool}")
    write_unit_importance(das, {OVERALL: 0.5, ACL: 0.5})
    again = write_run(tmp_path / "again", **DAS, seed=2)
    write_unit_importance(again, {OVERALL: 0.5, ACL: 0.5, PUBMED: 0.5})
    with pytest.raises(
        RunFolderError, match=r"again: found other importance than in .*das, .* give one of them another"
    ):
        compare(das, again)
    with pytest.raises(RunFolderError, match=r"--baseline: found 'das', allowed: 'ncl'"):
        compare(ncl, baseline="das")


def test_compare_runs_damaged_file_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"tokens_per_s": 1.0}\n{"tok\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: line 2 is not a JSON object"):
        compare(run)
    (run / "metrics.jsonl").write_text('{"tokens_per_s": 1.0}\n{"tokens_per_s": null}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: line 2: tokens_per_s: found None, expected a number"):
        compare(run)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(
        RunFolderError, match=r"metrics\.jsonl: cannot be read \(Is a directory\); expected the metrics"
    ):
        compare(run)
    (run / "metrics.jsonl").rmdir()
    (run / "config.yaml").write_text("nothing: 1\n")
    with pytest.raises(RunFolderError, match=r"run: its config\.yaml cannot be used: .*unknown key"):
        compare(run)
    results = run / "results.json"
    results.write_text(results.read_text().replace("90.0", "9.0"))
    with pytest.raises(RunFolderError, match=r"results\.json: was altered"):
        compare(run)


def test_report_command_writes_folder_and_prints_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "ncl")
    write_run(tmp_path / "half", num_rows=2)
    assert main(["report", "ncl", "naive=half", "--output", "out"]) == 0
    shown = capsys.readouterr().out
    assert "\nncl        1" in shown and "note: " in shown and "report: out/report.md, out/index.html, " in shown
    assert Comparison.read(tmp_path / "out" / "comparison.json").groups[0].label == "ncl"
    assert not (tmp_path / "out" / "wandb").exists()


@pytest.mark.parametrize(("arguments", "message"), [([], "found no run"), (["a"], "a: found no such folder")])
def test_report_command_user_error_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("das_ds: ") and error.count("\n") == 1 and message in error


class RecordingSink(Sink):
    """Records everything that is logged."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[list[str], list[Any]]] = {}
        self.images: dict[str, Path] = {}
        self.summary: dict[str, Any] = {}

    def log_table(self, name: str, columns: Any, rows: Any) -> None:
        self.tables[name] = (list(columns), list(rows))

    def log_image(self, name: str, path: Path) -> None:
        self.images[name] = path

    def log_summary(self, metrics: Any) -> None:
        self.summary.update(metrics)


def test_report_runs_wandb_gets_tables_plots_and_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []
    sink = RecordingSink()

    def build(config: Any, job: Any, *, enabled: bool) -> Tracker:
        jobs.append((config.wandb.mode, job, enabled))
        return Tracker([sink])

    monkeypatch.setattr(command, "build_job_tracker", build)
    ncl = write_run(tmp_path / "ncl", wandb={"mode": "disabled"})
    pool = write_run(tmp_path / "pool", method={"name": "pool"})
    command.report_runs([str(ncl), str(pool)], tmp_path / "out", None, wandb=True)
    ((mode, job, enabled),) = jobs
    assert (mode, job.job_type, job.folder, enabled) == ("auto", "report", tmp_path / "out", True)
    assert job.config == {"runs": [f"{tmp_path.name}/ncl", f"{tmp_path.name}/pool"]}
    assert set(sink.tables) == {"summary", "differences", "cost", "runs"}
    columns, rows = sink.tables["runs"]
    assert columns[:4] == ["group", "method", "seed", "loss after learning"]
    assert rows[0][:4] == ["ncl", "ncl", 0, pytest.approx(3.5)] and rows[1][columns.index("forgetting")] != 0.5
    assert all(isinstance(value, float) for row in rows for value in row[3:])
    assert sorted(sink.images) == ["loss_matrices", "pareto"] and all(path.exists() for path in sink.images.values())
    assert sink.summary["ncl/forgetting"] == pytest.approx(0.5) and "pool/forgetting" not in sink.summary
