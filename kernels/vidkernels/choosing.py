"""`implementation="auto"`: the fastest implementation known for a case, and why it is thought to be so.

Measured times of this device come first (the tables of `vidkernels.tuning`), for the case's own key or the nearest one;
without any, an estimate from what is known of each implementation: bytes it moves, share of the peak it reaches,
launches. An estimate is a guess made of reasons, not a measurement, and a choice says which of them it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vidkernels import tuning
from vidkernels.launch import Gpu, gpu_of, recording
from vidkernels.op import Case, Op
from vidkernels.shapes import ITEM_BYTES
from vidkernels.tuning import Chosen, Key

LAYOUTS = ("contiguous", "channels_last")
_SIZES = ("in_channels", "mid_channels", "out_channels", "input_features", "hidden_size")
_FORM = ("kernel_size", "stride", "dilation")
_NEVER = ("reference", "compiled")
"""One is the definition; the other would spend a minute compiling in the middle of a call."""


@dataclass(frozen=True)
class Choice:
    """An implementation for a case, and what the choice rests on."""

    op: str
    implementation: str
    memory_format: str | None
    """Layout to bring the activation into before the call; None: as it is."""
    source: str
    """`exact` or `nearest: <key>` in the tables, or `estimate`."""
    key: str
    """Of the case in the tables."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of every way that was weighed, `implementation` or `implementation:layout`: measured, or estimated."""
    refused: dict[str, str] = field(default_factory=dict)
    """Implementations that cannot run the case here, with the reason."""
    launches: tuple[Chosen, ...] = ()
    """The launch configurations that a custom implementation takes, forward."""

    def __str__(self) -> str:
        """A few lines for people."""
        kind = "estimated" if self.source == "estimate" else "measured"
        layout = f" in {self.memory_format}" if self.memory_format else ""
        lines = [f"{self.op}: {self.implementation}{layout} ({self.source}; {self.key})"]
        lines += [
            f"  {way:28} {seconds * 1e6:10.1f} µs {kind}"
            for way, seconds in sorted(self.seconds.items(), key=lambda item: item[1])
        ]
        lines += [f"  {name:28} cannot: {why}" for name, why in self.refused.items()]
        lines += [f"  {c.kernel} {dict(c.config)} ({c.source})" for c in self.launches]
        return "\n".join(lines)


def case_key(op: Op, case: Any) -> Key:
    """What a case is looked up by: dtype, channels, kernel and stride, and the number of output positions."""
    sizes = tuple(getattr(case, name) for name in _SIZES if getattr(case, name, None) is not None)
    recurrent = hasattr(case, "hidden_size")
    if recurrent:
        # Frames are taken one after the other: a long clip is not a large batch.
        sizes = (*sizes, case.clip_length)
    form: list[int] = []
    for name in _FORM:
        value = getattr(case, name, ())
        form += value if isinstance(value, tuple) else (value,)
    shape = case.x_shape if recurrent else case.y_shape
    channels_at = 2 if recurrent else 1
    positions = math.prod(size for axis, size in enumerate(shape) if axis != channels_at)
    return Key(case.dtype, sizes, tuple(form), positions)


def direction(case: Case) -> str:
    """`forward` or `train`: the part of the tables that a case belongs to."""
    return "train" if case.training else "forward"


def ways(op: Op, case: Case, device: torch.device) -> tuple[dict[str, tuple[str, str | None]], dict[str, str]]:
    """What can compute a case, and what cannot and why.

    A way is an implementation; where torch's own takes another path in each layout, each is a way of its own.
    """
    possible: dict[str, tuple[str, str | None]] = {}
    refused: dict[str, str] = {}
    for name, implementation in op.implementations.items():
        if name in _NEVER:
            continue
        if why := implementation.why_not(case, device):
            refused[name] = why
        elif device.type == "cpu" and "triton" in implementation.requires:
            refused[name] = "Triton's interpreter is for tests"
        elif name == "library" and hasattr(case, "height"):
            possible |= {f"{name}:{layout}": (name, layout) for layout in LAYOUTS}
        else:
            possible[name] = (name, None)
    return possible, refused


def choose(op: Op, case: Case, device: torch.device | str = "cpu", *, gpu: Gpu | None = None) -> Choice:
    """The way to compute a case on a device.

    Args:
        op: The op.
        case: Its sizes.
        device: Where; `meta` stands for a GPU that is not there.
        gpu: Which GPU; None: the device's own.
    """
    device = torch.device(device)
    if device.type != "cpu" and gpu is None:
        gpu = gpu_of(torch.empty(0, device=device))
    # The layout of the input is what is being chosen, and names no other case.
    case = replace(case, memory_format="contiguous")
    place = op.name, case, device, gpu, tuning.generation()
    if place not in _choices:
        if len(_choices) >= 4096:
            _choices.clear()
        _choices[place] = _choose(op, case, device, gpu)
    return _choices[place]


