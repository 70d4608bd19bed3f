"""Launch configurations by measurement: every candidate of a kernel is checked, timed, and the fastest written down.

A call is taken in a direction: the forward pass, the gradient of the activation, the gradient of the weights, or all
of them at once. Truth is float64 of the same, already rounded, inputs, computed by the library on the same device.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidbench.environment import precision
from vidbench.layers import Layer
from vidbench.timing import Budget, Timer, sample, warm_up
from vidbench.workload.base import CHECK_SEED, TIMED_SEED, Latest
from vidkernels import OPS, checking, tuning
from vidkernels.checking import Errors, Results, relative_error
from vidkernels.op import DTYPES, Case, Inputs, Op, Unavailable, tensors_of

DIRECTIONS = ("forward", "input_gradient", "weight_gradient", "train")
"""`train` is the forward pass and the gradient of everything; the other gradients leave the forward pass out."""

ENOUGH = 0.01
"""Configurations this share slower than the fastest are as good: the first of them in the kernel's own order wins."""

PEERS = ("reference", "library", "compiled")
"""Implementations that launch no kernel of ours."""

ROUNDS = 2
"""Times that the candidates are sampled in turn."""

WARM_UP_S = 0.05


def bind(
    fn: Callable[..., Any], inputs: Inputs, direction: str, *, noise_dtype: torch.dtype | None = None
) -> Callable[[], Results]:
    """A call that computes one direction, again and again.

    For a gradient the forward pass is taken here, once, and its graph kept. What is differentiated is Σ outputs ·
    noise, seeded, rounded to `noise_dtype` (None: the outputs') and laid out as the outputs are. The results hold a
    gradient for the activation, then for the weights, None for what is not wanted.
    """
    if direction == "forward":

        def forward() -> Results:
            with torch.inference_mode():
                return Results(tensors_of(fn(*inputs.args, **inputs.kwargs)))

        return forward
    activation = inputs.tensors()[0]
    wanted: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        mine = tensor.detach()
        takes = direction == "train" or (tensor is activation) == (direction == "input_gradient")
        if takes and tensor.is_floating_point():
            wanted.append(mine.requires_grad_())
        return mine

    leaves = inputs.map(leaf)
    noise: list[Tensor] = []
    before = (None,) if direction == "weight_gradient" else ()

    def outputs() -> tuple[Tensor, ...]:
        found = tensors_of(fn(*leaves.args, **leaves.kwargs))
        if not noise:
            noise.extend(_noise(output, number, noise_dtype) for number, output in enumerate(found))
        return found

    if direction == "train":

        def train() -> Results:
            found = outputs()
            gradients = torch.autograd.grad(found, wanted, noise, allow_unused=True)
            return Results(tuple(y.detach() for y in found), tuple(gradients))

        return train
    kept = outputs()

    def gradient() -> Results:
        gradients = torch.autograd.grad(kept, wanted, noise, retain_graph=True, allow_unused=True)
        return Results((), (*before, *gradients))

    return gradient


def _noise(output: Tensor, number: int, dtype: torch.dtype | None) -> Tensor:
    generator = torch.Generator(output.device).manual_seed(number + 1)
    noise = torch.randn(output.shape, generator=generator, device=output.device)
    return torch.empty_like(output, requires_grad=False).copy_(noise.to(dtype or output.dtype))


def truth(op: Op, inputs: Inputs, direction: str, dtype: str) -> Results:
    """The results in float64 on the device of the inputs, by the library."""
    exact = inputs.map(lambda tensor: tensor.detach().double().contiguous() if tensor.is_floating_point() else tensor)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # once is not worth choosing for
    try:
        return bind(op["library"].fn, exact, direction, noise_dtype=DTYPES[dtype])()
    except RuntimeError:
        # cuDNN has no float64 kernel for some shapes; torch's own products remain.
        with torch.backends.cudnn.flags(enabled=False):
            return bind(op["library"].fn, exact, direction, noise_dtype=DTYPES[dtype])()
    finally:
        torch.backends.cudnn.benchmark = before


def errors(op: Op, got: Results, want: Results) -> Errors:
    """As `vidkernels.checking.compare`, on the device where the results lie."""
    if len(got.outputs) != len(want.outputs) or len(got.gradients) != len(want.gradients):
        return Errors(output=float("inf"))
    outputs = list(zip(got.outputs, want.outputs, strict=True))
    edges = None
    if op.has_border and outputs and all(g.shape == w.shape and w.numel() for g, w in outputs):
        edges = _worst(relative_error(checking.border(g), checking.border(w)) for g, w in outputs)
    gradients = [
        None if w is None else float("inf") if g is None else relative_error(g, w)
        for g, w in zip(got.gradients, want.gradients, strict=True)
    ]
    weights = [error for error in gradients[1:] if error is not None]
    return Errors(
        output=_worst(relative_error(g, w) for g, w in outputs),
        border=edges,
        input_gradient=gradients[0] if gradients else None,
        weight_gradient=_worst(weights) if weights else None,
    )


