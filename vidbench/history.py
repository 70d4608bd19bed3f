"""Many runs as one frame: what every point took and needed, over commits and machines. Needs no torch.

Each run is read once: what a history needs of it is kept in `history.parquet` beside the runs.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from vidbench import metrics
from vidbench.compare import CAUSES, MACHINE
from vidbench.records import Environment, Measurement
from vidbench.results import HEADER, LINES, Run, load
from vidbench.sweep import Point, RequestError

CACHE = "history.parquet"
_VERSION = {b"vidbench_history": b"1"}
_CHUNK = 500
"""Runs that are put into the table at once."""

_RUN = ("folder", "run_id", "suite", "input", "created_utc", *dict.fromkeys((*MACHINE, *CAUSES)), "git_dirty")
_MEMORY = ("peak_memory_bytes", "peak_memory_low_bytes")
"""Of all rounds the highest peak, and the lowest."""

_INTEGERS = ("cores", "threads", "rounds", "macs", "params", "bytes_moved", *_MEMORY, "size_bytes", "mtime_ns")
_NUMBERS = ("latency_s", "latency_low_s", "latency_high_s", "top1_accuracy")
_FIGURES = (*_NUMBERS[:3], "macs", "params", "bytes_moved", *_MEMORY, _NUMBERS[3])
_STORED = (*_RUN, "point", "definition", "rounds", "status", "reason", *_FIGURES, "size_bytes", "mtime_ns")

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class History:
    """All runs below a folder."""

    frame: pd.DataFrame
    """One row for each run and point, in the order of commits; see `read`."""
    points: Mapping[str, Point]
    """By key."""
    order: str
    """What the order of the runs rests on."""
    warnings: tuple[str, ...]
    """Of runs that cannot be read, and of a cache that cannot be kept."""

    @property
    def runs(self) -> int:
        """How many there are."""
        return int(self.frame["run_id"].nunique())

    def only(self, text: str) -> History:
        """Of the points those that have `text` in their key.

        Raises:
            RequestError: There is none.
        """
        points = {key: point for key, point in self.points.items() if text in key}
        if not points:
            near = next(iter(self.points), "")
            raise RequestError(f"no point has {text!r} in its key; a key is such as {near}")
        frame = self.frame[self.frame["point"].isin(list(points))].reset_index(drop=True)
        return History(frame, points, self.order, self.warnings)


class _Found(NamedTuple):
    """A run's folder and what tells whether it is as it was."""

    folder: Path
    name: str
    """Of the folder, from the top one."""
    size_bytes: int
    mtime_ns: int


def read(folder: Path, progress: Callable[[int, int], None] = lambda _done, _of: None) -> History:
    """Every run below a folder, as one frame.

    Its columns are those of `metrics.frame` as far as they are kept, in SI units with NA where something does not
    apply, and of the run: folder, created_utc, the fields of its environment, and `place`, which counts the commits in
    their order from 0; runs of one commit have one place and stand side by side, oldest first. That order is git's
    where the repository of the folder or of the working directory knows every commit, else that of time. A run that is
    there several times, such as a baseline, counts once.

    Args:
        folder: Where to look; what is read is kept there, and a later call reads what is new or has changed.
        progress: Told how many of the runs to be read have been.

    Raises:
        RequestError: There is no such folder, or no readable run below it.
    """
    if not folder.is_dir():
        raise RequestError(f"no folder {folder}: name one that holds run folders, such as `runs`")
    warnings: list[str] = []
    found = {run.name: run for run in _find(folder, warnings)}
    cached = _read_cache(folder / CACHE)
    kept = _still_true(cached, found)
    known = set(kept["folder"].unique().to_pylist())
    missing = [run for name, run in found.items() if name not in known]
    fresh: list[pa.Table] = []
    try:
        _read_runs(missing, fresh, warnings, progress)
    finally:  # what an interrupt leaves is kept as well
        table = _joined([kept, *fresh])
        if fresh or kept.num_rows < cached.num_rows:
            _write_cache(table, folder / CACHE, warnings)
    if not table.num_rows:
        said = f": {warnings[0]}" if warnings else f"; a run is a folder with a {HEADER}, as `vidbench sweep` writes"
        raise RequestError(f"no run below {folder}{said}")
    table = _one_copy(table)
    points = {
        key: msgspec.json.decode(definition, type=Point) for key, definition in _distinct(table, "point", "definition")
    }
    frame, order = _ordered(_tidy(table, points), folder)
    return History(frame, points, order, tuple(warnings))


