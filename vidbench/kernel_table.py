"""What every shipped kernel compiles to, on each architecture, without a GPU.

    python -m vidbench.kernel_table            compile everything, compare with the committed table
    python -m vidbench.kernel_table --write    compile everything, write the table

The table holds one row for every cubin that the layers of `vidbench.layers` need: registers, stack, accesses to local
memory, shared memory, matrix instructions, instructions. A cubin that spills more than its row says, or needs more
stack, or lost its matrix instructions, fails; so does one that has no row.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
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
from vidkernels.cubins import Resources
from vidkernels.launch import TARGETS, Gpu, Launch, recording
from vidkernels.op import DTYPES as op_dtypes
from vidkernels.op import Case, Inputs, Op, tensors_of

DTYPES = ("bf16", "fp16", "tf32", "fp32")
BUILT_IN = ("reference", "library", "compiled", "onednn")
REPORTS = Path("reports/compiled")


@dataclass(frozen=True)
class Row:
    """One cubin."""

    kernel: str
    """What was compiled: `vidkernels.cubins.key`."""
    architecture: str
    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    narrow_accesses: int
    matrix_instructions: str
    instructions: int


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


def _compile(task: tuple[str, str, tuple[str, ...], tuple[str, ...]]) -> Row:
    """One row, in a process that records for itself: launches hold tensors, and do not travel."""
    architecture, key, dtypes, ops = task
    gpu = TARGETS[architecture]
    launch = _launches(architecture, dtypes, ops)[key]
    cubin, shared_bytes = cubins.build(launch, gpu)
    found: Resources = cubins.resources(cubin, shared_bytes, gpu)
    return Row(kernel=key, architecture=architecture, **asdict(found))


def compile_all(
    architectures: Sequence[str] = tuple(TARGETS),
    dtypes: tuple[str, ...] = DTYPES,
    ops: tuple[str, ...] = tuple(OPS),
    processes: int | None = None,
) -> Iterator[Row]:
    """A row for every shipped kernel, as it is compiled."""
    tasks = [
        (architecture, key, dtypes, ops)
        for architecture in architectures
        for key in sorted(_launches(architecture, dtypes, ops))
    ]
    # A forked child inherits what was recorded; Triton and torch have started no thread that matters by now.
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("fork")) as pool:
        yield from pool.map(_compile, tasks, chunksize=4)


def table_path() -> Path:
    """The committed table of the Triton that is installed, below the working directory: `triton-3.7.csv`."""
    return REPORTS / f"triton-{'.'.join(version('triton').split('.')[:2])}.csv"


def read(path: Path) -> list[Row]:
    """The rows of a table."""
    with path.open(newline="") as file:
        return [
            Row(
                row["kernel"],
                row["architecture"],
                int(row["registers"]),
                int(row["stack_bytes"]),
                int(row["local_accesses"]),
                int(row["shared_bytes"]),
                int(row["narrow_accesses"]),
                row["matrix_instructions"],
                int(row["instructions"]),
            )
            for row in csv.DictReader(file)
        ]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes a table, sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: (row.kernel, row.architecture)))


_RANK = {"none": 0, "mma": 1, "wgmma": 2, "tcgen05": 2}


def worse(row: Row, known: Row | None) -> list[str]:
    """What a cubin has lost against its row of the table."""
    name = f"{row.architecture} {row.kernel}"
    if known is None:
        return [f"{name}: has no row in the table; write it anew"]
    found = []
    for what in ("stack_bytes", "local_accesses", "shared_bytes", "narrow_accesses"):
        now, before = getattr(row, what), getattr(known, what)
        if now > before:
            found.append(f"{name}: {what} {before} → {now}")
    if row.registers > known.registers + 8:  # the assembler's own variation
        found.append(f"{name}: registers {known.registers} → {row.registers}")
    if _RANK[row.matrix_instructions] < _RANK[known.matrix_instructions]:
        found.append(f"{name}: matrix instructions {known.matrix_instructions} → {row.matrix_instructions}")
    if row.shared_bytes > TARGETS[row.architecture].shared_bytes:
        found.append(f"{name}: {row.shared_bytes} bytes of shared memory, more than a block can have")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where something is worse than the table says."""
    parser = argparse.ArgumentParser(prog="vidbench.kernel_table", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    parser.add_argument("--ops", default=",".join(OPS), help="ops to compile, by commas")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--architectures", default=",".join(TARGETS))
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 interprets kernels: unset it to compile them", file=sys.stderr)
        return 2
    path = table_path()
    architectures, dtypes, ops = (tuple(text.split(",")) for text in (chosen.architectures, chosen.dtypes, chosen.ops))
    rows = []
    for row in compile_all(architectures, dtypes, ops):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r{len(rows)} compiled", end="", file=sys.stderr)
    spilling = [row for row in rows if row.stack_bytes or row.local_accesses]
    print(f"triton {version('triton')}, Python {platform.python_version()}: {len(rows)} cubins, {len(spilling)} spill")
    if chosen.write:
        whole = (architectures, dtypes, ops) == (tuple(TARGETS), DTYPES, tuple(OPS))
        kept = {} if whole or not path.is_file() else {(row.kernel, row.architecture): row for row in read(path)}
        write(path, (kept | {(row.kernel, row.architecture): row for row in rows}).values())
        print(path)
        return 0
    known = {(row.kernel, row.architecture): row for row in read(path)} if path.is_file() else {}
    lost = [line for row in rows for line in worse(row, known.get((row.kernel, row.architecture)))]
    print("\n".join(lost) if lost else "none is worse than the table says")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
