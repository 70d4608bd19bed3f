"""Timers and samples: when a clock is read, how often, and when it is enough."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from vidbench.environment import cache_bytes
from vidbench.metrics import median_rank
from vidbench.threads import OwnProcessors, be_still


@dataclass(frozen=True)
class Budget:
    """When sampling ends: as soon as the median is known well enough, or when its time is spent."""

    seconds: float = 0.5
    relative_half_width: float = 0.02
    """Of the 95 % interval of the median."""
    least: int = 6
    """Fewer samples have no 95 % interval of their median."""
    most: int = 100
    warm_up_s: float = 1.0
    """The most for warming up, however short the sampling: what is cold is measured wrong."""
    shortest_sample_s: float = 2e-4
    """Shorter calls are timed several at a time, so that the clock's own cost stays below a thousandth."""


@dataclass(frozen=True)
class Samples:
    """Seconds per call."""

    device_s: Sequence[float]
    host_s: Sequence[float] = ()
    """Host seconds until a call was enqueued, where device time was taken as well."""
    stop: str = "converged"
    calls_per_sample: int = 1
    hidden: int = 0
    """Samples after which the device still worked on another stream."""


class Timer:
    """Times blocks of calls on a device, with its caches warm (`hot`), flushed (`cold`), or replayed (`graph`)."""

    def __init__(self, device: str, regime: str) -> None:
        self.cuda = device == "cuda"
        self.cold = regime == "cold"
        self._flush = torch.ones(2 * cache_bytes(device) // 4, device=device) if self.cold else None
        self.hidden = 0
        self.between: Callable[[], None] = _nothing
        """Called before each block of calls, outside what is timed."""
        self.step_s = 0.0 if self.cuda else clock_step_s()
        """Of the clock, where it is coarse."""
        self._enqueue_s = 1e-4
        """Of one call, as the last block took it."""
        if self.cuda:
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    @property
    def own_bytes(self) -> int:
        """Device memory of the timer itself."""
        return 0 if self._flush is None else self._flush.nbytes

    def flush(self) -> None:
        """Reads and writes twice the last cache, if the regime is cold."""
        if self._flush is not None:
            self._flush.mul_(1.0)

    def __call__(self, call: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
        """(device, host) seconds per call; on a CPU both are the host's.

        On a device the stream is held back while the calls are enqueued, so that the span between the events is the
        device's work alone and not the gaps between launches; host seconds are those of enqueueing.
        """
        self.between()
        self.flush()
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            elapsed = (time.perf_counter() - start) / calls
            return elapsed, elapsed
        torch.cuda.synchronize()
        torch.cuda._sleep(int(min(2 * calls * self._enqueue_s, LONGEST_HOLD_S) * CLOCK_HZ))
        start = time.perf_counter()
        self._start.record()
        for _ in range(calls):
            call()
        self._end.record()
        enqueue = time.perf_counter() - start
        self._end.synchronize()
        ended = time.perf_counter()
        torch.cuda.synchronize()
        device = self._start.elapsed_time(self._end) / 1e3
        if time.perf_counter() - ended > max(HIDDEN_S, 0.1 * device):
            self.hidden += 1
        self._enqueue_s = enqueue / calls
        return device / calls, enqueue / calls


def _nothing() -> None:
    pass


def clock_step_s() -> float:
    """The step by which the host's clock moves, where it is seen to stand still; else 0; inf if it has stopped."""
    now = time.perf_counter()
    if time.perf_counter() != now:
        return 0.0
    before = _next_reading(now)
    return _next_reading(before) - before if before < math.inf else before


def _next_reading(now: float) -> float:
    """What the clock says after `now`; inf where it has stopped."""
    return next((read for _ in range(MOST_READINGS) if (read := time.perf_counter()) != now), math.inf)


MOST_READINGS = 10**7
"""About a second: no clock that is of any use stands still for longer."""


CLOCK_HZ = 2e9
"""About the clock of a GPU's multiprocessors; how long the stream is held back need not be exact."""

LONGEST_HOLD_S = 2e-2
HIDDEN_S = 1e-4


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics: no shape of distribution is assumed.

    Under six samples there is none; the extremes are given. Source: Conover (1999), §3.2, exact binomial ranks.
    """
    ordered, rank = sorted(samples), _rank(len(samples))
    return (ordered[rank - 1], ordered[-rank]) if rank else (ordered[0], ordered[-1])


_rank = cache(median_rank)


def sample(call: Callable[[], Any], timer: Timer, budget: Budget) -> Samples:
    """Samples until the interval of the median is narrow enough, or the budget ends."""
    calls = calls_per_sample(call, timer, budget)
    device: list[float] = []
    host: list[float] = []
    started = time.perf_counter()
    stop = "budget"
    while len(device) < budget.most:
        spent = time.perf_counter() - started
        if spent > budget.seconds and len(device) >= 3:
            break
        seconds, on_host = timer(call, calls)
        device.append(seconds)
        host.append(on_host)
        # A device's clocks settle over some tenths of a second, however well the first samples agree.
        settled = not timer.cuda or spent > SETTLING_S
        if len(device) >= budget.least and settled:
            low, high = median_interval(device)
            if high - low <= 2 * budget.relative_half_width * statistics.median(device):
                stop = "converged"
                break
    return Samples(device, host if timer.cuda else (), stop, calls, timer.hidden)


SETTLING_S = 0.1


def sample_in_turn(
    call: Callable[[], Any], timer: Timer, budget: Budget, *, turns: Iterator[None], taken: Callable[[float], None]
) -> Samples:
    """A sample at each turn, as other processes take theirs in between.

    Args:
        call: What is timed.
        timer: Takes the time.
        budget: Says how well the median should be known; how long it takes is up to the turns.
        turns: Yields when it is this process's turn; asked for the first one when everything is prepared.
        taken: Told that the turn is over, and how many seconds it took.
    """
    if not timer.cuda:
        budget = replace(budget, shortest_sample_s=SHORTEST_IN_TURN_S)
    calls = calls_per_sample(call, timer, budget)
    device: list[float] = []
    host: list[float] = []

    def awaken() -> None:
        began = time.perf_counter()
        if not timer.cold:
            timer(call)  # the caches were the others'
        while not timer.cuda and time.perf_counter() - began < AWAKE_S:
            timer(call)

    places = contextlib.nullcontext() if timer.cuda else OwnProcessors(awaken)
    if not timer.cuda:
        be_still()
    for _ in turns:
        began = time.perf_counter()
        with places:
            awaken()
        seconds, on_host = timer(call, calls)
        device.append(seconds)
        host.append(on_host)
        if not timer.cuda:
            be_still()
        taken(time.perf_counter() - began)
    low, high = median_interval(device)
    known = len(device) >= budget.least and high - low <= 2 * budget.relative_half_width * statistics.median(device)
    return Samples(device, host if timer.cuda else (), "converged" if known else "budget", calls, timer.hidden)


SHORTEST_IN_TURN_S = 5e-3
"""On a CPU a turn costs some milliseconds besides its sample, which is therefore not much shorter."""


AWAKE_S = 5e-3
"""A processor that slept takes milliseconds until it is at speed and has its threads on cores of their own."""

STEPS_PER_SAMPLE = 200
"""Of a coarse clock: half a percent, less than any change that is ever called one."""

MOST_CALLS = 10**6


def calls_per_sample(call: Callable[[], Any], timer: Timer, budget: Budget) -> int:
    """One, or as many as make a sample long enough to time. A second call in a row would not be cold."""
    if timer.cold or math.isinf(timer.step_s):
        return 1
    wanted = max(budget.shortest_sample_s, STEPS_PER_SAMPLE * timer.step_s)
    calls = 1
    while (elapsed := calls * timer(call, calls)[0]) < wanted / 2 and calls < MOST_CALLS:
        # A coarse clock may have seen nothing of the call, or a clock that was set back less than nothing.
        calls *= 10 if elapsed <= timer.step_s else math.ceil(wanted / elapsed)
    return max(1, min(MOST_CALLS, math.ceil(calls * max(1.0, wanted / elapsed) - 1e-6))) if elapsed > 0 else calls


def warm_up(call: Callable[[], Any], timer: Timer, seconds: float) -> None:
    """Calls until three in a row no longer beat the best by 5 %, or the time is spent."""
    best, since = math.inf, 0
    started = time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds and (since < 3 or (timer.cuda and spent < SETTLING_S)):
        elapsed, _ = timer(call)
        since = 0 if elapsed < 0.95 * best else since + 1
        best = min(best, elapsed)