# --- finding and reading ----------------------------------------------------------------------------------------------


def _find(top: Path, warnings: list[str]) -> Iterable[_Found]:
    """Every folder with a run, in the order of their names; nothing is looked for within one, or where names hide."""
    below = [top]
    while below:
        folder = below.pop()
        try:
            entries = {entry.name: entry for entry in os.scandir(folder)}
            if HEADER in entries:
                stats = [entries[name].stat() for name in (HEADER, LINES) if name in entries]
                # A name may be any bytes, and a table holds text.
                name = os.fsencode(folder.relative_to(top)).decode("utf-8", "backslashreplace")
                yield _Found(folder, name, sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats))
                continue
            inner = [e.name for e in entries.values() if e.is_dir(follow_symlinks=False) and not e.name.startswith(".")]
        except OSError as problem:
            warnings.append(f"cannot look into {folder}: {problem.strerror}; passed over")
            continue
        below += [folder / name for name in sorted(inner, reverse=True)]


def _read_runs(
    found: Sequence[_Found], into: list[pa.Table], warnings: list[str], progress: Callable[[int, int], None]
) -> None:
    tables: list[pa.Table] = []
    try:
        for number, one in enumerate(found, 1):
            try:
                run = load(one.folder)
                tables.append(_rows(run, one))
            except RequestError as error:
                warnings.append(f"{error}; passed over")
            except (pa.ArrowException, OverflowError) as error:
                warnings.append(f"{one.folder}: {str(error).splitlines()[0]}; passed over")
            else:
                warnings += run.warnings
            if len(tables) == _CHUNK:
                into.append(_joined(tables))
                tables = []
            progress(number, len(found))
    finally:
        if tables:
            into.append(_joined(tables))


def _rows(run: Run, found: _Found) -> pa.Table:
    """A row for every point of a run."""
    environment = run.environment
    fields: dict[str, Any] = {name: _told(environment, name) for name in (*MACHINE, *CAUSES, "git_dirty")}
    fields |= {"folder": found.name, "run_id": run.id, "suite": run.suite, "input": run.input}
    fields |= {"created_utc": run.created_utc, "size_bytes": found.size_bytes, "mtime_ns": found.mtime_ns}
    rounds: dict[str, list[Measurement]] = {}
    for one in run.measurements:
        rounds.setdefault(one.point.key, []).append(one)
    rows = [{**fields, "point": key, **_merged(of)} for key, of in rounds.items()]
    return pa.Table.from_pylist(rows, _schema())


def _told(environment: Environment, name: str) -> object:
    value = getattr(environment, name)
    return msgspec.json.encode(value, order="sorted").decode() if isinstance(value, Mapping) else value


