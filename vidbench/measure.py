"""measure(): count, first call, check, memory, warm up, sample, check again, judge.

What is done about each known way to get a number wrong is listed in docs/measurement.md.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch

from vidbench.environment import ceilings, precision, raise_ceilings
from vidbench.kernel_names import Ran, device_kernels
from vidbench.memory import foreign_bytes, memory_and_operators
from vidbench.nvml import watch
from vidbench.records import Ceilings, Cost, Environment, Error, Measurement
from vidbench.sweep import Point, RequestError
from vidbench.timing import Budget, Samples, Timer, sample, warm_up
from vidbench.trust import judge
from vidbench.workload import CheckFailed, Unfit, workload
from vidkernels.checking import relative_error
from vidkernels.op import tensors_of

CEILING_TOLERANCE = 1.1
"""A result this far above the device's own measured ceiling is a fault of the measurement."""

OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
"""Words of errors by which allocators and libraries say so."""

COARSE = 0.01
"""The largest share of a sample that the clock's step may be: less than any change that is called one."""

ENERGY_BUDGET_S = 0.5
"""Who gives less for sampling a point is not made to wait longer for its energy."""

Sampler = Callable[[Callable[[], Any], Timer, Budget], Samples]


class Stopwatch:
    """Adds up the time of the `with` blocks it is used for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


def measure(
    point: Point,
    environment: Environment,
    *,
    round: int = 1,
    budget: Budget | None = None,
    video: str | None = None,
    sampler: Sampler = sample,
    cost: Cost | None = None,
    energy: bool = True,
) -> Measurement:
    """Measures one point in this process.

    Args:
        point: What to measure.
        environment: Holds the device's ceilings, which no result may exceed.
        round: Number of the round, from 1.
        budget: When sampling ends.
        video: Path of the video file that clips come from.
        sampler: Takes the samples; pytest-benchmark brings its own.
        cost: What one call is known to need; None counts it.
        energy: Whether the energy of a model's call is measured, where the device tells it.

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
            return _measure(point, environment, budget or Budget(), video, sampler, cost, energy, row, spent)
    except (Unfit, RequestError) as why:
        return row("skipped", str(why))
    except CheckFailed as wrong:
        return row("failed", str(wrong), error=wrong.error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return row("oom", _first_line(error))
    except RuntimeError as error:
        if any(words in str(error) for words in OUT_OF_MEMORY):
            return row("oom", _first_line(error))
        raise
    finally:
        gc.collect()
        if point.device == "cuda":
            with contextlib.suppress(RuntimeError):  # a broken context would hide what broke it
                torch.cuda.empty_cache()


def _measure(
    point: Point,
    environment: Environment,
    budget: Budget,
    video: str | None,
    sampler: Sampler,
    cost: Cost | None,
    energy: bool,
    row: Callable[..., Measurement],
    spent: Stopwatch,
) -> Measurement:
    foreign = foreign_bytes(point.device)
    with spent:
        work = workload(point, video)
        cost = cost or work.cost()
        call = work.prepare()
    timer = Timer(point.device, point.regime)
    with spent:
        cold_start, _ = timer(call)
        work.check()  # on inputs other than the first call's, so that a cached answer is a wrong one

    def settled() -> None:
        with spent:
            call()

    # What decoders and optical flow allocate is not torch's, and would read as nothing.
    memory, ran = None, Ran()
    if point.kind != "stage":
        memory, kernels = memory_and_operators(point.device, settled, foreign + timer.own_bytes)
        ran = Ran(kernels)
    timed = captured(call) if point.regime == "graph" else call
    with spent:
        warm_up(timed, timer, seconds=budget.warm_up_s)
    gpu = watch(point.device)
    if gpu is not None:
        timer.between = gpu.look
    cpu_before = psutil.cpu_times()
    with spent:
        samples = sampler(timed, timer, budget)
    steal = steal_since(cpu_before)
    state = None if gpu is None else gpu.state()
    with spent:
        error = work.check()

    median = statistics.median(samples.device_s)
    if why := _impossible(samples, timer.step_s):
        return row("failed", why, error=error)
    energy_j = None
    if gpu is not None and state is not None and energy and _has_energy(point, budget):
        with spent:
            energy_j = gpu.energy(*_block(timed, median))
        state = replace(state, idle_power_w=gpu.idle_w)
    if point.device == "cuda":
        ran = device_kernels(call)
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
    trust, reasons = judge(
        samples.device_s, samples.host_s, stop=samples.stop, hidden=samples.hidden, steal=steal, state=state
    )
    return row(
        "ok",
        samples_s=tuple(samples.device_s),
        host_samples_s=tuple(samples.host_s),
        calls_per_sample=samples.calls_per_sample,
        cold_start_s=cold_start if cold_start > 0 else None,  # a clock that was set back meanwhile
        stop=samples.stop,
        memory=memory,
        counts=cost.counts,
        params=cost.params,
        bytes_moved=cost.bytes_moved,
        error=error,
        ceilings=held,
        energy_j=energy_j,
        device_state=state,
        kernels=ran.kernels,
        registers=ran.registers,
        spills=ran.spills,
        trust=trust,
        trust_reasons=reasons,
    )


def _fraction(held: Ceilings, cost: Cost, seconds: float) -> float:
    """The least time that the ceilings allow, over the time taken."""
    macs = cost.counts.macs if cost.counts else None
    return max(2 * (macs or 0) / held.flops_per_s, (cost.bytes_moved or 0) / held.bytes_per_s) / seconds


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A CUDA graph of the call, to be replayed; what it computes is compared with the call's own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants a warm call on a side stream first
        want = [tensor.clone() for tensor in tensors_of(call())]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = tensors_of(call())
    graph.replay()
    worst = max((relative_error(got, wanted) for got, wanted in zip(static, want, strict=True)), default=0.0)
    if not worst <= GRAPH_GATE:
        raise CheckFailed(f"the graph's output differs from the call's by {worst:.2e}", Error(worst, GRAPH_GATE))

    def replay(_alive: Callable[[], Any] = call) -> None:  # its closure holds the inputs that the graph reads
        graph.replay()

    return replay


GRAPH_GATE = 1e-6


def steal_since(before: Any) -> float:
    """Share of processor time that the hypervisor gave to others meanwhile; 0 where it is not told."""
    after = psutil.cpu_times()
    total = sum(after) - sum(before)
    stolen = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    return max(0.0, stolen / total) if total > 0 else 0.0


def _impossible(samples: Samples, clock_step_s: float) -> str:
    """What no working clock could have said of these samples; empty where nothing is."""
    least, median = min(samples.device_s), statistics.median(samples.device_s)
    if least <= 0:
        return (
            f"the clock went backwards or stood still: a sample of {least:.3g} s, where the median is {median:.3g} s; "
            "measure again, with the machine's clock left alone"
        )
    if clock_step_s > COARSE * median * samples.calls_per_sample:
        return (
            f"the clock moves in steps of {clock_step_s:.3g} s, over {COARSE:.0%} of a sample of {median:.3g} s; "
            "use the hot regime, whose samples hold several calls"
        )
    return ""


def _has_energy(point: Point, budget: Budget) -> bool:
    """Of models, hot: between cold calls the GPU would be flushing its caches."""
    return point.kind == "model" and point.regime != "cold" and budget.seconds >= ENERGY_BUDGET_S


def _block(call: Callable[[], Any], seconds_per_call: float) -> tuple[Callable[[], None], int]:
    """Calls for about a hundredth of a second that are waited for, and how many they are."""
    calls = max(1, round(0.01 / seconds_per_call))

    def work() -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()

    return work, calls


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
