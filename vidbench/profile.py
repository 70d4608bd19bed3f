"""Into a point: where one settled call spends its time, on what, and what it waits for.

The call is timed without the profiler first, so that what the profiler costs is known. The trace is torch.profiler's.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidbench import idle, traces
from vidbench.counting import formulas, multiplies_nothing
from vidbench.environment import ceilings, describe, precision
from vidbench.kernel_names import short_name
from vidbench.measure import OUT_OF_MEMORY, captured
from vidbench.memory import measure_memory
from vidbench.ncu import counters
from vidbench.records import Cost, Environment
from vidbench.sweep import Point, RequestError
from vidbench.timing import Budget, Timer, sample, warm_up
from vidbench.traces import SUMMARY, TRACE, Event, Place, Profile, Row
from vidbench.workload import CheckFailed, Unfit, workload

MOST_CALLS = 5
MOST_SECONDS = 5.0
"""Of profiled calls, unless one takes longer."""


def take(
    point: Point,
    out: Path,
    *,
    video: str | None = None,
    tensorboard: Path | None = None,
    command: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Profiles a point in this process, and writes the trace and the summary into `out`.

    Args:
        point: What to profile.
        out: Folder for the files; what another profile has left there is replaced.
        video: Path of the video file that clips come from.
        tensorboard: A folder for torch-tb-profiler, which gets the same trace.
        command: What reproduces this.
        tell: Told of each step.

    Raises:
        RequestError: The point cannot run here, computes wrong numbers, runs out of memory or breaks; the profiler sees
            nothing of the device; or a folder cannot be written.
    """
    if "video" in point.case and video is None:
        raise RequestError(f"{point.key} takes its clips from {point.case['video']}: add --input FILE")
    for folder in filter(None, (out, tensorboard)):
        _check_writable(folder)
    try:
        return _take(point, out, video, tensorboard, command, tell)
    except (Unfit, CheckFailed) as why:
        raise RequestError(f"{point.key} cannot be profiled: {why}") from None
    except (MemoryError, RuntimeError) as error:  # torch's, CUDA's and Inductor's are of the latter kind
        first, *more = [line for line in map(str.strip, str(error).splitlines()) if line] or [""]
        said = f"{first} {more[0]}" if first.endswith(":") and more else first  # backend='inductor' raised:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in said for words in OUT_OF_MEMORY)
        what = "out of memory" if full else type(error).__name__
        raise RequestError(f"{point.key} cannot be profiled: {what}{said and f': {said}'}") from error


def _take(
    point: Point, out: Path, video: str | None, tensorboard: Path | None, command: str, tell: Callable[[str], None]
) -> Profile:
    tell("the machine's ceilings")
    environment = describe(point.device, (point.dtype,))
    with precision(point.dtype):
        tell("the call: check, warm-up, time without the profiler")
        work = workload(point, video)
        cost = work.cost()
        call = work.prepare()
        timer = Timer(point.device, point.regime)
        timer(call)
        work.check()
        live = measure_memory(point.device, call, timer.own_bytes).live_before_bytes
        timed = captured(call) if point.regime == "graph" else call
        warm_up(timed, timer, seconds=1.0)
        latency_s = statistics.median(sample(timed, timer, Budget(seconds=0.5)).device_s)
        wall_s = _wall(timed, timer) if timer.cuda else latency_s
        processors = None if timer.cuda else _processors(timed, latency_s)
        plain = point.implementation != "compiled" and point.regime != "graph"
        model = getattr(work, "running", None) if plain else None
        tell("the call, profiled")
        events, count, profiler = _profiled(timed, timer, wall_s, model)
        if timer.cuda and not any(one.is_kernel for one in events):
            raise Unfit(NO_KERNEL)
        tell("what each operator computes and moves")
        done = _counted(timed) if plain else []
        primitives = [] if timer.cuda else _primitives(timed)
    if timer.cuda:
        tell("what the hardware counts")
    counted, about_counters = counters(point, video) if timer.cuda else ([], "")
    spans = traces.nested(events)
    (scope,) = traces.calls(events)
    rows = traces.operators(spans)
    kernels = traces.kernels(events) if timer.cuda else primitives
    device_s = traces.launched(events, spans) if timer.cuda else None
    bars, left_out = traces.bars(events, spans, scope)
    held = ceilings(environment, point.device, point.dtype, cost.bytes_moved, cold=point.regime == "cold")
    profile = Profile(
        traces.SCHEMA_VERSION,
        point=point.key,
        created_utc=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=command,
        machine=environment.machine,
        device=point.device,
        torch=environment.torch,
        latency_s=latency_s,
        wall_s=wall_s,
        profiled_s=scope.duration_s,
        calls=count,
        operators=rows,
        kernels=kernels,
        layers=traces.layers(spans, device_s),
        places=[
            *_whole_call(point, cost, latency_s, environment),
            *_places(spans, device_s, done, point, environment),
        ],
        gaps=idle.device_gaps(events, spans, scope) if timer.cuda else idle.host_gaps(spans, scope),
        conversion_s=traces.conversion_s([] if timer.cuda else rows, kernels),
        memory=traces.memory_over_time(events, scope, timer.cuda, live),
        bars=bars,
        flops_per_s=held.flops_per_s,
        bytes_per_s=held.bytes_per_s,
        macs=cost.counts.macs if cost.counts else None,
        params=cost.params,
        bytes_moved=cost.bytes_moved,
        processors=processors,
        threads=torch.get_num_threads(),
        counters=counted,
        about_counters=about_counters,
        uncounted=sorted({name for name, macs, _ in done if macs is None}),
        bars_left_out=left_out,
    )
    _write(profile, profiler, out, tensorboard)
    return profile


