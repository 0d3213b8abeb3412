"""The import rules of das_ds, read from the syntax trees; imports inside functions count too.

A layer is a package or module directly under das_ds. `LAYERS` lists them from the bottom up: a layer imports only
layers listed before it, and modules of one layer may import each other. `FORBIDDEN` adds what order alone cannot say.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LAYERS: tuple[str, ...] = (
    "errors",
    "thread_guard",
    "progress",
    "user_files",
    "shipped_files",
    "storage",
    "hub",
    "config",
    "versions",
    "run_dir",
    "functional",
    "kernels",
    "distributed",
    "tracking",
    "data",
    "models",
    "engine",
    "fault_tolerance",
    "context",
    "softmask",
    "checkpoint",
    "methods",
    "downstream",
    "benchmark",
    "reporting",
    "training",
    "preflight",
    "integrations",
    "new_config",
    "slurm",
    "commands",
    "command_parser",
    "cli",
    "__main__",
)
POSITION = {layer: position for position, layer in enumerate(LAYERS)}
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "kernels": ("config",),
    "distributed": ("config",),
    "data": ("distributed", "tracking"),
    "models": ("data", "distributed", "tracking"),
    "engine": ("data", "models", "tracking"),
    "fault_tolerance": ("config", "data", "engine", "models", "tracking"),
    "checkpoint": ("config", "data", "engine", "models", "softmask", "tracking"),
    "methods": ("checkpoint", "fault_tolerance", "tracking"),
}
"""Layer -> layers that it may not import although they stand lower."""
WITHOUT_TORCH = ("config", "storage", "run_dir", "user_files", "shipped_files", "hub", "versions")
PROCESS_GROUP_LAYERS = ("distributed", "engine", "softmask", "fault_tolerance", "preflight")
"""Layers that call torch.distributed themselves; the others go through `distributed.ProcessGroup`."""
LAZY = (
    "wandb",
    "torch.utils.tensorboard",
    "mlflow",
    "trackio",
    "datasets",
    "matplotlib",
    "triton",
    "liger_kernel",
    "peft",
)
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


def layer_breaches(layer: str, source: str) -> set[str]:
    """Layers that a file of `layer` imports and may not."""
    layers = {name.split(".")[1] for name in all_imports(source) if name.startswith("das_ds.")} & set(POSITION)
    not_lower = {other for other in layers if other != layer and POSITION[other] >= POSITION[layer]}
    return not_lower | layers & set(FORBIDDEN.get(layer, ()))


def product_files() -> list[Path]:
    return sorted((REPOSITORY / "das_ds").rglob("*.py"))


def layer_name(path: Path) -> str:
    """The file or folder directly under das_ds, or launch, that contains a file."""
    return path.relative_to(REPOSITORY).parts[1].removesuffix(".py")


def identity(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def sources(paths: Iterable[Path]) -> dict[str, tuple[str, str]]:
    """File -> its part of das_ds and its text."""
    return {identity(path): (layer_name(path), path.read_text(encoding="utf-8")) for path in paths}


def test_layer_imports_lower_layers_only() -> None:
    breaches = {}
    for file, (layer, source) in sources(product_files()).items():
        if layer == "__init__":
            assert not list(all_imports(source)), file
            continue
        assert layer in POSITION, f"{file}: found layer {layer}, expected one of {', '.join(LAYERS)}"
        if found := layer_breaches(layer, source):
            breaches[file] = found
    assert not breaches


def test_slow_libraries_are_imported_in_functions_only() -> None:
    breaches = {}
    for file, (_, source) in sources(product_files()).items():
        at_load = list(imports_at_load(source))
        if file.endswith(f"{TRITON_FILE}.py"):
            at_load = [name for name in at_load if not belongs_to(name, ("triton",)) and not is_triton_file(name)]
        if found := [name for name in at_load if belongs_to(name, LAZY) or is_triton_file(name)]:
            breaches[file] = found
    assert not breaches


def libraries_outside(layers: tuple[str, ...], library: str) -> list[str]:
    """Files outside `layers` that import a library."""
    files = sources([*product_files(), *(REPOSITORY / "launch").glob("*.py")])
    return [
        file
        for file, (layer, source) in files.items()
        if layer not in layers and any(belongs_to(name, (library,)) for name in all_imports(source))
    ]


def test_deepspeed_is_imported_by_the_engine_only() -> None:
    # The process group is made by deepspeed.init_distributed, before there is an engine.
    assert libraries_outside(("engine",), "deepspeed") == ["das_ds/distributed/process_group.py"]


def test_torch_distributed_is_imported_by_few_layers() -> None:
    assert libraries_outside(PROCESS_GROUP_LAYERS, "torch.distributed") == []


def test_config_and_files_do_without_torch() -> None:
    others = tuple(layer for layer in (*LAYERS, "demo", "demo_bounds") if layer not in WITHOUT_TORCH)
    assert libraries_outside(others, "torch") == []


@pytest.mark.parametrize(
    ("layer", "source", "breaches"),
    [
        ("functional", "from das_ds.models.gates import gates", {"models"}),
        ("functional", "def f():\n    import das_ds.training", {"training"}),
        ("data", "from das_ds import tracking", {"tracking"}),
        ("data", "from das_ds.distributed import rng", {"distributed"}),
        ("engine", "from das_ds.softmask.apply import apply_masks", {"softmask"}),
        ("data", "from das_ds.data.blocks import blocks\nfrom das_ds.errors import DataError\nimport torch", set()),
    ],
)
def test_layer_breach_is_found(layer: str, source: str, breaches: set[str]) -> None:
    assert layer_breaches(layer, source) == breaches


def test_imports_in_functions_do_not_run_at_load() -> None:
    source = "import a\nif TYPE_CHECKING:\n    import b\nclass C:\n    import c\n    def f(self):\n        import d\n"
    assert set(imports_at_load(source)) == {"a", "c"}
    assert set(all_imports(source)) == {"a", "b", "c", "d"}
    assert belongs_to("torch.distributed.nn", ("torch.distributed",))
    assert not belongs_to("torch.distributions", ("torch.distributed",))
