"""Benchmarks; those that start ranks or need small models share the helpers of the tests."""

import sys
from pathlib import Path

# The helpers import each other as `helpers.X`, as under pytest.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
