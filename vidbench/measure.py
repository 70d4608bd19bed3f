"""measure(): check, count, warm up, sample, check again; timers, memory and trust.

What is done about each known way to get a number wrong is listed in docs/measurement.md.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import CellType, ModuleType
from typing import Any

import psutil
import torch

from vidbench.environment import cache_bytes, ceilings, precision, raise_ceilings
from vidbench.records import Ceilings, Environment, Measurement, Memory, Trust
from vidbench.sweep import Point
from vidbench.workload import CheckFailed, Cost, Unfit, workload
from vidkernels import Inputs

CEILING_TOLERANCE = 1.1
"""A result this far above the device's own measured ceiling is a fault of the measurement."""


@dataclass(frozen=True)
class Budget:
    """When sampling ends: as soon as the median is known well enough, or when its time is spent."""

    seconds: float = 0.5
    relative_half_width: float = 0.02
    """Of the 95 % interval of the median."""
    least: int = 5
    most: int = 100
    shortest_sample_s: float = 2e-4
    """Shorter calls are timed several at a time, so that the clock's own cost stays below a thousandth."""


@dataclass(frozen=True)
class Samples:
    """Seconds per call."""

    device_s: Sequence[float]
    host_s: Sequence[float] = ()
    """Host seconds where device time was taken as well."""
    stop: str = "converged"
    calls_per_sample: int = 1


