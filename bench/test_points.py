"""Every point of a suite as a benchmark: `pytest bench --benchmark-only [--vidbench-suite conv3d]`."""

from collections.abc import Callable

from vidbench.records import Measurement
from vidbench.sweep import Point


def test_point(point: Point, measure_point: Callable[[Point], Measurement]) -> None:
    """Checked against float64 first; a point that cannot run here is skipped with its reason."""
    assert measure_point(point).status == "ok"