NO_KERNEL = (
    "torch's profiler saw no kernel on the device; it reads them through CUPTI, which another profiler (nsys, ncu) may "
    "hold, or which a container, WSL or this build of torch may lack: end the other one, or use nsys instead"
)


def _check_writable(folder: Path) -> None:
    """Refuses, before anything is measured, a folder that could not be made or written."""
    above = next(one for one in (folder, *folder.absolute().parents) if os.path.exists(one))
    if not above.is_dir():
        raise RequestError(f"cannot write the profile to {folder}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RequestError(f"cannot write the profile to {folder}: no permission to write in {above}")


def _wall(call: Callable[[], Any], timer: Timer) -> float:
    """Seconds of the host's clock from a call's begin until its device is done."""
    found: list[float] = []
    while len(found) < LEAST_WALLS or (len(found) < MOST_WALLS and sum(found) < WALLS_S):
        timer.flush()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


LEAST_WALLS, MOST_WALLS, WALLS_S = 3, 30, 0.3


def _processors(call: Callable[[], Any], latency_s: float) -> float:
    """How many the call keeps busy, with threads that spin while they wait for others."""
    calls = max(3, round(0.3 / latency_s))
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - used) / (time.perf_counter() - wall)


def _profiled(
    call: Callable[[], Any], timer: Timer, seconds: float, model: nn.Module | None
) -> tuple[list[Event], int, Any]:
    """The events of the middle one of some calls, how many those were, and the profiler, which can write its trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if timer.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    count = max(1, min(MOST_CALLS, int(MOST_SECONDS / seconds)))
    settle = torch.cuda.synchronize if timer.cuda else _nothing
    with (
        _named_layers(model),
        torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profiler,
    ):
        call()  # the first one under a profiler pays for its buffers
        settle()
        for _ in range(count):
            timer.flush()
            settle()
            with torch.profiler.record_function(traces.CALL):
                call()
                settle()
    events = _events(profiler)
    scopes = sorted(traces.calls(events), key=lambda one: one.duration_s)
    middle = scopes[len(scopes) // 2]
    return [one for one in events if middle.start_s <= one.start_s <= middle.end_s], count, profiler


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _named_layers(model: nn.Module | None) -> Iterator[None]:
    """Every leaf of a model says when it is at work."""
    handles: list[Any] = []
    for name, module in model.named_modules() if model is not None else ():
        if next(module.children(), None) is None:
            scopes: list[Any] = []
            handles.append(module.register_forward_pre_hook(partial(_enter, name, scopes)))
            handles.append(module.register_forward_hook(partial(_leave, scopes), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(name: str, scopes: list[Any], *_: Any) -> None:
    scope = torch.profiler.record_function(traces.LAYER + name)
    scope.__enter__()
    scopes.append(scope)


def _leave(scopes: list[Any], *_: Any) -> None:
    if scopes:
        scopes.pop().__exit__(None, None, None)


def _events(profiler: Any) -> list[Event]:
    """What the profiler saw, as events.

    Two counts of correlations overlap: torch numbers its operators and scopes, CUPTI the driver's calls and what they
    launch. A kernel has both: CUPTI's as its own, and torch's of the operator that it is linked to.
    """
    events = profiler.profiler.kineto_results.events()
    # Since 1970 a float knows but quarters of a microsecond.
    begin_ns = min((one.start_ns() for one in events), default=0)
    cpu = torch.profiler.DeviceType.CPU
    from_torch = [one for one in events if one.device_type() == cpu and not traces.is_driver_call(one.name())]
    threads = {one.correlation_id(): one.start_thread_id() for one in from_torch if one.correlation_id()}
    found = []
    for one in events:
        on_device, name = one.device_type() != cpu, one.name()
        if on_device and one.is_user_annotation():  # the device's copy of a scope
            continue
        is_kernel = on_device and name != traces.MEMORY
        is_driver_call = not on_device and traces.is_driver_call(name)
        by = one.linked_correlation_id() if is_kernel or is_driver_call else 0
        # CUPTI numbers threads in another way: a call of the driver's is on the thread of the operator that made it.
        thread = threads.get(by, one.start_thread_id()) if is_driver_call else one.start_thread_id()
        detail = name if is_kernel else ", ".join("x".join(map(str, shape)) for shape in one.shapes() if shape)
        short = short_name(name) if is_kernel else name
        found.append(
            Event(
                short,
                (one.start_ns() - begin_ns) * 1e-9,
                one.duration_ns() * 1e-9,
                f"stream {one.device_resource_id()}" if on_device else f"thread {thread}",
                on_device,
                detail="" if detail == short else detail,
                bytes=one.nbytes() if name == traces.MEMORY else 0,
                id=0 if on_device or is_driver_call else one.correlation_id(),
                launched_by=by if is_kernel else 0,
                launch=one.correlation_id() if is_kernel or is_driver_call else 0,
            )
        )
    return found


class _Counted(TorchDispatchMode):
    """Notes what every operator computes and moves."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[str, int | None, int]] = []
        self._formulas = formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func.overloadpacket)
        if formula is None:
            with self:  # one that only calls others: those are in the trace as well
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        macs = 0 if multiplies_nothing(func._schema.name.removesuffix("_forward")) else None
        if formula is not None:
            macs = formula(*args, **kwargs, out_val=out) // 2
        tensors = {
            (leaf.data_ptr(), leaf.shape): leaf.numel() * leaf.element_size()
            for leaf in tree_leaves((args, kwargs, out))
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided
        }
        self.found.append((func._schema.name, macs, sum(tensors.values())))
        return out


