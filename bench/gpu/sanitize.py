"""Part `sanitize`: compute-sanitizer over one small call of every custom implementation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from bench.gpu.one_case import UNFIT
from bench.gpu.pool import Emit, Unit

FOUND = 86
"""Exit code of the sanitizer where it found something."""

OPTIONS = {
    "memcheck": ("--report-api-errors", "no"),  # libraries try calls out
    "racecheck": ("--racecheck-report", "all"),
}
"""What each tool is asked for."""


def look(unit: Unit, emit: Emit) -> None:
    """One row: what one tool says of one case."""
    given = unit.values
    names = ("op", "implementation", "case_name", "dtype")
    common = {**{name: given[name] for name in names}, "tool": given["tool"]}
    command = [sys.executable, "-m", "bench.gpu.one_case", *(given[name] for name in names), given["device"]]
    environment = dict(os.environ)
    if given["device"] == "cuda":
        program = shutil.which("compute-sanitizer")
        if program is None:
            emit({**common, "status": "skipped", "reason": "compute-sanitizer is not on PATH"})
            return
        command = [
            program, "--tool", given["tool"], "--error-exitcode", str(FOUND), "--print-limit", "3",
            *OPTIONS[given["tool"]], *command,
        ]  # fmt: skip
        # The allocator's blocks would hide an access beyond a tensor.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    said = done.stdout + done.stderr
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if done.returncode == 0:
        row = {"status": "ok", "reason": ""}
    elif done.returncode == UNFIT or "Device not supported" in said:
        row = {"status": "skipped", "reason": lines[-1] if lines else ""}
    elif done.returncode == FOUND:
        errors = [line for line in lines if line.startswith("=========") and len(line) > 12]
        row = {"status": "failed", "reason": " | ".join(errors[1:7])[:600]}
    else:
        row = {"status": "failed", "reason": f"exit code {done.returncode}: {' '.join(lines[-1:])[:300]}"}
    print(said[-4000:])
    emit({**common, **row})
