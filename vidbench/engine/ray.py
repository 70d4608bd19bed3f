"""The Ray engine: a sweep is shared among the nodes of a cluster, each of which measures as one machine does.

    driver (alone writes runs) ── Ray ──► Deputy, one per node or GPU ── ThisMachine ──► server ── fork ──► worker

The driver holds everything that is to be done and hands out one point at a time: what is lost costs the point that was
running, and an answer that comes after all from a node that was given up is not listened to.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

# Ray prints what goes wrong in a cluster to stdout, even where its logs are switched off; it reads this when imported.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import vidbench
from vidbench.engine import MachineKind, Step, Terms, ThisMachine, Turn, input_of
from vidbench.engine.local import START_TIMEOUT_S
from vidbench.environment import sources
from vidbench.records import Environment, Measurement
from vidbench.results import IDENTITY, folder_name
from vidbench.sweep import Point, RequestError

TRIES = 3
"""A turn that loses its deputy so often is given up."""

LOOK_S = 2.0
"""From one look at the nodes of the cluster to the next."""

PATIENCE_S = 60.0
"""After so long with work left and nobody to do it, the sweep ends."""

CONNECT_TIMEOUT_S = 10.0

START = "start one by `ray start --head`, further nodes by `ray start --address HEAD:6379`"

THREADS = "OMP_NUM_THREADS"

REASON_CHARACTERS = 300


class Deputy:
    """Runs on a node, in an actor of its own.

    Args:
        terms: Of the sweep.
        folder: The driver's working directory, where a user's own models lie.
        threads: The driver's OMP_NUM_THREADS.
    """

    def __init__(self, terms: Terms, folder: str, threads: str | None) -> None:
        # Ray sets it to the CPUs that it has promised; what a sweep on one machine would take is wanted.
        os.environ.pop(THREADS, None)
        if threads is not None:
            os.environ[THREADS] = threads
        with contextlib.suppress(OSError):  # no shared file system: installed models are found all the same
            os.chdir(folder)
        self.terms = terms
        self.machine = ThisMachine(terms)

    def describe(self, driver_sources: str) -> MachineKind | str:
        """This node's kind of machine, or why it cannot take part."""
        if sources() != driver_sources:
            return f"the sources of its vidbench {vidbench.__version__} are not the driver's: install the same on both"
        video = self.terms.video
        try:
            if video is not None and input_of(video) != self.terms.input:
                return f"{video} is another file there than at the driver"
        except OSError as problem:
            return f"cannot read {video} there: {problem.strerror}"
        try:
            (kind,) = self.machine.kinds()
        except RequestError as refusal:
            return str(refusal)
        return kind

    def take(self, point: Point, number: int) -> Measurement:
        """The measurement of one turn."""
        return self.machine.take(point, number)


class _Place(NamedTuple):
    """Where one deputy works: a node, or one GPU of it."""

    node_id: str
    number: int
    name: str
    cpus: float
    gpus: int


@dataclass(eq=False)
class _Seat:
    """A place with its deputy, and what it has in hand."""

    place: _Place
    deputy: Any
    kind: int | None = None
    """Index of its kind of machine, once that is known."""
    described: MachineKind | None = None
    batch: deque[Turn] = field(default_factory=deque)
    """The turn that it is at, and those that follow it."""


