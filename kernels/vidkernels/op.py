"""Op, Implementation, Tolerance: the registry of kernels, and why one of them cannot run a case."""

from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import cache, wraps
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vidkernels.shapes import Shape

DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Arithmetic by name. tf32 stores float32; whether products are rounded is a switch of the backend."""

MEMORY_FORMATS = ("contiguous", "channels_last")

Fn = TypeVar("Fn", bound=Callable[..., Any])


class Unavailable(RuntimeError):
    """An implementation that cannot run here, with the reason and those that can."""


@dataclass(frozen=True)
class Tolerance:
    """The largest relative Frobenius errors against float64 that pass."""

    forward: float
    """Outputs."""
    weight_gradient: float
    """Gradients of weights, which sum over all positions. Twice the library's own error passes for every gradient."""
    input_gradient: float | None = None
    """Gradient of the activation; None: as `forward`."""


TOLERANCES: dict[str, Tolerance] = {
    "fp64": Tolerance(1e-12, 1e-11),
    "fp32": Tolerance(2e-6, 2e-5),
    "tf32": Tolerance(1.2e-3, 1.2e-3),
    "fp16": Tolerance(1e-3, 1e-3),
    "bf16": Tolerance(5e-3, 5e-3),
}

RELU_TOLERANCES: dict[str, Tolerance] = {
    "fp64": Tolerance(1e-12, 1e-7, 1e-7),
    "fp32": Tolerance(2e-6, 5e-4, 5e-4),
    "tf32": Tolerance(1.2e-3, 3e-2, 3e-2),
    "fp16": Tolerance(1e-3, 4e-2, 4e-2),
    "bf16": Tolerance(5e-3, 1e-1, 1e-1),
}
"""Where a ReLU stands inside the op: an error e before it lets a share of about e of its elements change sides, and
each of them changes its whole gradient, so the gradient's error is about √e."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every case has. An op's own case adds its sizes and checks them."""

    batch_size: int = 1
    dtype: str = "fp32"
    memory_format: str = "contiguous"
    training: bool = False
    """Gradients are wanted, and batch statistics and dropout are those of training."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.memory_format not in MEMORY_FORMATS:
            raise ValueError(f"memory_format={self.memory_format!r} is not one of {', '.join(MEMORY_FORMATS)}")
        self._at_least(0, "batch_size")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is not an integer of at least {least}")

    def without_randomness(self) -> Case:
        """The case to check against float64: as this one, less what two runs draw differently."""
        return self


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call: `args` hold tensors, None, or named tuples of tensors; `args[0]` is the activation."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same call with every tensor changed."""
        return Inputs(tuple(_map(change, arg) for arg in self.args), self.kwargs)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor among the arguments, in order."""
        return tensors_of(self.args)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = (_map(change, part) for part in value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """The tensors in nested tuples, in order."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, tuple):
        return tuple(tensor for part in value for tensor in tensors_of(part))
    return ()


