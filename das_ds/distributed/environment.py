"""Checks of the environment variables in which launchers describe a rank, before any library reads them."""

from __future__ import annotations

import os

from das_ds.errors import ConfigError

LAST_PORT = 65535


def check_environment() -> None:
    """Check RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT, all of which are set.

    Raises:
        ConfigError: one of them is not an integer or out of its range.
    """
    world_size = _read_int("WORLD_SIZE", least=1)
    rank = _read_int("RANK", least=0)
    if rank >= world_size:
        raise ConfigError(f"RANK: found {rank}, allowed: 0 to {world_size - 1} with WORLD_SIZE {world_size}")
    _read_int("LOCAL_RANK", least=0)
    port = _read_int("MASTER_PORT", least=0)
    if port > LAST_PORT:
        raise ConfigError(f"MASTER_PORT: found {port}, allowed: 0 to {LAST_PORT}")


def check_device(local_rank: int, num_devices: int) -> None:
    """Check that this node has a GPU for a rank.

    Raises:
        ConfigError: it has too few.
    """
    if local_rank >= num_devices:
        raise ConfigError(
            f"LOCAL_RANK: found {local_rank}, allowed: 0 to {num_devices - 1}, one rank for each of the GPUs that this "
            "node shows (CUDA_VISIBLE_DEVICES)"
        )


def _read_int(name: str, *, least: int) -> int:
    found = os.environ[name]
    # int() would also accept " 1_0 ", which the libraries that read the variable later do not.
    if not found.isascii() or not found.isdecimal() or int(found[:10]) < least:
        raise ConfigError(
            f"{name}: found {found!r} in the environment, expected an integer from {least}; unset it to run one "
            "rank without a launcher"
        )
    return int(found[:10])
