"""Every figure of a report, each a function of a frame, and FIGURES, which names them and what each needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vidbench.metrics import POINT_COLUMNS, case_columns
from vidbench.records import Environment
from vidbench.report import style
from vidbench.report.curves import RECURRENT, VOLUMETRIC, dim_note, families, over, usable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vidbench.metrics import Numbers

BASELINES = ("library", "eager")
"""What a speed-up is over: the best that a user has without us."""

Roof = tuple[float, float, Literal["-", ":"], str]
Environments = Mapping[str, Environment]
Colours = Mapping[str, str] | None


def latency_over_clip_length(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """Latency over clip length with intervals and fitted exponents."""
    return over(frame, "clip_length", "latency_s", colours, exponents=True)


def latency_over_batch_size(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """Latency over batch size with intervals and fitted exponents."""
    return over(frame, "batch_size", "latency_s", colours, exponents=True)


def throughput_over_clip_length(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """Clips per second over clip length."""
    return over(frame, "clip_length", "throughput_clips_per_s", colours)


def throughput_over_batch_size(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """Clips per second over batch size."""
    return over(frame, "batch_size", "throughput_clips_per_s", colours)


def memory_over_clip_length(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """Peak memory over clip length."""
    return over(frame, "clip_length", "peak_memory_bytes", colours)


def tcn_lstm_rnn(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """TCN against LSTM against RNN over clip length; `colours` is not used, the colours are the families'."""
    return families(frame, RECURRENT)


