"""What the events of a profiler say: which operators and kernels ran, and where the time went; what is kept of it.

Events in, records out: no torch, so that a trace of a GPU is understood, and tested, anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from vidbench.kernel_kinds import is_operator, lays_out
from vidbench.run_format import UNDECODABLE
from vidbench.sweep import RequestError

CALL = "vidbench call"
"""The scope around each profiled call."""

MEMORY = "[memory]"
"""The events of allocators."""

LAYER = "layer "
"""Begins the scope around a module's forward pass."""

WAITING = re.compile(r"cu(da)?((Device|Stream|Event|Ctx)Synchronize|Memcpy(?!\w*Async))")
ALLOCATING = re.compile(r"cu(da)?(Malloc|Free|HostAlloc|MemAlloc|MemFree)")
_DRIVER = re.compile(r"cu(da)?[A-Z]\w*")

COPYING = frozenset(("aten::copy_", "aten::contiguous", "aten::clone", "aten::_to_copy"))
"""Operators that do nothing but copy, most often to change a layout."""

Cause = Literal[
    "the device's own, between queued kernels",
    "a synchronising call",
    "allocating",
    "launching",
    "no operator of torch's ran (Python, autograd, compiled code, other libraries)",
    "a launch that was not seen",
    "the call's end",
]


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a profiler."""

    name: str
    start_s: float
    duration_s: float
    lane: str
    """The thread, or the stream of a device."""
    on_device: bool = False
    detail: str = ""
    """Shapes of an operator's inputs (1x3x16x112x112, 64x3x3x3x3), a kernel's name with all its arguments."""
    bytes: int = 0
    """Of a `[memory]` event: how much is alive from here on more than before."""
    id: int = 0
    """Of an operator or a scope, as torch counts them."""
    launched_by: int = 0
    """Id of the operator that launched it."""
    launch: int = 0
    """What a call of the driver's and the kernel that it launched have in common: CUPTI's number, not torch's."""

    @property
    def end_s(self) -> float:
        """When it was over."""
        return self.start_s + self.duration_s

    @property
    def is_kernel(self) -> bool:
        """Whether the device worked meanwhile."""
        return self.on_device and self.name != MEMORY


@dataclass(frozen=True, slots=True)
class Span:
    """An event of a thread within those that enclose it."""

    event: Event
    depth: int
    self_s: float
    """Without what lies within it."""
    parent: int
    """Its index; -1 for none."""


@dataclass(frozen=True)
class Row:
    """A line of a table: what ran in a call, how often, and how long."""

    name: str
    calls: int
    seconds: float
    detail: str = ""
    """Shapes of an operator, the algorithm of a primitive, a kernel's name with all its arguments."""


@dataclass(frozen=True)
class Gap:
    """Time of a call in which the device had nothing to do, by cause; see `vidbench.idle`."""

    cause: Cause
    count: int
    seconds: float


def nested(events: Iterable[Event]) -> list[Span]:
    """The events of each thread as a tree, in order of their begin."""
    ordered = sorted(
        (one for one in events if not one.on_device and one.name != MEMORY),
        key=lambda one: (one.lane, one.start_s, -one.duration_s),
    )
    parents: list[int] = []
    within = [0.0] * len(ordered)
    depths: list[int] = []
    stack: list[int] = []
    for index, one in enumerate(ordered):
        while stack and (ordered[stack[-1]].lane != one.lane or ordered[stack[-1]].end_s <= one.start_s):
            stack.pop()
        parents.append(stack[-1] if stack else -1)
        depths.append(len(stack))
        if stack:
            within[stack[-1]] += one.duration_s
        stack.append(index)
    return [
        Span(one, depth, max(0.0, one.duration_s - inside), parent)
        for one, depth, inside, parent in zip(ordered, depths, within, parents, strict=True)
    ]


def calls(events: Sequence[Event]) -> list[Event]:
    """The scopes of the profiled calls, in order."""
    return sorted((one for one in events if one.name == CALL and not one.on_device), key=lambda one: one.start_s)


def is_driver_call(name: str) -> bool:
    """Whether a thread's event is a call of CUDA's runtime or driver."""
    return _DRIVER.fullmatch(name) is not None


def operators(spans: Sequence[Span]) -> list[Row]:
    """Operators by name and shapes, the longest first; what lies within others is theirs alone."""
    return _rows((one.event.name, one.event.detail, one.self_s) for one in spans if is_operator(one.event.name))


