"""A profile as a page that needs nothing but itself, and as a few sentences. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from vidbench.kernel_kinds import is_operator
from vidbench.report import style
from vidbench.report.html import asset
from vidbench.report.tables import digits
from vidbench.traces import COPYING, LAYER, Bar, Difference, Place, Profile, Row, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_ROWS = 40
LANE_PX, DEPTH_PX, WIDTH_PX = 22, 15, 1160
MOST_DEPTH = 9
LEAST_TEXT_PX = 42


def duration(seconds: float) -> str:
    """12.3 ms, 4.56 µs: three digits and the unit that suits them."""
    units = ((1.0, "s"), (1e3, "ms"), (1e6, "µs"))
    factor, unit = next((pair for pair in units if abs(seconds) * pair[0] >= 1), units[-1])
    return f"{digits(seconds * factor)} {unit}"


def share(part: float, whole: float) -> str:
    """37 %; under one percent with a decimal."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.0f} %" if percent >= 1 or percent == 0 else f"{percent:.1f} %"


# --- what it says -----------------------------------------------------------------------------------------------------


def findings(profile: Profile) -> list[str]:
    """What the profile shows, the most telling first."""
    found = [_of_time(profile), *_of_work(profile), *_of_idling(profile)]
    whole, what = profile.profiled_s, "a call"
    if profile.device == "cuda":
        whole, what = sum(row.seconds for row in profile.kernels), "the kernels' time"
    if profile.conversion_s > 0.01 * whole:
        found.append(f"{share(profile.conversion_s, whole)} of {what} only copies, or changes layouts.")
    if (attained := attainable(profile)) is not None:
        found.append(_of_attaining(*attained))
    return found


def _of_time(profile: Profile) -> str:
    """What each of the times is: they differ in who is waited for."""
    if profile.device == "cuda":
        return (
            f"A call takes {duration(profile.latency_s)} on the device, as `vidbench sweep` measures it (enqueued "
            f"while the stream is held back); from its begin until the device is done the host's clock says "
            f"{duration(profile.wall_s)}, {duration(profile.profiled_s)} under the profiler."
        )
    said = f"A call takes {duration(profile.latency_s)}"
    slowed = profile.profiled_s > 1.05 * profile.latency_s
    return said + (f" ({duration(profile.profiled_s)} under the profiler)." if slowed else ".")


def _of_work(profile: Profile) -> list[str]:
    rows, whose = (profile.kernels, "kernels'") if profile.device == "cuda" else (profile.operators, "operators'")
    whole = sum(row.seconds for row in rows)
    top = [f"{share(row.seconds, whole)} {row.name}" for row in _by_name(rows)[:3]]
    return [f"Of its {whose} time: {', '.join(top)}."] if whole else []


def _by_name(rows: Sequence[Row]) -> list[Row]:
    """One row for a name, whatever the shapes or the template's arguments."""
    found: dict[str, Row] = {}
    for row in rows:
        last = found.get(row.name, Row(row.name, 0, 0.0))
        found[row.name] = Row(row.name, last.calls + row.calls, last.seconds + row.seconds)
    return sorted(found.values(), key=lambda row: -row.seconds)


def _of_idling(profile: Profile) -> list[str]:
    found = []
    idle = sum(gap.seconds for gap in profile.gaps)
    if profile.device == "cuda":
        if idle > 0.02 * profile.profiled_s:
            worst = profile.gaps[0]
            found.append(
                f"The device has nothing to do for {share(idle, profile.profiled_s)} of a profiled call, whose host "
                f"the profiler slows; the largest part, {share(worst.seconds, idle)}: {worst.cause}."
            )
        return found
    if idle > 0.05 * profile.profiled_s:
        found.append(f"For {share(idle, profile.profiled_s)} of a call {profile.gaps[0].cause}.")
    if profile.processors is not None and profile.processors < 0.9 * profile.threads:
        found.append(
            f"It keeps {profile.processors:.1f} of {profile.threads} processors busy, or spinning while they wait: the "
            "rest is lost to what is not parallel, or to other processes."
        )
    return found


Bound = Literal["arithmetic", "memory"]


def attainable(profile: Profile) -> tuple[float, Bound, bool] | None:
    """The share of the device's best that the whole call attains; None where nothing is known.

    Returns:
        The share, of which ceiling, and whether the other ceiling was looked at too: only then it is what bounds.
    """
    return _under_the_roof(
        profile.macs, profile.bytes_moved, profile.latency_s, profile.flops_per_s, profile.bytes_per_s
    )


