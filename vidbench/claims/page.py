"""What came of the claims, as a page, a short text, a table and figures. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidbench.claims import Claim, Finding, Judged, Outcome, Plot, at_best_rate, frame, said
from vidbench.metrics import interval
from vidbench.sweep import RequestError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vidbench.claims.investigate import Header

HOW = (
    "A claim is SUPPORTED where each effect that it predicts lies beyond its margin with its whole 95 % interval over "
    "seeds (of timings: over fresh processes), REFUTED where one lies on the other side with its whole interval, and "
    "UNDECIDED otherwise, or where a control fails. A verdict holds for this protocol and this machine: small "
    "networks, generated clips."
)


def write(header: Header, findings: Sequence[Finding], outcomes: Sequence[Outcome], out: Path) -> Path:
    """Writes claims.html, claims.md, experiments.csv and figures/*.svg.

    Returns:
        The path of claims.html.

    Raises:
        RequestError: `out` cannot be written.
    """
    import jinja2
    from markupsafe import Markup

    from vidbench.report import style
    from vidbench.report.html import asset

    table = frame(outcomes)
    pictures = out / "figures"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = out / "claims.html"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        entries: list[dict[str, Any]] = []
        for finding in findings:
            picture = pictures / f"{finding.claim.name}.svg"
            picture.unlink(missing_ok=True)
            figure = draw(finding.claim, _of(finding.claim, outcomes))
            svg = None if figure is None else style.svg(figure)
            if svg is not None:
                picture.write_text(svg, encoding="utf-8")
            entries.append(
                {
                    "finding": finding,
                    "claim": finding.claim,
                    "effects": [_effect(judged) for judged in finding.predictions],
                    "controls": [_effect(judged) for judged in finding.controls],
                    "effort": _effort(finding.claim),
                    "altered": _altered(_of(finding.claim, outcomes)),
                    "svg": None if svg is None else Markup(style.inline(svg, finding.claim.name)),
                }
            )
        text = environment.from_string(asset("claims.html.j2")).render(
            entries=entries,
            summary=summary(findings),
            how=HOW,
            machine=machine(header),
            created=header.created_utc.replace("T", " ").replace("Z", " UTC"),
            size=header.size,
            command=header.command,
            hours=sum(outcome.wall_s for outcome in outcomes) / 3600,
            failures=[outcome for outcome in outcomes if outcome.failure],
            count=len(outcomes),
            css=Markup(asset("page.css")),
        )
        page.write_text(text, encoding="utf-8")
        drawn = {entry["claim"].name for entry in entries if entry["svg"] is not None}
        (out / "claims.md").write_text(_markdown(header, findings, drawn), encoding="utf-8")
        table.to_csv(out / "experiments.csv", index=False)
    except OSError as problem:
        raise RequestError(f"cannot write the report to {out}: {problem.strerror}") from None
    return page


def summary(findings: Sequence[Finding]) -> str:
    """How many there are of each verdict."""
    counts = Counter(finding.verdict for finding in findings)
    parts = [f"{counts[verdict]} {verdict.lower()}" for verdict in ("SUPPORTED", "REFUTED", "UNDECIDED")]
    return f"{_many(len(findings), 'claim')}: {', '.join(parts)}"


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _effort(claim: Claim) -> str:
    """How many experiments and seeds there are."""
    seeds = len({one.seed for one in claim.experiments})
    done = _many(len(claim.experiments), "experiment")
    return f"{done}, {seeds} seeds" if seeds > 1 else done


def _altered(outcomes: pd.DataFrame) -> list[dict[str, str]]:
    """Mean accuracies on normal and on altered test clips, of each network."""
    conditions = ("shuffled", "reversed", "frozen")
    if "top1" not in outcomes or any(name not in outcomes for name in conditions):
        return []
    known = outcomes.dropna(subset=list(conditions))
    by = [name for name in ("model", "task", "begun", "pattern") if name in known and known[name].notna().any()]
    best = at_best_rate(known, "top1", *by)
    return [
        {
            "network": ", ".join(
                short(part).replace("\n", " ") for part in (key if isinstance(key, tuple) else (key,))
            ),
            **{name: f"{100 * part[name].mean():.0f} %" for name in ("top1", *conditions)},
        }
        for key, part in best.groupby(by, sort=False)
    ]


def machine(header: Header) -> str:
    """What was measured on, in one line."""
    found = header.environment
    return ", ".join(part for part in (found.machine, f"torch {found.torch}", header.device) if part)


def _effect(judged: Judged) -> dict[str, str]:
    """A judged prediction as texts."""
    prediction, found = judged.prediction, judged.interval
    return {
        "says": prediction.says,
        "measured": "not told" if found is None else said(found, prediction),
        "wanted": f"{'<' if prediction.less else '>'} {prediction.margin:g}",
        "verdict": judged.verdict,
    }


def _markdown(header: Header, findings: Sequence[Finding], drawn: Collection[str]) -> str:
    from vidbench.report.markdown import cell, table

    lines = [
        "# What the textbooks say, measured", "",
        f"{summary(findings)}. {machine(header)}, size {header.size}, {header.created_utc}: `{header.command}`", "",
        HOW, "",
        *table(
            ("verdict", "claim", "effect", "wanted"),
            [
                (
                    finding.verdict,
                    finding.claim.says,
                    "; ".join(_effect(judged)["measured"] for judged in finding.predictions),
                    "; ".join(_effect(judged)["wanted"] for judged in finding.predictions),
                )
                for finding in findings
            ],
        ),
    ]  # fmt: skip
    for finding in findings:
        claim = finding.claim
        lines += ["", f"## {cell(claim.says)}", "", f"**{finding.verdict}** {cell(finding.reason)}".rstrip(), ""]
        lines += [f"Source: {cell(claim.source)}", "", cell(claim.protocol), ""]
        judged = [*finding.predictions, *finding.controls]
        kinds = ["prediction"] * len(finding.predictions) + ["control"] * len(finding.controls)
        rows = [(kind, *_effect(one).values()) for kind, one in zip(kinds, judged, strict=True)]
        lines += table(("", "predicted", "measured", "wanted", "verdict"), rows)
        if claim.name in drawn:
            lines += ["", f"![{claim.name}](figures/{claim.name}.svg)"]
    return "\n".join(lines) + "\n"


def _of(claim: Claim, outcomes: Sequence[Outcome]) -> pd.DataFrame:
    keys = {experiment.key for experiment in claim.experiments}
    return frame([outcome for outcome in outcomes if outcome.experiment.key in keys])


def short(name: object) -> str:
    """A model's or task's name without the package it is in, and with the knobs on a line of their own."""
    text = str(name)
    if ":" not in text:
        return text.replace("_", " ")
    head, _, rest = text.partition(":")
    return (rest if "." in head else f"{head}\n{rest.replace(':', ' ')}").replace("_", " ")


def draw(claim: Claim, outcomes: pd.DataFrame) -> Figure | None:
    """The figure of a claim; None where nothing was measured of what it shows."""
    from pandas.api.types import is_numeric_dtype

    from vidbench.report import style

    plot = claim.plot
    for name, value in plot.where.items():
        outcomes = outcomes[outcomes[name] == value] if name in outcomes else outcomes.iloc[:0]
    if any(name not in outcomes for name in (plot.x, plot.y, plot.hue)):
        return None
    outcomes = outcomes.dropna(subset=[plot.x, plot.y])
    if not len(outcomes):
        return None
    outcomes = at_best_rate(outcomes, plot.y, *dict.fromkeys((plot.hue,) if plot.one_training else (plot.x, plot.hue)))
    hues = list(dict.fromkeys(outcomes[plot.hue]))
    colours = style.wide_palette([str(hue) for hue in hues])
    with style.styled():
        figure, (ax,) = style.panels(1, width=6.6, height=3.3, right=1.7)
        numeric = is_numeric_dtype(outcomes[plot.x])
        for i, hue in enumerate(hues):
            part = outcomes[outcomes[plot.hue] == hue]
            look = {"color": colours[str(hue)], "label": short(hue).replace("\n", " ")}
            (_line if numeric else _columns)(ax, plot, part, look, i, hues, outcomes)
        if plot.level is not None:
            ax.axhline(plot.level, color=style.MUTED, linewidth=0.8, linestyle=":")
        ax.set_xlabel(plot.x_label)
        ax.set_ylabel(plot.y_label)
        values = outcomes[plot.y].tolist()
        if plot.percent:
            ax.set_ylim(-0.03, 1.03)
            ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        elif plot.log_y:
            style.scale_axis(ax, "y", values, log=True)
        else:
            ax.set_ylim(bottom=0)
        if numeric:
            ticks = sorted(set(outcomes[plot.x]))
            style.scale_axis(ax, "x", ticks, ticks=ticks if len(ticks) <= 10 else None, log=plot.log_x)
        if len(hues) > 1:
            ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0)
    return figure


def _line(
    ax: Axes, plot: Plot, part: pd.DataFrame, look: dict[str, Any], i: int, hues: list[Any], _all: pd.DataFrame
) -> None:
    """The mean over seeds against x, with every seed as a faint point."""
    from vidbench.report.style import DASHES, MARKERS

    means = part.groupby(plot.x)[plot.y].mean()
    few = len(means) <= 20
    marker = MARKERS[i % len(MARKERS)] if few else None
    ax.plot(means.index, means.to_numpy(), marker=marker, markersize=5, linestyle=DASHES[i % len(DASHES)], **look)
    if few:
        ax.scatter(part[plot.x], part[plot.y], s=9, alpha=0.45, linewidths=0, color=look["color"])


def _columns(
    ax: Axes, plot: Plot, part: pd.DataFrame, look: dict[str, Any], i: int, hues: list[Any], everything: pd.DataFrame
) -> None:
    """A column of points for each x, one for each seed, and their mean with its interval."""
    names = list(dict.fromkeys(everything[plot.x]))
    same = plot.x == plot.hue
    shift = 0.0 if same or len(hues) == 1 else 0.5 * ((i + 0.5) / len(hues) - 0.5)
    for place, name in enumerate(names):
        values = part[part[plot.x] == name][plot.y].tolist()
        if not values:
            continue
        x = place + shift
        ax.scatter([x] * len(values), values, s=16, alpha=0.6, linewidths=0, **look)
        look = {"color": look["color"]}  # one entry in the legend
        found = interval(values)
        ax.plot([x - 0.09, x + 0.09], [found.mean] * 2, linewidth=1.6, **look)
        if len(values) > 1:
            ax.plot([x, x], [found.low, found.high], linewidth=0.8, **look)
    ax.set_xticks(range(len(names)), [short(name) for name in names])
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.grid(visible=False, axis="x")