def _rows(pieces: Iterable[tuple[str, str, float]]) -> list[Row]:
    """One row for each name and detail, the longest first."""
    found: dict[tuple[str, str], Row] = {}
    for name, detail, seconds in pieces:
        last = found.get((name, detail), Row(name, 0, 0.0, detail))
        found[name, detail] = Row(name, last.calls + 1, last.seconds + seconds, detail)
    return sorted(found.values(), key=lambda row: -row.seconds)


def kernels(events: Iterable[Event]) -> list[Row]:
    """The device's kernels, the longest first."""
    return _rows((one.name, one.detail, one.duration_s) for one in events if one.is_kernel)


def layers(spans: Sequence[Span], device_s: Mapping[int, float] | None) -> list[Row]:
    """The modules that were called, the longest first.

    Args:
        spans: Of the host's threads.
        device_s: Seconds of the kernels that a span (by index) and those within it launched; None on a CPU, where the
            span's own length counts.
    """
    return _rows(
        (one.event.name.removeprefix(LAYER), "", one.event.duration_s if device_s is None else device_s.get(index, 0.0))
        for index, one in enumerate(spans)
        if one.event.name.startswith(LAYER)
    )


def launched(events: Iterable[Event], spans: Sequence[Span]) -> dict[int, float]:
    """Of each span by index, the seconds of the kernels that it and those within it launched.

    Where no operator launched a kernel, as with Triton's, the driver's call lies within the scope that did.
    """
    by_id = {span.event.id: index for index, span in enumerate(spans) if span.event.id}
    by_launch = {span.event.launch: index for index, span in enumerate(spans) if span.event.launch}
    found: dict[int, float] = {}
    for one in events:
        index = by_id.get(one.launched_by, by_launch.get(one.launch, -1)) if one.is_kernel else -1
        while index >= 0:
            found[index] = found.get(index, 0.0) + one.duration_s
            index = spans[index].parent
    return found


# --- memory, and the line of time -------------------------------------------------------------------------------------


def memory_over_time(events: Iterable[Event], scope: Event, on_device: bool, before: int) -> list[tuple[float, int]]:
    """Bytes alive from each moment of a call on, in seconds after its begin.

    Args:
        events: All of a profile.
        scope: The call.
        on_device: Whether the device's memory is asked for.
        before: What was alive when the call began.
    """
    alive = before
    line = [(0.0, before)]
    moments = sorted(
        (one.start_s, one.bytes)
        for one in events
        if one.name == MEMORY and one.on_device == on_device and scope.start_s <= one.start_s <= scope.end_s
    )
    for moment, change in moments:
        alive += change
        line.append((moment - scope.start_s, alive))
    line.append((scope.duration_s, alive))
    return line


@dataclass(frozen=True)
class Bar:
    """A rectangle of the time line."""

    name: str
    lane: str
    depth: int
    start_s: float
    """After the call's begin."""
    duration_s: float
    detail: str = ""


MOST_BARS = 1500


def bars(events: Iterable[Event], spans: Sequence[Span], scope: Event) -> tuple[list[Bar], int]:
    """The time line of one call, threads with what encloses what and streams, and how many bars are left out.

    Where there are too many, those are the shortest of the fullest lanes: kernels are short, and most in number.
    """
    lanes: dict[str, list[Bar]] = {}
    hosts = [(span.event, span.depth) for span in spans if span.event.name != CALL]
    for one, depth in hosts + [(one, 0) for one in events if one.is_kernel]:
        if scope.start_s <= one.start_s < scope.end_s:
            bar = Bar(one.name, one.lane, depth, one.start_s - scope.start_s, one.duration_s, one.detail)
            lanes.setdefault(one.lane, []).append(bar)
    kept: list[Bar] = []
    for done, lane in enumerate(sorted(lanes.values(), key=len)):
        room = (MOST_BARS - len(kept)) // (len(lanes) - done)
        kept += sorted(lane, key=lambda bar: -bar.duration_s)[:room]
    return sorted(kept, key=lambda bar: (bar.start_s, bar.depth)), sum(map(len, lanes.values())) - len(kept)


# --- oneDNN -----------------------------------------------------------------------------------------------------------


def onednn_primitives(log: str) -> list[Row]:
    """The primitives of a call from oneDNN's own words: what a CPU's kernels are, conversions of layouts among them.

    Source: https://uxlfoundation.github.io/oneDNN/dev_guide_verbose.html
    """
    found: list[tuple[str, str, float]] = []
    for line in log.splitlines():
        parts = line.strip().split(",")
        if not parts[0].startswith("onednn_verbose") or "exec" not in parts:
            continue
        at = parts.index("exec")
        try:
            _, kind, algorithm = parts[at + 1 : at + 4]
            milliseconds = float(parts[-1])
        except ValueError:  # a line that another release says otherwise
            continue
        found.append((kind, algorithm, 1e-3 * milliseconds))
    return _rows(found)


