"""Units of work in processes of their own: what crashes, hangs or breaks the device costs that unit alone.

The processes are forked from one that has torch imported and no device touched, so a new one takes little time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Emit = Callable[[Mapping[str, Any]], None]
"""Sends one row home."""


@dataclass(frozen=True)
class Unit:
    """One piece of work that a process does."""

    key: str
    """Names it in the rows."""
    handler: str
    """`module:function` of (unit, emit)."""
    values: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 90.0


class Worker:
    """One forked process."""

    def __init__(self, log: Path) -> None:
        fork = multiprocessing.get_context("fork")
        self.connection, theirs = fork.Pipe()
        self.process = fork.Process(target=_serve, args=(theirs, self.connection, log))
        self.process.start()
        theirs.close()
        self.unit: Unit | None = None
        self.until = 0.0

    def take(self, unit: Unit, deadline: float) -> None:
        """Begins a unit, which may last until its own timeout or the deadline."""
        self.unit = unit
        self.until = min(time.monotonic() + unit.timeout_s, deadline)
        self.connection.send(unit)

    def kill(self) -> None:
        """Ends the process and what it has started."""
        if self.process.pid is not None:
            for kill in (os.killpg, os.kill):  # the group is made by the process itself, a moment after it starts
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(self.process.pid, signal.SIGKILL)
        self.process.join(10)
        self.connection.close()


def run(
    units: Iterable[Unit],
    record: Callable[[Unit, Mapping[str, Any]], None],
    *,
    processes: int,
    deadline: float,
    log: Path,
    finished: Callable[[Unit], None] = lambda _: None,
) -> list[Unit]:
    """Carries out units in order; those that the deadline left over are returned.

    Args:
        units: In order of importance.
        record: Takes each row of a unit; one that ends badly has a row with status `crashed`, `timeout` or `failed`.
        processes: How many at once; 1 for whatever is timed.
        deadline: On the clock of `time.monotonic`; a unit at work then is stopped and counts as left over.
        log: Takes what the processes print.
        finished: Told of every unit that has ended.
    """
    waiting = list(units)[::-1]
    workers: list[Worker] = []
    left: list[Unit] = []
    try:
        while True:
            now = time.monotonic()
            idle = [worker for worker in workers if worker.unit is None]
            while waiting and now < deadline and (idle or len(workers) < processes):
                worker = idle.pop() if idle else Worker(log)
                if worker not in workers:
                    workers.append(worker)
                worker.take(waiting.pop(), deadline)
            busy = [worker for worker in workers if worker.unit is not None]
            if not busy:
                return [*left, *waiting[::-1]]
            soonest = max(0.0, min(worker.until for worker in busy) - now)
            ready = multiprocessing.connection.wait([worker.connection for worker in busy], soonest)
            for worker in busy:
                unit = worker.unit
                assert unit is not None  # it is busy
                gone = False
                if worker.connection in ready:
                    gone = not _hear(worker, unit, record)
                    if worker.unit is None:
                        finished(unit)
                elif time.monotonic() >= worker.until:
                    if worker.until >= deadline:
                        left.append(unit)
                    else:
                        record(unit, {"status": "timeout", "reason": f"no end within {unit.timeout_s:g} s"})
                        finished(unit)
                    gone = True
                if gone:
                    workers.remove(worker)
                    worker.kill()
    finally:
        for worker in workers:
            worker.kill()


def _hear(worker: Worker, unit: Unit, record: Callable[[Unit, Mapping[str, Any]], None]) -> bool:
    """Takes one message; False when the process is gone."""
    try:
        kind, content = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(5)
        code = worker.process.exitcode
        what = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        if code != BROKEN:  # then it has said so itself
            record(unit, {"status": "crashed", "reason": what})
        worker.unit = None
        return False
    if kind == "row":
        record(unit, content)
    else:
        worker.unit = None
    return True


BROKEN = 77
"""Exit code of a process that leaves because its device does not answer any more."""


def _serve(connection: Any, others: Any, log: Path) -> None:
    others.close()
    os.setpgid(0, 0)
    sys.stdout = sys.stderr = log.open("a")
    for fd in (1, 2):  # what is not Python's prints too
        os.dup2(sys.stdout.fileno(), fd)
    faulthandler.enable(sys.stdout, all_threads=False)
    while True:
        try:
            unit: Unit = connection.recv()
        except EOFError:
            os._exit(0)
        print(f"--- {unit.key}", flush=True)
        status = 0
        try:
            module, _, function = unit.handler.partition(":")
            getattr(importlib.import_module(module), function)(unit, lambda row: connection.send(("row", dict(row))))
        except Exception as error:  # noqa: BLE001  whatever a kernel raises is a row
            traceback.print_exc()
            broken = device_is_broken()
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:300]}"
            connection.send(("row", {"status": "crashed" if broken else "failed", "reason": reason}))
            status = BROKEN if broken else 0
        sys.stdout.flush()
        if status:
            os._exit(status)
        connection.send(("end", None))


def device_is_broken() -> bool:
    """Whether a CUDA error sticks: every later call of this process would fail as well."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
