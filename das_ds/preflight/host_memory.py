"""Free host memory for this process, limited by the machine and by the control groups (cgroups) of a batch job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def free_memory(own_groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Free bytes: the least that the machine and the control groups around this process have left.

    Args:
        own_groups: file in which Linux lists the control groups of this process.
        mounted: where control groups are mounted.
    """
    return min([psutil.virtual_memory().available, *_free_in_groups(own_groups, mounted)])


def _free_in_groups(own_groups: Path, mounted: Path) -> Iterator[int]:
    for line in own_groups.read_text(encoding="utf-8").splitlines() if own_groups.exists() else []:
        # <hierarchy>:<controllers>:<path>; version 2 has no controllers here.
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = mounted
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = mounted / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        # Every enclosing group limits this process too.
        for group in (folder, *folder.parents):
            yield from _free_in_group(group, *names)
            if group == root:
                break


def _free_in_group(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """Free bytes of one group; nothing if it has no limit."""
    try:
        max_bytes = (group / limit).read_text(encoding="utf-8")
        used_bytes = int((group / usage).read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:
        return
    if max_bytes.strip() != "max":
        # The page cache counts as used, but is freed when memory is needed.
        yield int(max_bytes) - used_bytes + int(stat.get(reclaimable, 0))
