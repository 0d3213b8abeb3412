"""The page of a report in a real browser: Chromium without a screen, as wide as a desktop and as a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from das_ds.reporting.results import Results
from das_ds.reporting.run_report import write_report
from helpers.run_folders import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium (apt-get install chromium)")

PROBE = """<script>
const tooWide = [...document.body.children].filter(e => e.getBoundingClientRect().right > innerWidth + 1);
const result = {inner: innerWidth, scroll: document.documentElement.scrollWidth, wide: tooWide.length,
  loaded: performance.getEntriesByType("resource").length, text: document.querySelectorAll("svg text").length};
document.body.dataset.probe = JSON.stringify(result);
</script></body>"""
"""Measures the page after it is laid out; the page itself has no scripts."""


def browse(page: Path, *options: str) -> str:
    """Standard output of Chromium for a page."""
    # Root has no sandbox; the profile is the test's own.
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run over six domains, which is wider than a phone."""
    domains = [f"domain-{number}" for number in range(6)]
    folder = write_run(tmp_path_factory.mktemp("page") / "run", metrics=False)
    results = Results.read(folder / "results.json")
    # Learned at 4.7, then forgotten by 0.4.
    matrix = [[5.0 - 0.3 * (row == column + 1) + 0.1 * (row > column + 1) for column in range(7)] for row in range(7)]
    wide = results.model_copy(
        update={
            "domains": domains,
            "learned": [[name] for name in domains],
            "eval_domains": [*domains, "general"],
            "loss_matrix": matrix,
        }
    )
    lines = [f'{{"domain": "acl", "tokens_seen": {step}, "loss": {9 - step}}}\n' for step in range(9)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return write_report(folder, wide, None) / "index.html"


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (500, 900)])
def test_page_fits_the_screen_and_loads_nothing(page: Path, width: int, height: int) -> None:
    probed = page.with_name(f"probe{width}.html")
    probed.write_text(page.read_text().replace("</body>", PROBE))
    dom = browse(probed, f"--window-size={width},{height}", "--dump-dom")
    found = re.search(r'data-probe="\{([^}]*)\}"', dom)
    assert found is not None, dom[-500:]
    values = {name: int(value) for name, value in re.findall(r"(\w+)&quot;:(\d+)", found[1])}
    assert values["scroll"] <= values["inner"] == width and values["wide"] == 0
    assert values["loaded"] == 0 and values["text"] > 5


def test_page_screenshot_is_colored(page: Path) -> None:
    image = page.with_name("screen.png")
    browse(page, "--window-size=1280,1600", f"--screenshot={image}")
    with Image.open(image) as screen:
        colors = {color for _, color in screen.convert("RGB").getcolors(1 << 24) or []}
        assert screen.size == (1280, 1600)
    # Forgotten cells are red: 0.6 of (178, 24, 43) over white, for the largest change.
    assert any(red > 180 and green < 150 and blue < 160 for red, green, blue in colors)
