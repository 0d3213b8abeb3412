"""Tutorials are read as their readers do, and a line that is not printed is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.commands import ROOT
from helpers.tutorials import missing_lines, read_steps

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGE = """
```yaml
# run.yaml
seed: 1
```

```bash
echo one
```

```text
one
```

```
not run
```

```bash
echo two
```
"""


def test_read_steps_groups_files_commands_and_output(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    first, second = read_steps(page)
    assert first.commands == "echo one\n" and first.files == {"run.yaml": "# run.yaml\nseed: 1\n"}
    assert first.shown == ["one"]
    assert second.commands == "echo two\n" and second.files == {} and second.shown == []


def test_missing_lines_ignores_numbers_but_neither_words_nor_order() -> None:
    printed = ["loss 1.25 (-3%)", "x  12", "-----", "end"]
    assert missing_lines(["loss 0.5 (+10%)", "...", "x 7", "---", "", "end"], printed) == []
    assert missing_lines(
        [
            "lost 1.25 (-3%)",
        ],
        printed,
    ) == ["lost 1.25 (-3%)"]
    assert missing_lines(["end", "x 12"], printed) == ["x 12"]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials_show_the_output_of_their_commands(page: Path) -> None:
    steps = read_steps(page)
    assert sum(bool(step.shown) for step in steps) >= 4
    assert {"base.yaml", "run.yaml"} <= {name for step in steps for name in step.files}
