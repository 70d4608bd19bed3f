"""Launch configurations: the fastest known for this GPU and shape, from tables that `vidbench tune` fills.

A table is one JSON file per GPU, `tables/<GPU>.json` here for what is shipped and the same name in the cache folder
for what was tuned on this machine, which comes first. Batch sizes are no part of a key: the number of positions is,
in powers of two.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vidkernels.cuda_source import cache_folder
from vidkernels.launch import Gpu

Config = Mapping[str, int]
"""Tile sizes, num_warps, num_stages and the like, by name."""

SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Key:
    """What a launch configuration is chosen by."""

    dtype: str
    """Of the data, as in `vidkernels.op.DTYPES`."""
    sizes: tuple[int, ...]
    """Channels, and what else scales the work of one position."""
    form: tuple[int, ...] = ()
    """Kernel size, stride and what else changes the code; only equal ones are near each other."""
    positions: int = 1
    """How many positions the launch covers, the batch included."""

    @property
    def text(self) -> str:
        """As in the tables: `bf16 64x144 k1,3,3,1,1,1 p18`."""
        positions = round(math.log2(max(self.positions, 1)))
        return f"{self.dtype} {'x'.join(map(str, self.sizes))} k{','.join(map(str, self.form))} p{positions}"


@dataclass(frozen=True)
class Chosen:
    """A configuration, and where it comes from."""

    kernel: str
    key: Key
    config: Config
    source: str
    """`exact`, `nearest: <key>`, `analytic`, or `forced`."""
    candidates: tuple[Config, ...]
    """What the kernel can be launched with, by how fast it is expected to be."""


@dataclass
class _State:
    forced: dict[tuple[str, str], Config] = field(default_factory=dict)
    watched: list[Chosen] | None = None
    generation: int = 0


_state = _State()


def pick(kernel: str, key: Key, candidates: Sequence[Config], gpu: Gpu) -> Config:
    """The configuration to launch a kernel with: tuned for the key, tuned for the nearest, or the first candidate.

    Args:
        kernel: Its name in the tables: `conv3d/triton_igemm/forward`.
        key: What the launch is for.
        candidates: Every configuration that can run it on the GPU; the first is the best guess.
        gpu: Where it runs.
    """
    chosen = explain(kernel, key, candidates, gpu)
    if _state.watched is not None:
        _state.watched.append(chosen)
    return chosen.config


def explain(kernel: str, key: Key, candidates: Sequence[Config], gpu: Gpu) -> Chosen:
    """`pick`, with where the choice comes from."""
    if not candidates:
        raise ValueError(f"{kernel} has no configuration for {key.text} on {gpu.name}")
    options = tuple(candidates)
    if (forced := _state.forced.get((kernel, key.text))) is not None:
        return Chosen(kernel, key, forced, "forced", options)
    known = table(gpu.name)["launches"].get(kernel, {})
    for text, source in nearest(key, known):
        if known[text] in options:
            return Chosen(kernel, key, known[text], source, options)
    return Chosen(kernel, key, options[0], "analytic", options)


@contextmanager
def forced(kernel: str, key: Key, config: Config) -> Iterator[None]:
    """Launches of a kernel for a key take this configuration."""
    place = kernel, key.text
    before = _state.forced.get(place)
    _state.forced[place] = config
    try:
        yield
    finally:
        if before is None:
            del _state.forced[place]
        else:
            _state.forced[place] = before


@contextmanager
def watching() -> Iterator[list[Chosen]]:
    """Collects every choice that is made."""
    before = _state.watched
    found: list[Chosen] = []
    _state.watched = found
    try:
        yield found
    finally:
        _state.watched = before


def table_name(gpu_name: str) -> str:
    """The file of a GPU: `nvidia_h200.json`."""
    return re.sub(r"[^a-z0-9]+", "_", gpu_name.lower()).strip("_") + ".json"


@cache
def table(gpu_name: str) -> dict[str, Any]:
    """What is known of a GPU: `launches` by kernel and key, `implementations` by op, direction and key.

    Raises:
        ValueError: A file that is no such table; it is named.
    """
    merged: dict[str, dict[str, dict[str, Any]]] = {"launches": {}, "implementations": {}}
    for folder in (SHIPPED, cache_folder() / "tables"):
        path = folder / table_name(gpu_name)
        if not path.is_file():
            continue
        try:
            read = json.loads(path.read_text())
            for section, known in merged.items():
                for name, entries in read.get(section, {}).items():
                    known.setdefault(name, {}).update(entries)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is not a table of tuned launches ({error}): remove it, or tune anew") from error
    return merged


def nearest(key: Key, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Entries of a table by how near they are to a key, each with `exact` or `nearest: …` to say so."""
    if key.text in known:
        yield key.text, "exact"
    if known:
        near = sorted((distance, text) for text in known if (distance := _distance(key.text, text)) is not None)
        yield from ((text, f"nearest: {text}") for distance, text in near if distance)


def generation() -> int:
    """Grows whenever a table may have changed."""
    return _state.generation


def entries(path: Path, section: str, name: str) -> dict[str, Any]:
    """What a table's file holds in one section of one kernel or op; nothing where there is no file."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found: dict[str, Any] = known.get(section, {}).get(name, {})
    return found


def extend(path: Path, section: str, name: str, entries: Mapping[str, Any]) -> None:
    """Adds entries to a table's file, whole or not at all."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    known.setdefault(section, {}).setdefault(name, {}).update(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known, file, indent=1, sort_keys=True)
    os.replace(file.name, path)
    table.cache_clear()
    _state.generation += 1


def _distance(wanted: str, known: str) -> float | None:
    """How far a known key is: octaves of sizes and positions; None where the code would be another."""
    one, other = _parsed(wanted), _parsed(known)
    if one[0] != other[0] or len(one[1]) != len(other[1]):
        return None
    sizes = sum(abs(math.log2(a / b)) for a, b in zip(one[1], other[1], strict=True))
    return sizes + abs(one[2] - other[2])


@cache
def _parsed(text: str) -> tuple[tuple[str, str], tuple[int, ...], int]:
    dtype, sizes, form, positions = text.split(" ")
    return (dtype, form), tuple(int(size) for size in sizes.split("x")), int(positions[1:])
