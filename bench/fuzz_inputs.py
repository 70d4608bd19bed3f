"""Generated run folders, most of them broken: input i is a function of a seed and of i."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vidbench.records import Accuracy, Ceilings, Counts, DeviceState, Environment, Error, Measurement, Memory
from vidbench.results import HEADER, LINES
from vidbench.run_format import UNDECODABLE, LineReader, encode_line, impossible, impossible_case
from vidbench.sweep import Point, Sweep

SHARES = {"line": 0.9965, "header": 0.002, "place": 0.001, "after": 0.00045, "report": 0.00005}
"""Of the inputs. line: one of the three lines of a run is broken; header: run.json is; place: other things than files
lie there; after: a run with odd values of the right types is loaded, framed and compared; report: is reported too."""

Special = Callable[[Path], None]


class Input(NamedTuple):
    """What is to be loaded: a file's content by its name, or what makes something else in its place."""

    kind: str
    files: Mapping[str, bytes | Special]


# --- what is broken ---------------------------------------------------------------------------------------------------

SWEEP = Sweep("conv3d", axes={"clip_length": (4, 8), "implementation": ("reference", "library")}, fixed={"width": 8})


def _measurements() -> list[Measurement]:
    """One of everything that a run can hold."""
    points = [replace(point, case={**point.case, "kernel_size": (1, 3, 3), "bias": True}) for point in SWEEP.points()]
    times = {"samples_s": (0.011, 0.012, 0.0105, 0.013, 0.0125, 0.0115), "stop": "converged", "wall_s": 1.0}
    counted = {"counts": Counts(10**9, {"closed_form": 10**9, "meta": 10**9}, ("aten::odd",)), "bytes_moved": 10**6}
    held = {"memory": Memory(10**6, 2 * 10**6, 10**8), "ceilings": Ceilings(1e11, 1e10), "params": 123}
    checked = {"error": Error(1e-7, 2e-6, 1e-7, 1e-7, 1e-7, 1e-7)}
    good: dict[str, Any] = {**times, **counted, **held, **checked}
    on_gpu: dict[str, Any] = {
        "host_samples_s": (1e-5, 2e-5, 1e-5, 1e-5, 3e-5, 1e-5),
        "energy_j": 0.5,
        "registers": 128,
        "spills": 4,
        "kernels": {"conv3d_kernel": 2, "copy_kernel": 1},
        "device_state": DeviceState(9, 1.7e9, 1.6e9, 1.8e9, 400.0, 60.0, {"sw_power_cap": 3}, 1, 80.0),
    }
    net = Point("c3d", "model", "eager", case={"clip_length": 8, "batch_size": 1, "height": 32, "width": 32})
    other = replace(net, workload="frame_pool_avg")
    task: dict[str, Any] = {"task": "frame_order", "clip_length": 8, "height": 32, "width": 32, "width_multiplier": 1.0}
    return [
        *(Measurement(point, 1, "ok", **good) for point in points),
        Measurement(net, 1, "ok", **good, trust="poor", trust_reasons=("drifted",)),
        Measurement(other, 1, "ok", **good, **on_gpu),
        *(
            Measurement(
                Point("c3d", "task", "eager", "evaluate", case={**task, "seed": seed}), 1, "ok",
                accuracy=Accuracy("frame_order", seed, 0.5 + seed / 10, 1 / 6, 600, 3.0, {"shuffled": 0.2}, 0.9),
            )
            for seed in (0, 1)
        ),
        Measurement(replace(points[0], dtype="bf16"), 1, "failed", "wrong", error=Error(math.nan, 1e-6, math.inf)),
        Measurement(replace(points[0], dtype="fp16"), 1, "oom", "out of memory", wall_s=0.1),
    ]  # fmt: skip


MEASUREMENTS = _measurements()
GOOD = [encode_line(one) for one in MEASUREMENTS]
ENVIRONMENT = Environment(
    "m-2", "cpu", 2, 2, 10**9, torch="2.11.0", python="3.11.7", git_commit="abc", clocks={"sm": math.nan},
    flops_per_s={"cpu/fp32": 1e11}, bytes_per_s={"cpu/1048576": 2e10},
)  # fmt: skip

MARKS = (
    "<script>fuzz()</script>", "</script><script>fuzz()</script>", '"><img src=x onerror=fuzz()>', "' onload='fuzz()",
    "]]><svg onload=fuzz()>", "<!--", "{{fuzz}}", "javascript:fuzz()", "|`*_\\", "$\\frac{", "$", "%s%n", "\x00",
    "\x1b[31m", "\n# fuzz", "\r", "\u2028", "\u202e", "é" * 300, "x" * 20_000, "", " ", "../../x", "/etc", "nan",
    "None", "😀", "\ufeff", "\uffff",
)  # fmt: skip
INTEGERS = (
    0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**30,
    10**300,
)  # fmt: skip
FLOATS = (
    0.0, -0.0, 5e-324, 1e-300, 1e-30, 1e-12, 0.5, -1.0, 1e9, 1e30, 1e300, 1.7976931348623157e308, math.nan,
    math.inf, -math.inf,
)  # fmt: skip
NAMES = ("latency_s", "point", "run_id", "status", "task", "case_task", "clip_length", "batch_size", "height", "kind",
         "mode", "implementation", "width_multiplier", "ceiling_flops_per_s", "seed", "index", "level_0")  # fmt: skip
