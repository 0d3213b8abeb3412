"""Continual domain-adaptive pre-training with soft masking (DAS, ICLR 2023) inside DeepSpeed ZeRO."""

__version__ = "0.1.0"
