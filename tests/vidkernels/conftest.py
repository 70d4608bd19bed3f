"""Settings of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from host_cuda import cuda_on_cpu  # noqa: F401  used by every test: CUDA C++ runs on the CPU


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Cases are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
