"""Parts `baselines` and `kernels`: every way to compute a layer, side by side in one process.

All are checked against float64 before they are timed and once more after; they are sampled in turn, so that a ratio
of two of them is of like moments; the samples are kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.gpu import plan
from bench.gpu.machine import state
from bench.gpu.pool import Emit, Unit
from vidbench.environment import ceilings, precision
from vidbench.measure import CEILING_TOLERANCE, captured
from vidbench.records import Ceilings, Environment
from vidbench.timing import Budget, Timer, sample, warm_up
from vidbench.tune import PEERS, bind, case_of, errors, inputs_of, launches, truth
from vidbench.workload.base import CHECK_SEED, TIMED_SEED
from vidkernels import OPS, Op
from vidkernels.checking import Results, relative_error
from vidkernels.op import DTYPES, Case, tensors_of

WARM_UP_S = 0.06
COMPILED_FRAMES = 64
"""A compiled recurrent cell is called once for every frame, by Python: no longer clips."""


@dataclass
class Way:
    """One implementation with its settings."""

    implementation: str
    memory_format: str
    benchmark: bool = True
    """cuDNN tries its kernels out, and takes the fastest."""
    call: Callable[[], Results] | None = None
    timed: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """By regime."""
    row: dict[str, Any] = field(default_factory=dict)
    samples_s: dict[str, list[list[float]]] = field(default_factory=dict)
    host_samples_s: dict[str, list[list[float]]] = field(default_factory=dict)
    calls_per_sample: dict[str, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Its name in the rows: `library channels_last benchmark=off`."""
        return f"{self.implementation} {self.memory_format}{'' if self.benchmark else ' benchmark=off'}"


def ways(op: Op, values: Mapping[str, Any], headline: bool, compiled: bool, only: str) -> Iterator[Way]:
    """What is timed of a layer: `only` is baselines, kernels, or both."""
    layouts = ("contiguous",) if op.name in ("rnn", "lstm") else ("channels_last", "contiguous")
    # The first is the yardstick of the weight gradients, whatever is asked for.
    yield from (Way("library", layout) for layout in layouts)
    if only != "kernels":
        if headline:
            yield from (Way("library", layout, benchmark=False) for layout in layouts)
        recurrent = op.name in ("rnn", "lstm")
        if compiled and not (recurrent and values["clip_length"] > COMPILED_FRAMES):
            yield Way("compiled", layouts[0])
    if only != "baselines":
        yield from (Way(name, layouts[0]) for name in op.implementations if name not in PEERS)


def time_layer(unit: Unit, emit: Emit) -> None:
    """Rows for every way and regime of one layer in one dtype and direction."""
    given = unit.values
    op, dtype, direction, device = OPS[given["op"]], given["dtype"], given["direction"], given["device"]
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in given["case"].items()}
    common = {"op": op.name, "case": values, "dtype": dtype, "direction": direction, "headline": given["headline"]}
    with precision(dtype):
        found = list(ways(op, values, given["headline"], given["compiled"], given["only"]))
        ready = _prepare(op, found, common, device, emit)
        _time(ready, op, dtype, device, given["seconds"], given["rounds"])
        case = case_of(op, values, dtype, direction)
        work = work_of(op, case, direction)
        environment = Environment(machine="", **given["ceilings"])
        floors = {name: ceilings(environment, device, dtype, work[1], cold=name == "cold") for name in ("cold", "hot")}
        now = state()
        for way in ready:
            for regime in way.timed:
                emit({**common, **_row(way, regime, floors, work), "state": now})


def _prepare(op: Op, found: list[Way], common: dict[str, Any], device: str, emit: Emit) -> list[Way]:
    """The ways that can run the layer and pass the check; the others are rows already."""
    values, dtype, direction = common["case"], common["dtype"], common["direction"]
    plain = case_of(op, values, dtype, direction, "contiguous")
    want = truth(op, inputs_of(op, values, plain, CHECK_SEED, device), direction, dtype)
    library = None
    ready: list[Way] = []
    for way in found:
        case = case_of(op, values, dtype, direction, way.memory_format)
        row: dict[str, Any] = {"implementation": way.implementation, "way": way.text}
        if why := op[way.implementation].why_not(case, device):
            emit({**common, **row, "status": "skipped", "reason": why})
            continue
        try:
            fn = _function(op, way)
            checked = inputs_of(op, values, case, CHECK_SEED, device)
            started = time.perf_counter()
            got = _flagged(bind(fn, checked, direction), way.benchmark)()
            if device == "cuda":
                torch.cuda.synchronize()
            row["first_call_s"] = time.perf_counter() - started
            error = errors(op, got, want)
            library = library or error
            slack = 2.0 if way.implementation in ("library", "compiled") else 1.0  # as vidbench's own check
            failures = error.failures(op, case, library, slack=slack)
            row |= {"error": vars(error), "library_error": vars(library)}
            row["over_gate"] = _over_gate(op, case, error)
            if failures:
                emit({**common, **row, "status": "failed", "reason": "; ".join(failures)})
                continue
            call = _flagged(bind(fn, inputs_of(op, values, case, TIMED_SEED, device), direction), way.benchmark)
            row["configurations"] = [
                {"kernel": c.kernel, "key": c.key.text, "config": dict(c.config), "source": c.source}
                for c in launches(call)
            ]
            way.call, way.row = call, row
            _choose_regimes(way, op.name, device, common, emit)
        except Exception as error:  # noqa: BLE001  compilers and drivers raise what they like; the row says what
            if device == "cuda":
                torch.cuda.synchronize()  # raises where the context is broken: nothing after it would be true
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
            emit({**common, **row, "status": "failed", "reason": reason})
            continue
        ready.append(way)
    return ready


