"""What this machine can measure, how well, and what would make it better: facts, judged, each with a remedy.

A remedy that needs no root comes first. Noise is not guessed: `noise` measures the same code against itself.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
import torch

from vidbench.environment import cache_bytes, version
from vidbench.gate import WANTED_ROUNDS
from vidbench.noise import Noise, noise, tells
from vidbench.nvml import Settings, watch
from vidbench.records import DeviceState, Trust
from vidbench.sweep import RequestError
from vidbench.timing import clock_step_s
from vidbench.trust import HARD_LIMITS, SOFT_LIMITS

Topic = Literal["software", "processor", "memory", "GPU", "noise"]

EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "video": (("av",), "video files"),
    "flow": (("cv2",), "optical flow from video"),
    "svm": (("sklearn",), "a linear SVM on pooled descriptors"),
    "gpu": (("pynvml", "cuda.core"), "a GPU's clocks, power and energy, and the kernels in CUDA C++"),
    "ray": (("ray",), "sweeps on a cluster"),
}
"""By extra: what it imports, and what it is for."""

SLOWING: Mapping[str, str] = {
    "TRITON_INTERPRET": "Triton's kernels are interpreted, thousands of times slower",
    "CUDA_LAUNCH_BLOCKING": "every launch waits for the one before",
    "NVIDIA_TF32_OVERRIDE": "0 makes fp32 of what is called TF32, 1 TF32 of what is called fp32",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is allocated by the driver",
    "TORCH_COMPILE_DISABLE": "the implementation `compiled` is not compiled",
}
"""Variables of the environment that change what is measured, where they are set to anything but 0."""

SLOWING_AT_0 = ("NVIDIA_TF32_OVERRIDE",)
"""Of these, those that 0 does not switch off."""

BUSY = 0.1
"""Processors that others may use, of those that this process needs, before they are felt."""

CROWDED = 0.25
"""Of all processors: others who use more take memory bandwidth and clocks, whichever processors they are on."""

LEAST_MEMORY = 2 * 2**30
HOT_C = 80.0
COARSE_CLOCK_S = 1e-6


@dataclass(frozen=True)
class Finding:
    """One thing that bears on what is measured here."""

    topic: Topic
    name: str
    level: Trust
    """good: as it should be, or a plain fact; fair: numbers are worth less; poor: they may be wrong."""
    found: str
    remedy: str = ""


# --- software ---------------------------------------------------------------------------------------------------------


def software(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Versions, optional parts, compilers, and variables that change what is measured."""
    triton = version("triton")
    found = f"Python {platform.python_version()}, torch {torch.__version__}, Triton {triton or 'none'}"
    wanted = _wanted_triton()
    if wanted and triton and wanted != triton:
        yield Finding(
            "software", "versions", "fair", f"{found}; this torch was built for Triton {wanted}",
            f"pip install triton=={wanted}",
        )  # fmt: skip
    else:
        yield Finding("software", "versions", "good", found)
    absent = {name: use for name, (modules, use) in EXTRAS.items() if not all(map(_importable, modules))}
    if absent:
        yield Finding(
            "software", "optional parts", "good",
            "not installed: " + "; ".join(f"{name} ({use})" for name, use in absent.items()),
            f'pip install "vidbench[{",".join(absent)}]" installs them, if you need them',
        )  # fmt: skip
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        yield Finding(
            "software", "C++ compiler", "fair", "none: `compiled` cannot run on the CPU",
            "a compiler from conda-forge (`conda install cxx-compiler`) needs no root; else apt-get install g++",
        )  # fmt: skip
    if shutil.which("git") is None:
        yield Finding(
            "software", "git", "fair", "none: runs do not know their revision, and `vidbench gate` cannot work",
            "conda install git, or apt-get install git",
        )  # fmt: skip
    for name, effect in SLOWING.items():
        if environ.get(name, "") not in ("", *(() if name in SLOWING_AT_0 else ("0",))):
            yield Finding("software", name, "poor", f"{name}={environ[name]}: {effect}", f"unset {name}")


def _wanted_triton() -> str | None:
    """The one release of Triton that this torch asks for; None where it leaves it open."""
    for requirement in metadata.requires("torch") or ():
        if exact := re.match(r"triton\s*==\s*([\w.+]+)", requirement):
            return exact[1]
    return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


# --- processor and memory ---------------------------------------------------------------------------------------------


