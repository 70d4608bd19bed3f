"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import io
import json
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import vidbench
from vidbench import cli_claims, cli_compare, cli_inspect, cli_training
from vidbench.progress import Bar
from vidbench.sweep import AXES, RequestError

if TYPE_CHECKING:
    from vidbench.engine import Progress
    from vidbench.records import Measurement

app = typer.Typer(
    name="vidbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes as long to import as all the rest
    help="Which architecture and which kernel for this clip length, batch size and machine? "
    "Measures video classification models and their kernels, with numbers that can be trusted.",
)


class Format(StrEnum):
    """How a listing is printed."""

    text = "text"
    json = "json"


class EngineName(StrEnum):
    """Who runs the points of a sweep."""

    local = "local"
    ray = "ray"


class Topic(StrEnum):
    """What can be listed."""

    suites = "suites"
    ops = "ops"
    implementations = "implementations"
    models = "models"
    tasks = "tasks"
    axes = "axes"
    claims = "claims"


def _version(show: bool) -> None:
    if show:
        typer.echo(f"vidbench {vidbench.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


@app.command()
def sweep(
    suite: Annotated[str, typer.Argument(help="quick, conv3d, conv2plus1d, depthwise, temporal, models or full.")],
    axis: cli_compare.Axis = None,
    implementation: cli_compare.Implementation = None,
    mode: cli_compare.Mode = None,
    device: cli_compare.Device = None,
    dtype: cli_compare.Dtype = None,
    model: cli_compare.Model = None,
    video: Annotated[
        Path | None, typer.Option("--input", metavar="VIDEO", help="Take the models' clips from a video file.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Fresh processes that each take every point once; default: the suite's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/<utc>-<suite>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Do only what the folder given by --out lacks.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a point is given up.")] = 600.0,
    engine: Annotated[
        EngineName, typer.Option(help="local: this machine; ray: the nodes of the running Ray cluster.")
    ] = EngineName.local,
    format: Annotated[Format, typer.Option(help="text or json: of the last lines, which name the run.")] = Format.text,
) -> None:
    """Measure a suite: check, time, count, and write a run folder."""
    from vidbench.engine import new_folder, runs

    if resume and out is None:
        raise RequestError("--resume needs --out DIR: the folder to go on with")
    out = out or new_folder(suite)
    show = Show(sys.stderr)
    try:
        done = runs(
            suite,
            engine=engine.value,
            axes=cli_compare.axes_of(axis, implementation=implementation, mode=mode, device=device, dtype=dtype),
            models=model or (),
            rounds=rounds,
            out=out,
            resume=resume,
            timeout_s=timeout,
            video=video,
            command=shlex.join(["vidbench", *sys.argv[1:]]),
            progress=show,
            tell=show.tell,
        )
    except KeyboardInterrupt:
        typer.echo(f"vidbench: interrupted; what was measured is kept: add --resume --out {out} to go on", err=True)
        raise typer.Exit(130) from None
    finally:
        show.close()
    if format is Format.json:
        found = [(run, Counter(one.status for one in run.measurements)) for run in done]
        typer.echo(json.dumps([{"run": str(run.folder), "id": run.id, **counts} for run, counts in found], indent=2))
        return
    for run in done:
        counts = Counter(measurement.status for measurement in run.measurements)
        typer.echo(f"{run.folder}: {', '.join(f'{number} {status}' for status, number in counts.items())}")
    typer.echo(f"next: vidbench report {' '.join(str(run.folder) for run in done)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="Where to; default: report/ in the first run's folder.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write report.html, report.md, tables and figures of one or more runs."""
    from vidbench.report import report as write
    from vidbench.results import load

    loaded = [load(path) for path in runs]
    for run in loaded:
        for warning in run.warnings:
            typer.echo(f"vidbench: warning: {warning}", err=True)
    page = write(loaded, out or runs[0] / "report")
    typer.echo(str(page))
    if open_page:
        typer.launch(str(page))


@app.command()
def tune(
    model: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="Whose layers: c3d, i3d_rgb, r2plus1d_18, x3d_m, temporal.")
    ] = "c3d,i3d_rgb,r2plus1d_18,x3d_m,temporal",
    op: Annotated[str | None, typer.Option(metavar="NAME[,NAME…]", help="Only the layers of these ops.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Several with commas; default: cpu fp32, cuda bf16.")] = None,
    mode: Annotated[str, typer.Option(help="forward, train, or both with a comma.")] = "forward,train",
    batch_size: Annotated[int, typer.Option(min=1, help="Clips in a batch.")] = 1,
    out: Annotated[
        Path | None, typer.Option(metavar="TABLE", help="JSON file; default: this device's in the cache folder.")
    ] = None,
) -> None:
    """Measure this machine's fastest launches and implementations, for `implementation="auto"`.

    What the table holds already is passed over: remove the file to measure anew.
    """
    from vidbench.weigh import RequestedLayers, table_of, tune_machine

    table = out or table_of(device)
    chosen = RequestedLayers(
        models=tuple(model.split(",")),
        ops=tuple(op.split(",")) if op else (),
        dtypes=tuple((dtype or ("fp32" if device == "cpu" else "bf16")).split(",")),
        directions=tuple(mode.split(",")),
        batch_size=batch_size,
    )
    try:
        for line in tune_machine(chosen, device, table):
            typer.echo(line)
    except KeyboardInterrupt:
        typer.echo(f"vidbench: interrupted; {table} keeps what was found: the same command goes on", err=True)
        raise typer.Exit(130) from None
    typer.echo(str(table))


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A name of `vidbench list models`, or package.module:factory.")],
    clip: Annotated[
        str | None, typer.Option(metavar="CxTxHxW", help="The clip, such as 3x16x112x112; default: the published one.")
    ] = None,
    clip_length: Annotated[int | None, typer.Option(min=1, help="Frames.")] = None,
    input_size: Annotated[int | None, typer.Option(min=1, help="Pixels of a square frame.")] = None,
    num_classes: Annotated[int, typer.Option(min=1, help="Classes told apart.")] = 400,
    width_multiplier: Annotated[float, typer.Option(help="Factor on the channel counts.")] = 1.0,
    backbone: Annotated[
        str | None, typer.Option(help="Of a frame model: resnet18, resnet50 or package.module:factory.")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Parts of a layer's name that the table tells apart.")] = 2,
    fields: Annotated[
        bool, typer.Option("--fields/--no-fields", help="Find the receptive fields; a model of yours runs for it.")
    ] = True,
    format: Annotated[Format, typer.Option(help="text or json; json has every layer.")] = Format.text,
) -> None:
    """Parameters, MACs, FLOPs, activations and receptive field of a model, by layer and in total."""
    from vidbench.info import describe, parse_clip, table

    size: int | tuple[int, int] | None = input_size
    if clip is not None:
        if clip_length is not None or input_size is not None:
            raise RequestError("--clip says what --clip-length and --input-size say: give one or the other")
        clip_length, size = parse_clip(model, clip)
    described = describe(
        model,
        num_classes=num_classes,
        clip_length=clip_length,
        input_size=size,
        width_multiplier=width_multiplier,
        fields=fields,
        backbone=backbone,
    )
    typer.echo(json.dumps(described.as_json(), indent=2) if format is Format.json else table(described, depth=depth))


