"""Which implementation is fastest for a layer: every way that could compute it is checked and timed, side by side.

The times go into the tables that `implementation="auto"` reads. Every way gets its input in its own layout, as within
a network whose layers all run that way; a conversion at the network's entrance is not counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vidbench import tune
from vidbench.environment import precision
from vidbench.layers import LAYERS, TEMPORAL, Layer
from vidbench.sweep import RequestError, text_of, unknown
from vidbench.timing import Budget, Timer, sample, warm_up
from vidbench.workload.base import CHECK_SEED, TIMED_SEED
from vidkernels import OPS, choosing, tuning
from vidkernels.checking import Results
from vidkernels.cuda_source import cache_folder
from vidkernels.op import DTYPES, Op

ROUNDS = 3
"""Times that the ways are sampled in turn."""


@dataclass(frozen=True)
class Weighed:
    """The ways to compute one layer."""

    layer: Layer
    direction: str
    """`forward`, or `train`: the forward pass and every gradient."""
    key: str
    seconds: dict[str, float]
    """Medians, by `implementation` or `implementation:layout`."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why the others have none."""


def weigh(op: Op, values: Mapping[str, Any], *, dtype: str, device: str, direction: str, seconds: float) -> Weighed:
    """Checks and times every way to compute a case.

    Args:
        op: The op.
        values: Its sizes, without dtype, layout and training.
        dtype: As in `vidkernels.op.DTYPES`.
        device: Where.
        direction: `forward` or `train`.
        seconds: For sampling one way in one round.
    """
    with precision(dtype):
        case = tune.case_of(op, values, dtype, direction, "contiguous")
        possible, reasons = choosing.ways(op, case, torch.device(device))
        calls: dict[str, Callable[[], Results]] = {}
        for way, (name, layout) in possible.items():
            laid_out = tune.case_of(op, values, dtype, direction, layout)
            fn = op[name].fn
            try:
                checked = tune.inputs_of(op, values, laid_out, CHECK_SEED, device)
                want = tune.truth(op, checked, direction, dtype)
                library = tune.errors(op, tune.bind(op["library"].fn, checked, direction)(), want)
                got = tune.errors(op, tune.bind(fn, checked, direction)(), want)
                if failures := got.failures(op, case, library, slack=2.0 if name == "library" else 1.0):
                    reasons[way] = "; ".join(failures)
                    continue
                calls[way] = tune.bind(fn, tune.inputs_of(op, values, laid_out, TIMED_SEED, device), direction)
            except RuntimeError as error:
                reasons[way] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        samples = _sampled(calls, device, seconds)
    medians = {way: statistics.median(found) for way, found in samples.items()}
    return Weighed(Layer(op.name, values), direction, choosing.case_key(op, case).text, medians, reasons)


def _sampled(calls: Mapping[str, Callable[[], Results]], device: str, seconds: float) -> dict[str, list[float]]:
    """Rounds over all calls in turn, so that what drifts drifts for all."""
    timer = Timer(device, "hot")
    budget = Budget(seconds=seconds, most=50)
    samples: dict[str, list[float]] = {way: [] for way in calls}
    for round in range(ROUNDS):
        for way, call in calls.items():
            if round == 0:
                warm_up(call, timer, seconds)
            taken = sample(call, timer, budget)
            samples[way].extend(taken.device_s)
    return samples


def weigh_layers(
    layers: Iterable[Layer],
    table: Path,
    *,
    device: str,
    dtypes: Collection[str],
    directions: Collection[str] = ("forward", "train"),
    batch_size: int = 1,
    seconds: float = 0.1,
) -> Iterator[tuple[int, int, Weighed]]:
    """Weighs every layer that a table does not hold yet, and writes each result as it is found.

    Yields:
        How many are done, of how many, and the last of them.
    """
    todo = []
    for layer in layers:
        op = OPS[layer.op]
        for dtype in dtypes:
            for direction in directions:
                values = {"batch_size": batch_size, **layer.case}
                case = tune.case_of(op, values, dtype, direction, "contiguous")
                key = choosing.case_key(op, case).text
                if key not in known(table, op.name, direction):
                    todo.append((replace(layer, case=values), dtype, direction))
    for number, (layer, dtype, direction) in enumerate(todo, start=1):
        op = OPS[layer.op]
        found = weigh(op, layer.case, dtype=dtype, device=device, direction=direction, seconds=seconds)
        if found.seconds:
            tuning.extend(table, "implementations", f"{op.name}/{direction}", {found.key: found.seconds})
        yield number, len(todo), found


