"""pytest plugin: `pytest --benchmark-only` measures the points of a suite through pytest-benchmark.

A test that takes the fixtures `point` and `measure_point` is run for every point of the suite:

    def test_point(point, measure_point):
        measure_point(point)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vidbench.measure import Budget, Samples, Timer
    from vidbench.records import Environment, Measurement
    from vidbench.results import RunWriter
    from vidbench.sweep import Point


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vidbench", "vidbench: points of a suite as benchmarks")
    group.addoption("--vidbench-suite", default="quick", metavar="SUITE", help="suite to measure (quick)")
    group.addoption(
        "--vidbench-axis",
        action="append",
        default=[],
        metavar="NAME=V[,V...]",
        help="values of an axis, such as clip_length=8,16 or implementation=library; may be repeated",
    )
    group.addoption("--vidbench-out", metavar="DIR", help="write a run folder, for `vidbench report`, as well")


def pytest_configure(config: pytest.Config) -> None:
    under_xdist = config.getoption("numprocesses", None) or config.getoption("tx", None)
    if config.getoption("benchmark_only", False) and under_xdist:
        raise pytest.UsageError(
            "--benchmark-only under xdist (-n) would measure nothing: pytest-benchmark switches itself off there; "
            "drop -n, or add -n 0"
        )


def _points(config: pytest.Config) -> list[Point]:
    """The points of the suite asked for; trainings are left to `vidbench sweep`."""
    from vidbench.suites import plan
    from vidbench.sweep import RequestError, parse_axes

    try:
        axes = parse_axes(config.getoption("--vidbench-axis"))
        wanted = {str(name) for name in axes.pop("implementation", ())}
        planned = plan(config.getoption("--vidbench-suite"), axes=axes)
    except RequestError as error:
        raise pytest.UsageError(str(error)) from None
    points = {p.key: p for sweep in planned.sweeps for p in sweep.points() if p.kind in ("op", "model")}
    return [point for point in points.values() if not wanted or point.implementation in wanted]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"point", "measure_point"} <= set(metafunc.fixturenames):
        points = _points(metafunc.config)
        if not points:
            raise pytest.UsageError("no point has the implementation asked for by --vidbench-axis implementation=…")
        metafunc.parametrize("point", points, ids=[point.key for point in points])


@pytest.fixture(scope="session")
def _vidbench_environment(pytestconfig: pytest.Config) -> Environment:
    from vidbench.environment import describe

    points = _points(pytestconfig)
    return describe(points[0].device, sorted({point.dtype for point in points}))


@pytest.fixture(scope="session")
def _vidbench_writer(pytestconfig: pytest.Config, _vidbench_environment: Environment) -> Iterator[RunWriter | None]:
    folder = pytestconfig.getoption("--vidbench-out")
    if folder is None:
        yield None
        return
    from vidbench.results import RunWriter
    from vidbench.suites import plan
    from vidbench.sweep import parse_axes

    suite = pytestconfig.getoption("--vidbench-suite")
    axes = parse_axes(pytestconfig.getoption("--vidbench-axis"))
    axes.pop("implementation", None)
    with RunWriter.create(
        Path(folder),
        suite=suite,
        sweeps=plan(suite, axes=axes).sweeps,
        environment=_vidbench_environment,
        command=" ".join(("pytest", *pytestconfig.invocation_params.args)),
    ) as writer:
        yield writer


@pytest.fixture(scope="session")
def _vidbench_costs() -> dict[str, Any]:
    return {}


@pytest.fixture
def measure_point(
    benchmark: Any,
    _vidbench_environment: Environment,
    _vidbench_writer: RunWriter | None,
    _vidbench_costs: dict[str, Any],
) -> Callable[[Point], Measurement]:
    """Measures a point with pytest-benchmark's clock; what the benchmark's row cannot hold goes to `extra_info`."""
    from vidbench.measure import measure

    def sampler(call: Callable[[], Any], timer: Timer, budget: Budget) -> Samples:
        return _pedantic(benchmark, call, timer, budget)

    def run(point: Point) -> Measurement:
        measured = measure(point, _vidbench_environment, sampler=sampler, costs=_vidbench_costs)
        if _vidbench_writer is not None:
            _vidbench_writer.append(measured)
        if measured.status == "skipped":
            pytest.skip(measured.reason)
        if measured.status != "ok":
            pytest.fail(f"{measured.status}: {measured.reason}", pytrace=False)
        benchmark.group = f"{point.workload} {point.mode}"
        benchmark.extra_info.update(_extra_info(measured))
        return measured

    return run


def _pedantic(benchmark: Any, call: Callable[[], Any], timer: Timer, budget: Budget) -> Samples:
    """Samples by `benchmark.pedantic`; on a device, device time is taken inside each."""
    from vidbench.measure import Samples

    once, _ = timer(call)
    calls = max(1, round(budget.shortest_sample_s / max(once, 1e-8)))
    rounds = min(budget.most, max(budget.least, int(budget.seconds / max(once * calls, 1e-8))))
    if not timer.cuda:
        benchmark.pedantic(call, iterations=calls, rounds=rounds)
        return Samples(list(benchmark.stats.stats.data), stop="fixed count", calls_per_sample=calls)
    times: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: times.append(timer(call, calls)), rounds=rounds)
    device, host = zip(*times, strict=True)
    return Samples(device, host, "fixed count", calls)


def _extra_info(measured: Measurement) -> dict[str, Any]:
    """What one row of a benchmark's JSON carries beside its times, in SI units."""
    point, counts = measured.point, measured.counts
    macs = counts.macs if counts else None
    return {
        "point": point.key,
        "implementation": point.implementation,
        "clip_length": point.case.get("clip_length"),
        "batch_size": point.case.get("batch_size"),
        "macs": macs,
        "flops": None if macs is None else 2 * macs,
        "params": measured.params,
        "peak_memory_bytes": measured.memory.peak_bytes if measured.memory else None,
        "relative_error": measured.error.output if measured.error else None,
        "device_samples_s": list(measured.samples_s),
        "trust": measured.trust,
        "trust_reasons": list(measured.trust_reasons),
    }