def _worst(values: Iterable[float]) -> float:
    """The largest; NaN where there is one."""
    return max(values, key=lambda value: (value != value, value), default=0.0)


_drawn = Latest()


def inputs_of(op: Op, values: Mapping[str, Any], case: Case, seed: int, device: str) -> Inputs:
    """`Op.inputs`, but drawn once for all dtypes, layouts and directions of a shape: drawing takes the longest.

    Args:
        op: Whose inputs.
        values: The sizes, without dtype, layout and training.
        case: The same with them.
        seed: Of the noise.
        device: Where to.
    """
    key = op.name, repr(sorted(values.items())), device
    seeds: dict[int, Inputs] = _drawn.get(key, dict)
    if seed not in seeds:
        seeds[seed] = op.inputs(op.case(values), seed=seed, device=device)
    with torch.device("meta"):
        parameters = op.make_inputs(case, torch.Generator("cpu")).kwargs
    drawn = replace(op, make_inputs=lambda *_: Inputs(seeds[seed].args, parameters))
    return drawn.inputs(case, device=device).map(lambda tensor: tensor.detach().clone())


@dataclass(frozen=True)
class Trial:
    """One configuration of one kernel."""

    config: tuning.Config
    samples_s: tuple[float, ...] = ()
    """Seconds of the whole call, of which other kernels may be a part."""
    reason: str = ""
    """Why it did not pass."""

    @property
    def median_s(self) -> float | None:
        """The median of the samples."""
        return statistics.median(self.samples_s) if self.samples_s else None


@dataclass(frozen=True)
class Tuned:
    """What was found out about one kernel for one key."""

    op: str
    implementation: str
    direction: str
    kernel: str
    key: str
    trials: tuple[Trial, ...]
    before: tuning.Config
    """What would have been launched, and where that came from."""
    source: str

    @property
    def best(self) -> Trial | None:
        """The first that is as good as the fastest; None where none passed."""
        passed = [(trial.median_s, trial) for trial in self.trials if trial.median_s is not None]
        least = min((seconds for seconds, _ in passed), default=0.0)
        return next((trial for seconds, trial in passed if seconds <= least * (1 + ENOUGH)), None)


def launches(call: Callable[[], Any]) -> list[tuning.Chosen]:
    """The launches of a call whose configuration is a choice, each once."""
    with tuning.watching() as found:
        call()
    return list({(chosen.kernel, chosen.key.text): chosen for chosen in found}.values())


def tune(
    op: Op,
    implementation: str,
    values: Mapping[str, Any],
    *,
    dtype: str,
    device: str,
    directions: Collection[str] = DIRECTIONS[:3],
    seconds: float = 0.03,
    known: Collection[tuple[str, str]] = (),
) -> list[Tuned]:
    """Checks and times every configuration that an implementation may launch for a case.

    Kernels of one call are tuned one after another, each with the best of those before it.

    Args:
        op: Whose implementation.
        implementation: Its name.
        values: The sizes, without dtype, layout and training.
        dtype: As in `vidkernels.op.DTYPES`.
        device: Where to.
        directions: What of the call.
        seconds: For sampling one configuration in one round; 0 checks and does not time.
        known: Kernels and keys to pass over.

    Raises:
        Unavailable: The implementation cannot run the case.
    """
    with precision(dtype):
        return [
            tuned
            for direction in directions
            for tuned in _directed(op, implementation, values, dtype, device, direction, seconds, known)
        ]


def _directed(
    op: Op,
    implementation: str,
    values: Mapping[str, Any],
    dtype: str,
    device: str,
    direction: str,
    seconds: float,
    known: Collection[tuple[str, str]],
) -> Iterator[Tuned]:
    case = case_of(op, values, dtype, direction)
    if why := op[implementation].why_not(case, device):
        raise Unavailable(f"{op.name}/{implementation}: {why}")
    fn = op[implementation].fn
    checked = inputs_of(op, values, case, CHECK_SEED, device)
    check, call = (bind(fn, inputs, direction) for inputs in (checked, inputs_of(op, values, case, TIMED_SEED, device)))
    choices = [chosen for chosen in launches(call) if (chosen.kernel, chosen.key.text) not in known]
    if not choices:
        return
    want = truth(op, checked, direction, dtype)
    library = errors(op, bind(op["library"].fn, checked, direction)(), want)
    timer = Timer(device, "cold")
    with contextlib.ExitStack() as settled:
        for chosen in choices:
            trials = _trials(op, case, chosen, check, call, want, library, timer, seconds)
            tuned = Tuned(
                op.name, implementation, direction, chosen.kernel, chosen.key.text, trials, chosen.config, chosen.source
            )
            if tuned.best is not None:
                settled.enter_context(tuning.forced(chosen.kernel, chosen.key, tuned.best.config))
            yield tuned


