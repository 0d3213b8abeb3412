"""Facts of a run config that a batch file needs: prints the run folder, then versions, a line each."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata
from pathlib import Path

from das_ds import __version__
from das_ds.config.io import load_config
from das_ds.errors import EXIT_USER_ERROR, DasError

PACKAGES = ("torch", "deepspeed", "transformers")
PACKAGE = Path(__file__).resolve().parents[1]


def main() -> int:
    """Exit code 2 and one line where the config is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    options = parser.parse_args()
    try:
        config = load_config(options.config, options.overrides)
    except DasError as error:
        print(f"das_ds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(config.output_dir)
    versions = [f"{package} {metadata.version(package)}" for package in PACKAGES]
    print(f"das_ds {__version__} of {PACKAGE}, python {platform.python_version()}", *versions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
