"""Which kernels one call runs: why a time changed is most often that others did.

On a CPU the operators that do work, from the profile that the memory is read from; on a GPU the kernels of one profiled
call, with the registers of those that Triton compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vidbench.kernel_kinds import is_operator

MOST_NAMES = 30
LONGEST_NAME = 80
OTHERS = "others"
"""Stands for what is beyond `MOST_NAMES`."""

_ALLOCATE_OR_VIEW = frozenset((
    "_conj", "_local_scalar_dense", "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "arange", "as_strided",
    "as_strided_", "broadcast_to", "chunk", "clone", "contiguous", "cudnn_is_acceptable", "detach", "detach_",
    "diagonal", "empty", "empty_like", "empty_strided", "expand", "expand_as", "expand_copy", "flatten", "full",
    "full_like", "item", "lift_fresh", "movedim", "narrow", "new_empty", "new_empty_strided", "new_zeros", "numpy_T",
    "ones", "ones_like", "permute", "requires_grad_", "reshape", "resize_", "resize_as_", "resolve_conj",
    "resolve_neg", "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "squeeze_",
    "swapaxes", "t", "to", "transpose", "transpose_", "type_as", "unbind", "unflatten", "unfold", "unsqueeze",
    "unsqueeze_", "view", "view_as", "zeros", "zeros_like",
))  # fmt: skip
"""Operators of aten that move nothing themselves; where one must copy, `copy_` stands under it."""

_HELPERS = frozenset(("copy_", "fill_", "zero_"))
"""Called by operators that do their own work besides: `addmm` copies its bias first."""


@dataclass(frozen=True)
class Ran:
    """What one call ran."""

    kernels: Mapping[str, int] = field(default_factory=dict)
    registers: int | None = None
    """The most per thread of any Triton kernel."""
    spills: int | None = None
    """Registers per thread without a place, of all Triton kernels together."""


def operators(events: Iterable[Any]) -> dict[str, int]:
    """The operators that did work themselves, with counts, from the events of a profile of the CPU.

    An operator that calls another only passes the work on.
    """
    threads: dict[int, list[tuple[int, int, str]]] = {}
    for event in events:
        name = event.name()
        if is_operator(name) and (name := name.removeprefix("aten::")) not in _ALLOCATE_OR_VIEW:
            start = event.start_ns()
            threads.setdefault(event.start_thread_id(), []).append((start, -start - event.duration_ns(), name))
    found: Counter[str] = Counter()
    for spans in threads.values():
        spans.sort()
        open_spans: list[tuple[int, str, list[bool]]] = []  # end, name, whether another does its work
        for start, minus_end, name in spans:
            while open_spans and open_spans[-1][0] < start:
                open_spans.pop()
            if name not in _HELPERS:
                for _, outer, passed_on in open_spans:
                    if not passed_on[0]:
                        passed_on[0] = True
                        found[outer] -= 1
            found[name] += 1
            open_spans.append((-minus_end, name, [False]))
    return _limited(+found)


def device_kernels(call: Callable[[], Any]) -> Ran:
    """The kernels of one call on the current CUDA device; nothing where the profiler cannot reach them.

    What CUPTI leaves behind makes later launches of the process a little slower, so it comes after the samples.
    """
    torch.cuda.synchronize()
    # RuntimeError of CUPTI, AttributeError of another release's events.
    with contextlib.suppress(RuntimeError, AttributeError), _triton_functions() as functions:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        events = profile.profiler.kineto_results.events()
        on_device = (e for e in events if e.device_type() == torch.profiler.DeviceType.CUDA)
        counted = Counter(short_name(event.name()) for event in on_device if not event.is_user_annotation())
        return Ran(_limited(counted), *_registers(functions))
    return Ran()


def _limited(counted: Mapping[str, int]) -> dict[str, int]:
    """In alphabetical order, so that two profiles of one call are equal; the least frequent beyond the limit as one."""
    ranked = sorted(counted, key=lambda name: (-counted[name], name))
    kept = {name: counted[name] for name in sorted(ranked[:MOST_NAMES])}
    if beyond := ranked[MOST_NAMES:]:
        kept[OTHERS] = sum(counted[name] for name in beyond)
    return kept


def short_name(kernel: str) -> str:
    """A kernel's name without return type, parameters and template arguments.

    `void at::native::reduce_kernel<512, 1, ...>(...)` is `at::native::reduce_kernel`. Where the name says nothing, as
    in `void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_...>(...)`, the first template argument is taken.
    """
    if "(" not in kernel and "<" not in kernel:
        return kernel[:LONGEST_NAME]
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    head = re.split(r"[<(]", name, maxsplit=1)[0]
    argument = re.match(r"[\w:]+", name[len(head) + 1 :]) if name[len(head) : len(head) + 1] == "<" else None
    if argument and re.fullmatch(r"(device_)?kernel\d*", head.rsplit("::", 1)[-1].lower()):
        head = argument.group()
    return head.strip()[:LONGEST_NAME]


# --- registers --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _triton_functions() -> Iterator[set[int]]:
    """The CUfunctions that Triton launches meanwhile; none where it is not loaded or has no hooks to tell."""
    launched: set[int] = set()
    triton = sys.modules.get("triton")
    hooks = getattr(getattr(getattr(triton, "knobs", None), "runtime", None), "launch_enter_hook", None)
    if hooks is None or not hasattr(hooks, "add"):
        yield launched
        return

    def tell(metadata: Any) -> None:
        if (function := getattr(metadata, "data", {}).get("function")) is not None:
            launched.add(function)

    hooks.add(tell)
    try:
        yield launched
    finally:
        hooks.remove(tell)


_LOCAL_SIZE_BYTES, _NUM_REGS = 3, 4
"""CUfunction_attribute of the driver's API."""


def _registers(functions: Iterable[int]) -> tuple[int | None, int | None]:
    """The most registers of any, and the spilled ones of all; None where there is no function or no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, None
    found: dict[int, list[int]] = {_NUM_REGS: [], _LOCAL_SIZE_BYTES: []}
    for function in functions:
        for attribute, values in found.items():
            value = ctypes.c_int()
            if driver.cuFuncGetAttribute(ctypes.byref(value), attribute, ctypes.c_void_p(function)) == 0:
                values.append(value.value)
    spilled = found[_LOCAL_SIZE_BYTES]
    return max(found[_NUM_REGS], default=None), sum(spilled) // 4 if spilled else None