"""Keys of a case that meet columns of a frame."""

TOKENS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"1" * 5000, b"1e-400", b"0x10", b"1.", b".5", b"+1",
    b"\"\\ud800\"", b"\"\\udc00\\ud800\"", b"\"\\u0000\"", b"\"\xff\"", b"\"\xed\xa0\x80\"", b"null", b"true", b"{}",
    b"[]", b"[[[[[[]]]]]]", b"\"", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\x00", b"\xef\xbb\xbf", b"//",
    b"'a'", b"\"nonfinite\"", b"\"point\"",
)  # fmt: skip
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+0-9.eE]+|[a-z]+|[\[\]{}:,]')


def _bytes(rng: random.Random, line: bytes) -> bytes:
    """Bits, bytes and slices changed, doubled, lost and joined with another line."""
    data = bytearray(line)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.randbytes(rng.choice((1, 1, 4)))
            case 2:
                del data[at : at + rng.choice((1, 2, 10, 100))]
            case 3:
                data[at:at] = data[at : at + rng.choice((1, 10, 100))]
            case 4:
                del data[at:]
            case 5:
                data[at:] = rng.choice(GOOD)[at:]
            case _:
                data[at:at] = rng.choice(TOKENS)
    return bytes(data)


def _tokens(rng: random.Random, line: bytes) -> bytes:
    """Tokens of JSON replaced, lost, doubled and swapped."""
    parts = TOKEN.findall(line)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(4):
            case 0:
                parts[at] = rng.choice(TOKENS)
            case 1 if len(parts) > 1:
                del parts[at]
            case 2:
                parts.insert(at, parts[other])
            case _:
                parts[at], parts[other] = parts[other], parts[at]
    return b"".join(parts) + b"\n"


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a record."""
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            _places(value[key], found)
    return found


def _wild(rng: random.Random, depth: int = 0) -> Any:
    match rng.randrange(8 if depth < 3 else 6):
        case 0:
            return rng.choice(INTEGERS)
        case 1:
            return rng.choice(FLOATS)
        case 2 | 3:
            return rng.choice((*MARKS, *NAMES))
        case 4:
            return None
        case 5:
            return rng.random() < 0.5
        case 6:
            return [_wild(rng, depth + 1) for _ in range(rng.randrange(4))]
        case _:
            return {rng.choice((*MARKS, *NAMES)): _wild(rng, depth + 1) for _ in range(rng.randrange(4))}


def _structure(rng: random.Random, line: bytes) -> bytes:
    """Values, keys and branches of the record replaced, lost, added and swapped."""
    record = json.loads(line)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = _places(record, [])
        if not places:
            break
        container, key = rng.choice(places)
        match rng.randrange(6):
            case 0 | 1:
                container[key] = _wild(rng)
            case 2:
                del container[key]
            case 3 if isinstance(container, dict):
                container[rng.choice((*MARKS, *NAMES, "nonfinite"))] = _wild(rng)
            case 4:
                other, place = rng.choice(places)
                with contextlib.suppress(KeyError, IndexError):
                    container[key], other[place] = other[place], container[key]
                    json.dumps(record)
            case _:
                path = [rng.choice((*record, 0, -1, 7, "output", "")) for _ in range(rng.randrange(4))]
                record["nonfinite"] = [[path, rng.choice(("NaN", "inf", "-inf", "", 3, None))]]
                if path and path[0] in record and rng.random() < 0.5:
                    record[path[0]] = None
    try:
        return json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass") + b"\n"
    except (ValueError, RecursionError):  # a branch was put into itself
        return line


def _doubled(rng: random.Random, line: bytes) -> bytes:
    """A key is there twice."""
    key = rng.choice(re.findall(rb'"([a-z_]+)":', line))
    value = json.dumps(_wild(rng)).encode()
    return b'{"' + key + b'":' + value + b"," + line[1:]


def _huge(rng: random.Random, line: bytes) -> bytes:
    """Deep, long or numerous."""
    match rng.randrange(5):
        case 0:
            depth = rng.choice((100, 1000, 100_000))
            return b"[" * depth + (b"]" * depth if rng.random() < 0.5 else b"") + b"\n"
        case 1:
            depth = rng.choice((100, 1000, 20_000))
            return line[:-2] + b',"nonfinite":' + b"[" * depth + b"]" * depth + b"}\n"
        case 2:
            return line.replace(b'"samples_s":[', b'"samples_s":[' + b"0.1," * rng.choice((1000, 30_000)))
        case 3:
            return line[:-2] + b',"reason":"' + b"x" * rng.choice((10_000, 1_000_000)) + b'"}\n'
        case _:
            return line.replace(b'"case":{', b'"case":{' + b"".join(b'"k%d":%d,' % (i, i) for i in range(3000)))


def _odd(rng: random.Random, line: bytes) -> bytes:
    """A value of the right type that nobody expects."""
    record = json.loads(line)
    case = record["point"]["case"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = [(c, k) for c, k in _places(record, []) if not isinstance(c[k], (dict, list)) and k != "status"]
        container, key = rng.choice(places)
        value = container[key]
        if isinstance(value, str):
            container[key] = rng.choice((*MARKS, *NAMES))
        elif isinstance(value, bool) or value is None:
            pass
        elif isinstance(value, int):
            container[key] = rng.choice(INTEGERS)
        else:
            container[key] = rng.choice([one for one in FLOATS if math.isfinite(one)])
        if rng.random() < 0.3:
            case[rng.choice((*MARKS, *NAMES))] = rng.choice((1, 7, 2**40, 0.5, "word", True, [1, 2], rng.choice(MARKS)))
        if rng.random() < 0.1:
            record["status"] = rng.choice(("ok", "skipped", "failed", "oom", "timeout", "crashed"))
        if rng.random() < 0.1:
            record["samples_s"] = [rng.choice(FLOATS[2:9]) for _ in range(rng.choice((0, 1, 2, 7)))]
    return json.dumps(record).encode() + b"\n"


def _loads(line: bytes) -> bool:
    try:
        measurement, _ = LineReader().read(line)
        return not (impossible(measurement) or impossible_case(measurement.point))
    except UNDECODABLE:
        return False


MUTATIONS = (_bytes, _bytes, _tokens, _tokens, _structure, _structure, _structure, _odd, _odd, _doubled)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link(target: str) -> Special:
    return lambda path: path.symlink_to(target)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 38)


def _unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


PLACES: tuple[Special, ...] = (
    Path.mkdir, _fifo, _sparse, _unreadable, _link("nowhere"), _link("."), _link(LINES), _link(HEADER),
    _link("/dev/zero"),
    _link("/dev/full"), _link("/proc/self/mem"), _link("/dev/tty"), _link("x" * 300),
)  # fmt: skip


def make(seed: int, index: int, header: bytes) -> Input:
    """Input `index` of a seed; `header` is a good run.json."""
    rng = random.Random(f"{seed}/{index}")
    kind = rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
    if kind == "line":
        three = [rng.choice(GOOD[:4]), rng.choice(GOOD), rng.choice(GOOD[4:])]
        at = rng.randrange(3)
        mutation = rng.choice(MUTATIONS) if rng.random() > 0.002 else _huge
        three[at] = mutation(rng, three[at])
        return Input(kind, {LINES: b"".join(three)})
    if kind == "header":
        text = rng.choice((_bytes, _tokens, _structure, _structure))(rng, header)
        if rng.random() < 0.02:
            text = b"[" * 100_000 if rng.random() < 0.5 else header.rstrip()[:-1] + b"," + b'"x":1,' * 10**5 + b'"y":1}'
        return Input(kind, {HEADER: text, LINES: GOOD[0]})
    if kind == "place":
        files: dict[str, bytes | Special] = {HEADER: header, LINES: GOOD[0]}
        for name in rng.choice(((HEADER,), (LINES,), (LINES,), (HEADER, LINES))):
            files[name] = rng.choice(PLACES)
        return Input(kind, files)
    lines = list(GOOD)
    for number in rng.choice(((2,), (2, 3))):
        lines += [encode_line(replace(one, round=number)) for one in MEASUREMENTS]
    for _ in range(rng.choice((1, 2, 3))):
        at = rng.randrange(len(lines))
        lines[at] = next(filter(_loads, (_odd(rng, lines[at]) for _ in range(20))), lines[at])
    files = {HEADER: header, LINES: b"".join(lines)}
    if rng.random() < 0.5:
        record = json.loads(header)
        for name in rng.sample(("suite", "command", "input", "created_utc"), 2):
            record[name] = rng.choice(MARKS)
        for name in rng.sample(("machine", "cpu", "gpu", "torch", "git_commit", "driver"), 2):
            record["environment"][name] = rng.choice(MARKS)
        record["environment"]["flops_per_s"] = {rng.choice(("cpu/fp32", "x", "", *MARKS)): rng.choice(FLOATS[:9])}
        record["environment"]["bytes_per_s"] = {rng.choice(("cpu/4", "cpu/", "x", *MARKS)): rng.choice(FLOATS[:9])}
        files[HEADER] = json.dumps(record).encode()
    return Input(kind, files)


def put(made: Input, folder: Path) -> None:
    """Makes the folder of an input anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in made.files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
