"""Part `check`: the contract of every implementation on the device, by pytest in several processes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import plan
from bench.gpu.session import FINAL, Session

ROOT = Path(__file__).parents[2]
PROCESSES = 12
PART = "check"
SMOKE = "test_agrees_with_float64 and causal_conv1d and dilated and forward and fp32 and not gpu"


def check(session: Session, deadline: float, *, device: str, only: str, smoke: bool) -> None:
    """A row for every test; those that no time was left for are not begun."""
    rows, done = session.raw / "check.jsonl", session.raw / "check.done"
    rows.touch()
    done.write_text("\n".join(unit for unit, status in session.statuses(PART).items() if status in FINAL))
    environment = {
        **os.environ,
        "VIDBENCH_GPU_ROWS": str(rows),
        "VIDBENCH_GPU_DONE": str(done),
        "VIDBENCH_GPU_DTYPES": ",".join(plan.DTYPES),
        "VIDBENCH_GPU_ONLY": only,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # the processes are many already
    }
    with (session.raw / "check.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments(device, smoke)],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with rows.open() as file:
            while process.poll() is None and time.monotonic() < deadline:
                _adopt(session, file.readlines())
                time.sleep(0.2)
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                session.unreached[PART] = session.unreached.get(PART, 0) + 1
                session.say("check: stopped at its deadline; what was not reached is left for the next call")
            process.wait()
            _adopt(session, file.readlines())
    if process.returncode not in (0, 1, 5, -signal.SIGKILL):
        said = (session.raw / "check.log").read_text().strip().splitlines()
        reason = f"pytest: exit code {process.returncode}: {' '.join(said[-3:])[:400]}"
        session.record({"part": PART, "unit": "pytest", "status": "failed", "reason": reason})


def arguments(device: str, smoke: bool) -> Sequence[str]:
    """What pytest is asked for."""
    quiet = ["-q", "--no-header", "--tb=short", "--continue-on-collection-errors", "-o", "addopts="]
    common = [*quiet, "-p", "bench.gpu.rows_plugin", "-p", "no:cacheprovider"]
    if smoke:
        tests = "tests/vidkernels/test_contract.py"
        return [*common, "-m", "not slow and not gpu", "-k", SMOKE, tests]
    # Few tests at a time to each process: then their order holds. Of the ways to share them out, `load` alone goes on
    # well after a crash: `loadgroup` takes the test that crashed once more, and hangs.
    workers = ["-n", str(PROCESSES), "--dist", "load", "--maxschedchunk", "4", "--max-worker-restart", "60"]
    if importlib.util.find_spec("pytest_timeout"):
        # By a thread, which ends the process: a signal does not reach a thread that waits for the device.
        workers += ["--timeout", "150", "--timeout-method", "thread"]
    marks = "gpu and not slow" if device == "cuda" else "not gpu and not slow"
    return [*common, *workers, "-m", marks, "tests/vidkernels"]


def _adopt(session: Session, lines: list[str]) -> None:
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            session.record({"part": PART, **json.loads(line)})
