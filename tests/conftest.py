"""Before anything is imported: how tests use the processor, and what they compile."""

import os

import pytest
import torch

# Tensors are tiny: threads would wait for each other longer than they work.
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton kernels run in Triton's interpreter on CPU tensors; it has to know before it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("helpers")

from helpers.compiled_ops import keep_compiled_ops  # noqa: E402

keep_compiled_ops()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws at random does not depend on the tests that its process ran before."""
    torch.manual_seed(0)
