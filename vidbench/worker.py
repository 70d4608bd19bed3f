"""One isolated process per device that measures points and survives them.

    engine ── control socket ──► server (torch imported, no device touched) ── fork ──► worker ◄── socket ── engine

The server forks a worker in milliseconds, so that rounds and replacements are cheap. A worker that crashes, hangs or is
killed costs the point it was at. Both end with their parent, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import importlib.abc
import importlib.util
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec

from vidbench.records import Cost, Environment, Measurement, Status
from vidbench.sweep import Point, RequestError

LENGTH_BYTES = 4
MOST_BYTES = 2**26
"""Of a message: a longer one was sent by something gone astray."""

SOURCE = "VIDBENCH_SOURCE"
"""Environment variable: a checkout whose kernels and models are measured, instead of those installed."""


class Describe(msgspec.Struct, tag=True, frozen=True):
    """Asks for the environment and for what could run; answered by a Description."""

    device: str
    dtypes: tuple[str, ...]
    workloads: dict[str, str]
    """Kind by workload, to be found before anything is measured."""


class Description(msgspec.Struct, frozen=True):
    """The environment and, by workload, its implementations; or why the request cannot be carried out."""

    environment: Environment | None
    implementations: dict[str, tuple[str, ...]] = {}
    refusal: str = ""


class Adopt(msgspec.Struct, tag=True, frozen=True):
    """Tells the environment whose ceilings hold; not answered."""

    environment: Environment


class Task(msgspec.Struct, tag=True, frozen=True):
    """Asks for one point; answered by a Measurement."""

    point: Point
    round: int
    seconds: float
    """Budget of the sampling."""
    video: str | None = None
    in_turn: bool = False
    """Whether the engine says when a sample is taken: READY is sent, each True answered by the seconds that the turn
    took, and False by the Measurement."""
    cost: Cost | None = None
    """What one call needs, where it was counted already."""


READY = "ready"
"""The first word of a server, and of a worker that is ready to take samples in turn."""


def send(connection: socket.socket, message: object, *, fds: tuple[int, ...] = ()) -> None:
    """One message: its length, then its MessagePack (which knows NaN), with file descriptors if any."""
    body = msgspec.msgpack.encode(message)
    data = len(body).to_bytes(LENGTH_BYTES, "big") + body
    if fds:
        sent = socket.send_fds(connection, [data], fds)
        data = data[sent:]
    connection.sendall(data)


def receive(
    connection: socket.socket, kind: Any, *, fds: list[int] | None = None, timeout_s: float | None = None
) -> Any:
    """The next message; None when the other side is gone.

    Args:
        connection: Where from.
        kind: Type of the message.
        fds: Takes the file descriptors that came with it.
        timeout_s: For all of it, however slowly it comes; None leaves the connection's own, for each of its parts.

    Raises:
        TimeoutError: The time is over.
        msgspec.MsgspecError: It is of another type, no message, or longer than any.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def limit() -> None:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))

    head = b""
    while len(head) < LENGTH_BYTES:
        limit()
        if fds is None:
            part = connection.recv(LENGTH_BYTES - len(head))
        else:
            part, got, _, _ = socket.recv_fds(connection, LENGTH_BYTES - len(head), 4)
            fds += got
        if not part:
            return None
        head += part
    body = bytearray()
    wanted = int.from_bytes(head, "big")
    if wanted > MOST_BYTES:
        raise msgspec.DecodeError(f"a message of {wanted} bytes, at most {MOST_BYTES} are one")
    while len(body) < wanted:
        limit()
        part = connection.recv(min(1 << 20, wanted - len(body)))
        if not part:
            return None
        body += part
    return _decoder(kind).decode(body)


@cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Made once: working out a record's types takes longer than most messages."""
    return msgspec.msgpack.Decoder(kind)


def end_with_parent() -> None:
    """Asks the kernel to kill this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class _ModelsOf(importlib.abc.MetaPathFinder):
    """Finds `vidbench.models` in another checkout; what is in it follows."""

    def __init__(self, checkout: Path) -> None:
        self.place = checkout / "vidbench" / "models"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """The spec of the package; None of any other."""
        if fullname != "vidbench.models":
            return None
        return importlib.util.spec_from_file_location(
            fullname, self.place / "__init__.py", submodule_search_locations=[str(self.place)]
        )


def take_source(checkout: Path) -> None:
    """From here on vidkernels and `vidbench.models` are those of a checkout; everything else is this harness's.

    A checkout that has no vidkernels is of a user's repository: of it come the modules of the models that are named.
    """
    if (checkout / "kernels" / "vidkernels").is_dir():
        sys.path.insert(0, str(checkout / "kernels"))
        sys.meta_path.insert(0, _ModelsOf(checkout))
    else:
        os.chdir(checkout)  # whatever is found by the working directory is this revision's too
        sys.path[:0] = [str(checkout), str(checkout / "src")]


def serve(control: socket.socket) -> None:
    """The server's loop: `["fork"]` with two descriptors → pid; `["wait", pid]` → its exit status."""
    end_with_parent()
    sys.path.append(os.getcwd())  # where a user's own models lie; the last place, lest a file there hides a library
    # Compilation in one process: a pool of compilers would disturb what is timed. Inductor reads this when imported.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    _import_ahead()
    gc.collect()
    gc.freeze()  # what is imported stays; collections in the workers then pass over it
    send(control, READY)
    while True:
        fds: list[int] = []
        request = receive(control, list, fds=fds)
        if request is None:
            os._exit(0)
        if request[0] == "fork":
            pid = os.fork()
            if pid == 0:
                control.close()
                _become_worker(*fds)
            for fd in fds:
                os.close(fd)
            send(control, pid)
        else:
            _, status = os.waitpid(request[1], 0)
            send(control, status)


