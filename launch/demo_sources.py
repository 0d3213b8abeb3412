"""Text found in every installation, as documents of four languages: the demo downloads nothing.

`general` is English prose (package descriptions, Python's help topics, docstrings), `python` the functions of the
standard library, `cpp` PyTorch's C++ headers, `formulas` the expressions asserted in SymPy's tests. License texts, the
obvious alternative, are copies of each other: less than half a megabyte remains after deduplication.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

DOCUMENTED_PACKAGES = ("datasets", "networkx", "numpy")
STDLIB_SKIPPED = {"site-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "pydoc_data", "encodings"}
MIN_PROSE_CHARACTERS = 80
MIN_PLAIN_FRACTION = 0.93
CHUNK_CHARACTERS = 1500

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.Module | ast.ClassDef | Function


def site_packages() -> Path:
    """Folder of the installed packages."""
    return Path(sysconfig.get_paths()["purelib"])


def stdlib_files() -> list[Path]:
    """Python files of the standard library, without its tests and generated tables."""
    return python_files(Path(sysconfig.get_paths()["stdlib"]), STDLIB_SKIPPED)


def python_files(root: Path, skipped: set[str]) -> list[Path]:
    """Python files under `root` outside folders named in `skipped`."""
    return [path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts)]


def parse(path: Path) -> tuple[ast.Module, list[str]] | None:
    """Syntax tree and lines of a file; None if it is not valid Python of this version (some are test data)."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(source), source.splitlines()
    except (SyntaxError, ValueError):
        return None


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences: long enough, almost all letters, no markup, no examples."""
    marked = paragraph.startswith((">>>", "|", "..", "#", "[")) or "http" in paragraph or "---" in paragraph
    if marked or len(paragraph) < MIN_PROSE_CHARACTERS:
        return False
    plain = sum(character.isalpha() or character in " ,.'" for character in paragraph)
    return plain >= MIN_PLAIN_FRACTION * len(paragraph)


def prose(text: str) -> Iterator[str]:
    """English paragraphs of a text, each on one line."""
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
    """Paragraphs of English prose: package descriptions, Python's help topics, docstrings."""
    # Half a megabyte, imported only by the demo.
    from pydoc_data.topics import topics

    for distribution in metadata.distributions():
        yield from prose(str(distribution.metadata.json.get("description", "")))
    for topic in topics.values():
        yield from prose(topic)
    packages = [python_files(site_packages() / package, {"tests"}) for package in DOCUMENTED_PACKAGES]
    for path in sum(packages, stdlib_files()):
        for docstring in docstrings(path):
            yield from prose(docstring)


def without_docstrings(function: Function, lines: list[str]) -> str:
    """Source of a function without its docstring and those of the functions and classes inside it."""
    cut: set[int] = set()
    for scope in ast.walk(function):
        if isinstance(scope, Scope) and ast.get_docstring(scope, clean=False) is not None:
            cut.update(line_numbers(scope.body[0]))
    return textwrap.dedent("\n".join(lines[number - 1] for number in line_numbers(function) if number not in cut))


def line_numbers(node: ast.stmt | ast.expr) -> range:
    """Line numbers of a node, from 1."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def python_documents() -> Iterator[str]:
    """Functions and methods of the standard library without their docstrings, which are English."""
    for path in stdlib_files():
        tree, lines = parse(path) or (ast.Module([], []), [])
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield without_docstrings(node, lines)


def cpp_documents() -> Iterator[str]:
    """PyTorch's C++ headers in chunks of full paragraphs, without the generated operator headers (all alike)."""
    root = site_packages() / "torch" / "include"
    for path in root.rglob("*.h"):
        if "ops" not in path.relative_to(root).parts:
            yield from chunks(path.read_text(encoding="utf-8", errors="ignore"))


def chunks(text: str) -> Iterator[str]:
    """Full paragraphs, joined to at least CHUNK_CHARACTERS; the last chunk may be shorter."""
    chunk = ""
    for paragraph in re.split(r"\n\s*\n", text):
        chunk += paragraph.strip("\n") + "\n"
        if len(chunk) >= CHUNK_CHARACTERS:
            yield chunk
            chunk = ""
    yield chunk


def formula_documents() -> Iterator[str]:
    """Expressions asserted in SymPy's tests, one document per test function."""
    for path in (site_packages() / "sympy").rglob("tests/test_*.py"):
        tree, lines = parse(path) or (ast.Module([], []), [])
        for function in tree.body:
            if isinstance(function, ast.FunctionDef):
                asserts = [node.test for node in ast.walk(function) if isinstance(node, ast.Assert)]
                numbers = [number for test in asserts for number in line_numbers(test)]
                yield "\n".join(lines[number - 1].strip().removeprefix("assert ") for number in numbers)
