"""Records as JSON and back: the lines of a run's measurements.jsonl, and its run.json.

Lines are JSON of `records.Measurement` with defaults left out. JSON has neither NaN nor infinities: they stand as null,
and the line's `nonfinite` lists where they were and what they were.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar, get_type_hints

import msgspec

from vidbench.records import Ceilings, Counts, Measurement, Memory
from vidbench.sweep import AXES, Axis, Point, Value

# --- encoding ---------------------------------------------------------------------------------------------------------


def _children(value: object) -> Iterable[tuple[str | int, object]]:
    if is_dataclass(value):
        return ((f.name, getattr(value, f.name)) for f in fields(value))
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return enumerate(value)
    return ()


def _nonfinite(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Where in a record, and which: NaN, inf, -inf."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield path, "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return
    if isinstance(value, array) and all(map(math.isfinite, value)):
        return
    for name, child in _children(value):
        yield from _nonfinite(child, (*path, name))


def _plain(value: object) -> object:
    """What msgspec does not know by itself: compact arrays, subclasses of numbers, other mappings."""
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be stored in a run")


def _defaults(kind: type) -> dict[str, object]:
    """Each field's default; a field without one is not in it."""
    known: dict[str, object] = {}
    for f in fields(kind):
        if f.default is not MISSING:
            known[f.name] = f.default
        elif f.default_factory is not MISSING:
            known[f.name] = f.default_factory()
    return known


_MEASUREMENT_DEFAULTS = _defaults(Measurement)


def _is_default(name: str, value: object) -> bool:
    if name not in _MEASUREMENT_DEFAULTS:
        return False
    default = _MEASUREMENT_DEFAULTS[name]
    if isinstance(default, tuple):
        return not len(value)  # type: ignore[arg-type]  # samples and reasons: empty in any kind of sequence
    return value is None if default is None else value == default


def without_surrogates(text: str) -> str:
    """`text` without lone surrogates, which UTF-8 cannot hold and undecodable output of a process can."""
    return text.encode("utf-8", "backslashreplace").decode()


def encode_line(measurement: Measurement) -> bytes:
    """A measurement as its line of measurements.jsonl, newline included. Equal measurements give equal bytes."""
    point = measurement.point
    ordered = replace(point, case={name: point.case[name] for name in sorted(point.case)})
    measurement = replace(measurement, point=ordered)
    record: dict[str, object] = {}
    for f in fields(Measurement):
        value = getattr(measurement, f.name)
        if not _is_default(f.name, value):
            record[f.name] = value
    if odd := list(_nonfinite(record)):
        record["nonfinite"] = odd
    try:
        return msgspec.json.encode(record, enc_hook=_plain) + b"\n"
    except UnicodeEncodeError:
        record["reason"] = without_surrogates(measurement.reason)
        record["stop"] = without_surrogates(measurement.stop)
        record["trust_reasons"] = [without_surrogates(reason) for reason in measurement.trust_reasons]
        return msgspec.json.encode(record, enc_hook=_plain) + b"\n"


def encode_record(record: Mapping[str, object]) -> bytes:
    """A mapping of names to records as indented JSON, for people to read as well."""
    odd = list(_nonfinite(record))
    content = {**record, "nonfinite": odd} if odd else record
    return msgspec.json.format(msgspec.json.encode(content, enc_hook=_plain), indent=2) + b"\n"


# --- decoding ---------------------------------------------------------------------------------------------------------

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NUMBERS = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}

_Record = TypeVar("_Record")


def decode_record(content: bytes, kind: type[_Record]) -> _Record:
    """A record whose non-finite numbers are put back before its types are checked.

    Raises:
        msgspec.DecodeError: Not JSON, not of that type, or `nonfinite` names a place that is not there.
    """
    record: Any = msgspec.json.decode(content)
    if not isinstance(record, dict):
        raise msgspec.ValidationError("Expected `object`")
    try:
        for path, number in record.pop("nonfinite", ()):
            place = record
            for step in path[:-1]:
                place = place[step]
            if place[path[-1]] is not None:
                raise msgspec.ValidationError(f"`nonfinite` names {path}, which is not null")
            place[path[-1]] = _NUMBERS[number]
    except (KeyError, IndexError, TypeError, ValueError) as problem:
        raise msgspec.ValidationError(f"`nonfinite` names a place that is not there: {problem}") from None
    unknown = sorted(set(record) - {f.name for f in fields(kind)})  # type: ignore[arg-type]
    if unknown:
        raise msgspec.ValidationError(f"Object contains unknown field `{unknown[0]}`")
    return msgspec.convert(record, kind)


@cache
def _line_decoder() -> msgspec.json.Decoder[Any]:
    """Of Measurement: point and counts stay raw, since all rounds of a point share the same bytes."""
    hints = get_type_hints(Measurement)
    defaults = _MEASUREMENT_DEFAULTS
    members: list[Any] = []
    for f in fields(Measurement):
        if f.name in ("point", "counts"):
            kind: Any = msgspec.Raw
            default: Any = msgspec.Raw(b"null")
        else:
            kind, default = hints[f.name], defaults.get(f.name, MISSING)
        required = f.name not in defaults
        members.append((f.name, kind) if required else (f.name, kind, default))
    members.append(("nonfinite", msgspec.Raw, msgspec.Raw(b"")))
    return msgspec.json.Decoder(msgspec.defstruct("Line", members, forbid_unknown_fields=True, gc=False))


