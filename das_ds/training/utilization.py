"""Model FLOPs of a run, and the peak of its devices, for the speed in metrics."""

from __future__ import annotations

import torch

from das_ds.config import RunConfig, TrainConfig
from das_ds.context import RunContext
from das_ds.functional.token_ids import num_tokens
from das_ds.models.flops import run_step_flops
from das_ds.models.inspect.probe import skeleton
from das_ds.models.loading import model_config
from das_ds.tracking.device_peak import vendor_peak
from das_ds.tracking.throughput import Utilization
from das_ds.training.data_module import DataModule


def build_utilization(config: RunConfig, context: RunContext, data: DataModule) -> Utilization:
    """FLOPs of plain training of a run per token, as `das-ds plan` counts them, and the peak of its devices."""
    # A network without weights: those of the real one may be sharded, or wrapped by LoRA.
    vocab_size = num_tokens(data.base_tokenizer.get_vocab())
    network = skeleton(model_config(config.model, vocab_size=vocab_size), context.objective)
    flops = run_step_flops(network, config, context.objective, context.layout.num_layers)
    tokens_per_step = config.train.global_batch_size * config.data.sequence_length
    info = context.engine.ranks.info
    return Utilization(flops.total / tokens_per_step, info.world_size, device_peak(info.device, config.train))


def device_peak(device: torch.device, train: TrainConfig) -> float | None:
    """FLOP/s of a device in the precision of its matrix products; None where no data sheet is known, as for CPUs."""
    if device.type != "cuda":
        return None
    precision = "tf32" if train.precision == "fp32" and train.matmul_precision == "high" else train.precision
    return vendor_peak(torch.cuda.get_device_name(device), precision)
