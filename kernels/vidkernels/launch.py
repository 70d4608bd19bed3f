"""From a tensor to a running kernel: custom ops, Triton launches, and the record of what would have been launched.

A custom op is one function. With real tensors it launches kernels; with meta or fake ones the same function allocates
its results and launches nothing, so what `torch.compile` is told about them is exact by construction; inside
`recording` it also notes every launch, which is how all kernels are compiled on machines without a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Gpu:
    """What the choice of a launch depends on."""

    name: str
    capability: int
    """Ten times the compute capability: 90 for 9.0."""
    processors: int
    """Streaming multiprocessors."""
    shared_bytes: int
    """Shared memory that one block may use."""


TARGETS: dict[str, Gpu] = {
    "sm_80": Gpu("sm_80", 80, 108, 166_912),
    "sm_90": Gpu("sm_90", 90, 132, 232_448),
    "sm_100": Gpu("sm_100", 100, 148, 232_448),
}
"""The architectures that every shipped kernel is compiled for."""


@dataclass(frozen=True)
class TensorMap:
    """A tensor as the copy engine (TMA) sees it: blocks of it are loaded by coordinates, zeros beyond its edges."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements; all but the last in multiples of 16 bytes, the last one 1."""
    block: tuple[int, ...]
    """Powers of two."""


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded instead of done."""

    language: str
    """`triton` or `cuda`."""
    kernel: str
    """`module:function` below vidkernels, or `file.cu:entry`."""
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    """Compile-time constants: constexprs of Triton, macros of CUDA C++."""
    options: Mapping[str, Any]
    """num_warps, num_stages and maxnreg, or block, cluster and shared_bytes."""


@dataclass
class _State:
    gpu: Gpu | None = None
    launches: list[Launch] | None = None


_state = _State()


@contextmanager
def assume(gpu: Gpu) -> Iterator[None]:
    """Launches are configured as for this GPU: in the interpreter, and while recording."""
    before, _state.gpu = _state.gpu, gpu
    try:
        yield
    finally:
        _state.gpu = before


@contextmanager
def recording(gpu: Gpu) -> Iterator[list[Launch]]:
    """Collects what calls on meta tensors would launch on a GPU."""
    before = _state.launches
    launches: list[Launch] = []
    _state.launches = launches
    try:
        with assume(gpu):
            yield launches
    finally:
        _state.launches = before


def gpu_of(tensor: Tensor) -> Gpu:
    """The GPU that a tensor's kernels are configured for; an sm_90 where there is none."""
    if _state.gpu is not None:
        return _state.gpu
    if tensor.device.type == "cuda":
        return _gpu(tensor.device.index or 0)
    return TARGETS["sm_90"]


@cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    shared: int = getattr(properties, "shared_memory_per_block_optin", 101_376)
    capability = 10 * properties.major + properties.minor
    return Gpu(properties.name, capability, properties.multi_processor_count, shared)


def pretended(tensor: Tensor) -> bool:
    """The tensor has no memory: a meta or fake one."""
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


def note(launch: Launch) -> None:
    """Records a launch, where somebody records."""
    if _state.launches is not None:
        _state.launches.append(launch)


_REGISTERS = 65536
"""Of a multiprocessor."""


def triton(kernel: str, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
    """Launches a Triton kernel on the device of its tensors, and returns at once.

    Args:
        kernel: `module:function`, the module named from vidkernels on: `conv3d.triton_igemm_kernels:forward`.
        grid: Blocks along each axis; none are launched where one is 0.
        args: Tensors, `TensorMap`s, numbers, in the order of the kernel's parameters.
        constants: Its constexprs.
    """
    first = next(arg for arg in args if isinstance(arg, Tensor | TensorMap))
    tensor = first.base if isinstance(first, TensorMap) else first
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if num_stages > 1:
        # Left alone, the assembler spills a few to fit blocks that the operands in shared memory keep out anyway.
        options["maxnreg"] = min(_REGISTERS // (32 * num_warps), 255)
    if pretended(tensor):
        note(Launch("triton", kernel, args, constants, options))
        return
    if 0 in grid:
        return
    function = triton_function(kernel)
    values = [descriptor(arg) if isinstance(arg, TensorMap) else arg for arg in args]
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            function[grid](*values, **options, **constants)
    else:
        function[grid](*values, **options, **constants)


@cache
def triton_function(kernel: str) -> Any:
    """The `@triton.jit` function behind `module:function`."""
    module, _, function = kernel.partition(":")
    return getattr(importlib.import_module(f"vidkernels.{module}"), function)


def descriptor(map: TensorMap) -> Any:
    """Triton's own form of a `TensorMap`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(map.base, list(map.shape), list(map.strides), list(map.block))


def custom_op(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as `torch.ops.vidkernels.<name>`, for autograd, torch.compile and CUDA graphs.

    The function must allocate its results itself, return none of its arguments, and reach kernels through this
    module: then it serves as its own fake. Its gradient is set by `register_autograd` of what this returns.

    Args:
        schema: Name and signature in torch's notation: `"relu(Tensor x, int[] sizes) -> Tensor"`.
    """
    name, _, signature = schema.partition("(")

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fn)
        def call(*args: Any) -> Any:
            # What the op computes is said by the dtypes of its arguments: autocast has acted on them already.
            device = next(arg for arg in args if isinstance(arg, Tensor)).device.type
            if device != "meta" and torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return fn(*args)
            return fn(*args)

        op = torch.library.custom_op(f"vidkernels::{name}", call, mutates_args=(), schema=f"({signature}")
        op.register_fake(call)
        return op

    return register


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype that `torch.autocast` wants on their device, or as they are."""
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def precision(tensor: Tensor) -> str:
    """How `tl.dot` multiplies float32: `tf32` where `torch.backends.cudnn.allow_tf32` lets it, `ieee` elsewhere."""
    return "tf32" if tensor.dtype is torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


def dtype_refusal(case: Any, *dtypes: str) -> str | None:
    """Why a kernel of these dtypes cannot take a case."""
    return None if case.dtype in dtypes else f"dtype={case.dtype}: it computes in {', '.join(dtypes)}"
