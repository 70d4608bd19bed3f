"""What the harness itself costs: at most 50 ms per point and round besides checking, counting, warming up, sampling."""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vidbench.engine.local import LocalEngine
from vidbench.records import Environment
from vidbench.sweep import Point

LIMIT_S = 0.05
HELP_LIMIT_S = 0.4
CONV = {"in_channels": 8, "out_channels": 8, "clip_length": 4, "batch_size": 1, "height": 14, "width": 14}
SEQUENCE = {"input_features": 32, "hidden_size": 32, "clip_length": 16, "batch_size": 1}
POINTS = (
    Point("conv3d", "op", "library", case=CONV),
    Point("conv3d", "op", "library", mode="train", case=CONV),
    Point("lstm", "op", "library", case=SEQUENCE),
    Point("lstm", "op", "library", mode="stream", case=SEQUENCE),
    Point("tcn", "model", "eager", case={"clip_length": 16, "batch_size": 1, "hidden_size": 32, "input_features": 32}),
)


@pytest.fixture(scope="module")
def machine() -> Iterator[tuple[LocalEngine, Environment]]:
    with LocalEngine(timeout_s=60) as engine:
        environment, _ = engine.describe("cpu", ("fp32",), {point.workload: point.kind for point in POINTS})
        yield engine, environment


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.workload} {point.mode}")
def test_cost_of_a_point(benchmark: Any, machine: tuple[LocalEngine, Environment], point: Point) -> None:
    """The benchmark's time is the whole point; `overhead_s` is the harness's part of it."""
    engine, environment = machine
    overheads: list[float] = []

    def once() -> None:
        measurement = engine.measure(point, 1, environment, seconds=0.02, video=None)
        assert measurement.status == "ok", measurement.reason
        assert measurement.overhead_s is not None
        overheads.append(measurement.overhead_s)

    once()  # the first point of a process also opens torch's profiler
    overheads.clear()
    benchmark.pedantic(once, rounds=9)
    benchmark.extra_info["overhead_s"] = overheads
    assert statistics.median(overheads) <= LIMIT_S


@pytest.mark.parametrize("command", ["--help", "report --help"])
def test_time_to_help(benchmark: Any, command: str) -> None:
    seconds: list[float] = []

    def once() -> None:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "vidbench.cli", *command.split()], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)

    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
    assert min(seconds) <= HELP_LIMIT_S
