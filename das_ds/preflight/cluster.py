"""The machines of a planned run: how many GPUs, and what each of them does per second."""

from __future__ import annotations

from dataclasses import dataclass

from das_ds.errors import ConfigError
from das_ds.preflight.gpus import GPUS, find_gpu
from das_ds.tracking.device_peak import TERA, vendor_peak

DEFAULT_GPU = "h100"
GIGA = 1e9


@dataclass(frozen=True)
class Cluster:
    """What `das-ds plan` is told about the machines."""

    gpu: str
    """In words."""
    memory_gib: float
    """Of a GPU."""
    peak: float
    """FLOP/s of a GPU in the precision of training."""
    mfu: float
    """Share of `peak` that plain training reaches, waiting and recomputation included (PaLM's MFU)."""
    gpus_per_node: int
    link: float
    """Bytes per second that a GPU sends to another of its node."""
    network: float
    """Bytes per second that a GPU sends to another node."""
    disk: float
    """Bytes per second that one rank writes."""
    host_memory_gib: float | None = None
    """Of a node; None: unknown."""
    price: float | None = None
    """Of a GPU for an hour."""

    def check_gpus(self, num_gpus: int) -> None:
        """Raises ConfigError for a number of GPUs that these nodes cannot have."""
        if num_gpus < 1:
            raise ConfigError(f"--gpus: found {num_gpus}, expected at least 1")
        if num_gpus > self.gpus_per_node and num_gpus % self.gpus_per_node:
            raise ConfigError(
                f"--gpus: found {num_gpus}, expected at most {self.gpus_per_node} or a multiple of it (--gpus-per-node)"
            )

    def num_nodes(self, num_gpus: int) -> int:
        """Nodes of so many GPUs."""
        return -(-num_gpus // self.gpus_per_node)

    def bandwidth(self, num_gpus: int) -> float:
        """Bytes per second that every GPU of a ring of all of them sends: the slowest step decides."""
        return self.link if num_gpus <= self.gpus_per_node else min(self.link, self.network)


def describe_cluster(
    *,
    gpu: str | None,
    gpu_memory: float | None,
    gpu_tflops: float | None,
    precision: str,
    mfu: float,
    gpus_per_node: int,
    link_gb: float | None,
    network_gb: float,
    disk_gb: float,
    host_memory: float | None,
    price: float | None,
) -> Cluster:
    """The machines of the command's options.

    Raises:
        ConfigError: a value out of its range, a GPU that is not in the table, or one that lacks the precision.
    """
    if gpu is not None and gpu_tflops is not None:
        raise ConfigError(
            f"--gpu-tflops: found {gpu_tflops:g} with --gpu {gpu}, which has a peak; allowed: one of them"
        )
    for name, value in (
        ("--gpu-memory", gpu_memory),
        ("--gpu-tflops", gpu_tflops),
        ("--gpus-per-node", gpus_per_node),
        ("--link-bandwidth", link_gb),
        ("--network-bandwidth", network_gb),
        ("--disk-bandwidth", disk_gb),
        ("--host-memory", host_memory),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name}: found {value:g}, expected more than 0")
    if price is not None and not 0 <= price < float("inf"):
        raise ConfigError(f"--price-per-gpu-hour: found {price:g}, expected 0 or more")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu: found {mfu:g}, expected more than 0 and at most 1, such as 0.4")
    sheet = find_gpu(DEFAULT_GPU if gpu is None else gpu)
    peak = vendor_peak(sheet.name, precision) if gpu_tflops is None else gpu_tflops * TERA
    if peak is None:
        known = [name for name, other in GPUS.items() if vendor_peak(other.name, precision) is not None]
        raise ConfigError(
            f"--gpu: found {gpu}, whose data sheet names no peak for train.precision {precision}; allowed with it: "
            f"{', '.join(known)}; or give --gpu-tflops"
        )
    return Cluster(
        gpu=sheet.name if gpu_tflops is None else f"{gpu_tflops:g} TFLOP/s",
        memory_gib=sheet.memory_gib if gpu_memory is None else gpu_memory,
        peak=peak,
        mfu=mfu,
        gpus_per_node=gpus_per_node,
        link=GIGA * (sheet.link if link_gb is None else link_gb),
        network=GIGA * network_gb,
        disk=GIGA * disk_gb,
        host_memory_gib=host_memory,
        price=price,
    )
