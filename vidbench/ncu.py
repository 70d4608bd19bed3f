"""What Nsight Compute counts in the kernels of one settled call, where it is installed.

It replays every kernel several times in a process of its own, `python -m vidbench.ncu KEY`; times are torch.profiler's.
"""

from __future__ import annotations

import csv
import shutil
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


def counters(point: Point, video: str | None = None) -> tuple[list[dict[str, str]], str]:
    """The counters of each kernel of a call, and why there are none, if so."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return [], "ncu is not installed"
    command = [
        ncu, "--csv", "--page", "raw", "--profile-from-start", "off", "--target-processes", "all",
        "--launch-count", str(MOST_KERNELS), "--metrics", ",".join(METRICS),
        sys.executable, "-m", "vidbench.ncu", point.key, *([video] if video else []),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as problem:
        return [], f"ncu: {problem}"
    rows = parse(done.stdout)
    if rows:
        return rows, ""
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("==ERROR==")]
    return [], said[0].removeprefix("==ERROR== ") if said else "ncu told of no kernel"


def parse(text: str) -> list[dict[str, str]]:
    """Rows of ncu's table: a head, a line of units, and a line for each kernel, among messages."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    if not rows:
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
