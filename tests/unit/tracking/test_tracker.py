"""Tracker fan-out, and the JSONL file parsed strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from das_ds.config import RunConfig
from das_ds.errors import RunFolderError
from das_ds.run_dir import METRICS_FILE
from das_ds.tracking.names import STEP_METRICS, loss_part
from das_ds.tracking.sinks import JsonlSink, Sink
from das_ds.tracking.tracker import Tracker, build_tracker

ConfigMaker = Callable[[Path, str], RunConfig]


def step_metrics(step: int, **changes: float) -> dict[str, Any]:
    metrics = {"domain": "acl", "domain_step": step, "tokens_seen": 10 * step, "loss": 1.5, "lr": 1e-4}
    return {**metrics, "grad_norm": 0.5, "skipped_steps": 0, "tokens_per_s": 7.0, loss_part("mlm"): 1.0, **changes}


def read_strictly(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class Recorder(Sink):
    """Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log(self, metrics: Any, *, global_step: int) -> None:
        self.calls.append(("log", metrics, global_step))

    def log_evaluation(self, losses: Any, *, domains_learned: int, global_step: int) -> None:
        self.calls.append(("evaluation", losses, domains_learned, global_step))

    def log_domain_evaluation(self, metrics: Any, *, global_step: int) -> None:
        self.calls.append(("within", metrics, global_step))

    def log_summary(self, metrics: Any) -> None:
        self.calls.append(("summary", metrics))

    def log_table(self, name: str, columns: Any, rows: Any) -> None:
        self.calls.append(("table", name, columns, rows))

    def log_image(self, name: str, path: Path) -> None:
        self.calls.append(("image", name, path))

    def truncate_after(self, global_step: int, num_bytes: int | None = None) -> None:
        self.calls.append(("truncate", global_step, num_bytes))

    def close(self, exit_code: int = 0) -> None:
        self.calls.append(("close", exit_code))


def report_everything(tracker: Tracker) -> None:
    tracker.truncate_after(2, 80)
    tracker.log({"domain": "acl"}, global_step=3)
    tracker.log_evaluation({"acl": 1.0}, domains_learned=1, global_step=3)
    tracker.log_domain_evaluation({"domain": "acl", "eval/acl": 1.0}, global_step=3)
    tracker.log_summary({"forgetting": 0.5})
    tracker.log_table("losses", ["stage", "acl"], [["before", 1.0]])
    tracker.log_image("losses", Path("losses.png"))


def test_tracker_forwards_every_call_to_every_sink() -> None:
    first = Recorder()
    second = Recorder()
    with Tracker([first, second]) as tracker:
        report_everything(tracker)
    assert first.calls == second.calls
    assert first.calls == [
        ("truncate", 2, 80),
        ("log", {"domain": "acl"}, 3),
        ("evaluation", {"acl": 1.0}, 1, 3),
        ("within", {"domain": "acl", "eval/acl": 1.0}, 3),
        ("summary", {"forgetting": 0.5}),
        ("table", "losses", ["stage", "acl"], [["before", 1.0]]),
        ("image", "losses", Path("losses.png")),
        ("close", 0),
    ]


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(SystemExit(75), 75), (SystemExit(), 0), (SystemExit("why"), 1), (KeyError("bug"), 1), (KeyboardInterrupt(), 1)],
)
def test_tracker_closes_sinks_with_exit_code(error: BaseException, exit_code: int) -> None:
    sink = Recorder()
    with pytest.raises(type(error)), Tracker([sink]):
        raise error
    assert sink.calls == [("close", exit_code)]


def test_build_tracker_disabled_writes_nothing(make_config: ConfigMaker, tmp_path: Path) -> None:
    with build_tracker(make_config(tmp_path / "run", "offline"), enabled=False) as tracker:
        report_everything(tracker)
    assert not list((tmp_path / "run").iterdir())


