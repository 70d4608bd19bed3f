"""Where the level of noisy series changed: binary segmentation by a robust t, and control of false discoveries.

Docs: docs/comparing.md says how it does on simulated noise.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

from vidbench.significance import Effect, discoveries

LEAST_RUNS = 3
"""On either side of a change."""

CLIP = 4.0
"""Deviations from the median beyond which a value counts as no further away: one slow run neither makes nor hides a
change."""

_LOOKS = 1 - 2 * LEAST_RUNS
"""Added to the length of a stretch: the places in it that are looked at."""

QUIET = 0.001
"""Relative noise below which nobody's times are; repeated values would else have none."""

SEED_RUNS = 12
"""The shortest stretch that is searched by itself: shorter ones cannot convince after so many looks."""

Numbers = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ChangePoint:
    """A change of the level of one series of logarithms."""

    at: int
    """Index of the first value after it."""
    before: float
    """The level between the change before and this one: a mean, values far from the median drawn in."""
    effect: Effect
    p: float
    """That chance alone makes such a change, corrected for every place that was looked at in the series."""

    @property
    def after(self) -> float:
        """The level from here to the next change."""
        return self.before + self.effect.log_ratio


def change_points(
    series: Sequence[Numbers], machines: Sequence[Hashable], *, rate: float, matters: float
) -> list[list[ChangePoint]]:
    """The change points of each of many series of logarithms, in order.

    A series is split where the t statistic of the two sides is largest, and its parts are split again. The statistic
    is taken over the whole part, and over seeded stretches of it, so that a change which was taken back is seen too.
    Half of the error goes to either, evenly over all places (Bonferroni; neighbouring places are no independent looks,
    and what is too much of it is spent on noise with heavy tails). A slow drift is found as one step or several.

    Args:
        series: Each in the order of its runs.
        machines: Of each series. Runs of one machine that follow each other may be alike, which all its series tell.
        rate: Of false discoveries, over all series together.
        matters: Relative changes below this are none.

    Source: Kovács, Bühlmann, Li & Munk (2023), Biometrika 110(1):249, arXiv:2002.06633, on seeded stretches.
    """
    by_machine: dict[Hashable, list[Numbers]] = {}
    for values, machine in zip(series, machines, strict=True):
        by_machine.setdefault(machine, []).append(values)
    inflation = {machine: _inflation(of) for machine, of in by_machine.items()}
    likes = [inflation[machine] for machine in machines]
    tests = [_tests(values, like, rate) for values, like in zip(series, likes, strict=True)]
    named = iter(discoveries([test.p for of in tests for test in of], rate))  # of all series together
    found = []
    for values, like, of in zip(series, likes, tests, strict=True):
        splits: list[_Test] = []
        kept: set[int] = set()
        for number, test in enumerate(of):
            # Parts of what is not split are no parts.
            if next(named) and (test.parent is None or test.parent in kept):
                kept.add(number)
                splits.append(test)
        found.append(_settled(values, like, sorted(splits, key=lambda test: test.at), matters) if splits else [])
    return found


class _Test(NamedTuple):
    """The best split of one part of a series."""

    parent: int | None
    """The test, by number, whose split made this part; None of the whole series."""
    at: int
    p: float


class _Stretches(NamedTuple):
    """Seeded stretches of a series, each with its best split."""

    low: Places
    high: Places
    at: Places
    p: Numbers
    """Of that split alone."""


def _noise(values: Numbers) -> float:
    """A robust deviation of one value, which neither steps nor a slow drift widen: from first differences."""
    steps = np.diff(values)
    return max(1.4826 * float(np.median(np.abs(steps - np.median(steps)))) / math.sqrt(2), QUIET)


def _inflation(series: Sequence[Numbers]) -> float:
    """By how much the variance of a mean is larger than of independent runs, where neighbours are alike.

    Of independent values, whatever their distribution, two of three are turning points; of an autoregression the fewer,
    the more alike its neighbours are, and neither a step nor an outlier changes many. The estimate is lowered by its
    standard error, so that a few short series say nothing.

    Source: Kendall, Time-Series (1976), §2.3, on the number and variance of turning points.
    """
    turns = places = 0
    spread = 0.0
    for values in series:
        if len(values) >= 2 * LEAST_RUNS:
            steps = np.diff(values)
            turns += int((steps[1:] * steps[:-1] < 0).sum())
            places += len(values) - 2
            spread += (16 * len(values) - 29) / 90
    if not places:
        return 1.0
    share = min(turns / places + math.sqrt(spread) / places, 1.0)
    alike = min(1 + 2 * math.cos(math.pi * share), 0.9)
    return (1 + alike) / (1 - alike) if alike > 0 else 1.0


