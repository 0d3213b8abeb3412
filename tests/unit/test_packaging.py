"""What setup.py puts into the package: every file that the code reads, and every library that it imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from das_ds.shipped_files import shipped_folder
from helpers.commands import ROOT

SHIPPED = ("ds_configs", "launch/slurm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What setup.py makes: `lib/` as a wheel gets it, and the metadata."""
    folder = tmp_path_factory.mktemp("build")
    commands = ["build", "--build-base", folder, "egg_info", "--egg-base", folder]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *map(str, commands)],
        cwd=ROOT,
        capture_output=True,
        timeout=300,
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    """The folder of the package."""
    return folder / "lib" / "das_ds"


@pytest.fixture(scope="module")
def metadata(folder: Path) -> Distribution:
    return Distribution.at(folder / "das_ds.egg-info")


def files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)) for path in found}


def test_built_package_has_every_file_of_the_package_and_of_shipped_folders(built: Path) -> None:
    shipped = {f"shipped/{name}/{file}" for name in SHIPPED for file in files(ROOT / name)}
    assert len(shipped) > 8
    assert files(built) == files(ROOT / "das_ds") | shipped


def test_built_package_reads_the_shipped_files(built: Path, tmp_path: Path) -> None:
    script = "from das_ds.shipped_files import shipped_folder; print(shipped_folder('ds_configs'))"
    environment = {**os.environ, "PYTHONPATH": str(built.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == built / "shipped" / "ds_configs"


@pytest.mark.parametrize("name", SHIPPED)
def test_checkout_reads_the_originals(name: str) -> None:
    assert shipped_folder(name) == ROOT / name


def imported_packages() -> Iterator[str]:
    """Packages outside the standard library that the product imports anywhere, also in functions."""
    for path in (ROOT / "das_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            yield from (name.partition(".")[0] for name in names)


def required(distribution: Distribution, *extras: str) -> set[str]:
    """Names of the distributions that the package needs with some of its extras."""
    requirements = map(Requirement, distribution.requires or [])
    wanted = [{"extra": extra} for extra in ("", *extras)]
    return {
        canonicalize_name(requirement.name)
        for requirement in requirements
        if requirement.marker is None or any(requirement.marker.evaluate(extra) for extra in wanted)
    }


def test_every_imported_library_is_required(metadata: Distribution) -> None:
    own = {"das_ds", "__future__", *sys.stdlib_module_names}
    known = packages_distributions()
    listed = required(metadata, "all")
    missing = {
        package
        for package in set(imported_packages()) - own
        # A library that is not installed here has the name that it is imported by.
        if not listed & {canonicalize_name(name) for name in known.get(package, [package])}
    }
    assert missing == set()


def test_extra_all_is_every_extra_but_that_of_development(metadata: Distribution) -> None:
    extras = set(metadata.metadata.get_all("Provides-Extra") or ())
    assert {"triton", "liger", "wandb", "tensorboard", "mlflow", "trackio", "lora"} == extras - {"all", "dev"}
    assert required(metadata, "all") == required(metadata, *(extras - {"all", "dev"}))


def test_description_has_no_links_into_the_repository(metadata: Distribution) -> None:
    description = metadata.metadata.get_payload()
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert description.startswith("# das_ds\n")
    assert targets and all(target.startswith("https://") for target in targets)