def _under_the_roof(
    macs: int | None, moved: int | None, seconds: float, flops_per_s: float, bytes_per_s: float
) -> tuple[float, Bound, bool] | None:
    if seconds <= 0 or not (macs or moved):
        return None
    compute, copy = 2 * (macs or 0) / flops_per_s, (moved or 0) / bytes_per_s
    bound: Bound = "arithmetic" if compute > copy else "memory"
    return max(compute, copy) / seconds, bound, macs is not None and moved is not None


def _of_attaining(fraction: float, bound: Bound, both: bool) -> str:
    if fraction > HIGHEST:
        return "The call is faster than the ceilings that were measured here allow: one of them, or its count, is off."
    if both:
        return f"The call attains {share(fraction, 1)} of what this device does at best, which is bound by {bound}."
    if bound == "arithmetic":
        return (
            f"The call attains {share(fraction, 1)} of this device's peak of products; what it must move is not known, "
            "and so not what bounds it."
        )
    return f"The call attains {share(fraction, 1)} of this device's rate of copies; its multiply-adds are not known."


HIGHEST = 1.005
"""What would be told as more than 100 %."""


def text(profile: Profile) -> str:
    """For a terminal: the sentences, and the rows that take the most time."""
    lines = [profile.point, *findings(profile), ""]
    rows = profile.kernels or profile.operators
    if profile.device == "cuda":
        rows = _by_name(profile.kernels)  # with template arguments a name fills the screen
    whole = sum(row.seconds for row in rows) or 1.0
    width = max((len(row.name) for row in rows[:12]), default=0)
    lines += [
        f"{share(row.seconds, whole):>6}  {duration(row.seconds):>9}  {row.calls:>4}×  "
        f"{row.name:<{width}}  {row.detail[:60]}"
        for row in rows[:12]
    ]
    return "\n".join(line.rstrip() for line in lines)


def compared(base: Profile, new: Profile) -> list[tuple[str, list[Difference]]]:
    """What changed from one profile to another, by what is compared.

    On a GPU that is its kernels. On a CPU its operators, which are all that it runs, and of those that oneDNN computes
    the primitives, whose time is counted in the operators too.
    """
    if base.device != new.device:
        return [("operators, by the host's clock", differences(base.operators, new.operators))]
    if new.device == "cuda":
        return [("kernels", differences(base.kernels, new.kernels))]
    primitives = differences(base.kernels, new.kernels)
    found = [("operators", differences(base.operators, new.operators))]
    return [*found, ("kernels of oneDNN, within the operators", primitives)] if primitives else found


def against_text(base: Profile, new: Profile) -> str:
    """For a terminal: how much longer or shorter, and where."""
    lines = [
        f"{new.point}\n  against {base.point}",
        f"{duration(base.latency_s)} → {duration(new.latency_s)}: {_times(base.latency_s, new.latency_s)}.",
    ]
    if warning := _unlike(base, new):
        lines.append(warning)
    for what, found in compared(base, new):
        lines += ["", what]
        for one in found[:15]:
            sides = [duration(row.seconds) if row else "–" for row in (one.base, one.new)]
            change = f"{_signed(one.change_s):>10}  {sides[0]:>9} → {sides[1]:<9}"
            lines.append(f"{change}  {one.name}  {'' if new.device == 'cuda' else one.detail[:60]}".rstrip())
    return "\n".join(lines)


def _unlike(base: Profile, new: Profile) -> str:
    """What is to be said of profiles of two machines; nothing of one's."""
    return f"The other was profiled on {base.machine}: times of unlike machines." if base.machine != new.machine else ""


def _times(base: float, new: float) -> str:
    return f"{new / base:.2f}× as long" if new >= base else f"{base / new:.2f}× as fast"


def _signed(seconds: float) -> str:
    return ("+" if seconds > 0 else "−" if seconds < 0 else "") + duration(abs(seconds))


# --- pictures ---------------------------------------------------------------------------------------------------------


def _class_of(name: str, on_device: bool) -> str:
    if on_device:
        return "kernel"
    if name.startswith(LAYER):
        return "layer"
    if name in COPYING:
        return "copy"
    return "operator" if is_operator(name) else "runtime"


