"""The page of a report, parsed: its numbers are those of the results, nothing is loaded, and names are escaped."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from das_ds.config.io import load_config
from das_ds.errors import RunFolderError
from das_ds.reporting.comparison_report import write_comparison_report
from das_ds.reporting.document import Bullets, Document, Plot, Section, Shade, Table, Text
from das_ds.reporting.html import render_html
from das_ds.reporting.learning_curves import MAX_POINTS, plot_learning_curves, read_learning_curves
from das_ds.reporting.results import Results
from das_ds.reporting.run_report import refresh_report, write_report
from das_ds.run_dir import IMPORTANCE_FILE
from helpers.comparisons import comparison, group, importance_summary
from helpers.html_pages import Page
from helpers.run_folders import write_run, write_task, write_unit_importance

IMPORTANCE = {"head": torch.tensor([[0.0, 0.95], [0.9, 0.95]])}
NAME = """<script>alert("x")</script> & 'y'"""


def write_metrics(folder: Path) -> None:
    """Ten logged steps for each of two domains, one without a finite loss, and a line that is cut off."""
    lines = [
        {"domain": domain, "tokens_seen": 100 * (10 * index + step), "loss": "NaN" if step == 5 else 5.0 - 0.1 * step}
        for index, domain in enumerate(("acl", "pubmed"))
        for step in range(1, 11)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"domain": "ac')


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with metrics, end tasks and a report with importance."""
    folder = write_run(tmp_path_factory.mktemp("html") / "run", metrics=False, train={"learning_rate": 0.125})
    write_metrics(folder)
    for place, score in (("base", 0.5), ("domains/00_acl", 0.75), ("domains/01_pubmed", 0.625)):
        write_task(folder, place, score)
    write_report(folder, Results.read(folder / "results.json"), IMPORTANCE)
    return folder


