"""Without a GPU, Triton kernels run in Triton's interpreter on CPU tensors; it has to know before it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
