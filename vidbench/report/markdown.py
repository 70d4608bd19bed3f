"""The short report: the answer, the fastest points, what did not run, links to the figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vidbench.report import tables
from vidbench.report.style import missing

if TYPE_CHECKING:
    import pandas as pd

    from vidbench.results import Run

TOP = 20
GONE = 30
FIGURES_SHOWN = ("latency_s", "throughput_clips_per_s", "peak_memory_bytes", "achieved_flops_per_s", "top1_accuracy")


def cell(text: object) -> str:
    """Text that stays in its cell and says nothing to a Markdown reader but itself."""
    plain = " ".join(str(text).split())
    for mark in "\\`*_[]|~":
        plain = plain.replace(mark, f"\\{mark}")
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> list[str]:
    """A Markdown table; the columns named in `right` are aligned to the right."""
    rules = ["--:" if head in right else "---" for head in heads]
    lines = [f"| {' | '.join(map(cell, heads))} |", f"| {' | '.join(rules)} |"]
    return [*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)]


def render(runs: Sequence[Run], frame: pd.DataFrame, title: str, drawn: Sequence[tuple[str, str]]) -> str:
    """The whole of report.md; `drawn` are the names and headings of the figures."""
    lines = [f"# {cell(title)}", ""]
    for run in runs:
        lines.append(f"- {cell(run.id)}: {cell(tables.machine_line(run))}, {cell(run.created_utc)}")
    lines.append("")
    lines += [cell(sentence) + "  " for sentence in tables.verdicts(frame)]
    lines += ["", cell(tables.standing(frame)), ""]
    lines += [f"> warning: {cell(warning)}" for run in runs for warning in run.warnings]

    timed = frame[(frame["status"] == "ok") & frame["latency_s"].notna()].sort_values("latency_s", kind="stable")
    if len(timed):
        apart = tables.sparse(frame)
        keys = [name for name in tables.varying(frame) if name not in apart]
        also = tables.case_texts(timed.head(TOP), apart) if apart else []
        figures = [name for name in FIGURES_SHOWN if timed[name].notna().any()]
        numbers = [f"{tables.SHOWN[name].head} ({tables.SHOWN[name].unit})" for name in figures]
        heads = [*keys, *numbers, "trust", *(["also"] if also else [])]
        body = [
            [
                *("–" if missing(value) else value for value in row[: len(keys)]),
                *(
                    tables.shown(name, value, unit=False)
                    for name, value in zip(figures, row[len(keys) : -1], strict=True)
                ),
                row[-1],
                *([also[index]] if also else []),
            ]
            for index, row in enumerate(timed[[*keys, *figures, "trust"]].head(TOP).itertuples(index=False, name=None))
        ]
        lines += ["", "## Fastest points", "", *table(heads, body, right=numbers)]
        if len(timed) > TOP:
            lines += ["", f"{len(timed) - TOP:,} slower points are left out; measurements.csv has every one."]
        if fixed := tables.constants(frame):
            lines += ["", "In every row: " + ", ".join(f"{cell(k)} {cell(v)}" for k, v in fixed.items()) + "."]

    gone = tables.gone(frame)
    if len(gone):
        body = [list(row) for row in gone[["point", "status", "reason"]].fillna("").head(GONE).itertuples(index=False)]
        lines += ["", "## Points that did not run", "", *table(("point", "status", "reason"), body)]
        if len(gone) > GONE:
            lines += ["", f"{len(gone) - GONE:,} more are left out; measurements.csv has every one."]

    if drawn:
        lines += ["", "## Figures", "", *(f"- [{cell(title)}](figures/{name}.svg)" for name, title in drawn)]
    lines += ["", "## Again", "", *(f"    {line}" for run in runs for line in run.command.splitlines()), ""]
    return "\n".join(lines)
