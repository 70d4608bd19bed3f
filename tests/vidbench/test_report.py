"""The report: what a reader finds in its files, whatever the run holds."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vidbench.metrics import frame as frame_of
from vidbench.records import Accuracy, Ceilings, Counts, Environment, Error, Measurement, Memory
from vidbench.report import report, style
from vidbench.report.figures import FIGURES, roofline, speed_up, speed_up_map
from vidbench.report.html import script_safe
from vidbench.report.markdown import cell
from vidbench.report.tables import digits, standing, verdicts
from vidbench.results import Run, RunWriter, load
from vidbench.sweep import Point, RequestError, Sweep, Value

ENVIRONMENT = Environment(
    "xeon-2", cpu="Intel Xeon @ 2.20 GHz", cores=2, threads=2, memory_bytes=8 * 2**30, torch="2.11.0", python="3.12.3",
    platform="Linux", git_commit="0123456789abcdef", git_dirty=True, flags={"allow_tf32": "false"},
    flops_per_s={"cpu/fp32": 9e10}, bytes_per_s={"cpu/1048576": 4e10, "cpu/268435456": 1.1e10},
)  # fmt: skip

Case = dict[str, Value]


def measured(point: Point, latency: float, rounds: int = 3, **fields: Any) -> Iterator[Measurement]:
    noise = random.Random(point.key)
    for number in range(rounds):
        base = latency * noise.lognormvariate(0, 0.03)
        samples = tuple(base * (1 + abs(noise.gauss(0, 0.02))) for _ in range(12))
        yield Measurement(point, number, "ok", samples_s=samples, ceilings=Ceilings(9e10, 1.1e10), **fields)


def ops() -> Iterator[Measurement]:
    speed = {"reference": 0.6, "library": 4.0, "compiled": 5.2}
    for clip in (8, 16, 32):
        for batch in (1, 4):
            case: Case = {"clip_length": clip, "batch_size": batch, "height": 28, "width": 28, "in_channels": 64}
            macs = clip * batch * 28 * 28 * 64 * 64
            for workload, taps in (("conv3d", 27), ("conv2plus1d", 12), ("depthwise_conv3d", 1)):
                for name, rate in speed.items():
                    point = Point(workload, "op", name, case=case)
                    if name == "reference" and clip == 32 and workload == "conv3d":
                        yield Measurement(point, 0, "timeout", "no result within 60 s")
                        continue
                    if name == "compiled" and workload == "depthwise_conv3d":
                        yield Measurement(point, 0, "skipped", "compiled: needs a C++ compiler; none found")
                        continue
                    yield from measured(
                        point, macs * taps / (rate * 1e9) + 2e-4,
                        memory=Memory(10**6, macs // 40 + 10**6), counts=Counts(macs * taps, {"closed_form": macs}),
                        params=64 * 64 * taps, bytes_moved=clip * batch * 28 * 28 * 64 * 4 * 2, error=Error(3e-7, 2e-6),
                        trust="poor" if batch == 4 and name == "library" and clip == 16 else "good",
                        trust_reasons=("another process on the device",) if batch == 4 and clip == 16 else (),
                    )  # fmt: skip


def sequences() -> Iterator[Measurement]:
    for clip in (8, 32, 128, 512, 1024):
        for batch in (1, 16):
            for workload, step in (("rnn", 2e-5), ("lstm", 6e-5), ("tcn_block", 1.5e-5)):
                for name, factor in (("reference", 3.0), ("library", 1.0), ("compiled", 0.8)):
                    case: Case = {"clip_length": clip, "batch_size": batch, "input_features": 256, "hidden_size": 256}
                    if workload == "tcn_block":
                        case |= {"kernel_size": 3, "dilation": 2}
                    point = Point(workload, "op", name, case=case)
                    if workload == "lstm" and name == "compiled" and clip == 1024:
                        yield Measurement(point, 0, "failed", "error 3.1e-3 exceeds the gate 2e-6", error=Error(3.1e-3, 2e-6))
                        continue
                    macs = clip * batch * 256 * 256 * (8 if workload == "lstm" else 2)
                    latency = step * factor * (clip**0.6 if workload == "tcn_block" else clip) * batch**0.4
                    yield from measured(
                        point, latency, memory=Memory(10**6, clip * batch * 4096 + 10**6), counts=Counts(macs),
                        params=10**5, bytes_moved=clip * batch * 2048, error=Error(1e-7, 2e-6),
                    )  # fmt: skip


MODELS = {"cnn_tcn": 0.9, "cnn_lstm": 1.0, "cnn_rnn": 0.95, "c3d": 3.2, "r3d_18": 4.1, "r2plus1d_18": 4.9, "x3d_s": 0.7}


def models() -> Iterator[Measurement]:
    for number, (name, cost) in enumerate(MODELS.items()):
        for clip in (8, 16, 32):
            for batch in (1, 4):
                for implementation, factor in (("eager", 1.0), ("compiled", 0.78)):
                    case: Case = {"clip_length": clip, "batch_size": batch, "height": 112, "width": 112, "num_classes": 4}
                    point = Point(name, "model", implementation, case=case)
                    if clip == 32 and batch == 4 and cost > 4:
                        yield Measurement(point, 0, "oom", "out of memory: 3.1 GiB wanted, 2.2 GiB free")
                        continue
                    macs = int(cost * 1e9 * clip * batch / 2)
                    yield from measured(
                        point, cost * 4e-3 * clip * batch * factor, rounds=2,
                        memory=Memory(10**8, int(3e7 * cost * clip * batch)), counts=Counts(macs), params=int(cost * 8e6),
                    )  # fmt: skip
        for seed in range(3):
            case = {"clip_length": 16, "height": 112, "width": 112, "num_classes": 4, "seed": seed}
            top1 = 0.45 + 0.06 * number + 0.02 * seed
            yield Measurement(
                Point(name, "task", "eager", "evaluate", case=case), 0, "ok",
                accuracy=Accuracy("frame_order", seed, top1, 0.25, 512, 31.0, {"shuffled": 0.26, "reversed": 0.31}),
            )  # fmt: skip


def stages() -> Iterator[Measurement]:
    for workload, name, latency in (
        ("decode", "pyav", 0.021), ("decode", "torch", 0.035), ("resize_normalise", "torch", 0.004),
        ("optical_flow", "opencv_dis", 0.16),
    ):  # fmt: skip
        point = Point(workload, "stage", name, case={"clip_length": 16, "height": 112, "width": 112, "batch_size": 1})
        yield from measured(point, latency)


def made(measurements: Iterable[Measurement], identifier: str = "20260101T000000Z-demo-0a1b", **fields: Any) -> Run:
    sweep = Sweep("conv3d", axes={"clip_length": (8, 16, 32)})
    known = {"suite": "demo", "command": "vidbench sweep demo --rounds 3", "input": None, "warnings": ()}
    return Run(
        schema_version=1, id=identifier, created_utc="2026-01-01T00:00:00Z", sweeps=(sweep,), environment=ENVIRONMENT,
        measurements=list(measurements), folder=Path("demo"), **{**known, **fields},
    )  # fmt: skip


def everything() -> list[Measurement]:
    return [*ops(), *sequences(), *models(), *stages()]


if __name__ == "__main__":  # pragma: no cover - writes a sample report to look at
    print(report([made(everything())], sys.argv[1]))
