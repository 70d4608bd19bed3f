"""A comparison as text for a terminal, Markdown for a pull request, JSON for scripts and JUnit XML for CI."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from vidbench.compare import AccuracyVerdict, Comparison, PointVerdict
from vidbench.results import Run
from vidbench.sweep import POINT_AXES, Point, text_of

SHOWN = 10
"""Points of a kind that a pull request's comment names."""

ORDER = ("UNDECIDED", "SLOWER", "MISSING", "FASTER", "NEW", "SAME", "NOT COMPARED")


def headline(comparison: Comparison) -> str:
    """The verdict of all in one line."""
    counts = comparison.counts()
    worse = {
        "slower": counts.get("SLOWER", 0),
        "missing": counts.get("MISSING", 0),
        "worse in an exact figure": sum(any(change.worse for change in one.changes) for one in comparison.points),
        "less accurate": sum(one.worse for one in comparison.accuracies),
    }
    found = [f"{number} {words}" for words, number in worse.items() if number]
    total = f"of {len(comparison.points)} points"
    if found:
        return f"WORSE: {', '.join(found)} {total}"
    if comparison.not_compared:
        return f"Nothing became worse in what can be compared {total}; TIMES NOT COMPARED"
    if undecided := counts.get("UNDECIDED", 0):
        return f"UNDECIDED: {undecided} {total}; nothing is known to have become worse"
    return f"Nothing became worse {total}"


def label(point: Point, apart: Sequence[str]) -> str:
    """A point in words: what it is, and what tells it from the others."""
    case = " ".join(f"{name}={text_of(point.case[name])}" for name in apart if name in point.case)
    fields = " ".join(str(getattr(point, name)) for name in apart if name in POINT_AXES and name != "implementation")
    return " ".join(part for part in (f"{point.workload}/{point.implementation}", fields, case) if part)


def apart(points: Sequence[Point]) -> list[str]:
    """The axes in which any two points of one workload differ."""
    values: dict[str, dict[str, set[str]]] = {}
    for name in dict.fromkeys((*POINT_AXES, *(name for point in points for name in point.case))):
        for point in points:
            value = getattr(point, name) if name in POINT_AXES else point.case.get(name, "")
            values.setdefault(name, {}).setdefault(point.workload, set()).add(text_of(value))
    return [name for name, of in values.items() if any(len(found) > 1 for found in of.values())]


def _seconds(value: float | None) -> str:
    if value is None:
        return "?"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.4g} {unit}"
    return f"{value * 1e9:.4g} ns"


def _change(one: PointVerdict) -> str:
    """12.3 ms → 13.6 ms, +10.2 % (+8.0 % to +12.6 %)."""
    if one.base_s is None or one.new_s is None:
        return _seconds(one.base_s if one.new_s is None else one.new_s)
    text = f"{_seconds(one.base_s)} → {_seconds(one.new_s)}"
    if one.effect is None:
        return text
    low, high = one.effect.ratio_interval
    return f"{text}, {one.effect.ratio - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})"


def _exact(one: PointVerdict) -> list[str]:
    return [
        f"{change.metric} {change.base:,.0f} → {change.new:,.0f}{' (worse)' if change.worse else ''}"
        for change in one.changes
    ]


def _why(one: PointVerdict) -> str:
    return f"why: {', '.join(one.causes)}" if one.causes and one.verdict != "SAME" else ""


def _accuracy(one: AccuracyVerdict) -> str:
    text = f"{one.base.mean:.1%} → {one.new.mean:.1%}, {100 * one.difference.mean:+.1f} points"
    if not math.isnan(one.difference.low):
        text += f" ({100 * one.difference.low:+.1f} to {100 * one.difference.high:+.1f})"
    return text


def _sorted(points: Sequence[PointVerdict]) -> list[PointVerdict]:
    """The largest change first."""
    return sorted(points, key=lambda one: -abs(one.effect.log_ratio) if one.effect is not None else 0.0)


def _said(one: PointVerdict, names: Sequence[str]) -> str:
    parts = [part for part in (_change(one), one.reason, *_exact(one), _why(one)) if part]
    return f"{label(one.point, names)}: {'; '.join(parts)}"


def _context(comparison: Comparison) -> list[str]:
    """What a reader must know besides the verdicts."""
    lines = [f"times: {comparison.not_compared}"] if comparison.not_compared else []
    lines += [f"noise: {comparison.run_noise}"] if comparison.run_noise else []
    lines += [f"differs: {name} was {then}, is {now}" for name, (then, now) in comparison.causes.items()]
    return lines


def text(comparison: Comparison, base: Run, new: Run) -> str:
    """For a terminal: the verdict, then what is undecided, worse and better."""
    names = apart([one.point for one in comparison.points])
    lines = [headline(comparison), f"BASE {base.folder}", f"NEW  {new.folder}"]
    lines += [f"  {line}" for line in _context(comparison)]
    for verdict in ORDER:
        mine = _sorted([one for one in comparison.points if one.verdict == verdict])
        quiet = [one for one in mine if not one.changes] if verdict in ("SAME", "NOT COMPARED") else []
        if mine:
            lines.append(f"{verdict}: {len(mine)}")
        lines += [f"  {_said(one, names)}" for one in mine if one not in quiet]
    for found in comparison.accuracies:
        lines.append(f"accuracy {found.verdict}: {found.what}: {_accuracy(found)}")
    return "\n".join(lines)