def _merged(rounds: Sequence[Measurement]) -> dict[str, Any]:
    """The rounds of a point as one row, as `metrics.frame` merges them; many frames of one run each take too long."""
    worst = max((one.status for one in rounds), key=metrics.SEVERITY.index)
    ok = worst == "ok"
    medians = [median for one in rounds if (median := one.median_s) is not None]
    peaks = [one.memory.peak_bytes for one in rounds if one.memory is not None]
    tops = [one.accuracy.top1 for one in rounds if one.accuracy is not None]
    row: dict[str, Any] = {
        "definition": msgspec.json.encode(rounds[0].point).decode(),
        "rounds": len(rounds),
        "status": worst,
        "reason": next((one.reason for one in rounds if one.status == worst and one.reason), None),
        "macs": _first(one.counts.macs for one in rounds if one.counts is not None),
        "params": _first(one.params for one in rounds),
        "bytes_moved": _first(one.bytes_moved for one in rounds),
    }
    if ok and medians:
        row["latency_s"] = statistics.median(medians)
        row["latency_low_s"], row["latency_high_s"] = _interval(rounds, medians, row["latency_s"])
    if ok and peaks:
        row |= {"peak_memory_bytes": max(peaks), "peak_memory_low_bytes": min(peaks)}
    if ok and tops:
        row["top1_accuracy"] = statistics.fmean(tops)
    return row


def _first(values: Iterable[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)


_rank = cache(metrics.median_rank)


def _interval(
    rounds: Sequence[Measurement], medians: Sequence[float], latency_s: float
) -> tuple[float | None, float | None]:
    if len(medians) > 1:
        if min(medians) <= 0:
            return None, None
        of_logs = metrics.interval([math.log(median) for median in medians])
        return min(math.exp(of_logs.low), latency_s), max(math.exp(min(of_logs.high, 700.0)), latency_s)
    samples = sorted(next(one.samples_s for one in rounds if len(one.samples_s)))
    rank = _rank(len(samples))
    return (samples[rank - 1], samples[len(samples) - rank]) if rank else (None, None)


# --- the cache --------------------------------------------------------------------------------------------------------


@cache
def _schema() -> pa.Schema:
    """A row as it is made: texts as they are."""

    def kind(name: str) -> pa.DataType:
        if name == "git_dirty":
            return pa.bool_()
        return pa.int64() if name in _INTEGERS else pa.float64() if name in _NUMBERS else pa.string()

    return pa.schema([(name, kind(name)) for name in _STORED])


@cache
def _stored_schema() -> pa.Schema:
    """A row as it is kept: of a text, which half a million rows repeat, a number."""
    text = pa.dictionary(pa.int32(), pa.string())
    fields = [pa.field(f.name, text if f.type == pa.string() else f.type) for f in _schema()]
    return pa.schema(fields, metadata=_VERSION)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    encoded = [table.cast(_stored_schema()) for table in tables]
    return (
        pa.concat_tables(encoded).unify_dictionaries().combine_chunks() if encoded else _stored_schema().empty_table()
    )


def _read_cache(path: Path) -> pa.Table:
    """What was kept; nothing where that is damaged, or of another version."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowException):
        return _stored_schema().empty_table()
    return table if table.schema.equals(_stored_schema(), check_metadata=True) else _stored_schema().empty_table()


def _write_cache(table: pa.Table, path: Path, warnings: list[str]) -> None:
    """Keeps a table, at once or not at all."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{CACHE}.", delete=False) as file:
            try:
                pyarrow.parquet.write_table(table, file)
                Path(file.name).chmod(0o644)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink()
                raise
    except OSError as problem:
        warnings.append(f"cannot keep {path}: {problem.strerror}; the next call reads every run again")