def conversion_s(operators: Iterable[Row], kernels: Iterable[Row]) -> float:
    """Seconds of a call that only change layouts or copy.

    On a device its kernels tell; on a CPU the operators that copy, and oneDNN's reorders within others.
    """
    return sum(row.seconds for row in kernels if lays_out(row.name, row.detail)) + sum(
        row.seconds for row in operators if row.name in COPYING
    )


@dataclass(frozen=True)
class Difference:
    """A kernel of two profiles."""

    name: str
    detail: str = ""
    base: Row | None = None
    new: Row | None = None

    @property
    def change_s(self) -> float:
        """Of a call's time."""
        return (self.new.seconds if self.new else 0.0) - (self.base.seconds if self.base else 0.0)


def differences(base: Sequence[Row], new: Sequence[Row]) -> list[Difference]:
    """What became of each kernel, the largest change of a call's time first."""
    sides = [{(row.name, row.detail): row for row in rows} for rows in (base, new)]
    keys = dict.fromkeys((*sides[0], *sides[1]))
    found = [Difference(*key, *(side.get(key) for side in sides)) for key in keys]
    return sorted(found, key=lambda one: -abs(one.change_s))


# --- what is kept -----------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 2
SUMMARY, TRACE, PAGE = "profile.json", "trace.json.gz", "profile.html"
"""Files of a profile's folder."""


@dataclass(frozen=True)
class Place:
    """An operator under the roof: what it computes, what it must move, and how long it takes."""

    name: str
    shapes: str
    calls: int
    seconds: float
    """With all that it calls; on a device its kernels'."""
    macs: int
    bytes: int
    """Inputs and outputs, each once."""
    bytes_per_s: float
    """At which this device copies so much."""


@dataclass(frozen=True)
class Profile:
    """What a profile has found in one call, the middle one of several."""

    schema_version: int
    point: str
    """Its key."""
    created_utc: str
    command: str
    machine: str
    device: str
    torch: str
    latency_s: float
    """Without the profiler, as a run has it: on a GPU the device's time of calls that are enqueued ahead."""
    wall_s: float
    """Without the profiler, by the host's clock from the call's begin until its device is done."""
    profiled_s: float
    """The same with the profiler."""
    calls: int
    """That were profiled."""
    operators: list[Row]
    kernels: list[Row]
    """Of a GPU, or oneDNN's primitives of a CPU."""
    layers: list[Row]
    places: list[Place]
    gaps: list[Gap]
    conversion_s: float
    memory: list[tuple[float, int]]
    """Seconds after a call's begin, and bytes of tensors alive from then on."""
    bars: list[Bar]
    flops_per_s: float
    """The device's measured ceilings."""
    bytes_per_s: float
    """Of copies as large as what the whole call moves, where that is known, else of the largest."""
    macs: int | None = None
    params: int | None = None
    bytes_moved: int | None = None
    processors: float | None = None
    """That the call keeps busy on a CPU, of `threads`; those that spin while they wait are busy too."""
    threads: int = 0
    counters: list[dict[str, str]] = field(default_factory=list)
    """Of each kernel, from ncu where it is installed."""
    about_counters: str = ""
    """Why a GPU's kernels have none, or which are left out."""
    uncounted: list[str] = field(default_factory=list)
    """Operators that may multiply and have no formula, so that they are in none of `places`."""
    bars_left_out: int = 0
    """Shorter than all in `bars`, within their lane."""

    @property
    def busy_s(self) -> float:
        """In which the device worked; on a CPU in which an operator of torch's ran."""
        return max(0.0, self.profiled_s - sum(gap.seconds for gap in self.gaps))


@dataclass(frozen=True)
class _Version:
    schema_version: int


def load(folder: Path) -> Profile:
    """A profile that was written.

    Raises:
        RequestError: There is none, or it is damaged or of another version.
    """
    path = folder / SUMMARY
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content, type=_Version).schema_version
        if version == SCHEMA_VERSION:
            return msgspec.json.decode(content, type=Profile)
    except FileNotFoundError:
        raise RequestError(f"{folder} holds no {SUMMARY}: give the --out of `vidbench profile`") from None
    except (*UNDECODABLE, OSError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None
    raise RequestError(
        f"{path} has schema_version {version}; wanted {SCHEMA_VERSION}: profile that point again with this vidbench"
    )
