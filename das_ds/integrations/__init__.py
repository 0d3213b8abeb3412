"""das_ds's masks in other trainers: plain torch, DeepSpeed, Hugging Face's Trainer and what builds on it.

`Protector` needs torch and transformers; DeepSpeed is loaded only for engines of DeepSpeed, and the callback is in
`das_ds.integrations.huggingface`.
"""

from das_ds.integrations.protector import Protector

__all__ = ["Protector"]
