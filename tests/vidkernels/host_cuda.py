"""CUDA C++ kernels on a CPU: the same `.cu` file, compiled by g++ and run thread by thread.

    with host_cuda.installed():                  # `cuda_source.cuda` runs here; CPU tensors need no "cuda_core"
        y = cuda_rolling.depthwise_conv3d(x, w)  # fp32, fp16, bf16
    with host_cuda.installed(order="reverse"):   # threads go on last to first: shows barriers that are missing
        ...
    host_cuda.run("depthwise_conv3d/cuda_rolling.cu:forward", grid, x, w, y, block=128, TAPS=3)   # one launch

Modules must call `cuda_source.cuda(...)` through the module, not a copied name. `cuda_on_cpu` is a fixture that does
this for every test of a module that imports it (or of a folder whose conftest does).

What a `.cu` file may use: built-in indices, `__shared__` (static, or `extern T name[]`), barriers, shuffles and votes
of whole warps, `cuda_fp16.h` and `cuda_bf16.h` as far as they have host code (conversions, arithmetic operators), and
what `host_cuda.h` lists. Inline PTX goes under `#ifndef VIDKERNELS_HOST`, with `host_cuda::mma_m16n8k16`,
`cluster_arrive`, `cluster_wait`, `cluster_rank` or `remote_shared` (of dynamic shared memory) in its place.

What is checked on the way: numbers and types of arguments; reads and writes beyond a tensor (16-byte granularity) or
beyond `shared_bytes`; barriers that not all threads reach. Shared memory begins as NaN. What is not: memory order,
alignment, registers, anything asynchronous.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidkernels import cuda_source, op
from vidkernels.launch import pretended

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 17}
"""In which order the threads that may go on do so."""

_HEADER = Path(__file__).parent / "host_cuda.h"
_RUNTIME = Path(__file__).parent / "host_cuda_runtime.cpp"
# NVRTC has it built in; CUDA's headers choose between device and host code with it.
_NV_TARGET = """#pragma once
#define NV_IS_DEVICE 0
#define NV_IF_ELSE_TARGET(condition, there, ...) { __VA_ARGS__ }
"""
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-w")
_EXTERN = re.compile(r"extern\s+__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s*)?([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(r"__shared__\s+([^;={}]+?)(\w+)((?:\s*\[[^\]]*\])*)\s*;")
_LIMITS = {"threads of a block": 1024, "blocks of a cluster": 8, "bytes of shared memory": 232_448}


class _Argument(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("tensor", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("kind", ctypes.c_char),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("shared_bytes", ctypes.c_size_t),
        ("order", ctypes.c_uint),
    )


def why_not() -> str | None:
    """Why kernels cannot be run here; None when they can."""
    compiler = _compiler()
    return None if shutil.which(compiler) else f"needs a CUDA device, or a C++ compiler: {compiler} is not on PATH"


def run(
    kernel: str,
    grid: tuple[int, int, int],
    *args: Any,
    block: int,
    cluster: int = 1,
    shared_bytes: int = 0,
    order: str = "forward",
    **macros: int | str,
) -> None:
    """`cuda_source.cuda` on CPU tensors; waits for the end.

    Raises:
        RuntimeError: It does not compile, or does what a GPU would not let pass; which thread did is told.
    """
    for (what, most), asked in zip(_LIMITS.items(), (block, cluster, shared_bytes), strict=True):
        if asked > most:
            raise RuntimeError(f"{kernel}: {asked} {what}, more than {most}")
    if 0 in grid:
        return
    launch = _library(kernel, tuple(sorted(macros.items())))
    values = [ctypes.c_void_p() if arg is None else arg for arg in args]
    arguments = (_Argument * len(args))(*map(_argument, values))
    how = _Launch((ctypes.c_uint * 3)(*grid), block, cluster, shared_bytes, ORDERS[order])
    error = launch(arguments, len(args), ctypes.byref(how))
    if error:
        raise RuntimeError(f"{kernel} {dict(macros)}: {error.decode()}")


@contextmanager
def installed(order: str = "forward") -> Iterator[None]:
    """CUDA launches on CPU tensors run here, and what needs a GPU for them says so no longer.

    Args:
        order: One of `ORDERS`.
    """

    def cuda(kernel: str, grid: tuple[int, int, int], *args: Any, **options: Any) -> None:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if pretended(first) or first.is_cuda:
            launch(kernel, grid, *args, **options)
        else:
            run(kernel, grid, *args, order=order, **options)

    launch = cuda_source.cuda
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_source, "cuda", cuda)
        for need in ("cuda_core", "sm_90"):
            patch.setitem(op.REQUIREMENTS, need, _lifted(op.REQUIREMENTS[need]))
        yield


@pytest.fixture(autouse=True)
def cuda_on_cpu() -> Iterator[None]:
    """`installed` around every test."""
    with installed():
        yield


def _lifted(needs: Callable[[torch.device], str | None]) -> Callable[[torch.device], str | None]:
    return lambda device: why_not() if device.type == "cpu" else needs(device)


def _argument(arg: Any) -> _Argument:
    """What the launcher reads; it points into `arg`, which must outlive it."""
    if isinstance(arg, Tensor):
        # One without elements gets an address that cannot be read.
        strides = zip(arg.shape, arg.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in strides) if arg.numel() else 0
        return _Argument(None, arg.data_ptr() or 16, extent * arg.element_size(), b"p")
    kinds = {ctypes.c_void_p: b"p", ctypes.c_float: b"f", ctypes.c_double: b"f"}
    return _Argument(ctypes.addressof(arg), None, ctypes.sizeof(arg), kinds.get(type(arg), b"i"))


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def _library(kernel: str, macros: tuple[tuple[str, int | str], ...]) -> Any:
    """The launcher of a kernel with these macros, compiled where it is not in the folder yet."""
    name, _, entry = kernel.partition(":")
    source = cuda_source.ROOT / name
    text = _EXTERN.sub(r"\1* const \2 = host_cuda::dynamic_shared<\1>();", source.read_text())
    text = _STATIC.sub(r"static \1\2_names\3; auto& \2 = host_cuda::static_shared(\2_names);", text)
    unit = f"""#line 1 "{name}"
{text}
using namespace host_cuda;
extern "C" const char* vidkernels_launch(Argument* arguments, unsigned count, const Launch* how) {{
    return host_cuda::launch({entry}, *how, arguments, count);
}}
"""
    library = _built(unit, dict(macros), source.parent)
    # PyDLL keeps the interpreter's lock: the fibers are the same for all.
    launch = ctypes.PyDLL(str(library)).vidkernels_launch
    launch.restype = ctypes.c_char_p
    return launch


def _built(unit: str, macros: Mapping[str, int | str], folder: Path) -> Path:
    """A shared library of the text, kept by its hash."""
    header = _header()
    options = [f"-I{path}" for path in (header.parent, cuda_source.headers(), folder, cuda_source.ROOT)]
    options += [f"-D{macro}={value}" for macro, value in sorted(macros.items())]
    included = "".join(path.read_text() for path in sorted({*folder.glob("*.cuh"), *cuda_source.ROOT.glob("*.cuh")}))
    digest = hashlib.sha256("\0".join((unit, included, str(header), *options)).encode()).hexdigest()
    library = header.parent / f"{digest[:32]}.so"
    if not library.is_file():
        runtime = str(header.parent / "runtime.so")
        _compile(("-shared", *options, "-include", str(header), "-x", "c++", "-", "-x", "none", runtime), library, unit)
    return library


@cache
def _header() -> Path:
    """host_cuda.h in a folder of its own, precompiled: it is most of the text of every kernel."""
    text, code = _HEADER.read_text(), _RUNTIME.read_text()
    digest = hashlib.sha256(
        "\0".join((text, code, _NV_TARGET, str(cuda_source.headers()), *_FLAGS)).encode()
    ).hexdigest()
    home = Path(tempfile.gettempdir()) / f"vidkernels-host-{os.getuid()}" / digest[:16]
    (home / "nv").mkdir(parents=True, exist_ok=True)
    _write(home / "nv" / "target", _NV_TARGET)
    _write(home / _HEADER.name, text)
    precompiled, runtime = home / f"{_HEADER.name}.gch", home / "runtime.so"
    options = (f"-I{home}", f"-I{cuda_source.headers()}", "-x")
    if not precompiled.is_file():
        _compile((*options, "c++-header", str(home / _HEADER.name)), precompiled)
    if not runtime.is_file():
        _compile(("-shared", *options, "c++", "-"), runtime, code)
    return home / _HEADER.name


def _compile(options: tuple[str, ...], result: Path, text: str = "") -> None:
    """Other processes may be compiling the same: each writes a file of its own, and the last one stays."""
    with tempfile.TemporaryDirectory(dir=result.parent) as scratch:
        made = Path(scratch) / result.name
        command = [_compiler(), *_FLAGS, *options, "-o", str(made)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"g++ does not compile it:\n{' '.join(command)}\n{done.stderr}")
        made.replace(result)


def _write(path: Path, text: str) -> None:
    """The text in a file, whole at any time: other processes may be compiling."""
    if path.is_file() and path.read_text() == text:
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
