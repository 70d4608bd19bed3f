"""Time of a call in which nobody worked, by cause: a GPU between its kernels, torch's operators on a CPU.

A kernel that was launched before the one ahead of it ended waited for nobody but the device. Only what comes to an idle
device is late by what the host did until it launched it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from vidbench.kernel_kinds import is_operator
from vidbench.traces import ALLOCATING, WAITING, Cause, Event, Gap, Span, is_driver_call

Interval = tuple[float, float]

JUST_BEFORE_S = 1e-5
"""A call that waited for a kernel comes back when the kernel has ended, give or take how well both clocks agree."""

OUTSIDE: Cause = "no operator of torch's ran (Python, autograd, compiled code, other libraries)"


def busy(intervals: Iterable[Interval]) -> list[Interval]:
    """Begin and end of the times covered by any of these intervals."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _free(covered: Sequence[Interval], start: float, end: float) -> Iterator[Interval]:
    """The parts of an interval that are not covered."""
    at = start
    for first, last in covered:
        if last <= at:
            continue
        if first >= end:
            break
        if first > at:
            yield at, first
        at = max(at, last)
    if at < end:
        yield at, end


class _Thread:
    """What one thread of the host did, to be asked about any time of it."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._at_work = busy((one.start_s, one.end_s) for one in events)
        self._allocating = busy((one.start_s, one.end_s) for one in events if ALLOCATING.match(one.name))
        self._waited_until = sorted(one.end_s for one in events if WAITING.match(one.name))

    def why_late(self, start: float, launch: Event) -> Cause:
        """What kept it from launching a kernel earlier.

        Args:
            start: When the device had nothing to do any more.
            launch: The driver's call, which ended later than that.
        """
        half = (launch.end_s - start) / 2
        if _covered(self._allocating, start, launch.end_s) > half:
            return "allocating"
        waited = bisect_left(self._waited_until, start - JUST_BEFORE_S)
        if waited < bisect_right(self._waited_until, launch.start_s):
            return "a synchronising call"
        return "launching" if _covered(self._at_work, start, launch.end_s) > half else OUTSIDE


def _covered(intervals: Sequence[Interval], start: float, end: float) -> float:
    """How much of a time is covered by intervals that are in order and do not touch."""
    total = 0.0
    for index in range(bisect_right(intervals, start, key=lambda one: one[1]), len(intervals)):
        first, last = intervals[index]
        if first >= end:
            break
        total += min(last, end) - max(first, start)
    return total


def device_gaps(events: Iterable[Event], spans: Iterable[Span], scope: Event) -> list[Gap]:
    """Why the device had nothing to do within a call, by what came before the launch of the next kernel."""
    kernels = sorted((one for one in events if one.is_kernel), key=lambda one: one.start_s)
    next_at = {one.start_s: one for one in reversed(kernels)}
    hosts = [span.event for span in spans if is_operator(span.event.name) or is_driver_call(span.event.name)]
    launches = {one.launch: one for one in hosts if one.launch}
    lanes: dict[str, list[Event]] = {}
    for one in hosts:
        lanes.setdefault(one.lane, []).append(one)
    threads = {lane: _Thread(found) for lane, found in lanes.items()}
    found: list[tuple[Cause, float]] = []
    for start, end in _free(busy((one.start_s, one.end_s) for one in kernels), scope.start_s, scope.end_s):
        launch = launches.get(next_at[end].launch) if end in next_at else None
        cause: Cause
        if end not in next_at:
            cause = "the call's end"
        elif launch is None:
            cause = "a launch that was not seen"
        elif launch.end_s <= start:
            cause = "the device's own, between queued kernels"
        else:
            cause = threads[launch.lane].why_late(start, launch)
        found.append((cause, end - start))
    return _gaps(found)


def host_gaps(spans: Iterable[Span], scope: Event) -> list[Gap]:
    """On a CPU: the time within a call in which no operator ran."""
    worked = busy((span.event.start_s, span.event.end_s) for span in spans if is_operator(span.event.name))
    return _gaps([(OUTSIDE, end - start) for start, end in _free(worked, scope.start_s, scope.end_s)])


def _gaps(pieces: Sequence[tuple[Cause, float]]) -> list[Gap]:
    """One for each cause, the longest first."""
    lengths: dict[Cause, list[float]] = {}
    for cause, seconds in pieces:
        lengths.setdefault(cause, []).append(seconds)
    gaps = [Gap(cause, len(found), sum(found)) for cause, found in lengths.items()]
    return sorted(gaps, key=lambda gap: -gap.seconds)
