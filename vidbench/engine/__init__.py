"""From a plan to a run folder: every point in every round once, whatever happens in between."""

from __future__ import annotations

import datetime
import hashlib
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vidbench import results
from vidbench.engine.local import LocalEngine
from vidbench.records import Measurement
from vidbench.suites import Axes, plan
from vidbench.sweep import Point, RequestError, Sweep, unknown


@dataclass(frozen=True)
class Progress:
    """Told before (`measurement` is None) and after each point of each round."""

    done: int
    total: int
    point: Point
    round: int
    measurement: Measurement | None = None


def run(
    suite: str,
    *,
    axes: Axes | None = None,
    models: Iterable[str] = (),
    implementations: Sequence[str] = (),
    rounds: int | None = None,
    out: Path | None = None,
    resume: bool = False,
    timeout_s: float = 600.0,
    seconds: float | None = None,
    video: Path | None = None,
    command: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> results.Run:
    """Carries out a sweep and returns its run; everything measured is on disk as soon as it is measured.

    Args:
        suite: Name of a suite.
        axes: Values that replace the suite's own, such as `{"clip_length": (8, 16)}`.
        models: Models instead of the suite's own, `package.module:factory` among them.
        implementations: Only these, where a workload has them.
        rounds: Fresh processes that each take every point once; None takes the suite's own number.
        out: Run folder; None makes `runs/<utc>-<suite>`.
        resume: Does only what the folder lacks.
        timeout_s: A point that takes longer is given up, with its worker.
        seconds: Budget for sampling one point in one round; None takes the suite's own.
        video: A video file that clips are taken from.
        command: What reproduces this run; None takes the process's own command line.
        progress: Called before and after every point.

    Raises:
        RequestError: The request cannot be carried out, said in one line.
    """
    axes = dict(axes or {})
    wanted = (*implementations, *map(str, axes.pop("implementation", ())))
    planned = plan(suite, axes=axes, model_names=models, video=video.name if video else None)
    source = None
    if video is not None:
        from vidbench.data.video import probe

        probe(video)
        with video.open("rb") as file:
            source = f"{video.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    rounds = rounds or planned.rounds
    seconds = seconds or planned.seconds
    folder = out or new_folder(suite)
    with LocalEngine(timeout_s=timeout_s) as engine:
        device, dtypes = devices(point for sweep in planned.sweeps for point in sweep.points())
        workloads = {sweep.workload: sweep.kind for sweep in planned.sweeps}
        environment, known = engine.describe(device, dtypes, workloads)
        sweeps = choose(planned.sweeps, wanted, known)
        points = list({point.key: point for sweep in sweeps for point in sweep.points()}.values())
        opened = results.RunWriter.resume if resume else results.RunWriter.create
        with opened(
            folder,
            suite=suite,
            sweeps=sweeps,
            environment=environment,
            command=command or shlex.join(sys.orig_argv),
            input=source,
        ) as writer:
            todo = [
                (point, number)
                for number in range(1, rounds + 1)
                for point in points
                if number == 1 or point.kind != "task"
            ]
            missing = [(point, number) for point, number in todo if (point.key, number) not in writer.done]
            done, current = len(todo) - len(missing), 0
            for point, number in missing:
                if number != current:
                    engine.retire()  # a round is a fresh process
                    current = number
                progress(Progress(done, len(todo), point, number))
                measurement = engine.measure(
                    point, number, environment, seconds=seconds, video=str(video) if video else None
                )
                writer.append(measurement)
                done += 1
                progress(Progress(done, len(todo), point, number, measurement))
    return results.load(folder)


def new_folder(suite: str) -> Path:
    """Where a run goes that was given no folder."""
    return Path("runs") / f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{suite}"


def devices(points: Iterable[Point]) -> tuple[str, tuple[str, ...]]:
    """The device of points, and the dtypes whose ceilings they need.

    Raises:
        RequestError: More than one device.
    """
    points = list(points)
    devices = sorted({point.device for point in points if point.kind in ("op", "model")} or {"cpu"})
    if len(devices) > 1:
        raise RequestError(f"one run measures one device, not {' and '.join(devices)}: make a run for each")
    return devices[0], tuple(sorted({point.dtype for point in points}))


def choose(sweeps: tuple[Sweep, ...], wanted: Sequence[str], known: Mapping[str, tuple[str, ...]]) -> tuple[Sweep, ...]:
    """The sweeps with the implementations asked for, where their workload has them.

    Raises:
        RequestError: A name that no workload of the suite has.
    """
    if not wanted:
        return sweeps
    timed = [sweep for sweep in sweeps if sweep.kind in ("op", "model")]
    names = {name for sweep in timed for name in known[sweep.workload]}
    for name in wanted:
        if name not in names:
            raise unknown("implementation", name, names)
    chosen = []
    for sweep in sweeps:
        mine = tuple(name for name in wanted if name in known[sweep.workload])
        if sweep in timed and mine:
            chosen.append(sweep.override({"implementation": mine}))
        elif sweep not in timed:
            chosen.append(sweep)
    return tuple(chosen)