def markdown(comparison: Comparison, base: Run, new: Run) -> str:
    """For a pull request's comment: the verdict, the worst ten, the counts."""
    from vidbench.report.markdown import cell, table

    names = apart([one.point for one in comparison.points])
    counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(comparison.counts().items()))
    lines = [f"**{cell(headline(comparison))}**", "", f"{counts or 'no point'}: {cell(base.id)} → {cell(new.id)}"]
    lines += [f"- {cell(line)}" for line in _context(comparison)]
    worst = [one for one in comparison.points if one.worse]
    worst = _sorted([one for one in worst if one.verdict != "MISSING"]) + [o for o in worst if o.verdict == "MISSING"]
    worst += _sorted([one for one in comparison.points if one.verdict == "UNDECIDED" and not one.worse])
    if worst:
        rows = [
            (
                one.verdict,
                label(one.point, names),
                _change(one),
                "; ".join(filter(None, (one.reason, *_exact(one), _why(one)))),
            )
            for one in worst[:SHOWN]
        ]
        lines += ["", *table(("verdict", "point", "time", ""), rows)]
        if len(worst) > SHOWN:
            lines.append(f"\n… and {len(worst) - SHOWN} more")
    changed = [one for one in comparison.accuracies if one.verdict != "SAME"]
    if changed:
        lines += ["", *table(("accuracy", "of", ""), [(one.verdict, one.what, _accuracy(one)) for one in changed])]
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison, base: Run, new: Run) -> str:
    """Everything, for scripts."""
    document: dict[str, Any] = {
        "worse": comparison.worse,
        "headline": headline(comparison),
        "counts": comparison.counts(),
        "base": {"id": base.id, "folder": str(base.folder), "git_commit": base.environment.git_commit},
        "new": {"id": new.id, "folder": str(new.folder), "git_commit": new.environment.git_commit},
        "not_compared": comparison.not_compared or None,
        "run_noise": comparison.run_noise or None,
        "differs": {name: list(map(_plain, pair)) for name, pair in comparison.causes.items()},
        "points": [_point(one) for one in comparison.points],
        "accuracies": [
            {
                "what": one.what,
                "verdict": one.verdict,
                "base": one.base.mean,
                "new": one.new.mean,
                "difference": one.difference.mean,
                "interval": [_number(one.difference.low), _number(one.difference.high)],
            }
            for one in comparison.accuracies
        ],
    }
    return json.dumps(document, indent=2)


def _plain(value: object) -> object:
    return value if isinstance(value, (str, int, float, bool, type(None), dict)) else str(value)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _point(one: PointVerdict) -> dict[str, Any]:
    found: dict[str, Any] = {
        "point": one.point.key,
        "verdict": one.verdict,
        "worse": one.worse,
        "reason": one.reason or None,
        "base_s": one.base_s,
        "new_s": one.new_s,
        "changes": [asdict(change) for change in one.changes],
        "notes": list(one.notes),
        "causes": list(one.causes),
    }
    if one.effect is not None:
        found |= {
            "ratio": one.effect.ratio, "ratio_interval": list(one.effect.ratio_interval), "p": one.effect.p,
        }  # fmt: skip
    return found


def junit(comparison: Comparison, base: Run, new: Run) -> str:
    """JUnit XML: a test case for every point; what became worse fails, what is undecided is skipped."""
    names = apart([one.point for one in comparison.points])
    worse = sum(one.worse for one in comparison.points) + sum(one.worse for one in comparison.accuracies)
    undecided = sum(one.verdict == "UNDECIDED" and not one.worse for one in comparison.points)
    suite = ElementTree.Element(
        "testsuite",
        name=f"vidbench compare {base.id} {new.id}",
        tests=str(len(comparison.points) + len(comparison.accuracies)),
        failures=str(worse),
        skipped=str(undecided),
    )
    for one in comparison.points:
        case = ElementTree.SubElement(suite, "testcase", classname=one.point.workload, name=one.point.key)
        said = _printable(_said(one, names))
        if one.worse:
            ElementTree.SubElement(case, "failure", message=said, type=one.verdict)
        elif one.verdict in ("UNDECIDED", "NOT COMPARED"):
            ElementTree.SubElement(case, "skipped", message=said)
        else:
            ElementTree.SubElement(case, "system-out").text = said
    for found in comparison.accuracies:
        case = ElementTree.SubElement(suite, "testcase", classname="accuracy", name=found.what)
        if found.worse:
            ElementTree.SubElement(case, "failure", message=_accuracy(found), type=found.verdict)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _printable(said: str) -> str:
    """XML has no place for control characters, which a worker's last words may hold."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in said)


FORMATS = {"text": text, "markdown": markdown, "json": as_json, "junit": junit}