_choices: dict[Any, Choice] = {}


def _choose(op: Op, case: Any, device: torch.device, gpu: Gpu | None) -> Choice:
    possible, refused = ways(op, case, torch.device("cuda") if device.type == "meta" else device)
    key = case_key(op, case)
    machine = "cpu" if gpu is None else gpu.name
    known = tuning.table(machine)["implementations"].get(f"{op.name}/{direction(case)}", {})
    for text, source in tuning.nearest(key, known):
        measured = {way: seconds for way, seconds in known[text].items() if way in possible}
        if measured:
            return _choice(op.name, possible, refused, key, measured, source)
    estimates = {way: _estimate(op, case, *possible[way], gpu) for way in possible}
    return _choice(op.name, possible, refused, key, estimates, "estimate")


def _choice(
    name: str,
    possible: dict[str, tuple[str, str | None]],
    refused: dict[str, str],
    key: Key,
    seconds: dict[str, float],
    source: str,
) -> Choice:
    implementation, layout = possible[min(seconds, key=lambda way: seconds[way])]
    return Choice(name, implementation, layout, source, key.text, seconds, refused)


@dataclass(frozen=True)
class _Prior:
    """What is believed of an implementation before anything is measured."""

    traffic: float = 1.0
    """Bytes moved, in multiples of the compulsory ones."""
    peak: float = 0.6
    """Share of the device's matrix throughput that it reaches."""
    launches: Callable[[Any], float] = lambda case: 1.0


def _frames(case: Any) -> float:
    return float(case.clip_length)


# Reasons: torch's depthwise kernels read every input once for every tap, cuDNN's channels-last one less often; its
# (2+1)D pair and TCN block write and read every intermediate; cuDNN wants channels-last, and transposes otherwise;
# stems of three channels fill an eighth of a matrix instruction; cuDNN's LSTM takes one step after the other.
_PRIORS: dict[tuple[str, str], _Prior] = {
    ("conv3d", "library:contiguous"): _Prior(3.0, 0.5),
    ("conv3d", "library:channels_last"): _Prior(1.0, 0.6),
    ("conv3d", "onednn"): _Prior(1.0, 0.6),
    ("conv3d", "matmul"): _Prior(1.0, 0.75),
    ("conv3d", "triton_igemm"): _Prior(1.0, 0.55),
    ("conv3d", "triton_stem"): _Prior(1.5, 0.6),
    ("depthwise_conv3d", "library:contiguous"): _Prior(12.0, 0.03),
    ("depthwise_conv3d", "library:channels_last"): _Prior(8.0, 0.03),
    ("depthwise_conv3d", "cuda_rolling"): _Prior(1.5, 0.03),
    ("depthwise_conv3d", "triton_direct"): _Prior(3.0, 0.03),
    ("conv2plus1d", "library:contiguous"): _Prior(12.0, 0.4, lambda case: 4.0),
    ("conv2plus1d", "library:channels_last"): _Prior(8.0, 0.5, lambda case: 4.0),
    ("conv2plus1d", "onednn"): _Prior(8.0, 0.5, lambda case: 4.0),
    ("conv2plus1d", "triton_fused"): _Prior(4.0, 0.5, lambda case: 3.0),
    ("causal_conv1d", "library"): _Prior(4.0, 0.4, lambda case: 2.0),
    ("causal_conv1d", "triton_phased"): _Prior(1.2, 0.5),
    ("tcn_block", "library"): _Prior(12.0, 0.4, lambda case: 12.0),
    ("tcn_block", "triton_fused"): _Prior(2.0, 0.4, lambda case: 3.0),
    ("lstm", "library"): _Prior(2.0, 0.3, lambda case: 1.5 * _frames(case)),
    ("lstm", "triton_gates"): _Prior(2.0, 0.3, lambda case: 2.0 + _frames(case)),
    ("lstm", "triton_block"): _Prior(2.0, 0.02, lambda case: 3.0 + 0.3 * _frames(case)),
    ("lstm", "cuda_cluster"): _Prior(2.0, 0.1, lambda case: 3.0 + 0.4 * _frames(case)),
}
_PRIORS |= {("rnn", way): prior for (op, way), prior in _PRIORS.items() if op == "lstm"}

_LAUNCH_S = 4e-6


