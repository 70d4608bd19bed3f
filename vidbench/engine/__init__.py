"""From a plan to run folders: every point in every round once, whatever happens in between."""

from __future__ import annotations

import datetime
import hashlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from vidbench import results
from vidbench.engine.local import LocalEngine
from vidbench.records import Environment, Measurement
from vidbench.suites import Axes, plan
from vidbench.sweep import Point, RequestError, Sweep, implementations_of, unknown

ENGINES = ("local", "ray")
"""Who runs the points: this machine, or the nodes of a Ray cluster."""

Turn = tuple[Point, int]
"""A point and the round in which it is to be measured."""


@dataclass(frozen=True)
class Progress:
    """Told before (`measurement` is None) and after each point of each round."""

    done: int
    total: int
    """Of all kinds of machine together."""
    point: Point
    round: int
    measurement: Measurement | None = None
    node: str = ""
    """Who measures it; empty on this machine."""


@dataclass(frozen=True)
class Terms:
    """What holds for every point of a sweep, wherever it is measured."""

    device: str
    dtypes: tuple[str, ...]
    workloads: Mapping[str, str]
    """Kind by workload."""
    timeout_s: float
    seconds: float
    video: Path | None = None
    input: str | None = None
    """What identifies the video; see `input_of`."""


class MachineKind(NamedTuple):
    """A kind of machine that takes part: it gets a run of its own."""

    environment: Environment
    implementations: Mapping[str, tuple[str, ...]]
    """By workload."""
    folder: str = ""
    """Of its run, under the one that was asked for."""


class Step(NamedTuple):
    """A point that is begun (without a measurement), or done."""

    kind: int
    """Index of the kind of machine."""
    point: Point
    round: int
    measurement: Measurement | None = None
    node: str = ""


class Engine(Protocol):
    """Who carries a sweep out. A context manager; what it has started ends with it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def kinds(self) -> list[MachineKind]:
        """The kinds of machine there are.

        Raises:
            RequestError: There is none, or it cannot do what is asked.
        """

    def carry_out(self, todo: Sequence[Sequence[Turn]]) -> Iterator[Step]:
        """Measures what each kind has to do, each turn once; whatever happens to a turn, there is a measurement of it.

        Raises:
            RequestError: It cannot go on.
        """


class ThisMachine(LocalEngine):
    """The local engine as the engine of a sweep: one kind of machine, one turn after the other."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(timeout_s=terms.timeout_s)
        self.terms = terms
        self.round = 0

    def __enter__(self) -> Self:
        return self

    def kinds(self) -> list[MachineKind]:
        """This machine."""
        self.kind = MachineKind(*self.describe(self.terms.device, self.terms.dtypes, self.terms.workloads))
        return [self.kind]

    def carry_out(self, todo: Sequence[Sequence[Turn]]) -> Iterator[Step]:
        """In the order given."""
        (turns,) = todo
        for point, number in turns:
            yield Step(0, point, number)
            yield Step(0, point, number, self.take(point, number))

    def take(self, point: Point, number: int) -> Measurement:
        """The measurement of one turn; a round begins in a fresh process."""
        if number != self.round:
            self.retire()
            self.round = number
        video = str(self.terms.video) if self.terms.video else None
        return self.measure(point, number, self.kind.environment, seconds=self.terms.seconds, video=video)


def runs(
    suite: str,
    *,
    engine: str = "local",
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
    tell: Callable[[str], None] = lambda _: None,
) -> list[results.Run]:
    """Carries out a sweep and returns its runs; everything measured is on disk as soon as it is measured.

    A run is of one machine and one revision. The local engine makes one; in a cluster every kind of machine measures
    the whole sweep, its nodes share the points, and its run lies in a folder of its own under `out`.

    Args:
        suite: Name of a suite.
        engine: One of `ENGINES`.
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
        tell: Called with a line on every node that is refused or lost.

    Raises:
        RequestError: The request cannot be carried out, said in one line.
    """
    axes = dict(axes or {})
    wanted = (*implementations, *map(str, axes.pop("implementation", ())))
    planned = plan(suite, axes=axes, model_names=models, video=video.name if video else None)
    if video is not None:
        from vidbench.data.video import probe

        probe(video)
    device, dtypes = devices(point for sweep in planned.sweeps for point in sweep.points())
    terms = Terms(
        device,
        dtypes,
        {sweep.workload: sweep.kind for sweep in planned.sweeps},
        timeout_s,
        seconds or planned.seconds,
        video.resolve() if video else None,
        input_of(video) if video else None,
    )
    folder = out or new_folder(suite)
    opened = results.RunWriter.resume if resume else results.RunWriter.create
    with ExitStack() as stack:
        crew = stack.enter_context(_engine(engine, terms, tell))
        kinds = crew.kinds()
        chosen = [choose(planned.sweeps, wanted, kind.implementations) for kind in kinds]
        writers = [
            stack.enter_context(
                opened(
                    folder / kind.folder,
                    suite=suite,
                    sweeps=sweeps,
                    environment=kind.environment,
                    command=command or shlex.join(sys.orig_argv),
                    input=terms.input,
                )
            )
            for kind, sweeps in zip(kinds, chosen, strict=True)
        ]
        todo = [_turns(sweeps, rounds or planned.rounds) for sweeps in chosen]
        missing = [
            [(point, number) for point, number in turns if (point.key, number) not in writer.done]
            for turns, writer in zip(todo, writers, strict=True)
        ]
        total = sum(map(len, todo))
        done = total - sum(map(len, missing))
        for step in crew.carry_out(missing):
            if step.measurement is not None:
                writers[step.kind].append(step.measurement)
                done += 1
            progress(Progress(done, total, step.point, step.round, step.measurement, step.node))
    return [results.load(folder / kind.folder) for kind in kinds]


def _engine(name: str, terms: Terms, tell: Callable[[str], None]) -> Engine:
    if name == "local":
        return ThisMachine(terms)
    if name != "ray":
        raise unknown("engine", name, ENGINES)
    try:
        from vidbench.engine.ray import RayEngine
    except ModuleNotFoundError as missing:
        raise RequestError(f"--engine ray needs {missing.name}: pip install 'vidbench[ray]'") from None
    return RayEngine(terms, tell)


def _turns(sweeps: tuple[Sweep, ...], rounds: int) -> list[Turn]:
    """Every point in every round; a training, whose seed decides its accuracy, once."""
    points = {point.key: point for sweep in sweeps for point in sweep.points()}.values()
    return [
        (point, number) for number in range(1, rounds + 1) for point in points if number == 1 or point.kind != "task"
    ]


def input_of(video: Path) -> str:
    """What identifies a video: its name, and the beginning of its digest."""
    with video.open("rb") as file:
        return f"{video.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


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
    """The sweeps with the implementations asked for, where their workload has them; `all`: every one but `reference`.

    Raises:
        RequestError: A name that no workload of the suite has.
    """
    if not wanted:
        return sweeps
    timed = [sweep for sweep in sweeps if sweep.kind in ("op", "model")]
    names = {name for sweep in timed for name in known[sweep.workload]}
    for name in wanted:
        if name not in {*names, "all"}:
            raise unknown("implementation", name, names)
    chosen = []
    for sweep in sweeps:
        mine = implementations_of(wanted, known[sweep.workload])
        if sweep in timed and mine:
            chosen.append(sweep.override({"implementation": mine}))
        elif sweep not in timed:
            chosen.append(sweep)
    return tuple(chosen)