def _distinct(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    """The combinations that these columns have, in the order of their first rows."""
    found = table.group_by(list(names), use_threads=False).aggregate([])
    return list(zip(*(found[name].to_pylist() for name in names), strict=True))


def _still_true(table: pa.Table, found: Mapping[str, _Found]) -> pa.Table:
    """The rows of runs that are there as they were when they were read."""
    names = [
        name
        for name, *stamp in _distinct(table, "folder", "size_bytes", "mtime_ns")
        if (one := found.get(name)) is not None and [one.size_bytes, one.mtime_ns] == stamp
    ]
    return _of_folders(table, names)


def _one_copy(table: pa.Table) -> pa.Table:
    """Every run once: of several copies the largest, since a run only grows."""
    largest: dict[str, tuple[int, str]] = {}
    for run_id, name, size_bytes in _distinct(table, "run_id", "folder", "size_bytes"):
        if run_id not in largest or size_bytes > largest[run_id][0]:
            largest[run_id] = (size_bytes, name)
    return _of_folders(table, [name for _, name in largest.values()])


def _of_folders(table: pa.Table, names: Sequence[str]) -> pa.Table:
    return table.filter(pyarrow.compute.is_in(table["folder"], value_set=pa.array(names, pa.string())))


# --- the frame --------------------------------------------------------------------------------------------------------


def _tidy(table: pa.Table, points: Mapping[str, Point]) -> pd.DataFrame:
    """A table as pandas, with what its points are."""
    dtypes = {pa.int64(): pd.Int64Dtype(), pa.float64(): pd.Float64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame = table.drop_columns(["definition", "size_bytes", "mtime_ns"]).to_pandas(types_mapper=dtypes.get)
    blank = [Measurement(point, 1, "skipped") for point in points.values()]
    described = metrics.frame(blank, run_id="", suite="")
    described = described[["point", *metrics.POINT_COLUMNS, *metrics.case_columns(described)]]
    described = described.astype(dict.fromkeys(metrics.POINT_COLUMNS, "category"))
    which = pd.Index(described["point"]).get_indexer(frame["point"].cat.categories)[frame["point"].cat.codes]
    of_point = described.iloc[which].drop(columns="point").reset_index(drop=True)
    # A key of a case may be named as a field of a run is.
    of_point.columns = [f"case_{name}" if name in frame.columns else name for name in of_point.columns]
    head = [*_RUN, "point"]
    joined: pd.DataFrame = pd.concat([frame[head], of_point, frame.drop(columns=head)], axis=1)
    return joined


def _ordered(frame: pd.DataFrame, folder: Path) -> tuple[pd.DataFrame, str]:
    """The rows in the order of the commits, with their `place`, and what the order rests on."""
    runs = frame.groupby("run_id", observed=True, sort=False)[["git_commit", "created_utc"]].first()
    runs = runs.astype(object).where(runs.notna(), None)
    commits = runs["git_commit"].tolist()
    ranks, order = _by_git({commit for commit in commits if commit}, folder), "commits, as git has it"
    unknown = sum(commit not in ranks for commit in commits)
    if unknown:
        order = f"time, as git here does not know the commits of {unknown} of {len(runs)} runs"
        ranks = {}
    in_order = sorted(
        (ranks.get(commit, 0), created, run_id, commit)
        for run_id, commit, created in zip(runs.index, commits, runs["created_utc"], strict=True)
    )
    place, last, at = -1, None, {}
    for number, (_, _, run_id, commit) in enumerate(in_order):
        if commit is None or commit != last:
            place, last = place + 1, commit
        at[run_id] = (number, place)
    # Categories may be left of runs that are gone.
    of_categories = np.array([at.get(run_id, (-1, -1)) for run_id in frame["run_id"].cat.categories], dtype=np.int64)
    of_rows = of_categories[frame["run_id"].cat.codes]
    frame.insert(0, "place", of_rows[:, 1])
    return frame.iloc[of_rows[:, 0].argsort(kind="stable")].reset_index(drop=True), order


def _by_git(commits: set[str], folder: Path) -> dict[str, int]:
    """The place of every commit among its ancestors and the others; empty where no repository knows them all."""
    if not commits or not all(map(_COMMIT.fullmatch, commits)):
        return {}
    for place in (folder, Path.cwd()):
        try:
            ran = subprocess.run(
                ("git", "-C", str(place), "rev-list", "--date-order", "--reverse", "--stdin"),
                input="\n".join(sorted(commits)), capture_output=True, text=True, check=True, timeout=300,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            continue
        return {commit: rank for rank, commit in enumerate(ran.stdout.split()) if commit in commits}
    return {}
