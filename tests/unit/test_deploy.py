"""Containers and cluster files: what they copy exists, and what they start is a valid run on the ranks they name."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from das_ds import __version__, cli
from das_ds.config.deepspeed import build_engine_config
from das_ds.config.io import parse_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
APPTAINER = (DEPLOY / "das_ds.def").read_text(encoding="utf-8")
SKYPILOT = yaml.safe_load((DEPLOY / "skypilot" / "train.yaml").read_text(encoding="utf-8"))
KUBERNETES = (DEPLOY / "kubernetes" / "train.yaml").read_text(encoding="utf-8")
OF_POD = {"RANK": "1", "MASTER_ADDR": "das-ds-master-0", "MASTER_PORT": "23456"}
"""Variables that the training operator sets."""


def copied_by_docker() -> set[str]:
    """Sources of the COPY instructions that read the repository."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def section(name: str) -> str:
    """A section of the Apptainer recipe."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", APPTAINER, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return found[1]


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap and the job."""
    config_map, job = yaml.safe_load_all(KUBERNETES)
    return config_map, job


def test_images_copy_the_same_files_which_exist() -> None:
    sources = copied_by_docker()
    assert sources and all((ROOT / source).exists() for source in sources)
    pairs = [line.split() for line in section("files").splitlines() if line.strip()]
    assert {source for source, _ in pairs} == sources
    assert all(target == f"/source/{source}" for source, target in pairs)
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == sources


def test_images_have_the_same_base_packages_and_steps() -> None:
    assert re.findall(r"^From: (\S+)$", APPTAINER, re.MULTILINE) == re.findall(
        r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE
    )
    installed = re.findall(r"--no-install-recommends ((?:[\w+-]+ ?)+)", DOCKERFILE)
    (in_recipe,) = re.findall(r"--no-install-recommends ((?:[\w+-]+ ?)+)", section("post"))
    assert set(" ".join(installed).split()) == set(in_recipe.split())
    steps = r"python -m (pip install [^\n\\]+)"
    assert len(re.findall(steps, DOCKERFILE)) == 3
    assert [step.strip() for step in re.findall(steps, DOCKERFILE)] == re.findall(steps, section("post"))


def test_image_has_all_that_the_package_is_built_from() -> None:
    shipped = re.findall(r'"(\w+)(?:/\w+)*/\*\.\w+"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "das_ds", *shipped} <= copied_by_docker()


def test_kubernetes_command_starts_a_valid_run_on_all_gpus(tmp_path: Path) -> None:
    config_map, job = documents()
    replicas = job["spec"]["pytorchReplicaSpecs"]
    # Kubeflow takes the container of this name for the one that it gives variables to.
    containers = [replica["template"]["spec"]["containers"][0] for replica in replicas.values()]
    assert [container["name"] for container in containers] == ["pytorch"] * 2 and containers[0] == containers[1]
    command = containers[0]["command"]
    words = [re.sub(r"\$\((\w+)\)", lambda name: OF_POD[name[1]], word) for word in command]
    assert words[0] == "torchrun"
    options = parse_args(words[1:])
    assert options.module and options.training_script == "das_ds" and options.node_rank == 1
    assert options.master_addr == OF_POD["MASTER_ADDR"] and options.master_port == int(OF_POD["MASTER_PORT"])
    assert int(options.nnodes) == sum(replica["replicas"] for replica in replicas.values())
    assert int(options.nproc_per_node) == containers[0]["resources"]["limits"]["nvidia.com/gpu"]

    assert options.training_script_args[:2] == ["train", "--config"]
    mounted = Path(options.training_script_args[2])
    mounts = {mount["name"]: mount["mountPath"] for mount in containers[0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in replicas["Master"]["template"]["spec"]["volumes"]}
    assert set(mounts) == set(volumes) and str(mounted.parent) == mounts["config"]
    assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    path = tmp_path / mounted.name
    path.write_text(config_map["data"][mounted.name], encoding="utf-8")
    assert cli.main(["check-config", "--config", str(path)]) == 0
    config = parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), [])
    assert str(config.output_dir).startswith(mounts["shared"])
    build_engine_config(config, world_size=int(options.nnodes) * int(options.nproc_per_node))


def test_image_of_kubernetes_is_that_of_this_version() -> None:
    _, job = documents()
    images = {
        replica["template"]["spec"]["containers"][0]["image"] for replica in job["spec"]["pytorchReplicaSpecs"].values()
    }
    assert [image.rpartition(":")[2] for image in images] == [__version__]


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (
            "kubernetes",
            [
                "run.yaml:",
                "image:",
                "--nnodes=",
                "--nproc-per-node=",
                "limits:",
                "claimName:",
                "Worker:\n      replicas:",
            ],
        ),
        ("skypilot", ["num_nodes:", "accelerators:", "/shared:", "RUN_CONFIG:"]),
    ],
)
def test_fields_to_adapt_are_marked(file: str, fields: list[str]) -> None:
    text = (DEPLOY / file / "train.yaml").read_text(encoding="utf-8")
    marked = [re.search(rf"{re.escape(field)}.*# <-", text) for field in fields]
    assert all(marked) and len(re.findall(r"^(?!#).*# <-", text, re.MULTILINE)) == len(fields)


@pytest.mark.parametrize("node_rank", [0, 1])
def test_skypilot_command_is_a_launch_on_all_nodes(tmp_path: Path, node_rank: int) -> None:
    for name in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=SKYPILOT[name], text=True, check=True)
    gpus = SKYPILOT["resources"]["accelerators"].partition(":")[2]
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text('PATH="$PWD/.venv/bin:$PATH"\n', encoding="utf-8")
    torchrun = activate.with_name("torchrun")
    torchrun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    torchrun.chmod(torchrun.stat().st_mode | stat.S_IXUSR)
    nodes = {
        "SKYPILOT_NUM_NODES": str(SKYPILOT["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": gpus,
        "SKYPILOT_NODE_RANK": str(node_rank),
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
    }
    environment = {"PATH": os.environ["PATH"]} | SKYPILOT["envs"] | nodes
    done = subprocess.run(
        ["bash", "-euc", SKYPILOT["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    options = parse_args(done.stdout.splitlines())
    assert (options.nnodes, options.nproc_per_node) == ("2", gpus) and options.node_rank == node_rank
    assert options.master_addr == "10.0.0.7" and (ROOT / options.training_script).exists()
    assert options.training_script_args == ["--config", SKYPILOT["envs"]["RUN_CONFIG"]]
    assert Path(SKYPILOT["envs"]["RUN_CONFIG"]).parent == Path(*SKYPILOT["volumes"])


def test_skypilot_setup_is_a_target_of_make() -> None:
    (command,) = SKYPILOT["setup"].splitlines()
    assert shlex.split(command) == ["make", "setup"]
    assert re.search(r"^setup:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
