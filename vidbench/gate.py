"""Two revisions measured in one job, in turn, and judged: for CI on a machine that is never quite the same.

Head's harness measures both; of the base it takes the kernels and the models. Every round is a fresh process for each
side, and BASE has two: how far those lie apart is the machine's own noise, learnt where it matters.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

import vidbench
from vidbench import results
from vidbench.compare import FALSE_DISCOVERY_RATE, Comparison, compare
from vidbench.engine import devices
from vidbench.engine.local import LocalEngine, Work, in_turn
from vidbench.records import Environment, Measurement
from vidbench.suites import Axes, plan
from vidbench.sweep import Point, RequestError

LOOKS = (6, 12, 20, 30)
"""Rounds after which is judged; the looks share the rate of false discoveries."""

WANTED_ROUNDS = LOOKS[2]
"""Sampling is cut short, if need be, so that the budget holds so many: a few long rounds tell less."""

LEAST_SAMPLING_S = 0.05
"""Of a point in a round; preparing it takes longer than that."""

SIDES = ("base", "head", "again")
"""BASE, HEAD, and BASE once more."""


@dataclass(frozen=True)
class Step:
    """Told after every measurement, and after every look."""

    round: int
    done: int
    """Measurements of this round."""
    of: int
    side: str
    measurement: Measurement | None = None
    comparison: Comparison | None = None
    """What a look has found."""


@dataclass(frozen=True)
class Gated:
    """What a gate has found."""

    comparison: Comparison
    base: results.Run
    head: results.Run
    rounds: int
    stopped: str
    """Why no further round was taken: everything is decided, the budget is spent, or that was the last look."""


def gate(
    revision: str,
    suite: str,
    *,
    out: Path,
    axes: Axes | None = None,
    budget_s: float = 1200.0,
    seconds: float | None = None,
    timeout_s: float = 600.0,
    resume: bool = False,
    command: str = "",
    progress: Callable[[Step], None] = lambda _: None,
) -> Gated:
    """Measures a base revision and what is installed, in turn, until every point is decided or the budget is spent.

    Points that a look decides are measured no more. A gate that was killed goes on where it was.

    Args:
        revision: The base, as git names it.
        suite: Name of a suite; its points in both revisions are compared, so that one that was deleted is missed.
        out: Folder for the runs of both sides.
        axes: Values that replace the suite's own.
        budget_s: After so many seconds no further round is begun; the first look is always taken.
        seconds: The most for sampling one point in one round; None takes the suite's own.
        timeout_s: A point that takes longer is given up, with its worker.
        resume: Go on with what lies in `out`.
        command: What reproduces this.
        progress: Told of every measurement.

    Raises:
        RequestError: No such revision or suite, or `out` cannot be used.
    """
    planned = plan(suite, axes=axes)
    seconds = seconds or planned.seconds
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    with _checkout(commit, out) as source, ExitStack() as stack:
        ours = {point.key: point for sweep in planned.sweeps for point in sweep.points() if point.kind != "task"}
        theirs = _points_of(source, suite, axes or {})
        points = ours | theirs
        device, dtypes = devices(points.values())
        of_base = {"source": source, "python": _environment_of(source, out)}
        engines = {
            "base": stack.enter_context(LocalEngine(timeout_s=timeout_s, **of_base)),
            "head": stack.enter_context(LocalEngine(timeout_s=timeout_s)),
            "again": stack.enter_context(LocalEngine(timeout_s=timeout_s, **of_base)),
        }
        described, _ = engines["head"].describe(device, dtypes, {point.workload: point.kind for point in ours.values()})
        before, _ = engines["base"].describe(device, dtypes, {})
        # Ceilings are the machine's: both sides are held against the same.
        before = replace(
            before,
            git_commit=commit, git_dirty=False,
            flops_per_s=described.flops_per_s, bytes_per_s=described.bytes_per_s,
        )  # fmt: skip
        wanted = {"base": theirs.keys(), "head": ours.keys(), "again": ours.keys() & theirs.keys()}
        opened = results.RunWriter.resume if resume else results.RunWriter.create
        sides = {}
        for name in SIDES:
            environment = described if name == "head" else before
            writer = opened(out / name, suite=suite, sweeps=planned.sweeps, environment=environment, command=command)
            sides[name] = Side(engines[name], stack.enter_context(writer), environment, wanted[name])
        deadline = time.monotonic() + budget_s
        comparison, rounds, stopped = _until_decided(list(points.values()), sides, out, deadline, seconds, progress)
    return Gated(comparison, results.load(out / "base"), results.load(out / "head"), rounds, stopped)


@dataclass(frozen=True)
class Side:
    """One of the runs that are measured in turn."""

    engine: LocalEngine
    writer: results.RunWriter
    environment: Environment
    wanted: Set[str]
    """Keys of the points that it has."""


def take_round(
    number: int,
    points: Sequence[Point],
    sides: Mapping[str, Side],
    *,
    seconds: float,
    progress: Callable[[Step], None] = lambda _: None,
) -> int:
    """One round of every side, in turn, each in a fresh process; what is measured already is not measured again.

    Returns:
        How many measurements were taken.
    """
    names = tuple(sides)
    for side in sides.values():
        side.engine.retire()
    done = taken = 0
    for index, point in enumerate(points):
        # Who goes first moves on, so that no side is always the one that finds the machine warm.
        first = (number + index) % len(names)
        order = (*names[first:], *names[:first])
        works = {
            name: side.engine.measuring(point, number, side.environment, seconds=seconds, in_turn=True)
            for name in order
            if point.key in (side := sides[name]).wanted and (point.key, number) not in side.writer.done
        }
        done += len(names) - len(works)
        for name, measured in _one_by_one_where_they_do_not_fit(sides, works, point, number, seconds):
            sides[name].writer.append(measured)
            done += 1
            taken += 1
            progress(Step(number, done, len(names) * len(points), name, measured))
    return taken


def _one_by_one_where_they_do_not_fit(
    sides: Mapping[str, Side], works: Mapping[str, Work], point: Point, number: int, seconds: float
) -> Iterator[tuple[str, Measurement]]:
    """All sides in turn; those for which there was no memory beside the others, by themselves."""
    alone = []
    for name, measured in in_turn(works, seconds):
        if measured.status == "oom":
            alone.append(name)
        else:
            yield name, measured
    for name in alone:
        side = sides[name]
        yield name, side.engine.measure(point, number, side.environment, seconds=seconds, video=None)


def judge(base: results.Run, head: results.Run, again: results.Run, *, rounds: int) -> Comparison:
    """What a look after so many rounds says, whatever a gate that was killed has measured beyond them."""
    base, head, again = (
        replace(run, measurements=[one for one in run.measurements if one.round <= rounds])
        for run in (base, head, again)
    )
    return compare(base, head, again=again, rate=FALSE_DISCOVERY_RATE / len(LOOKS))


def undecided(found: Comparison) -> set[str]:
    """The points that the next rounds take, of all that a look has judged: what was decided may be open again."""
    return {one.point.key for one in found.points if one.verdict == "UNDECIDED"}


def _until_decided(
    points: Sequence[Point],
    sides: Mapping[str, Side],
    out: Path,
    deadline: float,
    most_s: float,
    progress: Callable[[Step], None],
) -> tuple[Comparison, int, str]:
    """Rounds and looks, until nothing is open: the last look, how many rounds there were, and why they ended.

    What one side alone has is measured there in the first round, to see that it runs at all.
    """
    open_points = list(points)
    number = 0
    # Preparing the points may take as long as sampling them.
    seconds = sampling_s(deadline - time.monotonic(), 2 * WANTED_ROUNDS, len(points) * len(sides), 0.0, most_s)
    for look in LOOKS:
        spent = False
        while number < look and not spent:
            number += 1
            began = time.monotonic()
            taken = take_round(number, open_points, sides, seconds=seconds, progress=progress)
            if number == 1:
                open_points = [point for point in points if point.key in sides["again"].wanted]
            now = time.monotonic()
            spent = number >= LOOKS[0] and now > deadline
            if taken:
                besides_s = (now - began) / taken - seconds
                works = len(open_points) * len(sides)
                seconds = sampling_s(deadline - now, WANTED_ROUNDS - number, works, besides_s, most_s)
        # When the budget ends does not hang on what was found, so what it has bought may be looked at.
        found = judge(*(results.load(out / name) for name in SIDES), rounds=number)
        still = undecided(found)
        open_points = [point for point in points if point.key in still]
        progress(Step(number, 0, 0, "", comparison=found))
        if not open_points:
            return found, number, "every point is decided"
        if spent:
            return found, number, "the budget is spent"
    return found, number, "the last look was taken"


def sampling_s(left_s: float, rounds: int, works: int, besides_s: float, most_s: float) -> float:
    """How long to sample, so that what is left of the budget holds so many further rounds.

    Args:
        left_s: Of the budget.
        rounds: That are still wanted.
        works: Measurements in a round.
        besides_s: What one takes besides sampling.
        most_s: No longer than that.
    """
    fitting_s = left_s / (max(1, rounds) * max(1, works)) - besides_s
    return min(most_s, max(LEAST_SAMPLING_S, fitting_s))


def _git(*arguments: str, cwd: Path | None = None) -> str:
    """What git says.

    Raises:
        RequestError: git is not there, this is no repository, or there is no such revision.
    """
    try:
        ran = subprocess.run(("git", *arguments), capture_output=True, text=True, check=True, cwd=cwd, timeout=300)
    except FileNotFoundError:
        raise RequestError("a gate needs git, to take the base revision's sources") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or error).strip().splitlines()
        raise RequestError(f"git {' '.join(arguments)}: {said[-1] if said else 'failed'}") from None
    return ran.stdout.strip()


@contextlib.contextmanager
def _checkout(commit: str, out: Path) -> Iterator[Path]:
    """The sources of a commit, in a worktree that is removed in the end; what a kill has left of one is made anew."""
    place = (out / "source").resolve()
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    _git("worktree", "prune")
    _git("worktree", "add", "--detach", str(place), commit)
    try:
        if not (place / "kernels" / "vidkernels").is_dir() or not (place / "vidbench" / "suites.py").is_file():
            raise RequestError(
                f"revision {commit[:12]} has no kernels/vidkernels or no vidbench: nothing to compare with"
            )
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(RequestError):
            _git("worktree", "prune")


_LIST_POINTS = """
import json, sys
from dataclasses import asdict
from vidbench.suites import SUITES, plan
axes = {
    name: tuple(tuple(value) if isinstance(value, list) else value for value in values)
    for name, values in json.loads(sys.argv[2]).items()
}
points = [] if sys.argv[1] not in SUITES else [
    asdict(point) for sweep in plan(sys.argv[1], axes=axes).sweeps for point in sweep.points() if point.kind != "task"
]
print(json.dumps(points))
"""


def _points_of(source: Path, suite: str, axes: Axes) -> dict[str, Point]:
    """The points that a suite has in another checkout."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(source), str(source / "kernels")))}
    asked = (sys.executable, "-P", "-c", _LIST_POINTS, suite, json.dumps(axes))
    ran = subprocess.run(asked, capture_output=True, text=True, check=False, env=environ, cwd=source)
    if ran.returncode:
        said = ran.stderr.strip().splitlines()
        raise RequestError(f"the base revision cannot list the points of {suite!r}: {said[-1] if said else 'no word'}")
    points = msgspec.json.decode(ran.stdout, type=list[Point])
    found = [
        replace(point, case={k: tuple(v) if isinstance(v, list) else v for k, v in point.case.items()})
        for point in points
    ]
    return {point.key: point for point in found}


def _environment_of(source: Path, out: Path) -> Path | None:
    """The base's own interpreter where it is tested with other versions than head; None where they are the same."""
    theirs, ours = source / "constraints.txt", Path(_git("rev-parse", "--show-toplevel")) / "constraints.txt"
    if not theirs.exists() or not ours.exists() or theirs.read_bytes() == ours.read_bytes():
        return None
    folder = out / "environment"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        install = (str(python), "-m", "pip", "install", "-q", "-c", str(theirs), str(source))
        ran = subprocess.run(install, capture_output=True, text=True, check=False)
        if ran.returncode:
            said = ran.stderr.strip().splitlines()
            raise RequestError(f"the base's versions cannot be installed: {said[-1] if said else 'no word'}")
        where = (str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        harness = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()) / "vidbench"
        shutil.rmtree(harness)  # head's measures both
        shutil.copytree(Path(vidbench.__file__).parent, harness)
        ready.touch()
    return python