def timeline(profile: Profile) -> str:
    """The line of time of one call as SVG: threads with what encloses what, then streams; a title tells each bar."""
    bars = [bar for bar in profile.bars if bar.depth <= MOST_DEPTH]
    if not bars:
        return ""
    end = max(bar.start_s + bar.duration_s for bar in bars)
    lanes = sorted({bar.lane for bar in bars}, key=lambda lane: (lane.startswith("stream"), lane))
    top, tops = 4, {}
    for lane in lanes:
        tops[lane] = top
        top += LANE_PX + DEPTH_PX * max(bar.depth for bar in bars if bar.lane == lane) + 12
    scale = WIDTH_PX / end
    drawn = []
    for lane in lanes:
        drawn.append(f'<text class="lane" x="0" y="{tops[lane] + 9}">{escape(lane)}</text>')
    for bar in bars:
        drawn.append(_rectangle(bar, scale, tops[bar.lane] + 13))
    ticks = "".join(
        f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{top}"/>'
        f'<text class="tick" x="{x + 3:.1f}" y="{top + 11}">{escape(duration(moment))}</text>'
        for moment, x in ((end * part / 6, WIDTH_PX * part / 6) for part in range(6))
    )
    return (
        f'<svg viewBox="0 0 {WIDTH_PX} {top + 16}" width="{WIDTH_PX}" role="img" aria-label="line of time">'
        f"{ticks}{''.join(drawn)}</svg>"
    )


def _rectangle(bar: Bar, scale: float, top: float) -> str:
    x, width = bar.start_s * scale, max(0.4, bar.duration_s * scale)
    y = top + bar.depth * DEPTH_PX
    name = bar.name.removeprefix(LAYER)
    told = escape(f"{name}: {duration(bar.duration_s)}" + (f" ({bar.detail})" if bar.detail else ""))
    label = ""
    if width > LEAST_TEXT_PX:
        short = name.rsplit("::", 1)[-1][: int(width / 6.2)]
        label = f'<text class="in" x="{x + 3:.1f}" y="{y + 10}">{escape(short)}</text>'
    kind = _class_of(bar.name, bar.lane.startswith("stream"))
    return (
        f'<g><title>{told}</title><rect class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" '
        f'height="{DEPTH_PX - 2}"/>{label}</g>'
    )


def memory_figure(profile: Profile) -> Figure | None:
    """Bytes of tensors alive over one call; None where nothing was allocated."""
    if len(profile.memory) < 3:
        return None
    moments, alive = zip(*profile.memory, strict=True)
    milliseconds, mebibytes = [1e3 * moment for moment in moments], [one / 2**20 for one in alive]
    with style.styled():
        figure, (ax,) = style.panels(1, width=11.6, height=2.6, right=0.2)
        ax.fill_between(milliseconds, mebibytes, step="post", alpha=0.25, color=style.KNOWN["library"], linewidth=0)
        ax.step(milliseconds, mebibytes, where="post", color=style.KNOWN["library"], linewidth=1.2)
        top = max(mebibytes)
        ax.annotate(
            f"{digits(top)} MiB", (milliseconds[mebibytes.index(top)], top), xytext=(4, 2), textcoords="offset points",
            fontsize=8,
        )  # fmt: skip
        ax.set(xlabel="time in the call (ms)", ylabel="tensors alive (MiB)", ylim=(0, 1.15 * top or 1.0))
    return figure