def processor(root: Path = Path("/"), threads: int | None = None) -> Iterator[Finding]:
    """Cores, limits of a container, threads, clocks, and whether the machine is a virtual one.

    Args:
        root: Where /proc and /sys are.
        threads: That torch computes with; None asks it.
    """
    threads = torch.get_num_threads() if threads is None else threads
    cores = len(_allowed())
    info = _read(root / "proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    of = f"{cores} of {psutil.cpu_count() or cores} processors, {threads} threads"
    yield Finding("processor", "processor", "good", f"{name[1] if name else platform.machine()}: {of}")
    quota = _quota(root)
    if quota is not None and quota < min(cores, threads):
        fewer = f"OMP_NUM_THREADS={math.floor(quota)} vidbench …, or " if quota >= 1 else ""
        yield Finding(
            "processor", "container", "poor",
            f"the container may use {quota:g} of {cores} processors: {threads} threads are stopped in the middle of a "
            "call",
            f"{fewer}start the container with --cpuset-cpus instead of --cpus",
        )  # fmt: skip
    if threads > cores:
        yield Finding(
            "processor", "threads", "poor", f"{threads} threads on {cores} processors wait for one another",
            f"OMP_NUM_THREADS={cores} vidbench …",
        )  # fmt: skip
    yield from _clocks(root)
    if re.search(r"^flags\s*:.*\bhypervisor\b", info, re.MULTILINE):
        yield Finding(
            "processor", "virtual machine", "fair", "its host decides about clocks, and may give processors to others",
            "compare within one job: `vidbench gate` takes both revisions in turn; sweep with --rounds 5 or more",
        )  # fmt: skip
    nodes = len(list((root / "sys/devices/system/node").glob("node[0-9]*")))
    if nodes > 1:
        yield Finding(
            "processor", "NUMA", "fair", f"{nodes} nodes: memory may be near in one process and far in the next",
            "numactl --cpunodebind=0 --membind=0 vidbench …",
        )  # fmt: skip
    if (step := clock_step_s()) > COARSE_CLOCK_S:
        yield Finding(
            "processor", "clock", "poor", f"it moves in steps of {step:.2g} s: short calls cannot be timed one by one",
            "use the hot regime, whose samples hold several calls",
        )  # fmt: skip


def _allowed() -> set[int]:
    """The processors that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _clocks(root: Path) -> Iterator[Finding]:
    cpu = root / "sys/devices/system/cpu"
    governors = {_read(path) for path in cpu.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""}
    if governors - {"performance"}:
        yield Finding(
            "processor", "governor", "fair", f"{', '.join(sorted(governors))}: the clock follows the load",
            "several rounds average it; with root: cpupower frequency-set -g performance",
        )  # fmt: skip
    no_turbo, boost = _read(cpu / "intel_pstate/no_turbo"), _read(cpu / "cpufreq/boost")
    if no_turbo == "0" or boost == "1":
        yield Finding(
            "processor", "turbo", "fair", "on: the clock follows temperature and how many cores are busy",
            "several rounds average it; with root: "
            + (f"echo 1 > /{(cpu / 'intel_pstate/no_turbo').relative_to(root)}" if no_turbo == "0" else
               f"echo 0 > /{(cpu / 'cpufreq/boost').relative_to(root)}"),
        )  # fmt: skip


def _quota(root: Path) -> float | None:
    """Processors that a container may use at once; None where nothing limits it."""
    words = _read(root / "sys/fs/cgroup/cpu.max").split()  # cgroup v2
    if len(words) == 2 and words[0] != "max":
        return int(words[0]) / int(words[1])
    quota, period = (_read(root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _read(path: Path) -> str:
    """A file of the kernel's; empty where it is not there."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def memory(root: Path = Path("/"), available: int | None = None) -> Iterator[Finding]:
    """How much there is, what of it is free, and a container's limit."""
    ram = psutil.virtual_memory()
    total, free = ram.total, ram.available if available is None else available
    limit, used = _container_memory(root)
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - used))
    found = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, last cache {cache_bytes('cpu') / 2**20:.0f} MiB"
    if free < LEAST_MEMORY:
        yield Finding(
            "memory", "memory", "fair", f"{found}: large points will be killed, each with a row that says so",
            "end what else runs here, or lower batch_size and clip_length",
        )  # fmt: skip
    else:
        yield Finding("memory", "memory", "good", found)


