"""The real W&B library: files of an offline run, an unreachable server and a frozen service.

Every run has a separate process, because the library keeps its settings and its service for the life of a process.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

PREPARE = """
import logging, sys
from pathlib import Path
import das_ds.tracking.wandb_sink as module
from das_ds.tracking.background import MAX_PENDING_CALLS
from das_ds.config import RunConfig
from das_ds.tracking.tracker import Tracker, build_tracker
folder, mode = Path(sys.argv[1]), sys.argv[2]
domains = [{"name": name, "train": ["x.txt"]} for name in ("acl", "pub-med")]
config = RunConfig.model_validate(
    {"output_dir": str(folder), "model": {"name_or_path": "x"}, "domains": domains, "wandb": {"mode": mode}}
)
def step(number, domain="acl"):
    return {"domain": domain, "domain_step": number, "tokens_seen": 8 * number, "loss": 1 / number, "loss/mlm": 0.5}
"""

COMPLETE_RUN = """
with build_tracker(config, enabled=True) as tracker:
    for number in (1, 2):
        tracker.log(step(number), global_step=number)
    tracker.log_evaluation({"acl": 1.25, "pub-med": 2.5}, domains_learned=1, global_step=2)
    tracker.log(step(1, "pub-med"), global_step=3)
    tracker.log_summary({"forgetting/average": 0.75})
    tracker.log_table("loss_matrix", ["stage", "acl"], [["before", 3.5], ["after acl", 1.25]])
    tracker.log_image("loss_matrix", folder / "plot.png")
"""

UNREACHABLE = """
import wandb
sink = module.build_wandb_sink(config, wandb, init_timeout_s=1.0)
sink.log(step(1), global_step=1)
sink.close()
"""

FROZEN = """
import threading, time, psutil, wandb
sink = module.build_wandb_sink(config, wandb, close_timeout_s=1.0)
deadline = time.monotonic() + 60
while not list(folder.glob("wandb/*/*.wandb")) and time.monotonic() < deadline:
    time.sleep(0.05)
(service,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
service.suspend()
rescue = threading.Timer(60, lambda: (print("rescued", flush=True), service.kill()))
rescue.daemon = True
rescue.start()
for number in range(1, MAX_PENDING_CALLS + 100):
    sink.log(step(number), global_step=number)
sink.close()
print("closed")
"""


def run_program(text: str, folder: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose W&B knows no key and leaves nothing outside the test's folder."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = folder.parent / "home"
    clean |= {f"WANDB_{kind}_DIR": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
    clean |= {"NETRC": str(home / "netrc"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PREPARE + text, str(folder), mode]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


def read_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: a LevelDB log of 32 KiB blocks, whose first block starts with a header of 7 bytes."""
    data = path.read_bytes()
    position = 7
    record = b""
    while position + 7 <= len(data):
        left_in_block = 2**15 - position % 2**15
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, part = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):  # a complete record, or its last fragment
            yield Record.FromString(record)
            record = b""


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete run; mode auto without any key."""
    folder = tmp_path_factory.mktemp("wandb") / "run"
    folder.mkdir()
    Image.new("RGB", (5, 3), "red").save(folder / "plot.png")
    run_program(COMPLETE_RUN, folder, "auto")
    return folder


@pytest.fixture(scope="module")
def records(run_folder: Path) -> list[Any]:
    return list(read_records(only(run_folder, "wandb/offline-run-*/*.wandb")))


def test_wandb_run_has_config(run_folder: Path, records: list[Any]) -> None:
    run = next(record.run for record in records if record.HasField("run"))
    config = items(run.config.update)
    assert run.run_id == (run_folder / "wandb_run_id").read_text().strip()
    assert (run.project, run.display_name, run.run_group, run.job_type) == (
        "das_ds",
        "run",
        run_folder.parent.name,
        "das",
    )
    assert [domain["name"] for domain in config["domains"]] == ["acl", "pub-med"]
    assert config["method"]["contrastive"]["temperature"] == 0.05


def test_wandb_domains_and_evaluation_have_axes(records: list[Any]) -> None:
    metrics = [record.metric for record in records if record.HasField("metric")]
    axes = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    by_domain = {"acl/*": "acl/step", "pub-med/*": "pub-med/step"}
    assert axes == {**by_domain, "eval/*": "domains_learned", "within/*": "global_step"}
    assert {"acl/step", "pub-med/step", "domains_learned"} <= {metric.name for metric in metrics}


def test_wandb_history_has_steps_and_evaluations(records: list[Any]) -> None:
    rows = [items(record.history.item) for record in records if record.HasField("history")]
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    first = {"global_step": 1, "tokens_seen": 8, "acl/step": 1, "acl/loss": 1, "acl/loss/mlm": 0.5}
    assert rows[0] == first
    assert rows[1]["acl/step"] == 2 and rows[1]["acl/loss"] == 0.5
    assert rows[2] == {"eval/acl": 1.25, "eval/pub-med": 2.5, "domains_learned": 1, "global_step": 2}
    assert rows[3] == {
        "global_step": 3,
        "tokens_seen": 8,
        "pub-med/step": 1,
        "pub-med/loss": 1,
        "pub-med/loss/mlm": 0.5,
    }


def test_wandb_summary_table_and_image_are_recorded(run_folder: Path, records: list[Any]) -> None:
    summary: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    table = json.loads(only(run_folder, "wandb/offline-run-*/files/media/table/tables/*.table.json").read_text())
    image = only(run_folder, "wandb/offline-run-*/files/media/images/images/*.png")
    assert summary["forgetting/average"] == 0.75
    assert table["columns"] == ["stage", "acl"]
    assert table["data"] == [["before", 3.5], ["after acl", 1.25]]
    assert Image.open(image).getpixel((0, 0)) == (255, 0, 0)


def test_wandb_run_ends_as_finished(records: list[Any]) -> None:
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def test_wandb_unreachable_server_falls_back_to_offline(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = run_program(UNREACHABLE, tmp_path / "run", "auto", WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40)
    rows = [
        items(record.history.item)
        for record in read_records(only(tmp_path / "run", "wandb/offline-run-*/*.wandb"))
        if record.HasField("history")
    ]
    assert "kept offline" in done.stderr
    assert [row["acl/loss"] for row in rows] == [1]


def test_wandb_frozen_service_does_not_block_close_or_exit(tmp_path: Path) -> None:
    done = run_program(FROZEN, tmp_path / "run", "offline")
    assert done.stdout.split() == ["closed"]
    assert "did not finish within 1 s" in done.stderr