def _counted(call: Callable[[], Any]) -> list[tuple[str, int | None, int]]:
    """Operator, multiply-adds (None where no formula is known) and bytes, in the order of a call.

    Nothing where the call cannot be followed.
    """
    counted = _Counted()
    try:
        with counted:
            call()
    except Exception:  # noqa: BLE001  a model, or a kernel, that does not know of such modes
        return []
    return counted.found


def _whole_call(point: Point, cost: Cost, seconds: float, environment: Environment) -> Iterator[Place]:
    """The call of an op as one place: Triton's kernels and cuDNN's recurrence are no operators that have a formula."""
    if point.kind == "op" and cost.counts is not None and cost.counts.macs and cost.bytes_moved:
        held = ceilings(environment, point.device, point.dtype, cost.bytes_moved, cold=point.regime == "cold")
        name = f"{point.workload}, the whole call"
        yield Place(name, "", 1, seconds, cost.counts.macs, cost.bytes_moved, held.bytes_per_s)


def _places(
    spans: Sequence[traces.Span],
    device_s: Mapping[int, float] | None,
    done: Sequence[tuple[str, int | None, int]],
    point: Point,
    environment: Environment,
) -> list[Place]:
    """The operators that multiply, by name and shapes: the k-th of a name in a call is the k-th that was counted."""
    counts: dict[str, list[tuple[int | None, int]]] = {}
    for name, macs, moved in done:
        counts.setdefault(name, []).append((macs, moved))
    seen: dict[str, list[int]] = {}
    for index, span in enumerate(spans):
        if span.event.name in counts:
            seen.setdefault(span.event.name, []).append(index)
    found: dict[tuple[str, str], Place] = {}
    for name, indices in seen.items():
        if len(indices) != len(counts[name]):
            continue  # another number of calls than was counted: nothing is known of them
        indices.sort(key=lambda index: spans[index].event.start_s)
        for index, (macs, moved) in zip(indices, counts[name], strict=True):
            if macs:
                event = spans[index].event
                seconds = event.duration_s if device_s is None else device_s.get(index, 0.0)
                # What fits a cache is copied faster: each is held against copies of its own size.
                held = ceilings(environment, point.device, point.dtype, moved, cold=point.regime == "cold")
                last = found.get((name, event.detail), Place(name, event.detail, 0, 0.0, 0, 0, held.bytes_per_s))
                found[name, event.detail] = replace(
                    last,
                    calls=last.calls + 1,
                    seconds=last.seconds + seconds,
                    macs=last.macs + macs,
                    bytes=last.bytes + moved,
                )
    return sorted(found.values(), key=lambda place: -place.seconds)


def _primitives(call: Callable[[], Any]) -> list[Row]:
    """What oneDNN runs in one call, as it says itself."""
    if not torch.backends.mkldnn.is_available():
        return []
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    with tempfile.TemporaryFile() as log:
        kept = os.dup(1)
        os.dup2(log.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                call()
            library.fflush(None)
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        log.seek(0)
        return traces.onednn_primitives(log.read().decode(errors="replace"))


def _write(profile: Profile, profiler: Any, out: Path, tensorboard: Path | None) -> None:
    folder = out
    try:
        out.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(out / TRACE))
        (out / SUMMARY).write_bytes(msgspec.json.encode(profile))
        if tensorboard is not None:
            folder = tensorboard
            # torch-tb-profiler takes the worker and the moment from the name.
            tensorboard.mkdir(parents=True, exist_ok=True)
            name = f"vidbench_{os.getpid()}.{time.time_ns() // 1_000_000}.pt.trace.json.gz"
            (tensorboard / name).write_bytes((out / TRACE).read_bytes())
    except OSError as problem:
        raise RequestError(f"cannot write the profile to {folder}: {problem.strerror}") from None