def _container_memory(root: Path) -> tuple[int | None, int]:
    """A container's limit, None where there is none, and what it uses besides files that the kernel would let go."""
    v2, v1 = root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"
    for limit_at, used_at, stat_at, cached in (
        (v2 / "memory.max", v2 / "memory.current", v2 / "memory.stat", "inactive_file"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes", v1 / "memory.stat", "total_inactive_file"),
    ):
        if (limit := _read(limit_at)).isdigit():
            files = re.search(rf"^{cached} (\d+)$", _read(stat_at), re.MULTILINE)
            return int(limit), max(0, int(_read(used_at) or 0) - (int(files[1]) if files else 0))
    return None, 0


@dataclass(frozen=True)
class Load:
    """What others do with the processors while nothing is measured."""

    processors: float
    """In use, of those that this process may use."""
    names: tuple[str, ...] = ()
    """Of the busiest processes."""


def load(seconds: float = 1.0) -> Load:
    """Watches the other processes for a moment."""
    mine = {os.getpid(), os.getppid()}
    processes = [one for one in psutil.process_iter() if one.pid not in mine]
    for one in processes:
        _percent(one)
    percents = psutil.cpu_percent(interval=seconds, percpu=True)
    used = sorted(((_percent(one) / 100, one) for one in processes), key=lambda pair: pair[0], reverse=True)
    names = tuple(f"{_name(one)} ({busy:.0%})" for busy, one in used[:3] if busy > BUSY / 2)
    return Load(sum(percent for number, percent in enumerate(percents) if number in _allowed()) / 100, names)


def _percent(process: psutil.Process) -> float:
    try:
        return float(process.cpu_percent())
    except psutil.Error:
        return 0.0


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return f"process {process.pid}"


def others(found: Load, threads: int | None = None) -> Iterator[Finding]:
    """Whether anybody else is at work, where it is felt.

    Args:
        found: What they use.
        threads: That torch computes with; None asks it. What these leave free is the others' without harm.
    """
    threads = torch.get_num_threads() if threads is None else threads
    cores = len(_allowed())
    felt = found.processors - max(0, cores - threads)
    if felt > BUSY or found.processors > CROWDED * cores:
        who = f": {', '.join(found.names)}" if found.names else ", in no process that is seen from here"
        yield Finding(
            "processor", "others at work", "poor" if felt >= 5 * BUSY else "fair",
            f"others use {found.processors:.1f} of {cores} processors{who}", "end them, or measure when they are done",
        )  # fmt: skip


# --- GPU --------------------------------------------------------------------------------------------------------------


def gpu(root: Path = Path("/")) -> Iterator[Finding]:
    """The GPU that torch would use: what it is, what holds it back, and who else is on it."""
    if not torch.cuda.is_available():
        yield _no_gpu(root)
        return
    try:
        # With a context this process is among those that NVML lists, so that it is known which of them are others.
        torch.empty(1, device="cuda")
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    except RuntimeError as problem:
        yield Finding(
            "GPU", "GPU", "poor", f"torch cannot use it: {_first_line(problem)}",
            "see nvidia-smi for who has it, its memory and its compute mode; or another: CUDA_VISIBLE_DEVICES=1",
        )  # fmt: skip
        return
    yield Finding(
        "GPU", "GPU", "good",
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    )  # fmt: skip
    watched = watch("cuda")
    untold = "clocks, power, throttling and other processes are not told"
    if watched is not None:
        watched.look()
        yield from gpu_state(watched.state())
        yield from gpu_settings(watched.settings())
    elif _importable("pynvml"):
        yield Finding(
            "GPU", "state", "fair", f"{untold}: NVML does not start, or does not know this GPU",
            "see whether nvidia-smi lists it; a container needs the driver's libnvidia-ml.so.1",
        )  # fmt: skip
    else:
        yield Finding("GPU", "state", "fair", f"{untold}: no nvidia-ml-py", 'pip install "vidbench[gpu]"')
    if shutil.which("ncu") is None:
        yield Finding(
            "GPU", "counters", "good", "no ncu: `vidbench profile` tells times, not what bounds a kernel",
            "Nsight Compute can be unpacked without root",
        )  # fmt: skip
    elif "RmProfilingAdminOnly: 1" in _read(root / "proc/driver/nvidia/params"):
        yield Finding(
            "GPU", "counters", "good", "the driver keeps its counters for root: ncu will not see them",
            "with root: options nvidia NVreg_RestrictProfilingToAdminUsers=0 in /etc/modprobe.d",
        )  # fmt: skip


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)