def known(table: Path, op: str, direction: str) -> set[str]:
    """The keys that a table's file holds for an op."""
    return set(tuning.entries(table, "implementations", f"{op}/{direction}"))


@dataclass(frozen=True)
class RequestedLayers:
    """Which layers to tune a machine for.

    Raises:
        RequestError: A model, op, dtype or mode that there is not.
    """

    models: tuple[str, ...] = (*LAYERS, "temporal")
    ops: tuple[str, ...] = ()
    """Empty for all."""
    dtypes: tuple[str, ...] = ("fp32",)
    directions: tuple[str, ...] = ("forward", "train")
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, known in (
            ("models", (*LAYERS, "temporal")),
            ("ops", OPS),
            ("dtypes", DTYPES),
            ("directions", ("forward", "train")),
        ):
            for value in getattr(self, name):
                if value not in known:
                    raise unknown({"directions": "mode"}.get(name, name.removesuffix("s")), value, known)

    def layers(self) -> tuple[Layer, ...]:
        """Every shape once."""
        of = {**LAYERS, "temporal": TEMPORAL}
        listed = (layer for model in self.models for layer in of[model])
        chosen = (layer for layer in listed if not self.ops or layer.op in self.ops)
        return tuple({(layer.op, repr(sorted(layer.case.items()))): layer for layer in chosen}.values())


def table_of(device: str) -> Path:
    """The table of this machine's device in the cache folder.

    Raises:
        RequestError: No such device here.
    """
    if device not in ("cpu", "cuda"):
        raise unknown("device", device, ("cpu", "cuda"))
    if device == "cpu":
        return cache_folder() / "tables" / tuning.table_name("cpu")
    if not torch.cuda.is_available():
        raise RequestError("device 'cuda': torch sees no CUDA device here; `--device cpu` tunes this machine's CPU")
    return cache_folder() / "tables" / tuning.table_name(torch.cuda.get_device_name())


def tune_machine(chosen: RequestedLayers, device: str, table: Path) -> Iterator[str]:
    """Fills a table, and tells each step: launches of our kernels, where there is a GPU, then implementations."""
    if device == "cuda":
        gradients = ("input_gradient", "weight_gradient") if "train" in chosen.directions else ()
        for step in tune.tune_layers(
            chosen.layers(), table, device=device, dtypes=chosen.dtypes, directions=("forward", *gradients),
            batch_size=chosen.batch_size,
        ):  # fmt: skip
            yield f"[launches {step.done}/{step.total}] {_text(step.layer)} {step.dtype} {step.implementation}: " + (
                step.reason or f"{len(step.tuned)} kernels"
            )
    for done, total, found in weigh_layers(
        chosen.layers(), table, device=device, dtypes=chosen.dtypes, directions=chosen.directions,
        batch_size=chosen.batch_size,
    ):  # fmt: skip
        ranked = sorted(found.seconds.items(), key=lambda item: item[1])
        times = ", ".join(f"{way} {seconds * 1e3:.3g} ms" for way, seconds in ranked)
        failed = "".join(f"; {way} failed: {why}" for way, why in found.reasons.items() if "error" in why)
        yield f"[{done}/{total}] {_text(found.layer)} {found.direction}: {times or 'nothing ran'}{failed}"


def _text(layer: Layer) -> str:
    return " ".join([layer.op, *(f"{name}={text_of(value)}" for name, value in layer.case.items())])
