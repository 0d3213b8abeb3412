"""Libraries of metrics: which a config asks for, and what the real ones hold after a run that was resumed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from das_ds.config import RunConfig
from das_ds.config.io import config_differences, identity_values, parse_config
from das_ds.config.runtime import TrackingLibrary
from das_ds.errors import ConfigError
from das_ds.preflight.environment import check_tracking
from das_ds.run_dir import METRICS_FILE, MLFLOW_RUN_ID_FILE, TRACKIO_RUN_NAME_FILE
from das_ds.tracking.background import BackgroundSink
from das_ds.tracking.libraries import LIBRARIES, import_libraries
from das_ds.tracking.mlflow_sink import MlflowSink, mlflow_metrics
from das_ds.tracking.names import name_by_domain
from das_ds.tracking.sinks import JsonlSink, Sink
from das_ds.tracking.tensorboard_sink import TensorBoardSink
from das_ds.tracking.tracker import Tracker
from das_ds.tracking.trackio_sink import TrackioSink
from helpers.configs import make_config
from helpers.preflight import Alone, silent_checks

Points = list[tuple[int, float]]
"""(step, value) of one metric."""
NAMES = list(LIBRARIES)


def step(number: int, *, loss: float, domain: str = "acl") -> dict[str, Any]:
    metrics = {"domain": domain, "domain_step": number, "tokens_seen": 8 * number, "loss": loss, "loss/mlm": 0.5}
    return {**metrics, "grad_norm": math.nan}


def log_resumed_run(folder: Path, build: Callable[[RunConfig], Sink]) -> RunConfig:
    """Three steps, of which a killed start saved two; the next start repeats the third with another loss."""
    config = make_config(folder / "run", "domains.0.name=acl")
    config.output_dir.mkdir()
    Image.new("RGB", (5, 3), "red").save(folder / "loss_matrix.png")

    def start() -> Tracker:
        return Tracker([JsonlSink(config.output_dir / METRICS_FILE), build(config)])

    with start() as tracker:
        tracker.truncate_after(0)
        tracker.log_evaluation({"acl": 3.5, "pub-med": 4.0}, domains_learned=0, global_step=0)
        for number in (1, 2, 3):
            tracker.log(step(number, loss=1 / number), global_step=number)
        tracker.log_table("loss_matrix", ["stage", "acl"], [["before", 3.5], ["after acl", 1.25]])
        tracker.log_image("loss_matrix", folder / "loss_matrix.png")
    with start() as tracker:
        tracker.truncate_after(2)
        for number in (3, 4):
            tracker.log(step(number, loss=7.0), global_step=number)
        tracker.log_evaluation({"acl": 1.5, "pub-med": 4.0}, domains_learned=1, global_step=4)
        tracker.log_summary({"forgetting/average": 0.75})
    # Steps that metrics.jsonl no longer has still count as logged.
    with start() as tracker:
        tracker.truncate_after(1)
    with start() as tracker:
        tracker.truncate_after(1)
        for number in (2, 3, 4, 5):
            tracker.log(step(number, loss=7.0), global_step=number)
    return config


def rounded(points: Iterator[tuple[int, float]]) -> Points:
    return [(number, round(value, 4)) for number, value in points]


def test_tensorboard_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = log_resumed_run(tmp_path, TensorBoardSink)
    events = EventAccumulator(str(config.output_dir / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()

    def points(tag: str) -> Points:
        return rounded((event.step, event.value) for event in events.Scalars(tag))

    # Later files replace steps of earlier ones.
    assert points("acl/loss") == [(1, 1.0), (2, 7.0), (3, 7.0), (4, 7.0), (5, 7.0)]
    assert points("acl/loss/mlm") == [(number, 0.5) for number in range(1, 6)]
    assert points("acl/step") == [(number, float(number)) for number in range(1, 6)]
    assert points("eval/acl") == [(0, 3.5)]
    (text,) = events.Tensors("config/text_summary")
    assert b"    output_dir: " in text.tensor_proto.string_val[0]
    assert len(list((config.output_dir / "tensorboard").iterdir())) == 3


def test_tensorboard_has_evaluation_summary_table_and_image(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tmp_path / "run")
    config.output_dir.mkdir()
    Image.new("RGB", (5, 3), "red").save(tmp_path / "plot.png")
    sink = TensorBoardSink(config)
    sink.log_evaluation({"acl": 1.5}, domains_learned=1, global_step=4)
    sink.log_summary({"forgetting/average": 0.75, "method": "das"})
    sink.log_table("loss_matrix", ["stage", "acl"], [["before", 3.5]])
    sink.log_image("loss_matrix", tmp_path / "plot.png")
    sink.close()
    events = EventAccumulator(str(config.output_dir / "tensorboard"))
    events.Reload()
    scalars = {tag: rounded((event.step, event.value) for event in events.Scalars(tag)) for tag in ("eval/acl",)}
    assert scalars == {"eval/acl": [(4, 1.5)]}
    assert [event.value for event in events.Scalars("summary/forgetting/average")] == [0.75]
    (text,) = events.Tensors("tables/loss_matrix/text_summary")
    assert text.tensor_proto.string_val[0] == b"| stage | acl |\n| --- | --- |\n| before | 3.5 |"
    (image,) = events.Images("images/loss_matrix")
    assert (image.width, image.height, image.step) == (5, 3, 4)


def test_mlflow_resumed_run_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (pip install das_ds[mlflow])")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = log_resumed_run(tmp_path, lambda config: MlflowSink(config, mlflow))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{config.output_dir / 'mlflow' / 'mlflow.db'}")
    run_id = (config.output_dir / MLFLOW_RUN_ID_FILE).read_text().strip()
    (run,) = client.search_runs([client.get_experiment_by_name("das_ds").experiment_id])

    def points(key: str) -> Points:
        return rounded((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))

    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "run", "FINISHED")
    assert run.data.params == {key: str(value) for key, value in identity_values(config).items()}
    # MLflow cannot drop a step, so what the first start logged stays.
    assert points("acl/loss") == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 7.0), (5, 7.0)]
    assert points("acl/loss.mlm") == [(number, 0.5) for number in range(1, 6)]
    assert points("eval/acl") == [(0, 3.5), (4, 1.5)]
    assert points("summary/forgetting/average") == [(4, 0.75)]
    assert math.isnan(run.data.metrics["acl/grad_norm"])
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    table = json.loads((artifacts / "tables" / "loss_matrix.json").read_text())
    assert table == {"columns": ["stage", "acl"], "data": [["before", 3.5], ["after acl", 1.25]]}
    assert (artifacts / "images" / "loss_matrix.png").exists() and artifacts.is_relative_to(config.output_dir)


def test_trackio_resumed_run_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Trackio reads it when it is imported, which no other test does.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed (pip install das_ds[trackio])")
    from trackio.sqlite_storage import SQLiteStorage

    config = log_resumed_run(tmp_path, lambda config: TrackioSink(config, trackio))
    name = (config.output_dir / TRACKIO_RUN_NAME_FILE).read_text().strip()
    assert name.startswith("run-") and SQLiteStorage.get_runs("das_ds") == [name]
    rows = SQLiteStorage.get_logs("das_ds", name)
    losses = [(row["step"], row["acl/loss"]) for row in rows if "acl/loss" in row]
    assert rounded(iter(losses)) == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 7.0), (5, 7.0)]
    assert [(row["step"], row["eval/acl"]) for row in rows if "eval/acl" in row] == [(0, 3.5), (4, 1.5)]
    assert [row["summary/forgetting/average"] for row in rows if "summary/forgetting/average" in row] == [0.75]
    (table,) = [row["tables/loss_matrix"]["_value"] for row in rows if "tables/loss_matrix" in row]
    assert table == [{"stage": "before", "acl": 3.5}, {"stage": "after acl", "acl": 1.25}]
    assert any("images/loss_matrix" in row for row in rows)


def test_metrics_are_named_by_domain() -> None:
    named = name_by_domain({"global_step": 9, **step(3, loss=1.0, domain="pub-med")})
    assert {name: value for name, value in named.items() if name != "pub-med/grad_norm"} == {
        "global_step": 9,
        "pub-med/step": 3,
        "tokens_seen": 24,
        "pub-med/loss": 1.0,
        "pub-med/loss/mlm": 0.5,
    }


def test_mlflow_metrics_are_numbers_whose_names_are_no_folders_of_others() -> None:
    named = mlflow_metrics({**name_by_domain({"global_step": 9, **step(3, loss=1.0)}), "acl/note": "text"})
    assert list(named) == ["acl/step", "tokens_seen", "acl/loss", "acl/loss.mlm", "acl/grad_norm"]
    assert not any(other.startswith(f"{name}/") for name in named for other in named)


@pytest.mark.parametrize("name", NAMES)
def test_missing_library_is_an_error_before_the_run(
    name: TrackingLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[name].module, None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = make_config(tmp_path, f"tracking=[{name}]")
    message = rf"^tracking: found {name}, which needs the {name} package \(.*\); install das_ds\[{name}\], or leave it"
    with pytest.raises(ConfigError, match=message):
        import_libraries(config)
    checks = silent_checks(Alone())
    check_tracking(checks, config, 0)
    check_tracking(checks, config, 1)
    failed, other_rank = checks.results
    assert failed.status == "failed" and f"install das_ds[{name}]" in failed.found
    assert other_rank.status == "ok"


def test_preflight_names_libraries_and_tolerates_missing_wandb_without_tracking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    checks = silent_checks(Alone())
    check_tracking(checks, make_config(tmp_path), 0)
    check_tracking(checks, make_config(tmp_path, "tracking=[tensorboard]"), 0)
    assert [result.status for result in checks.results] == ["ok", "ok"]
    assert [result.found for result in checks.results] == [
        "metrics.jsonl (wandb is not installed, which wandb.mode auto allows)",
        "metrics.jsonl, tensorboard",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ["wandb"]),
        (["wandb.mode=disabled"], []),
        (["tracking=[]"], []),
        (["tracking=[]", "wandb.mode=offline"], []),
        (["tracking=[tensorboard]"], ["tensorboard"]),
        (["tracking=[tensorboard]", "wandb.mode=disabled"], ["tensorboard"]),
        (["tracking=[tensorboard,wandb]", "wandb.mode=offline"], ["tensorboard", "wandb"]),
    ],
)
def test_tracking_decides_and_wandb_mode_decides_without_it(
    overrides: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert list(import_libraries(make_config(tmp_path, *overrides))) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracking=[csv]"], "tracking.0: found 'csv', allowed: .*wandb | tensorboard | mlflow | trackio"),
        (["tracking=[mlflow,mlflow]"], "tracking: found mlflow, mlflow, allowed: each once"),
        (["tracking=[wandb]", "wandb.mode=disabled"], "tracking: found wandb with wandb.mode disabled, allowed: "),
    ],
)
def test_wrong_tracking_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, *overrides)


def test_tracking_may_change_when_a_run_resumes(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    other = parse_config(config.model_dump(mode="json", by_alias=True), ["tracking=[mlflow]"])
    assert config_differences(config, other) == []


class Recorder(Sink):
    """Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log(self, metrics: Any, *, global_step: int) -> None:
        self.calls.append(("log", dict(metrics), global_step))

    def log_table(self, name: str, columns: Any, rows: Any) -> None:
        self.calls.append(("table", name, columns, rows))

    def truncate_after(self, global_step: int, num_bytes: int = 0) -> None:
        self.calls.append(("truncate", global_step, num_bytes))

    def close(self, exit_code: int = 0) -> None:
        self.calls.append(("close", exit_code))


def test_background_sink_forwards_copies_in_order() -> None:
    target = Recorder()
    sink = BackgroundSink("test", lambda: target)
    metrics = {"loss": 1.0}
    rows = [["before", 1.0]]
    sink.truncate_after(2, 7)
    sink.log(metrics, global_step=3)
    metrics["loss"] = 9.0
    sink.log_table("losses", ["stage", "acl"], rows)
    sink.close(75)
    assert target.calls == [
        ("truncate", 2, 7),
        ("log", {"loss": 1.0}, 3),
        ("table", "losses", ["stage", "acl"], [["before", 1.0]]),
        ("close", 75),
    ]
