"""Private functions of torch.distributed, all in one file: no public function replaces them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def all_process_groups() -> list[dist.ProcessGroup]:
    """Every process group of this process, those that libraries made included."""
    return list(dist.distributed_c10d._world.pg_map)


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set how long a collective of this group may take."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def group_timeout(group: dist.ProcessGroup) -> timedelta:
    """How long a collective of this group may take."""
    timeout: timedelta = group._get_backend(group._device_types[0]).options._timeout
    return timeout


def default_store() -> Any:
    """The store behind the default process group; typed `Any`, as not every kind of store has all of its methods."""
    return dist.distributed_c10d._get_default_store()
