"""pytest plugin: `pytest --benchmark-only` measures the points of a suite through pytest-benchmark.

A test that takes the fixtures `point` and `measure_point` is run for every point of the suite:

    def test_point(point, measure_point):
        measure_point(point)
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vidbench.records import Environment, KnownCosts, Measurement
    from vidbench.results import RunWriter
    from vidbench.sweep import Point, Sweep
    from vidbench.timing import Budget, Samples, Timer


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


def _sweeps(config: pytest.Config) -> tuple[Sweep, ...]:
    """The sweeps asked for; trainings are left to `vidbench sweep`."""
    from vidbench.engine import choose, devices
    from vidbench.suites import plan
    from vidbench.sweep import RequestError, parse_axes
    from vidbench.workload import implementations

    try:
        axes = parse_axes(config.getoption("--vidbench-axis"))
        wanted = tuple(map(str, axes.pop("implementation", ())))
        planned = plan(config.getoption("--vidbench-suite"), axes=axes)
        timed = tuple(sweep for sweep in planned.sweeps if sweep.kind in ("op", "model"))
        devices(point for sweep in timed for point in sweep.points())
        return choose(timed, wanted, {sweep.workload: implementations(sweep.workload, sweep.kind) for sweep in timed})
    except RequestError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"point", "measure_point"} <= set(metafunc.fixturenames):
        points = {point.key: point for sweep in _sweeps(metafunc.config) for point in sweep.points()}
        metafunc.parametrize("point", points.values(), ids=points)


@pytest.fixture(scope="session")
def _vidbench_environment(pytestconfig: pytest.Config) -> Environment:
    from vidbench.engine import devices
    from vidbench.environment import describe
    from vidbench.sweep import RequestError

    try:
        return describe(*devices(point for sweep in _sweeps(pytestconfig) for point in sweep.points()))
    except RequestError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def _vidbench_writer(pytestconfig: pytest.Config, _vidbench_environment: Environment) -> Iterator[RunWriter | None]:
    folder = pytestconfig.getoption("--vidbench-out")
    if folder is None:
        yield None
        return
    from vidbench.results import RunWriter
    from vidbench.sweep import RequestError

    try:
        writer = RunWriter.create(
            Path(folder),
            suite=pytestconfig.getoption("--vidbench-suite"),
            sweeps=_sweeps(pytestconfig),
            environment=_vidbench_environment,
            command=shlex.join(("pytest", *map(str, pytestconfig.invocation_params.args))),
        )
    except RequestError as error:
        raise pytest.UsageError(str(error)) from None
    with writer:
        yield writer


@pytest.fixture(scope="session")
def _vidbench_costs() -> KnownCosts:
    from vidbench.records import KnownCosts

    return KnownCosts()


@pytest.fixture
def measure_point(
    benchmark: Any,
    _vidbench_environment: Environment,
    _vidbench_writer: RunWriter | None,
    _vidbench_costs: KnownCosts,
) -> Callable[[Point], Measurement]:
    """Measures a point with pytest-benchmark's clock; what the benchmark's row cannot hold goes to `extra_info`."""
    from vidbench.measure import measure

    if benchmark.disabled:
        pytest.skip("pytest-benchmark is switched off here (--benchmark-disable, or xdist)")

    def sampler(call: Callable[[], Any], timer: Timer, budget: Budget) -> Samples:
        return _pedantic(benchmark, call, timer, budget)

    def run(point: Point) -> Measurement:
        benchmark.group = f"{point.workload} {point.mode}"
        measured = measure(point, _vidbench_environment, sampler=sampler, cost=_vidbench_costs.of(point))
        _vidbench_costs.learn(measured)
        if _vidbench_writer is not None:
            _vidbench_writer.append(measured)
        if measured.status == "skipped":
            pytest.skip(measured.reason)
        if measured.status != "ok":
            pytest.fail(f"{measured.status}: {measured.reason}", pytrace=False)
        benchmark.extra_info.update(_extra_info(measured))
        return measured

    return run


def _pedantic(benchmark: Any, call: Callable[[], Any], timer: Timer, budget: Budget) -> Samples:
    """Samples by `benchmark.pedantic`; on a device, device time is taken inside each."""
    from vidbench.timing import Samples, calls_per_sample

    once, _ = timer(call)
    calls = calls_per_sample(call, timer, budget)
    rounds = min(budget.most, max(budget.least, int(budget.seconds / max(once * calls, 1e-8))))
    if not timer.cuda:
        benchmark.pedantic(call, setup=timer.flush if timer.cold else None, iterations=calls, rounds=rounds)
        return Samples(list(benchmark.stats.stats.data), stop="fixed count", calls_per_sample=calls)
    times: list[tuple[float, float]] = []
    # One call a sample: the benchmark's own row is then the time of a call, its enqueueing and waiting included.
    benchmark.pedantic(lambda: times.append(timer(call)), rounds=rounds)
    device, host = zip(*times, strict=True)
    return Samples(device, host, "fixed count", hidden=timer.hidden)


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
