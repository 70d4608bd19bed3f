"""What the GPU says of itself while it is measured: clocks, power, temperature, who else is on it, energy.

Read through nvidia-ml-py (the `gpu` extra) without privileges. Where that, the GPU or one of the figures is missing, so
is what would have come of it: nothing here is an error.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch

from vidbench.records import DeviceState

EVERY_S = 0.05
"""Between two readings at least: they take a part of a millisecond, and the GPU rests meanwhile."""

CLOCK_LIMITS = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
}
"""Bits of NVML's clocks event reasons; idling, and clocks that the user or the display set, are left out."""

_SM_CLOCK = 1
_GPU_TEMPERATURE = 0

ENERGY_WINDOW_S = 0.6
ENERGY_TICKS = 5
"""The counter moves every 20 to 100 ms; work is counted from one of its ticks to another, of at least so many."""

SETTLING_S = 0.3
"""Power falls for some tenths of a second after work has ended."""


@dataclass(frozen=True)
class Settings:
    """How a GPU is set up; None where it does not tell."""

    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    persistent: bool | None = None
    """Whether the driver stays loaded between processes."""
    sliced: bool = False
    """Whether it is a part of a GPU (MIG)."""


class Watch:
    """Reads one GPU: `look` between samples, then `state`, and `energy` of further work.

    Args:
        nvml: The module `pynvml`.
        handle: Its handle of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._next = -1.0
        self._readings = 0
        self._others: list[int] = []
        self._clocks: list[float] = []
        self._powers: list[float] = []
        self._temperatures: list[float] = []
        self._limits: dict[str, int] = {}
        self.idle_w: float | None = None
        """Known once `energy` has been asked."""

    def _ask(self, name: str, *arguments: Any) -> Any:
        """NVML's answer; None where this GPU, driver or release of pynvml has none."""
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except (AttributeError, self._nvml.NVMLError):
            return None

    def look(self) -> None:
        """Takes a reading, unless the last is hardly over."""
        if time.monotonic() >= self._next:
            if not self._readings:
                self._count_others()
            self._read()
            self._next = time.monotonic() + EVERY_S

    def _read(self) -> None:
        self._readings += 1
        for kept, name, arguments, unit in (
            (self._clocks, "nvmlDeviceGetClockInfo", (_SM_CLOCK,), 1e6),
            (self._powers, "nvmlDeviceGetPowerUsage", (), 1e-3),
            (self._temperatures, "nvmlDeviceGetTemperature", (_GPU_TEMPERATURE,), 1.0),
        ):
            if (value := self._ask(name, *arguments)) is not None:
                kept.append(value * unit)
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0  # its name before driver 535
        for bit, name in CLOCK_LIMITS.items():
            if reasons & bit:
                self._limits[name] = self._limits.get(name, 0) + 1

    def _count_others(self) -> None:
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses")
        if processes is not None:
            self._others.append(_others([process.pid for process in processes]))

    def state(self) -> DeviceState:
        """All readings since the first look, and a last one."""
        self._read()
        self._count_others()
        clocks = self._clocks
        return DeviceState(
            readings=self._readings,
            sm_clock_hz=statistics.median(clocks) if clocks else None,
            sm_clock_low_hz=min(clocks, default=None),
            sm_clock_high_hz=max(clocks, default=None),
            power_w=statistics.median(self._powers) if self._powers else None,
            temperature_c=max(self._temperatures, default=None),
            clock_limits=self._limits,
            other_processes=max(self._others, default=None),
        )

    def settings(self) -> Settings:
        """How the GPU is set up."""
        limit, default = (
            None if (milliwatts := self._ask(name)) is None else milliwatts * 1e-3
            for name in ("nvmlDeviceGetPowerManagementLimit", "nvmlDeviceGetPowerManagementDefaultLimit")
        )
        persistent = self._ask("nvmlDeviceGetPersistenceMode")
        return Settings(
            limit,
            default,
            persistent=None if persistent is None else bool(persistent),
            sliced=bool(self._ask("nvmlDeviceIsMigDeviceHandle")),
        )

    def energy(self, work: Callable[[], object], calls: int) -> float | None:
        """Joules of one call above idling; None where the counter is missing or too slow.

        Args:
            work: Makes `calls` calls and waits for them; some hundredths of a second at most.
            calls: How many.
        """
        busy = self._between_ticks(work)
        if busy is None:
            return None
        time.sleep(SETTLING_S)
        idle = self._between_ticks(lambda: time.sleep(0.005))
        if idle is None:
            return None
        self.idle_w = idle[0] / idle[1]
        joules, seconds, blocks = busy
        return (joules - self.idle_w * seconds) / (blocks * calls)

    def _between_ticks(self, work: Callable[[], object]) -> tuple[float, float, int] | None:
        """Joules, seconds and pieces of work between the first and the last tick of the counter."""
        if (seen := self._ask("nvmlDeviceGetTotalEnergyConsumption")) is None:
            return None
        ticks: list[tuple[float, float, int]] = []
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < ENERGY_WINDOW_S:
            work()
            done += 1
            counter = self._ask("nvmlDeviceGetTotalEnergyConsumption")
            if counter is None:
                return None
            if counter != seen:
                seen = counter
                ticks.append((counter * 1e-3, time.perf_counter(), done))
        if len(ticks) < ENERGY_TICKS:
            return None
        joules, seconds, blocks = (last - first for first, last in zip(ticks[0], ticks[-1], strict=True))
        return joules, seconds, int(blocks)


def watch(device: str) -> Watch | None:
    """A Watch of torch's current device; None on a CPU, and where NVML is missing or does not know the GPU.

    To be called in the process that measures: a handle does not outlive a fork.
    """
    if device != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    # By the UUID, since NVML numbers all GPUs and torch those that CUDA_VISIBLE_DEVICES leaves.
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    handle = _handle(nvml, uuid, os.getpid())
    return None if handle is None else Watch(nvml, handle)


@cache
def _handle(nvml: Any, uuid: str, _process: int) -> Any:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    for name in (uuid, f"GPU-{uuid}", f"MIG-{uuid}"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:
            continue
    return None


def _others(pids: list[int]) -> int:
    """How many of the processes on a GPU are neither this one nor a worker of the same engine, which waits meanwhile.

    A container may have process numbers of its own, in which NVML's mean nothing: then this process is one of those
    listed, whichever.
    """
    if os.getpid() not in pids:
        return max(0, len(pids) - 1)
    return sum(pid != os.getpid() and not _is_sibling(pid) for pid in pids)


def _is_sibling(pid: int) -> bool:
    """Whether another process is a worker whose server has the same parent as ours."""
    try:
        own, other = psutil.Process().parent(), psutil.Process(pid).parent()
        return (
            own is not None
            and other is not None
            and own.ppid() == other.ppid()
            and all("vidbench.worker" in server.cmdline() for server in (own, other))
        )
    except psutil.Error:
        return False
