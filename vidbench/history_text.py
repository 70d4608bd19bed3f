"""What changed in a history, as text for a terminal and JSON for scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vidbench.changes import KINDS, Change, Changes, Series, Spot
from vidbench.compare_text import apart, label
from vidbench.report.tables import digits
from vidbench.significance import ratio_of

SHOWN = 20
"""Changes of a kind that the text names."""


def labels(every: Sequence[Series]) -> dict[tuple[str, ...], str]:
    """What each series is, by its key: the point, and the machine and the input where they differ."""
    names = apart(list({one.point.key: one.point for one in every}.values()))
    machines, inputs = ({getattr(one, name) for one in every} for name in ("machine", "input"))
    found = {}
    for one in every:
        parts = [label(one.point, names)]
        parts += [f"on {one.machine}"] if len(machines) > 1 else []
        parts += [f"of {one.input or 'synthetic clips'}"] if len(inputs) > 1 else []
        found[one.key] = " ".join(parts)
    return found


def headline(found: Sequence[Change]) -> str:
    """How many changes there are of each kind, in one line."""
    counts = {words: sum(change.kind == kind for change in found) for kind, words in KINDS.items()}
    return ", ".join(f"{count} {words}" for words, count in counts.items() if count) or "Nothing changed"


def text(changes: Changes) -> str:
    """For a terminal: how many changes there are, then the largest of each kind, the slower ones first."""
    history, found = changes.history, changes.found
    names = labels(changes.series)
    machines = sorted({one.machine for one in changes.series})
    lines = [
        headline(found),
        f"  {history.runs:,} runs of {len(history.points):,} points on {'; '.join(machines)}",
        f"  in the order of {history.order}",
    ]
    for kind in KINDS:
        mine = [change for change in found if change.kind == kind]
        if mine:
            lines.append(f"{kind}: {len(mine)}")
        for change in mine[:SHOWN]:
            lines += [f"  {names[change.series.key]}: {_what(change)}", f"    {_where(change)}"]
        if len(mine) > SHOWN:
            lines.append(f"  … and {len(mine) - SHOWN} more, in --format json")
    return "\n".join(lines)


def _what(change: Change) -> str:
    """12.3 ms → 13.6 ms, +10.2% (+8.0% to +12.6%), p = 2e-09."""
    before, after = change.before, change.after
    if isinstance(before, str) or isinstance(after, str):
        # A worker's last words may hold anything.
        reason = "".join(letter if letter.isprintable() else " " for letter in change.reason)
        return f"{after}: {reason}" if reason else str(after)
    if change.effect is None:
        return f"{change.metric} {before:,.0f} → {after:,.0f}{_ratio(change)}"
    low, high = (end - 1 for end in change.effect.ratio_interval)
    times = " → ".join(f"{digits(1e3 * value, 4)} ms" for value in (before, after))
    return f"{times}{_ratio(change)} ({low:+.1%} to {high:+.1%}), p = {change.p:.0e}"


def _ratio(change: Change) -> str:
    return f", {ratio_of(change.size) - 1:+.1%}" if math.isfinite(change.size) else ""


def _where(change: Change) -> str:
    """Since 2222222 (2026-01-02), before it 1111111 (2026-01-01); 12 runs → 8 runs; torch was 2.11, is 2.12."""
    runs = " → ".join(f"{count} {'run' if count == 1 else 'runs'}" for count in change.runs)
    parts = [f"since {spot(change.first_after)}, before it {spot(change.last_before)}", runs]
    parts += [f"it ran again at {spot(change.again)}"] if change.again is not None else []
    parts += [f"{name} was {then or 'none'}, is {now or 'none'}" for name, (then, now) in change.causes.items()]
    return "; ".join(parts)


def spot(run: Spot) -> str:
    """A run's commit and day; what had changes that no commit holds has a +."""
    commit = f"{run.git_commit[:9]}{'+' if run.git_dirty else ''}" if run.git_commit else run.run_id
    return f"{commit} ({run.created_utc[:10]})"


def as_json(changes: Changes) -> str:
    """Everything, for scripts."""
    history = changes.history
    document: dict[str, Any] = {
        "headline": headline(changes.found),
        "runs": history.runs,
        "points": len(history.points),
        "series": len(changes.series),
        "machines": sorted({one.machine for one in changes.series}),
        "order": history.order,
        "warnings": list(history.warnings),
        "changes": [_change(change) for change in changes.found],
    }
    return json.dumps(document, indent=2)


def _change(change: Change) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": change.kind,
        "point": change.series.point.key,
        "machine": change.series.machine,
        "input": change.series.input,
        "metric": change.metric,
        "before": change.before,
        "after": change.after,
        "last_before": asdict(change.last_before),
        "first_after": asdict(change.first_after),
        "runs": list(change.runs),
        "differs": {name: list(pair) for name, pair in change.causes.items()},
    }
    if change.effect is not None:
        found |= {
            "ratio": change.effect.ratio, "ratio_interval": list(change.effect.ratio_interval), "p": change.p,
        }  # fmt: skip
    if change.kind == "STOPPED":
        found |= {"reason": change.reason, "again": None if change.again is None else asdict(change.again)}
    return found


FORMATS = {"text": text, "json": as_json}
