"""Runs over three domains at once, and the same in parts of which each continues the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from das_ds.config.io import parse_config
from das_ds.distributed.process_group import init_process_group
from das_ds.reporting.results import Results
from das_ds.run_dir import CHECKPOINTS_DIR
from das_ds.tracking.names import HARDWARE_METRICS
from das_ds.training.train import train
from helpers.configs import changed
from helpers.half import allow_fp16_on_cpu
from helpers.runs import WORDS, metrics_lines, small_run

NAMES = ("food", "papers", "law")


def long_run(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Values of a run over all three domains."""
    values = small_run(folder)
    law = folder / "law.txt"
    if not law.exists():
        lines = [" ".join(WORDS[(5 * i + 3 * j) % len(WORDS)] for j in range(12)) for i in range(60)]
        law.write_text("\n".join(lines) + "\n", encoding="utf-8")
    domains = [*values["domains"], {"name": "law", "train": [str(law)], "valid_fraction": 0.1}]
    own = {"output_dir": folder / name, "domains": domains, "evaluation": {"max_sequences": 8}}
    return changed({**values, **own}, changes)


def part(values: dict[str, Any], name: str, first: int, last: int, earlier: str | None = None) -> dict[str, Any]:
    """Values of a run over the domains [first, last) of `values`, which continues another run.

    Without `earlier` it begins; else it gives nothing but what a user has to.
    """
    folder = Path(values["output_dir"]).parent
    own = {"output_dir": folder / name, "domains": values["domains"][first:last]}
    return (
        {**values, **own}
        if earlier is None
        else {**own, "continue_from": str(folder / earlier), "wandb": values["wandb"]}
    )


def run_parsed(runs: list[dict[str, Any]]) -> list[Results]:
    """Each config run in turn on these ranks, read like a file of a user."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    return [train(parse_config(values, []), ranks) for values in runs]


def parsed(values: dict[str, Any]) -> dict[str, Any]:
    """Values that are complete, for helpers that take those of `RunConfig`."""
    return parse_config(values, []).model_dump(by_alias=True)


def assert_continued(mine: Path, theirs: Path, first: int) -> None:
    """A continued run agrees bit for bit with one over all domains, from domain number `first` on."""
    files = [path.relative_to(theirs) for path in sorted(theirs.rglob("*.safetensors"))]
    numbers = tuple(f"{number:02d}_{name}" for number, name in enumerate(NAMES) if number >= first)
    own = [
        path
        for path in files
        if path.parts[0] != CHECKPOINTS_DIR and (len(path.parts) == 1 or path.parts[1] in numbers)
    ]
    assert any("model" in path.parts for path in own)
    for file in own:
        if file.name == "importance_general.safetensors":
            continue
        found = load_file(mine / file)
        expected = load_file(theirs / file)
        assert found.keys() == expected.keys(), file
        for name, value in expected.items():
            assert found[name].equal(value), f"{file}: {name}"
    results = [Results.read(run / "results.json").model_copy(update={"wall_seconds": 0.0}) for run in (mine, theirs)]
    assert results[0] == results[1]
    lines = [
        [{key: value for key, value in line.items() if key not in HARDWARE_METRICS} for line in metrics_lines(run)]
        for run in (mine, theirs)
    ]
    expected_lines = [line for line in lines[1] if line["domain"] in NAMES[first:]]
    assert lines[0] == expected_lines