app.command()(cli_training.train)
app.command()(cli_training.evaluate)
app.command()(cli_training.pick)
app.command()(cli_claims.claims)
app.command()(cli_inspect.doctor)
app.command()(cli_inspect.profile)
app.command()(cli_compare.compare)
app.command()(cli_compare.gate)
app.command()(cli_compare.history)
app.add_typer(cli_compare.baseline, name="baseline")


@app.command("list")
def list_(
    topic: Annotated[Topic, typer.Argument(help="What to list.")] = Topic.suites,
    format: Annotated[Format, typer.Option(help="text or json.")] = Format.text,
) -> None:
    """List suites, axes, ops, implementations, models, tasks or claims."""
    rows = LISTINGS[topic]()
    if format is Format.json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        short = all(len(str(row[name])) <= 24 for row in rows)
        table.add_column(name.replace("_", " "), overflow="fold", no_wrap=short)
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    # A pipe has no width: there a row is a line.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _list_suites() -> list[dict[str, Any]]:
    from vidbench.suites import SUITES

    return [
        {
            "suite": suite.name,
            "points": sum(1 for sweep in suite.sweeps for _ in sweep.points()),
            "rounds": suite.rounds,
            "meaning": suite.meaning,
        }
        for suite in SUITES.values()
    ]


