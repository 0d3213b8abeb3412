"""The W&B sink with fake libraries that fail, hang or are missing; test_wandb_library.py uses the real one."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from das_ds.config import RunConfig, parse_method
from das_ds.errors import ConfigError
from das_ds.run_dir import WANDB_RUN_ID_FILE
from das_ds.tracking import wandb_sink
from das_ds.tracking.background import MAX_PENDING_CALLS
from das_ds.tracking.libraries import build_library_sinks
from das_ds.tracking.wandb_sink import WandbJob, build_wandb_sink

ConfigMaker = Callable[[Path, str], RunConfig]
STEP: dict[str, float | int | str] = {"domain": "acl", "domain_step": 1, "loss": 1.0}


class FakeRun:
    """Records what is logged; the calls in `failing` raise."""

    def __init__(self, failing: set[str]) -> None:
        self.failing = failing
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.axes: dict[str, str] = {}

    def define_metric(self, name: str, **options: Any) -> None:
        if "define_metric" in self.failing:
            raise RuntimeError("define_metric")
        if "step_metric" in options:
            self.axes[name] = options["step_metric"]

    def log(self, row: dict[str, Any]) -> None:
        if "log" in self.failing:
            raise RuntimeError("log")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        if "finish" in self.failing:
            raise RuntimeError("finish")
        self.exit_code = exit_code


class FakeWandb:
    """A fake `wandb` module; calls in `hanging` return only when `release` is set."""

    def __init__(self, *, has_key: bool = False, failing: tuple[str, ...] = (), hanging: tuple[str, ...] = ()) -> None:
        self.has_key = has_key
        self.failing = set(failing)
        self.hanging = set(hanging)
        self.release = threading.Event()
        self.run = FakeRun(self.failing)
        self.calls: list[str] = []
        self.init_arguments: dict[str, Any] = {}

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        if name in self.hanging:
            self.release.wait(60)
        if name in self.failing:
            raise RuntimeError(name)

    def login(self, *, prompt: bool, verify: bool) -> bool:
        self._enter("login")
        assert not prompt and not verify
        return self.has_key

    def init(self, **arguments: Any) -> FakeRun:
        self._enter(f"init {arguments['mode']}")
        self.init_arguments = arguments
        return self.run

    def teardown(self) -> None:
        self._enter("teardown")

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802
        return settings


def list_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("mode", "has_key", "calls"),
    [
        ("auto", True, ["login", "init online"]),
        ("auto", False, ["login", "init offline"]),
        ("online", True, ["login", "init online"]),
        ("online", False, ["login", "init offline"]),
        ("offline", True, ["init offline"]),
    ],
)
def test_mode_and_key_select_online_or_offline(
    make_config: ConfigMaker, tmp_path: Path, mode: str, has_key: bool, calls: list[str]
) -> None:
    library = FakeWandb(has_key=has_key)
    build_wandb_sink(make_config(tmp_path, mode), library).close(3)
    assert library.calls == calls
    assert library.run.exit_code == 3
    assert library.init_arguments["resume"] == ("allow" if calls[-1] == "init online" else None)


def test_init_arguments_follow_the_config(make_config: ConfigMaker, tmp_path: Path) -> None:
    library = FakeWandb()
    config = make_config(tmp_path / "papers" / "seed0", "auto")
    build_wandb_sink(config, library, init_timeout_s=4.0, close_timeout_s=10.0).close()
    arguments = library.init_arguments
    assert (arguments["name"], arguments["group"], arguments["job_type"]) == ("seed0", "papers", "ncl")
    assert (arguments["project"], arguments["entity"]) == ("tests", None)
    assert arguments["config"] == config.model_dump(mode="json")
    assert arguments["dir"] == str(tmp_path / "papers" / "seed0")
    assert arguments["settings"]["init_timeout"] == 4.0 and arguments["settings"]["finish_timeout"] == 5.0


def test_wandb_job_is_a_separate_run_in_the_group(make_config: ConfigMaker, tmp_path: Path) -> None:
    library = FakeWandb()
    config = make_config(tmp_path / "papers" / "seed0", "auto")
    folder = tmp_path / "papers" / "seed0" / "domains" / "00_acl"
    folder.mkdir(parents=True)
    build_wandb_sink(config, library, job=WandbJob(folder, "finetune", "00_acl finetune")).close()
    arguments = library.init_arguments
    assert (arguments["name"], arguments["group"], arguments["job_type"]) == ("00_acl finetune", "papers", "finetune")
    assert arguments["dir"] == str(folder) and arguments["id"] == (folder / WANDB_RUN_ID_FILE).read_text().strip()
    assert not (config.output_dir / WANDB_RUN_ID_FILE).exists()
    assert arguments["config"]["seed"] == config.seed
    build_wandb_sink(config, library, job=WandbJob(folder, "report", "papers report", {"runs": ["a", "b"]})).close()
    assert library.init_arguments["config"] == {"runs": ["a", "b"]}


def test_run_id_is_reused_unless_damaged(make_config: ConfigMaker, tmp_path: Path) -> None:
    def run_id() -> str:
        library = FakeWandb()
        build_wandb_sink(make_config(tmp_path, "offline"), library).close()
        return str(library.init_arguments["id"])

    first = run_id()
    assert first == run_id() == (tmp_path / WANDB_RUN_ID_FILE).read_text().strip()
    (tmp_path / WANDB_RUN_ID_FILE).write_text("no id/\n")
    assert run_id() not in (first, "no id/")


@pytest.mark.parametrize(("failing", "tried"), [("login", []), ("init online", ["init online"])])
def test_unreachable_server_falls_back_to_offline(
    make_config: ConfigMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture, failing: str, tried: list[str]
) -> None:
    library = FakeWandb(has_key=True, failing=(failing,))
    sink = build_wandb_sink(make_config(tmp_path, "online"), library)
    sink.log(STEP, global_step=1)
    sink.close()
    assert library.calls == ["login", *tried, "teardown", "init offline"]
    assert library.run.rows == [{"global_step": 1, "acl/step": 1, "acl/loss": 1.0}]
    assert len(list_warnings(caplog)) == 1 and "kept offline" in caplog.text


@pytest.mark.parametrize(("method", "names"), [("ncl", ["acl", "pub-med"]), ("pool", ["pool"])])
def test_every_stage_has_an_axis(make_config: ConfigMaker, tmp_path: Path, method: str, names: list[str]) -> None:
    config = make_config(tmp_path, "offline")
    library = FakeWandb()
    sink = build_wandb_sink(config.model_copy(update={"method": parse_method(method)}), library)
    sink.close()
    by_domain = {f"{name}/*": f"{name}/step" for name in names}
    assert library.run.axes == {**by_domain, "eval/*": "domains_learned", "within/*": "global_step"}


def test_evaluation_within_a_domain_is_a_curve_over_the_run(make_config: ConfigMaker, tmp_path: Path) -> None:
    library = FakeWandb()
    sink = build_wandb_sink(make_config(tmp_path, "offline"), library)
    sink.log_domain_evaluation({"domain": "acl", "domain_step": 5, "eval/acl": 1.5, "eval/general": 2.5}, global_step=7)
    sink.close()
    assert library.run.rows == [{"within/eval/acl": 1.5, "within/eval/general": 2.5, "global_step": 7}]


@pytest.mark.parametrize("failing", ["init offline", "define_metric", "log", "finish"])
def test_failures_warn_once_and_are_contained(
    make_config: ConfigMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    library = FakeWandb(failing=(failing,))
    sink = build_wandb_sink(make_config(tmp_path, "auto"), library)
    for step in range(3):
        sink.log(STEP, global_step=step)
    sink.log({"loss": 1.0}, global_step=3)
    sink.log_summary({"forgetting": 1.0})
    sink.log_table("losses", ["stage"], [["before"]])
    sink.log_image("losses", tmp_path / "missing.png")
    sink.close()
    sink.close()
    messages = list_warnings(caplog)
    assert len(messages) == 1 and "training continues" in messages[0]
    assert "Traceback" in caplog.text


def test_system_exit_does_not_end_the_worker(
    make_config: ConfigMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = FakeWandb()
    log = library.run.log

    def leave_at_the_first(row: dict[str, object]) -> None:
        monkeypatch.setattr(library.run, "log", log)
        raise SystemExit(1)

    monkeypatch.setattr(library.run, "log", leave_at_the_first)
    sink = build_wandb_sink(make_config(tmp_path, "auto"), library)
    for step in range(3):
        sink.log(STEP, global_step=step)
    sink.close()
    assert [row["global_step"] for row in library.run.rows] == [1, 2]
    assert len(list_warnings(caplog)) == 1 and "SystemExit" in list_warnings(caplog)[0]


@pytest.mark.parametrize("hanging", ["login", "init online", "finish"])
def test_hanging_library_blocks_neither_log_nor_close(
    make_config: ConfigMaker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    hanging: str,
) -> None:
    monkeypatch.setattr(wandb_sink, "TEARDOWN_TIMEOUT_S", 0.1)
    library = FakeWandb(has_key=True, hanging=(hanging, "teardown"))
    library.run.finish = lambda exit_code: library._enter("finish")  # type: ignore[method-assign]
    sink = build_wandb_sink(make_config(tmp_path, "auto"), library, close_timeout_s=0.2)
    for step in range(MAX_PENDING_CALLS + 10 if hanging != "finish" else 10):
        sink.log(STEP, global_step=step)
    closing = threading.Thread(target=sink.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    assert "did not finish within 0.2 s" in list_warnings(caplog)[-1]
    library.release.set()


def test_missing_package_is_an_error_only_if_required(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert build_library_sinks(make_config(tmp_path, "auto")) == []
    assert "not installed" in caplog.text
    for mode in ("online", "offline"):
        with pytest.raises(ConfigError, match=rf"wandb\.mode: found {mode}.*install .*auto or disabled"):
            build_library_sinks(make_config(tmp_path, mode))


@pytest.mark.parametrize(("mode", "environment"), [("disabled", ""), ("auto", "disabled")])
def test_disabled_by_config_or_environment_builds_no_sink(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, environment: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", environment)
    assert build_library_sinks(make_config(tmp_path, mode)) == []