def roofline_figure(profile: Profile) -> Figure | None:
    """Each multiplying operator under the roof that was measured; None where there is none."""
    import numpy as np

    places = [one for one in profile.places if one.seconds > 0 and one.bytes > 0]
    if not places:
        return None
    intensity = [2 * one.macs / one.bytes for one in places]
    speed = [2 * one.macs / one.seconds / 1e9 for one in places]
    with style.styled():
        figure, (ax,) = style.panels(1, width=7.6, height=4.0, right=0.3)
        longest = max(one.seconds for one in places)
        sizes = [18 + 160 * one.seconds / longest for one in places]
        ax.scatter(intensity, speed, s=sizes, color=style.KNOWN["library"], alpha=0.6, linewidths=0)
        x = np.geomspace(min(intensity) / 2, 2 * max(*intensity, profile.flops_per_s / profile.bytes_per_s), 60)
        roof = np.minimum(profile.flops_per_s, x * profile.bytes_per_s) / 1e9
        ax.plot(x, roof, color=style.MUTED, linewidth=1.2)
        style.scale_axis(ax, "x", [*intensity, *x])
        style.scale_axis(ax, "y", [*speed, float(roof.max()), float(roof.min())])
        ax.set(xlabel="intensity (FLOP per byte of inputs and outputs)", ylabel="attained speed (GFLOP/s)")
        rate = digits(profile.bytes_per_s / 1e9)
        style.note(figure, f"Areas go with time; the line: products, and copies at {rate} GB/s (faster within caches)")
    return figure


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A row of a table as text, with the length of its bar."""

    cells: tuple[str, ...]
    part: float


def _lines(rows: Sequence[Row], whole: float) -> list[_Line]:
    longest = max((row.seconds for row in rows), default=0.0) or 1.0
    return [
        _Line(
            (row.name, row.detail, str(row.calls), duration(row.seconds), share(row.seconds, whole)),
            row.seconds / longest,
        )
        for row in rows[:SHOWN_ROWS]
    ]


def _place_lines(profile: Profile, places: Sequence[Place]) -> list[_Line]:
    found = []
    for one in places[:SHOWN_ROWS]:
        moved = one.bytes or None
        held = _under_the_roof(one.macs, moved, one.seconds, profile.flops_per_s, one.bytes_per_s)
        fraction, bound, both = held or (0.0, "", False)
        cells = (
            one.name, one.shapes, str(one.calls), duration(one.seconds),
            f"{digits(2 * one.macs / one.seconds / 1e9)} GFLOP/s" if one.seconds else "–",
            f"{digits(2 * one.macs / one.bytes)}" if one.bytes else "–",
            "–" if held is None else "above the ceiling" if fraction > HIGHEST else share(fraction, 1),
            bound if both else "–",
        )  # fmt: skip
        found.append(_Line(cells, min(1.0, fraction)))
    return found


def _difference_lines(differences: Sequence[Difference]) -> list[_Line]:
    found = differences[:SHOWN_ROWS]
    longest = max((abs(one.change_s) for one in found), default=0.0) or 1.0
    return [
        _Line(
            (
                one.name, one.detail,
                *(f"{duration(row.seconds)} ({row.calls}×)" if row else "not there" for row in (one.base, one.new)),
                _signed(one.change_s),
            ),
            abs(one.change_s) / longest,
        )
        for one in found
    ]  # fmt: skip


def render(profile: Profile, base: Profile | None = None) -> str:
    """The page.

    Args:
        profile: What was profiled.
        base: A profile that it is held against.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    whole = profile.profiled_s
    kernels_whole = sum(row.seconds for row in profile.kernels)
    figures: list[dict[str, Any]] = []
    for name, title, figure in (
        ("memory", "Memory over one call", memory_figure(profile)),
        ("roofline", "Operators under the roof", roofline_figure(profile)),
    ):
        if figure is not None:
            figures.append({"name": name, "title": title, "svg": Markup(style.inline(style.svg(figure), name))})
    return environment.from_string(asset("profile.html.j2")).render(
        profile=profile,
        heading=" · ".join(profile.point.split("/")[:3]),
        created=profile.created_utc.replace("T", " ").replace("Z", " UTC"),
        findings=findings(profile),
        on_device=profile.device == "cuda",
        timeline=Markup(timeline(profile)),
        figures=figures,
        gaps=[(gap.cause, gap.count, duration(gap.seconds), share(gap.seconds, whole)) for gap in profile.gaps],
        busy=duration(profile.busy_s),
        kernels=_lines(profile.kernels, kernels_whole),
        kernel_count=len(profile.kernels),
        operators=_lines(profile.operators, whole),
        operator_count=len(profile.operators),
        layers=_lines(profile.layers, whole),
        layer_count=len(profile.layers),
        places=_place_lines(profile, profile.places),
        counters=profile.counters,
        base=base,
        against=None if base is None else _times(base.latency_s, profile.latency_s),
        differences=[] if base is None else [(what, _difference_lines(by)) for what, by in compared(base, profile)],
        unlike="" if base is None else _unlike(base, profile),
        mode=profile.point.split("/")[2],
        too_deep=sum(bar.depth > MOST_DEPTH for bar in profile.bars),
        latencies=None if base is None else (duration(base.latency_s), duration(profile.latency_s)),
        css=Markup(asset("page.css")),
    )
