"""Held-out losses of an exported model: `deepspeed launch/evaluate.py --config FILE --model FOLDER`."""

import sys

from das_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
