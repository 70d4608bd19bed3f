"""The machine, the software and the device's own ceilings, as an Environment."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import psutil
import torch

import vidbench
from vidbench.records import Ceilings, Environment
from vidbench.sweep import RequestError
from vidkernels.op import DTYPES

COPY_FOOTPRINTS = tuple(2**power for power in (16, 20, 23, 26, 28))
"""Bytes read and written by the copies whose rates are the ceilings: from a cache's to the memory's."""


def describe(device: str, dtypes: Iterable[str]) -> Environment:
    """This machine with its ceilings on a device, for these dtypes.

    Raises:
        RequestError: The device is not there.
    """
    cuda = device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise RequestError("device 'cuda' is not there: torch sees no CUDA device; use --device cpu")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device()) if cuda else None
    cpu, cores = _cpu_name(), len(os.sched_getaffinity(0))
    gpu = properties.name if properties else None
    commit, dirty = _git()
    cudnn = torch.backends.cudnn.version() if cuda else None
    environment = Environment(
        machine=gpu or f"{cpu} × {cores}",
        cpu=cpu,
        cores=cores,
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        gpu=gpu,
        driver=_driver() if cuda else None,
        cuda=torch.version.cuda if cuda else None,
        cudnn=str(cudnn) if cudnn else None,
        torch=str(torch.__version__),
        triton=version("triton"),
        python=platform.python_version(),
        platform=platform.platform(),
        vidbench=vidbench.__version__,
        git_commit=commit,
        git_dirty=dirty,
        clocks=_clocks(),
        flags=_flags(),
    )
    return replace(
        environment,
        flops_per_s={f"{device}/{dtype}": product_ceiling(device, dtype) for dtype in dtypes},
        bytes_per_s={f"{device}/{size}": copy_ceiling(device, size) for size in COPY_FOOTPRINTS},
    )


def ceilings(environment: Environment, device: str, dtype: str, footprint: int | None, *, cold: bool) -> Ceilings:
    """The ceilings for a point: its dtype's product, and the best copy of its footprint or a larger one.

    A working set that stays in a cache between calls may exceed the memory's rate, so a hot point is held against
    copies of its own size. A cold one, and a whole model, whose footprint is not known, against the largest copy.
    """
    rates = {int(key.split("/")[1]): rate for key, rate in environment.bytes_per_s.items() if key.startswith(device)}
    largest = max(rates)
    within = largest if cold or footprint is None else max((size for size in rates if size <= footprint), default=0)
    copy_rate = max(rate for size, rate in rates.items() if size >= within)
    return Ceilings(environment.flops_per_s[f"{device}/{dtype}"], copy_rate)


def raise_ceilings(environment: Environment, device: str, dtype: str) -> None:
    """Measures the ceilings once more, for longer, and keeps the higher rates in the environment of this process."""
    flops, copies = dict(environment.flops_per_s), dict(environment.bytes_per_s)
    flops[f"{device}/{dtype}"] = max(flops[f"{device}/{dtype}"], product_ceiling(device, dtype, seconds=1.0))
    for key, rate in copies.items():
        copies[key] = max(rate, copy_ceiling(device, int(key.split("/")[1]), seconds=0.2))
    object.__setattr__(environment, "flops_per_s", flops)
    object.__setattr__(environment, "bytes_per_s", copies)


def product_ceiling(device: str, dtype: str, seconds: float = 0.5) -> float:
    """The best rate of products on noise, FLOP/s: a square matrix product, on a CPU a dense convolution as well.

    On a CPU the two come from different libraries, and oneDNN's convolution has been seen 30 % above MKL's product.
    """
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    with precision(dtype), torch.inference_mode():
        best = 2 * size**3 / _best(lambda: torch.mm(a, b), device, seconds)
        if device == "cuda":
            return best
        x, weight = torch.randn(2, 64, 4, 56, 56).to(DTYPES[dtype]), torch.randn(64, 64, 3, 3, 3).to(DTYPES[dtype])
        x, weight = (tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (x, weight))
        flops = 2 * x.numel() * 64 * 27
        return max(best, flops / _best(lambda: torch.conv3d(x, weight, padding=1), device, seconds))


def copy_ceiling(device: str, footprint: int, seconds: float = 0.1) -> float:
    """The best rate of a copy that reads and writes `footprint` bytes in all, bytes/s."""
    source = torch.randn(footprint // 8, device=device)
    target = torch.empty_like(source)
    return footprint / _best(lambda: target.copy_(source), device, seconds)


def _best(call: Callable[[], object], device: str, seconds: float) -> float:
    """The shortest time of a call, in blocks of about a millisecond, within a budget."""
    timed = _device_seconds if device == "cuda" else _host_seconds
    timed(call, 1)
    calls = max(1, math.ceil(1e-3 / max(timed(call, 1), 1e-6)))
    end = time.perf_counter() + seconds
    best = timed(call, calls)
    while time.perf_counter() < end:
        best = min(best, timed(call, calls))
    return best


def _host_seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _device_seconds(call: Callable[[], object], calls: int) -> float:
    """Device time of calls that are enqueued while the stream is held back: launching is not part of a ceiling."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000 + 20_000 * calls)  # a millisecond, and ten microseconds a launch
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


