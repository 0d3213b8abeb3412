"""fp16 on a CPU: torch computes in it everywhere, but DeepSpeed asks for a processor that does so natively."""

from __future__ import annotations

import torch


def allow_fp16_on_cpu() -> None:
    """Let DeepSpeed train in fp16 in this process, with torch's own slower CPU kernels; nothing else differs."""
    from deepspeed.accelerator import get_accelerator

    if not torch.cuda.is_available():
        get_accelerator().is_fp16_supported = lambda: True
