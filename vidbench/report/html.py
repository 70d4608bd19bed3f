"""The report as one page that needs nothing but itself: style, script, figures and every row are inside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from vidbench.report import style, tables

if TYPE_CHECKING:
    import pandas as pd

    from vidbench.results import Run

GONE_SHOWN = 200
ACCURACY_SHOWN = 500


def asset(name: str) -> str:
    """The text of a file beside this module."""
    return resources.files("vidbench.report").joinpath(name).read_text(encoding="utf-8")


def script_safe(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def render(
    runs: Sequence[Run],
    frame: pd.DataFrame,
    title: str,
    drawn: Sequence[tuple[str, str, str]],
    absent: Sequence[tuple[str, str]],
    profiles: Mapping[str, str],
) -> str:
    """The page.

    Args:
        drawn: Name, heading and SVG of each figure.
        absent: Heading of each figure that cannot be drawn, and what it would need.
        profiles: Where the profile of a point lies, by the point's key.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(asset("page.html.j2"))
    gone = tables.gone(frame)
    accuracy = tables.accuracy_rows(runs)
    environments = [tables.environment_rows(run) for run in runs]
    data = tables.embedded(frame) | {
        "palette": style.palette(frame["implementation"].unique()),
        "cycle": style.CYCLE,
        "profiles": dict(profiles),
    }
    return template.render(
        title=title,
        runs=[
            {
                "id": run.id,
                "suite": run.suite,
                "created": run.created_utc.replace("T", " ").replace("Z", " UTC"),
                "machine": tables.machine_line(run),
                "input": run.input,
                "command": run.command,
                "environment": environment_rows,
            }
            for run, environment_rows in zip(runs, environments, strict=True)
        ],
        differing=tables.differing(environments),
        beside=tables.side_by_side(frame),
        warnings=[warning for run in runs for warning in run.warnings],
        verdicts=tables.verdicts(frame),
        standing=tables.standing(frame),
        figures=[
            {"name": name, "title": heading, "svg": Markup(style.inline(svg, name))} for name, heading, svg in drawn
        ],
        absent=absent,
        constants=tables.constants(frame),
        gone=gone[["point", "status", "reason"]].fillna("").head(GONE_SHOWN).to_dict("records"),
        gone_count=len(gone),
        accuracy=accuracy[:ACCURACY_SHOWN],
        accuracy_count=len(accuracy),
        count=len(frame),
        data=Markup(script_safe(data)),
        plotly=Markup(asset("vendored/plotly-gl2d.min.js")),
        explorer=Markup(asset("explore.js")),
        css=Markup(asset("page.css")),
        js=Markup(asset("page.js")),
    )
