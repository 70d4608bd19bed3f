"""What the figures share: palettes, facets, axes with readable ticks, and SVG that follows the page's colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2328"
MUTED = "#656d76"
GRID = "#e4e7eb"
PAPER = "#fefefe"
"""White, but not the white of a mark or a label, which stays white on a dark page."""
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"}
"""Colours of a figure that the page replaces by its own, so that they turn with dark mode."""

# Okabe & Ito (2008): told apart with any of the common colour-vision deficiencies, on white and on near-black.
KNOWN = {
    "reference": "#8c8c8c",
    "library": "#0072B2",
    "eager": "#0072B2",
    "compiled": "#E69F00",
    "accelerated": "#009E73",
    "pyav": "#0072B2",
    "torch": "#E69F00",
    "opencv_dis": "#009E73",
}
OTHERS = ("#D55E00", "#CC79A7", "#56B4E9", "#009E73", "#B8A800", "#7A5195", "#8B5E3C", "#E69F00", "#0072B2")
CYCLE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B8A800", "#7A5195", "#8B5E3C", "#8c8c8c")
"""For anything else than implementations: ten that are told apart, then over again."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
DASHES = ("-", "--", ":", "-.")

MAX_FACETS = 9
MAX_MARKS = 3000
"""Marks in one scatter plot; more make a page slow and show nothing more."""


def palette(names: Iterable[object]) -> dict[str, str]:
    """A colour for each implementation (or workload): fixed for those everyone has, in order for the others."""
    known = sorted({str(name) for name in names})
    others = [name for name in known if name not in KNOWN]
    return {name: KNOWN.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in known}


def wide_palette(names: Sequence[str]) -> dict[str, Any]:
    """Colours for many workloads: colour-blind-safe up to ten, evenly spread hues beyond."""
    import seaborn

    if len(names) <= len(OTHERS) - 1:
        chosen: Sequence[Any] = ("#0072B2", "#E69F00", "#009E73", *OTHERS[:3], *OTHERS[4:7])
    else:
        chosen = seaborn.color_palette("husl", len(names), desat=0.8).as_hex()
    return dict(zip(names, chosen, strict=False))


@contextmanager
def styled() -> Iterator[None]:
    """The look of every figure, for as long as the block; nothing global is left behind."""
    import matplotlib
    import seaborn

    extra: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "figure.facecolor": PAPER,
        "axes.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "vidbench",
    }
    with matplotlib.rc_context(), seaborn.axes_style("whitegrid", extra), matplotlib.rc_context(extra):
        yield


