"""What every shipped kernel compiles to, on each architecture, without a GPU.

    python -m vidbench.kernel_table            is the committed table of these sources? are samples as it says?
    python -m vidbench.kernel_table --write    compile what has changed, write the table

The table holds one row for every cubin that the layers of `vidbench.layers` need: registers, stack, accesses to local
memory, shared memory, matrix instructions, instructions, and a hash of the source that it was compiled from. A kernel
whose source or launch is not the table's fails; so does any row with stack or spills, or a dense convolution on sm_90
without wgmma, and a sample that needs more of anything than its row says. CI recompiles
one cubin for each kernel and architecture: all of them take an hour.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from vidbench import layers
from vidkernels import OPS, cubins
from vidkernels.launch import TARGETS, Gpu, Launch, recording
from vidkernels.op import DTYPES as op_dtypes
from vidkernels.op import Case, Inputs, Op, tensors_of

DTYPES = ("bf16", "fp16", "tf32", "fp32")
BUILT_IN = ("reference", "library", "compiled", "onednn")
REPORTS = Path("reports/compiled")


@dataclass(frozen=True)
class Row:
    """One cubin."""

    architecture: str
    kernel: str
    """`module:function` or `file.cu:entry` below vidkernels."""
    configuration: str
    """Types, constants and options, for people; `id` tells what these leave out."""
    id: str
    """Names everything that the compilation depends on but the source."""
    source: str
    """Hash of the kernel's source and of all that it calls."""
    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    narrow_accesses: int
    matrix_instructions: str
    instructions: int

    @property
    def place(self) -> tuple[str, str]:
        """Where it stands in the table."""
        return self.architecture, self.id


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products are rounded."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def record(op: Op, name: str, case: Case, gpu: Gpu) -> list[Launch]:
    """What one implementation would launch for a case on a GPU: forward, and every gradient where the case trains."""
    inputs = _inputs(op.name, replace(case, dtype="fp32", training=False)).map(
        lambda tensor: tensor.detach().to(op_dtypes[case.dtype]).requires_grad_(case.training)
    )
    if "training" in inputs.kwargs:
        inputs = Inputs(inputs.args, {**inputs.kwargs, "training": case.training})
    with tf32(case.dtype == "tf32"), recording(gpu) as launches, torch.set_grad_enabled(case.training):
        outputs = tensors_of(op[name].fn(*inputs.args, **inputs.kwargs))
        if case.training:
            wanted = [tensor for tensor in inputs.tensors() if tensor.requires_grad]
            torch.autograd.grad(outputs, wanted, [torch.empty_like(y) for y in outputs], allow_unused=True)
    return launches


@cache
def _inputs(op: str, case: Case) -> Inputs:
    return OPS[op].inputs(case, device="meta")


def why_not(op: Op, name: str, case: Case, gpu: Gpu) -> str | None:
    """As `Implementation.why_not`, for a GPU that is not there."""
    if "sm_90" in op[name].requires and gpu.capability < 90:
        return "needs compute capability 9.0 or later"
    limits = op[name].limits
    return limits(case) if limits else None


def shipped(gpu: Gpu, dtypes: Sequence[str] = DTYPES, ops: Iterable[str] = tuple(OPS)) -> dict[str, Launch]:
    """Every launch that the layers need on a GPU, once for each compilation, by the text that names it."""
    found: dict[str, Launch] = {}
    for layer, dtype, training in product(layers.distinct(), dtypes, (False, True)):
        if layer.op not in ops:
            continue
        op = OPS[layer.op]
        case = op.case({**layer.case, **_short(layer.op)}, batch_size=8, dtype=dtype, training=training)
        for name in op.implementations:
            if name in BUILT_IN or why_not(op, name, case, gpu):
                continue
            for launch in record(op, name, case, gpu):
                found.setdefault(cubins.key(launch, gpu), launch)
    return found


def _short(op: str) -> dict[str, Any]:
    """A clip length at which a launch per frame costs little to record, where every frame launches the same."""
    return {"clip_length": 8} if op in ("rnn", "lstm") else {}


