"""Plasticity in the report of a run: files read, the table, the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image

from das_ds.errors import RunFolderError
from das_ds.reporting.document import section_markdown
from das_ds.reporting.plasticity import format_share, plasticity_section, plot_plasticity, read_plasticity
from das_ds.reporting.results import Results
from das_ds.reporting.run_report import write_report
from das_ds.softmask.plasticity import DomainPlasticity, InputPlasticity, PlasticityReading
from das_ds.training.publish import write_plasticity

GROUPS = {"q0": "attention input", "q1": "attention input", "f0": "MLP output"}


def reading(plasticity: float, passing: float | None) -> PlasticityReading:
    shares = {"q0": plasticity, "q1": plasticity / 2, "f0": plasticity}
    return PlasticityReading.summarize(
        {n: InputPlasticity(4, share, None if passing is None else passing * share) for n, share in shares.items()},
        GROUPS,
    )


ACL = DomainPlasticity(domain="acl", before=reading(1.0, 1.0), after=reading(0.6, 0.1))
PUBMED = DomainPlasticity(domain="pubmed", before=reading(0.6, 0.3))


def write_all(folder: Path, *measured: DomainPlasticity) -> None:
    for index, domain in enumerate(measured):
        write_plasticity(folder / "domains" / f"{index:02d}_{domain.domain}", domain)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1.0, "100%"),
        (0.614, "61%"),
        (0.0996, "10%"),
        (0.0432, "4.3%"),
        (0.00956, "1.0%"),
        (0.00123, "0.12%"),
        (1e-7, "<0.001%"),
        (0.0, "0%"),
    ],
)
def test_format_share_has_two_digits(share: float, text: str) -> None:
    assert format_share(share) == text


def test_read_plasticity_is_in_the_order_of_domains(tmp_path: Path) -> None:
    write_all(tmp_path, ACL, PUBMED)
    assert read_plasticity(tmp_path) == [ACL, PUBMED]


def table_rows(text: str) -> list[list[str]]:
    """Cells of the rows below the header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_plasticity_section_has_a_row_for_each_domain_and_kind_of_layer() -> None:
    text = section_markdown(plasticity_section([ACL, PUBMED]))
    assert table_rows(text) == [
        ["acl", "all", "83%", "100%", "50%", "6.0%"],
        ["", "attention input", "75% (50% to 100%)", "75% (50% to 100%)", "45% (30% to 60%)", "4.5% (3.0% to 6.0%)"],
        ["", "MLP output", "100%", "100%", "60%", "6.0%"],
        ["pubmed", "all", "50%", "18%", "-", "-"],
        ["", "attention input", "45% (30% to 60%)", "14% (9.0% to 18%)", "-", "-"],
        ["", "MLP output", "60%", "18%", "-", "-"],
    ]


def test_plasticity_section_energy_that_was_not_measured_is_a_dash() -> None:
    text = section_markdown(plasticity_section([DomainPlasticity(domain="acl", before=reading(0.5, None))]))
    assert table_rows(text)[0] == ["acl", "all", "42%", "-", "-", "-"]


def test_plasticity_section_names_what_was_protected() -> None:
    later = PUBMED.model_copy(update={"protected": ["general", "acl"], "form": "masks on update"})
    text = section_markdown(plasticity_section([ACL, later]))
    assert "- Protected while pubmed is learned: general, acl (masks on update)." in text
    assert text.count("Protected while") == 1


@pytest.mark.parametrize("domains", [[ACL], [PUBMED], [ACL, PUBMED]])
def test_plot_plasticity_draws_every_group(domains: list[DomainPlasticity], tmp_path: Path) -> None:
    plot_plasticity(domains, tmp_path / "plasticity.png")
    pixels = numpy.asarray(Image.open(tmp_path / "plasticity.png").convert("RGB")).astype(int)
    for color in ((31, 119, 180), (255, 127, 14)):
        assert (abs(pixels - color).sum(axis=2) < 10).sum() > 50, color


def test_write_report_has_plasticity_of_runs_that_measured_it(
    make_results: Callable[..., Results], tmp_path: Path
) -> None:
    write_all(tmp_path, ACL, PUBMED)
    folder = write_report(tmp_path, make_results(), None)
    assert (folder / "plasticity.png").exists()
    text = (folder / "report.md").read_text()
    assert text.index("## Forgetting") < text.index("## Plasticity") < text.index("## Cost")


def test_write_report_of_an_older_run_has_no_plasticity(make_results: Callable[..., Results], tmp_path: Path) -> None:
    (tmp_path / "domains" / "00_acl" / "model").mkdir(parents=True)
    folder = write_report(tmp_path, make_results(), None)
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "loss_matrix.png", "report.md"]
    assert "Plasticity" not in (folder / "report.md").read_text()


def test_read_plasticity_damaged_file_is_named(tmp_path: Path) -> None:
    write_all(tmp_path, ACL)
    path = tmp_path / "domains" / "00_acl" / "plasticity.json"
    path.write_text(path.read_text().replace('"acl"', '"acs"'))
    with pytest.raises(
        RunFolderError, match=r"plasticity.json: was altered: its sha256 differs; expected the plasticity of a domain"
    ):
        read_plasticity(tmp_path)