class RayEngine:
    """Shares a sweep among the nodes of the running cluster. A context manager."""

    def __init__(self, terms: Terms, tell: Callable[[str], None]) -> None:
        self.terms, self.tell = terms, tell
        self._sources = sources()
        self._kinds: list[MachineKind] = []
        self._seats: dict[tuple[str, int], _Seat] = {}
        self._asked: dict[Any, _Seat] = {}
        """By the answer that is waited for."""
        self._refused: dict[tuple[str, int], str] = {}
        """Places that are left alone, and why."""
        self._looked = 0.0
        self._ours = False

    def __enter__(self) -> Self:
        self._ours = _connect()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the deputies, and with them their workers."""
        with contextlib.suppress(RayError):  # the cluster may be what has ended
            for seat in self._seats.values():
                ray.kill(seat.deputy)
        if self._ours:
            ray.shutdown()

    def kinds(self) -> list[MachineKind]:
        """The kinds of machine among the nodes.

        Of one kind those with the versions that most of them have take part; the others are refused by name.

        Raises:
            RequestError: No node can take part.
        """
        self._look()
        if not self._seats:
            wanted = "a GPU" if self.terms.device == "cuda" else "CPUs"
            raise RequestError(f"no node of this cluster has {wanted}: `ray status` shows what it has; {START}")
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._asked and time.monotonic() < deadline:
            for seat, answer in self._answers():
                self._described(seat, answer)
        for seat in self._asked.values():
            self.tell(f"{seat.place.name} does not answer yet: is it at something else? It joins when it does")
        seats = sorted((seat for seat in self._seats.values() if seat.described), key=lambda seat: seat.place.name)
        if not seats and self._refused:
            first, *others = self._refused.values()
            more = f" ({len(others)} more nodes cannot either)" if others else ""
            raise RequestError(f"no node of the cluster can take part: {first}{more}")
        if not seats:
            raise RequestError(f"no node of the cluster has answered within {START_TIMEOUT_S:g} s")
        self._kinds = kinds_of([seat.described for seat in seats if seat.described])
        for reason in self._refused.values():
            self.tell(reason)
        for seat in seats:
            self._admit(seat)
        return self._kinds

    def carry_out(self, todo: Sequence[Sequence[Turn]]) -> Iterator[Step]:
        """Hands out whole cases, so that what is compared with each other is measured on one node."""
        queues = [deque(batches(turns)) for turns in todo]
        losses: Counter[tuple[str, int]] = Counter()
        idle_since = time.monotonic()
        while True:
            for seat in self._idle():
                assert seat.kind is not None  # it is idle, not new
                while not seat.batch and queues[seat.kind]:
                    seat.batch = queues[seat.kind].popleft()
                if seat.batch:
                    point, number = seat.batch[0]
                    yield Step(seat.kind, point, number, node=seat.place.name)
                    self._asked[seat.deputy.take.remote(point, number)] = seat
            if not any(seat.batch for seat in self._seats.values()) and not any(itertools.chain(*queues)):
                return
            if self._asked:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > PATIENCE_S:
                left = [kind.environment.machine for kind, queue in zip(self._kinds, queues, strict=True) if any(queue)]
                raise RequestError(f"no {' and no '.join(left)} is left in the cluster: add one, and --resume")
            for seat, answer in self._answers():
                if seat.kind is None:
                    self._described(seat, answer)
                    self._admit(seat)
                    continue
                point, number = seat.batch[0]
                if isinstance(answer, RayError):
                    lost = (point.key, number)
                    losses[lost] += 1
                    self.tell(f"{seat.place.name} was lost ({_why(answer)}) at {point.workload}/{point.implementation}")
                    if losses[lost] == TRIES:
                        reason = f"its node was lost {TRIES} times, at last {seat.place.name}: {_why(answer)}"
                        answer = Measurement(point, number, "crashed", reason)
                    self._dismiss(seat)
                    queues[seat.kind].appendleft(seat.batch)
                if isinstance(answer, Measurement):
                    seat.batch.popleft()
                    yield Step(seat.kind, point, number, answer, seat.place.name)

    def _look(self) -> None:
        """Sends a deputy to every place that has none: nodes that have joined, and those that have lost theirs."""
        self._looked = time.monotonic()
        for place in places(ray.nodes(), self.terms.device):
            if place[:2] in self._seats or place[:2] in self._refused:
                continue
            options = {
                "num_cpus": place.cpus,
                "num_gpus": place.gpus,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node_id, soft=False),
            }
            deputy: Any = ray.remote(Deputy).options(**options)
            seat = _Seat(place, deputy.remote(self.terms, os.getcwd(), os.environ.get(THREADS)))
            self._seats[place[:2]] = seat
            self._asked[seat.deputy.describe.remote(self._sources)] = seat

    def _answers(self) -> list[tuple[_Seat, Any]]:
        """Who has answered, within the time from one look to the next: what, or the error that was met instead."""
        if time.monotonic() - self._looked > LOOK_S:
            self._look()
        if not self._asked:
            time.sleep(LOOK_S)
            return []
        ready, _ = ray.wait(list(self._asked), num_returns=1, timeout=LOOK_S)
        answers: list[tuple[_Seat, Any]] = []
        for answer in ready:
            seat = self._asked.pop(answer)
            try:
                answers.append((seat, ray.get(answer)))
            except RayError as error:
                answers.append((seat, error))
        return answers

    def _idle(self) -> list[_Seat]:
        at_work = {id(seat) for seat in self._asked.values()}
        return [seat for seat in self._seats.values() if id(seat) not in at_work and seat.kind is not None]

    def _described(self, seat: _Seat, answer: Any) -> None:
        """Notes what a deputy has said of its node, or why the place is left alone from here on."""
        if isinstance(answer, MachineKind):
            seat.described = answer
            return
        self._dismiss(seat)
        if not isinstance(answer, RayError):
            self._refuse(seat, answer)
        elif any(node["Alive"] and node["NodeID"] == seat.place.node_id for node in ray.nodes()):
            self._refuse(seat, _why(answer))

    def _refuse(self, seat: _Seat, why: str) -> None:
        self._refused[seat.place[:2]] = reason = f"{seat.place.name} is refused: {why}"
        if self._kinds:
            self.tell(reason)

    def _admit(self, seat: _Seat) -> None:
        """Puts a seat to the nodes of its kind, if it is like them."""
        if seat.described is None:
            return
        found = kind_among(self._kinds, seat.described.environment)
        if isinstance(found, int):
            seat.kind = found
        else:
            self._dismiss(seat)
            self._refuse(seat, found)

    def _dismiss(self, seat: _Seat) -> None:
        """Gives a deputy up; one that is only out of reach must not go on measuring."""
        ray.kill(seat.deputy)
        del self._seats[seat.place[:2]]


def batches(turns: Sequence[Turn]) -> Iterator[deque[Turn]]:
    """The turns that stay together: all implementations of one case in one round."""
    for _, together in itertools.groupby(turns, lambda turn: (turn[1], replace(turn[0], implementation="").key)):
        yield deque(together)


def places(nodes: Sequence[Mapping[str, Any]], device: str) -> list[_Place]:
    """Where deputies may work: on a CPU the whole of each node, else each GPU with its share of the node's CPUs."""
    alive = [node for node in nodes if node["Alive"]]
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    found = []
    for node in alive:
        cpus, gpus = (node["Resources"].get(what, 0.0) for what in ("CPU", "GPU"))
        host = node["NodeManagerHostname"]
        name = host if hosts[host] == 1 else f"{host}-{node['NodeID'][:6]}"
        if device == "cuda":
            names = [name] if gpus == 1 else [f"{name}/{number}" for number in range(int(gpus))]
            found += [_Place(node["NodeID"], number, one, cpus // gpus, 1) for number, one in enumerate(names)]
        elif cpus:
            found.append(_Place(node["NodeID"], 0, name, cpus, 0))
    return found


def kinds_of(described: Sequence[MachineKind]) -> list[MachineKind]:
    """One kind for each machine, as most of its nodes are."""
    votes = Counter(kind.environment.identity for kind in described)
    chosen: dict[str, MachineKind] = {}
    for kind in described:
        machine = kind.environment.machine
        if machine not in chosen or votes[kind.environment.identity] > votes[chosen[machine].environment.identity]:
            chosen[machine] = kind._replace(folder=folder_name(machine))
    return list(chosen.values())


def kind_among(kinds: Sequence[MachineKind], environment: Environment) -> int | str:
    """The index of an environment's kind, or why it is of none."""
    for index, kind in enumerate(kinds):
        if kind.environment.machine != environment.machine:
            continue
        pairs = zip(IDENTITY, environment.identity, kind.environment.identity, strict=True)
        differences = [f"its {name} is {one!r}, not {other!r}" for name, one, other in pairs if one != other]
        return f"{'; '.join(differences)} as of its kind: install the same on both" if differences else index
    return f"{environment.machine} has joined after the start, and is a kind of its own: --resume measures it"


def _connect() -> bool:
    """Joins the running cluster; whether it was not joined before.

    Raises:
        RequestError: There is none, or it cannot be joined.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "//" not in address:
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
        except OSError as problem:
            raise RequestError(f"no Ray cluster at RAY_ADDRESS={address}: {problem}; {START}") from None
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.CRITICAL)
    except ConnectionError:
        raise RequestError(f"--engine ray joins a running Ray cluster, and there is none: {START}") from None
    except (RayError, RuntimeError, ValueError) as problem:
        raise RequestError(f"cannot join the Ray cluster: {_line(str(problem))}") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, which does not end in order
    return True


def _why(error: RayError) -> str:
    """What has happened to a deputy, in a line without Ray's identifiers and advice."""
    if isinstance(error, RayTaskError):
        return _line(f"{type(error.cause).__name__}: {error.cause}")
    if isinstance(error, ActorUnavailableError):
        return "it is out of reach"
    said = str(error)
    if isinstance(error, RayActorError):
        if "node has died" in said or "node was terminated" in said:
            return "its node has died"
        if "memory" in said and "running low" in said:
            return "killed by Ray, as the node was low on memory"
        if "process has died" in said:
            return "its process has died"
    return _line(said)


def _line(text: str) -> str:
    return " ".join(text.split())[:REASON_CHARACTERS]
