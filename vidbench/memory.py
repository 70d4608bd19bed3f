"""Memory of one call: live tensor bytes and their exact peak, and the process's resident set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CellType, ModuleType
from typing import Any

import torch

from vidbench.kernel_names import operators
from vidbench.records import Memory
from vidkernels import Inputs


def measure_memory(device: str, call: Callable[[], Any], foreign_bytes: int) -> Memory:
    """As `memory_and_operators`, the memory alone."""
    return memory_and_operators(device, call, foreign_bytes)[0]


def memory_and_operators(device: str, call: Callable[[], Any], foreign_bytes: int) -> tuple[Memory, Mapping[str, int]]:
    """Live bytes and their peak around one call, exact: from the allocator's own events.

    Args:
        device: Where the call works.
        call: A settled call.
        foreign_bytes: Device memory that is not the call's, such as the timer's own.

    Returns:
        The memory, and the operators that the call ran, which the profile on a CPU tells as well.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - foreign_bytes
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
        call()
        torch.cuda.synchronize()
        memory = Memory(
            live_before_bytes=before,
            peak_bytes=torch.cuda.max_memory_allocated() - foreign_bytes,
            reserved_bytes=torch.cuda.max_memory_reserved(),
            allocator_retries=torch.cuda.memory_stats()["num_alloc_retries"] - retries,
        )
        return memory, {}
    before = _live_tensor_bytes(call)
    _reset_peak_resident()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return Memory(before, before + peak, peak_resident_bytes=_peak_resident()), operators(events)


def _live_tensor_bytes(call: Callable[[], Any]) -> int:
    """Bytes of the tensors that a call keeps alive: inputs, weights, gradients, optimiser state; each storage once.

    Found by walking from the call's closure, so that what the check holds beside it is not counted.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [call]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, str | int | float | type | ModuleType):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            waiting.append(thing.grad if thing.is_leaf else None)
        elif isinstance(thing, Mapping):
            waiting += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set):
            waiting += thing
        elif isinstance(thing, CellType):
            waiting.append(thing.cell_contents)
        else:
            waiting += getattr(thing, "__closure__", None) or ()
            waiting.append(getattr(thing, "__self__", None))
            if isinstance(thing, torch.nn.Module | torch.optim.Optimizer | Inputs):
                waiting.append(vars(thing))
    return sum(storages.values())


def _reset_peak_resident() -> None:
    """Lets the kernel's record of the peak resident set start anew, where it may be written to (Linux ≥ 4.0)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def foreign_bytes(device: str) -> int:
    """Device memory held before a point begins: what earlier points left, less the libraries' workspaces."""
    if device != "cuda" or not torch.cuda.is_available():
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()
