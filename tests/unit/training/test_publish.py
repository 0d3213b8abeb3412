"""Results published after an evaluation, for domains in order and for all at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from das_ds.checkpoint.manifest import RunState
from das_ds.errors import RunFolderError
from das_ds.reporting.results import Results
from das_ds.run_dir import RESULTS_FILE, RunDir
from das_ds.softmask.plasticity import DomainPlasticity, InputPlasticity, PlasticityReading
from das_ds.tracking.sinks import Sink
from das_ds.tracking.tracker import Tracker
from das_ds.training.publish import collect_results, plasticity_metrics, publish_results, write_plasticity
from helpers.training import run_config

DOMAINS = [{"name": name, "train": ["unused.txt"]} for name in ("acl", "pubmed")]


class Evaluations(Sink):
    """Keeps over how many domains losses were logged."""

    def __init__(self) -> None:
        self.domains_learned: list[int] = []

    def log_evaluation(self, losses: Mapping[str, float], *, domains_learned: int, global_step: int) -> None:
        self.domains_learned.append(domains_learned)


@pytest.mark.parametrize(("method", "learned"), [("ncl", [["acl"], ["pubmed"]]), ("pool", [["acl", "pubmed"]])])
def test_publish_results_logs_losses_over_domains_learned(
    method: str, learned: list[list[str]], tmp_path: Path
) -> None:
    config = run_config(tmp_path, domains=DOMAINS, method={"name": method})
    sink = Evaluations()
    matrix: list[list[float]] = []
    for done in range(len(learned) + 1):
        matrix.append([3.0 - done, 4.0 - done])
        state = RunState(domains_done=done, loss_matrix=matrix)
        results = collect_results(config, state, 1, 2)
        publish_results(results, RunDir(tmp_path), Tracker([sink]), {"acl": 1.0}, state, None)
        assert Results.read(tmp_path / RESULTS_FILE) == results
        assert results.learned == learned and results.complete == (done == len(learned))
    assert sink.domains_learned == [sum(map(len, learned[:done])) for done in range(len(learned) + 1)]


def test_publish_results_again_after_a_kill_does_not_log_the_evaluation_twice(tmp_path: Path) -> None:
    config = run_config(tmp_path, domains=DOMAINS)
    sink = Evaluations()
    matrix = [[3.0, 4.0], [2.0, 3.5]]
    for num_rows in (1, 1, 2, 2):
        state = RunState(domains_done=num_rows - 1, loss_matrix=matrix[:num_rows])
        results = collect_results(config, state, 1, 2)
        publish_results(results, RunDir(tmp_path), Tracker([sink]), {"acl": 1.0}, state, None)
    assert sink.domains_learned == [0, 1]
    # What cannot be read was not published.
    (tmp_path / RESULTS_FILE).write_text("{")
    publish_results(results, RunDir(tmp_path), Tracker([sink]), {"acl": 1.0}, state, None)
    assert sink.domains_learned == [0, 1, 1]


def reading(passing: float | None) -> PlasticityReading:
    return PlasticityReading.summarize({"q": InputPlasticity(2, 0.5, passing)}, {"q": "attention input"})


def test_plasticity_metrics_leave_out_what_was_not_measured() -> None:
    assert plasticity_metrics(reading(0.25)) == {"plasticity": 0.5, "passing_energy": 0.25}
    assert plasticity_metrics(reading(None)) == {"plasticity": 0.5}


def test_write_plasticity_replaces_the_file_and_names_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    measured = DomainPlasticity(domain="acl", before=reading(0.25))
    folder = tmp_path / "domains" / "00_acl"
    write_plasticity(folder, measured)
    write_plasticity(folder, measured.model_copy(update={"after": reading(0.1)}))
    assert DomainPlasticity.read(folder / "plasticity.json").after == reading(0.1)
    (tmp_path / "file").touch()
    with pytest.raises(
        RunFolderError, match=r"file/00_acl: cannot be made \(Not a directory\); the run folder must be"
    ):
        write_plasticity(tmp_path / "file" / "00_acl", measured)
