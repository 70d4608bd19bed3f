"""The local engine: one server process, one worker at a time, each replaced when it dies, hangs or must be fresh."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import msgspec

from vidbench import worker as protocol
from vidbench.records import Environment, KnownCosts, Measurement, Status
from vidbench.run_format import impossible
from vidbench.sweep import Point, RequestError

START_TIMEOUT_S = 300.0
"""For importing torch on a slow disk."""

GRACE_S = 10.0
"""For a worker that hung up to end by itself."""

SPIN_COUNT = "30000"
"""For about a millisecond OpenMP's threads (GNU's) go on spinning when there is no more to do: ten times longer than
from one operator to the next, and a tenth of what they do by themselves."""

REASON_CHARACTERS = 300
LOG_BYTES = 2**16


Work = Generator[float, bool, Measurement]
"""A measurement that is taken step by step: see `LocalEngine.measuring`."""


@dataclass
class _Worker:
    pid: int
    connection: socket.socket
    log: IO[bytes]
    adopted: Environment | None = None


class LocalEngine:
    """Takes points one at a time to a process of their own. Use as a context manager.

    Args:
        timeout_s: A point that takes longer is given up, with its worker.
        source: A checkout whose vidkernels and models are measured, instead of those installed.
        python: The interpreter of the workers, of an environment with this harness; this one where not given.
        takes_turns: Whether the workers take samples in turn with others', and are to be out of their way soon.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        source: Path | None = None,
        python: Path | None = None,
        takes_turns: bool = False,
    ) -> None:
        self.timeout_s = timeout_s
        self._python = str(python or sys.executable)
        self._environ = dict(os.environ)
        if source is not None:
            self._environ[protocol.SOURCE] = str(source)
        if takes_turns and "OMP_WAIT_POLICY" not in self._environ:
            self._environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        self._server: subprocess.Popen[bytes] | None = None
        self._worker: _Worker | None = None
        self._costs = KnownCosts()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(
        self, device: str, dtypes: tuple[str, ...], workloads: Mapping[str, str]
    ) -> tuple[Environment, dict[str, tuple[str, ...]]]:
        """The environment, and by workload its implementations.

        Raises:
            RequestError: A model cannot be found, or the machine cannot be described.
        """
        worker = self._ready()
        try:
            protocol.send(worker.connection, protocol.Describe(device, dtypes, dict(workloads)))
            answer = self._answer(worker, protocol.Description, START_TIMEOUT_S)
        except TimeoutError:
            raise RequestError(f"this machine could not be described within {START_TIMEOUT_S:g} s") from None
        except msgspec.MsgspecError as error:
            raise RequestError(
                f"this machine could not be described: the worker's answer is unreadable: {error}"
            ) from None
        except OSError:
            answer = None
        if answer is None:
            raise RequestError(f"this machine could not be described: {self._bury()[1]}")
        if answer.environment is None:
            raise RequestError(answer.refusal)
        return answer.environment, answer.implementations

    def measure(
        self, point: Point, round: int, environment: Environment, *, seconds: float, video: str | None
    ) -> Measurement:
        """The measurement of one point; whatever becomes of the worker, and whatever it says, there is one."""
        work = self.measuring(point, round, environment, seconds=seconds, video=video)
        try:
            next(work)
        except StopIteration as end:
            measurement: Measurement = end.value
            return measurement
        raise AssertionError("without turns there is nothing to wait for")

    def measuring(
        self,
        point: Point,
        round: int,
        environment: Environment,
        *,
        seconds: float,
        video: str | None = None,
        in_turn: bool = False,
    ) -> Work:
        """The measurement of one point, step by step.

        In turn with others it yields first when samples can be taken; then each `send(True)` takes one and yields the
        seconds that the turn took, and `send(False)` ends it. What it returns is the measurement; see `in_turn`.
        """
        started = time.perf_counter()
        worker = self._ready()
        oom_kills = _oom_kills()
        answers: Any = Measurement | str | float if in_turn else Measurement
        try:
            if worker.adopted is not environment:
                protocol.send(worker.connection, protocol.Adopt(environment))
                worker.adopted = environment
            worker.log.seek(0)
            worker.log.truncate()  # its last words are to be about this point
            if _is_talking(worker.connection):
                return self._refuse(worker, point, round, started, "it answered before it was asked")
            protocol.send(
                worker.connection, protocol.Task(point, round, seconds, video, in_turn, self._costs.of(point))
            )
            answer: Any = self._answer(worker, answers, self.timeout_s)
            more = in_turn
            while isinstance(answer, str | float):
                if not more:
                    return self._refuse(worker, point, round, started, "it goes on when it was told to end")
                more = yield 0.0 if isinstance(answer, str) else answer
                protocol.send(worker.connection, more)
                answer = self._answer(worker, answers, self.timeout_s)
        except TimeoutError:
            self._kill(worker)
            reason = f"no result within {self.timeout_s:g} s"
            return Measurement(point, round, "timeout", reason, wall_s=time.perf_counter() - started)
        except OSError:  # it hung up
            answer = None
        except msgspec.MsgspecError as error:
            return self._refuse(worker, point, round, started, f"unreadable: {error}")
        if answer is not None:
            if wrong := _wrong(answer, point, round):
                return self._refuse(worker, point, round, started, wrong)
            self._costs.learn(answer)
            if point.implementation == "compiled" or answer.status not in ("ok", "skipped"):
                self.retire()  # compiled code belongs to one point, and what went wrong may have left something behind
            return _with_transport(answer, time.perf_counter() - started)
        status, reason = self._bury(oom_kills)
        return Measurement(point, round, status, reason, wall_s=time.perf_counter() - started)

    def _refuse(self, worker: _Worker, point: Point, round: int, started: float, why: str) -> Measurement:
        """The row of a point whose worker cannot be believed; the next one gets a fresh worker."""
        self._kill(worker)
        reason = f"the worker's answer cannot be believed: {why}"
        return Measurement(point, round, "crashed", reason, wall_s=time.perf_counter() - started)

    def retire(self) -> None:
        """Ends the worker; the next point gets a fresh one."""
        if self._worker is not None:
            self._worker.connection.close()
            self._reap(self._worker)

    def close(self) -> None:
        """Ends the worker and the server."""
        if self._worker is not None:
            self._kill(self._worker)
        self._stop_server()

    def _stop_server(self) -> None:
        if self._server is not None:
            self._control.close()
            self._server.kill()
            self._server.wait()
            self._server = None

    def _ready(self) -> _Worker:
        """The worker, forked anew where there is none."""
        if self._server is None or self._server.poll() is not None:
            self._start_server()
        if self._worker is None:
            ours, theirs = socket.socketpair()
            log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the worker
            try:
                protocol.send(self._control, ["fork"], fds=(theirs.fileno(), log.fileno()))
                pid = protocol.receive(self._control, int)
            except OSError:
                pid = None
            theirs.close()
            if pid is None:
                raise RequestError("the server of the workers ended; its last words are above")
            self._worker = _Worker(pid, ours, log)
        return self._worker

    def _start_server(self) -> None:
        self._control, theirs = socket.socketpair()
        # A session of its own: Ctrl-C in the terminal reaches the engine alone, which ends in order.
        self._server = subprocess.Popen(
            [self._python, "-P", "-m", "vidbench.worker", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env=self._environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._control.settimeout(START_TIMEOUT_S)
        try:
            ready = protocol.receive(self._control, str)
        except OSError:
            ready = None
        if ready != protocol.READY:
            raise RequestError("the server of the workers did not start; its last words are above")

    def _answer(self, worker: _Worker, kind: Any, timeout_s: float) -> Any:
        """The worker's answer; None when it died.

        Raises:
            TimeoutError: The time is over.
        """
        try:
            return protocol.receive(worker.connection, kind, timeout_s=timeout_s)
        except ConnectionResetError:
            return None

    def _kill(self, worker: _Worker) -> None:
        _kill_group(worker.pid)
        self._reap(worker)

    def _bury(self, oom_kills: int | None = None) -> tuple[Status, str]:
        """What ended a worker that hung up without an answer, as a status and a reason."""
        worker = self._worker
        assert worker is not None  # only called with one at work
        worker.log.seek(0)
        words = _last_words(worker.log.read()[-LOG_BYTES:].decode(errors="replace"))
        status = self._reap(worker)
        if not os.WIFSIGNALED(status):
            return "crashed", f"the worker ended with exit code {os.WEXITSTATUS(status)}{words}"
        if os.WTERMSIG(status) != signal.SIGKILL:
            return "crashed", f"{signal_name(os.WTERMSIG(status))}{words}"
        if oom_kills is not None and (_oom_kills() or 0) > oom_kills:
            return "oom", "killed by the kernel: out of memory"
        return "crashed", "killed by SIGKILL from outside"

    def _reap(self, worker: _Worker) -> int:
        """Waits for the worker's end, kills it when it does not come; its wait status."""
        worker.connection.close()
        worker.log.close()
        self._worker = None
        deadline = time.monotonic() + GRACE_S
        while not _ended(worker.pid):
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        _kill_group(worker.pid)  # itself if it did not end, and what it has started
        try:
            protocol.send(self._control, ["wait", worker.pid])
            status: int | None = protocol.receive(self._control, int)
        except OSError:  # gone, or stuck behind a worker that not even SIGKILL ends
            status = None
        if status is None:
            self._stop_server()
            return signal.SIGKILL
        return status


LEAST_TURNS, MOST_TURNS = 3, 100


def in_turn(works: Mapping[str, Work], seconds: float) -> Iterator[tuple[str, Measurement]]:
    """Several engines at one point: each prepares it, then they take samples in turn, one at a time.

    So what slows the machine for a moment slows them all alike, and what is left between them belongs to the processes.

    Args:
        works: Of `LocalEngine.measuring`, by name, in the order of their turns.
        seconds: For sampling, each.

    Yields:
        Name and measurement, as they end.
    """
    waiting = dict(works)
    spent = 0.0

    def step(name: str, go: bool | None) -> Iterator[tuple[str, Measurement]]:
        nonlocal spent
        try:
            spent += waiting[name].send(go)  # type: ignore[arg-type]  # None begins a generator
        except StopIteration as end:
            del waiting[name]
            yield name, end.value

    for name in works:
        yield from step(name, None)
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and spent > seconds * len(waiting):
            break
        for name in tuple(waiting):
            yield from step(name, True)
    for name in tuple(waiting):
        yield from step(name, False)


def _wrong(answer: Measurement, point: Point, round: int) -> str:
    """Why an answer cannot be what was asked for; empty where it can."""
    if answer.point.key != point.key:
        return f"it is of {answer.point.key}"
    if answer.round != round:
        return f"it is of round {answer.round}"
    if answer.status == "ok" and not (len(answer.samples_s) or answer.accuracy):
        return "it is ok and holds neither times nor an accuracy"
    return impossible(answer)


def _is_talking(connection: socket.socket) -> bool:
    """Whether there is something to be read."""
    patience = connection.gettimeout()
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except OSError:  # nothing, or a worker that is gone, which is noticed when it is asked
        return False
    finally:
        connection.settimeout(patience)


def signal_name(number: int) -> str:
    """SIGSEGV; of a signal without a name its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill_group(pid: int) -> None:
    """Ends a worker and what it has started."""
    for kill in (os.killpg, os.kill):  # the group is made by the worker itself, a moment after it starts
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _ended(pid: int) -> bool:
    """Whether a process is gone or waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def _with_transport(measurement: Measurement, elapsed_s: float) -> Measurement:
    """The measurement with the time between asking and having it added to the harness's own."""
    if measurement.overhead_s is None or measurement.wall_s is None:
        return measurement
    transport = elapsed_s - measurement.wall_s
    return replace(measurement, wall_s=elapsed_s, overhead_s=measurement.overhead_s + transport)


def _oom_kills() -> int | None:
    """How many processes the kernel has killed for memory since it started; None where it does not tell."""
    path = Path("/proc/vmstat")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def _last_words(log: str) -> str:
    """From what a dead worker wrote last: the innermost place of a fatal error, else the last line."""
    lines = [line.strip() for line in log.partition("Fatal Python error")[2].splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File ")]
    others = [line.strip() for line in log.splitlines() if line.strip()]
    words = places[:1] or others[-1:]
    return f": {words[0][:REASON_CHARACTERS]}" if words else ""