def _best_splits(windows: npt.NDArray[Any], noise: float, inflation: float) -> tuple[Places, Numbers]:
    """Of each row: after how many values the t statistic is largest, and its two-sided p there."""
    length = windows.shape[1]
    reach = CLIP * noise
    centred = np.clip(windows - np.median(windows, axis=1, keepdims=True), -reach, reach)
    sums = np.cumsum(centred, axis=1)
    left = np.arange(LEAST_RUNS, length - LEAST_RUNS + 1)
    before, total = sums[:, left - 1], sums[:, -1:]
    difference = (total - before) / (length - left) - before / left
    weight = left * (length - left) / length
    within = (centred**2).sum(axis=1, keepdims=True) - total**2 / length - weight * difference**2
    # Clipping may take away what varies; the noise that it went by is the least there is.
    variance = np.maximum(within / (length - 2), noise**2) * inflation
    t = np.abs(difference) * np.sqrt(weight / variance)
    best = t.argmax(axis=1)
    return left[best], 2 * stdtr(length - 2, -t[np.arange(len(t)), best])


def _layers(count: int) -> Iterator[tuple[int, Places]]:
    """Length and starts of the seeded stretches of a series, the whole left out."""
    length, number = float(count), 1.0
    while (length := length / math.sqrt(2)) >= SEED_RUNS:
        number *= math.sqrt(2)
        size = math.ceil(length)
        starts = np.linspace(0, count - size, 2 * math.ceil(number) - 1)
        yield size, np.unique(starts.round().astype(np.int64))


def _stretches(values: Numbers, noise: float, inflation: float) -> _Stretches:
    parts = []
    for size, starts in _layers(len(values)):
        at, p = _best_splits(np.lib.stride_tricks.sliding_window_view(values, size)[starts], noise, inflation)
        parts.append(_Stretches(starts, starts + size, starts + at, p))
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return _Stretches(none, none, none, np.zeros(0))
    return _Stretches(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _tests(values: Numbers, inflation: float, rate: float) -> list[_Test]:
    """The best split of the series, and of the parts on either side of each that may be one."""
    found: list[_Test] = []
    if len(values) < 2 * LEAST_RUNS:
        return found
    noise = _noise(values)
    seeds = _stretches(values, noise, inflation)
    open_parts: list[tuple[int | None, int, int]] = [(None, 0, len(values))]
    while open_parts:
        parent, low, high = open_parts.pop()
        if high - low < 2 * LEAST_RUNS:
            continue
        at, p_value = _best_splits(values[None, low:high], noise, inflation)
        best, p = low + int(at[0]), float(p_value[0]) * (high - low + _LOOKS)
        inside = np.flatnonzero((seeds.low >= low) & (seeds.high <= high) & (seeds.high - seeds.low < high - low))
        if len(inside):
            looks = int((seeds.high[inside] - seeds.low[inside] + _LOOKS).sum())
            first = inside[seeds.p[inside].argmin()]
            of_seed = float(seeds.p[first]) * looks
            if of_seed < p:
                best, p = int(seeds.at[first]), of_seed
            p *= 2
        number = len(found)
        found.append(_Test(parent, best, min(p, 1.0)))
        if p <= rate:
            open_parts += [(number, low, best), (number, best, high)]
    return found


def _level(values: Numbers, noise: float) -> tuple[float, float]:
    """The mean of values drawn in to the median, and the sum of their squares around it."""
    middle = float(np.median(values))
    drawn = np.clip(values, middle - CLIP * noise, middle + CLIP * noise)
    mean = float(drawn.mean())
    return mean, float(((drawn - mean) ** 2).sum())


def _settled(values: Numbers, inflation: float, splits: Sequence[_Test], matters: float) -> list[ChangePoint]:
    """Splits moved to the best place between their neighbours, those that do not matter taken out."""
    noise = _noise(values)
    p_values = [test.p for test in splits]
    edges = [0, *(test.at for test in splits), len(values)]
    for index in range(1, len(edges) - 1):
        low, high = edges[index - 1], edges[index + 1]
        edges[index] = low + int(_best_splits(values[None, low:high], noise, inflation)[0][0])
    while True:
        levels = [_level(values[low:high], noise) for low, high in pairwise(edges)]
        found = []
        for index, ((before, squares), (after, more)) in enumerate(pairwise(levels)):
            counts = edges[index + 1] - edges[index], edges[index + 2] - edges[index + 1]
            degrees = sum(counts) - 2
            variance = inflation * max((squares + more) / degrees, noise**2) * (1 / counts[0] + 1 / counts[1])
            effect = Effect(after - before, math.sqrt(variance), degrees)
            found.append(ChangePoint(edges[index + 1], before, effect, p_values[index]))
        small = min(range(len(found)), key=lambda index: abs(found[index].effect.log_ratio), default=None)
        if small is None or abs(found[small].effect.log_ratio) >= math.log1p(matters):
            return found
        del edges[small + 1], p_values[small]
