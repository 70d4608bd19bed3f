"""One call: its deadline, the rows it writes as it goes, what earlier calls have done, and the archive at the end."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import shutil
import tarfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ARCHIVE, ROWS, SUMMARY, LOG = "gpu.tar.xz", "rows.jsonl", "summary.md", "log.txt"
"""Files of the folder that a call leaves; beside them `tables/<gpu>.json`."""

ARCHIVE_BYTES = 16 * 2**20
PACKING_S = 15.0
"""Kept free at the end, for the summary and the archive."""

FINAL = ("ok", "skipped")
"""What is not tried again by a later call; the rest is, but last."""

Row = dict[str, Any]


class Session:
    """Rows on disk as soon as they are known. The earlier calls' rows stand first in the same file."""

    def __init__(self, out: Path, seconds: float, resume: Iterable[Path] = ()) -> None:
        self.started = time.monotonic()
        self.end = self.started + seconds
        self.deadline = self.end - min(PACKING_S, 0.1 * seconds)
        """When measuring stops."""
        self.out = out
        self.raw = out / "raw"
        """What goes into the archive alone, beside the rows: logs, junit files."""
        self.raw.mkdir(parents=True, exist_ok=True)
        (out / "tables").mkdir(exist_ok=True)
        self.call = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        self.rows: list[Row] = []
        for earlier in resume:
            self._adopt(earlier)
        self._file = (out / ROWS).open("w")
        for row in self.rows:
            self._file.write(_line(row))
        self._file.flush()
        self._log = (out / LOG).open("a")
        self.unreached: dict[str, int] = {}
        """Units of a part for which no time was left."""

    def _adopt(self, earlier: Path) -> None:
        """Takes over the rows and tables of an earlier call: its folder, or its archive."""
        if earlier.is_dir() and not (earlier / ROWS).exists() and (earlier / ARCHIVE).exists():
            earlier = earlier / ARCHIVE
        if earlier.is_dir():
            text = (earlier / ROWS).read_text()
            tables = {path.name: path.read_bytes() for path in (earlier / "tables").glob("*.json")}
        else:
            tables = {}
            with tarfile.open(earlier) as archive:
                text = ""
                for member in archive.getmembers():
                    file = archive.extractfile(member)
                    if file is not None and member.name == ROWS:
                        text = file.read().decode()
                    elif file is not None and member.name.startswith("tables/"):
                        tables[Path(member.name).name] = file.read()
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a call that was killed
                self.rows.append(json.loads(line))
        for name, content in tables.items():
            (self.out / "tables" / name).write_bytes(content)

    def left(self) -> float:
        """Seconds until measuring stops."""
        return self.deadline - time.monotonic()

    def record(self, row: Mapping[str, Any]) -> None:
        """Writes one row: at least `part`, `unit`, `status` (ok, skipped, failed, crashed, timeout) and `reason`."""
        kept = {"call": self.call, **row}
        self.rows.append(kept)
        self._file.write(_line(kept))
        self._file.flush()

    def statuses(self, part: str) -> dict[str, str]:
        """The worst of the newest statuses of every unit of a part that was begun."""
        newest: dict[str, tuple[str, set[str]]] = {}
        for row in self.rows:
            if row["part"] == part:
                call, found = newest.get(row["unit"], ("", set()))
                found = found if call == row["call"] else set()
                newest[row["unit"]] = row["call"], found | {row["status"]}
        return {unit: next((s for s in found if s not in FINAL), "ok") for unit, (_, found) in newest.items()}

    def latest(self, part: str) -> list[Row]:
        """The rows of a part, of each unit those of its newest call."""
        newest = {row["unit"]: row["call"] for row in self.rows if row["part"] == part}
        return [row for row in self.rows if row["part"] == part and row["call"] == newest[row["unit"]]]

    def say(self, text: str) -> None:
        """One line on the terminal and in the log."""
        line = f"[{time.monotonic() - self.started:5.0f} s] {text}"
        print(line, flush=True)
        print(line, file=self._log, flush=True)

    def pack(self, summary: str) -> None:
        """Writes the summary, and everything into one archive, whole or not at all."""
        (self.out / SUMMARY).write_text(summary)
        new = self.out / f"{ARCHIVE}.new"
        with tarfile.open(new, "w:xz", preset=2) as archive:
            for path in (self.out / ROWS, self.out / LOG, self.out / SUMMARY, *sorted(self.out.glob("tables/*.json"))):
                archive.add(path, str(path.relative_to(self.out)))
            for path in sorted(self.raw.rglob("*")):
                if path.is_file():
                    _add_end(archive, path, str(path.relative_to(self.out)))
        if new.stat().st_size > ARCHIVE_BYTES:
            self.say(f"the archive has {new.stat().st_size} bytes, more than comes back: {ROWS} lies beside it")
        new.replace(self.out / ARCHIVE)

    def close(self) -> None:
        """Leaves only what comes back: few files, no deep folders."""
        self._file.close()
        self._log.close()
        shutil.rmtree(self.raw, ignore_errors=True)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":"), ensure_ascii=False, default=str) + "\n"


def _add_end(archive: tarfile.TarFile, path: Path, name: str, most: int = 2**21) -> None:
    """Adds a file, of a long one its end alone."""
    content = path.read_bytes()[-most:]
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
