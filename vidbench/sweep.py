"""Axis, Sweep, Point: what is to be measured, as pure data. Imports neither torch nor vidkernels."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Value = int | float | str | bool | tuple[int, ...]
"""What a case may hold: everything that JSON can say without nesting beyond one tuple of integers."""

Kind = Literal["op", "model", "stage", "task"]
"""op: a kernel; model: a network; stage: a step of the video pipeline; task: a training that yields an accuracy."""

TIMED_MODES = ("forward", "train", "stream")
REGIMES = ("hot", "cold", "graph")
DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16")
DEVICES = ("cpu", "cuda")
MEMORY_FORMATS = ("contiguous", "channels_last")


LONGEST_MESSAGE = 1000


class RequestError(Exception):
    """A request that cannot be carried out, said in one line: what, what was given, what was wanted, what to do.

    The line is printable, whatever an argument or a damaged file holds.
    """

    def __init__(self, said: str) -> None:
        if len(said) > LONGEST_MESSAGE:
            said = f"{said[:LONGEST_MESSAGE]} …"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said))


def unknown(what: str, given: str, known: Iterable[str]) -> RequestError:
    """The error for a name that is not known, with the nearest one that is."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return RequestError(f"unknown {what} {given!r}: {hint}known: {', '.join(names)}")


@dataclass(frozen=True, slots=True)
class Axis:
    """One thing that a sweep can vary: its name, what its values are, and what it means."""

    name: str
    values: Literal["integer", "count", "number", "fraction", "sizes", "flag", "word"]
    """integer: ≥ 1; count: ≥ 0; number: > 0; fraction: 0 to 1; sizes: n or AxBxC, each ≥ 1 (padding: ≥ 0)."""
    meaning: str
    words: tuple[str, ...] = ()

    def parse(self, text: str) -> Value:
        """One value from its text.

        Raises:
            RequestError: The text is no value of this axis.
        """
        wanted = {
            "integer": "a positive integer",
            "count": "an integer of at least 0",
            "number": "a positive number",
            "fraction": "a number from 0 to 1",
            "sizes": "positive integers as 3 or 3x3x3",
            "flag": "true or false",
            "word": f"one of {', '.join(self.words)}" if self.words else "a word",
        }[self.values]
        error = RequestError(f"axis {self.name}={text!r} is not {wanted}")
        try:
            if self.values in ("integer", "count"):
                number = int(text)
                if number < (self.values == "integer"):
                    raise error
                return number
            if self.values in ("number", "fraction"):
                amount = float(text)
                fits = 0 < amount < float("inf") if self.values == "number" else 0 <= amount <= 1
                if not fits:
                    raise error
                return amount
            if self.values == "sizes":
                sizes = tuple(int(part) for part in text.lower().split("x"))
                if min(sizes) < (self.name != "padding"):
                    raise error
                return sizes[0] if len(sizes) == 1 else sizes
            if self.values == "flag":
                return {"true": True, "false": False}[text.lower()]
        except (ValueError, KeyError):
            raise error from None
        if self.words and text not in self.words:
            raise unknown(self.name, text, self.words)
        return text


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("clip_length", "integer", "frames in a clip"),
        Axis("batch_size", "integer", "clips in a batch"),
        Axis("height", "integer", "rows of a frame or feature map, pixels"),
        Axis("width", "integer", "columns of a frame or feature map, pixels"),
        Axis("input_size", "integer", "height and width at once, pixels"),
        Axis("channels", "integer", "in_channels and out_channels at once"),
        Axis("in_channels", "integer", "channels in"),
        Axis("out_channels", "integer", "channels out"),
        Axis("mid_channels", "integer", "channels between the two convolutions of a (2+1)D pair"),
        Axis("kernel_size", "sizes", "taps, as k or TxHxW"),
        Axis("stride", "sizes", "stride, as s or TxHxW"),
        Axis("padding", "sizes", "zero padding, as p or TxHxW"),
        Axis("dilation", "sizes", "distance between taps, as d or TxHxW"),
        Axis("input_features", "integer", "features per frame, of a sequence"),
        Axis("hidden_size", "integer", "width of a recurrent state or of a TCN"),
        Axis("dropout_p", "fraction", "probability that a feature is dropped in training"),
        Axis("bias", "flag", "whether a bias is added"),
        Axis("return_sequence", "flag", "many-to-many (every frame's output) or many-to-one (the last one's)"),
        Axis("width_multiplier", "number", "factor on the channel counts of a model"),
        Axis("num_classes", "integer", "classes told apart"),
        Axis("seed", "count", "seed of weights and data"),
        Axis("implementation", "word", "which implementation runs"),
        Axis("mode", "word", "what is timed", TIMED_MODES),
        Axis("regime", "word", "state of the caches", REGIMES),
        Axis("device", "word", "kind of device", DEVICES),
        Axis("dtype", "word", "arithmetic", DTYPES),
        Axis("memory_format", "word", "layout of activations", MEMORY_FORMATS),
    )
}

