"""The commands that look closer: at the machine, and into a point."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidbench.cli_compare import axes_of
from vidbench.cli_training import As, Device, Output
from vidbench.sweep import DEVICES, RequestError, unknown

if TYPE_CHECKING:
    from vidbench.doctor import Finding
    from vidbench.sweep import Point, Value
    from vidbench.traces import Profile

MARKS = {"good": ("✓", "green"), "fair": ("!", "yellow"), "poor": ("✗", "red")}


def doctor(
    device: Device = "cpu",
    noise: Annotated[
        bool, typer.Option("--noise/--no-noise", help="Measure the same code against itself; half a minute.")
    ] = True,
    output: As = Output.text,
) -> None:
    """Say what this machine can measure and how well, and what would make it better."""
    from vidbench.doctor import examine

    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    if noise and sys.stderr.isatty():
        typer.echo("vidbench: measuring the noise, half a minute …", err=True)
    found = examine(device, noisy=noise)
    if output is Output.json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
        return
    _print(found)


def _print(found: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    topic = ""
    for one in found:
        if one.topic != topic:
            topic = one.topic
            console.print(Text(topic, style="bold"))
        mark, colour = MARKS[one.level]
        line = Text.assemble((f"  {mark} ", colour), (f"{one.name}: ", "bold"), one.found)
        console.print(line, soft_wrap=not console.is_terminal)
        if one.remedy:
            console.print(Text(f"      → {one.remedy}", style="dim"), soft_wrap=not console.is_terminal)
    counts = {level: sum(one.level == level for one in found) for level in ("fair", "poor")}
    said = ", ".join(f"{count} {level}" for level, count in counts.items() if count)
    console.print(Text(f"{said}: see the arrows" if said else "nothing speaks against numbers from here", style="bold"))


def profile(
    point: Annotated[
        str, typer.Argument(metavar="POINT", help="A key of a report, or an op or a model with --axis and the like.")
    ],
    axis: Annotated[
        list[str] | None, typer.Option(metavar="NAME=V", help="A size, such as clip_length=16; `vidbench list axes`.")
    ] = None,
    implementation: Annotated[str | None, typer.Option(help="Such as library, eager, compiled.")] = None,
    mode: Annotated[str | None, typer.Option(help="forward, train or stream.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp64, fp32, tf32, fp16 or bf16.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER", help="What changed from OTHER: an implementation, a point, or a profile's folder."
        ),
    ] = None,
    video: Annotated[
        Path | None, typer.Option("--input", metavar="VIDEO", help="Take a model's clips from a video file.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the page; default: runs/<utc>-profile.")] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Keep the page with a run, whose report then links to it.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Put the trace there for torch-tb-profiler as well.")
    ] = None,
    output: As = Output.text,
) -> None:
    """Show where one settled call of a point spends its time: a page, and a trace for Perfetto."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read with torch: it would tell of every start and stop
    from vidbench.report.profile_page import against_text, render, text
    from vidbench.suites import point_named
    from vidbench.traces import PAGE, load

    axes = axes_of(axis, implementation=implementation, mode=mode, device=device, dtype=dtype)
    if out is not None and run is not None:
        raise RequestError("--run says where the page lies, as --out does: give one or the other")
    new = _fed(point_named(point, axes), video)
    folder = _kept_with(run, new) if run is not None else out
    folder = folder or Path("runs") / f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-profile"
    clips = None if video is None else str(video)
    base = None
    if against is not None:
        other = _other(against, new, axes)
        if isinstance(other, Path):
            base = load(other)
        elif (other := _fed(other, video)).key == new.key:
            raise RequestError(f"--against {against} names the same point: {new.key}")
        else:
            base = _take(other, folder / "against", clips, tensorboard)
    found = _take(new, folder, clips, tensorboard)
    page = folder / PAGE
    try:
        page.write_text(render(found, base), encoding="utf-8")
    except OSError as problem:
        raise RequestError(f"cannot write {page}: {problem.strerror}") from None
    if output is Output.json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
        return
    typer.echo(text(found) if base is None else against_text(base, found))
    typer.echo(f"\n{page}")


def _fed(point: Point, video: Path | None) -> Point:
    """The point with the video that its clips come from as a part of its key, as a sweep has it."""
    if video is None:
        return point  # `take` refuses one that needs a video
    from vidbench.data.video import probe
    from vidbench.models import spec_of

    if point.kind == "op" or (point.kind == "model" and "features" in spec_of(point.workload).inputs):
        raise RequestError(f"--input gives clips to models and stages, and {point.workload} takes none: leave it out")
    probe(video)
    return replace(point, case={**point.case, "video": video.name})


def _kept_with(run: Path, point: Point) -> Path:
    """Where a point's profile lies in a run."""
    from vidbench.report import profile_folder
    from vidbench.results import load

    found = load(run)
    if all(one.point.key != point.key for one in found.measurements):
        raise RequestError(f"{run} has no point {point.key}: take a key of its report, or --out for the page alone")
    return profile_folder(found, point.key)


def _other(text: str, point: Point, axes: dict[str, tuple[Value, ...]]) -> Point | Path:
    """What a point is held against: a profile's folder, another implementation of it, or another point."""
    from vidbench.suites import point_like, point_named
    from vidbench.traces import SUMMARY
    from vidbench.workload import implementations

    if os.path.exists(Path(text) / SUMMARY):
        return Path(text)
    if text in implementations(point.workload, point.kind):
        return replace(point, implementation=text)
    if os.path.isdir(text):
        return Path(text)  # which `load` refuses
    if "/" in text:
        return point_named(text, {})  # a key says all of itself
    given = {name: values for name, values in axes.items() if name != "implementation"}
    other = point_like(text, given)
    if "implementation" in axes and axes["implementation"][0] in implementations(other.workload, other.kind):
        other = replace(other, implementation=str(axes["implementation"][0]))
    return other


def _take(point: Point, folder: Path, video: str | None, tensorboard: Path | None) -> Profile:
    from vidbench.profile import take

    def tell(step: str) -> None:
        if sys.stderr.isatty():
            typer.echo(f"vidbench: {point.workload}/{point.implementation}: {step} …", err=True)

    command = shlex.join(["vidbench", *sys.argv[1:]])
    return take(point, folder, video=video, tensorboard=tensorboard, command=command, tell=tell)
