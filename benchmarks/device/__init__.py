"""One script for a bare machine with a GPU: `run.sh`."""
