"""Hooks of MkDocs: pages of the repository's root, API pages, and links from docs/ to files outside of it.

The repository's web view shows docs/ as it is, so nothing here is written to it: these pages exist in the site only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent
DOCS = ROOT / "docs"
ROOT_PAGES = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File of the root -> page of the site."""
SOURCES = "source"
"""Folder of the site with the repository's files that pages link to."""
SCRIPTS = {
    "mermaid.min.js": (
        "mermaid@11.16.0/package/dist/mermaid.min.js",
        "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b",
    ),
    "iframe-worker.js": (
        "iframe-worker@1.0.4/package/shim/index.js",
        "e8e412dbcfea9b7e31b5ffa288d7b6035915e714c542f4176a0cdbe262fc9609",
    ),
}
"""Script of the site -> file of an npm package that `make docs` unpacks, and its SHA-256."""
SCRIPTS_FOLDER = ROOT / "build" / "site_scripts"
SHIM_ADDRESS = "https://unpkg.com/iframe-worker/shim"
"""Where the theme's plugin `offline` has it from."""
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
PARTS_ONLY: dict[str, object] = {"show_root_heading": False, "show_root_toc_entry": False}
"""Options of a module whose name says nothing to a reader."""
FIELDS: dict[str, object] = {"show_if_no_docstring": True, "show_labels": False}
"""Options of a section: a key whose value is another section is documented there, and all are attributes."""
SECTIONS = [
    "continuation.ContinueConfig",
    "model.ModelConfig",
    "model.LoraConfig",
    "data.CorpusConfig",
    "domain.DomainConfig",
    "domain.DomainReplayConfig",
    "data.SourceConfig",
    "data.EvaluationCorpusConfig",
    "data.DataConfig",
    "train.TrainConfig",
    "method.MethodConfig",
    "method.MergeConfig",
    "method.ReplayConfig",
    "generation.GenerationConfig",
    "softmask.ImportanceConfig",
    "softmask.SoftmaskConfig",
    "train.EvaluationConfig",
    "train.EarlyStoppingConfig",
    "tasks.TaskConfig",
    "benchmarks.BenchmarksConfig",
    "runtime.CheckpointConfig",
    "runtime.ExportConfig",
    "runtime.FaultsConfig",
    "runtime.MaxForgettingConfig",
    "runtime.RuntimeConfig",
    "runtime.WandbConfig",
]
"""Classes of `das_ds.config`, in the order of their keys in a run config."""
API = {
    "integrations": (
        "Other trainers",
        "The masks in plain torch, DDP, DeepSpeed and Hugging Face's Trainer: "
        "[other trainers](../guide/other_trainers.md).",
        {
            "das_ds.integrations.protector.Protector": {},
            "das_ds.integrations.huggingface.ProtectionCallback": {"members": False},
        },
    ),
    "methods": (
        "Methods",
        "What a method of your own implements: [contributing](../contributing.md#adding-a-method).",
        {
            "das_ds.methods.base": {"members": ["Method", "Losses", "check_gradient_batch_size"], **PARTS_ONLY},
            "das_ds.context.RunContext": {},
            "das_ds.context.DomainContext": {},
        },
    ),
    "config": (
        "Config",
        "The sections of a run config as typed classes. `das-ds train --help` prints the same as keys, and "
        "`das-ds methods NAME` those that only one method has.",
        {
            "das_ds.config.io": {"members": ["load_config", "parse_config", "dump_config"], **PARTS_ONLY},
            "das_ds.config.run.RunConfig": FIELDS,
            **{f"das_ds.config.{section}": FIELDS for section in SECTIONS},
        },
    ),
    "results": (
        "Results",
        "`results.json` of a run, and the errors for users.",
        {"das_ds.reporting.results.Results": {"show_labels": False}, "das_ds.errors": PARTS_ONLY},
    ),
}
"""Page -> title, first sentence, and what mkdocstrings shows, with its options."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    # The theme fetches mermaid only where none is loaded yet.
    if _script("mermaid.min.js"):
        config.extra_javascript.append("javascripts/mermaid.min.js")
    return config


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    if _script("iframe-worker.js") is None:
        return output
    root = os.path.relpath(".", Path(page.file.dest_uri).parent)
    return output.replace(SHIM_ADDRESS, f"{root}/javascripts/iframe-worker.js")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=_in_site((ROOT / source).read_text("utf-8"), ROOT, page)))
    for name, (title, first, objects) in API.items():
        shown = "".join(_directive(path, options) for path, options in objects.items())
        files.append(File.generated(config, f"api/{name}.md", content=f"# {title}\n\n{first}\n{shown}"))
    linked = {path for page in [*DOCS.rglob("*.md"), *map(ROOT.joinpath, ROOT_PAGES)] for path in _linked_files(page)}
    for path in sorted(linked):
        target = f"{SOURCES}/{path.relative_to(ROOT)}"
        files.append(File.generated(config, target, abs_src_path=str(path)))
    for name in SCRIPTS:
        if path := _script(name):
            files.append(File.generated(config, f"javascripts/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.generated_by is not None:
        return markdown
    return _in_site(markdown, (DOCS / page.file.src_uri).parent, page.file.src_uri)


def _script(name: str) -> Path | None:
    """A script of the site; None where npm was not there.

    Raises:
        PluginError: it is another file than expected.
    """
    source, digest = SCRIPTS[name]
    path = SCRIPTS_FOLDER / source
    if not path.exists():
        return None
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != digest:
        raise PluginError(f"{path}: found SHA-256 {found}, expected {digest}; remove build/site_scripts")
    return path


def _directive(path: str, options: dict[str, object]) -> str:
    # JSON is YAML.
    return f"\n::: {path}\n    options: {json.dumps(options)}\n"


def _in_site(markdown: str, folder: Path, page: str) -> str:
    """The text of a page with its relative links as the site has them.

    Args:
        markdown: as in the repository.
        folder: which its links are relative to.
        page: its path in the site.
    """

    def in_site(link: re.Match[str]) -> str:
        target, hash_sign, anchor = link[2].partition("#")
        if not target or "://" in target:
            return link[0]
        return link[1] + os.path.relpath(_place(folder / target), Path(page).parent) + hash_sign + anchor + link[3]

    return _outside_blocks(markdown, lambda text: LINK.sub(in_site, text))


def _place(target: Path) -> str:
    """Path in the site of a file of the repository."""
    path = target.resolve()
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    if not path.is_relative_to(ROOT):
        # No page: a strict build names the link.
        return f"{SOURCES}/{path.name}"
    name = str(path.relative_to(ROOT))
    return ROOT_PAGES.get(name, f"{SOURCES}/{name}")


def _linked_files(page: Path) -> set[Path]:
    """Files of the repository that a page links to and that are no pages of the site."""
    targets = (link[2].partition("#")[0] for link in LINK.finditer(FENCE.sub("", page.read_text("utf-8"))))
    paths = {(page.parent / target).resolve() for target in targets if target and "://" not in target}
    files = {path for path in paths if path.is_file() and path.is_relative_to(ROOT)}
    return {path for path in files if _place(path).startswith(f"{SOURCES}/")}


def _outside_blocks(markdown: str, change: Callable[[str], str]) -> str:
    """A page with everything but its fenced blocks changed."""
    end = 0
    parts: list[str] = []
    for block in FENCE.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])