def _no_gpu(root: Path) -> Finding:
    """Why there is none."""
    driver = (root / "proc/driver/nvidia/version").exists()
    if driver and torch.version.cuda is None:
        return Finding(
            "GPU", "GPU", "fair", f"there is a driver, but torch {torch.__version__} was built without CUDA",
            "install torch's CUDA build: https://pytorch.org/get-started/locally",
        )  # fmt: skip
    if driver:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else "the driver may be older than its CUDA"
        return Finding("GPU", "GPU", "fair", f"there is a driver, but torch sees no GPU: {why}", "see nvidia-smi")
    return Finding("GPU", "GPU", "good", "none: CUDA points are skipped, with that reason")


COOLING = {"hw_thermal", "sw_thermal"}
"""Limits of the clock that heat brings."""


def gpu_state(state: DeviceState) -> Iterator[Finding]:
    """What holds the GPU back right now, and who else is on it."""
    for limit in (*HARD_LIMITS, *SOFT_LIMITS):
        if state.clock_limits.get(limit):
            yield Finding(
                "GPU", "throttling", "poor" if limit in HARD_LIMITS else "fair",
                f"its clock is held down ({limit})",
                ("let it cool" if limit in COOLING else "ask who runs the machine about its power supply and cooling")
                + ", or use another: CUDA_VISIBLE_DEVICES=1",
            )  # fmt: skip
    if state.temperature_c is not None and state.temperature_c > HOT_C:
        yield Finding(
            "GPU", "temperature", "fair", f"{state.temperature_c:.0f} °C at rest: the clock will fall", "let it cool"
        )
    if state.other_processes:
        count = state.other_processes
        words = "another process has" if count == 1 else f"{count} other processes have"
        yield Finding(
            "GPU", "others", "fair", f"{words} a context on it", "use another: CUDA_VISIBLE_DEVICES=1; see nvidia-smi"
        )


def gpu_settings(of: Settings) -> Iterator[Finding]:
    """Settings that cost speed, or repeatability."""
    if of.power_limit_w and of.default_power_limit_w and of.power_limit_w < 0.99 * of.default_power_limit_w:
        yield Finding(
            "GPU", "power limit", "fair",
            f"{of.power_limit_w:.0f} W instead of {of.default_power_limit_w:.0f} W: slower than others of its name",
            f"say so beside every number; with root: nvidia-smi -pl {of.default_power_limit_w:.0f}",
        )  # fmt: skip
    if of.persistent is False:
        yield Finding(
            "GPU", "persistence", "good", "off: the driver unloads between processes, so cold starts are long",
            "with root: nvidia-smi -pm 1",
        )  # fmt: skip
    if of.sliced:
        yield Finding(
            "GPU", "MIG", "fair", "a slice of a GPU: its neighbours share power and clocks", "measure on a whole GPU"
        )


# --- noise ------------------------------------------------------------------------------------------------------------


def of_noise(found: Noise) -> Iterator[Finding]:
    """What can be told from noise here."""
    worst = max(found.process, found.turn)
    level: Trust = "good" if worst < 0.02 else "fair" if worst < 0.1 else "poor"
    yield Finding(
        "noise", "same code twice", level,
        f"samples of a process differ by {found.sample:.1%}, processes by {found.process:.1%}, "
        f"two processes that take samples in turn by {found.turn:.1%}",
        "" if level == "good" else "measure with --rounds 5 or more, on a machine where nothing else runs",
    )  # fmt: skip
    yield Finding(
        "noise", "what a gate tells", "good",
        f"{WANTED_ROUNDS} rounds of `vidbench gate` find a change of {tells(found, WANTED_ROUNDS):.1%} on one of ten "
        "such points nine times in ten",
    )  # fmt: skip
    if found.steal > 0.02:
        yield Finding(
            "noise", "steal", "fair", f"the hypervisor gave {found.steal:.0%} of the processors to others",
            "measure at another hour, or ask for dedicated processors",
        )  # fmt: skip


def examine(device: str, *, noisy: bool = True) -> list[Finding]:
    """Everything, as `vidbench doctor` has it.

    Args:
        device: What noise is measured on, cpu or cuda.
        noisy: Whether noise is measured; where it cannot be, that is a finding.
    """
    found = [*software(), *processor(), *others(load()), *memory(), *gpu()]
    if noisy:
        try:
            found += of_noise(noise(device))
        except RequestError as why:
            remedy = "see what is said of the GPU" if device == "cuda" else "see what is said above"
            found.append(Finding("noise", "noise", "poor", f"it cannot be measured on {device}: {why}", remedy))
    return found
