"""Scores on end tasks: `deepspeed launch/finetune.py --config FILE --model FOLDER`, or `--run RUN`."""

import sys

from das_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