@cache
def _launches(architecture: str, dtypes: tuple[str, ...], ops: tuple[str, ...]) -> dict[str, Launch]:
    return shipped(TARGETS[architecture], dtypes, ops)


@dataclass(frozen=True)
class Task:
    """A cubin to be made. Launches hold tensors and do not travel: a process finds its own by the key."""

    architecture: str
    key: str
    dtypes: tuple[str, ...]
    ops: tuple[str, ...]

    @property
    def launch(self) -> Launch:
        """What was recorded."""
        return _launches(self.architecture, self.dtypes, self.ops)[self.key]

    @property
    def place(self) -> tuple[str, str]:
        """As of its row."""
        return self.architecture, hashlib.sha256(self.key.encode()).hexdigest()[:12]

    @property
    def configuration(self) -> str:
        """Of its row: without what is aligned as always, and what is absent."""
        text = re.sub(r"\w+=None ", "", self.key.partition(" ")[2])
        types = re.findall(r":(?:\*|tensordesc<)(\w+)", text)
        return re.sub(r"^\(.*?\)", "/".join(dict.fromkeys(types)), text)

    @property
    def source(self) -> str:
        """As of its row."""
        return cubins.source(self.launch)[:12]

    def compile(self) -> Row:
        """Its row."""
        gpu = TARGETS[self.architecture]
        cubin, shared_bytes = cubins.build(self.launch, gpu)
        found = asdict(cubins.resources(cubin, shared_bytes, gpu))
        kernel, _, _ = self.key.partition(" ")
        return Row(self.architecture, kernel, self.configuration, self.place[1], self.source, **found)


def tasks(
    architectures: Sequence[str] = tuple(TARGETS), dtypes: tuple[str, ...] = DTYPES, ops: tuple[str, ...] = tuple(OPS)
) -> list[Task]:
    """Every shipped cubin."""
    return [
        Task(architecture, key, dtypes, ops)
        for architecture in architectures
        for key in sorted(_launches(architecture, dtypes, ops))
    ]


def compile_all(todo: Sequence[Task], processes: int | None = None) -> Iterator[Row]:
    """The rows of tasks, as they are done."""
    # A forked child inherits what was recorded; torch and Triton have started no thread that matters by now.
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("fork")) as pool:
        yield from pool.map(Task.compile, todo)


def folder() -> Path:
    """The committed table of the Triton that is installed, below the working directory: a file for each op."""
    return REPORTS / f"triton-{'.'.join(version('triton').split('.')[:2])}"


def read(where: Path) -> dict[tuple[str, str], Row]:
    """The rows of a table."""
    rows = {}
    for path in sorted(where.glob("*.csv")):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                row = Row(**{f.name: int(line[f.name]) if f.type == "int" else line[f.name] for f in fields(Row)})  # type: ignore[arg-type]
                rows[row.place] = row
    return rows


