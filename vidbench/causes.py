"""Why the time of a point may have changed: what one call ran and in what state the device was, on either side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from vidbench.kernel_kinds import lays_out
from vidbench.records import Measurement

Side = Sequence[Measurement]
"""The rounds of one point in one run."""

NAMED = 3
"""Kernels of a kind that are named; of the rest the number."""

CLOCK_DIFFERS = 0.02
LIMIT_DIFFERS = 0.2
"""Of the readings that said that a clock was held down."""


def causes(base: Side, new: Side) -> Iterator[str]:
    """What is not as it was, each in few words, the likeliest first.

    Args:
        base: Rounds of a point, all ok.
        new: Of the same point.
    """
    yield from _kernels(base, new)
    clocks = _both(base, new, _clock)
    if clocks is not None and clocks[0] > 0 and abs(change := clocks[1] / clocks[0] - 1) > CLOCK_DIFFERS:
        yield f"the SM clock is {abs(change):.1%} {'lower' if change < 0 else 'higher'}"
    yield from _limits(base, new)
    if (launch := _both(base, new, _launch_bound)) is not None:
        then, now = (share > 0.5 for share in launch)
        if then != now:
            yield "launch-bound now" if now else "no longer launch-bound"


def _kernels(base: Side, new: Side) -> Iterator[str]:
    sides = [[one.kernels for one in side if one.kernels] for side in (base, new)]
    if not all(sides):
        return
    then, now = (_most(side) for side in sides)
    seen_then, seen_now = ({name for kernels in side for name in kernels} for side in sides)
    came = [_times(name, count) for name, count in now.items() if name not in seen_then]
    went = [_times(name, count) for name, count in then.items() if name not in seen_now]
    if came or went:
        parts = [f"{word} {_listed(names)}" for word, names in (("came", came), ("went", went)) if names]
        yield f"other kernels ran: {'; '.join(parts)}"
    copies = [sum(count for name, count in kernels.items() if lays_out(name)) for kernels in (then, now)]
    if copies[0] != copies[1]:
        yield f"copies and changes of layout {copies[0]} → {copies[1]}"
    others = [
        f"{name} {then[name]} → {count}"
        for name, count in now.items()
        if name in then and then[name] != count and not lays_out(name)
    ]
    if others:
        yield f"how often: {_listed(others)}"
    for word, side in zip(("BASE", "NEW"), sides, strict=True):
        if differing := sum(kernels != _most(side) for kernels in side):
            yield f"{differing} of {len(side)} rounds of {word} ran other kernels than the rest"


def _most(side: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
    """What most rounds ran."""
    return max(side, key=lambda kernels: sum(kernels == other for other in side))


def _times(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ×{count}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _limits(base: Side, new: Side) -> Iterator[str]:
    then, now = _limit_shares(base), _limit_shares(new)
    if then is None or now is None:
        return
    for name in dict.fromkeys((*then, *now)):
        before, after = then.get(name, 0.0), now.get(name, 0.0)
        if abs(after - before) > LIMIT_DIFFERS:
            yield f"clock held down by {name} in {after:.0%} of the readings, was {before:.0%}"


def _limit_shares(side: Side) -> dict[str, float] | None:
    """Of the readings of all rounds; None where there are none."""
    states = [one.device_state for one in side if one.device_state is not None]
    readings = sum(state.readings for state in states)
    if not readings:
        return None
    names = {name for state in states for name in state.clock_limits}
    return {name: sum(state.clock_limits.get(name, 0) for state in states) / readings for name in sorted(names)}


def _both(base: Side, new: Side, of: Callable[[Measurement], float | None]) -> tuple[float, float] | None:
    """The median of a figure over the rounds of either side; None where one has none."""
    found = [[value for one in side if (value := of(one)) is not None] for side in (base, new)]
    return (statistics.median(found[0]), statistics.median(found[1])) if all(found) else None


def _clock(one: Measurement) -> float | None:
    return None if one.device_state is None else one.device_state.sm_clock_hz


def _launch_bound(one: Measurement) -> float | None:
    """1 where enqueueing takes longer than the device's work."""
    if not len(one.host_samples_s) or one.median_s is None:
        return None
    return float(statistics.median(one.host_samples_s) > one.median_s)
