"""`make evidence`: write the page, its plots and the block of the README from the committed result files."""

from __future__ import annotations

import sys

from benchmarks.domains.evidence.page import read_results, write_evidence
from benchmarks.domains.jobs import ROOT
from benchmarks.result_io import RESULTS
from das_ds.errors import EXIT_USER_ERROR, DasError

PAGE = ROOT / "docs" / "results" / "evidence.md"
README = ROOT / "README.md"


def main() -> int:
    """Write everything; an unusable result file is one line and exit code 2."""
    try:
        write_evidence(read_results(RESULTS), PAGE, README)
    except DasError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"written to {PAGE.relative_to(ROOT)} and {README.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
