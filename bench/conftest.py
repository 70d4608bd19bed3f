"""Benchmarks run under `pytest --benchmark-only` alone; a plain `pytest` passes them by."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves this folder out of a plain run."""
    return None if config.getoption("benchmark_only", False) else True