def _estimate(op: Op, case: Any, implementation: str, layout: str | None, gpu: Gpu | None) -> float:
    """Seconds by a roofline with the priors; only their order matters."""
    way = f"{implementation}:{layout}" if layout else implementation
    prior = _PRIORS.get((op.name, way), _Prior())
    macs, bytes_moved = op.macs(case), op.bytes_moved(case)
    if gpu is None:
        return _cpu_estimate(op, case, way, macs, bytes_moved)
    if op.name == "conv3d" and case.in_channels <= 4 and implementation in ("library", "triton_igemm"):
        prior = replace(prior, peak=prior.peak * case.in_channels / 16)
    # Copy and bf16 throughput of the generations, rounded: the ratio decides what is bound by bytes.
    bandwidth, flops = {8: (1.5e12, 3e14), 9: (4e12, 8e14)}.get(gpu.capability // 10, (7e12, 16e14))
    if ITEM_BYTES[case.dtype] == 4:
        flops /= 2 if case.dtype == "tf32" else 12
    direction_factor = 3.0 if case.training else 1.0
    compute = 2 * macs / (flops * prior.peak)
    traffic = prior.traffic * bytes_moved / bandwidth
    return direction_factor * (max(compute, traffic) + _LAUNCH_S * prior.launches(case))


def _cpu_estimate(op: Op, case: Any, way: str, macs: int, bytes_moved: int) -> float:
    """A CPU's: oneDNN is left by torch at a batch of one, and depthwise needs its channels side by side."""
    rate = 1e11
    if op.name == "depthwise_conv3d":
        rate *= 0.5 if way == "library:channels_last" else 0.1
    elif way.startswith("library") and hasattr(case, "height"):
        pointwise = getattr(case, "kernel_size", None) == (1, 1, 1)
        rate *= 0.2 if case.batch_size == 1 and not pointwise and case.dtype == "fp32" else 0.9
    if way.endswith(":contiguous"):
        rate *= 0.8
    return 2 * macs / rate + bytes_moved / 1e10


def explain(op: Op, case: Case, device: torch.device | str = "cpu", *, gpu: Gpu | None = None) -> Choice:
    """`choose`, with the launch configurations that the chosen implementation takes on a GPU."""
    choice = choose(op, case, device, gpu=gpu)
    device = torch.device(device)
    if device.type == "cpu":
        return choice
    inputs = op.inputs(case, device="meta")
    with torch.no_grad(), recording(gpu or gpu_of(torch.empty(0, device=device))), tuning.watching() as chosen:
        op[choice.implementation].fn(*inputs.args, **inputs.kwargs)
    return replace(choice, launches=tuple(chosen))


def run(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call by the implementation that `choose` names."""
    if torch.compiler.is_compiling():
        # Shapes are constants of a graph, and so is the choice.
        described = tuple(_described(arg) for arg in args)
        implementation, layout = _constant_choice(op.name, described, tuple(kwargs.items()))
    else:
        choice = choose(op, op.case_of_call(args, kwargs), args[0].device)
        implementation, layout = choice.implementation, choice.memory_format
    return op[implementation].fn(*laid_out(args, layout), **kwargs)


def laid_out(args: tuple[Any, ...], layout: str | None) -> tuple[Any, ...]:
    """The arguments with the activation in a layout; filters are small, and stay."""
    if layout is None or args[0].dim() != 5:
        return args
    memory_format = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
    return (args[0].contiguous(memory_format=memory_format), *args[1:])


def _described(value: Any) -> Any:
    """An argument as constants that a graph may hold."""
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), str(value.dtype), str(value.device), value.requires_grad
    if isinstance(value, tuple):
        return "tuple", type(value), tuple(_described(part) for part in value)
    return "value", value


def _restored(described: Any) -> Any:
    kind, *rest = described
    if kind == "tensor":
        shape, dtype, _, gradient = rest
        floating = getattr(torch, dtype.removeprefix("torch."))
        return torch.empty(shape, dtype=floating, device="meta", requires_grad=gradient)
    if kind == "tuple":
        parts = [_restored(part) for part in rest[1]]
        return rest[0](*parts) if hasattr(rest[0], "_fields") else rest[0](parts)
    return rest[0]


def _constant_choice(name: str, described: Any, parameters: Any) -> tuple[str, str | None]:
    from vidkernels import OPS

    op = OPS[name]
    device = torch.device(described[0][3])
    case = op.case_of(*map(_restored, described), **dict(parameters))
    if case.dtype == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        case = replace(case, dtype="tf32")
    choice = choose(op, case, device)
    return choice.implementation, choice.memory_format


# What `torch.compiler.assume_constant_result` does, but for importing dynamo, and Triton with it, on the way.
_constant_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]