def test_jsonl_sink_ignores_all_but_steps_and_evaluations_within_domains(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    with build_tracker(make_config(tmp_path, "disabled"), enabled=True) as tracker:
        report_everything(tracker)
    assert read_strictly(tmp_path / METRICS_FILE) == [
        {"global_step": 3, "domain": "acl"},
        {"global_step": 3, "domain": "acl", "eval/acl": 1.0},
    ]


def test_jsonl_sink_flushes_every_line(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / METRICS_FILE)
    sink.log(step_metrics(1), global_step=41)
    (line,) = read_strictly(tmp_path / METRICS_FILE)
    sink.close()
    assert set(STEP_METRICS) <= set(line)
    assert line == {"global_step": 41, **step_metrics(1)}


def test_jsonl_sink_non_finite_values_are_strict_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / METRICS_FILE)
    sink.log(step_metrics(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf), global_step=1)
    sink.close()
    (line,) = read_strictly(tmp_path / METRICS_FILE)
    assert (line["loss"], line["grad_norm"], line["lr"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(line["loss"])) and float(line["lr"]) == -math.inf


@pytest.mark.parametrize(
    "tail", [b"", b'{"global_step": 9, "loss"', b'{"global_step": 2}', b'{"global_step": \n', b"7\n"]
)
def test_truncate_after_drops_later_and_partial_lines(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / METRICS_FILE
    sink = JsonlSink(path)
    for step in (1, 2, 3, 4):
        sink.log(step_metrics(step), global_step=step)
    sink.close()
    path.write_bytes(path.read_bytes() + tail)
    sink = JsonlSink(path)
    sink.truncate_after(10)
    assert [line["global_step"] for line in read_strictly(path)] == [1, 2, 3, 4]
    sink.truncate_after(2)
    sink.log(step_metrics(3), global_step=3)
    sink.close()
    assert [line["global_step"] for line in read_strictly(path)] == [1, 2, 3]


def test_jsonl_sink_unopenable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"missing/metrics\.jsonl: cannot be written \(No such file"):
        JsonlSink(tmp_path / "missing" / METRICS_FILE)


def test_jsonl_sink_full_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.symlink_to("/dev/full")
    sink = JsonlSink(path)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: cannot be written \(No space left.*free space"):
        sink.log(step_metrics(1), global_step=1)


def test_truncate_after_drops_lines_of_the_same_step_that_the_checkpoint_did_not_have(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / METRICS_FILE)
    sink.log(step_metrics(4), global_step=4)
    saved = sink.num_bytes()
    evaluation = {"domain": "acl", "domain_step": 4, "eval/acl": 1.0}
    for _ in range(2):
        sink.log_domain_evaluation(evaluation, global_step=4)
        # As when the run is stopped in the middle of the evaluation, and evaluates again.
        sink.truncate_after(4, saved)
        assert len(read_strictly(tmp_path / METRICS_FILE)) == 1
    sink.log_domain_evaluation(evaluation, global_step=4)
    sink.truncate_after(4, sink.num_bytes())
    sink.close()
    assert read_strictly(tmp_path / METRICS_FILE)[1:] == [{"global_step": 4, **evaluation}]


def test_full_disk_within_an_evaluation_is_raised_later_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    tracker = Tracker([JsonlSink(tmp_path / METRICS_FILE)])
    tracker.log_domain_evaluation({"domain": "acl"}, global_step=1)
    assert isinstance(tracker.failure, RunFolderError)


def test_truncate_after_lost_lines_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2, 3):
        sink.log(step_metrics(step), global_step=step)
    saved = sink.num_bytes()
    assert saved == path.stat().st_size
    sink.log(step_metrics(4), global_step=4)
    sink.truncate_after(3, saved)
    assert not caplog.records and path.stat().st_size == saved
    sink.close()
    path.write_bytes(path.read_bytes()[:-5])
    sink = JsonlSink(path)
    sink.truncate_after(3, saved)
    sink.close()
    assert [line["global_step"] for line in read_strictly(path)] == [1, 2]
    assert f"{saved - path.stat().st_size} bytes of lines up to step 3 are missing" in caplog.text