AHEAD = (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.profiler._cupti_monitor",
    "torch.utils._device",
    "torch.utils.flop_counter",
    "vidbench.counting",
    "vidbench.measure",
    "vidbench.training",
    "fvcore.nn",
)
"""What workers use, imported before they are forked; what is not installed, or is of another torch, is passed over."""


def _import_ahead() -> None:
    """Imports `AHEAD`: nothing of it may touch a device or start a thread."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a device must not open it before the fork
    for name in AHEAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _become_worker(connection_fd: int, log_fd: int) -> None:
    """Serves measurements until the engine hangs up; never returns."""
    end_with_parent()
    for fd in (1, 2):
        os.dup2(log_fd, fd)
    faulthandler.enable(all_threads=False)
    os.setpgid(0, 0)  # so that a compiler it has started ends with it
    # Where memory runs out, the kernel should take this process rather than the engine.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("900")
    connection = socket.socket(fileno=connection_fd)
    status = 1
    try:
        _work(connection)
        status = 0
    except Exception:  # noqa: BLE001  the end of this process; the engine reads its log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(connection: socket.socket) -> None:
    environment: Environment | None = None
    while (request := receive(connection, Describe | Adopt | Task)) is not None:
        if isinstance(request, Adopt):
            environment = request.environment
        elif isinstance(request, Describe):
            send(connection, _describe(request))
        else:
            assert environment is not None  # the engine sends it first
            sampler = partial(_sample_in_turn, connection) if request.in_turn else None
            send(connection, perform(request, environment, sampler))


def _sample_in_turn(connection: socket.socket, *arguments: Any) -> Any:
    """Takes samples when the engine says so."""
    from vidbench.timing import sample_in_turn

    return sample_in_turn(*arguments, turns=_turns(connection), taken=partial(send, connection))


def _turns(connection: socket.socket) -> Iterator[None]:
    send(connection, READY)
    while (turn := receive(connection, bool)) is not False:
        if turn is None:  # the engine is gone
            os._exit(0)
        yield


def _describe(request: Describe) -> Description:
    from vidbench.environment import describe
    from vidbench.workload import implementations

    try:
        found = {name: implementations(name, kind) for name, kind in request.workloads.items()}
        return Description(describe(request.device, request.dtypes), found)
    except RequestError as error:
        return Description(None, refusal=str(error))


def perform(task: Task, environment: Environment, sampler: Callable[..., Any] | None = None) -> Measurement:
    """The measurement of one point, whatever its workload raises."""
    from vidbench.measure import measure
    from vidbench.timing import Budget, sample

    point, started = task.point, time.perf_counter()
    try:
        if point.kind == "task":
            from vidbench.trials import recipe_for, trial

            name, seed, width = (point.case[key] for key in ("task", "seed", "width_multiplier"))
            recipe = replace(recipe_for(point.workload, str(name)), width_multiplier=float(width))  # type: ignore[arg-type]
            accuracy = trial(point.workload, str(name), seed=int(seed), recipe=recipe, device=point.device).accuracy  # type: ignore[arg-type]
            return Measurement(point, task.round, "ok", accuracy=accuracy, wall_s=time.perf_counter() - started)
        return measure(
            point,
            environment,
            round=task.round,
            budget=Budget(seconds=task.seconds),
            video=task.video,
            sampler=sampler or sample,
            cost=task.cost,
            energy=not task.in_turn,
        )
    except (Exception, SystemExit) as error:  # noqa: BLE001  a user's model may raise anything; its row says what
        reason = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {reason[0] if reason else 'no message'}"
        status: Status = "crashed" if point.device == "cuda" and _context_is_broken() else "failed"
        return Measurement(point, task.round, status, text, wall_s=time.perf_counter() - started)


def _context_is_broken() -> bool:
    """Whether a CUDA error sticks: every later call of this process would fail as well."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    if SOURCE in os.environ:
        take_source(Path(os.environ[SOURCE]))
    serve(socket.socket(fileno=int(sys.argv[1])))
