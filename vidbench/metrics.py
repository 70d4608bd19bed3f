"""Derived values: what is computed from measurements, in SI units, and never stored with them.

`frame` makes the tidy table that reports and comparisons read; `METRICS` says what each of its figures means.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vidbench.records import Measurement
from vidbench.sweep import POINT_AXES, Point, Value, text_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    Numbers = np.ndarray[Any, np.dtype[np.float64]]
    Columns = dict[str, Any]

SEVERITY = ("ok", "skipped", "timeout", "oom", "crashed", "failed")
"""Statuses from best to worst; a point has the worst of its rounds. A wrong result is worse than none."""

TRUST = ("good", "fair", "poor")
ONE_ROUND = "one round: between-process noise unknown"

RUN_COLUMNS = ("run_id", "suite")
POINT_COLUMNS = ("workload", "kind", *POINT_AXES)
SIZE_COLUMNS = ("batch_size", "clip_length", "height", "width")
"""Keys of a case that every frame has, NA where a case lacks them; further keys have columns of their own."""


@dataclass(frozen=True)
class Metric:
    """One figure of a frame: what it is, which way is better, and how it is derived."""

    name: str
    unit: str
    better: Literal["lower", "higher"] | None
    label: str
    """For an axis or a table head, without the unit."""
    of: tuple[str, ...] = ()
    """The columns that `derive` takes, in its order; none: it is measured."""
    derive: Callable[..., pd.Series] | None = None


def _flops(macs: pd.Series) -> pd.Series:
    return 2 * macs


def _throughput(batch_size: pd.Series, latency_s: pd.Series, mode: pd.Series) -> pd.Series:
    # A streaming step takes one frame, so its reciprocal is frames per second and no clip has passed.
    return (batch_size / latency_s).where(mode.isin(("forward", "train")))


def _rate(amount: pd.Series, latency_s: pd.Series) -> pd.Series:
    return amount / latency_s


def _roofline(
    flops: pd.Series, bytes_moved: pd.Series, latency_s: pd.Series, flops_per_s: pd.Series, bytes_per_s: pd.Series
) -> pd.Series:
    compute_s = flops / flops_per_s
    memory_s = (bytes_moved / bytes_per_s).fillna(compute_s)
    return compute_s.where(compute_s >= memory_s, memory_s) / latency_s


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("latency_s", "s", "lower", "latency per call"),
        Metric("latency_low_s", "s", None, "latency, lower end of the 95 % interval"),
        Metric("latency_high_s", "s", None, "latency, upper end of the 95 % interval"),
        Metric("samples", "", None, "samples"),
        Metric(
            "throughput_clips_per_s", "1/s", "higher", "clips per second",
            ("batch_size", "latency_s", "mode"), _throughput,
        ),
        Metric("macs", "", "lower", "multiply-adds"),
        Metric("flops", "", "lower", "floating-point operations", ("macs",), _flops),
        Metric("params", "", "lower", "parameters"),
        Metric("bytes_moved", "B", "lower", "bytes moved at least"),
        Metric("peak_memory_bytes", "B", "lower", "peak memory"),
        Metric("achieved_flops_per_s", "1/s", "higher", "achieved FLOP/s", ("flops", "latency_s"), _rate),
        Metric(
            "roofline_fraction", "", "higher", "fraction of the attainable speed",
            ("flops", "bytes_moved", "latency_s", "ceiling_flops_per_s", "ceiling_bytes_per_s"), _roofline,
        ),
        Metric("relative_error", "", "lower", "relative error against float64"),
        Metric("top1_accuracy", "", "higher", "top-1 accuracy"),
        Metric("chance_accuracy", "", None, "top-1 accuracy of guessing"),
        Metric("energy_j", "J", "lower", "energy per call"),
        Metric("cold_start_s", "s", "lower", "first call, compilation and all"),
    )
}  # fmt: skip
"""Every figure of a frame, by its column. `flops = 2 × macs` is defined here and nowhere else."""

_INTEGERS = ("rounds", "samples", "macs", "flops", "params", "bytes_moved", "peak_memory_bytes")
_LAST = ("trust", "trust_reasons", "uncounted")
_NOT_CASE = frozenset((*RUN_COLUMNS, "point", *POINT_COLUMNS, "task", "rounds", "status", "reason", *METRICS, *_LAST))
_ACCURACY_KEYS = ("workload", "clip_length", "height", "width", "width_multiplier")


def case_columns(frame: pd.DataFrame) -> list[str]:
    """The columns that are keys of a case: those every frame has and those of this one alone."""
    return [name for name in frame.columns if name not in _NOT_CASE]


def frame(measurements: Sequence[Measurement], *, run_id: str, suite: str) -> pd.DataFrame:
    """One row per point in the order of their first measurement; rounds merged, and accuracy with latency.

    The status is the worst of the rounds, and only a point that is ok in all of them has latency, memory and energy.
    `latency_s` is the median of the rounds' medians. Its 95 % interval is, with two rounds or more, a t interval on the
    logs of those medians, since the process is the unit that varies; with one round the distribution-free interval
    of the samples' median, NA under six samples. An error that is not a number is inf. `top1_accuracy` of a row that
    is no evaluation is the mean over the evaluations of its workload at its clip length, frame size and
    `width_multiplier` (NA is 1); NA where they are of several tasks. `uncounted` names what the multiply-adds lack.
    """
    import pandas as pd

    keys, points, index = _distinct(measurements)
    columns: Columns = {
        "run_id": pd.array([run_id] * len(points), dtype="string"),
        "suite": pd.array([suite] * len(points), dtype="string"),
        "point": pd.array(keys, dtype="string"),
    }
    for name in POINT_COLUMNS:
        columns[name] = pd.array([getattr(point, name) for point in points], dtype="string")
    columns |= _merge_rounds(measurements, index, len(points))
    cases = _cases(points)
    head = (*RUN_COLUMNS, "point", *POINT_COLUMNS, "task", "rounds")
    sizes = {name: cases.pop(name, pd.array([pd.NA] * len(points), dtype="Int64")) for name in SIZE_COLUMNS}
    table = pd.DataFrame({**{name: columns.pop(name) for name in head}, **cases, **sizes, **columns})
    for metric in METRICS.values():
        if metric.derive is not None:
            table[metric.name] = metric.derive(*(table[name] for name in metric.of))
    table = _merge_accuracy(table)
    order = (*head, *cases, *SIZE_COLUMNS, "status", "reason", *METRICS, *_LAST)
    return table[list(order)].astype(dict.fromkeys(_INTEGERS, "Int64"))


def _distinct(measurements: Sequence[Measurement]) -> tuple[list[str], list[Point], list[int]]:
    """The distinct points with their keys, and for each measurement which of them it is of."""
    points: list[Point] = []
    number: dict[str, int] = {}
    seen: dict[int, int] = {}
    index: list[int] = []
    for measurement in measurements:
        point = measurement.point
        # A loaded run shares one Point among the rounds; its key is costly.
        if (which := seen.get(id(point))) is None:
            which = number.setdefault(point.key, len(points))
            if which == len(points):
                points.append(point)
            seen[id(point)] = which
        index.append(which)
    return list(number), points, index


def _cases(points: Sequence[Point]) -> Columns:

    names = sorted({name for point in points for name in point.case})
    columns: Columns = {}
    for name in names:
        values = [point.case.get(name) for point in points]
        columns[f"case_{name}" if name in _NOT_CASE else name] = _typed(values)
    return columns


def _typed(values: list[Value | None]) -> Any:
    """Values of one key in the nullable dtype that holds them all; as text where kinds are mixed."""
    import pandas as pd

    kinds = {type(value) for value in values} - {type(None)}
    known: list[Any] = list(values)
    if kinds <= {int}:
        return pd.array(known, dtype="Int64")
    if kinds <= {int, float}:
        return pd.array(known, dtype="Float64")
    if kinds <= {bool}:
        return pd.array(known, dtype="boolean")
    return pd.array([None if value is None else text_of(value) for value in values], dtype="string")


def _merge_rounds(measurements: Sequence[Measurement], index: Sequence[int], count: int) -> Columns:
    """Every column that comes of the measurements themselves."""
    import numpy as np
    import pandas as pd

    of = np.asarray(index, dtype=np.int64)
    severity = np.asarray([SEVERITY.index(m.status) for m in measurements], dtype=np.int64)
    worst = np.zeros(count, dtype=np.int64)
    np.maximum.at(worst, of, severity)
    ok = worst == 0

    def nullable(values: Numbers, where: np.ndarray[Any, np.dtype[np.bool_]] | None = None) -> Any:
        missing = np.isnan(values) if where is None else np.isnan(values) | ~where
        return pd.arrays.FloatingArray(np.where(missing, 0.0, values), missing)

    def merged(values: Iterable[float | None], how: str) -> Numbers:
        series = pd.Series(np.asarray([np.nan if v is None else v for v in values], dtype=np.float64))
        found: Numbers = series.groupby(of).agg(how).reindex(range(count)).to_numpy(np.float64)
        return found

    macs = merged((m.counts.macs if m.counts else None for m in measurements), "first")
    errors = (m.error.output if m.error else None for m in measurements)
    accuracies = [m.accuracy for m in measurements]
    latency, low, high, samples = _latency(measurements, of, count)
    columns: Columns = {
        "task": _first_text([a.task if a else None for a in accuracies], index, count),
        "rounds": pd.array(np.bincount(of, minlength=count), dtype="Int64"),
        "status": pd.array([SEVERITY[s] for s in worst], dtype="string"),
        "reason": _first_text(
            [m.reason or None if s == worst[i] else None for m, s, i in zip(measurements, severity, of, strict=True)],
            index,
            count,
        ),
        "latency_s": nullable(latency, ok),
        "latency_low_s": nullable(low, ok),
        "latency_high_s": nullable(high, ok),
        "samples": pd.array(samples, dtype="Int64"),
        "macs": nullable(macs),
        "params": nullable(merged((m.params for m in measurements), "first")),
        "bytes_moved": nullable(merged((m.bytes_moved for m in measurements), "first")),
        "peak_memory_bytes": nullable(
            merged((m.memory.peak_bytes if m.memory else None for m in measurements), "max"), ok
        ),
        "relative_error": nullable(merged((None if e is None else e if e == e else np.inf for e in errors), "max")),
        "top1_accuracy": nullable(merged((a.top1 if a else None for a in accuracies), "mean"), ok),
        "chance_accuracy": nullable(merged((a.chance if a else None for a in accuracies), "mean")),
        "energy_j": nullable(merged((m.energy_j for m in measurements), "median"), ok),
        "cold_start_s": nullable(merged((m.cold_start_s for m in measurements), "median"), ok),
        "uncounted": _first_text(
            ["; ".join(m.counts.uncounted) or None if m.counts else None for m in measurements], index, count
        ),
        "ceiling_flops_per_s": nullable(
            merged((m.ceilings.flops_per_s if m.ceilings else None for m in measurements), "median")
        ),
        "ceiling_bytes_per_s": nullable(
            merged((m.ceilings.bytes_per_s if m.ceilings else None for m in measurements), "median")
        ),
    }
    timed = ok & ~np.isnan(latency)
    return columns | _merge_trust(measurements, of, ok, timed)


def _first_text(values: Sequence[str | None], index: Sequence[int], count: int) -> Any:
    """The first text given for each point, in the order of its rounds."""
    import pandas as pd

    found: list[str | None] = [None] * count
    for which, value in zip(index, values, strict=True):
        if value is not None and found[which] is None:
            found[which] = value
    return pd.array(found, dtype="string")


def _merge_trust(measurements: Sequence[Measurement], of: Any, ok: Any, timed: Any) -> Columns:
    """The worst trust of the rounds with every reason; NA for a point that is not ok."""
    import numpy as np
    import pandas as pd

    count = len(ok)
    worst = np.zeros(count, dtype=np.int64)
    np.maximum.at(worst, of, np.asarray([TRUST.index(m.trust) for m in measurements], dtype=np.int64))
    single = timed & (np.bincount(of, minlength=count) == 1)
    worst = np.where(single, np.maximum(worst, TRUST.index("fair")), worst)
    reasons: list[dict[str, None]] = [{} for _ in range(count)]
    for which, measurement in zip(of, measurements, strict=True):
        if measurement.trust_reasons:
            reasons[which].update(dict.fromkeys(measurement.trust_reasons))
    for which in np.flatnonzero(single):
        reasons[which][ONE_ROUND] = None
    return {
        "trust": pd.array([TRUST[t] if good else None for t, good in zip(worst, ok, strict=True)], dtype="string"),
        "trust_reasons": pd.array(["; ".join(said) or None for said in reasons], dtype="string"),
    }


def _latency(measurements: Sequence[Measurement], of: Any, count: int) -> tuple[Numbers, Numbers, Numbers, Any]:
    """Median of round medians, its 95 % interval, and the number of samples, of each point; NaN where unknown."""
    import numpy as np
    import pandas as pd
    from scipy.special import stdtrit

    medians, lows, highs, sizes = _round_medians(measurements)
    timed = ~np.isnan(medians)
    with np.errstate(divide="ignore"):
        rounds = pd.DataFrame({"of": of, "median": medians, "log": np.log(medians), "low": lows, "high": highs})
    groups = rounds[timed].groupby("of")
    latency = groups["median"].median().reindex(range(count)).to_numpy(np.float64)
    number = groups.size().reindex(range(count), fill_value=0).to_numpy(np.int64)
    centre = groups["log"].mean().reindex(range(count)).to_numpy(np.float64)
    spread = groups["log"].std().reindex(range(count)).to_numpy(np.float64)
    several = number >= 2
    half = np.full(count, np.nan)
    half[several] = stdtrit(number[several] - 1, 0.975) * spread[several] / np.sqrt(number[several])
    one_low = groups["low"].first().reindex(range(count)).to_numpy(np.float64)
    one_high = groups["high"].first().reindex(range(count)).to_numpy(np.float64)
    # The interval is of the geometric mean; it is widened where the median of the rounds lies outside.
    low = np.where(several, np.minimum(np.exp(centre - half), latency), one_low)
    high = np.where(several, np.maximum(np.exp(centre + half), latency), one_high)
    return latency, low, high, np.bincount(of, weights=sizes, minlength=count).astype(np.int64)


def _round_medians(measurements: Sequence[Measurement]) -> tuple[Numbers, Numbers, Numbers, Any]:
    """Of each measurement: the median of its samples, its order-statistic 95 % interval, and how many there are."""
    import numpy as np

    sizes = np.asarray([len(m.samples_s) for m in measurements], dtype=np.int64)
    medians = np.full(len(sizes), np.nan)
    lows = medians.copy()
    highs = medians.copy()
    for size in np.unique(sizes[sizes > 0]):
        which = np.flatnonzero(sizes == size)
        joined = b"".join(_bytes(measurements[i].samples_s) for i in which.tolist())
        samples = np.frombuffer(joined).reshape(len(which), size)
        ordered = np.sort(samples, axis=1)
        medians[which] = ordered[:, (size - 1) // 2] / 2 + ordered[:, size // 2] / 2  # the sum may leave the floats
        if rank := median_rank(int(size)):
            lows[which] = ordered[:, rank - 1]
            highs[which] = ordered[:, size - rank]
    return medians, lows, highs, sizes


def _bytes(samples: Sequence[float]) -> bytes:
    compact = isinstance(samples, array) and samples.typecode == "d"
    return samples.tobytes() if compact else array("d", samples).tobytes()  # type: ignore[attr-defined]


def median_rank(size: int) -> int:
    """The k for which the k-th smallest and k-th largest of `size` samples hold the median in 95 % of cases at least.

    0 where there is none, under six samples. Source: Conover, Practical Nonparametric Statistics (1999), §3.2.
    """
    import numpy as np
    from scipy.special import bdtr

    return int(np.searchsorted(bdtr(np.arange(size // 2 + 1), size, 0.5), 0.025))


def _merge_accuracy(table: pd.DataFrame) -> pd.DataFrame:
    """Puts the mean accuracy of a workload's evaluations on its other rows."""
    import numpy as np

    names = [name for name in _ACCURACY_KEYS if name in table.columns]
    keys = table[names]
    if "width_multiplier" in names:
        keys = keys.assign(width_multiplier=keys["width_multiplier"].astype("Float64").fillna(1.0))
    evaluated = (table["mode"] == "evaluate").to_numpy(bool)
    known = table["top1_accuracy"].notna().to_numpy(bool) & evaluated
    if not known.any() or evaluated.all():
        return table
    number = keys.groupby(names, dropna=False, sort=False).ngroup().to_numpy(np.int64)
    found = table.loc[known, ["task", "top1_accuracy", "chance_accuracy"]].groupby(number[known])
    single = found["task"].nunique(dropna=False) == 1
    merged = found.agg({"task": "first", "top1_accuracy": "mean", "chance_accuracy": "mean"})[single]
    spread = merged.reindex(number[~evaluated])
    table = table.copy()
    for name in merged.columns:
        table.loc[~evaluated, name] = spread[name].array
    return table


