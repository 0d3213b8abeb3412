"""The documents: links and anchors resolve, commands and paths exist, YAML blocks are valid run configs."""

import ast
import copy
import importlib
import importlib.util
import itertools
import pkgutil
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from das_ds import cli, config
from das_ds.config import RunConfig
from das_ds.config.io import dump_config, load_config, parse_config
from das_ds.config.section import Section

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
INDEX = ROOT / "docs" / "README.md"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRY_POINTS = ("train", "preflight", "evaluate", "finetune", "benchmark")
PATH_ROOTS = (ROOT, ROOT / "das_ds")
CODE_PATH = re.compile(r"`((?:\w+/)+\w+\.(?:py|sh|sbatch|json|md|cpp))`")
NOT_OURS = ("base", "report", "domains", "networks", "approaches")
"""First folders of paths in a run's folder and in the released code of the paper."""
MINIMAL: dict[str, Any] = {
    "output_dir": "runs/docs",
    "model": {"name_or_path": "some-model"},
    "domains": [{"name": name, "train": [f"{name}.txt"]} for name in ("acl", "pubmed", "chemistry")],
    "general": {"name": "general", "train": ["general.txt"]},
    "method": {"name": "directions"},
    "deepspeed": "zero2",
}
"""Completes a block that shows some sections only."""
WHOLE = {"output_dir", "model", "domains"}
"""A block with these is a complete config."""


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages; "" is a block without one."""
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def without_blocks(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings as GitHub makes them: lower case, punctuation dropped, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page's shell blocks as words: continued lines joined, comments and prompts dropped."""
    for block in blocks(page, "", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:
                continue  # a picture, or text with an apostrophe
            for is_separator, group in itertools.groupby(words, lambda word: word in ("&&", "|")):
                command = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), group))
                if command and not is_separator:
                    yield command


def product_call(words: list[str]) -> list[str] | None:
    """Arguments of the `das-ds` command that a shell command runs, under any launcher; None: it runs none."""
    if words[0] == "das-ds":
        return words[1:]
    for position, word in enumerate(words):
        path = Path(word)
        if path.parent == Path("launch") and path.suffix == ".py" and path.stem in ENTRY_POINTS:
            return [path.stem, *words[position + 1 :]]
        if word == "das_ds" and words[position - 1] in ("-m", "--module"):
            return words[position + 1 :]
        if path.suffix == ".sbatch" and path.stem.startswith("train"):
            return ["train", *words[position + 1 :]]
    return None


@cache
def options(command: str) -> frozenset[str]:
    """The options in a command's own help."""
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr(
            "argparse.ArgumentParser._print_message", lambda self, message, file=None: printed.append(message)
        )
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
    assert ended.value.code == 0, f"das-ds {command}: unknown command"
    return frozenset(re.findall(r"--[a-z][a-z_-]*", "".join(printed)))


def complete(values: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(MINIMAL) | values


def documents(block: str) -> Iterator[dict[str, Any]]:
    """The configs of a YAML block: one, or one per line where it shows alternatives for the same key."""
    keys = re.findall(r"^(\w+):", block, re.MULTILINE)
    texts = [block] if len(keys) == len(set(keys)) else block.splitlines()
    for text in texts:
        values = yaml.safe_load(text)
        if isinstance(values, dict):
            yield values


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_blocks(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_code_paths_exist(page: Path) -> None:
    paths = CODE_PATH.findall(without_blocks(page))
    missing = [path for path in paths if not any((root / path).exists() for root in PATH_ROOTS)]
    assert [path for path in missing if path.split("/")[0] not in NOT_OURS] == []


def test_documents_named_in_code_exist() -> None:
    sources = [path for folder in ("das_ds", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.*")]
    named = {
        name
        for path in sources
        if path.suffix in (".py", ".sh", ".sbatch")
        for name in re.findall(r"docs/[\w/]+\.md", path.read_text(encoding="utf-8"))
    }
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_index_lists_every_page() -> None:
    listed = {(INDEX.parent / target).resolve() for target in LINK.findall(INDEX.read_text(encoding="utf-8"))}
    assert listed == {page for page in PAGES if page.is_relative_to(INDEX.parent)} - {INDEX}


def test_api_pages_list_every_section_of_a_run_config() -> None:
    # Read, not imported: mkdocs, which calls it, is no dependency of the tests.
    tree = ast.parse((ROOT / "docs_site.py").read_text(encoding="utf-8"))
    values = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    listed = ast.literal_eval(values["SECTIONS"])
    names = {f"das_ds.config.{found.name}" for found in pkgutil.iter_modules(config.__path__)}
    # A table of units has its own page, docs/internals/architecture_specs.md.
    modules = [importlib.import_module(name) for name in names - {"das_ds.config.architecture"}]
    sections = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Section) and value.__module__ == module.__name__
    }
    assert sorted(listed) == sorted(sections - {"section.Section", "run.RunConfig"})


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w -]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    known = {name for line in targets for name in line.split()}
    inline = re.findall(r"`make ([a-z-]+)", without_blocks(page))
    called = [word for words in commands(page) if words[0] == "make" for word in words[1:] if "=" not in word]
    assert set(inline + called) <= known


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_modules_and_scripts_of_commands_exist(page: Path) -> None:
    for words in commands(page):
        for before, word in zip(["", *words], words, strict=False):
            if before == "-m" and word.startswith(("benchmarks.", "das_ds", "launch.")):
                assert importlib.util.find_spec(word), word
            if word.startswith(("launch/", "benchmarks/", "ds_configs/")):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_have_the_options_of_their_help(page: Path) -> None:
    for words in commands(page):
        arguments = product_call(words)
        if arguments is not None and arguments[:1] != ["COMMAND"]:
            used = {word.partition("=")[0] for word in arguments[1:] if word.startswith("--")}
            assert used <= options(arguments[0]) | {"--help"}, words


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_overrides_of_commands_are_valid(page: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    for words in commands(page):
        arguments = product_call(words)
        # LABEL=RUN and NAME=PATH are no overrides.
        if arguments is not None and arguments[0] not in ("report", "init"):
            values = [word for before, word in zip(["", *arguments], arguments, strict=False) if before != "--results"]
            overrides = [word for word in values if re.fullmatch(r"[a-z][\w.]*=.*", word)]
            load_config(config, overrides)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_yaml_blocks_are_run_configs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs" / "papers"
    earlier.mkdir(parents=True)
    dump_config(RunConfig.model_validate(MINIMAL), earlier / "config.yaml")
    for block in blocks(page, "yaml"):
        for values in documents(block):
            if "continue_from" in values:
                parse_config(values, [])
            elif values.keys() >= WHOLE:
                RunConfig.model_validate(values)
            else:
                RunConfig.model_validate(complete(values))


def test_commands_are_found_behind_every_launcher() -> None:
    calls = [
        "das-ds train --config a",
        "deepspeed --num_accelerators 2 launch/train.py --config a",
        "srun python launch/train.py --config a",
        "sbatch --nodes 2 launch/slurm/train.sbatch --config a",
        "python -m das_ds train --config a",
        "deepspeed --module das_ds train --config a",
    ]
    assert [product_call(shlex.split(call)) for call in calls] == [["train", "--config", "a"]] * len(calls)
    assert product_call(["make", "demo"]) is None
