"""`python -m das_ds COMMAND ...`, and `deepspeed [launcher options] --module das_ds COMMAND ...`."""

import sys

from das_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
