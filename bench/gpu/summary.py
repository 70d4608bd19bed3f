"""The rows of a call as a page: what passed, what is wrong, what is faster than what, what is left."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from bench.gpu import plan
from bench.gpu.session import FINAL, Row, Session

BAD_SHOWN = 25
PEERS = ("library", "compiled")
CHECKED = ("op", "implementation", "dtype", "direction")


def summary(session: Session) -> str:
    """The whole page, Markdown."""
    parts = [
        f"# GPU call {session.call}",
        _environment(session.latest("environment")),
        _left(session),
        _check(session.latest("check")),
        _sanitize(session.latest("sanitize")),
        _layers(session.latest("kernels")),
        _tune(session.latest("tune")),
        _models(session.latest("models")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [" | ".join(map(str, row)) for row in rows]
    head = list(head)
    return "\n".join(f"| {line} |" for line in (" | ".join(head), " | ".join("---" for _ in head), *lines))


def _environment(rows: list[Row]) -> str:
    found = [row["environment"] for row in rows if "environment" in row]
    if not found:
        return f"No environment: {rows[-1]['reason'] if rows else 'not reached'}"
    e = found[-1]
    flops = ", ".join(f"{name.split('/')[1]} {rate / 1e12:.0f}" for name, rate in e["flops_per_s"].items())
    sizes = {int(name.split("/")[1]) / 2**20: rate / 1e12 for name, rate in e["bytes_per_s"].items()}
    copies = ", ".join(f"{size:g} MiB {rate:.2f}" for size, rate in sizes.items())
    return (
        f"{e['machine']}; driver {e['driver']}, CUDA {e['cuda']}, cuDNN {e['cudnn']}, torch {e['torch']}, "
        f"Triton {e['triton']}, Python {e['python']}, commit {e['git_commit']}\n\n"
        f"Measured ceilings: TFLOP/s {flops}; copy TB/s {copies}"
    )


def _left(session: Session) -> str:
    if not any(session.unreached.values()):
        return "Everything asked for was reached."
    left = ", ".join(f"{part}: {number}" for part, number in session.unreached.items() if number)
    return f"Time ran out; units left (check: 1 stands for the rest of the tests): {left}. Go on with --resume."


def _bad(rows: list[Row], *names: str) -> str:
    """What did not pass, at most some of it; the rest is in the rows."""
    bad = [row for row in rows if row["status"] not in FINAL]
    if not bad:
        return ""
    lines = []
    for row in bad[:BAD_SHOWN]:
        what = " ".join(str(row[name]) for name in names if row.get(name))
        lines.append(f"- {row['status']}: {what}: {row['reason'][:200]}")
    if len(bad) > BAD_SHOWN:
        lines.append(f"- and {len(bad) - BAD_SHOWN} more")
    return "\n\n" + "\n".join(lines)


def _check(rows: list[Row]) -> str:
    """By op, implementation, dtype and direction; what an implementation cannot run at all stands below the table."""
    if not rows:
        return ""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") for name in CHECKED), []).append(row)
    lines: list[list[object]] = []
    never: dict[str, list[str]] = {}
    for key, group in sorted(groups.items()):
        passed, skipped = (sum(row["status"] == status for row in group) for status in ("ok", "skipped"))
        wrong = len(group) - passed - skipped
        errors = [row["over_gate"] for row in group if row.get("over_gate") is not None]
        reasons = "; ".join(sorted({row["reason"] for row in group if row["status"] == "skipped"}))
        if passed or wrong:
            worst = f"{max(errors):.2g}" if errors else ""
            lines.append([*key, passed, wrong or "", skipped or "", worst, reasons[:80]])
        else:
            never.setdefault(f"{'/'.join(key[:2])}: {reasons[:120]}", []).append(" ".join(key[2:]))
    head = (*CHECKED, "passed", "FAILED", "skipped", "worst error / gate", "why skipped")
    cannot = "".join(f"\n- {what} ({', '.join(where)})" for what, where in never.items())
    cannot = f"\n\nSkipped throughout:\n{cannot}" if cannot else ""
    return f"## Checks\n\n{_table(head, lines)}{_bad(rows, 'unit')}{cannot}"


def _sanitize(rows: list[Row]) -> str:
    if not rows:
        return ""
    count = {status: sum(row["status"] == status for row in rows) for status in sorted({row["status"] for row in rows})}
    counts = ", ".join(f"{number} {status}" for status, number in count.items())
    reasons = {row["reason"] for row in rows if row["status"] == "skipped"}
    skipped = f"\n\nSkipped because: {'; '.join(sorted(reasons))[:400]}" if reasons else ""
    return f"## compute-sanitizer\n\n{counts}{skipped}{_bad(rows, 'unit')}"


def _layers(rows: list[Row]) -> str:
    """Times of the best peer and of every kernel of ours, their ratio round by round, and the share of the floor."""
    if not rows:
        return ""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.get("regime") in ("cold", "graph") and row["status"] == "ok":
            case = plan.text_of(row["op"], row["case"])
            case = f"{case} (graph)" if row["regime"] == "graph" else case
            cases.setdefault((case, row["dtype"], row["direction"]), []).append(row)
    lines: list[list[object]] = []
    ratios: dict[tuple[str, ...], list[float]] = {}
    for key, group in cases.items():
        peers = [row for row in group if row["implementation"] in PEERS]
        ours = [row for row in group if row["implementation"] not in PEERS]
        if not peers:
            continue
        peer = min(peers, key=lambda row: row["median_s"])
        text = f"{peer['way']} {peer['median_s'] * 1e6:.1f}"
        if not ours:
            lines.append([*key, text, "", "", f"{peer['floor_s'] * 1e6:.1f} ({peer['bound']})", ""])
        for row in ours:
            ratio, spread = speed_up(peer, row)
            ratios.setdefault((row["op"], row["implementation"], row["dtype"], row["direction"]), []).append(ratio)
            time = f"{row['implementation']} {row['median_s'] * 1e6:.1f}"
            floor = f"{row['floor_s'] * 1e6:.1f} ({row['bound']})"
            lines.append([*key, text, time, f"{ratio:.2f} ±{spread:.0%}", floor, f"{row['floor_fraction']:.0%}"])
    means = [
        [*key, len(found), *(f"{v:.2f}" for v in (statistics.geometric_mean(found), min(found), max(found)))]
        for key, found in sorted(ratios.items())
    ]
    head = ("case", "dtype", "direction", "best peer, µs", "kernel, µs", "times faster", "floor, µs", "of the floor")
    whole = ("op", "implementation", "dtype", "direction", "cases", "geometric mean", "least", "most")
    return (
        "## Times faster than the best peer, cold caches\n\n"
        f"{_table(whole, means)}\n\n## Layers, cold caches or replayed\n\n{_table(head, lines)}"
        f"{_bad(rows, 'unit', 'way', 'regime')}"
    )


def speed_up(peer: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float, float]:
    """How many times faster a row is than its peer: the mean of the rounds' log ratios, and their half range."""
    logs = [
        math.log(statistics.median(theirs) / statistics.median(ours))
        for theirs, ours in zip(peer["samples_s"], row["samples_s"], strict=True)
    ]
    return math.exp(statistics.mean(logs)), (max(logs) - min(logs)) / 2