def wants_gradients(*values: Any) -> bool:
    """A gradient of some tensor among these would be recorded."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of(values))


@cache
def _installed(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return (not parent or _installed(parent)) and importlib.util.find_spec(module) is not None


@cache
def _on_path(program: str, path: str | None) -> bool:
    return shutil.which(program, path=path) is not None


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA device"


def _needs_triton(device: torch.device) -> str | None:
    if not _installed("triton"):
        return "needs triton (pip install triton)"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "needs a CUDA device, or TRITON_INTERPRET=1 to run in Triton's interpreter"


def _needs_cuda_core(device: torch.device) -> str | None:
    if not _installed("cuda.core"):
        return "needs cuda-core (pip install vidbench[gpu])"
    return _needs_cuda(device)


def _needs_sm_90(device: torch.device) -> str | None:
    if why := _needs_cuda(device):
        return why
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (9, 0):
        return "needs compute capability 9.0 or later"
    return None


def _needs_onednn(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "needs a CPU: it is oneDNN's"
    return None if torch.backends.mkldnn.is_available() else "needs a torch built with oneDNN"


def _needs_compiler(device: torch.device) -> str | None:
    """torch.compile writes C++ for a CPU, Triton for a GPU."""
    if device.type == "cuda":
        return None if _installed("triton") else "needs triton (pip install triton)"
    compiler = os.environ.get("CXX", "g++")
    found = _on_path(compiler, os.environ.get("PATH"))
    return None if found else f"needs a C++ compiler: {compiler} is not on PATH"


REQUIREMENTS: dict[str, Callable[[torch.device], str | None]] = {
    "cuda": _needs_cuda,
    "triton": _needs_triton,
    "cuda_core": _needs_cuda_core,
    "sm_90": _needs_sm_90,
    "compiler": _needs_compiler,
    "onednn": _needs_onednn,
}


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    name: str
    fn: Callable[..., Any]
    requires: tuple[str, ...] = ()
    """Names from `REQUIREMENTS`."""
    limits: Callable[[Any], str | None] | None = None
    """Tells why a case is beyond it."""
    step: Callable[..., Any] | None = None
    """One frame with carried state: (x_t, *weights, state=None, **parameters) → (y_t, state)."""

    def why_not(self, case: Case, device: torch.device | str) -> str | None:
        """The first reason why this cannot run the case on the device; None when it can."""
        device = torch.device(device)
        if case.dtype == "tf32" and device.type != "cuda":
            return f"tf32 is an arithmetic of CUDA devices, not of {device.type}"
        for need in self.requires:
            if why := REQUIREMENTS[need](device):
                return why
        if device.type != "cuda" and case.dtype == "bf16" and "triton" in self.requires:
            return "Triton's interpreter multiplies bf16 matrices wrongly"
        return self.limits(case) if self.limits else None


@dataclass(frozen=True)
class Op:
    """An operation: what its cases are, what they cost, how exact they must be, and who computes them."""

    name: str
    case_type: type[Case]
    case_of: Callable[..., Case]
    """The case of a call: same arguments as an implementation."""
    make_inputs: Callable[[Any, torch.Generator], Inputs]
    """(case, generator) → float32 CPU inputs of seeded noise, before dtype, layout and device."""
    macs: Callable[[Any], int]
    """Multiply-adds of the forward pass."""
    bytes_moved: Callable[[Any], int]
    """Compulsory bytes of the forward pass: every input read once, every output written once."""
    tolerances: Mapping[str, Tolerance] = field(default_factory=lambda: TOLERANCES)
    has_border: bool = True
    """Outputs are (N, C, positions…) with positions that padding touches."""
    implementations: dict[str, Implementation] = field(default_factory=dict)
    _cases: dict[Any, Case] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Cases of the calls seen, by signature: working one out takes longer than many a kernel."""

    def implementation(
        self,
        name: str,
        *,
        requires: tuple[str, ...] = (),
        limits: Callable[[Any], str | None] | None = None,
        step: Callable[..., Any] | None = None,
    ) -> Callable[[Fn], Fn]:
        """Registers the decorated function under a name."""

        def register(fn: Fn) -> Fn:
            if name in self.implementations:
                raise ValueError(f"{self.name} has an implementation {name!r} already")
            self.implementations[name] = Implementation(name, fn, requires, limits, step)
            return fn

        return register

    def case(self, values: Mapping[str, Any], **common: Any) -> Case:
        """A case from a plain mapping.

        Raises:
            ValueError: A key that the op does not have (the nearest is named), or sizes that do not fit.
        """
        known = {f.name for f in fields(self.case_type)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"{self.name} has no {key!r}: {hint}it has {', '.join(sorted(known))}")
        return self.case_type(**{**values, **common})

    def inputs(self, case: Case, *, seed: int = 0, device: torch.device | str = "cpu") -> Inputs:
        """Seeded inputs of a case, in its dtype and layout: the same values on every device; none on `meta`."""
        device = torch.device(device)
        # Numbers that nobody will see need not be drawn.
        with FakeTensorMode() if device.type == "meta" else nullcontext():
            made = self.make_inputs(case, torch.Generator().manual_seed(seed))
        if device.type == "meta":
            made = made.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        dtype = DTYPES[case.dtype]
        channels_last = case.memory_format == "channels_last"

        def place(tensor: Tensor) -> Tensor:
            tensor = tensor.to(device=device, dtype=dtype)
            if channels_last and tensor.dim() == 5:
                return tensor.contiguous(memory_format=torch.channels_last_3d)
            return tensor.contiguous()

        placed = made.map(place)
        x = placed.args[0]
        if channels_last and x.dim() == 3:
            # (N, C, T) stored as (N, T, C); filters stay as they are.
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
            return Inputs((x, *placed.args[1:]), placed.kwargs)
        return placed

    def __getitem__(self, name: str) -> Implementation:
        """An implementation by name.

        Raises:
            ValueError: No such name; the nearest is named.
        """
        if name not in self.implementations:
            near = difflib.get_close_matches(name, self.implementations, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(self.implementations)
            raise ValueError(f"{self.name} has no implementation {name!r}: {hint}known: {known}")
        return self.implementations[name]

    def __call__(self, *args: Any, implementation: str, **kwargs: Any) -> Any:
        """Runs one implementation.

        Raises:
            ValueError: Arguments that do not fit together.
            Unavailable: It cannot run this case here; those that can are named. Nothing is put in its place.
        """
        chosen = self[implementation]
        if torch.compiler.is_compiling():
            # The graph has been checked by the eager call that it stands for, or will fail in the kernel itself.
            return chosen.fn(*args, **kwargs)
        case = self.case_of_call(args, kwargs)
        device = args[0].device
        if why := chosen.why_not(case, device):
            usable = [i.name for i in self.implementations.values() if i.why_not(case, device) is None]
            raise Unavailable(f"{self.name}/{implementation}: {why}; available: {', '.join(usable) or 'none'}")
        return chosen.fn(*args, **kwargs)

    def case_of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Case:
        """`case_of`, remembered by the signature of the arguments."""
        key = (_signature(args), _signature(tuple(kwargs.items())), torch.backends.cudnn.allow_tf32)
        if key not in self._cases:
            if len(self._cases) >= 4096:
                self._cases.clear()
            self._cases[key] = self.case_of(*args, **kwargs)
        return self._cases[key]


def wide(tensor: Tensor) -> Tensor:
    """float32 of a 16-bit tensor; any other as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def widened(fn: Fn) -> Fn:
    """`fn` with 16-bit arguments widened to float32 and its results rounded back once, as an accumulator does."""

    @wraps(fn)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if wide(x) is x:
            return fn(x, *args, **kwargs)
        result = fn(wide(x), *_map(wide, args), **{name: _map(wide, value) for name, value in kwargs.items()})
        return _map(lambda tensor: tensor.to(x.dtype), result)

    return call  # type: ignore[return-value]


def compiled(fn: Fn) -> Fn:
    """`torch.compile` of a whole function for fixed shapes, once per signature of its tensors and parameters.

    Every signature compiles a copy of the function: torch counts recompilations by code object and refuses after
    a few, and a sweep has more cases than that.
    """
    made: dict[Any, Callable[..., Any]] = {}

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        key = (_signature(args), _signature(tuple(sorted(kwargs.items()))))
        if key not in made:
            made[key] = torch.compile(_copy(fn, f"{fn.__name__}_{len(made)}"), fullgraph=True, dynamic=False)
        return made[key](*args, **kwargs)

    return call  # type: ignore[return-value]


def _signature(value: Any) -> Any:
    """All that a case or a compiled graph may depend on, as a dictionary's key."""
    if isinstance(value, Tensor):
        gradient = value.requires_grad and torch.is_grad_enabled()
        return value.shape, value.stride(), value.dtype, value.device, gradient
    if isinstance(value, tuple):
        return type(value), *map(_signature, value)
    return value if value is None or isinstance(value, str) else repr(value)


def _copy(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function with a code object of its own."""
    assert isinstance(fn, FunctionType)
    copy = FunctionType(fn.__code__.replace(co_name=name), fn.__globals__, name, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    return copy


def check_tensor(name: str, tensor: Any, shape: str | Shape) -> None:
    """That a tensor has the axes of "N C T", or exactly the sizes given.

    Raises:
        ValueError: It has not; or is no tensor.
    """
    wanted = tuple(shape.split()) if isinstance(shape, str) else tuple(shape)
    text = f"({', '.join(map(str, wanted))}{',' if len(wanted) == 1 else ''})"
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {text}, not {type(tensor).__name__}")
    if tensor.dim() != len(wanted) or (not isinstance(shape, str) and tuple(tensor.shape) != wanted):
        raise ValueError(f"{name} must be {text}, not of shape {tuple(tensor.shape)}")


def dtype_name(tensor: Tensor) -> str:
    """The name in `DTYPES` of a tensor's dtype; float32 is tf32 where the backend rounds products."""
    if tensor.dtype is torch.float32 and tensor.is_cuda and torch.backends.cudnn.allow_tf32:
        return "tf32"
    for name, dtype in DTYPES.items():
        if dtype is tensor.dtype:
            return name
    raise ValueError(f"dtype {tensor.dtype} is not one of {', '.join(DTYPES)}")


def memory_format_name(tensor: Tensor) -> str:
    """`channels_last` for (N, C, positions…) that is laid out so and not contiguous as well."""
    if tensor.is_contiguous():
        return "contiguous"
    return "channels_last" if tensor.movedim(1, -1).is_contiguous() else "contiguous"
