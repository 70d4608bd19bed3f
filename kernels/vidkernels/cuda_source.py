"""CUDA C++ kernels: compiled by NVRTC to cubins that are kept on disk, and launched on torch's stream.

No CUDA toolkit is needed on the user's machine: NVRTC comes with cuda-core, the headers with Triton. Compiling needs
neither a driver nor a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidkernels.launch import Launch, gpu_of, note, pretended

ROOT = Path(__file__).parent
_DEFAULT_SHARED_BYTES = 48 * 1024


def cuda(
    kernel: str,
    grid: tuple[int, int, int],
    *args: Any,
    block: int,
    cluster: int = 1,
    shared_bytes: int = 0,
    **macros: int | str,
) -> None:
    """Launches a CUDA C++ kernel on the device of its tensors, and returns at once.

    Args:
        kernel: `file.cu:entry`, the file below vidkernels, the entry an `extern "C" __global__` function.
        grid: Blocks along each axis; none are launched where one is 0.
        args: Tensors (or None for a null pointer), and numbers as ctypes values of the parameters' types.
        block: Threads of a block.
        cluster: Blocks of a cluster, along the first axis.
        shared_bytes: Dynamic shared memory of a block.
        macros: Compile-time constants: `-Dname=value`.
    """
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    if pretended(tensor):
        options = {"block": block, "cluster": cluster, "shared_bytes": shared_bytes}
        note(Launch("cuda", kernel, args, macros, options))
        return
    if 0 in grid:
        return
    device = tensor.device.index or 0
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # the primary context exists from here on
        function = _function(kernel, tuple(sorted(macros.items())), gpu_of(tensor).capability, device, shared_bytes)
        _launch(function, grid, block, cluster, shared_bytes, args)


def compile_source(kernel: str, macros: Mapping[str, int | str], capability: int) -> bytes:
    """The cubin of a kernel for a compute capability (90 for 9.0), from the cache where it lies there.

    Raises:
        RuntimeError: NVRTC's messages, where it does not compile.
    """
    name, _, entry = kernel.partition(":")
    source = (ROOT / name).read_text()
    version = _nvrtc_version()
    key = hashlib.sha256(repr((source, entry, sorted(macros.items()), capability, version)).encode()).hexdigest()
    path = cache_folder() / f"{entry}-sm_{capability}-{key[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = _compile(source, name, macros, capability)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes may be compiling the same: each writes a file of its own, and the last one stays.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(cubin)
    os.replace(file.name, path)
    return cubin


def cache_folder() -> Path:
    """Where cubins are kept: VIDKERNELS_CACHE, or vidkernels below the user's cache folder."""
    if folder := os.environ.get("VIDKERNELS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidkernels"


def _compile(source: str, name: str, macros: Mapping[str, int | str], capability: int) -> bytes:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=name,
        arch=f"sm_{capability}",
        std="c++17",
        include_path=[str(headers()), str((ROOT / name).parent), str(ROOT)],
        define_macro=[(macro, str(value)) for macro, value in sorted(macros.items())],
    )
    try:
        code = Program(source, "c++", options).compile("cubin").code
    except Exception as error:
        raise RuntimeError(f"{name} does not compile for sm_{capability} with {dict(macros)}:\n{error}") from error
    return bytes(code)


def headers() -> Path:
    """The folder of cuda_bf16.h and its like, which Triton's package holds."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise RuntimeError("CUDA kernels take cuda_bf16.h from triton's package: pip install triton")
    return Path(spec.origin).parent / "backends" / "nvidia" / "include"


@cache
def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if error.value:
        raise RuntimeError(f"NVRTC does not answer: {error}")
    return major, minor


@cache
def _function(
    kernel: str, macros: tuple[tuple[str, int | str], ...], capability: int, device: int, shared_bytes: int
) -> Any:
    """A kernel loaded into a device's primary context."""
    from cuda.bindings import driver

    cubin = compile_source(kernel, dict(macros), capability)
    module = _checked(driver.cuModuleLoadData(cubin))
    function = _checked(driver.cuModuleGetFunction(module, kernel.partition(":")[2].encode()))
    if shared_bytes > _DEFAULT_SHARED_BYTES:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def _launch(
    function: Any, grid: tuple[int, int, int], block: int, cluster: int, shared_bytes: int, args: tuple[Any, ...]
) -> None:
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
        config.attrs, config.numAttrs = [attribute], 1
    else:
        config.numAttrs = 0
    pairs = [_parameter(arg) for arg in args]
    parameters = (tuple(value for value, _ in pairs), tuple(kind for _, kind in pairs))
    _checked(driver.cuLaunchKernelEx(config, function, parameters, 0))


def _parameter(arg: Any) -> tuple[Any, Any]:
    if arg is None:
        return 0, ctypes.c_void_p
    if isinstance(arg, Tensor):
        return arg.data_ptr(), ctypes.c_void_p
    return arg.value, type(arg)


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a driver call.

    Raises:
        RuntimeError: The call failed.
    """
    from cuda.bindings import driver

    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA driver: {error.name}")
    return values[0] if values else None
