"""The import rule, read from the syntax trees: a file imports only from lower floors.

Imports inside functions count too; modules of one folder may import each other.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Lowest first. Files of one floor stand in the order in which they may import each other; folders may not.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "thread_guard"),
    ("durable", "user_files"),
    ("hub",),
    ("config",),
    ("config_schema",),
    ("deepspeed_keys",),
    ("config_io", "deepspeed_config"),
    ("functional",),
    ("kernels",),
    ("models", "data", "distributed", "tracking"),
    ("checkpointing", "methods", "evaluation"),
    ("training",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
RANKS_ONLY = ("deepspeed", "torch.distributed")
LAZY = ("wandb", "datasets", "matplotlib", "triton", "liger_kernel", "peft")
TRITON_FILE = "_triton"
"""Ending of the files that hold Triton kernels; nothing else imports Triton or them when it is loaded."""


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement may load; `from a import b` may load a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import, expected an absolute one"
        return [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def all_imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        yield from imported(node)


def imports_at_load(source: str) -> Iterator[str]:
    """Imports that run when the module is loaded: not those in functions, nor those for type checkers."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        yield from imported(node)
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not is_for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))


def belongs_to(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_triton_file(name: str) -> bool:
    """Whether a dotted name `das_ds.folder.file...` is a file of Triton kernels or something in it."""
    return any(file.endswith(TRITON_FILE) for file in name.split(".")[2:3])


def floor_breaches(part: str, source: str) -> set[str]:
    """Parts of das_ds that a file of `part` imports though they do not stand on a lower floor."""
    parts = {name.split(".")[1] for name in all_imports(source) if name.startswith("das_ds.")}
    return {other for other in parts & set(FLOOR_OF) if other != part and FLOOR_OF[other] >= FLOOR_OF[part]}


def product_files() -> list[Path]:
    return sorted((REPOSITORY / "das_ds").rglob("*.py"))


def part_of(path: Path) -> str:
    """The file or folder directly under das_ds, or launch, that holds a file."""
    return path.relative_to(REPOSITORY).parts[1].removesuffix(".py")


def identity(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def sources(paths: Iterable[Path]) -> dict[str, tuple[str, str]]:
    """File -> its part of das_ds and its text."""
    return {identity(path): (part_of(path), path.read_text(encoding="utf-8")) for path in paths}


def test_product_files_import_from_lower_floors_only() -> None:
    breaches = {}
    for file, (part, source) in sources(product_files()).items():
        if part == "__init__":
            assert not list(all_imports(source)), file
            continue
        assert part in FLOOR_OF, f"{part} has no floor; known: {', '.join(FLOOR_OF)}"
        if found := floor_breaches(part, source):
            breaches[file] = found
    assert not breaches


def test_product_files_load_slow_libraries_in_functions_only() -> None:
    breaches = {}
    for file, (_, source) in sources(product_files()).items():
        at_load = list(imports_at_load(source))
        if file.endswith(f"{TRITON_FILE}.py"):
            at_load = [name for name in at_load if not belongs_to(name, ("triton",)) and not is_triton_file(name)]
        if found := [name for name in at_load if belongs_to(name, LAZY) or is_triton_file(name)]:
            breaches[file] = found
    assert not breaches


def test_ranks_are_the_business_of_distributed_alone() -> None:
    files = sources([*product_files(), *(REPOSITORY / "launch").glob("*.py")])
    outside = {file: list(all_imports(source)) for file, (part, source) in files.items() if part != "distributed"}
    breaches = {file: [name for name in names if belongs_to(name, RANKS_ONLY)] for file, names in outside.items()}
    assert not {file: names for file, names in breaches.items() if names}


@pytest.mark.parametrize(
    ("part", "source", "breaches"),
    [
        ("functional", "from das_ds.models.gates import gates", {"models"}),
        ("functional", "def f():\n    import das_ds.training", {"training"}),
        ("data", "from das_ds import tracking", {"tracking"}),
        ("config", "from das_ds.config.io import load_config", {"config_io"}),
        ("data", "from das_ds.data.blocks import blocks\nfrom das_ds.errors import DataError\nimport torch", set()),
    ],
)
def test_breach_is_found(part: str, source: str, breaches: set[str]) -> None:
    assert floor_breaches(part, source) == breaches


def test_imports_in_functions_do_not_run_at_load() -> None:
    source = "import a\nif TYPE_CHECKING:\n    import b\nclass C:\n    import c\n    def f(self):\n        import d\n"
    assert set(imports_at_load(source)) == {"a", "c"}
    assert set(all_imports(source)) == {"a", "b", "c", "d"}
    assert belongs_to("torch.distributed.nn", RANKS_ONLY)
    assert not belongs_to("torch.distributions", RANKS_ONLY)