def _list_axes() -> list[dict[str, Any]]:
    return [
        {"axis": axis.name, "values": ", ".join(axis.words) or axis.values, "meaning": axis.meaning}
        for axis in AXES.values()
    ]


def _list_ops() -> list[dict[str, Any]]:
    from vidkernels import OPS

    return [{"op": op.name, "implementations": ", ".join(op.implementations)} for op in OPS.values()]


def _list_implementations() -> list[dict[str, Any]]:
    """Each op's implementations, and why one cannot run its default case here."""
    import torch

    from vidkernels import OPS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        {
            "op": op.name,
            "implementation": implementation.name,
            "device": device,
            "streams": implementation.step is not None,
            "why_not": implementation.why_not(op.case({}), device),
        }
        for op in OPS.values()
        for implementation in op.implementations.values()
    ]


def _list_models() -> list[dict[str, Any]]:
    from vidbench.models import MODELS

    return [
        {
            "model": spec.name,
            "family": spec.family,
            "inputs": ", ".join(spec.inputs),
            "clip_length": spec.clip_length,
            "input_size": spec.input_size,
            "streams": spec.streams,
            "paper": spec.paper,
        }
        for spec in MODELS.values()
    ]


def _list_tasks() -> list[dict[str, Any]]:
    from vidbench.data.tasks import TASKS, knobs

    return [
        {
            "task": task.name,
            "classes": task.num_classes,
            "chance": task.chance,
            "knobs": ":".join(f"{knob}={default}" for knob, default in knobs(task.name).items()),
            "meaning": task.meaning,
        }
        for task in TASKS.values()
    ]


def _list_claims() -> list[dict[str, Any]]:
    from vidbench.claims.textbook import claims

    return [{"claim": claim.name, "says": claim.says, "source": claim.source} for claim in claims("small")]


LISTINGS: Mapping[Topic, Callable[[], list[dict[str, Any]]]] = {
    Topic.suites: _list_suites,
    Topic.axes: _list_axes,
    Topic.ops: _list_ops,
    Topic.implementations: _list_implementations,
    Topic.models: _list_models,
    Topic.tasks: _list_tasks,
    Topic.claims: _list_claims,
}


class Show:
    """Shows the progress of a sweep: a bar on a terminal, a line per finished point elsewhere."""

    def __init__(self, stream: Any) -> None:
        self.bar = Bar(stream)

    def __call__(self, progress: Progress) -> None:
        point, measurement = progress.point, progress.measurement
        node = f"  on {progress.node}" if progress.node else ""
        what = f"round {progress.round}  {point.workload}/{point.implementation} {point.mode}{node}"
        self.bar.update(progress.done, progress.total, what)
        if measurement is not None:
            line = f"[{progress.done}/{progress.total}] round {progress.round} {_line(measurement)}{node}"
            self.bar.say(line, notable=measurement.status != "ok")

    def tell(self, line: str) -> None:
        """A line on what happens besides the points."""
        if self.bar.bar is None:
            print(f"vidbench: {line}", file=self.bar.stream, flush=True)
        else:
            self.bar.say(f"vidbench: {line}", notable=True)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def _line(measurement: Measurement) -> str:
    """One finished point in one line."""
    from vidbench.sweep import text_of

    point = measurement.point
    case = " ".join(f"{name}={text_of(value)}" for name, value in point.case.items())
    what = f"{point.workload}/{point.implementation} {point.mode} {point.memory_format} {case}"
    if measurement.accuracy is not None:
        return f"{what}: top-1 {measurement.accuracy.top1:.1%} (chance {measurement.accuracy.chance:.1%})"
    if measurement.median_s is not None:
        return f"{what}: {measurement.median_s * 1e3:.4g} ms"
    return f"{what}: {measurement.status}: {measurement.reason}"


def main() -> None:
    """Runs the command line; exit code 2: the request could not be carried out; 130: it was interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: in order
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # the name of a folder may be any bytes
    sys.path.append("")  # the working directory, where a user's own models lie, as for the processes that measure
    try:
        app()
    except SystemExit as end:
        # What is made of Ctrl-C before a command is at work would say that something became worse.
        if isinstance(end.__context__, typer.Abort):
            sys.exit(130)
        raise
    except RequestError as error:
        if "--debug" in sys.argv:
            raise
        print(f"vidbench: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
