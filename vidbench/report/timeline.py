"""A history as a picture: the series that changed most over the commits, with their change points."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vidbench.report import style
from vidbench.sweep import RequestError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vidbench.changes import Change, Changes, Series

MOST_PANELS = 12
MOST_RUNS = 400
"""In one panel; more cannot be told apart."""

LEGEND = 2.5
"""Inches at the right."""

RUN = "#0072B2"
MARKS: dict[str, tuple[str, Literal["--", "-.", ":"], str]] = {
    "SLOWER": ("#D55E00", "--", "became slower"),
    "FASTER": ("#009E73", "-.", "became faster"),
    "": ("#CC79A7", ":", "other work or memory, or stopped"),
}
"""How a change is drawn: colour, dash and words; the last one for all others."""


def write(changes: Changes, titles: Mapping[tuple[str, ...], str], out: Path) -> None:
    """Writes history.csv, and where anything was timed history.svg and history.png, into `out`.

    Args:
        changes: What changed.
        titles: Of each series, by its key.
        out: The folder; it is made.

    Raises:
        RequestError: `out` cannot be written.
    """
    import pyarrow
    import pyarrow.csv

    figure = draw(changes, titles)
    try:
        out.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pandas(changes.history.frame, preserve_index=False)
        pyarrow.csv.write_csv(table, out / "history.csv", pyarrow.csv.WriteOptions(quoting_style="needed"))
        if figure is not None:
            (out / "history.svg").write_text(style.svg(figure), encoding="utf-8")
            with style.styled():
                figure.savefig(out / "history.png", dpi=150)
    except OSError as problem:
        raise RequestError(f"cannot write the history to {out}: {problem.strerror}") from None


def draw(changes: Changes, titles: Mapping[tuple[str, ...], str]) -> Figure | None:
    """Latency over the commits, a panel for each of the series that changed most; None where nothing was timed.

    Where nothing changed, the series with the most runs are drawn.
    """
    from matplotlib.lines import Line2D

    frame = changes.history.frame
    chosen, left_out = _chosen(changes)
    if not chosen:
        return None
    with style.styled():
        figure, axes = style.panels(len(chosen), width=4.4, height=2.75, right=0.4, margin=LEGEND)
        drawn: dict[str, Any] = {}
        thinned = False
        for ax, one in zip(axes, chosen, strict=True):
            mine = sorted((change for change in changes.found if change.series == one), key=lambda change: change.row)
            thinned |= len(one.rows) > MOST_RUNS
            drawn |= _panel(ax, frame, one, mine)
            ax.set_title("\n".join(textwrap.wrap(titles[one.key], 52, max_lines=2, placeholder=" …")))
        keys = [
            Line2D([], [], marker="o", linestyle="", color=RUN, markersize=3, label="a run, with its 95 % interval")
        ]
        keys += [Line2D([], [], color=style.INK, linewidth=1.4, label="level")]
        keys += [drawn[kind] for kind in MARKS if kind in drawn]
        keys += [drawn["failed"]] if "failed" in drawn else []
        beside = 1 - LEGEND / figure.get_size_inches()[0]
        figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(beside, 1.0), borderaxespad=0.6)
        style.note(figure, left_out, f"Of long histories {MOST_RUNS} runs are drawn" if thinned else "")
    return figure


def _chosen(changes: Changes) -> tuple[list[Series], str]:
    """The series to draw, and how many are left out."""
    frame = changes.history.frame
    timed = [one for one in changes.series if frame["latency_s"].iloc[one.rows].notna().any()]
    most: dict[tuple[str, ...], tuple[float, float]] = {}
    for change in changes.found:
        of_time = abs(change.size) if change.metric == "latency_s" else 0.0
        known = most.get(change.series.key, (0.0, 0.0))
        most[change.series.key] = (max(known[0], of_time), 1.0)
    changed = sorted((one for one in timed if one.key in most), key=lambda one: most[one.key], reverse=True)
    ranked = changed or sorted(timed, key=lambda one: -len(one.rows))
    left_out = len(ranked) - MOST_PANELS
    words = f"{left_out:,} more that changed are left out" if changed else f"{left_out:,} more are left out"
    return ranked[:MOST_PANELS], words if left_out > 0 else ""


def _panel(ax: Axes, frame: pd.DataFrame, one: Series, mine: Sequence[Change]) -> dict[str, Any]:
    """Draws one series; returns an entry of the legend for every kind of mark in it."""
    import numpy as np
    from matplotlib.lines import Line2D

    rows = frame.iloc[one.rows]
    xs = _side_by_side(rows["place"].to_numpy())
    low, middle, high = (
        1e3 * rows[name].to_numpy(np.float64, na_value=np.nan)
        for name in ("latency_low_s", "latency_s", "latency_high_s")
    )
    kept = slice(None, None, math.ceil(len(rows) / MOST_RUNS))
    ax.vlines(xs[kept], low[kept], high[kept], color=RUN, linewidth=0.7, alpha=0.4)
    ax.plot(xs[kept], middle[kept], linestyle="", marker="o", markersize=2.6, markeredgewidth=0, color=RUN, alpha=0.8)
    drawn: dict[str, Any] = {}
    if (failed := rows["status"].to_numpy(str) != "ok").any():
        look: dict[str, Any] = {"linestyle": "", "marker": "x", "markersize": 4, "color": style.INK}
        ax.plot(xs[failed], [0.03] * int(failed.sum()), transform=ax.get_xaxis_transform(), **look)
        drawn["failed"] = Line2D([], [], label="did not run", **look)
    at = {int(row): index for index, row in enumerate(one.rows)}
    times = [change for change in mine if change.metric == "latency_s"]
    edges = [xs[0] - 0.4, *(_between(xs, at[change.row]) for change in times), xs[-1] + 0.4]
    levels = [float(change.before) for change in times] + [float(times[-1].after)] if times else []
    for level, start, end in zip(levels, edges, edges[1:], strict=False):
        ax.plot([start, end], [1e3 * level] * 2, color=style.INK, linewidth=1.4, solid_capstyle="butt")
    for change in mine:
        kind = change.kind if change.metric == "latency_s" else ""
        colour, dash, words = MARKS[kind]
        x = _between(xs, at[change.row])
        ax.axvline(x, color=colour, linestyle=dash, linewidth=1.1)
        drawn[kind] = Line2D([], [], color=colour, linestyle=dash, linewidth=1.1, label=words)
        if kind:
            ax.annotate(
                f"{math.expm1(change.size):+.1%}", (x, 1.0), xycoords=("data", "axes fraction"), xytext=(2, -1),
                textcoords="offset points", va="top", fontsize=7.5, color=colour,
            )  # fmt: skip
    known = middle[~np.isnan(middle)].tolist()
    style.scale_axis(ax, "y", known)
    style.leave_room(ax, 0.12, log=style.spans(known))
    ax.set_ylabel("latency per call (ms)")
    _commits(ax, rows, xs)
    return drawn


def _side_by_side(places: Any) -> Any:
    """Where each run is drawn: the runs of one commit around its place."""
    import numpy as np

    _, first, count = np.unique(places, return_index=True, return_counts=True)
    within = np.arange(len(places)) - np.repeat(first, count)
    of = np.repeat(count, count)
    return places + 0.7 * ((within + 0.5) / of - 0.5)


def _between(xs: Any, index: int) -> float:
    return float(xs[index - 1] + xs[index]) / 2


def _commits(ax: Axes, rows: pd.DataFrame, xs: Any) -> None:
    """Some commits and their days as ticks."""
    import numpy as np

    places = np.unique(rows["place"].to_numpy())
    first = rows.drop_duplicates("place").set_index("place")
    shown = places[np.unique(np.linspace(0, len(places) - 1, 4).round().astype(int))]
    names = [
        f"{'no commit' if style.missing(first.at[place, 'git_commit']) else str(first.at[place, 'git_commit'])[:7]}\n"
        f"{str(first.at[place, 'created_utc'])[:10]}"
        for place in shown
    ]
    ax.set_xticks(shown, names)
    ax.set_xlim(xs[0] - 0.6, xs[-1] + 0.6)
    ax.grid(visible=False, axis="x")
    ax.set_xlabel("commit, and day of its first run, in order")
