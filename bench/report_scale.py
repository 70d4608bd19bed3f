"""Makes a large synthetic run, then loads, frames and reports it in a process of its own, against fixed limits.

    python bench/report_scale.py [--points 100000] [--rounds 3] [--samples 30]

Prints seconds and peak resident set; exits 1 above 45 s of processor time or 2 GB. Processor time stands for the
seconds on an idle machine, as one thread does all the work, and does not grow with what else runs.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path

LIMIT_S = 45.0
LIMIT_BYTES = 2_000_000_000


def make(folder: Path, points: int, rounds: int, samples: int) -> None:
    """A run of conv3d whose latencies follow the size of the case with some noise; one point in fifty fails."""
    from vidbench.records import Ceilings, Counts, Environment, Error, Measurement, Memory
    from vidbench.results import LINES, RunWriter
    from vidbench.run_format import encode_line
    from vidbench.sweep import Sweep

    implementations = ("reference", "library", "compiled", "triton_igemm")
    per = max(1, points // (len(implementations) * 10 * 5))
    sweep = Sweep(
        "conv3d",
        axes={
            "in_channels": tuple(range(1, per + 1)),
            "clip_length": tuple(range(4, 44, 4)),
            "batch_size": (1, 2, 4, 8, 16),
            "implementation": implementations,
        },
        fixed={"height": 28, "width": 28, "out_channels": 64, "kernel_size": (3, 3, 3)},
    )
    environment = Environment(
        "synthetic-2",
        cores=2,
        flops_per_s={"cpu/fp32": 1e11},
        bytes_per_s={"cpu/1048576": 2e10, "cpu/1073741824": 1e10},
    )
    RunWriter.create(folder, suite="scale", sweeps=[sweep], environment=environment, command="report_scale.py").close()
    noise = random.Random(0)
    with (folder / LINES).open("ab") as file:
        for number in range(rounds):
            for index, point in enumerate(sweep.points()):
                macs = int(point.case["in_channels"]) * int(point.case["clip_length"]) * int(point.case["batch_size"])  # type: ignore[arg-type]
                macs *= 28 * 28 * 64 * 27
                if index % 50 == 7:
                    measurement = Measurement(point, number, "oom", "out of memory: 1.0 GiB wanted, 0.5 GiB free")
                else:
                    base = macs / 5e10 * noise.lognormvariate(0, 0.1)
                    measurement = Measurement(
                        point,
                        number,
                        "ok",
                        samples_s=array("d", (base * (1 + 0.1 * noise.random()) for _ in range(samples))),
                        memory=Memory(1000 * index, 2000 * index, 10**8),
                        counts=Counts(macs, {"closed_form": macs, "meta": macs}),
                        params=64 * 27,
                        bytes_moved=macs // 100,
                        error=Error(1e-7, 2e-6, 1e-7),
                        ceilings=Ceilings(1e11, 1e10),
                        stop="converged",
                        wall_s=1.0,
                    )
                file.write(encode_line(measurement))


def read(folder: Path) -> dict[str, float]:
    """Seconds of each step and the peak resident set of this process."""
    wall = time.perf_counter()
    start = time.process_time()
    from vidbench.report import report
    from vidbench.results import load

    imported = time.process_time()
    run = load(folder)
    loaded = time.process_time()
    rows = len(run.frame())
    framed = time.process_time()
    page = report([run], folder / "report")
    reported = time.process_time()
    return {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "frame_s": framed - loaded,
        "report_s": reported - framed,
        "total_s": reported - start,
        "wall_s": time.perf_counter() - wall,
        "measurements": len(run.measurements),
        "rows": rows,
        "page_bytes": page.stat().st_size,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read(given.read)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        make(folder, given.points, given.rounds, given.samples)
        size = sum(path.stat().st_size for path in folder.iterdir())
        child = subprocess.run(
            [sys.executable, __file__, "--read", str(folder)], capture_output=True, text=True, check=False
        )
    if child.returncode:
        print(child.stderr, file=sys.stderr)
        return 1
    found = json.loads(child.stdout)
    print(f"{found['rows']:,.0f} points, {found['measurements']:,.0f} measurements, {size / 1e6:.0f} MB on disk")
    for name in ("import_s", "load_s", "frame_s", "report_s", "total_s", "wall_s"):
        print(f"{name:<10} {found[name]:6.2f}")
    print(f"page       {found['page_bytes'] / 1e6:6.1f} MB")
    print(f"peak       {found['peak_resident_bytes'] / 1e9:6.2f} GB resident")
    fits = found["total_s"] <= LIMIT_S and found["peak_resident_bytes"] <= LIMIT_BYTES
    print("within limits" if fits else f"above the limits of {LIMIT_S:.0f} s and {LIMIT_BYTES / 1e9:.0f} GB")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