_POINT = msgspec.json.Decoder(Point)
_COUNTS = msgspec.json.Decoder(Counts | None)


class LineReader:
    """Decodes lines; a point's bytes are decoded once however many rounds it has."""

    def __init__(self) -> None:
        self._decode = _line_decoder().decode
        self._points: dict[bytes, tuple[Point, str]] = {}
        self._counts: dict[bytes, Counts | None] = {}
        names = [f.name for f in fields(Measurement)]
        self._at = {name: names.index(name) for name in ("point", "counts", "samples_s", "host_samples_s")}

    def read(self, line: bytes) -> tuple[Measurement, str]:
        """The measurement and its point's key."""
        try:
            record = self._decode(line)
        except msgspec.ValidationError:
            # A number that is required and not finite stands as null.
            return self._restored(line)
        *values, nonfinite = msgspec.structs.astuple(record)
        if len(bytes(nonfinite)):
            return self._restored(line)
        at = self._at
        raw = bytes(values[at["point"]])
        if (known := self._points.get(raw)) is None:
            point = _POINT.decode(raw)
            known = self._points[raw] = (point, point.key)
        values[at["point"]], key = known
        raw = bytes(values[at["counts"]])
        if raw not in self._counts:
            self._counts[raw] = _COUNTS.decode(raw)
        values[at["counts"]] = self._counts[raw]
        for name in ("samples_s", "host_samples_s"):
            if values[at[name]]:
                values[at[name]] = array("d", values[at[name]])
        return Measurement(*values), key

    def _restored(self, line: bytes) -> tuple[Measurement, str]:
        found = decode_record(line, Measurement)
        samples, host = (array("d", kept) if kept else () for kept in (found.samples_s, found.host_samples_s))
        return replace(found, samples_s=samples, host_samples_s=host), found.point.key


def is_json(line: bytes) -> bool:
    """Whether a line that does not decode was at least written to its end."""
    try:
        msgspec.json.decode(line)
    except msgspec.ValidationError:  # a number that no computer holds
        return True
    except UNDECODABLE:
        return False
    return True


# --- what no measurement can be ---------------------------------------------------------------------------------------

MOST = 2**62
"""Counts and bytes stay below it: twice as much would not fit into 64 bits."""

LONGEST_S = 1e9
SHORTEST_S = 1e-12
"""No machine does anything in a picosecond, and nobody waits for thirty years."""


def impossible(measurement: Measurement) -> str:
    """What of a measurement cannot be, whoever claims it, its point aside; empty where all of it can."""
    for name, samples in (("samples_s", measurement.samples_s), ("host_samples_s", measurement.host_samples_s)):
        # A sum is NaN where any of its terms is, whichever way NaN is ordered.
        if len(samples) and not (min(samples) >= SHORTEST_S and max(samples) <= LONGEST_S and sum(samples) > 0):
            odd = next(one for one in samples if not SHORTEST_S <= one <= LONGEST_S)
            return f"{name} has {odd}: a time is from {SHORTEST_S:g} to {LONGEST_S:g} s"
    counts = [(name, getattr(measurement, name)) for name in ("round", "calls_per_sample", "params", "bytes_moved")]
    if measurement.counts is not None:
        counts.append(("macs", measurement.counts.macs))
    for part, names in _COUNTED.items():
        if (record := getattr(measurement, part)) is not None:
            counts += [(f"{part}.{name}", getattr(record, name)) for name in names]
    for name, value in counts:
        if value is not None and not 0 <= value < MOST:
            return f"{name} is {value}"
    if (ceilings := measurement.ceilings) is not None and not ceilings.flops_per_s * ceilings.bytes_per_s > 0:
        return "a ceiling is 0"
    if (accuracy := measurement.accuracy) is not None:
        shares = (accuracy.top1, accuracy.chance, *accuracy.conditions.values(), accuracy.top5 or 0.0)
        if not all(0 <= share <= 1 for share in shares) or not accuracy.examples:
            return "accuracy is no share of clips"
    return ""


_COUNTED = {
    "memory": tuple(f.name for f in fields(Memory)),
    "ceilings": tuple(f.name for f in fields(Ceilings)),
    "accuracy": ("seed", "examples", "train_s"),
}


def impossible_case(point: Point) -> str:
    """What of a point cannot be: a size that is none, or text that cannot be shown; empty where all can."""
    if text := unshowable(point):
        return f"the point's {text!r} has letters that cannot be shown"
    for name, value in point.case.items():
        numbers = value if isinstance(value, tuple) else (value,)
        small = all(-MOST < number < MOST for number in numbers if isinstance(number, (int, float)))
        if not small or (name in AXES and not _fits(AXES[name], value)):
            return f"the point's {name} is {value!r}"
    return ""


def unshowable(value: object) -> str:
    """The first text in a record that no page and no terminal can show; empty where all can be shown."""
    if isinstance(value, str):
        return "" if value.isprintable() else value
    for name, child in _children(value):
        if found := unshowable(name) or unshowable(child):
            return found
    return ""


def _fits(axis: Axis, value: Value) -> bool:
    """Whether a value is of the kind that an axis has."""
    match axis.values:
        case "flag":
            return isinstance(value, bool)
        case "word":
            return isinstance(value, str)
        case "sizes":
            return isinstance(value, tuple) or type(value) is int
        case "integer" | "count":
            return type(value) is int and value >= (axis.values == "integer")
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
