"""Two revisions measured in one job, in turn, and judged: for CI on a machine that is never quite the same.

Head's harness measures both; of the base it takes the kernels and the models. Every round is a fresh process for each
side, and BASE has two: how far those lie apart is the machine's own noise, learnt where it matters.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from vidbench import results
from vidbench.compare import FALSE_DISCOVERY_RATE, Comparison, compare
from vidbench.engine import devices
from vidbench.engine.local import LocalEngine, Work, in_turn
from vidbench.records import Environment, Measurement
from vidbench.revision import (
    checkout,
    environment_of,
    git,
    is_vidbench,
    points_of,
    require_installed,
    timed_points,
)
from vidbench.suites import Axes, plan
from vidbench.sweep import Point, RequestError

LOOKS = (6, 12, 20, 30)
"""Rounds after which is judged; the looks share the rate of false discoveries."""

WANTED_ROUNDS = LOOKS[2]
"""Sampling is cut short, if need be, so that the budget holds so many: a few long rounds tell less."""

LEAST_SAMPLING_S = 0.05
"""Of a point in a round; preparing it takes longer than that."""

MARGIN = 0.97
"""Of the budget: so much of it is planned."""

JOURNAL = "gate.jsonl"
"""In the folder of a gate: the looks that it took."""

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
    models: Sequence[str] = (),
    budget_s: float = 1200.0,
    seconds: float | None = None,
    timeout_s: float = 600.0,
    resume: bool = False,
    command: str = "",
    progress: Callable[[Step], None] = lambda _: None,
) -> Gated:
    """Measures a base revision and what is installed, in turn, until every point is decided or the budget is spent.

    Points that a look decides are measured no more. A gate that was killed goes on where it was. In this repository the
    base supplies vidkernels and the models; in any other both sides supply the `package.module:factory` of `models`.

    Args:
        revision: The base, as git names it.
        suite: Name of a suite; its points in both revisions are compared, so that one that was deleted is missed.
        out: Folder for the runs of both sides.
        axes: Values that replace the suite's own.
        models: Models instead of the suite's own.
        budget_s: Rounds after the first look are taken as long as they fit into so many seconds.
        seconds: The most for sampling one point in one round; None takes the suite's own.
        timeout_s: A point that takes longer to be prepared, or for one sample, is given up, with its worker.
        resume: Go on with what lies in `out`.
        command: What reproduces this.
        progress: Told of every measurement.

    Raises:
        RequestError: No such revision or suite; `out` holds something else, or is in use; or what is installed is not
            the head.
    """
    planned = plan(suite, axes=axes, model_names=models)
    seconds = seconds or planned.seconds
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    repository = Path(git("rev-parse", "--show-toplevel"))
    own = is_vidbench(repository)
    if own:
        require_installed(repository)
    elif not any(":" in name for name in models):
        raise RequestError(
            f"{repository} is not vidbench's repository, so both revisions of {suite!r} would be the same: "
            "name what of it is measured, by --model package.module:factory"
        )
    with _Journal(out, resume=resume) as journal, checkout(commit, out) as tree, ExitStack() as stack:
        ours = {point.key: point for point in timed_points(suite, axes or {}, models)}
        theirs = points_of(tree, suite, axes or {}, models) if own else ours
        within = Path.cwd().resolve().relative_to(repository.resolve())
        sources = (tree, None) if own else (tree / within, Path.cwd())
        points = ours | theirs
        there = {point.implementation for point in points.values()}
        for name in (axes or {}).get("implementation", ()):
            if name not in {*there, "all"}:
                raise RequestError(f"{suite!r} has no implementation {name!r}: see `vidbench list implementations`")
        device, dtypes = devices(points.values())
        python = environment_of(tree, repository, out) if own else None
        engines = {
            name: stack.enter_context(
                LocalEngine(
                    timeout_s=timeout_s,
                    source=sources[name == "head"],
                    python=None if name == "head" else python,
                    takes_turns=True,
                )
            )
            for name in SIDES
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
        sides = {}
        for name in SIDES:
            environment = described if name == "head" else before
            writer = results.RunWriter.resume(
                out / name, suite=suite, sweeps=planned.sweeps, environment=environment, command=command
            )
            sides[name] = Side(engines[name], stack.enter_context(writer), environment, wanted[name])
        pace = Pace(time.monotonic() + budget_s, seconds)
        comparison, rounds, stopped = _until_decided(list(points.values()), sides, out, journal, pace, progress)
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
) -> list[tuple[str, Measurement]]:
    """One round of every side, in turn, each in a fresh process; what is measured already is not measured again.

    Returns:
        The measurements that were taken, with their sides.
    """
    names = tuple(sides)
    for side in sides.values():
        side.engine.retire()
    taken: list[tuple[str, Measurement]] = []
    done = 0
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
            taken.append((name, measured))
            done += 1
            progress(Step(number, done, len(names) * len(points), name, measured))
    return taken


def _one_by_one_where_they_do_not_fit(
    sides: Mapping[str, Side], works: Mapping[str, Work], point: Point, number: int, seconds: float
) -> Iterator[tuple[str, Measurement]]:
    """All sides in turn; those for which there was no memory beside the others, once those are gone."""
    alone = []
    for name, measured in in_turn(works, seconds):
        if measured.status == "oom":
            alone.append(name)
        else:
            yield name, measured
    for name in alone:
        for side in sides.values():
            side.engine.retire()
        work = sides[name].engine.measuring(point, number, sides[name].environment, seconds=seconds, in_turn=True)
        yield from in_turn({name: work}, seconds)


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


class _Journal:
    """The folder of a gate, for one process at a time, and the looks that were taken there.

    A gate that goes on, after a kill or with a new budget, takes no more looks than one that was never stopped.
    """

    def __init__(self, out: Path, *, resume: bool) -> None:
        self.out, self.resume = out, resume
        self.looks: list[int] = []
        """Numbers of rounds."""

    def __enter__(self) -> Self:
        path = self.out / JOURNAL
        try:
            if self.out.exists() and any(self.out.iterdir()):
                # A worktree and an environment are made anew here: never over somebody's files.
                if not path.exists():
                    raise RequestError(f"{self.out} is not empty and holds no gate: choose another --out")
                if not self.resume:
                    raise RequestError(
                        f"{self.out} holds a gate already: go on with it by --resume, or choose another --out"
                    )
            self.out.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as problem:
            raise RequestError(f"cannot write to {self.out}: {problem.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RequestError(f"{self.out}: another gate is at work there; wait for it or end it") from None
        self._file.seek(0)
        content = self._file.read()
        os.truncate(path, content.rfind(b"\n") + 1)  # a line that was torn by a kill
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                self.looks.append(int(json.loads(line)["look"]))
            except (ValueError, TypeError, KeyError):
                self._file.close()
                raise RequestError(f'{path}, line {number}: wanted {{"look": rounds}}') from None
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def look(self, rounds: int) -> None:
        """Notes that a look is taken, before anybody sees it.

        Raises:
            RequestError: The disk refuses.
        """
        try:
            self._file.write(json.dumps({"look": rounds}).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as problem:
            raise RequestError(f"cannot write to {self.out}: {problem.strerror}") from None
        self.looks.append(rounds)


@dataclass
class Pace:
    """How long the points of a round are sampled, so that the budget holds the rounds that a verdict wants."""

    deadline: float
    """Of `time.monotonic`."""
    most_s: float
    """For sampling a point in a round."""
    besides_s: float | None = field(default=None, init=False)
    """What a measurement takes besides sampling, in the last round; None where it is not known."""
    _rounds: int = field(default=0, init=False)

    def sampling_s(self, number: int, works: int) -> float:
        """For each of so many measurements of a round."""
        left_s = MARGIN * (self.deadline - time.monotonic())
        share_s = left_s / (max(1, WANTED_ROUNDS - number + 1) * max(1, works))
        besides_s = share_s / 2 if self.besides_s is None else self.besides_s
        return min(self.most_s, max(LEAST_SAMPLING_S, share_s - besides_s))

    def fits(self, seconds: float, works: int) -> bool:
        """Whether so many measurements will end within the budget."""
        return time.monotonic() + works * (seconds + (self.besides_s or 0.0)) <= self.deadline

    def learn(self, took_s: float, seconds: float, works: int) -> None:
        """What a round has taken; the first one, which starts processes and counts, tells nothing of the others."""
        self._rounds += 1
        if self._rounds > 1 and works:
            self.besides_s = max(0.0, took_s / works - seconds)


def _until_decided(
    points: Sequence[Point],
    sides: Mapping[str, Side],
    out: Path,
    journal: _Journal,
    pace: Pace,
    progress: Callable[[Step], None],
) -> tuple[Comparison, int, str]:
    """Rounds and looks, until nothing is open: the last look, how many rounds there were, and why they ended.

    What one side alone has is measured there in the first round, to see that it runs at all.
    """
    compared = [point for point in points if point.key in sides["again"].wanted]
    before = (one for name in ("base", "head") for one in results.load(out / name).measurements)
    broken = {one.point.key for one in before if one.status != "ok"}
    number, found = 0, Comparison((), ())
    open_points = list(points)

    def look() -> list[Point]:
        nonlocal found
        found = judge(*(results.load(out / name) for name in SIDES), rounds=number)
        progress(Step(number, 0, 0, "", comparison=found))
        still = undecided(found)
        return [point for point in compared if point.key in still]

    if journal.looks:
        number = journal.looks[-1]
        open_points = look()
    while open_points:
        target = next((rounds for rounds in LOOKS if rounds > number), number)
        if target == number or len(journal.looks) == len(LOOKS):
            return found, number, "the last look was taken"
        looked = number
        while number < target:
            works = sum(
                (point.key, number + 1) not in side.writer.done and point.key in side.wanted
                for point in open_points
                for side in sides.values()
            )
            seconds = pace.sampling_s(number + 1, works)
            if works and number >= LOOKS[0] and not pace.fits(seconds, works):
                break
            number += 1
            began = time.monotonic()
            taken = take_round(number, open_points, sides, seconds=seconds, progress=progress)
            pace.learn(time.monotonic() - began, seconds, len(taken))
            broken |= {one.point.key for name, one in taken if name != "again" and one.status != "ok"}
            # What did not run is MISSING whatever follows, and a point that hangs costs its timeout each time.
            open_points = [point for point in open_points if point in compared and point.key not in broken]
        if number > looked:
            journal.look(number)
            open_points = look()
        if number < target:
            return found, number, "the budget is spent" if open_points else DECIDED
    return found, number, DECIDED


DECIDED = "every point is decided"
