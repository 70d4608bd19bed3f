"""Depthwise 3D convolution in CUDA C++: partial sums in registers while the walk goes along T; README.md tells how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import c_int, c_longlong
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from vidkernels import cuda_source, launch, tuning
from vidkernels.depthwise_conv3d.autograd import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Ops,
    in_pairs,
    only_shapes,
    three,
)
from vidkernels.depthwise_conv3d.case import OP, DepthwiseConv3dCase
from vidkernels.op import dtype_name
from vidkernels.shapes import Triple, conv_sizes

_SCALARS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
_ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2}
_SOURCE = "depthwise_conv3d/cuda_rolling.cu"
_REGISTERS = 65_536
_MOST_TAPS = 32
_MOST_UNROLLED = 160
"""Taps times open results: each phase of the ring is code of its own, and all should fit the instruction cache."""
_MOST_REGISTERS = 200
"""Of a thread, as estimated; the compiler may take 255."""
_OTHER_REGISTERS = {"FORWARD": 20, "INPUT_GRADIENT": 28, "WEIGHT_GRADIENT": 40}
"""Addresses and counters, by the least that the compiler was seen to make do with."""
_AHEAD_REGISTERS = 8
_BLOCKS = ((256, 2), (192, 2), (128, 3), (128, 2))
"""Threads of a block and blocks of a processor: they leave 128, 168, 168 and 255 registers to a thread."""


@dataclass(frozen=True)
class _Walk:
    """One kernel on one shape. Results are what strips lie in: y, or x where it is the input's gradient."""

    kind: str
    """FORWARD, INPUT_GRADIENT or WEIGHT_GRADIENT."""
    clips: int
    channels: int
    source: Triple
    result: Triple
    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    vector: int
    word: int
    """Registers that one loaded word takes."""

    @property
    def transposed(self) -> bool:
        return self.kind == "INPUT_GRADIENT"

    @property
    def lanes(self) -> int:
        """Threads along the channels of a block."""
        groups = ceil(self.channels / self.vector)
        return ceil(groups / self.lane_tiles)

    @property
    def lane_tiles(self) -> int:
        return ceil(ceil(self.channels / self.vector) / 32)

    @property
    def steps_ahead(self) -> int:
        """Steps of the walk before the first result is complete."""
        span = self.dilation[0] * (self.kernel[0] - 1) + 1
        return ceil((span - 1) / self.stride[0])

    @property
    def open(self) -> int:
        """Results along T that a thread holds at a time."""
        span, stride = self.dilation[0] * (self.kernel[0] - 1) + 1, self.stride[0]
        return max(span, stride) if self.transposed else ceil(span / stride)

    def columns(self, strip: int) -> int:
        """Source positions along W that a strip reads."""
        reach, stride = self.dilation[2] * (self.kernel[2] - 1), self.stride[2]
        return (strip - 1) // stride + reach // stride + 1 if self.transposed else (strip - 1) * stride + reach + 1

    def registers(self, strip: int) -> int:
        """Registers of a thread, estimated: filters, open results, one row widened, the words of a frame, the rest."""
        columns = self.columns(strip)
        kept = prod(self.kernel) + self.open * strip + columns
        return self.vector * kept + self.word * columns * self.kernel[1] + _OTHER_REGISTERS[self.kind]

    def work(self, strip: int) -> float:
        """Instructions of a thread for a source frame, estimated: products, loads and conversions, stores, the rest."""
        products: float = self.vector * prod(self.kernel) * strip
        if self.transposed:
            products /= self.stride[1] * self.stride[2]
        return products + (1 + self.vector) * self.kernel[1] * self.columns(strip) + 5 * strip + 30

    def strips(self, strip: int) -> int:
        """Strips along W; transposed ones begin at multiples of the stride in the padded row."""
        return ceil((self.result[2] + (self.padding[2] % strip if self.transposed else 0)) / strip)

    def tile(self, strip: int, threads: int) -> tuple[int, int, float]:
        """(strips, rows) of a block and how well they use it: threads at work, less for neighbours read twice."""
        strips, rows = self.strips(strip), self.result[1]
        reach_h, reach_w = self.dilation[1] * (self.kernel[1] - 1), self.dilation[2] * (self.kernel[2] - 1)
        best = (1, 1, 0.0)
        for across in range(1, min(threads // self.lanes, strips) + 1):
            down = min(threads // self.lanes // across, rows)
            used = strips * rows * self.lanes / (ceil(strips / across) * ceil(rows / down) * threads)
            halo = (strip * across + reach_w) / (strip * across) * (down + reach_h) / down
            if used / halo**0.25 > best[2]:
                best = across, down, used / halo**0.25
        return best

    def strip_lengths(self) -> list[int]:
        """Lengths that fit the registers, the best guess first."""
        step = self.stride[2] if self.transposed else 1
        lengths = {step * max(1, length // step) for length in (4, 7 if self.result[2] % 7 == 0 else 4, 2, 1)}
        fitting = [length for length in lengths if self.registers(length) <= _MOST_REGISTERS]
        known = [length for length in fitting if self.columns(length) <= 32]
        return sorted(known, key=lambda length: self.strips(length) * self.work(length))

    def refusal(self) -> str | None:
        """Why the kernel does not take this shape."""
        taps = prod(self.kernel)
        if taps > _MOST_TAPS:
            return f"kernel_size={self.kernel} has {taps} taps, more than the {_MOST_TAPS} that registers hold"
        if self.open * taps > _MOST_UNROLLED or not self.strip_lengths():
            form = f"kernel_size={self.kernel}, dilation={self.dilation} and stride={self.stride}"
            return f"{form} keep {self.open} results open, too many for one walk"
        if max(prod(self.source[1:]), prod(self.result[1:])) * self.channels >= 2**31:
            return "one frame has 2**31 elements or more"
        return None

    def candidates(self, gpu: launch.Gpu) -> Iterator[dict[str, int]]:
        """Configurations by expected time, which is estimated from whole waves of blocks."""
        found: dict[tuple[int, int, int, int, int], float] = {}
        for strip, (threads, blocks), ahead in product(self.strip_lengths()[:3], _BLOCKS, (2, 0)):
            left = min(255, _REGISTERS // (threads * blocks) // 8 * 8)
            needed = self.registers(strip) + (_AHEAD_REGISTERS if ahead else 0)
            if needed > left or (left == 255 and needed <= 168):
                continue
            across, down, _ = self.tile(strip, threads)
            frames = self.result[0]
            while True:
                waves = ceil(self.tiles(strip, across, down, frames) * self.lane_tiles / (gpu.processors * blocks))
                steps = min(frames + self.steps_ahead, self.result[0]) + 1
                # Few threads hide less of the way to memory, and the cache's news as well as a third block help.
                hidden = 1 + (100 if ahead else 150) / (threads * blocks)
                found[strip, frames, threads, blocks, ahead] = (
                    waves * threads * blocks * steps * self.work(strip) * hidden
                )
                if frames <= 2:
                    break
                frames = ceil(frames / 2)
        for choice in sorted(found, key=lambda choice: found[choice])[:8]:
            yield dict(zip(("STRIP", "FRAMES", "THREADS", "BLOCKS", "AHEAD"), choice, strict=True))

    def tiles(self, strip: int, across: int, down: int, frames: int) -> int:
        """Blocks for each tile of channels."""
        over = ceil(self.strips(strip) / across) * ceil(self.result[1] / down)
        return over * ceil(self.result[0] / frames) * self.clips

    def config(self, tensor: Tensor) -> tuning.Config:
        """The configuration to launch with."""
        name = f"depthwise_conv3d/cuda_rolling/{self.kind.lower()}"
        form = (*self.kernel, *self.stride, *self.dilation)
        positions = self.clips * prod(self.result)
        key = tuning.Key(dtype_name(tensor), (self.channels,), form, positions)
        gpu = launch.gpu_of(tensor)
        return tuning.pick(name, key, list(self.candidates(gpu)), gpu)

    def macros(self, config: tuning.Config, dtype: torch.dtype) -> dict[str, Any]:
        """Compile-time constants of the kernels, less what only one of them knows."""
        axes = "THW"
        forms = {"K": self.kernel, "S": self.stride, "D": self.dilation}
        names: dict[str, Any] = {a + axis: n for a, ns in forms.items() for axis, n in zip(axes, ns, strict=True)}
        chosen = {name: config[name] for name in ("STRIP", "THREADS", "BLOCKS", "AHEAD")}
        return (
            names
            | chosen
            | {
                "KERNEL": self.kind,
                "SCALAR": _SCALARS[dtype],
                "VECTOR": self.vector,
                "CHANNELS": self.channels,
                "ACTIVATION": 0,
                "BIAS": 0,
            }
        )

    def sizes(self, config: tuning.Config) -> tuple[list[c_int], int]:
        """The kernels' integer parameters, and how many blocks there are for each tile of channels."""
        strip, frames = config["STRIP"], min(config["FRAMES"], self.result[0])
        across, down, _ = self.tile(strip, config["THREADS"])
        numbers = (*self.source, *self.result, *self.padding, across, down, frames)
        return [c_int(number) for number in numbers], self.tiles(strip, across, down, frames)


def _walk(
    kind: str, x: Triple, y: Triple, kernel: Triple, form: Sequence[Sequence[int]], first: Tensor, *others: Tensor
) -> _Walk:
    """The walk of a kernel over `first`, (N, T, H, W, C)."""
    source, result = (y, x) if kind == "INPUT_GRADIENT" else (x, y)
    channels = first.shape[4]
    vector = 2 if in_pairs(channels, first, *others) else 1
    word = max(1, vector * first.element_size() // 4)
    stride, padding, dilation = map(three, form)
    return _Walk(kind, first.shape[0], channels, source, result, kernel, stride, padding, dilation, vector, word)


@launch.custom_op("depthwise_conv3d_rolling" + FORWARD)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    x = x.contiguous()
    n, *sizes, c = x.shape
    kernel = three(weight.shape[2:])
    out = conv_sizes(three(sizes), kernel, three(stride), three(padding), three(dilation))
    y = x.new_empty(n, *out, c)
    if only_shapes(x):
        return y
    walk = _walk("FORWARD", three(sizes), out, kernel, (stride, padding, dilation), x)
    config = walk.config(x)
    numbers, tiles = walk.sizes(config)
    macros = walk.macros(config, x.dtype) | {"ACTIVATION": _ACTIVATIONS[activation]}
    grid = tiles * walk.lane_tiles, 1, 1
    cuda_source.cuda(
        f"{_SOURCE}:walk", grid, x, weight.contiguous(), bias, y, *numbers, block=config["THREADS"], **macros
    )
    return y


@launch.custom_op("depthwise_conv3d_rolling_input_gradient" + INPUT_GRADIENT)
def _input_gradient(
    gradient: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    gradient = gradient.contiguous()
    n, *out, c = gradient.shape
    result = gradient.new_empty(n, *sizes, c)
    if only_shapes(gradient):
        return result
    form = stride, padding, dilation
    walk = _walk("INPUT_GRADIENT", three(sizes), three(out), three(weight.shape[2:]), form, gradient)
    config = walk.config(gradient)
    numbers, tiles = walk.sizes(config)
    macros = walk.macros(config, gradient.dtype)
    args = gradient, weight.contiguous(), None, result, *numbers
    cuda_source.cuda(f"{_SOURCE}:walk", (tiles * walk.lane_tiles, 1, 1), *args, block=config["THREADS"], **macros)
    return result


@launch.custom_op("depthwise_conv3d_rolling_weight_gradient" + WEIGHT_GRADIENT)
def _weight_gradient(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    gradient, x = gradient.contiguous(), x.contiguous()
    _, *sizes, c = x.shape
    weight_gradient = x.new_empty(c, 1, *kernel)
    bias_gradient = x.new_empty(c if bias else 0)
    if only_shapes(x):
        return weight_gradient, bias_gradient
    out = three(gradient.shape[1:4])
    form = stride, padding, dilation
    walk = _walk("WEIGHT_GRADIENT", three(sizes), out, three(kernel), form, x, gradient)
    config = walk.config(x)
    numbers, tiles = walk.sizes(config)
    taps = prod(kernel)
    # One wave of blocks, each of which takes every so many tiles.
    slots = launch.gpu_of(x).processors * config["BLOCKS"] // walk.lane_tiles
    turns = ceil(tiles / max(slots, 1))
    splits = ceil(tiles / turns) if tiles else 1
    partial = x.new_empty(splits, taps + bias, c, dtype=torch.float32)
    macros = walk.macros(config, x.dtype) | {"BIAS": int(bias)}
    args = x, gradient, partial, *numbers, c_longlong(tiles), c_int(splits)
    cuda_source.cuda(f"{_SOURCE}:collect", (splits * walk.lane_tiles, 1, 1), *args, block=config["THREADS"], **macros)
    grid = ceil((taps + bias) * c / 32), 1, 1
    results = partial, weight_gradient, bias_gradient if bias else None
    numbers = [c_int(splits), c_int(taps), c_int(c)]
    cuda_source.cuda(
        "depthwise_conv3d/cuda_rolling_sum.cu:sum", grid, *results, *numbers, block=256, SCALAR=_SCALARS[x.dtype]
    )
    return weight_gradient, bias_gradient


_OPS = Ops(_forward, _input_gradient, _weight_gradient)


def _limits(case: DepthwiseConv3dCase) -> str | None:
    if why := launch.dtype_refusal(case, "fp32", "tf32", "fp16", "bf16"):
        return why
    kinds = ("FORWARD", "INPUT_GRADIENT", "WEIGHT_GRADIENT") if case.training else ("FORWARD",)
    for kind in kinds:
        x, y = case.sizes, three(case.y_shape[2:])
        source, result = (y, x) if kind == "INPUT_GRADIENT" else (x, y)
        vector = 2 if case.in_channels % 2 == 0 else 1
        word = 2 if vector == 2 and case.dtype in ("fp32", "tf32") else 1
        form = case.kernel_size, case.stride, case.pad, case.dilation
        walk = _Walk(kind, case.batch_size, case.in_channels, source, result, *form, vector, word)
        if why := walk.refusal():
            return why
    return None


@OP.implementation("cuda_rolling", requires=("cuda_core",), limits=_limits)
def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
    activation: str = "none",
) -> Tensor:
    """y = activation(b + Σ taps), (N, C, T', H', W') channels-last: every input element is read from memory about once.

    Raises:
        ValueError: dtypes that differ.
    """
    return _OPS(x, weight, bias, stride, padding, dilation, activation)
