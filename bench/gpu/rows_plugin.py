"""A pytest plugin (`-p bench.gpu.rows_plugin`): every test's outcome as a line of a file, and the errors it saw.

The lines are written by the worker processes themselves, so that they are there whatever becomes of pytest. A worker
whose device does not answer any more writes so and leaves: pytest-xdist puts a fresh one in its place, where otherwise
every later test would fail with it.

VIDBENCH_GPU_ROWS names the file, VIDBENCH_GPU_DONE one with the tests to leave out, VIDBENCH_GPU_ONLY is a regular
expression for those to take, VIDBENCH_GPU_DTYPES the order of dtypes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.pool import BROKEN, device_is_broken

_worst: list[float] = []
DTYPES = ("bf16", "fp16", "tf32", "fp32", "fp64")
DIRECTIONS = ("forward", "input_gradient", "weight_gradient", "train")
_OWN = {"reference": 2, "library": 1, "compiled": 1}


def pytest_configure(config: pytest.Config) -> None:
    """Lets every check against float64 tell how near its gates it came."""
    from vidkernels import checking

    judge = checking.Errors.failures

    def failures(self: Any, op: Any, case: Any, *others: Any, slack: float = 1.0, **named: Any) -> list[str]:
        found = judge(self, op, case, *others, slack=slack, **named)
        gate = op.tolerances[case.dtype]
        limits = (gate.forward, gate.forward, gate.input_gradient or gate.forward, gate.weight_gradient)
        errors = (self.output, self.border, self.input_gradient, self.weight_gradient)
        _worst.append(max((e / (slack * g) for e, g in zip(errors, limits, strict=True) if e is not None), default=0.0))
        return found

    checking.Errors.failures = failures  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Our kernels first and the most important dtype first; what an earlier call has passed is left out."""
    done = Path(os.environ.get("VIDBENCH_GPU_DONE", os.devnull))
    known = set(done.read_text().splitlines()) if done.is_file() else set()
    order = os.environ.get("VIDBENCH_GPU_DTYPES", "").split(",")
    only = re.compile(os.environ.get("VIDBENCH_GPU_ONLY", ""))
    kept = [item for item in items if item.nodeid not in known and only.search(item.nodeid)]
    taken = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in taken])

    def rank(item: pytest.Item) -> tuple[int, int]:
        values = _parameters(item)
        dtype = values.get("dtype", "")
        return _OWN.get(str(values.get("name", "")), 0), order.index(dtype) if dtype in order else len(order)

    items[:] = sorted(kept, key=rank)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Writes a test's line once it is known; leaves where the device is broken."""
    report = yield
    if call.when == "setup":
        _worst.clear()
    if call.when == "call" or (call.when == "setup" and not report.passed):
        reason = ""
        if report.skipped:
            longrepr = report.longrepr
            reason = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")
        elif report.failed and call.excinfo is not None:
            said = str(call.excinfo.value).strip().splitlines()
            reason = f"{call.excinfo.typename}: {' '.join(said[:2])[:400]}"
        broken = report.failed and device_is_broken()
        status = "crashed" if broken else {"passed": "ok", "skipped": "skipped"}.get(report.outcome, "failed")
        _write(item, status, reason, report.duration)
        if broken:
            os._exit(BROKEN)
    return report


def _write(item: pytest.Item, status: str, reason: str, seconds: float) -> None:
    values = _parameters(item)
    training = values.get("training", values.get("direction", ""))
    row = {
        "unit": item.nodeid,
        "status": status,
        "reason": reason,
        "op": values.get("op_name", ""),
        "implementation": values.get("name", ""),
        "dtype": values.get("dtype", "fp32"),
        "direction": {True: "train", False: "forward"}.get(training, str(training)),
        "test": getattr(item, "originalname", item.name),
        "over_gate": max(_worst, default=None),
        "seconds": round(seconds, 3),
    }
    with open(os.environ["VIDBENCH_GPU_ROWS"], "a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")  # one write: lines of several workers do not mix


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport) -> None:
    """Writes the line of a test whose process ended without a word: crashed itself, or stopped by its timeout."""
    path = Path(os.environ["VIDBENCH_GPU_ROWS"])
    if any(json.loads(line)["unit"] == crashitem for line in path.read_text().splitlines()):
        return
    from vidkernels import OPS

    words = crashitem.partition("[")[2].rstrip("]").split("-")
    op = next((word for word in words if word in OPS), "")
    known = {
        "op": OPS,
        "implementation": OPS[op].implementations if op else (),
        "dtype": DTYPES,
        "direction": DIRECTIONS,
    }
    row: dict[str, Any] = {name: next((word for word in words if word in values), "") for name, values in known.items()}
    row |= {"unit": crashitem, "status": "crashed", "reason": str(report.longrepr)[:300], "over_gate": None}
    with path.open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _parameters(item: pytest.Item) -> dict[str, Any]:
    spec = getattr(item, "callspec", None)
    return dict(spec.params) if spec is not None else {}
