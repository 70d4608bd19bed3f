"""Run, RunWriter, load: the versioned run folder. A run that was killed at any byte loads.

The folder holds `run.json` (written once, atomically) and `measurements.jsonl` (one line per finished point and
round, appended and flushed as it ends); `run_format` says what a line looks like.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import gc
import os
import re
import secrets
import stat
import weakref
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from vidbench.records import Environment, Measurement
from vidbench.run_format import (
    UNDECODABLE,
    LineReader,
    decode_record,
    encode_line,
    encode_record,
    impossible,
    impossible_case,
    is_json,
    unshowable,
    without_surrogates,
)
from vidbench.sweep import RequestError, Sweep

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
READABLE = (1,)
"""The schema versions that this release reads."""

HEADER = "run.json"
LINES = "measurements.jsonl"
_TEMPORARY = ".run.json.tmp"
IDENTITY = ("machine", "threads", "driver", "cudnn", "python", "torch", "triton", "git_commit")
"""The fields of `Environment.identity`, in its order."""


LONGEST_BYTES = 2**26
"""Of a line and of run.json: what is longer was not written here, and would only fill the memory."""


class RunError(RequestError):
    """A run that cannot be read, continued or written; names the file and, where there is one, the line."""


@dataclass(frozen=True)
class Run:
    """One run: one machine, one revision, every measurement that finished."""

    schema_version: int
    id: str
    suite: str
    created_utc: str
    """ISO 8601 with a Z."""
    sweeps: tuple[Sweep, ...]
    environment: Environment
    command: str
    input: str | None
    """The name of the video that was measured on; None with synthetic clips."""
    measurements: list[Measurement]
    warnings: tuple[str, ...]
    folder: Path

    def frame(self) -> pd.DataFrame:
        """A tidy frame, one row per point; see `metrics.frame`."""
        from vidbench.metrics import frame

        return frame(self.measurements, run_id=self.id, suite=self.suite)

    def _repr_html_(self) -> str:
        """For a notebook: what it is, and its rows without what is empty."""
        head = escape(f"{self.suite}, {self.environment.machine}, {self.created_utc} ({self.folder})")
        rows = self.frame().drop(columns=["run_id", "suite", "point"]).dropna(axis="columns", how="all")
        return f"<p><b>{head}</b></p>{rows.to_html(max_rows=20, index=False, na_rep='–')}"


@dataclass(frozen=True)
class _Header:
    """What run.json holds; its field order is the file's."""

    schema_version: int
    id: str
    suite: str
    created_utc: str
    sweeps: tuple[Sweep, ...]
    environment: Environment
    command: str
    input: str | None = None


def folder_name(*words: str) -> str:
    """A path of names that any file system takes, such as those of machines and suites."""
    return "/".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.") or "unnamed" for word in words)


def load(path: str | os.PathLike[str]) -> Run:
    """The run in a folder; `path` may also name its run.json.

    Returns:
        The run, with a warning where a torn last line was dropped; its samples are `array('d')`.

    Raises:
        RunError: No run, a schema that this release does not read, or damage; names file and line.
    """
    folder = Path(path)
    if folder.name == HEADER and not folder.is_dir():
        folder = folder.parent
    header = _read_header(folder)
    lines = _read_lines(folder / LINES)
    return Run(
        header.schema_version,
        header.id,
        header.suite,
        header.created_utc,
        header.sweeps,
        header.environment,
        header.command,
        header.input,
        lines.measurements,
        (lines.warning,) if lines.warning else (),
        folder,
    )


@dataclass
class _Lines:
    measurements: list[Measurement]
    done: set[tuple[str, int]]
    whole_bytes: int
    """Where the torn end begins; the file's size when there is none."""
    warning: str


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """The cyclic collector would walk the growing list again and again and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_lines(path: Path) -> _Lines:
    found = _Lines([], set(), 0, "")
    reader = LineReader()
    known: set[str] = set()
    bad: tuple[int, str] | None = None
    """A line that did not decode; it is torn if nothing follows it."""
    try:
        file = _opened(path)
    except FileNotFoundError:
        return found
    except OSError as problem:
        raise RunError(f"cannot read {path}: {problem.strerror}") from None
    with file, _without_collector():
        for number, line in enumerate(iter(partial(_next_line, file, path), b""), 1):
            if bad is not None:
                raise RunError(f"{path}, line {bad[0]}: {bad[1]}; restore the file or cut the line out")
            if not line.endswith(b"\n"):
                if len(line) > LONGEST_BYTES:
                    raise RunError(f"{path}, line {number}: longer than {LONGEST_BYTES} bytes; restore the file")
                bad = (number, "it has no end")
                continue
            try:
                measurement, key = reader.read(line)
                wrong = impossible(measurement)
                if key not in known:
                    known.add(key)
                    wrong = wrong or impossible_case(measurement.point)
            except UNDECODABLE as problem:
                wrong = str(problem)
                if not is_json(line):
                    bad = (number, f"not JSON: {problem}")
                    continue
            if wrong:
                raise RunError(f"{path}, line {number}: {wrong}; restore the file or cut the line out")
            if (key, measurement.round) in found.done:
                raise RunError(
                    f"{path}, line {number}: {key}, round {measurement.round}, is there already; cut one out"
                )
            found.done.add((key, measurement.round))
            found.measurements.append(measurement)
            found.whole_bytes += len(line)
    if bad is not None:
        found.warning = f"{path}, line {bad[0]}: torn, as the run was killed while writing it; dropped"
    return found


def _opened(path: Path) -> BinaryIO:
    """A file to be read; what is none is refused: a pipe would be waited for, a device read without end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunError(f"cannot read {path}: it is not a file")
    return os.fdopen(descriptor, "rb")


