"""The commands that compare runs and revisions, and keep baselines."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidbench.progress import Bar
from vidbench.sweep import RequestError, parse_axes

if TYPE_CHECKING:
    from vidbench.gate import Step
    from vidbench.results import Run
    from vidbench.sweep import Value


class ComparisonFormat(StrEnum):
    """How a comparison is printed."""

    text = "text"
    markdown = "markdown"
    json = "json"
    junit = "junit"


class ListFormat(StrEnum):
    """How a history, or a list, is printed."""

    text = "text"
    json = "json"


Axis = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=V[,V…]", help="Values of an axis, such as clip_length=8,16. `vidbench list axes`."),
]
Implementation = Annotated[str | None, typer.Option(help="Only these, such as library,compiled; `all` there are.")]
Mode = Annotated[str | None, typer.Option(help="forward, train, stream; several with commas.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="fp64, fp32, tf32, fp16, bf16; several with commas.")]
Model = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A model instead of the suite's; package.module:factory measures yours."),
]


def axes_of(axis: list[str] | None, **given: str | None) -> dict[str, tuple[Value, ...]]:
    """What --axis says, and the options that are axes by another name."""
    return parse_axes([*(axis or ()), *(f"{name}={value}" for name, value in given.items() if value is not None)])


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


def gate(
    base: Annotated[str, typer.Option("--base", metavar="REV", help="The revision to compare with, as git names it.")],
    suite: Annotated[str, typer.Argument(help="Of `vidbench list suites`.")] = "quick",
    axis: Axis = None,
    implementation: Implementation = None,
    mode: Mode = None,
    device: Device = None,
    dtype: Dtype = None,
    model: Model = None,
    budget: Annotated[float, typer.Option(min=0.0, help="Minutes for the rounds; six are always taken.")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="Folder for both runs; default: runs/<utc>-gate.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what lies in --out.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a point is given up.")] = 600.0,
    output: FormatOption = ComparisonFormat.text,
) -> None:
    """Measure a base revision and this one in turn and judge; exit code 1 if anything became worse.

    In a repository of your own, name what of it is measured: --model package.module:factory.
    """
    from vidbench.compare_text import FORMATS
    from vidbench.gate import gate as run

    if resume and out is None:
        raise RequestError("--resume needs --out DIR: the folder to go on with")
    folder = out or Path("runs") / f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-gate"
    bar = Bar(sys.stderr)
    try:
        found = run(
            base,
            suite,
            out=folder,
            axes=axes_of(axis, implementation=implementation, mode=mode, device=device, dtype=dtype),
            models=model or (),
            budget_s=60 * budget,
            timeout_s=timeout,
            resume=resume,
            command=shlex.join(["vidbench", *sys.argv[1:]]),
            progress=lambda step: _tell(bar, step),
        )
    except KeyboardInterrupt:
        typer.echo(f"vidbench: interrupted; what was measured is kept: add --resume --out {folder} to go on", err=True)
        raise typer.Exit(130) from None
    finally:
        bar.close()
    typer.echo(FORMATS[output.value](found.comparison, found.base, found.head))
    if output is ComparisonFormat.text:
        typer.echo(f"{found.rounds} rounds: {found.stopped}")
    raise typer.Exit(found.comparison.exit_code)


def _tell(bar: Bar, step: Step) -> None:
    if step.comparison is not None:
        counts = ", ".join(f"{number} {verdict}" for verdict, number in step.comparison.counts().items())
        bar.say(f"after {step.round} rounds: {counts}", notable=True)
        return
    measured = step.measurement
    if measured is not None:
        what = f"round {step.round}  {step.side}  {measured.point.workload}/{measured.point.implementation}"
        bar.update(step.done, step.of, what)
        if measured.status not in ("ok", "skipped"):
            bar.say(f"{what}: {measured.status}: {measured.reason}", notable=True)


def history(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Every run below it is read.")],
    point: Annotated[str, typer.Option(metavar="TEXT", help="Only the points that have this in their key.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for history.csv, history.svg and history.png.")] = None,
    output: Annotated[ListFormat, typer.Option("--format", help="text or json.")] = ListFormat.text,
) -> None:
    """Say where points became slower or faster over many runs, and what else changed there."""
    from vidbench.changes import changes
    from vidbench.history import CACHE, read
    from vidbench.history_text import FORMATS, labels

    bar = Bar(sys.stderr, every_s=10)

    def tell(done: int, of: int) -> None:
        bar.update(done, of, "runs read")
        bar.say(f"{done} of {of} runs read")

    try:
        found = read(folder, tell)
    except KeyboardInterrupt:
        typer.echo(f"vidbench: interrupted; what was read is kept in {folder / CACHE}: call it again", err=True)
        raise typer.Exit(130) from None
    finally:
        bar.close()
    for warning in found.warnings:
        typer.echo(f"vidbench: warning: {warning}", err=True)
    judged = changes(found.only(point) if point else found)
    if out is not None:
        from vidbench.report.timeline import write

        write(judged, labels(judged.series), out)
    typer.echo(FORMATS[output.value](judged))


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
def list_(
    root: Root = DEFAULT_ROOT,
    output: Annotated[ListFormat, typer.Option("--format", help="text or json.")] = ListFormat.text,
) -> None:
    """List the baselines: machine, suite, when, revision, points."""
    from vidbench import baselines

    found = baselines.stored(root)
    if output is ListFormat.json:
        rows = [
            {"folder": str(run.folder), "suite": run.suite, "machine": run.environment.machine,
             "created_utc": run.created_utc, "git_commit": run.environment.git_commit}
            for run in found
        ]  # fmt: skip
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for run in found:
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