class Stopwatch:
    """Adds up the time of the `with` blocks it is used for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


Sampler = Callable[[Callable[[], Any], "Timer", Budget], Samples]


class Timer:
    """Times blocks of calls on a device, with its caches warm (`hot`), flushed (`cold`), or replayed (`graph`)."""

    def __init__(self, device: str, regime: str) -> None:
        self.cuda = device == "cuda"
        flush = 2 * cache_bytes(device) if regime == "cold" else 0
        self._flush = torch.ones(flush // 4, device=device) if flush else None
        if self.cuda:
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
        """(device, host) seconds per call; on a CPU both are the host's."""
        if self._flush is not None:
            self._flush.mul_(1.0)  # reads and writes twice the cache, outside the timed span
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            elapsed = (time.perf_counter() - start) / calls
            return elapsed, elapsed
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._start.record()
        for _ in range(calls):
            call()
        self._end.record()
        # All streams are waited for: work that a kernel hides on a stream of its own shows in the host's time.
        torch.cuda.synchronize()
        host = (time.perf_counter() - start) / calls
        return self._start.elapsed_time(self._end) / 1e3 / calls, host


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics: no shape of distribution is assumed.

    Source: Conover, Practical Nonparametric Statistics (3rd ed.), §3.2, normal approximation of the binomial.
    """
    ordered, n = sorted(samples), len(samples)
    half = 1.96 * math.sqrt(n) / 2
    return ordered[max(0, math.floor(n / 2 - half))], ordered[min(n - 1, math.ceil(n / 2 + half))]


def sample(call: Callable[[], Any], timer: Timer, budget: Budget) -> Samples:
    """Samples until the interval of the median is narrow enough, or the budget ends."""
    once, _ = timer(call)
    calls = max(1, math.ceil(budget.shortest_sample_s / max(once, 1e-8)))
    device: list[float] = []
    host: list[float] = []
    end = time.perf_counter() + budget.seconds
    stop = "budget"
    while len(device) < budget.most and (time.perf_counter() < end or len(device) < min(3, budget.least)):
        seconds, on_host = timer(call, calls)
        device.append(seconds)
        host.append(on_host)
        if len(device) >= budget.least:
            low, high = median_interval(device)
            if high - low <= 2 * budget.relative_half_width * statistics.median(device):
                stop = "converged"
                break
    return Samples(device, host if timer.cuda else (), stop, calls)


def warm_up(call: Callable[[], Any], timer: Timer, seconds: float) -> None:
    """Calls until three in a row no longer beat the best by 5 %, or the time is spent."""
    best, since = math.inf, 0
    end = time.perf_counter() + seconds
    while since < 3 and time.perf_counter() < end:
        elapsed, _ = timer(call)
        since = 0 if elapsed < 0.95 * best else since + 1
        best = min(best, elapsed)


def measure(
    point: Point,
    environment: Environment,
    *,
    round: int = 1,
    budget: Budget | None = None,
    video: str | None = None,
    sampler: Sampler = sample,
    costs: dict[str, Cost] | None = None,
) -> Measurement:
    """Measures one point in this process.

    Args:
        point: What to measure.
        environment: Holds the device's ceilings, which no result may exceed.
        round: Number of the round, from 1.
        budget: When sampling ends.
        video: Path of the video file that clips come from.
        sampler: Takes the samples; pytest-benchmark brings its own.
        costs: A cache of counts, by point; implementations and layouts of one case share theirs.

    Returns:
        A Measurement of status ok, skipped (cannot run here), failed (wrong numbers, or faster than the device can
        be) or oom. Whatever else the workload raises is the caller's to record.
    """
    started = time.perf_counter()
    spent = Stopwatch()

    def row(status: Any, reason: str = "", **fields: Any) -> Measurement:
        wall = time.perf_counter() - started
        return Measurement(point, round, status, reason, wall_s=wall, overhead_s=wall - spent.seconds, **fields)

    if point.implementation == "compiled":
        torch._dynamo.reset()
    try:
        with precision(point.dtype):
            return _measure(point, environment, budget or Budget(), video, sampler, costs, row, spent)
    except Unfit as why:
        return row("skipped", str(why))
    except CheckFailed as wrong:
        return row("failed", str(wrong), error=wrong.error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return row("oom", _first_line(error))
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            return row("oom", _first_line(error))
        raise
    finally:
        gc.collect()
        if point.device == "cuda":
            torch.cuda.empty_cache()


def _measure(
    point: Point,
    environment: Environment,
    budget: Budget,
    video: str | None,
    sampler: Sampler,
    costs: dict[str, Cost] | None,
    row: Callable[..., Measurement],
    spent: Stopwatch,
) -> Measurement:
    _reset_peak_resident()
    with spent:
        work = workload(point, video)
        cost = _cost(point, work, costs)
        call = work.prepare()
    timer = Timer(point.device, point.regime)
    with spent:
        cold_start, _ = timer(call)
        work.check()  # on inputs other than the first call's, so that a cached answer is a wrong one
    memory = _memory(point.device, call, spent)
    if point.regime == "graph":
        call = _captured(call)
    with spent:
        warm_up(call, timer, seconds=2 * budget.seconds)
    cpu_before = psutil.cpu_times()
    with spent:
        samples = sampler(call, timer, budget)
    steal = _steal(cpu_before)
    with spent:
        error = work.check()

    median = statistics.median(samples.device_s)
    held = None
    if cost.counts is not None and cost.counts.macs:
        held = ceilings(environment, point.device, point.dtype, cost.bytes_moved, cold=point.regime == "cold")
        if _fraction(held, cost, median) > CEILING_TOLERANCE:
            # The ceiling may have been taken in a slow moment of a shared machine: take it again before judging.
            with spent:
                raise_ceilings(environment, point.device, point.dtype)
            held = ceilings(environment, point.device, point.dtype, cost.bytes_moved, cold=point.regime == "cold")
        if (fraction := _fraction(held, cost, median)) > CEILING_TOLERANCE:
            return row(
                "failed", f"{fraction:.2f} times the device's measured ceiling: not a possible time", error=error
            )
    trust, reasons = _trust(samples, steal)
    return row(
        "ok",
        samples_s=tuple(samples.device_s),
        host_samples_s=tuple(samples.host_s),
        calls_per_sample=samples.calls_per_sample,
        cold_start_s=cold_start,
        stop=samples.stop,
        memory=memory,
        counts=cost.counts,
        params=cost.params,
        bytes_moved=cost.bytes_moved,
        error=error,
        ceilings=held,
        trust=trust,
        trust_reasons=reasons,
    )


def _cost(point: Point, work: Any, costs: dict[str, Cost] | None) -> Cost:
    """Counted once for all implementations, layouts and regimes of a case."""
    if costs is None:
        return work.cost()  # type: ignore[no-any-return]
    key = replace(point, implementation="", memory_format="", regime="").key
    if key not in costs:
        costs[key] = work.cost()
    return costs[key]


def _fraction(held: Ceilings, cost: Cost, seconds: float) -> float:
    """The least time that the ceilings allow, over the time taken."""
    macs = cost.counts.macs if cost.counts else None
    return max(2 * (macs or 0) / held.flops_per_s, (cost.bytes_moved or 0) / held.bytes_per_s) / seconds


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of the call, to be replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants a warm call on a side stream first
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _memory(device: str, call: Callable[[], Any], spent: Stopwatch) -> Memory:
    """Live bytes and their peak around one call, exact: from the allocator's own events."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
        with spent:
            call()
            torch.cuda.synchronize()
        return Memory(
            live_before_bytes=before,
            peak_bytes=torch.cuda.max_memory_allocated(),
            reserved_bytes=torch.cuda.max_memory_reserved(),
            allocator_retries=torch.cuda.memory_stats()["num_alloc_retries"] - retries,
        )
    before = _live_tensor_bytes(call)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile, spent:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return Memory(before, before + peak, peak_resident_bytes=_peak_resident())


