"""Checks before the main job, on the same ranks: `deepspeed [launcher options] launch/preflight.py --config FILE`."""

import sys

from das_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["preflight", *sys.argv[1:]]))