def _next_line(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.readline(LONGEST_BYTES + 1)
    except OSError as problem:
        raise RunError(f"cannot read {path}: {problem.strerror}") from None


class _Versioned(msgspec.Struct):
    schema_version: int


def _read_header(folder: Path) -> _Header:
    path = folder / HEADER
    try:
        with _opened(path) as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, LONGEST_BYTES) + 1)
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise RunError(f"no run at {folder}: there is no such folder") from None
        raise RunError(f"no run at {folder}: it has no {HEADER}; name a folder that `vidbench sweep` wrote") from None
    except OSError as problem:
        raise RunError(f"cannot read {path}: {problem.strerror}") from None
    if len(content) > LONGEST_BYTES:
        raise RunError(f"{path}: longer than {LONGEST_BYTES} bytes; restore the file")
    try:
        version = msgspec.json.decode(content, type=_Versioned).schema_version
        if version not in READABLE:
            readable = ", ".join(map(str, READABLE))
            raise RunError(
                f"{path}: schema_version is {version}; this release reads {readable}; use the release that wrote it"
            )
        header = decode_record(content, _Header)
    except UNDECODABLE as problem:
        raise RunError(f"{path}: {problem}; restore the file") from None
    # Baselines are folders of that name.
    if not header.id.isprintable() or "/" in header.id or header.id.startswith(".") or not 0 < len(header.id) < 200:
        raise RunError(f"{path}: id {header.id!r} is not a name; restore the file")
    if text := unshowable(replace(header, command="")):
        raise RunError(f"{path}: {text!r} has letters that cannot be shown; restore the file")
    return header


# --- writing ----------------------------------------------------------------------------------------------------------


_open_writers: weakref.WeakSet[RunWriter] = weakref.WeakSet()


