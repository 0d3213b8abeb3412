"""Runs over three domains at once, and the same in parts of which each continues the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from das_ds.config.io import parse_config, resolved_dict
from das_ds.distributed.process_group import init_process_group
from das_ds.errors import DasError
from das_ds.reporting.results import Results
from das_ds.run_dir import CHECKPOINTS_DIR, GENERAL_IMPORTANCE_FILE
from das_ds.tracking.names import HARDWARE_METRICS
from das_ds.training.train import train
from helpers.configs import changed
from helpers.half import allow_fp16_on_cpu
from helpers.runs import WORDS, metrics_lines, small_run

NAMES = ("food", "papers", "law")
DECODER: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}
METHODS: dict[str, dict[str, Any]] = {
    "das": {"name": "das", "importance": {"num_samples": 10}, "replay": {"fraction": 0.25}},
    "parameters": {"name": "das", "importance": {"num_samples": 10, "granularity": "parameter"}},
    "directions": {"name": "directions", "num_samples": 16},
    "replay": {"name": "replay"},
    "distilled replay": {"name": "replay", "replay": {"loss": "kl"}},
    "ewc": {"name": "ewc", "num_samples": 16, "lambda": 1e3},
    "l2": {"name": "l2"},
    "osft": {"name": "osft"},
    "derpp": {"name": "derpp", "capacity": 20},
    "kd": {"name": "kd"},
    "merge": {"name": "merge", "merge": {"weight": "average"}},
    "regmean": {"name": "regmean", "num_samples": 16},
    "one": {"name": "one"},
}


def long_run(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Values of a run over all three domains; `changes` are nested dictionaries of keys."""
    values = small_run(folder)
    law = folder / "law.txt"
    if not law.exists():
        lines = [" ".join(WORDS[(5 * i + 3 * j) % len(WORDS)] for j in range(12)) for i in range(60)]
        law.write_text("\n".join(lines) + "\n", encoding="utf-8")
    domains = [*values["domains"], {"name": "law", "train": [str(law)], "valid_fraction": 0.1}]
    own = {"output_dir": folder / name, "domains": domains, "evaluation": {"max_sequences": 8}}
    return changed({**values, **own}, changes)


def beginning(values: dict[str, Any], name: str, num_domains: int) -> dict[str, Any]:
    """Values of a run over the first domains of `values`."""
    folder = Path(values["output_dir"]).parent
    return {**values, "output_dir": folder / name, "domains": values["domains"][:num_domains]}


def continuing(
    values: dict[str, Any], name: str, earlier: str, first: int, last: int, **changes: Any
) -> dict[str, Any]:
    """Values of a run over the domains [first, last) of `values` that continues another run.

    It gives nothing but what a user has to, and `changes`, nested dictionaries of keys.
    """
    folder = Path(values["output_dir"]).parent
    own = {
        "output_dir": folder / name,
        "continue_from": str(folder / earlier),
        "domains": values["domains"][first:last],
        "wandb": values["wandb"],
    }
    return changed(own, changes)


def run_parsed(runs: list[dict[str, Any]]) -> list[Results]:
    """Each config run in turn on these ranks, read like a file of a user."""
    allow_fp16_on_cpu()
    ranks = init_process_group()
    return [train(parse_config(values, []), ranks) for values in runs]


def parsed_start_errors(runs: list[dict[str, Any]]) -> list[str]:
    """The message with which each run ends on these ranks, read like a file of a user."""
    ranks = init_process_group()
    messages = []
    for values in runs:
        with pytest.raises(DasError) as caught:
            train(parse_config(values, []), ranks)
        messages.append(str(caught.value))
    return messages


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """All values of a config, with those of the run that it continues, as `RunConfig` takes them."""
    return resolved_dict(parse_config(values, []))


def assert_continued(mine: Path, theirs: Path, first: int, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """A continued run agrees with one over all domains from number `first` on, bit for bit without a tolerance."""
    numbers = [f"{number:02d}_{name}" for number, name in enumerate(NAMES) if number >= first]
    files = [path.relative_to(theirs) for path in sorted(theirs.rglob("*.safetensors"))]
    # General knowledge is measured before the first domain.
    files = [path for path in files if path.parts[0] != CHECKPOINTS_DIR and path.name != GENERAL_IMPORTANCE_FILE]
    files = [path for path in files if path.parts[0] != "domains" or path.parts[1] in numbers]
    assert sum("model" in path.parts for path in files) == len(numbers)
    for file in files:
        found = load_file(mine / file)
        expected = load_file(theirs / file)
        assert found.keys() == expected.keys(), file
        for name, value in expected.items():
            assert torch.allclose(found[name].double(), value.double(), rtol=rtol, atol=atol), f"{file}: {name}"
    results = [Results.read(run / "results.json") for run in (mine, theirs)]
    lines = [_lines(run, first) for run in (mine, theirs)]
    if not rtol:
        changes = {"wall_seconds": 0.0}
        assert results[0].model_copy(update=changes) == results[1].model_copy(update=changes)
        assert lines[0] == lines[1]
        return
    assert [line["global_step"] for line in lines[0]] == [line["global_step"] for line in lines[1]]
    for row, expected_row in zip(results[0].loss_matrix, results[1].loss_matrix, strict=True):
        assert row == pytest.approx(expected_row, rel=rtol)


def _lines(run: Path, first: int) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in HARDWARE_METRICS}
        for line in metrics_lines(run)
        if line["domain"] in NAMES[first:]
    ]
