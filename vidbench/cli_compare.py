"""The commands that compare runs and keep baselines."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vidbench.results import Run


class ComparisonFormat(StrEnum):
    """How a comparison is printed."""

    text = "text"
    markdown = "markdown"
    json = "json"
    junit = "junit"


FormatOption = Annotated[ComparisonFormat, typer.Option("--format", help="text, markdown, json or junit.")]


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A run, or `baseline`: the newest of NEW's machine.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="A run.")],
    again: Annotated[
        list[Path] | None,
        typer.Option("--again", metavar="RUN", help="BASE measured again: five runs tell their noise."),
    ] = None,
    output: FormatOption = ComparisonFormat.text,
) -> None:
    """Say of every point whether it became faster, slower, or is missing; exit code 1 if anything became worse."""
    from vidbench import baselines
    from vidbench.compare import compare as judge
    from vidbench.compare_text import FORMATS

    after = _load(new)
    if base == "baseline":
        known = baselines.of(after)
        before, others = known[-1], baselines.same_revision(known)
    else:
        before, others = _load(Path(base)), []
    others = [*others, *(_load(path) for path in again or ())]
    found = judge(before, after, baselines=others)
    typer.echo(FORMATS[output.value](found, before, after))
    raise typer.Exit(found.exit_code)


def _load(path: Path) -> Run:
    from vidbench.results import load

    run = load(path)
    for warning in run.warnings:
        typer.echo(f"vidbench: warning: {warning}", err=True)
    return run


baseline = typer.Typer(help="Keep runs as baselines, for each machine.", no_args_is_help=True)

Root = Annotated[Path, typer.Option("--root", help="Folder of the baselines.")]
DEFAULT_ROOT = Path("reports") / "baselines"


@baseline.command("save")
def save(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run.")], root: Root = DEFAULT_ROOT) -> None:
    """Keep a run as a baseline of its machine and suite."""
    from vidbench import baselines

    typer.echo(str(baselines.save(_load(run), root)))


@baseline.command("list")
def list_(root: Root = DEFAULT_ROOT) -> None:
    """List the baselines: machine, suite, when, revision, points."""
    from vidbench import baselines

    for run in baselines.stored(root):
        commit = (run.environment.git_commit or "?")[:12]
        points = len({one.point.key for one in run.measurements})
        typer.echo(f"{run.folder}  {run.suite}  {run.created_utc}  {commit}  {points} points")


@baseline.command("show")
def show(
    run: Annotated[Path, typer.Argument(metavar="BASELINE", help="A folder of `vidbench baseline list`.")],
) -> None:
    """Show a baseline: its machine, versions and times."""
    from vidbench.report.tables import machine_line

    found = _load(run)
    typer.echo(f"{found.id}  {found.suite}  {found.created_utc}")
    typer.echo(machine_line(found))
    shown = found.frame()[["point", "status", "rounds", "latency_s", "latency_low_s", "latency_high_s", "trust"]]
    typer.echo(shown.to_string(index=False))
