"""The installed package in an environment without a checkout: its files, metadata, and all commands that need files."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata

import das_ds
from das_ds.reporting.results import Results
from das_ds.run_dir import REPORT_FILE, REPORT_FOLDER, RESULTS_FILE
from helpers.ports import reserve_port
from helpers.runs import small_run
from helpers.tiny_models import tiny_model
from helpers.tiny_tokenizer import tiny_tokenizer
from helpers.wheel import Environment, build_sdist, build_wheel

pytestmark = pytest.mark.multirank

SMALL = (
    "train.steps_per_domain=2",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "data.sequence_length=16",
    "data.cache_dir=cache",
    "evaluation.max_sequences=8",
)
"""For the config that `das-ds init` writes."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    sdist = build_sdist(folder)
    return sdist, build_wheel(sdist, folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a model, and nothing of the repository."""
    home = tmp_path_factory.mktemp("home")
    small_run(home)
    shutil.rmtree(home / "tokenizer")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(home / "model")
    tiny_model("roberta", vocab_size=len(tokenizer)).save_pretrained(home / "model")
    return home


@pytest.fixture(scope="module")
def environment(built: tuple[Path, Path], home: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment") / "venv", built[1], home)


def test_distributions_have_valid_metadata_and_only_sources(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(path), validate=True)
        folders = {name.partition("/")[0] for name in archive.namelist()}
    assert folders == {"das_ds", f"das_ds-{das_ds.__version__}.dist-info"}
    assert str(metadata.version) == das_ds.__version__ and metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown" and metadata.description
    with tarfile.open(sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    expected = {"LICENSE", "PKG-INFO", "README.md", "das_ds", "das_ds.egg-info", "ds_configs", "launch"}
    assert top == expected | {"pyproject.toml", "setup.cfg", "setup.py"}


def test_commands_are_those_of_the_wheel(environment: Environment) -> None:
    place = environment.run("python", "-c", "import das_ds; print(das_ds.__file__)").stdout.strip()
    assert Path(place).is_relative_to(environment.packages)
    for command in (["das-ds"], ["python", "-m", "das_ds"]):
        assert environment.run(*command, "--version").stdout == f"das_ds {das_ds.__version__}\n"
    assert shutil.which("das-ds", path=environment.bin) is not None


def test_new_config_is_checked_and_trains_on_two_ranks(environment: Environment, home: Path) -> None:
    words = ["--model", "model", "--domain", "food=food.txt", "papers=papers.txt", "--general", "general.txt"]
    assert "wrote run.yaml; next: das-ds preflight" in environment.run("das-ds", "init", *words).stdout
    shown = environment.run("das-ds", "check-config", "--config", "run.yaml", *SMALL).stdout
    assert yaml.safe_load(shown)["deepspeed"] == "zero2"
    environment.run("das-ds", "check-config", "--config", "run.yaml", *SMALL, "deepspeed=zero3_offload")
    launcher = ["deepspeed", "--num_accelerators", 2, "--master_port", reserve_port(), "--module", "das_ds"]
    environment.run(*launcher, "train", "--config", "run.yaml", *SMALL)
    run = home / "runs" / "run"
    results = Results.read(run / RESULTS_FILE)
    assert results.complete and results.world_size == 2 and results.domains == ["food", "papers"]
    assert (run / REPORT_FOLDER / REPORT_FILE).exists() and (run / REPORT_FOLDER / "index.html").exists()
    # Compiled from the source in the wheel, as this home folder had nothing compiled before.
    assert len(list((home / ".cache" / "das_ds" / "kernels").glob("*.so"))) == 1
    assert environment.run("das-ds", "status", run).stdout.startswith(f"{run}: finished")


def test_batch_files_run_the_wheel(environment: Environment, home: Path) -> None:
    environment.run("das-ds", "slurm", "init", "jobs")
    for name in ("train", "train_deepspeed", "sweep"):
        text = (home / "jobs" / f"{name}.sbatch").read_text(encoding="utf-8")
        assert f"\ndefault_python={shlex.quote(str(environment.python))}\n" in text
        subprocess.run(["bash", "-n", home / "jobs" / f"{name}.sbatch"], check=True)
    values = {
        "output_dir": "run",
        "model": {"name_or_path": "model"},
        "domains": [{"name": "a", "train": ["food.txt"]}],
    }
    (home / "job.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    facts = environment.run("python", "-P", "-m", "das_ds.slurm.job_facts", "--config", "job.yaml").stdout
    assert facts.startswith(f"run\ndas_ds {das_ds.__version__} of {environment.packages / 'das_ds'}, python ")