class RunWriter:
    """The only writer of a run. A context manager; holds a lock on the run until it is closed.

    Made by `create` or `resume`. `append` may be called from one thread at a time.
    """

    def __init__(self, folder: Path, descriptor: int, header: _Header, lines: _Lines) -> None:
        self.folder = folder
        self.id = header.id
        self.warnings: tuple[str, ...] = (lines.warning,) if lines.warning else ()
        """What was dropped on resuming."""
        self._path = folder / LINES
        self._descriptor = descriptor
        self._done = lines.done
        self._size = lines.whole_bytes
        _open_writers.add(self)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        suite: str,
        sweeps: Iterable[Sweep],
        environment: Environment,
        command: str,
        input: str | None = None,
    ) -> RunWriter:
        """Starts a run in an absent or empty folder.

        Raises:
            RunError: The folder holds a run or other files, another process writes there, or it cannot be written.
        """
        return cls._open(Path(folder), _new_header(suite, sweeps, environment, command, input), resume=False)

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        *,
        suite: str,
        sweeps: Iterable[Sweep],
        environment: Environment,
        command: str,
        input: str | None = None,
    ) -> RunWriter:
        """Goes on with the run in a folder, cutting a torn last line off; starts one where it is absent or empty.

        Raises:
            RunError: As `create`; the run is damaged; or it is of another suite, sweep, input, machine, driver,
                torch, triton or commit, with both values.
        """
        return cls._open(Path(folder), _new_header(suite, sweeps, environment, command, input), resume=True)

    @classmethod
    def extend(cls, folder: str | os.PathLike[str], *, suite: str, environment: Environment, command: str) -> RunWriter:
        """Adds measurements of no sweep to whatever run a folder holds; starts one where there is none.

        Raises:
            RunError: As `resume`, but for suite, sweeps and input.
        """
        folder = Path(folder)
        header = _new_header(suite, (), environment, command, None)
        if (folder / HEADER).exists():
            header = replace(_read_header(folder), environment=environment)
        return cls._open(folder, header, resume=True)

    @classmethod
    def _open(cls, folder: Path, header: _Header, *, resume: bool) -> RunWriter:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_contents(folder, resume)
            descriptor = os.open(folder / LINES, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunError(f"{folder}: another process is writing this run; wait for it or end it") from None
                # Another writer may have come and gone between the first look and the lock.
                if _check_contents(folder, resume):
                    _check_same(folder, _read_header(folder), header)
                    header = replace(header, id=_read_header(folder).id)
                else:
                    _write_header(folder, header)
                lines = _read_lines(folder / LINES)
                if os.fstat(descriptor).st_size != lines.whole_bytes:
                    os.ftruncate(descriptor, lines.whole_bytes)
                    os.fsync(descriptor)
                lines.measurements.clear()
                return cls(folder, descriptor, header, lines)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as problem:
            raise RunError(f"cannot write a run to {folder}: {problem.strerror}") from None

    @property
    def done(self) -> AbstractSet[tuple[str, int]]:
        """The (point key, round) that have a line; grows with `append`."""
        return self._done

    def append(self, measurement: Measurement) -> None:
        """Writes one line and has it on the disk before it returns.

        Raises:
            RunError: This point and round have a line already, the writer is closed, or the disk refuses.
        """
        entry = (measurement.point.key, measurement.round)
        if self._descriptor < 0:
            raise RunError(f"{self._path}: the run is closed; nothing can be appended")
        if entry in self._done:
            raise RunError(f"{self._path}: {entry[0]}, round {entry[1]}, has a line already")
        if wrong := impossible(measurement) or impossible_case(measurement.point):
            raise RunError(f"{self._path}: {wrong}; such a line could not be read again")
        line = encode_line(measurement)
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                os.ftruncate(self._descriptor, self._size)
                raise RunError(f"cannot write to {self._path}: {written} of {len(line)} bytes were taken; is it full?")
            os.fsync(self._descriptor)
        except OSError as problem:
            raise RunError(f"cannot write to {self._path}: {problem.strerror}") from None
        self._size += len(line)
        self._done.add(entry)

    def close(self) -> None:
        """Gives the lock back. May be called twice."""
        if self._descriptor >= 0:
            # Not left to closing alone: a child forked a moment ago may not have let go of the file yet.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_in_child() -> None:
    # A forked worker that outlives its parent would hold the lock, which belongs to the open file, not the process.
    for writer in list(_open_writers):
        writer._forget()


os.register_at_fork(after_in_child=_close_in_child)


def _new_header(
    suite: str, sweeps: Iterable[Sweep], environment: Environment, command: str, input: str | None
) -> _Header:
    now = datetime.datetime.now(datetime.UTC)
    created = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    # Runs of several machines are reported together, so a second is not enough to tell them apart.
    identifier = f"{now:%Y%m%dT%H%M%SZ}-{suite}-{secrets.token_hex(2)}"
    command = without_surrogates(command)  # an argument may be a file's name, and that any bytes
    return _Header(SCHEMA_VERSION, identifier, suite, created, tuple(sweeps), environment, command, input)


def _check_contents(folder: Path, resume: bool) -> bool:
    """Whether the folder holds a run; one killed before its run.json was complete is none."""
    if (folder / HEADER).exists():
        if not resume:
            raise RunError(f"{folder} holds a run already; continue it with --resume, or give another --out")
        return True
    foreign = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name != _TEMPORARY and not (entry.name == LINES and entry.is_file() and not entry.stat().st_size)
    )
    if foreign:
        named = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise RunError(f"{folder} holds other files ({named}) and no run; give an empty folder as --out")
    return False


def _write_header(folder: Path, header: _Header) -> None:
    if text := unshowable(replace(header, command="")):
        raise RunError(f"{folder}: {text!r} has letters that cannot be shown, and cannot be kept: rename it")
    temporary = folder / _TEMPORARY
    with temporary.open("wb") as file:
        file.write(encode_record({f.name: getattr(header, f.name) for f in fields(header)}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / HEADER)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differences(before: object, now: object, path: str) -> Iterator[tuple[str, object, object]]:
    """Leaves that differ, with their path; the order of a mapping counts, since it orders the points."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            yield from _differences(before.get(name, "absent"), now.get(name, "absent"), f"{path}.{name}")
        if before == now and list(before) != list(now):
            yield f"order of {path}", ", ".join(before), ", ".join(now)
    elif before != now:
        yield path, before, now


def _check_same(folder: Path, before: _Header, now: _Header) -> None:
    """Raises RunError naming what differs, with both values."""
    found: list[tuple[str, object, object]] = [
        (name, getattr(before, name), getattr(now, name))
        for name in ("suite", "input")
        if getattr(before, name) != getattr(now, name)
    ]
    found += [
        (name, was, is_now)
        for name, was, is_now in zip(IDENTITY, before.environment.identity, now.environment.identity, strict=True)
        if was != is_now
    ]
    if len(before.sweeps) != len(now.sweeps):
        found.append(("number of sweeps", len(before.sweeps), len(now.sweeps)))
    else:
        for index, (was, is_now) in enumerate(zip(before.sweeps, now.sweeps, strict=True)):
            found += _differences(asdict(was), asdict(is_now), f"sweeps[{index}]")
    if found:
        said = "; ".join(f"{name} was {was!r} and is {is_now!r}" for name, was, is_now in found[:4])
        more = f"; {len(found) - 4} more" if len(found) > 4 else ""
        raise RunError(f"{folder} cannot be resumed: {said}{more}; start another run with another --out")