class precision:
    """Sets the backends' switches and puts them back: fp32 means no TF32 anywhere, and cuDNN picks its best kernel."""

    def __init__(self, dtype: str) -> None:
        self.allow = dtype == "tf32"

    def __enter__(self) -> None:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        self.before = (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark)
        cudnn.benchmark = True  # a baseline is the best that a user could pick
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.allow

    def __exit__(self, *_: object) -> None:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = self.before


def cache_bytes(device: str) -> int:
    """Size of the last cache before memory: L2 of a GPU, the largest of a CPU's; 32 MiB where nothing tells."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    sizes = [
        int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1] in "KM"
    ]
    return max(sizes, default=2**25)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The driver's version, from the kernel module."""
    module = Path("/sys/module/nvidia/version")
    return module.read_text().strip() if module.exists() else None


def sources(checkout: Path | None = None) -> str:
    """A digest of vidbench and vidkernels as they are installed, or lie in a checkout."""
    found = hashlib.sha256()
    for package, place in (("vidbench", "vidbench"), ("vidkernels", "kernels/vidkernels")):
        spec = importlib.util.find_spec(package)
        installed = map(Path, spec.submodule_search_locations or ()) if spec else ()
        for root in installed if checkout is None else (checkout / place,):
            for path in sorted(root.rglob("*")):
                if path.suffix in (".py", ".cu", ".json"):
                    found.update(f"{package}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def _git() -> tuple[str | None, bool | None]:
    """Commit and dirtiness of the checkout that holds this package, else of the working directory's."""
    for folder in (Path(__file__).parent, Path.cwd()):
        try:
            commit = _run_git(folder, "rev-parse", "HEAD")
            return commit, bool(_run_git(folder, "status", "--porcelain", "--untracked-files=no"))
        except (OSError, subprocess.CalledProcessError):
            continue
    return None, None


def _run_git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ("git", "-C", str(folder), *arguments), check=True, capture_output=True, text=True, timeout=30
    ).stdout.strip()


def _clocks() -> dict[str, float]:
    """Clock frequencies as far as they can be read without privileges, Hz."""
    clocks: dict[str, float] = {}
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    if frequency:
        clocks["cpu"] = frequency.current * 1e6
        if frequency.max:
            clocks["cpu_max"] = frequency.max * 1e6
    return clocks


def _flags() -> Mapping[str, str]:
    """Settings that move times."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS", "TRITON_INTERPRET")
    flags = {name: os.environ[name] for name in names if name in os.environ}
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists():
        flags["cpu_governor"] = governor.read_text().strip()
    flags["onednn"] = str(torch.backends.mkldnn.is_available()).lower()
    return flags
