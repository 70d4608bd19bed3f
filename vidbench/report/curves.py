"""Figures of something over clip length or batch size: latency, throughput, memory, and families side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vidbench.metrics import METRICS, POINT_COLUMNS, case_columns, scaling_exponents
from vidbench.report import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCALE = {"latency_s": (1e3, "ms"), "throughput_clips_per_s": (1.0, "clips/s"), "peak_memory_bytes": (2.0**-20, "MiB")}
"""Factor and unit of a metric on an axis."""
AXIS = {"clip_length": "clip length (frames)", "batch_size": "batch size (clips)"}
SYMBOL = {"clip_length": "T", "batch_size": "N"}

Families = Mapping[str, tuple[str, ...]]

RECURRENT: tuple[Families, ...] = (
    {"TCN": ("tcn",), "LSTM": ("lstm",), "RNN": ("rnn",), "TCN block": ("tcn_block",)},
    {"TCN": ("cnn_tcn",), "LSTM": ("cnn_lstm",), "RNN": ("cnn_rnn",)},
)
VOLUMETRIC: tuple[Families, ...] = (
    {"3D": ("conv3d",), "(2+1)D": ("conv2plus1d",)},
    {"3D": ("r3d_18",), "(2+1)D": ("r2plus1d_18",), "C3D": ("c3d",)},
)
"""Families that do the same job on the same input, first the kernels, then whole models."""


def usable(frame: pd.DataFrame, *needed: str) -> pd.DataFrame:
    """The rows that ran and have every one of these figures."""
    if any(name not in frame.columns for name in needed):
        return frame.iloc[:0]
    rows = frame[(frame["status"] == "ok") & (frame["mode"] != "evaluate")]
    return rows.dropna(subset=list(needed))


def over(
    frame: pd.DataFrame, x: str, metric: str, colours: Mapping[str, str] | None = None, *, exponents: bool = False
) -> Figure | None:
    """One line per implementation (and run), a panel per workload and case; None without two values of `x`."""
    rows = usable(frame, x, metric)
    by = [*POINT_COLUMNS, *case_columns(frame)]
    by = [name for name in by if name not in ("implementation", "kind", "seed", x)]
    if x in ("height", "width"):
        by = [name for name in by if name not in ("height", "width")]
    if rows.empty:
        return None
    varied = rows.groupby(by, dropna=False, sort=False)[x].transform("nunique")
    rows = rows[varied >= 2]
    if rows.empty:
        return None
    parts, left_out = style.facets(rows, by)
    colours = style.colours_of(frame, colours)
    runs = {run: style.DASHES[i % 4] for i, run in enumerate(rows["run_id"].unique())}
    factor, unit = SCALE[metric]
    with style.styled():
        figure, axes = style.panels(len(parts))
        for ax, (title, part) in zip(axes, parts, strict=True):
            entries = 0
            number = part[["implementation", "run_id"]].drop_duplicates().shape[0]
            for (implementation, run), line in part.groupby(["implementation", "run_id"], sort=True):
                label = str(implementation)
                if exponents:
                    label += _exponent(line, x)
                if len(runs) > 1:
                    label += f"  ({run})"
                draw_line(ax, line, x, metric, factor, colours[str(implementation)], runs[run], label, number - entries)
                entries += 1
            finish(ax, part, x, title, entries)
        for ax in axes:
            ax.set_xlabel(AXIS[x])
            ax.set_ylabel(f"{METRICS[metric].label} ({unit})")
        style.note(figure, "Bars: 95 % intervals" if metric != "peak_memory_bytes" else "", dim_note(rows), left_out)
    return figure


def dim_note(rows: pd.DataFrame) -> str:
    """Explains hollow marks where there are any."""
    return "Hollow: trust is poor" if (rows["trust"] == "poor").any() else ""


def _exponent(line: pd.DataFrame, x: str) -> str:
    """The fitted exponent of one series as a legend shows it; empty where it cannot be fitted."""
    fits = scaling_exponents(line, x).dropna(subset=["exponent"])
    if len(fits) != 1:
        return ""
    exponent, high = float(fits["exponent"].iloc[0]), float(fits["exponent_high"].iloc[0])
    half = high - exponent
    superscript = f"{exponent:.2f}".translate(str.maketrans("0123456789.-", "⁰¹²³⁴⁵⁶⁷⁸⁹·⁻"))
    return f"  ∝ {SYMBOL[x]}{superscript}" + (f" ± {half:.2f}" if half < 9.995 else "")


def draw_line(
    ax: Axes, line: pd.DataFrame, x: str, metric: str, factor: float, colour: str, dash: str, label: str, layer: int = 1
) -> None:
    """A line with its intervals; points of poor trust hollow and faint. A lower layer is wider."""
    line = line.sort_values(x)
    xs = line[x].to_numpy(float)
    ys = line[metric].to_numpy(float) * factor
    ax.plot(
        xs,
        ys,
        dash,
        color=colour,
        linewidth=1.5 + 0.8 * (layer - 1),
        alpha=1.0 if layer == 1 else 0.75,
        label=label,
        zorder=2,
    )
    poor = (line["trust"] == "poor").fillna(False).to_numpy(bool)
    ax.plot(xs[~poor], ys[~poor], "o", color=colour, markersize=4, zorder=3)
    ax.plot(xs[poor], ys[poor], "o", color=colour, markersize=4.5, markerfacecolor="none", alpha=0.5, zorder=3)
    if metric == "peak_memory_bytes":
        return
    lows, highs = line["latency_low_s"], line["latency_high_s"]
    if metric == "throughput_clips_per_s":
        lows, highs = line["batch_size"] / highs, line["batch_size"] / lows
    ax.vlines(
        xs, lows.to_numpy(float, na_value=float("nan")) * factor, highs.to_numpy(float, na_value=float("nan")) * factor,
        color=colour, linewidth=1.0, alpha=0.6, zorder=1,
    )  # fmt: skip


def finish(ax: Axes, part: pd.DataFrame, x: str, title: str, entries: int) -> None:
    """Scales, ticks, title and a legend above the data."""
    import numpy as np

    xs = sorted({float(value) for value in part[x]})
    ys = [y for drawn in ax.lines for y in np.asarray(drawn.get_ydata(), dtype=float).tolist()]
    # On axes that are both linear or both log a power law is straight or nearly so; on mixed ones it bends.
    log = (style.spans(xs) or style.spans(ys)) and min(ys) > 0
    style.scale_axis(ax, "x", xs, ticks=xs, log=log)
    style.scale_axis(ax, "y", ys, log=log)
    if not log:
        ax.set_ylim(bottom=0)
    else:
        # Intervals of two rounds are so wide that they would squeeze the lines together.
        ax.set_ylim(min(ys) / 1.5, max(ys) * 1.5)
    ax.set_title(_wrapped(title))
    style.leave_room(ax, min(0.5, 0.03 + 0.068 * entries), log=log)
    ax.legend(loc="upper left", handlelength=1.6, borderaxespad=0.2, labelspacing=0.25)


def _wrapped(title: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(title, 50)[:2])


def families(frame: pd.DataFrame, jobs: tuple[Families, ...]) -> Figure | None:
    """Latency over clip length of whole families, each by its fastest implementation at every point.

    Panels hold what has two families or more; where a family has several cases in one panel, their median is drawn.
    """
    parts: list[tuple[str, pd.DataFrame]] = []
    left_out = ""
    for members, job in zip(jobs, ("kernels", "models"), strict=True):
        panels, note = _family_panels(frame, members)
        parts += [(" · ".join(filter(None, (job, title))), part) for title, part in panels]
        left_out = left_out or note
    if not parts:
        return None
    if len(parts) > style.MAX_FACETS:
        left_out = f"{len(parts) - style.MAX_FACETS:,} of {len(parts):,} panels are left out"
        parts = parts[: style.MAX_FACETS]
    names = list(dict.fromkeys(name for members in jobs for name in members))
    colours = dict(zip(names, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False))
    with style.styled():
        figure, axes = style.panels(len(parts))
        merged = False
        for ax, (title, part) in zip(axes, parts, strict=True):
            for name, group in part.groupby("family", sort=True):
                line = _median_line(group)
                merged |= len(line) < len(group)
                who = ", ".join(sorted({f"{r.workload} {r.implementation}" for r in group.itertuples()})[:2])
                draw_line(ax, line, "clip_length", "latency_s", 1e3, colours[str(name)], "-", f"{name}: {who}")
            finish(ax, part, "clip_length", title, part["family"].nunique())
            ax.set_xlabel(AXIS["clip_length"])
            ax.set_ylabel("latency per call (ms)")
        style.note(
            figure,
            "Each family by its fastest implementation at every clip length",
            "The median where a family has several cases" if merged else "",
            left_out,
        )
    return figure


def _family_panels(frame: pd.DataFrame, members: Families) -> tuple[list[tuple[str, pd.DataFrame]], str]:
    """The fastest rows of each family by panel, with the panel's title; the text says what was left out."""
    family = {workload: name for name, workloads in members.items() for workload in workloads}
    rows = usable(frame, "clip_length", "latency_s")
    rows = rows[rows["workload"].isin(list(family))]
    if rows.empty:
        return [], ""
    rows = rows.assign(family=rows["workload"].map(family))
    if {"hidden_size", "out_channels"} <= set(rows.columns):
        # The width of a TCN block is its channels; families are compared at equal width.
        width = rows["hidden_size"].where(rows["hidden_size"].notna(), rows["out_channels"])
        rows = rows.assign(hidden_size=width.where(rows["workload"].isin(["tcn_block"]), rows["hidden_size"]))
    own = [name for name in (*POINT_COLUMNS, *case_columns(frame)) if name not in ("implementation", "clip_length")]
    fastest = rows.loc[rows.groupby(["run_id", *own, "clip_length"], dropna=False)["latency_s"].idxmin()]
    shared = [
        name
        for name in (*own, "run_id")
        if name not in ("workload", "kind", "seed")
        and fastest.groupby("family")[name].apply(lambda v: v.notna().any()).all()
    ]
    groups = fastest.groupby(shared, dropna=False, sort=False)
    fastest = fastest[(groups["family"].transform("nunique") >= 2) & (groups["clip_length"].transform("nunique") >= 2)]
    return style.facets(fastest, shared) if not fastest.empty else ([], "")


def _median_line(group: pd.DataFrame) -> pd.DataFrame:
    numbers: dict[str, Any] = dict.fromkeys(("latency_s", "latency_low_s", "latency_high_s"), "median")
    line = group.groupby("clip_length", as_index=False).agg({**numbers, "trust": "first"})
    return line.assign(batch_size=1)
