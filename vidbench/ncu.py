"""What Nsight Compute counts in the kernels of one settled call, where it is installed.

It replays every kernel several times in a process of its own, `python -m vidbench.ncu KEY`; times are torch.profiler's.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys

from vidbench.sweep import Point

METRICS = {
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM, % of peak",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM, % of peak",
    "lts__t_sector_hit_rate.pct": "L2 hits, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared memory",
}
"""Counters, and what they are called on the page."""

TIMEOUT_S = 300.0
MOST_KERNELS = 60
"""Whose counters are read: each is replayed several times."""


def counters(point: Point, video: str | None = None) -> tuple[list[dict[str, str]], str]:
    """The counters of each kernel of a call, and what is to be said of them: why there are none, or not all."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return [], "ncu is not installed"
    command = [
        ncu, "--csv", "--page", "raw", "--profile-from-start", "off", "--target-processes", "all",
        # By default it flushes the caches before each kernel, which a hot call finds full.
        "--cache-control", "all" if point.regime == "cold" else "none",
        "--launch-count", str(MOST_KERNELS + 1), "--metrics", ",".join(METRICS),
        sys.executable, "-m", "vidbench.ncu", point.key, *([video] if video else []),
    ]  # fmt: skip
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as problem:
        return [], f"ncu cannot be started: {problem.strerror}"
    with child:
        try:
            output, errors = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return [], f"ncu took longer than {TIMEOUT_S:g} s"
        finally:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)  # itself, and the process that it watches
    rows = parse(output)
    if rows:
        return rows[:MOST_KERNELS], f"of the first {MOST_KERNELS} kernels alone" if len(rows) > MOST_KERNELS else ""
    return [], _why_none(output, errors)


def _why_none(output: str, errors: str) -> str:
    """What ncu says, and the last words of the process that it watched."""
    lines = [line.strip() for line in (output + "\n" + errors).splitlines()]
    said = [line.removeprefix("==ERROR== ") for line in lines if line.startswith("==ERROR==")][:1]
    said += [line for line in map(str.strip, errors.splitlines()) if line and not line.startswith("==")][-1:]
    return "; ".join(said) or "ncu told of no kernel"


def parse(text: str) -> list[dict[str, str]]:
    """Rows of ncu's table: a head, a line of units, and a line for each kernel, among messages."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if None not in row.values()]  # a line may be cut short
    if not rows or "Kernel Name" not in rows[0]:
        return []
    units, *kernels = rows
    return [
        {"kernel": row["Kernel Name"]}
        | {
            name: row[metric] + (f" {units[metric]}" if units[metric] not in ("%", "", "register/thread") else "")
            for metric, name in METRICS.items()
            if metric in row
        }
        for row in kernels
    ]


def _one_call(key: str, video: str | None) -> None:
    """One settled call between the profiler's start and stop."""
    import torch

    from vidbench.environment import precision
    from vidbench.suites import point_named
    from vidbench.workload import workload

    point = point_named(key, {})
    with precision(point.dtype):
        call = workload(point, video).prepare()
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        call()
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    _one_call(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