TOGETHER = {"input_size": ("height", "width"), "channels": ("in_channels", "out_channels")}
"""Axes that stand for two keys of a case. A key that is given by itself wins."""

POINT_AXES = ("implementation", "mode", "regime", "device", "dtype", "memory_format")
"""The axes that are fields of a Point; every other axis is a key of its case."""


def text_of(value: Value) -> str:
    """A value as text that `Axis.parse` reads back: 3x3x3, true, 0.25."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure. Two points with one `key` are the same measurement on any machine and revision."""

    workload: str
    """An op (`conv3d`), a model (`c3d`, `package.module:factory`), a stage (`decode`) or a task (`frame_order`)."""
    kind: Kind
    implementation: str
    mode: str = "forward"
    regime: str = "hot"
    device: str = "cpu"
    dtype: str = "fp32"
    memory_format: str = "contiguous"
    case: Mapping[str, Value] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Stable text of everything above; no version, GPU name or device index is part of it."""
        case = ",".join(f"{name}={text_of(self.case[name])}" for name in sorted(self.case))
        return "/".join(
            (
                self.workload, self.implementation, self.mode, self.regime,
                self.device, self.dtype, self.memory_format, case,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """The product of axes over one workload.

    Points come in the order of `axes`, the last one fastest, except that `implementation` is always the fastest:
    the implementations of one case run side by side, under like conditions, and share one float64 reference.
    """

    workload: str
    kind: Kind = "op"
    axes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Value] = field(default_factory=dict)
    skip: tuple[Mapping[str, Value], ...] = ()
    """Combinations left out: a point that has every value of one of these is not made."""

    def points(self) -> Iterator[Point]:
        """Every point, in a fixed order."""
        order = sorted(self.axes, key=lambda name: name == "implementation")
        for values in itertools.product(*(self.axes[name] for name in order)):
            chosen = {**self.fixed, **dict(zip(order, values, strict=True))}
            if any(all(chosen.get(k) == v for k, v in gone.items()) for gone in self.skip):
                continue
            fields = {name: str(chosen.pop(name)) for name in POINT_AXES if name in chosen}
            for both, pair in TOGETHER.items():
                if (size := chosen.pop(both, None)) is not None:
                    for name in pair:
                        chosen.setdefault(name, size)
            yield Point(self.workload, self.kind, case=chosen, **fields)

    def override(self, axes: Mapping[str, tuple[Value, ...]]) -> Sweep:
        """This sweep with other values on the given axes, whether they varied or were fixed here before."""
        gone = {*axes, *(name for both, pair in TOGETHER.items() if both in axes for name in pair)}
        kept = {name: values for name, values in self.axes.items() if name not in gone}
        fixed = {name: value for name, value in self.fixed.items() if name not in gone}
        return replace(self, axes={**kept, **axes}, fixed=fixed)

    def names(self) -> set[str]:
        """The axes this sweep has, varied or fixed."""
        return {*self.axes, *self.fixed}


def implementations_of(wanted: Sequence[Value], has: Sequence[str]) -> tuple[str, ...]:
    """Of what a workload has, the implementations asked for; `all`: every one but the reference."""
    if "all" in wanted:
        return tuple(name for name in has if name != "reference")
    return tuple(str(name) for name in wanted if name in has)


def parse_axes(texts: Iterable[str]) -> dict[str, tuple[Value, ...]]:
    """`["clip_length=8,16", "dtype=bf16"]` as axes.

    Raises:
        RequestError: No `=`, an unknown axis, one that is given twice, or a value that is none of its.
    """
    axes: dict[str, tuple[Value, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise RequestError(f"--axis {text!r} is not name=value[,value…], such as clip_length=8,16")
        if name not in AXES:
            raise unknown("axis", name, AXES)
        if name in axes:
            raise RequestError(f"axis {name!r} is given twice: join its values with commas")
        axes[name] = tuple(dict.fromkeys(AXES[name].parse(value.strip()) for value in values.split(",")))
    return axes
