"""Measurement and Environment: what is written down of one number and of the machine it came from.

Plain frozen dataclasses in SI units, no torch. Raw samples are kept; every derived figure is in `metrics`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from vidbench.sweep import Point

Status = Literal["ok", "skipped", "failed", "oom", "timeout", "crashed"]
Trust = Literal["good", "fair", "poor"]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of tensors, from the allocator, around one settled call."""

    live_before_bytes: int
    """Tensors alive before the call: weights, inputs, optimiser state."""
    peak_bytes: int
    """The most alive at once during it, those before included."""
    peak_resident_bytes: int | None = None
    """The process's peak resident set while the point ran (CPU)."""
    reserved_bytes: int | None = None
    """What the caching allocator held of the device (CUDA)."""
    allocator_retries: int | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Multiply-adds, counted several ways; `macs` is the figure that is used."""

    macs: int | None
    by: Mapping[str, int] = field(default_factory=dict)
    """Each source's count: closed_form, meta (torch's counter on the meta device), fvcore."""
    uncounted: tuple[str, ...] = ()
    """Operators that no counter knew, and disagreements between counters, by name."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call needs, whoever computes it."""

    counts: Counts | None = None
    params: int | None = None
    bytes_moved: int | None = None


@dataclass(frozen=True, slots=True)
class Error:
    """Relative Frobenius error against float64 of the same, already rounded, inputs."""

    output: float
    gate: float
    """The largest `output` that passes."""
    border: float | None = None
    """Of the outermost positions alone, where padding mistakes show."""
    input_gradient: float | None = None
    weight_gradient: float | None = None
    library: float | None = None
    """The library's own output error on the same inputs."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Top-1 accuracy of one training on one task."""

    task: str
    seed: int
    top1: float
    chance: float
    examples: int
    """Test clips behind `top1`."""
    train_s: float
    conditions: Mapping[str, float] = field(default_factory=dict)
    """Top-1 on altered test clips: shuffled, reversed, frozen."""
    top5: float | None = None
    """None of a task of five classes or fewer."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device itself reached beside this point: a matrix product and a copy of the point's footprint."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What a GPU said of itself between samples, at most every few hundredths of a second; None where it cannot."""

    readings: int
    sm_clock_hz: float | None = None
    """Median; the lowest and the highest beside it."""
    sm_clock_low_hz: float | None = None
    sm_clock_high_hz: float | None = None
    power_w: float | None = None
    """Median; NVML's own figure, on many GPUs the mean of the last second."""
    temperature_c: float | None = None
    """The highest."""
    clock_limits: Mapping[str, int] = field(default_factory=dict)
    """What held the clock down, by the number of readings that said so."""
    other_processes: int | None = None
    """Processes besides this one and its like that have a context on the GPU."""
    idle_power_w: float | None = None
    """With a context and no work; subtracted from `energy_j`."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One point in one round (a fresh process that takes every point once)."""

    point: Point
    round: int
    status: Status
    reason: str = ""
    samples_s: Sequence[float] = ()
    """Seconds per call: device time on a device, else host time. In `stream` mode per frame."""
    host_samples_s: Sequence[float] = ()
    """Host seconds per call, where device time was taken as well."""
    calls_per_sample: int = 1
    """Calls that one sample is the mean of: very short calls are timed several at a time."""
    cold_start_s: float | None = None
    """The first call, with compilation and autotuning."""
    stop: str = ""
    """Why sampling ended: converged, budget, or a fixed count."""
    memory: Memory | None = None
    counts: Counts | None = None
    params: int | None = None
    bytes_moved: int | None = None
    error: Error | None = None
    accuracy: Accuracy | None = None
    ceilings: Ceilings | None = None
    energy_j: float | None = None
    """Of one call, above idling."""
    device_state: DeviceState | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    """What one call runs, by how often: operators that do work (CPU), kernels (CUDA)."""
    registers: int | None = None
    """The most registers per thread of any Triton kernel that ran."""
    spills: int | None = None
    """Registers per thread that had no place, of all Triton kernels that ran together."""
    trust: Trust = "good"
    trust_reasons: tuple[str, ...] = ()
    wall_s: float | None = None
    """What the point cost in all, checks included."""
    overhead_s: float | None = None
    """The part of `wall_s` that is neither checking, counting, allocating, warming up nor sampling."""

    @property
    def median_s(self) -> float | None:
        """The median of the samples; None without samples."""
        return statistics.median(self.samples_s) if len(self.samples_s) else None


class KnownCosts:
    """What the points measured so far cost: counted once for all implementations, layouts, regimes and rounds."""

    def __init__(self) -> None:
        self._by_case: dict[str, Cost] = {}

    def of(self, point: Point) -> Cost | None:
        """The cost of a point's case; None where it is to be counted."""
        return self._by_case.get(_case_key(point))

    def learn(self, measured: Measurement) -> None:
        """Keeps what a measurement that went well has counted."""
        if measured.status == "ok" and measured.accuracy is None:
            cost = Cost(measured.counts, measured.params, measured.bytes_moved)
            self._by_case.setdefault(_case_key(measured.point), cost)


def _case_key(point: Point) -> str:
    return replace(point, implementation="", memory_format="", regime="").key


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and the software; two environments with one `identity` may share a run."""

    machine: str
    """A name for this kind of machine: processor or GPU, and core count."""
    cpu: str = ""
    cores: int = 0
    threads: int = 0
    memory_bytes: int = 0
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    torch: str = ""
    triton: str | None = None
    python: str = ""
    platform: str = ""
    vidbench: str = ""
    git_commit: str | None = None
    git_dirty: bool | None = None
    clocks: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    flops_per_s: Mapping[str, float] = field(default_factory=dict)
    """Measured ceiling of products, by `device/dtype`."""
    bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """Measured ceiling of a copy, by `device/footprint in bytes`."""

    @property
    def identity(self) -> tuple[str | None, ...]:
        """What must agree before measurements may be joined into one run."""
        return (
            self.machine, str(self.threads), self.driver, self.cudnn,
            self.python, self.torch, self.triton, self.git_commit,
        )  # fmt: skip
