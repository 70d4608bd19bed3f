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


INTERPRETED = ("triton_", "cuda_", "_kernels.py", "test_conv3d_stem.py", "test_host_cuda.py", "test_cuda_cluster.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a machine without a GPU, kernels in the interpreter or the host build take minutes: `-m slow` runs them."""
    if not torch.cuda.is_available():
        for item in items:
            if any(name in item.nodeid for name in INTERPRETED):
                item.add_marker(pytest.mark.slow)