@pytest.fixture(scope="module")
def text(run_folder: Path) -> str:
    return (run_folder / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_page_has_all_sections_in_order(page: Page) -> None:
    assert page.headings == [
        "Held-out loss",
        "Forgetting and transfer",
        "Learning curves",
        "Mask saturation",
        "End tasks",
        "Settings",
        "Cost and versions",
    ]


def test_page_numbers_are_those_of_the_results(page: Page, run_folder: Path) -> None:
    results = Results.read(run_folder / "results.json")
    losses, perplexities = page.tables[:2]
    assert losses[0] == ["stage", *results.eval_domains]
    assert [row[0] for row in losses[1:]] == results.stages
    found = [[float(cell) for cell in row[1:]] for row in losses[1:]]
    assert found == [pytest.approx(row, abs=5e-5) for row in results.loss_matrix]
    expected = torch.tensor(results.loss_matrix, dtype=torch.float64).exp().tolist()
    assert [[float(cell) for cell in row[1:]] for row in perplexities[1:]] == [
        pytest.approx(row, abs=5e-3) for row in expected
    ]
    assert float(page.row("average forgetting")[1]) == pytest.approx(results.forgetting.average, abs=5e-5)
    assert float(page.row("general-domain drift")[1]) == pytest.approx(results.general_drift, abs=5e-5)
    assert page.row("tokens seen")[1] == f"{results.tokens_seen:,}"


def test_page_breaks_long_keys_on_narrow_screens(text: str) -> None:
    (narrow,) = re.findall(r"@media \(max-width: 40rem\) \{.*\}", text)
    (first_column,) = re.findall(r"tbody th \{(.*?)\}", narrow)
    # `anywhere` would also break short words, as it makes columns narrower than those.
    assert "max-width" in first_column and "overflow-wrap: break-word" in first_column


def test_page_heat_is_red_where_forgotten_and_blue_where_better(text: str) -> None:
    heat = text[text.index('class="heat"') : text.index("</table>")]
    cells = re.findall(r"<td([^>]*)>(\d\.\d+)(?:<small>([+-]\d\.\d+))?", heat)
    assert len(cells) == 9
    by_loss = {loss: (attributes, change) for attributes, loss, change in cells}
    # acl: 6.0 before, 4.0 learned, 4.5 forgotten; general: 3.0, 3.1, 3.4.
    assert by_loss["4.0000"][0].endswith('class="reference"') and by_loss["4.0000"][1] == ""
    assert "rgba(178, 24, 43, 0.600)" in by_loss["4.5000"][0] and by_loss["4.5000"][1] == "+0.500"
    assert "rgba(178, 24, 43, 0.480)" in by_loss["3.4000"][0] and by_loss["3.4000"][1] == "+0.400"
    assert by_loss["6.0000"][0] == ' class="unlearned"'


def test_page_has_end_tasks_and_settings(page: Page, run_folder: Path) -> None:
    (table,) = [table for table in page.tables if table[0][1:2] == ["acl_arc (macro_f1, 1 seeds)"]]
    assert [row[1] for row in table[1:]] == ["0.5000", "0.7500", "0.6250", "+0.1250"]
    changed, every = [table for table in page.tables if table[0] == ["key", "value"]]
    assert ["train.learning_rate", "0.125"] in changed
    assert not any(row[0] == "train.lr_scheduler" for row in changed)
    assert ["train.lr_scheduler", "'linear'"] in every
    assert dict(map(tuple, every[1:]))["method.name"] == repr(load_config(run_folder / "config.yaml").method.name)


def test_page_loads_nothing_and_has_no_scripts(text: str, page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    # Links within the page, and pixels of images inside plots.
    assert page.references
    assert [ref for ref in page.references if not ref.startswith(("#", "data:image/png;base64,"))] == []
    assert "@import" not in text and re.findall(r"url\((?!#)", text) == []
    # Names of XML dialects look like addresses, but nothing is loaded from them.
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text


def test_page_identifiers_differ_and_links_lead_to_them(page: Page) -> None:
    assert len(set(page.ids)) == len(page.ids)
    assert {ref[1:] for ref in page.references if ref.startswith("#")} <= set(page.ids)
    assert page.tags.count("svg") == 2


def test_page_is_the_same_each_time(run_folder: Path, text: str) -> None:
    write_report(run_folder, Results.read(run_folder / "results.json"), IMPORTANCE)
    assert (run_folder / "report" / "index.html").read_text() == text


def test_markdown_has_no_section_of_the_page_only(run_folder: Path) -> None:
    markdown = (run_folder / "report" / "report.md").read_text()
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == [
        "Held-out loss",
        "Forgetting and transfer",
        "Mask saturation",
        "End tasks",
        "Cost and versions",
    ]
    assert not (run_folder / "report" / "learning_curves.png").exists()


def test_refresh_report_adds_scores_and_reads_stored_importance(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_report(folder, Results.read(folder / "results.json"), IMPORTANCE)
    write_task(folder, "base", 0.5)
    refresh_report(folder)
    page = Page((folder / "report" / "index.html").read_text())
    assert "End tasks" in page.headings and "Mask saturation" in page.headings and page.tags.count("svg") == 0
    write_unit_importance(folder, {IMPORTANCE_FILE: 0.5})
    refresh_report(folder)
    assert Page((folder / "report" / "index.html").read_text()).row("head")[2] == f"{(0.5 + 0.25 + 0.5) / 3:.3f}"


def test_refresh_report_puts_end_tasks_into_both_reports(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_report(folder, Results.read(folder / "results.json"), IMPORTANCE)
    path = folder / "report" / "report.md"
    without = path.read_text()
    assert "End tasks" not in without
    write_task(folder, "base", 0.5)
    refresh_report(folder)
    assert "0.5000" in path.read_text()
    for stage, score in (("domains/00_acl", 0.75), ("domains/01_pubmed", 0.625)):
        write_task(folder, stage, score)
    refresh_report(folder)
    text = path.read_text()
    # As a report that is written anew has it.
    write_report(folder, Results.read(folder / "results.json"), IMPORTANCE)
    assert text == path.read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert ["as reported", "+0.1250", "-0.1250", "-"] in cells
    assert ["forgetting", "+0.1250"] in cells and "As accuracy." in text
    assert Page((folder / "report" / "index.html").read_text()).row("as reported")[1] == "+0.1250"


def test_refresh_report_unwritable_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    refresh_report(folder)
    assert not (folder / "report").exists()
    (folder / "report" / "index.html").mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"report/index.html: cannot be written \(Is a directory"):
        refresh_report(folder)


def test_page_with_damaged_scores_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_task(folder, "base", 0.5)
    (folder / "base" / "end_tasks.json").write_text("{")
    write_report(folder, Results.read(folder / "results.json"), None)
    text = (folder / "report" / "index.html").read_text()
    assert "Omitted: " in text and "end_tasks.json" in text


def draw(path: Path, labels: list[str]) -> None:
    plot_learning_curves({label: [(1.0, 2.0), (2.0, 1.0)] for label in labels}, path)


def test_names_are_escaped_everywhere() -> None:
    document = Document(
        title=NAME,
        blocks=[Text(f"{NAME} and `{NAME}`"), Bullets([NAME])],
        sections=[
            Section(NAME, [Table([["a", NAME], [NAME, NAME]], text_columns=(0, 1), summary=NAME)]),
            Section("Heat", [Table([["a", NAME], [NAME, NAME]], shades=[[Shade(0.1, 1.0, False)]])]),
            Section("Plot", [Plot("plot", partial(draw, labels=[NAME]))]),
        ],
        key_numbers=[(NAME, NAME)],
    )
    text = render_html(document)
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert page.headings == [NAME, "Heat", "Plot"]
    assert page.tables[0] == [["a", NAME], [NAME, NAME]]
    assert "<code>&lt;script&gt;" in text


def test_comparison_page_has_the_pareto_plot_and_all_tables(tmp_path: Path) -> None:
    slow = group("ncl slow", [(4.0, 0.5), (4.2, 0.3)], train__learning_rate="3e-4")
    das = group("das <b>", [(3.5, 0.6), (3.7, 0.3)], importance=importance_summary(), train__learning_rate="1e-3")
    ncl = group("ncl", [(3.0, 0.9), (3.2, 0.7)], train__learning_rate="1e-3")
    write_comparison_report(comparison(ncl, slow, das, notes=["a `note`"]), tmp_path)
    text = (tmp_path / "index.html").read_text()
    page = Page(text)
    markdown = (tmp_path / "report.md").read_text()
    assert page.headings == re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert 'aria-label="pareto"' in text and page.tags.count("svg") == 4
    assert len(set(page.ids)) == len(page.ids) and "b" not in page.tags
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    rows = [row for row in rows if not set(row[0]) <= {"-", ":"}]
    assert [row for table in page.tables for row in table] == rows
    assert "<li>a <code>note</code></li>" in text


def test_learning_curves_are_means_of_finite_losses(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    curves = read_learning_curves(tmp_path)
    assert list(curves) == ["acl", "pubmed"] and [len(points) for points in curves.values()] == [9, 9]
    assert curves["pubmed"][0] == (1100.0, pytest.approx(4.9))
    lines = [{"domain": "acl", "tokens_seen": step, "loss": step / 2} for step in range(2 * MAX_POINTS)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (points,) = read_learning_curves(tmp_path).values()
    assert points == [(2 * index + 0.5, (2 * index + 0.5) / 2) for index in range(MAX_POINTS)]
    assert read_learning_curves(tmp_path / "missing") == {}
