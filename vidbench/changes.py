"""What changed in a history: times at change points, exact figures at every new value, and what stopped running."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from vidbench.change_points import ChangePoint, change_points
from vidbench.compare import ALLOCATION_BYTES, CAUSES, FALSE_DISCOVERY_RATE, MACHINE, MATTERS
from vidbench.history import History
from vidbench.significance import Effect
from vidbench.sweep import Point

Kind = Literal["SLOWER", "STOPPED", "MORE", "FASTER", "LESS"]

KINDS: dict[Kind, str] = {
    "SLOWER": "slower",
    "STOPPED": "stopped running",
    "MORE": "more work or memory",
    "FASTER": "faster",
    "LESS": "less work or memory",
}
"""Of changes, the most important first: each with its words."""

EXACT = ("macs", "params", "bytes_moved")

Places = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A point on one machine, with one input: what belongs to one line of a plot."""

    point: Point
    machine: str
    input: str | None
    """The name of the video; None with synthetic clips."""
    rows: Places = field(repr=False, compare=False)
    """Of the history's frame, in the order of its runs."""

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from every other."""
        return (self.point.key, self.machine, self.input or "")


@dataclass(frozen=True)
class Spot:
    """A run, as the place of a change."""

    run_id: str
    created_utc: str
    git_commit: str | None
    git_dirty: bool | None


@dataclass(frozen=True)
class Change:
    """A figure of a series that is not what it was."""

    series: Series
    kind: Kind
    metric: str
    """A column of the history's frame."""
    before: float | str
    """The level up to here, since the change before; of a status the word."""
    after: float | str
    last_before: Spot
    """The run before, and the first with what is new; of a time each may be off by a run or two."""
    first_after: Spot
    runs: tuple[int, int]
    """At the level before and at the one after."""
    causes: Mapping[str, tuple[str | None, str | None]]
    """What else differs between those two runs, and may be why."""
    row: int
    """Of the history's frame: the first with what is new."""
    effect: Effect | None = None
    """Of a time."""
    p: float | None = None
    """Of a time: that chance alone does this anywhere in the series."""
    reason: str = ""
    """Why it stopped."""
    again: Spot | None = None
    """The first run in which it ran again."""

    @property
    def size(self) -> float:
        """How much, as a logarithm of a ratio; what stopped is without bound."""
        if isinstance(self.before, str) or isinstance(self.after, str) or min(self.before, self.after) <= 0:
            return math.inf
        return math.log(self.after / self.before)


@dataclass(frozen=True)
class Changes:
    """What changed in a history, and in which of its series."""

    history: History
    series: Sequence[Series]
    found: Sequence[Change]
    """The most important kind first, of each the largest, and of equal ones the newest."""


def changes(history: History) -> Changes:
    """Every change in every series.

    Times are judged by `change_points` over all series at once, with a run as the unit; a change by less than 1 % is
    none. Multiply-adds, parameters and bytes moved change where their value does, peak memory where all rounds of a run
    lie outside all of those before by more than an allocator's step.
    """
    frame = history.frame
    figures = {
        name: frame[name].to_numpy(np.float64, na_value=np.nan)
        for name in ("latency_s", *EXACT, "peak_memory_low_bytes", "peak_memory_bytes")
    }
    every = _series(history)
    found = [*_of_times(frame, every, figures["latency_s"])]
    for one in every:
        for metric in EXACT:
            found += _of_exact(frame, one, metric, figures[metric])
        found += _of_memory(frame, one, figures["peak_memory_low_bytes"], figures["peak_memory_bytes"])
        found += _of_status(frame, one)
    kinds = list(KINDS)
    found.sort(key=lambda change: (kinds.index(change.kind), -abs(change.size), -change.row))
    return Changes(history, every, found)


def _series(history: History) -> list[Series]:
    """Every series, in the order in which they first come."""
    frame = history.frame
    number = frame.groupby([*MACHINE, "input", "point"], dropna=False, observed=True, sort=False).ngroup().to_numpy()
    order = np.argsort(number, kind="stable")
    found = []
    for rows in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
        first = frame.iloc[rows[0]]
        machine = f"{first['machine']}, {first['threads']} threads"
        found.append(Series(history.points[first["point"]], machine, _text(first["input"]), rows))
    return found