def _tune(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        if row.get("best") is None:
            continue
        medians = {
            str(trial["config"]): statistics.median(trial["samples_s"]) for trial in row["trials"] if trial["samples_s"]
        }
        before, best = medians.get(str(row["before"])), medians.get(str(row["best"]))
        gain = f"{before / best:.2f}" if before and best else ""
        config = " ".join(f"{name}={value}" for name, value in row["best"].items())
        if row["best"] != row["before"]:
            lines.append([row["kernel"], row["key"], row["source"], gain, config])
    head = ("kernel", "key", "before", "whole call times faster", "now")
    kernels = sum(1 for row in rows if row.get("best") is not None)
    return (
        f"## Tuned\n\n{kernels} launches, {len(lines)} changed.\n\n{_table(head, lines)}{_bad(rows, 'unit', 'kernel')}"
    )


def _models(rows: list[Row]) -> str:
    if not rows:
        return ""
    eager = {(r["model"], r["mode"], r["dtype"]): r.get("median_s") for r in rows if r["implementation"] == "eager"}
    lines = []
    for row in rows:
        if row.get("median_s"):
            base = eager.get((row["model"], row["mode"], row["dtype"]))
            ratio = f"{base / row['median_s']:.2f}" if base else ""
            ms = f"{row['median_s'] * 1e3:.2f}"
            peak = f"{row['memory']['peak_bytes'] / 2**30:.2f}" if row.get("memory") else ""
            lines.append(
                [row["model"], row["mode"], row["dtype"], row["implementation"], ms, ratio, peak, row["trust"]]
            )
    head = ("model", "mode", "dtype", "implementation", "ms", "times faster than eager", "peak GiB", "trust")
    skipped = "\n".join(f"- {row['unit']}: {row['reason']}" for row in rows if row["status"] == "skipped")
    return f"## Models, channels-last, hot caches\n\n{_table(head, lines)}{_bad(rows, 'unit')}\n\n{skipped}"
