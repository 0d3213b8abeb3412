"""Run digest: checksums of everything a finished run produced, to compare two runs bit by bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from das_ds.run_dir import METRICS_FILE
from das_ds.storage import checksum
from das_ds.tracking.names import HARDWARE_METRICS

TIMED = ("wall_seconds", "sha256")
"""Fields of results.json that differ from run to run: the time, and the checksum of all fields."""


def run_digest(run: Path) -> dict[str, str]:
    """Name -> digest of the products of a run: exported models, importance, results, metrics.

    Tensors are compared one by one, because the header of a safetensors file has no fixed order. Plots and the report
    follow from the results.
    """
    files = sorted(run.glob("domains/**/*")) + sorted(run.glob("*.safetensors"))
    digests: dict[str, str] = {}
    for path in (file for file in files if file.is_file()):
        name = path.relative_to(run).as_posix()
        if path.suffix == ".safetensors":
            digests |= {f"{name}: {key}": digest for key, digest in _tensors(path)}
        elif path.name != "SHA256SUMS":
            digests[name] = checksum(path)
    results = json.loads(_text(run / "results.json") or "{}")
    digests |= {f"results.json: {key}": json.dumps(value) for key, value in results.items() if key not in TIMED}
    return digests | {
        f"{METRICS_FILE}: {line}": text for line, text in enumerate(_metrics(run / METRICS_FILE), start=1)
    }


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names that are missing in one of two digests, or differ."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Digests of the tensors of a safetensors file (type, shape and bytes) and of its metadata."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        if name == "__metadata__":
            yield name, json.dumps(entry, sort_keys=True)
            continue
        begin, end = entry["data_offsets"]
        digest = hashlib.sha256(content[start + begin : start + end]).hexdigest()
        yield name, f"{entry['dtype']} {entry['shape']} {digest}"


def _metrics(path: Path) -> Iterator[str]:
    for line in _text(path).splitlines():
        yield json.dumps({name: value for name, value in json.loads(line).items() if name not in HARDWARE_METRICS})


def _text(path: Path) -> str:
    """Content of a file; "" if a failed run has not written it."""
    return path.read_text(encoding="utf-8") if path.exists() else ""
