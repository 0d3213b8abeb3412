"""The main job: `deepspeed [launcher options] launch/train.py --config FILE [dotted.key=value ...]`."""

import sys

from das_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
