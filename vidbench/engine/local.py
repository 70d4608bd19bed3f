"""The local engine: one server process, one worker at a time, each replaced when it dies, hangs or must be fresh."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vidbench import worker as protocol
from vidbench.records import Environment, Measurement, Status
from vidbench.sweep import Point, RequestError

START_TIMEOUT_S = 300.0
"""For importing torch on a slow disk."""

REASON_CHARACTERS = 300


@dataclass
class _Worker:
    pid: int
    connection: socket.socket
    log: IO[bytes]
    adopted: Environment | None = None


class LocalEngine:
    """Takes points one at a time to a process of their own. Use as a context manager."""

    def __init__(self, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._server: subprocess.Popen[bytes] | None = None
        self._worker: _Worker | None = None

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
        protocol.send(worker.connection, protocol.Describe(device, dtypes, dict(workloads)))
        answer = self._answer(worker, protocol.Description, START_TIMEOUT_S)
        if answer is None:
            _, reason = self._bury(hung=self._alive(worker))
            raise RequestError(f"this machine could not be described: {reason}")
        if answer.environment is None:
            raise RequestError(answer.refusal)
        return answer.environment, answer.implementations

    def measure(
        self, point: Point, round: int, environment: Environment, *, seconds: float, video: str | None
    ) -> Measurement:
        """The measurement of one point; whatever becomes of the worker, there is one."""
        started = time.perf_counter()
        worker = self._ready()
        oom_kills = _oom_kills()
        try:
            if worker.adopted is not environment:
                protocol.send(worker.connection, protocol.Adopt(environment))
                worker.adopted = environment
            protocol.send(worker.connection, protocol.Task(point, round, seconds, video))
            answer: Measurement | None = self._answer(worker, Measurement, self.timeout_s)
        except (BrokenPipeError, ConnectionResetError):
            answer = None
        if answer is not None:
            if point.implementation == "compiled":
                self.retire()  # compiled code and its caches belong to one point
            return answer
        hung = time.perf_counter() - started >= self.timeout_s
        status, reason = self._bury(hung=hung, oom_kills=oom_kills)
        return Measurement(point, round, status, reason, wall_s=time.perf_counter() - started)

    def retire(self) -> None:
        """Ends the worker; the next point gets a fresh one."""
        if self._worker is not None:
            self._worker.connection.close()
            self._reap(self._worker)

    def close(self) -> None:
        """Ends the worker and the server."""
        if self._worker is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._worker.pid, signal.SIGKILL)
            self._worker.connection.close()
            self._worker.log.close()
            self._worker = None
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
            log = tempfile.TemporaryFile()
            protocol.send(self._control, ["fork"], fds=(theirs.fileno(), log.fileno()))
            pid = protocol.receive(self._control, int)
            theirs.close()
            if pid is None:
                raise RequestError("the server of the workers ended; its last words are above")
            self._worker = _Worker(pid, ours, log)
        return self._worker

    def _start_server(self) -> None:
        self._control, theirs = socket.socketpair()
        # A session of its own: Ctrl-C in the terminal reaches the engine alone, which ends in order.
        self._server = subprocess.Popen(
            [sys.executable, "-m", "vidbench.worker", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._control.settimeout(START_TIMEOUT_S)
        if protocol.receive(self._control, str) != "ready":
            raise RequestError("the server of the workers did not start; its last words are above")

    def _answer(self, worker: _Worker, kind: Any, timeout_s: float) -> Any:
        """The worker's answer; None when it died or the time is over."""
        readable, _, _ = select.select([worker.connection], [], [], timeout_s)
        if not readable:
            return None
        try:
            return protocol.receive(worker.connection, kind)
        except ConnectionResetError:
            return None

    def _alive(self, worker: _Worker) -> bool:
        return Path(f"/proc/{worker.pid}").exists()

    def _bury(self, *, hung: bool, oom_kills: int | None = None) -> tuple[Status, str]:
        """Ends a worker that gave no answer; the status and reason for its point."""
        worker = self._worker
        assert worker is not None  # only called with one at work
        if hung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
        worker.log.seek(0)
        words = worker.log.read()[-4000:].decode(errors="replace")
        status = self._reap(worker)
        if hung:
            return "timeout", f"no result within {self.timeout_s:g} s"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            name = signal.Signals(number).name
            if number == signal.SIGKILL:
                if oom_kills is not None and (_oom_kills() or 0) > oom_kills:
                    return "oom", "killed by the kernel: out of memory"
                return "crashed", "killed by SIGKILL from outside"
            return "crashed", f"{name}{_last_words(words)}"
        return "crashed", f"the worker ended with exit code {os.WEXITSTATUS(status)}{_last_words(words)}"

    def _reap(self, worker: _Worker) -> int:
        """Waits for the worker's end; its wait status."""
        worker.connection.close()
        worker.log.close()
        self._worker = None
        protocol.send(self._control, ["wait", worker.pid])
        status: int | None = protocol.receive(self._control, int)
        return 0 if status is None else status


def _oom_kills() -> int | None:
    """How many processes the kernel has killed for memory since it started; None where it does not tell."""
    path = Path("/proc/vmstat")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def _last_words(log: str) -> str:
    """Where a crashed worker was, from what it wrote last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    places = [line for line in lines if line.startswith("File ")]
    words = places[0] if places else (lines[-1] if lines else "")
    return f": {words[:REASON_CHARACTERS]}" if words else ""
