"""Real text for the demo, taken from what every installation holds: no download, the same text on every machine.

Four corpora that differ in language: `general` (English prose from package descriptions, Python's help topics and
docstrings), `python` (functions of the standard library), `cpp` (PyTorch's C++ headers) and `formulas` (the
expressions that SymPy's tests assert). Licence texts were tried first, but most are copies of each other: what is
left without the copies is far below 1 MB.

Each corpus becomes `<name>/train.jsonl` and `<name>/valid.jsonl`, one document with its newlines in `text` per line.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from das_ds.errors import DataError

MIN_BYTES = 1_000_000
VALID_SHARE = 0.05
CHUNK_CHARACTERS = 1500
MIN_CHARACTERS = 80
MARKER = "complete.json"
SOURCES = ("matplotlib", "networkx", "numpy", "pandas", "sympy", "torch", "transformers")
DOCUMENTED_PACKAGES = ("matplotlib", "networkx", "numpy", "pandas")
STDLIB_SKIPPED = {"site-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "pydoc_data", "encodings"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Scope = ast.Module | Definition


@dataclass(frozen=True)
class Corpus:
    """A named source of documents and the most that is taken from it."""

    name: str
    documents: Callable[[], Iterator[str]]
    max_bytes: int


def site_packages() -> Path:
    """Folder of the installed packages."""
    return Path(sysconfig.get_paths()["purelib"])


def python_files(root: Path, skipped: set[str]) -> Iterator[Path]:
    """Python files under `root`, sorted, outside folders named in `skipped`."""
    for path in sorted(root.rglob("*.py")):
        if not skipped.intersection(path.relative_to(root).parts):
            yield path


def parse(path: Path) -> tuple[ast.Module, list[str]] | None:
    """Syntax tree and lines of a file; None where it is not valid UTF-8 Python (some are test data)."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            return ast.parse(source), source.splitlines()
    except (SyntaxError, ValueError):
        return None


def stdlib_files() -> Iterator[Path]:
    """Python files of the standard library."""
    return python_files(Path(sysconfig.get_paths()["stdlib"]), STDLIB_SKIPPED)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences: long enough, almost all letters, no markup or examples."""
    if len(paragraph) < MIN_CHARACTERS or paragraph.startswith((">>>", "|", "..", "#", "[")) or "http" in paragraph:
        return False
    plain = sum(character.isalpha() or character in " ,.'" for character in paragraph)
    return plain >= 0.93 * len(paragraph)


def prose(text: str) -> Iterator[str]:
    """The paragraphs of `text` that are English prose, each on one line."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if is_prose(paragraph):
            yield paragraph


def docstrings(path: Path) -> Iterator[str]:
    """All docstrings of a Python file."""
    parsed = parse(path)
    for node in ast.walk(parsed[0]) if parsed else ():
        if isinstance(node, Scope) and (text := ast.get_docstring(node)):
            yield text


def general_documents() -> Iterator[str]:
    """English prose: package descriptions, Python's help topics, docstrings."""
    from pydoc_data.topics import topics

    for distribution in metadata.distributions():
        yield from prose(str(distribution.metadata.get_payload()))
    for topic in topics.values():
        yield from prose(topic)
    folders = [site_packages() / package for package in DOCUMENTED_PACKAGES]
    for path in [*stdlib_files(), *(path for folder in folders for path in python_files(folder, {"tests"}))]:
        for docstring in docstrings(path):
            yield from prose(docstring)


def without_docstrings(node: Definition, lines: list[str]) -> str:
    """Source lines of a definition, its own and its members' docstrings cut out."""
    cut: set[int] = set()
    for scope in ast.walk(node):
        if isinstance(scope, Scope) and ast.get_docstring(scope, clean=False) is not None:
            first = scope.body[0]
            cut.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return textwrap.dedent("\n".join(lines[number - 1] for number in span if number not in cut))


def python_documents() -> Iterator[str]:
    """Functions and methods of the standard library without their docstrings, which are English."""
    for path in stdlib_files():
        parsed = parse(path)
        for node in ast.walk(parsed[0]) if parsed else ():
            if parsed and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield without_docstrings(node, parsed[1])


def cpp_documents() -> Iterator[str]:
    """PyTorch's C++ headers in runs of whole paragraphs; generated operator headers, all alike, are left out."""
    root = site_packages() / "torch" / "include"
    for path in sorted(root.rglob("*.h")):
        if "ops" in path.relative_to(root).parts:
            continue
        chunk = ""
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="ignore")):
            chunk += paragraph.strip("\n") + "\n"
            if len(chunk) >= CHUNK_CHARACTERS:
                yield chunk
                chunk = ""
        yield chunk


def formula_documents() -> Iterator[str]:
    """Expressions asserted by SymPy's tests, one document per test function."""
    for path in sorted((site_packages() / "sympy").rglob("tests/test_*.py")):
        parsed = parse(path)
        for node in parsed[0].body if parsed else ():
            if parsed and isinstance(node, ast.FunctionDef):
                asserts = [statement.test for statement in ast.walk(node) if isinstance(statement, ast.Assert)]
                spans = [range(test.lineno - 1, test.end_lineno or test.lineno) for test in asserts]
                lines = [parsed[1][number] for span in spans for number in span]
                yield "\n".join(line.strip().removeprefix("assert ") for line in lines)


CORPORA = (
    Corpus("general", general_documents, 4_000_000),
    Corpus("python", python_documents, 3_000_000),
    Corpus("cpp", cpp_documents, 3_000_000),
    Corpus("formulas", formula_documents, 3_000_000),
)
"""The base model's corpus first, then the domains in the order in which they are learned."""


def select(documents: Iterator[str], max_bytes: int) -> list[str]:
    """Distinct documents of useful length in the order of their digests, at most `max_bytes` of them.

    The digest order mixes all sources and does not depend on where and in what order the files were found.
    """
    distinct = {
        hashlib.sha256(text.encode("utf-8", "ignore")).digest(): text
        for document in documents
        if len(text := document.strip()) >= MIN_CHARACTERS
    }
    chosen: list[str] = []
    num_bytes = 0
    for _, text in sorted(distinct.items()):
        num_bytes += len(text.encode("utf-8", "ignore"))
        if num_bytes > max_bytes:
            break
        chosen.append(text)
    return chosen
