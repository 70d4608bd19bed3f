"""What speaks against a number: `good`, `fair` or `poor`, with every reason in figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

from vidbench.records import DeviceState, Trust
from vidbench.timing import median_interval

HARD_LIMITS = ("hw_slowdown", "hw_thermal", "hw_power_brake")
"""The hardware itself takes a large part of the clock away: the number is of a machine in distress."""

SOFT_LIMITS = ("sw_thermal",)
"""The driver holds the temperature: ordinary in a warm rack, but a cool GPU would be faster.

A power cap is no limit of this kind: under heavy products it is what the GPU always does, and where it moves the clock,
that is said. Clocks set by the user, idling and the display lower nothing either.
"""

CLOCK_MOVED = 0.05
DRIFTED = 0.1
STEAL = 0.02
OUTLIER = 10.0
"""A sample by this factor off the median is an event of its own: a clock that was set, a process that was stopped."""

MODE_GAP = 0.05
LEAST_SHARE = 0.2
"""Of the samples in the rarer of two modes; a rarer one moves the median no more."""

LEAST_SAMPLES = 20
"""In fewer, plain noise has gaps as well; two speeds keep the median unknown, so that sampling goes on."""


def judge(
    device_s: Sequence[float],
    host_s: Sequence[float] = (),
    *,
    stop: str = "converged",
    hidden: int = 0,
    steal: float = 0.0,
    state: DeviceState | None = None,
) -> tuple[Trust, tuple[str, ...]]:
    """The trust in the median of these samples, and every reason against it, the worst first.

    Args:
        device_s: Samples, all above 0, in the order in which they were taken.
        host_s: Seconds of enqueueing, where device time was taken.
        stop: Why sampling ended.
        hidden: Samples after which the device went on working.
        steal: Share of the processor that the hypervisor took.
        state: What the GPU said meanwhile.
    """
    found = [*_of_samples(device_s, stop), *_of_host(device_s, host_s, hidden, steal)]
    if state is not None:
        found += _of_device(state)
    poor = [reason for trust, reason in found if trust == "poor"]
    fair = [reason for trust, reason in found if trust == "fair"]
    return ("poor" if poor else "fair" if fair else "good"), (*poor, *fair)


def _of_samples(samples: Sequence[float], stop: str) -> Iterator[tuple[Trust, str]]:
    low, high = median_interval(samples)
    median = statistics.median(samples)
    half = (high - low) / 2 / median
    if stop == "budget":
        yield ("poor" if half > 0.1 else "fair"), f"median known to ±{half:.0%} of {len(samples)} samples"
    middle = len(samples) // 2
    if middle >= 5:
        drift = statistics.median(samples[middle:]) / statistics.median(samples[:middle]) - 1
        if abs(drift) > DRIFTED:
            yield "fair", f"drifted {drift:+.0%} while sampling"
    for sample in (max(samples), min(samples)):
        if not 1 / OUTLIER < sample / median < OUTLIER:
            yield "fair", f"a sample of {sample:.3g} s is {sample / median:,.3g} times the median"
    if (modes := two_modes(samples)) is not None:
        share, apart = modes
        yield "fair", f"two speeds: {share:.0%} of the samples are {apart:.0%} slower than the rest"


def _of_host(
    device_s: Sequence[float], host_s: Sequence[float], hidden: int, steal: float
) -> Iterator[tuple[Trust, str]]:
    if 2 * hidden > len(device_s):
        yield "poor", "the device went on working on another stream when the call's own had ended"
    if steal > STEAL:
        yield "fair", f"the hypervisor took {steal:.0%} of the processor"
    if host_s:
        host, median = statistics.median(host_s), statistics.median(device_s)
        if host > median:
            yield "fair", f"launch-bound: enqueueing takes {host * 1e6:.0f} µs, the device {median * 1e6:.0f} µs"


def _of_device(state: DeviceState) -> Iterator[tuple[Trust, str]]:
    for limit, count in state.clock_limits.items():
        if limit in HARD_LIMITS or limit in SOFT_LIMITS:
            said = f"throttled ({limit}) in {count} of {state.readings} readings"
            if state.temperature_c is not None and "thermal" in limit:
                said += f", at up to {state.temperature_c:.0f} °C"
            yield ("poor" if limit in HARD_LIMITS else "fair"), said
    low, middle, high = state.sm_clock_low_hz, state.sm_clock_hz, state.sm_clock_high_hz
    if low is not None and middle is not None and high is not None and high - low > CLOCK_MOVED * middle:
        yield "fair", f"the SM clock moved from {low / 1e6:.0f} to {high / 1e6:.0f} MHz while sampling"
    if state.other_processes:
        words = "another process has" if state.other_processes == 1 else f"{state.other_processes} other processes have"
        yield "fair", f"{words} a context on the GPU"


def two_modes(samples: Sequence[float]) -> tuple[float, float] | None:
    """The share of the slower of two modes and how far apart they are; None where there is one, or none to be told.

    Modes are two groups with a gap between them of over 5 %, several times wider than any gap within the middle of
    either, each with a fifth of the samples at least. Told of twenty samples or more.
    """
    ordered = sorted(samples)
    count = len(ordered)
    least = max(3, round(LEAST_SHARE * count))
    if count < LEAST_SAMPLES:
        return None
    gaps = [after - before for before, after in pairwise(ordered)]
    cut = max(range(least - 1, count - least), key=gaps.__getitem__)
    fast, slow = ordered[: cut + 1], ordered[cut + 1 :]
    spread = max(_quartile_range(fast), _quartile_range(slow))
    middle = statistics.median(fast)
    if gaps[cut] <= max(MODE_GAP * middle, 2 * spread):
        return None
    return len(slow) / count, statistics.median(slow) / middle - 1


def _quartile_range(ordered: Sequence[float]) -> float:
    quarter = len(ordered) // 4
    return ordered[-1 - quarter] - ordered[quarter]
