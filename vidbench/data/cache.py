"""Decoded videos on disk: every frame, shrunk, as it is read again and again in training.

One file per video: a header with what it was made of and a checksum of each frame, then the frames as they are, so that
a clip takes a few reads and no decoding. A file appears under its name when it is whole, and what does not match its
checksums or its name is decoded again: a kill, a full disk or a damaged file costs time and never a wrong frame.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidbench.data.video import chosen, decode
from vidbench.sweep import RequestError

MAGIC = b"vidbench frames 1\n"
HEADER = struct.Struct(">II")
"""Bytes of the description in JSON, and its checksum."""

STALE_S = 3600
"""An unfinished file of so old is what a kill has left."""


@dataclass(frozen=True, slots=True)
class FrameCache:
    """A folder of decoded videos, which any number of processes may fill and read at once.

    A video takes frames × H × W × 3 bytes: of 160 × 120 pixels and ten seconds at 25 frames a second 14 MB. Nothing is
    ever removed; the folder may be deleted at any time.
    """

    folder: Path
    short_side: int
    """Larger pictures are kept with their shorter side of so many pixels."""

    def __post_init__(self) -> None:
        try:
            self._unfinished.mkdir(parents=True, exist_ok=True)
            for file in self._unfinished.iterdir():
                with contextlib.suppress(FileNotFoundError):  # Another process was faster.
                    if time.time() - file.stat().st_mtime > STALE_S:
                        file.unlink()
        except OSError as error:
            raise RequestError(f"{self.folder} cannot hold decoded videos: {error.strerror}") from None

    def read(self, path: str | Path, choose: Callable[[int], Sequence[int]]) -> tuple[Tensor, list[str]]:
        """The chosen frames of a video, as `vidbench.data.video.decode` gives them with `short_side`.

        Returns:
            Frames, (F, H, W, 3), uint8, and what is to be said of the video or of the cache, one line each.

        Raises:
            RequestError: As `decode`.
        """
        try:
            made_of = self._made_of(path)
        except OSError:
            decode(path, lambda count: [0])  # Says why there is nothing to read.
            raise
        file = self._file(made_of)
        with contextlib.suppress(OSError, _Damaged):
            return _load(file, made_of, path, choose)
        frames, info = decode(path, range, short_side=self.short_side, threads=1)
        notes = [info.warning] if info.warning else []
        try:
            self._store(file, made_of, frames, notes)
        except OSError as error:
            # Two clips of one folder say the same, so that it is shown once.
            notes = [*notes, f"{self.folder} cannot hold more decoded videos: {error.strerror}"]
        return frames[torch.tensor(chosen(path, choose, len(frames)))], notes

    @property
    def _unfinished(self) -> Path:
        return self.folder / "unfinished"

    def _made_of(self, path: str | Path) -> dict[str, Any]:
        file = Path(path).resolve()
        stat = file.stat()
        return {
            "path": os.fsencode(file).hex(),
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "short_side": self.short_side,
        }

    def _file(self, made_of: dict[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.frames"

    def _store(self, file: Path, made_of: dict[str, Any], frames: Tensor, notes: list[str]) -> None:
        pixels = frames.contiguous().numpy()
        description = {
            "made_of": made_of,
            "shape": list(pixels.shape),
            "checksums": [zlib.crc32(frame.data) for frame in pixels],
            "notes": notes,
        }
        header = json.dumps(description).encode()
        unfinished = self._unfinished / f"{file.stem}-{secrets.token_hex(8)}"
        try:
            with unfinished.open("xb") as stream:
                stream.write(MAGIC + HEADER.pack(len(header), zlib.crc32(header)) + header)
                stream.write(pixels.data)
            file.parent.mkdir(exist_ok=True)
            os.replace(unfinished, file)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


class _Damaged(Exception):
    """A file of the cache is torn, altered or not what its name says."""


def _load(
    file: Path, made_of: dict[str, Any], path: str | Path, choose: Callable[[int], Sequence[int]]
) -> tuple[Tensor, list[str]]:
    with file.open("rb") as stream:
        start = stream.read(len(MAGIC) + HEADER.size)
        if len(start) < len(MAGIC) + HEADER.size or not start.startswith(MAGIC):
            raise _Damaged
        length, checksum = HEADER.unpack(start[len(MAGIC) :])
        size = os.fstat(stream.fileno()).st_size
        header = stream.read(min(length, size))
        if zlib.crc32(header) != checksum:
            raise _Damaged
        description = json.loads(header)
        count, *picture = description["shape"]
        begin = len(start) + length
        if description["made_of"] != made_of or size != begin + count * math.prod(picture):
            raise _Damaged
        indices = chosen(path, choose, count)
        out = np.empty((len(indices), *picture), dtype=np.uint8)
        for place, index in enumerate(indices):
            stream.seek(begin + index * math.prod(picture))
            stream.readinto(out[place].data)
            if zlib.crc32(out[place].data) != description["checksums"][index]:
                raise _Damaged
    return torch.from_numpy(out), description["notes"]