def _of_times(frame: pd.DataFrame, every: Sequence[Series], latency: Numbers) -> Iterator[Change]:
    timed = [one.rows[latency[one.rows] > 0] for one in every]
    logs = [np.log(latency[rows]) for rows in timed]
    points = change_points(logs, [one.machine for one in every], rate=FALSE_DISCOVERY_RATE, matters=MATTERS)
    for one, rows, of in zip(every, timed, points, strict=True):
        for index, point in enumerate(of):
            yield _of_time(frame, one, rows, of, index, point)


def _of_time(
    frame: pd.DataFrame, one: Series, rows: Places, of: Sequence[ChangePoint], index: int, point: ChangePoint
) -> Change:
    start = of[index - 1].at if index else 0
    end = of[index + 1].at if index + 1 < len(of) else len(rows)
    return _change(
        frame, one, "SLOWER" if point.effect.log_ratio > 0 else "FASTER", "latency_s",
        (math.exp(point.before), math.exp(point.after)), (rows[point.at - 1], rows[point.at]),
        (point.at - start, end - point.at), effect=point.effect, p=point.p,
    )  # fmt: skip


def _of_exact(frame: pd.DataFrame, one: Series, metric: str, values: Numbers) -> Iterator[Change]:
    values = values[one.rows]
    known = np.flatnonzero(~np.isnan(values))
    at = np.flatnonzero(np.diff(values[known])) + 1
    edges = [0, *at.tolist(), len(known)]
    for start, here, end in zip(edges, edges[1:], edges[2:], strict=False):
        last, first = known[here - 1], known[here]
        yield _change(
            frame, one, "MORE" if values[first] > values[last] else "LESS", metric,
            (float(values[last]), float(values[first])), (one.rows[last], one.rows[first]), (here - start, end - here),
        )  # fmt: skip


def _of_memory(frame: pd.DataFrame, one: Series, lows: Numbers, highs: Numbers) -> Iterator[Change]:
    lows, highs = lows[one.rows], highs[one.rows]
    known = np.flatnonzero(~np.isnan(highs))
    # Peaks of runs differ by what a library keeps: only what lies outside of all since the last change has changed.
    stretches: list[tuple[int, float, float]] = []
    for index, (low, high) in enumerate(zip(lows[known].tolist(), highs[known].tolist(), strict=True)):
        if stretches:
            start, least, most = stretches[-1]
            if low <= most + ALLOCATION_BYTES and high >= least - ALLOCATION_BYTES:
                stretches[-1] = (start, min(least, low), max(most, high))
                continue
        stretches.append((index, low, high))
    edges = [*(start for start, _, _ in stretches), len(known)]
    for index in range(1, len(stretches)):
        (_, least, most), (start, low, high) = stretches[index - 1], stretches[index]
        more = low > most
        yield _change(
            frame, one, "MORE" if more else "LESS", "peak_memory_bytes", (most, low) if more else (least, high),
            (one.rows[known[start - 1]], one.rows[known[start]]), (start - edges[index - 1], edges[index + 1] - start),
        )  # fmt: skip


def _of_status(frame: pd.DataFrame, one: Series) -> Iterator[Change]:
    ok = (frame["status"].iloc[one.rows] == "ok").to_numpy(bool)
    turns = [0, *(np.flatnonzero(np.diff(ok)) + 1).tolist(), len(ok)]
    for start, here, end in zip(turns, turns[1:], turns[2:], strict=False):
        if not ok[here]:
            first = one.rows[here]
            status, reason = (str(_text(frame[name].iloc[first]) or "") for name in ("status", "reason"))
            again = _spot(frame.iloc[one.rows[end]]) if end < len(ok) else None
            yield _change(
                frame, one, "STOPPED", "status", ("ok", status), (one.rows[here - 1], first),
                (here - start, end - here), reason=reason, again=again,
            )  # fmt: skip


def _change(
    frame: pd.DataFrame,
    one: Series,
    kind: Kind,
    metric: str,
    levels: tuple[float | str, float | str],
    rows: tuple[int, int],
    runs: tuple[int, int],
    **more: Any,
) -> Change:
    last, first = (frame.iloc[int(row)] for row in rows)
    pairs = {name: (_text(last[name]), _text(first[name])) for name in CAUSES if name != "git_commit"}
    causes = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return Change(one, kind, metric, *levels, _spot(last), _spot(first), runs, causes, int(rows[1]), **more)


def _spot(run: pd.Series[Any]) -> Spot:
    dirty = run["git_dirty"]
    return Spot(
        str(run["run_id"]), str(run["created_utc"]), _text(run["git_commit"]), None if pd.isna(dirty) else bool(dirty)
    )


def _text(value: object) -> str | None:
    """A cell of text; None where it is NA."""
    return value if isinstance(value, str) else None
