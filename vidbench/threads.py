"""The threads of this process: each on a processor of its own while it measures, and on none when others do."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

STILL_S = 1e-3

PER_THREAD, SCHEDULED = 4, 2
"""Linux's numbers of a thread's own clock: CPUCLOCK_PERTHREAD_MASK and CPUCLOCK_SCHED."""

BUSY = 0.1
"""Of the busiest thread's time: who takes less of a call does not compute."""


def be_still(patience_s: float = 0.1) -> None:
    """Waits until this process uses no processor any more.

    OpenMP's threads go on spinning for a while after a parallel region, in case another one comes: by themselves for
    about ten milliseconds. They would take a core from whoever measures next.
    """
    deadline = time.perf_counter() + patience_s
    while time.perf_counter() < deadline:
        wall, used = time.perf_counter(), time.process_time()
        time.sleep(STILL_S)
        if time.process_time() - used < 0.2 * (time.perf_counter() - wall):
            break


class OwnProcessors:
    """Each thread that computes is held on a processor of its own, for as long as the `with` block.

    A thread that sleeps between short operators is woken on the processor of the one that wakes it, now and then, and
    stays there: the two share it for seconds while another one is idle, and every call takes up to twice as long. Who
    is set apart once stays apart for a while, and when let go can make way for what else the machine does. Where there
    are more threads than processors, or a system without such calls, they are left alone.

    Args:
        work: Calls that the threads are known by.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        before = _seconds_used()
        work()
        used = {thread: seconds - before.get(thread, 0.0) for thread, seconds in _seconds_used().items()}
        busy = sorted(thread for thread, seconds in used.items() if seconds > BUSY * max(used.values()))
        processors = _by_core(self._allowed)
        fit = 1 < len(busy) <= len(processors)
        self.places = dict(zip(busy, processors, strict=False)) if fit else {}
        """Processor by thread, both as the kernel numbers them."""

    def __enter__(self) -> Self:
        for thread, processor in self.places.items():
            _allow(thread, {processor})
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self.places:
            _allow(thread, self._allowed)


def _allow(thread: int, processors: set[int]) -> None:
    with contextlib.suppress(OSError):  # a thread that has ended meanwhile
        os.sched_setaffinity(thread, processors)


def _seconds_used() -> dict[int, float]:
    """Of a processor, by each thread of this process."""
    used = {}
    with contextlib.suppress(OSError):
        for thread in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(OSError):
                used[thread] = time.clock_gettime(~thread << 3 | PER_THREAD | SCHEDULED)
    return used


def _by_core(processors: set[int]) -> list[int]:
    """One processor of every core, then their second ones, and so on."""

    def rank(processor: int) -> tuple[int, int]:
        return sum(one < processor for one in _siblings(processor) & processors), processor

    return sorted(processors, key=rank)


def _siblings(processor: int) -> set[int]:
    """The processors of its core, itself too; none where it is not told."""
    found: set[int] = set()
    with contextlib.suppress(OSError, ValueError):
        text = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text()
        for part in text.strip().split(","):  # 0,32 or 0-1
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found