def _choose_regimes(way: Way, op: str, device: str, common: dict[str, Any], emit: Emit) -> None:
    call = way.call
    assert call is not None  # set just before
    way.timed = {"cold": call, "hot": call}
    if op not in plan.TEMPORAL_OPS:
        return
    row = {**common, **way.row, "regime": "graph"}
    if device != "cuda":
        emit({**row, "status": "skipped", "reason": "graph replay needs a CUDA device"})
        return
    try:
        way.timed["graph"] = captured(lambda: (lambda got: (*got.outputs, *tensors_of(got.gradients)))(call()))
    except Exception as error:  # noqa: BLE001  what cannot be captured says so in many ways
        torch.cuda.synchronize()
        emit({**row, "status": "failed", "reason": f"capture: {(str(error).strip().splitlines() or [''])[0][:300]}"})


def _function(op: Op, way: Way) -> Callable[..., Any]:
    if way.implementation == "compiled" and op.name not in ("rnn", "lstm"):
        torch._dynamo.reset()
        return torch.compile(op["library"].fn, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    return op[way.implementation].fn


def _flagged(call: Callable[[], Results], benchmark: bool) -> Callable[[], Results]:
    def flagged() -> Results:
        torch.backends.cudnn.benchmark = benchmark
        return call()

    return flagged


def _over_gate(op: Op, case: Any, error: Any) -> float:
    gate = op.tolerances[case.dtype]
    gates = {
        "output": gate.forward,
        "border": gate.forward,
        "input_gradient": gate.forward if gate.input_gradient is None else gate.input_gradient,
        "weight_gradient": gate.weight_gradient,
    }
    return max((getattr(error, name) or 0.0) / limit for name, limit in gates.items())


def _time(ready: list[Way], op: Op, dtype: str, device: str, seconds: float, rounds: int) -> None:
    """Samples in turn; then everything is computed once more and compared with itself."""
    budget = Budget(seconds=seconds, most=60)
    timers = {regime: Timer(device, regime) for regime in ("cold", "hot", "graph")}
    first = {way.text: way.call() for way in ready if way.call}
    for round in range(rounds):
        for way in ready[round % max(len(ready), 1) :] + ready[: round % max(len(ready), 1)]:
            for regime, call in way.timed.items():
                if round == 0:
                    warm_up(call, timers[regime], min(WARM_UP_S, 2 * seconds))
                taken = sample(call, timers[regime], budget)
                way.samples_s.setdefault(regime, []).append(list(taken.device_s))
                way.host_samples_s.setdefault(regime, []).append(list(taken.host_s))
                way.calls_per_sample[regime] = taken.calls_per_sample
    gate = max(op.tolerances[dtype].forward, op.tolerances[dtype].weight_gradient)
    for way in ready:
        assert way.call is not None  # it was timed
        again, before = way.call(), first[way.text]
        pairs = [
            (a, b)
            for a, b in zip((*again.outputs, *again.gradients), (*before.outputs, *before.gradients), strict=True)
            if a is not None and b is not None
        ]
        moved = max((relative_error(a, b) for a, b in pairs), default=0.0)
        way.row["repeatable"] = all(torch.equal(a, b) for a, b in pairs)
        if not moved <= gate:
            way.row |= {"status": "failed", "reason": f"its results moved by {moved:.1e} while it was timed"}


def _row(way: Way, regime: str, floors: Mapping[str, Ceilings], work: tuple[int, int]) -> dict[str, Any]:
    """One way in one regime, with the least time that the device's measured ceilings allow."""
    samples = way.samples_s[regime]
    median = statistics.median(seconds for taken in samples for seconds in taken)
    flops, moved = work
    held = floors["cold" if regime == "cold" else "hot"]
    by_flops, by_bytes = flops / held.flops_per_s, moved / held.bytes_per_s
    floor = max(by_flops, by_bytes)
    row = {"status": "ok", "reason": "", **way.row, "regime": regime, "median_s": median}
    if floor > CEILING_TOLERANCE * median:
        row |= {"status": "failed", "reason": f"{floor / median:.2f} times the device's ceiling: not a possible time"}
    return row | {
        "flops": flops,
        "bytes_moved": moved,
        "floor_s": floor,
        "bound": "flops" if by_flops > by_bytes else "bytes",
        "bytes_floor_fraction": by_bytes / median,
        "floor_fraction": floor / median,
        "calls_per_sample": way.calls_per_sample[regime],
        "samples_s": [[float(f"{seconds:.5g}") for seconds in taken] for taken in samples],
        "host_samples_s": [[float(f"{seconds:.4g}") for seconds in taken] for taken in way.host_samples_s[regime]],
    }


def work_of(op: Op, case: Case, direction: str) -> tuple[int, int]:
    """FLOPs and compulsory bytes of a direction: each gradient has the forward pass's products and tensors."""
    flops, moved = 2 * op.macs(case), op.bytes_moved(case)
    if direction != "train":
        return flops, moved
    with torch.device("meta"):
        given = op.make_inputs(case, torch.Generator("cpu")).tensors()
    # Backward reads x, w and the output's gradient, and writes the gradients of x and w.
    return 3 * flops, 2 * moved + sum(tensor.numel() for tensor in given) * DTYPES[case.dtype].itemsize
