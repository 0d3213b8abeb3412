"""Before anything is imported: how tests use the processor."""

import os
from tempfile import TemporaryDirectory

import torch

# Tensors are tiny: threads would wait for each other longer than they work.
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton kernels run in Triton's interpreter on CPU tensors; it has to know before it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# DeepSpeed's C++ optimizers are compiled once for all tests, where no lock of a killed compilation can be waited for.
_extensions = TemporaryDirectory(prefix="torch_extensions_")
os.environ["TORCH_EXTENSIONS_DIR"] = _extensions.name