def panels(
    count: int,
    *,
    width: float = 4.1,
    height: float = 3.1,
    columns: int = 3,
    left: float = 0.75,
    right: float = 0.12,
    margin: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes in rows of up to `columns`; sizes are inches.

    The layout is fixed, as fitting it to the text takes most of the time that a figure costs.

    Args:
        width: Of a panel with its labels; `left` and `right` of it are for tick labels and a legend.
        margin: Kept free at the right of the whole figure.
    """
    from matplotlib.figure import Figure

    across = min(columns, count)
    rows = math.ceil(count / across)
    foot = 0.28
    whole = (max(width * across, 5.2) + margin, height * rows + foot)
    figure = Figure(figsize=whole)
    axes = []
    for index in range(count):
        row, column = divmod(index, across)
        bottom = foot + height * (rows - 1 - row) + 0.55
        inches = (column * width + left, bottom, width - left - right, height - 0.55 - 0.42)
        axes.append(
            figure.add_axes((inches[0] / whole[0], inches[1] / whole[1], inches[2] / whole[0], inches[3] / whole[1]))
        )
    return figure, axes


def facets(frame: pd.DataFrame, by: Sequence[str]) -> tuple[list[tuple[str, pd.DataFrame]], str]:
    """The parts of a frame that agree in all of `by`, each with a title of what tells it from its like.

    Of more than MAX_FACETS parts those with the most rows are taken, and from every workload one before any gets a
    second; the text says how many are left out.
    """
    import numpy as np

    by = [name for name in by if name in frame.columns]
    number = frame.groupby(by, dropna=False, sort=False).ngroup().to_numpy(np.int64)
    sizes = np.bincount(number)
    firsts = frame.iloc[np.unique(number, return_index=True)[1]]
    workloads = firsts["workload"].astype(str).tolist()
    chosen, left_out = list(range(len(sizes))), ""
    if len(sizes) > MAX_FACETS:
        turn: dict[str, int] = {}
        ranked = []
        for index in np.argsort(-sizes, kind="stable").tolist():
            turn[workloads[index]] = turn.get(workloads[index], 0) + 1
            ranked.append((turn[workloads[index]], index))
        chosen = sorted(index for _, index in sorted(ranked, key=lambda rank: rank[0])[:MAX_FACETS])
        left_out = f"{len(sizes) - MAX_FACETS:,} of {len(sizes):,} panels are left out"
    heads = [name for name in ("workload", "kind") if name in by and (name == "workload" or frame[name].nunique() > 1)]
    parts = []
    for index in chosen:
        first = firsts.iloc[index]
        siblings = firsts
        for name in ("workload", "kind"):
            siblings = siblings[siblings[name] == first[name]] if name in by else siblings
        varied = [n for n in by if n not in ("workload", "kind") and siblings[n].nunique(dropna=False) > 1]
        told = [short(name, first[name]) for name in varied if not missing(first[name])]
        head = [KINDS.get(str(first[name]), str(first[name])) for name in heads]
        parts.append((" · ".join(head + told), frame[number == index]))
    return parts, left_out


def missing(value: object) -> bool:
    """Whether a cell is NA, None or NaN."""
    import pandas as pd

    return value is pd.NA or value is None or value != value


KINDS = {"op": "kernels", "model": "models", "stage": "pipeline stages", "task": "tasks"}

SHORT = {
    "batch_size": "batch {}",
    "clip_length": "{} frames",
    "height": "{} high",
    "width": "{} wide",
    "width_multiplier": "width ×{:g}",
    "hidden_size": "hidden {}",
    "in_channels": "{} in",
    "out_channels": "{} out",
    "kernel_size": "kernel {}",
    "dilation": "dilation {}",
    "stride": "stride {}",
}


def short(name: str, value: object) -> str:
    """A case's key and value for a title: batch 4, kernel 3x3x3."""
    if name in SHORT:
        return SHORT[name].format(value)
    return f"{name}={value}" if not isinstance(value, str) or name in ("padding", "bias") else value


def thinned(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """At most MAX_MARKS rows, evenly spaced, and a line that says so."""
    if len(frame) <= MAX_MARKS:
        return frame, ""
    step = math.ceil(len(frame) / MAX_MARKS)
    return frame.iloc[::step], f"every {step}th of {len(frame):,} points is drawn"


def note(figure: Figure, *texts: str) -> None:
    """Puts remarks under a figure."""
    if said := ". ".join(text for text in texts if text):
        width, height = figure.get_size_inches()
        figure.text(0.12 / width, 0.1 / height, f"{said}.", fontsize=8, color=MUTED, ha="left", va="bottom")


def spans(values: Sequence[float]) -> bool:
    """Whether values span so much that only a log axis shows them all: a factor of eight."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= 8


def scale_axis(
    ax: Axes, which: str, values: Sequence[float], *, ticks: Sequence[float] | None = None, log: bool | None = None
) -> None:
    """Plain numbers as tick labels; log where the values span a factor of eight or more, unless `log` says."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = ax.xaxis if which == "x" else ax.yaxis
    positive = [value for value in values if value > 0]
    if log is None:
        log = spans(values)
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}")
    if log:
        (ax.set_xscale if which == "x" else ax.set_yscale)("log", base=10)
        decades = math.log10(max(positive) / min(positive))
        subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0, 3.0) if decades < 3.2 else (1.0,)
        axis.set_major_locator(LogLocator(10, subs=subs, numticks=12))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(FixedLocator([]))
    else:
        axis.set_major_locator(MaxNLocator(6))
    if ticks is not None and (log or len(ticks) <= 6):
        step = math.ceil(len(ticks) / 8)
        axis.set_major_locator(FixedLocator(list(ticks)[::-1][::step]))
    axis.set_major_formatter(plain)


def leave_room(ax: Axes, fraction: float, *, log: bool) -> None:
    """Extends the y axis upwards until the data leaves its top `fraction` free, for a legend."""
    low, high = ax.get_ylim()
    if log:
        ax.set_ylim(low, low * (high / low) ** (1 / (1 - fraction)))
    else:
        ax.set_ylim(low, low + (high - low) / (1 - fraction))


def svg(figure: Figure) -> str:
    """A figure as one SVG element without date, creator or outside references."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def inline(text: str, name: str) -> str:
    """An SVG to stand in the page: its own identifiers, transparent, ink and grid in the page's colours."""
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    points = re.search(r'<svg[^>]*? width="([0-9.]+)pt"', text)
    # Of its natural size or narrower: the letters of all figures are equally large.
    size = f' style="width: {float(points[1]) * 4 / 3:.0f}px"' if points else ""
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf"\1{size}", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace(f"fill: {PAPER}", "fill: none")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def colours_of(frame: pd.DataFrame, given: Mapping[str, str] | None) -> Mapping[str, str]:
    """The given palette, or one for this frame alone."""
    return given if given is not None else palette(frame["implementation"].unique())
