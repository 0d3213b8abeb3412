"""How much host memory this process and its neighbours may still take: batch systems allow a job less than there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def free_memory(own_groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the machine, and every control group (cgroup) around this process, has left.

    Args:
        own_groups: where Linux lists the groups of this process.
        mounted: where it shows them.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(own_groups, mounted)])


def _left_in_groups(own_groups: Path, mounted: Path) -> Iterator[int]:
    for line in own_groups.read_text(encoding="utf-8").splitlines() if own_groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = mounted / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield from _left(group, *names)
            if group == root:
                break


def _left(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """Of one group; nothing where it has no limit."""
    try:
        most, used = (group / limit).read_text(encoding="utf-8"), int((group / usage).read_text(encoding="utf-8"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    except OSError:
        return
    if most.strip() != "max":
        # Pages of files count as used, but make room when it is needed.
        yield int(most) - used + int(stat.get(reclaimable, 0))
