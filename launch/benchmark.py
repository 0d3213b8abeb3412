"""Public benchmarks on the models of a run: `deepspeed launch/benchmark.py --config FILE`."""

import sys

from das_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