def scaling_exponents(frame: pd.DataFrame, over: str = "clip_length") -> pd.DataFrame:
    """How latency grows: the least-squares slope of log latency against log `over`, per series.

    A series has everything but `over` fixed (of height and width neither, when one of them is `over`).

    Returns:
        One row per series: what is fixed, `points`, `exponent`, `standard_error` and the ends of the 95 % interval,
        `exponent_low` and `exponent_high`; the last four are NA under three points.
    """
    import numpy as np
    import pandas as pd
    from scipy.special import stdtrit

    varied = {"height", "width"} if over in ("height", "width") else {over}
    fixed = [name for name in (*RUN_COLUMNS, *POINT_COLUMNS, *case_columns(frame)) if name not in varied]
    fixed = [name for name in fixed if name in frame.columns]
    columns = ("points", "exponent", "standard_error", "exponent_low", "exponent_high")
    rows = frame[frame["latency_s"].notna() & frame[over].notna()] if over in frame.columns else frame.iloc[:0]
    if rows.empty:
        return frame.iloc[:0][fixed].assign(**{name: pd.array([], dtype="Float64") for name in columns})
    series = rows.groupby(fixed, dropna=False, sort=False).ngroup().to_numpy(np.int64)
    x = np.log(rows[over].to_numpy(np.float64))
    y = np.log(rows["latency_s"].to_numpy(np.float64))
    number = np.bincount(series)
    x = x - (np.bincount(series, x) / number)[series]
    y = y - (np.bincount(series, y) / number)[series]
    sxx = np.bincount(series, x * x)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.bincount(series, x * y) / sxx
        residual = np.bincount(series, (y - slope[series] * x) ** 2)
        error = np.sqrt(residual / (number - 2) / sxx)
        half = stdtrit(number - 2, 0.975) * error
    fitted = (number >= 3) & (sxx > 0)
    first = np.unique(series, return_index=True)[1]
    found = rows.iloc[first][fixed].reset_index(drop=True)
    values = (number, slope, error, slope - half, slope + half)
    for name, value in zip(columns, values, strict=True):
        whole = name == "points"
        found[name] = pd.Series(
            value if whole else np.where(fitted, value, np.nan), dtype="Int64" if whole else "Float64"
        )
    return found


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """The mean of the outcomes of seeds, with Student's 95 % interval; NaN ends for a single one.

    Source: Student (1908), Biometrika 6(1), on the mean of a small sample.
    """
    from scipy.special import stdtrit

    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    half = float(stdtrit(count - 1, 0.975)) * spread
    return Interval(mean, mean - half, mean + half)
