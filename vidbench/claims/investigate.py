"""Doing the experiments that claims ask for: side by side in processes of their own, each outcome kept at once."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec

from vidbench.claims import Claim, Experiment, Finding, Outcome, Row, judge
from vidbench.engine.local import signal_name
from vidbench.records import Environment
from vidbench.run_format import UNDECODABLE
from vidbench.sweep import RequestError

SCHEMA_VERSION = 1
HEADER = "claims.json"
LINES = "experiments.jsonl"
TIMEOUT_S = 3600.0
GRACE_S = 5.0
MOST_JOBS = 8
"""Small networks leave a GPU idle, and so share it."""


@dataclass(frozen=True)
class Header:
    """What claims.json holds: what must agree for an investigation to be gone on with."""

    schema_version: int
    created_utc: str
    size: str
    device: str
    command: str
    environment: Environment
    sources: str
    """Digest of the code that an outcome depends on."""


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """One finished experiment."""

    kind: str
    given: dict[str, Any]
    seed: int
    rows: list[dict[str, Any]]
    wall_s: float
    failure: str = ""


@dataclass(frozen=True)
class Step:
    """Told when an experiment begins (`outcome` is None) and ends."""

    done: int
    total: int
    experiment: Experiment
    seconds_left: float | None
    """Estimated from what the experiments done so far have taken."""
    outcome: Outcome | None = None


def investigate(
    claims: Sequence[Claim],
    out: Path,
    *,
    size: str,
    device: str = "cpu",
    resume: bool = False,
    jobs: int | None = None,
    command: str = "",
    progress: Callable[[Step], None] = lambda _: None,
) -> tuple[Header, list[Finding], list[Outcome]]:
    """Does the experiments that are not done yet, and judges the claims by all of them.

    Every experiment runs in a process of its own, on one thread, so that its outcome does not depend on how many run
    side by side; what is timed runs first, alone, on all cores. What failed is tried again when resumed.

    Args:
        claims: What to put to the test.
        out: Folder that keeps the outcomes.
        size: Name of the size that `claims` were made for.
        device: cpu or cuda.
        resume: Go on with what lies in `out`, or start there.
        jobs: Experiments side by side; by default the cores, at most `MOST_JOBS`.
        command: What reproduces this.
        progress: Told of every experiment.

    Returns:
        What the folder is of, the findings, and all outcomes that it holds.

    Raises:
        RequestError: `out` is used already, is of another size, machine or revision, or cannot be written.
    """
    from vidbench.claims.experiments import ALONE
    from vidbench.environment import describe

    jobs = jobs or min(len(os.sched_getaffinity(0)), MOST_JOBS)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    header = Header(SCHEMA_VERSION, now, size, device, command, describe(device, ()), _sources())
    with _written(out):
        header = _open(out, header, resume)
        with (out / LINES).open("ab") as file:
            _lock(file, out)
            kept = {outcome.experiment.key: outcome for outcome in _restore(out)}
            asked = list({one.key: one for claim in claims for one in claim.experiments}.values())
            missing = [one for one in asked if one.key not in kept or kept[one.key].failure]
            count = len(asked) - len(missing)
            clock = _Clock(missing, [outcome for outcome in kept.values() if not outcome.failure], jobs)

            def keep(outcome: Outcome) -> None:
                nonlocal count
                _write(file, outcome)
                kept[outcome.experiment.key] = outcome
                count += 1
                clock.finished(outcome)
                progress(Step(count, len(asked), outcome.experiment, clock.left(), outcome))

            def begin(experiment: Experiment) -> None:
                progress(Step(count, len(asked), experiment, clock.left()))

            _do([one for one in missing if one.kind in ALONE], device, 1, begin, keep)
            _do([one for one in missing if one.kind not in ALONE], device, jobs, begin, keep)
    done = list(kept.values())
    return header, [judge(claim, done) for claim in claims], done


@contextlib.contextmanager
def _written(out: Path) -> Any:
    """Trouble with the disk, in one line."""
    try:
        yield
    except OSError as problem:
        raise RequestError(f"cannot write to {out}: {problem.strerror or problem}") from None


def _lock(file: Any, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(f"{out}: another process is at work there; wait for it or end it") from None


def _sources() -> str:
    """Digest of the code that an outcome depends on: an edited tree has the commit of the one before."""
    root = Path(__file__).resolve().parents[1]
    parts = [root / name for name in ("claims/contenders.py", "claims/experiments.py", "counting.py", "environment.py")]
    parts += [root / name for name in ("memory.py", "timing.py", "training.py", "trials.py")]
    for folder in ("data", "models"):
        parts += sorted((root / folder).rglob("*.py"))
    # What is asked stands in every outcome, and what judges is done anew: those are not of it.
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes())
    return digest.hexdigest()[:16]


def load(out: Path) -> tuple[Header, list[Outcome]]:
    """What an investigation has found so far.

    Raises:
        RequestError: There is none, or it is damaged; names file and line.
    """
    try:
        header = msgspec.json.decode((out / HEADER).read_bytes(), type=Header)
    except FileNotFoundError:
        raise RequestError(f"{out} holds no {HEADER}: give the --out of `vidbench claims`") from None
    except (*UNDECODABLE, OSError) as error:
        raise RequestError(f"{out / HEADER} cannot be read: {error}") from None
    if header.schema_version != SCHEMA_VERSION:
        raise RequestError(f"{out / HEADER} has schema_version {header.schema_version}; wanted {SCHEMA_VERSION}")
    path = out / LINES
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found: dict[str, Outcome] = {}
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            break  # torn by a kill: that experiment is done again
        try:
            read = msgspec.json.decode(line, type=_Line)
        except UNDECODABLE as error:
            raise RequestError(f"{path}, line {number}: {error}") from None
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in read.given.items()}
        outcome = Outcome(Experiment(read.kind, given, read.seed), read.rows, read.wall_s, read.failure)
        found[outcome.experiment.key] = outcome
    return header, list(found.values())


def _open(out: Path, header: Header, resume: bool) -> Header:
    """Begins an investigation, or checks that one can be gone on with."""
    new = f".{HEADER}.tmp"
    if not (out / HEADER).exists():
        if out.exists() and any(entry.name != new for entry in out.iterdir()):
            raise RequestError(f"{out} is not empty and holds no {HEADER}: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        with (out / new).open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(header), indent=1))
            file.flush()
            os.fsync(file.fileno())
        (out / new).replace(out / HEADER)
        return header
    if not resume:
        raise RequestError(f"{out} holds an investigation already: go on with it by --resume, or choose another --out")
    before, _ = load(out)
    for what, then, now in (
        ("size", before.size, header.size),
        ("device", before.device, header.device),
        ("machine or revision", before.environment.identity, header.environment.identity),
        ("version of the code", before.sources, header.sources),
    ):
        if then != now:
            raise RequestError(f"{out} is of another {what}: {then}, not {now}; choose another --out")
    return before


def _restore(out: Path) -> list[Outcome]:
    """The outcomes so far; a torn last line is cut off."""
    path = out / LINES
    whole = path.read_bytes()
    os.truncate(path, whole.rfind(b"\n") + 1)
    return load(out)[1]


def _write(file: Any, outcome: Outcome) -> None:
    one = outcome.experiment
    rows = [dict(row) for row in outcome.rows]
    line = _Line(one.kind, dict(one.given), one.seed, rows, outcome.wall_s, outcome.failure)
    file.write(msgspec.json.encode(line) + b"\n")
    file.flush()
    os.fsync(file.fileno())


class _Clock:
    """Says how long the rest takes, from what like experiments have taken."""

    def __init__(self, missing: Sequence[Experiment], before: Sequence[Outcome], jobs: int) -> None:
        self.missing = {one.key: one for one in missing}
        self.jobs = jobs
        self.taken: dict[tuple[str, str], list[float]] = {}
        for outcome in before:
            self._learn(outcome)

    def _learn(self, outcome: Outcome) -> None:
        self.taken.setdefault(_like(outcome.experiment), []).append(outcome.wall_s)

    def finished(self, outcome: Outcome) -> None:
        """One fewer to do."""
        self.missing.pop(outcome.experiment.key, None)
        self._learn(outcome)

    def left(self) -> float | None:
        """Seconds; None where nothing is known yet."""
        known = [seconds for taken in self.taken.values() for seconds in taken]
        if not known:
            return None
        total = 0.0
        for one in self.missing.values():
            like = self.taken.get(_like(one), known)
            total += sum(like) / len(like) / self.jobs
        return total


def _like(experiment: Experiment) -> tuple[str, str]:
    return experiment.kind, str(experiment.given.get("model", experiment.given.get("mode", "")))


@dataclass
class _Running:
    experiment: Experiment
    process: BaseProcess
    answers: Connection
    started: float


def _do(
    experiments: Sequence[Experiment],
    device: str,
    jobs: int,
    begin: Callable[[Experiment], None],
    keep: Callable[[Outcome], None],
) -> None:
    """Experiments side by side; whatever becomes of a process, there is an outcome."""
    if not experiments:
        return
    # Forked from a server that has imported what they need: no process pays for it, and none inherits a device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vidbench.claims.experiments"])
    todo = list(reversed(experiments))
    running: list[_Running] = []
    try:
        while todo or running:
            while todo and len(running) < jobs:
                one = todo.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(theirs, one, device), daemon=True)
                begin(one)
                process.start()
                theirs.close()
                running.append(_Running(one, process, ours, time.perf_counter()))
            ready = wait([job.answers for job in running], timeout=1.0)
            for job in list(running):
                elapsed = time.perf_counter() - job.started
                if job.answers in ready:
                    keep(_answer(job, elapsed))
                elif elapsed > TIMEOUT_S:
                    job.process.kill()
                    keep(Outcome(job.experiment, [], elapsed, f"timeout: no result within {TIMEOUT_S:g} s"))
                else:
                    continue
                running.remove(job)
    finally:
        for job in running:
            job.process.kill()
            job.process.join(GRACE_S)


def _answer(job: _Running, elapsed: float) -> Outcome:
    """What a process sent, or how it ended."""
    try:
        rows, failure = job.answers.recv()
    except (EOFError, OSError):
        job.process.join(GRACE_S)
        code = job.process.exitcode
        ended = signal_name(-code) if code is not None and code < 0 else f"exit code {code}"
        rows, failure = [], f"crashed: the process ended with {ended}"
    job.answers.close()
    job.process.join(GRACE_S)
    return Outcome(job.experiment, rows, elapsed, failure)


def _child(answers: Connection, experiment: Experiment, device: str) -> None:
    """One experiment, in a process of its own."""
    import torch

    from vidbench.claims.experiments import ALONE, perform

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process, in order
    threading.Thread(target=_end_with_parent, daemon=True).start()
    nowhere = os.open(os.devnull, os.O_WRONLY)  # libraries chatter; what an experiment raises is told otherwise
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    if experiment.kind not in ALONE:
        torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)
    rows: list[Row] = []
    failure = ""
    try:
        rows = perform(experiment, device)
    except Exception as error:  # noqa: BLE001  whatever an experiment raises is its outcome
        reason = str(error).strip().splitlines()
        failure = f"{type(error).__name__}: {reason[0] if reason else 'no message'}"
    with contextlib.suppress(BrokenPipeError):  # the parent was interrupted meanwhile
        answers.send((rows, failure))


def _end_with_parent() -> None:
    """Ends this process when the one that asked for it is gone: its own parent is the fork server, which stays."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