def factorised_3d(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """Full 3D against factorised (2+1)D convolution over clip length; `colours` is not used."""
    return families(frame, VOLUMETRIC)


def flops_latency(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """FLOPs against latency, a colour per workload and a mark per implementation; a panel per kind and device."""
    rows = usable(frame, "flops", "latency_s")
    rows = rows[rows["flops"] > 0]
    if rows["flops"].nunique() < 2:
        return None
    rows, thin = style.thinned(rows)
    parts, left_out = style.facets(rows, ("kind", "run_id", "mode", "regime", "device", "dtype"))
    with style.styled():
        figure, axes = style.panels(len(parts), width=6.1, height=3.7, columns=2, right=1.75)
        for ax, (_, part) in zip(axes, parts, strict=True):
            _workload_scatter(ax, part, part["flops"].to_numpy(float) / 1e9, part["latency_s"].to_numpy(float) * 1e3)
            ax.set_xlabel("work (GFLOP per call)")
            ax.set_ylabel("latency per call (ms)")
            ax.set_title(_context(part))
        style.note(figure, "Points on one rising diagonal use the machine equally well", dim_note(rows), thin, left_out)
    return figure


def _context(part: pd.DataFrame) -> str:
    """The machine side of a panel: kinds, mode, device and arithmetic."""
    first = part.iloc[0]
    return f"{style.KINDS[str(first['kind'])]}, {first['mode']}, {first['regime']}, {first['device']}, {first['dtype']}"


def _workload_scatter(ax: Axes, part: pd.DataFrame, xs: Numbers, ys: Numbers) -> None:
    """Marks coloured by workload and shaped by implementation, with both in a legend beside the axes."""
    from matplotlib.lines import Line2D

    workloads = list(dict.fromkeys(part["workload"].astype(str)))
    implementations = sorted(set(part["implementation"].astype(str)))
    colour = style.wide_palette(workloads)
    mark = {name: style.MARKERS[i % len(style.MARKERS)] for i, name in enumerate(implementations)}
    drawn = part.assign(x=list(xs), y=list(ys), poor=(part["trust"] == "poor").fillna(False))
    for (workload, implementation, poor), group in drawn.groupby(["workload", "implementation", "poor"]):
        hue = colour[str(workload)]
        ax.scatter(
            group["x"].to_numpy(float), group["y"].to_numpy(float), s=22, marker=mark[str(implementation)],
            facecolors="none" if poor else hue, edgecolors=hue, linewidths=0.8, alpha=0.45 if poor else 0.85,
        )  # fmt: skip
    style.scale_axis(ax, "x", list(xs))
    style.scale_axis(ax, "y", list(ys))
    shown = workloads[:18]
    keys = [Line2D([], [], linestyle="", marker="s", color=colour[name], label=name) for name in shown]
    if len(workloads) > len(shown):
        keys.append(Line2D([], [], linestyle="", label=f"and {len(workloads) - len(shown)} more"))
    if len(implementations) > 1:
        keys += [
            Line2D([], [], linestyle="", marker=mark[name], color=style.MUTED, markerfacecolor="none", label=name)
            for name in implementations
        ]
    ax.legend(handles=keys, loc="upper left", bbox_to_anchor=(1.01, 1.02), labelspacing=0.35, handletextpad=0.3)


def roofline(frame: pd.DataFrame, colours: Colours = None, environments: Environments | None = None) -> Figure | None:
    """Intensity against achieved FLOP/s, under the ceilings that were measured on the machine."""
    import numpy as np

    rows = usable(frame, "flops", "bytes_moved", "achieved_flops_per_s")
    rows = rows[(rows["flops"] > 0) & (rows["bytes_moved"] > 0)]
    if rows.empty:
        return None
    rows, thin = style.thinned(rows)
    parts, left_out = style.facets(rows, ("run_id", "device", "dtype", "mode"))
    palette = style.colours_of(frame, colours)
    workloads = list(dict.fromkeys(rows["workload"].astype(str)))
    mark = {name: style.MARKERS[i % len(style.MARKERS)] for i, name in enumerate(workloads)}
    with style.styled():
        figure, axes = style.panels(len(parts), width=6.1, height=3.9, columns=2, right=2.1)
        for ax, (_, part) in zip(axes, parts, strict=True):
            intensity = part["flops"].to_numpy(float) / part["bytes_moved"].to_numpy(float)
            speed = part["achieved_flops_per_s"].to_numpy(float) / 1e9
            for (implementation, workload), group in part.groupby(["implementation", "workload"]):
                picked = part.index.get_indexer(group.index)
                ax.scatter(
                    intensity[picked], speed[picked], s=20, marker=mark[str(workload)], alpha=0.75,
                    color=palette[str(implementation)], linewidths=0,
                )  # fmt: skip
            first = part.iloc[0]
            environment = (environments or {}).get(str(first["run_id"]))
            limits = _ceilings(environment, str(first["device"]), str(first["dtype"]))
            x = np.geomspace(intensity.min() / 2, intensity.max() * 2, 50)
            tops = list(speed)
            for compute, copy, dash, _ in limits:
                roof = np.minimum(compute, x * copy) / 1e9
                ax.plot(x, roof, dash, color=style.MUTED, linewidth=1.2, zorder=1)
                tops += [float(roof.max()), float(roof.min())]
            style.scale_axis(ax, "x", [*intensity, *x])
            style.scale_axis(ax, "y", tops)
            ax.set_xlabel("intensity (FLOP per byte moved at least)")
            ax.set_ylabel("achieved speed (GFLOP/s)")
            ax.set_title(f"{first['device']}, {first['dtype']}, {first['mode']}")
            _roofline_legend(ax, part, palette, mark, limits)
        style.note(figure, thin, left_out)
    return figure


def _ceilings(environment: Environment | None, device: str, dtype: str) -> list[Roof]:
    """FLOP/s, bytes/s, dash and name of each roof: copies of the largest footprint and of the fastest."""
    if environment is None or not (compute := environment.flops_per_s.get(f"{device}/{dtype}")):
        return []
    copies = sorted(
        (int(footprint), speed)
        for key, speed in environment.bytes_per_s.items()
        for kind, _, footprint in [key.partition("/")]
        if kind == device and footprint.isdigit()
    )
    roofs: list[Roof] = []
    if copies:
        footprint, speed = copies[-1]
        small, fast = max(copies, key=lambda copy: copy[1])
        roofs.append((compute, speed, "-", f"ceiling, copy of {footprint / 2**20:,.4g} MiB"))
        if small != footprint:
            roofs.append((compute, fast, ":", f"ceiling, copy of {small / 2**20:,.4g} MiB"))
    return roofs


def _roofline_legend(
    ax: Axes,
    part: pd.DataFrame,
    colour: Mapping[str, str],
    mark: Mapping[str, str],
    limits: Sequence[Roof],
) -> None:
    from matplotlib.lines import Line2D

    implementations = sorted(set(part["implementation"].astype(str)))
    workloads = list(dict.fromkeys(part["workload"].astype(str)))
    keys = [Line2D([], [], linestyle="", marker="s", color=colour[name], label=name) for name in implementations]
    if len(workloads) > 1:
        keys += [
            Line2D([], [], linestyle="", marker=mark[name], color=style.MUTED, markerfacecolor="none", label=name)
            for name in workloads[:12]
        ]
    keys += [Line2D([], [], ls=dash, color=style.MUTED, label=name) for _, _, dash, name in limits]
    ax.legend(handles=keys, loc="upper left", bbox_to_anchor=(1.01, 1.02), labelspacing=0.35, handletextpad=0.4)


def speed_up(frame: pd.DataFrame) -> pd.DataFrame:
    """Each row's `speed_up` over `library` or `eager` in the same run and case, and whether intervals `overlap`."""
    rows = usable(frame, "latency_s")
    same = ["run_id", *(n for n in (*POINT_COLUMNS, *case_columns(frame)) if n != "implementation")]
    base = rows[rows["implementation"].isin(BASELINES)]
    figures = ["latency_s", "latency_low_s", "latency_high_s"]
    base = base.drop_duplicates(same)[[*same, "implementation", *figures]]
    joined = rows.merge(base, on=same, suffixes=("", "_base"))
    joined = joined[joined["implementation"] != joined["implementation_base"]]
    overlap = (joined["latency_low_s"] <= joined["latency_high_s_base"]) & (
        joined["latency_low_s_base"] <= joined["latency_high_s"]
    )
    return joined.assign(
        speed_up=(joined["latency_s_base"] / joined["latency_s"]).astype("float64"), overlap=overlap.fillna(True)
    )


def speed_up_map(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """Speed-up of each implementation over the library's (or eager) over clip length and batch size."""
    import numpy as np
    import seaborn
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.ticker import FuncFormatter

    rows = usable(frame, "clip_length", "batch_size", "latency_s")
    # The reference is there to be read; how much slower it is would only squeeze the scale.
    rows = speed_up(rows[rows["implementation"] != "reference"])
    if rows.empty:
        return None
    # Cases that differ in nothing but channels and the like share a panel; its cells are their geometric means.
    keys = ("workload", "implementation", "run_id", "mode", "regime", "device", "dtype", "memory_format")
    groups = rows.groupby(list(keys), dropna=False, sort=False)
    rows = rows[groups["clip_length"].transform("nunique") + groups["batch_size"].transform("nunique") > 2]
    if rows.empty:
        return None
    parts, left_out = style.facets(rows, keys)
    rows = rows.assign(log=np.log2(rows["speed_up"]))
    reach = max(1.0, min(3.0, float(rows["log"].abs().max())))
    merged = False
    with style.styled():
        figure, axes = style.panels(len(parts), width=3.75, height=2.6, left=0.62, right=0.1, margin=1.0)
        for ax, (title, part) in zip(axes, parts, strict=True):
            part = part.assign(log=np.log2(part["speed_up"]))
            cells = part.groupby(["batch_size", "clip_length"]).agg(
                log=("log", "mean"), overlap=("overlap", "all"), number=("log", "size")
            )
            merged |= bool((cells["number"] > 1).any())
            grid = cells["log"].unstack().astype(float).sort_index(ascending=False)
            alike = cells["overlap"].astype(bool).unstack().reindex(grid.index)
            text = np.where(alike.fillna(False).astype(bool), "≈ ", "") + np.vectorize(lambda v: f"{2**v:.2f}×")(grid)
            seaborn.heatmap(
                grid, ax=ax, cmap="RdBu", norm=TwoSlopeNorm(0, -reach, reach), annot=text, fmt="", cbar=False,
                annot_kws={"fontsize": 8 if grid.shape[1] <= 6 else 6.5}, linewidths=1.5, linecolor=style.PAPER,
            )  # fmt: skip
            base = str(part["implementation_base"].iloc[0])
            shown = (
                title if str(part["implementation"].iloc[0]) in title else f"{title} · {part['implementation'].iloc[0]}"
            )
            ax.set_title(f"{shown} over {base}")
            ax.set_xlabel("clip length (frames)")
            ax.set_ylabel("batch size (clips)")
            ax.tick_params(axis="y", rotation=0)
            ax.tick_params(axis="x", rotation=0)
        across, down = figure.get_size_inches()
        place = figure.add_axes((1 - 0.85 / across, 0.83 / down, 0.16 / across, min(0.7, 4 / down)))
        marks = [m for m in (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3) if abs(m) <= reach and (reach <= 1 or m == int(m))]
        bar = figure.colorbar(axes[0].collections[0], cax=place, ticks=marks)
        bar.set_label("speed-up")
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2.0**value:.3g}×"))
        bar.outline.set_visible(False)
        style.note(
            figure,
            "≈: the intervals overlap",
            "Cells are geometric means over the other keys of the case" if merged else "",
            left_out,
        )
    return figure


def accuracies(frame: pd.DataFrame) -> pd.DataFrame:
    """Top-1 of each workload and case on each task: mean, least, most and number over seeds."""
    rows = frame[(frame["mode"] == "evaluate") & frame["top1_accuracy"].notna()]
    keys = ["run_id", "task", "workload", *(n for n in case_columns(frame) if n not in ("seed", "batch_size"))]
    keys = [name for name in keys if rows[name].notna().any()]
    top1 = rows.groupby(keys, dropna=False, sort=False)["top1_accuracy"]
    chance = rows.groupby(keys, dropna=False, sort=False)["chance_accuracy"].mean()
    return top1.agg(["mean", "min", "max", "size"]).assign(chance=chance).reset_index()


def accuracy_latency(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """Top-1 against latency at the smallest batch, a panel per task, with the line of guessing."""
    found = accuracies(frame)
    timed = usable(frame, "latency_s")
    timed = timed[(timed["kind"] == "model") & (timed["mode"] == "forward")]
    if found.empty or timed.empty:
        return None
    keys = [n for n in ("workload", "clip_length", "height", "width", "width_multiplier") if n in found.columns]
    for side in (found, timed):
        if "width_multiplier" in keys:
            side["width_multiplier"] = side["width_multiplier"].astype("Float64").fillna(1.0)
    if timed["batch_size"].notna().any():
        timed = timed[timed["batch_size"] == timed["batch_size"].min()]
    rows = timed.merge(found, on=["run_id", *keys], suffixes=("_timed", ""))
    if rows.empty:
        return None
    parts, left_out = style.facets(rows, ("task", "run_id", "device", "dtype", "memory_format", "regime"))
    with style.styled():
        figure, axes = style.panels(len(parts), width=6.1, height=3.7, columns=2, right=1.75)
        for ax, (title, part) in zip(axes, parts, strict=True):
            xs = part["latency_s"].to_numpy(float) * 1e3
            ax.vlines(
                xs, part["min"].to_numpy(float) * 100, part["max"].to_numpy(float) * 100,
                color=style.MUTED, linewidth=0.9, alpha=0.5, zorder=0,
            )  # fmt: skip
            _workload_scatter(ax, part, xs, part["mean"].to_numpy(float) * 100)
            ax.set_yscale("linear")
            style.scale_axis(ax, "y", [0.0])
            if not style.missing(chance := part["chance"].mean()):
                ax.axhline(float(chance) * 100, color=style.MUTED, linewidth=1, linestyle="--", zorder=0)
                ax.annotate(
                    f"guessing {float(chance) * 100:.3g} %", (1, float(chance) * 100), color=style.MUTED, fontsize=8,
                    xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points", ha="right",
                )  # fmt: skip
            ax.set_ylim(0, 103)
            ax.set_xlabel("latency per call (ms)")
            ax.set_ylabel("top-1 accuracy (%)")
            ax.set_title(f"{part['task'].iloc[0]}" + (f" · {title}" if title and title != part["task"].iloc[0] else ""))
        seeds = int(rows["size"].min()), int(rows["size"].max())
        told = f"{seeds[0]}" if seeds[0] == seeds[1] else f"{seeds[0]} to {seeds[1]}"
        bars = f"Bars: from the worst to the best of {told} seeds" if seeds[1] > 1 else "One seed"
        style.note(figure, bars, dim_note(rows), left_out)
    return figure


def pipeline(frame: pd.DataFrame, colours: Colours = None) -> Figure | None:
    """The video pipeline stage by stage, beside the fastest models that take what it makes.

    A panel per size of the clips; stages that have no frame size, such as decoding, stand in each that they lead to.
    """
    import pandas as pd

    timed = usable(frame, "latency_s")
    stages = timed[(timed["kind"] == "stage") & (timed["mode"] == "forward")]
    if stages.empty:
        return None
    palette = style.colours_of(frame, colours)
    keys = ("run_id", "device", "dtype", *case_columns(frame))
    sized = stages[stages["height"].notna()] if stages["height"].notna().any() else stages
    before = stages.drop(sized.index)
    parts, left_out = style.facets(sized, [n for n in keys if sized[n].nunique(dropna=False) > 1] or ["kind"])
    models = timed[(timed["kind"] == "model") & (timed["mode"] == "forward")].sort_values("latency_s")
    with style.styled():
        figure, axes = style.panels(len(parts), width=6.1, height=3.4, columns=2, left=1.9, right=0.3)
        for ax, (title, part) in zip(axes, parts, strict=True):
            first = part.iloc[0]
            alike = models[models["run_id"] == first["run_id"]]
            leading = before[before["run_id"] == first["run_id"]]
            for name in ("clip_length", "batch_size", "height", "width"):
                if style.missing(first[name]):
                    continue
                if alike[name].notna().any():
                    alike = alike[alike[name] == first[name]]
                leading = leading[leading[name].isna() | (leading[name] == first[name])]
            part = pd.concat([leading, part])
            alike = alike.drop_duplicates("workload").head(4)
            rows = [*part.sort_values(["workload", "implementation"]).itertuples(), *alike.itertuples()]
            names = [f"{row.workload} · {row.implementation}" for row in rows]
            values = [float(row.latency_s) * 1e3 for row in rows]
            hues = [palette[str(row.implementation)] for row in rows]
            bars = ax.barh(range(len(rows)), values, color=hues, height=0.62, edgecolor="none")
            for bar, row in zip(bars, rows, strict=True):
                bar.set_alpha(0.4 if row.trust == "poor" else 0.9)
            for place, row in enumerate(rows):
                if not (style.missing(row.latency_low_s) or style.missing(row.latency_high_s)):
                    ends = float(row.latency_low_s) * 1e3, float(row.latency_high_s) * 1e3
                    ax.hlines(place, *ends, color=style.INK, linewidth=1)
                    values[place] = max(values[place], ends[1])
            ax.set_yticks(range(len(rows)), names)
            ax.tick_params(axis="y", labelcolor=style.INK)
            ax.invert_yaxis()
            ax.grid(False, axis="y")
            for place, row in enumerate(rows):
                milliseconds = float(row.latency_s) * 1e3
                told = f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
                ax.annotate(
                    told, (values[place], place), xytext=(4, 0), va="center",
                    textcoords="offset points", fontsize=8, color=style.MUTED,
                )  # fmt: skip
            ax.set_xlim(0, max(values) * 1.16)
            ax.set_xlabel("time per call (ms)")
            ax.set_title(title or "all stages")
        more = "Lines: 95 % intervals. Below the stages: the fastest models that take such clips" if len(models) else ""
        style.note(figure, more, dim_note(stages), left_out)
    return figure


@dataclass(frozen=True)
class Entry:
    """A figure of the report: its file, its heading, how it is drawn and what it needs when it cannot be."""

    name: str
    title: str
    draw: Callable[..., Figure | None]
    needs: str
    takes_environments: bool = False


FIGURES = (
    Entry(
        "latency_over_clip_length", "Latency over clip length", latency_over_clip_length, "two clip lengths of one case"
    ),
    Entry("latency_over_batch_size", "Latency over batch size", latency_over_batch_size, "two batch sizes of one case"),
    Entry(
        "throughput_over_clip_length",
        "Throughput over clip length",
        throughput_over_clip_length,
        "two clip lengths of one case, with a batch size",
    ),
    Entry(
        "throughput_over_batch_size",
        "Throughput over batch size",
        throughput_over_batch_size,
        "two batch sizes of one case",
    ),
    Entry(
        "memory_over_clip_length",
        "Memory over clip length",
        memory_over_clip_length,
        "peak memory at two clip lengths of one case",
    ),
    Entry(
        "accuracy_latency",
        "Accuracy against latency",
        accuracy_latency,
        "a model's accuracy (mode evaluate) and its latency at the same clip length and frame size",
    ),
    Entry(
        "speed_up_map",
        "Speed-up over the library",
        speed_up_map,
        "library or eager beside another implementation, at several clip lengths or batch sizes",
    ),
    Entry(
        "tcn_lstm_rnn",
        "TCN against LSTM against RNN",
        tcn_lstm_rnn,
        "two of TCN, LSTM and RNN at two clip lengths in one case",
    ),
    Entry(
        "factorised_3d",
        "3D against (2+1)D",
        factorised_3d,
        "full 3D and (2+1)D convolutions or networks at two clip lengths in one case",
    ),
    Entry("flops_latency", "FLOPs against latency", flops_latency, "counted FLOPs of two cases"),
    Entry("roofline", "Roofline", roofline, "FLOPs and bytes moved", takes_environments=True),
    Entry(
        "pipeline",
        "The video pipeline, stage by stage",
        pipeline,
        "stages of the video pipeline (decode, resize_normalise, optical_flow)",
    ),
)
