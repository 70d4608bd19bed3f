"""Part `environment`: the machine, its versions, its clocks, and the ceilings that results are held against."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import shutil
import subprocess
from typing import Any

from bench.gpu.pool import Emit, Unit

PACKAGES = ("torch", "triton", "numpy", "cuda-core", "cuda-bindings", "nvidia-ml-py", "pytest", "pytest-xdist")
COMMANDS = (
    ("nvidia-smi",),
    ("nvidia-smi", "-q", "-d", "CLOCK,POWER,TEMPERATURE,PERFORMANCE"),
    ("nvcc", "--version"),
    ("compute-sanitizer", "--version"),
    ("ncu", "--version"),
)


def describe(unit: Unit, emit: Emit) -> None:
    """One row: what vidbench records of a machine, and what the vendor's tools say."""
    from vidbench import environment

    found = environment.describe(unit.values["device"], unit.values["dtypes"])
    said = {" ".join(command): _output(command) for command in COMMANDS if shutil.which(command[0])}
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    row = {"environment": dataclasses.asdict(found), "said": said, "packages": versions, "state": state()}
    emit({"status": "ok", "reason": "", **row})


def _output(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()[:6000]


def state() -> dict[str, Any]:
    """Clocks, power, temperature and throttle reasons of the first GPU now; empty where NVML does not answer."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "sm_hz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1e6,
            "memory_hz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM) * 1e6,
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            "processes": len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
    except pynvml.NVMLError:
        return {}