def _live_tensor_bytes(call: Callable[[], Any]) -> int:
    """Bytes of the tensors that a call keeps alive: inputs, weights, gradients, optimiser state; each storage once.

    Found by walking from the call's closure, so that what the check holds beside it is not counted.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [call]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, str | int | float | type | ModuleType):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            waiting.append(thing.grad if thing.is_leaf else None)
        elif isinstance(thing, Mapping):
            waiting += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set):
            waiting += thing
        elif isinstance(thing, CellType):
            waiting.append(thing.cell_contents)
        else:
            waiting += getattr(thing, "__closure__", None) or ()
            waiting.append(getattr(thing, "__self__", None))
            if isinstance(thing, torch.nn.Module | torch.optim.Optimizer | Inputs):
                waiting.append(vars(thing))
    return sum(storages.values())


def _reset_peak_resident() -> None:
    """Lets the kernel's record of the peak resident set start anew (Linux ≥ 4.0)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _peak_resident() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _steal(before: Any) -> float:
    """Share of processor time that the hypervisor gave to others meanwhile; 0 where it is not told."""
    after = psutil.cpu_times()
    total = sum(after) - sum(before)
    return (getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)) / total if total > 0 else 0.0


def _trust(samples: Samples, steal: float) -> tuple[Trust, tuple[str, ...]]:
    """good, fair or poor, with every reason against."""
    fair: list[str] = []
    poor: list[str] = []
    low, high = median_interval(samples.device_s)
    median = statistics.median(samples.device_s)
    half = (high - low) / 2 / median
    if samples.stop == "budget":
        (poor if half > 0.1 else fair).append(f"median known to ±{half:.0%} of {len(samples.device_s)} samples")
    middle = len(samples.device_s) // 2
    if middle >= 5:
        drift = statistics.median(samples.device_s[middle:]) / statistics.median(samples.device_s[:middle]) - 1
        if abs(drift) > 0.1:
            fair.append(f"drifted {drift:+.0%} while sampling")
    if steal > 0.02:
        fair.append(f"the hypervisor took {steal:.0%} of the processor")
    if samples.host_s:
        host = statistics.median(samples.host_s)
        if host > 2 * median and host > 1e-5:
            fair.append(f"launch-bound: host {host * 1e6:.0f} µs, device {median * 1e6:.0f} µs")
    return ("poor" if poor else "fair" if fair else "good"), (*poor, *fair)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