def _trials(
    op: Op,
    case: Case,
    chosen: tuning.Chosen,
    check: Callable[[], Results],
    call: Callable[[], Results],
    want: Results,
    library: Errors,
    timer: Timer,
    seconds: float,
) -> tuple[Trial, ...]:
    reasons: list[str] = []
    samples: list[list[float]] = [[] for _ in chosen.candidates]
    for config in chosen.candidates:
        with tuning.forced(chosen.kernel, chosen.key, config):
            try:
                reasons.append("; ".join(errors(op, check(), want).failures(op, case, library)))
            except Exception as error:  # noqa: BLE001  compilers and drivers raise what they like; the trial says what
                reasons.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
                if timer.cuda:
                    torch.cuda.synchronize()  # raises where the context is broken: nothing after it would be true
    budget = Budget(seconds=seconds, most=50)
    for round in range(ROUNDS if seconds else 0):
        for number, config in enumerate(chosen.candidates):
            if reasons[number]:
                continue
            with tuning.forced(chosen.kernel, chosen.key, config):
                if round == 0:
                    warm_up(call, timer, min(WARM_UP_S, seconds))
                samples[number].extend(sample(call, timer, budget).device_s)
    return tuple(map(Trial, chosen.candidates, map(tuple, samples), reasons))


def case_of(op: Op, values: Mapping[str, Any], dtype: str, direction: str, memory_format: str | None = None) -> Case:
    """The case of a direction, channels-last unless told otherwise where the op has a layout."""
    recurrent = op.name in ("rnn", "lstm")
    layout = "contiguous" if recurrent else memory_format or "channels_last"
    case = op.case(values, dtype=dtype, memory_format=layout, training=direction != "forward")
    return case.without_randomness()


@dataclass(frozen=True)
class Progress:
    """One layer in one dtype by one implementation is done."""

    done: int
    total: int
    layer: Layer
    dtype: str
    implementation: str
    tuned: tuple[Tuned, ...] = ()
    reason: str = ""
    """Why nothing was tuned."""


def tune_layers(
    layers: Iterable[Layer],
    table: Path,
    *,
    device: str,
    dtypes: Iterable[str] = ("bf16",),
    implementations: Collection[str] = (),
    batch_size: int = 8,
    directions: Collection[str] = DIRECTIONS[:3],
    seconds: float = 0.03,
    resume: bool = True,
) -> Iterator[Progress]:
    """Tunes every custom implementation on every layer, and writes each result into a table as it is found.

    Args:
        layers: Such as `vidbench.layers.distinct()`.
        table: The file of this GPU: `tuning.table_name`.
        device: Where to.
        dtypes: As in `vidkernels.op.DTYPES`.
        implementations: Only these; empty for all.
        batch_size: Of every layer that names none.
        directions: What of each call.
        seconds: For sampling one configuration in one round.
        resume: Pass over what the table holds.
    """
    todo = [
        (layer, dtype, name)
        for dtype in dtypes
        for layer in layers
        for name in OPS[layer.op].implementations
        if name not in PEERS and (not implementations or name in implementations)
    ]
    for number, (layer, dtype, name) in enumerate(todo, start=1):
        values = {"batch_size": batch_size, **layer.case}
        known = held(table) if resume else ()
        try:
            tuned = tune(
                OPS[layer.op], name, values,
                dtype=dtype, device=device, directions=directions, seconds=seconds, known=known,
            )  # fmt: skip
        except Unavailable as why:
            yield Progress(number, len(todo), layer, dtype, name, reason=str(why))
            continue
        write(table, tuned)
        yield Progress(number, len(todo), layer, dtype, name, tuple(tuned))


def held(table: Path) -> set[tuple[str, str]]:
    """Kernels and keys of a table's file."""
    launches = json.loads(table.read_text()).get("launches", {}) if table.is_file() else {}
    return {(kernel, key) for kernel, entries in launches.items() for key in entries}


def write(table: Path, tuned: Iterable[Tuned]) -> None:
    """Adds what was found to a table's file."""
    for one in tuned:
        if one.best is not None:
            tuning.extend(table, "launches", one.kernel, {one.key: dict(one.best.config)})