def write(where: Path, rows: Iterable[Row]) -> None:
    """Writes a table, sorted, a file for each op."""
    where.mkdir(parents=True, exist_ok=True)
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(re.split(r"[./]", row.kernel)[0], []).append(row)
    for op, mine in by_op.items():
        with (where / f"{op}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            mine.sort(key=lambda row: (row.kernel, row.configuration, row.architecture, row.id))
            writer.writerows(asdict(row) for row in mine)


_RANK = {"none": 0, "mma": 1, "wgmma": 2, "tcgen05": 2}


def worse(row: Row, known: Row) -> list[str]:
    """What a cubin has lost against its row of the table."""
    name = f"{row.architecture} {row.kernel} {row.configuration}"
    found = []
    for what in ("stack_bytes", "local_accesses", "shared_bytes", "narrow_accesses"):
        now, before = getattr(row, what), getattr(known, what)
        if now > before:
            found.append(f"{name}: {what} {before} → {now}")
    if row.registers > known.registers + 8:  # the assembler's own variation
        found.append(f"{name}: registers {known.registers} → {row.registers}")
    if _RANK[row.matrix_instructions] < _RANK[known.matrix_instructions]:
        found.append(f"{name}: matrix instructions {known.matrix_instructions} → {row.matrix_instructions}")
    return found


def flaws(row: Row) -> list[str]:
    """What no shipped cubin may have: local memory, or a dense convolution on sm_90 without its matrix instructions."""
    name = f"{row.architecture} {row.kernel} {row.configuration}"
    found = []
    if row.stack_bytes or row.local_accesses:
        found.append(f"{name}: {row.stack_bytes} bytes of stack, {row.local_accesses} accesses to local memory")
    dense = re.match(r"conv3d\.triton_igemm\w*:(boxes|gather)$", row.kernel)
    exact = "PRECISION=ieee" in row.configuration and not re.search(r"\b(bf16|fp16)\b", row.configuration)
    if row.architecture == "sm_90" and dense and row.matrix_instructions != "wgmma" and not exact:
        found.append(f"{name}: matrix instructions {row.matrix_instructions}, not wgmma")
    return found


def sample(todo: Sequence[Task]) -> list[Task]:
    """One task of every kernel on every architecture, the same ones each time."""
    chosen: dict[tuple[str, str], Task] = {}
    for task in sorted(todo, key=lambda task: task.place):
        chosen.setdefault((task.architecture, task.key.partition(" ")[0]), task)
    return list(chosen.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where something is worse than the table says."""
    parser = argparse.ArgumentParser(prog="vidbench.kernel_table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="compile what has changed, and write the table")
    parser.add_argument("--all", action="store_true", help="compile everything, whether it has changed or not")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop writing after these; the rest is for the next call"
    )
    parser.add_argument("--ops", default=",".join(OPS), help="ops to compile, by commas")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--architectures", default=",".join(TARGETS))
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 interprets kernels: unset it to compile them", file=sys.stderr)
        return 2
    architectures, dtypes, ops = (tuple(text.split(",")) for text in (chosen.architectures, chosen.dtypes, chosen.ops))
    everything = tasks(architectures, dtypes, ops)
    known = read(folder())
    sources = {place: row.source for place, row in known.items()}
    changed = [task for task in everything if sources.get(task.place) != task.source]
    print(f"triton {version('triton')}: {len(everything)} cubins, {len(changed)} other than the table's")
    if chosen.write:
        if (architectures, dtypes, ops) == (tuple(TARGETS), DTYPES, tuple(OPS)):
            texts = {task.place: task.configuration for task in everything}
            known = {at: replace(row, configuration=texts[at]) for at, row in known.items() if at in texts}
        return _extend(everything if chosen.all else changed, known, chosen.minutes)
    for task in changed[:10]:
        print(f"{task.architecture} {task.key}: not in the table as it is now")
    if changed:
        print("run `python -m vidbench.kernel_table --write`, and look at the difference")
        return 1
    lost = [line for task in everything for line in flaws(known[task.place])]
    rows = list(compile_all(everything if chosen.all else sample(everything)))
    lost += [line for row in rows for line in worse(row, known[row.place])]
    print("\n".join(lost) if lost else f"no stack, no spills; {len(rows)} compiled: none is worse than the table says")
    return bool(lost)


def _extend(todo: Sequence[Task], known: dict[tuple[str, str], Row], minutes: float) -> int:
    """Compiles, and writes the table now and then; 1 where time ran out."""
    started = time.monotonic()
    write(folder(), known.values())
    # Kernels in turn, so that a table cut short holds some of each.
    todo = sorted(todo, key=lambda task: task.place[1])
    for at in range(0, len(todo), 64):
        if time.monotonic() - started > 60 * minutes:
            print(f"{len(todo) - at} left")
            return 1
        for row in compile_all(todo[at : at + 64]):
            known[row.place] = row
        write(folder(), known.values())
        print(f"{min(at + 64, len(todo))} of {len(todo)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
