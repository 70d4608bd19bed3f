"""First layers, with four input channels at most: an implicit matrix product over windows of packed rows.

A copy of the clip holds its pixels padded to 1, 2 or 4 channels and every row padded along W. A row of the filter then
meets one contiguous window of the row, kW pixels and a little more, and windows of neighbouring outputs overlap: the
product has one step for each (kt, kh), of loads that are aligned to 16 bytes and need no mask. Where the stride is
odd, two or more outputs along W share a window, so that windows stay aligned, and their columns lie side by side as
they do in the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.conv3d.case import ACTIVATIONS, OP, Conv3dCase
from vidkernels.op import dtype_name, wants_gradients
from vidkernels.shapes import Triple, conv_sizes, triple

_KERNELS = "conv3d.triton_stem_kernels"
_ALIGNED = 8
"""Elements in 16 bytes of a 16-bit type."""


@dataclass(frozen=True)
class _Geometry:
    """How a clip is packed, and which windows its outputs meet."""

    channels: int
    pixel: int
    """Channels of a packed pixel."""
    kernel: Triple
    stride: Triple
    out: Triple
    group: int
    """Outputs along W that share a window."""
    window: int
    """Elements of it."""
    columns: int
    """Windows in a row."""
    packed: Triple
    """(T, H, elements of a row) of the packed clip."""

    @property
    def step(self) -> int:
        """Elements from one window to the next, a multiple of 16 bytes."""
        return self.group * self.stride[2] * self.pixel

    def groups(self, batch_size: int) -> int:
        """Windows for each tap row: rows of the matrix product."""
        return batch_size * self.out[0] * self.out[1] * self.columns

    @property
    def indices(self) -> tuple[int, ...]:
        """The sizes that kernels find a window by."""
        frames, height, length = self.packed
        t, h, w = self.out
        return self.columns, h, t, w, frames, height, length // _ALIGNED, *self.stride[:2]


def _geometry(channels: int, sizes: Triple, kernel: Triple, stride: Triple, padding: Triple) -> _Geometry:
    out = conv_sizes(sizes, kernel, stride, padding, (1, 1, 1))
    pixel = _power_of_2(channels)
    group = 1
    while group * stride[2] * pixel % _ALIGNED:
        group *= 2
    used = ((group - 1) * stride[2] + kernel[2]) * pixel
    window = max(_power_of_2(used), 16) if used <= 64 else _rounded_up(used, 64)
    columns = _quotient_up(out[2], group)
    length = _rounded_up((columns - 1) * group * stride[2] * pixel + window, _ALIGNED)
    packed = (out[0] - 1) * stride[0] + kernel[0], (out[1] - 1) * stride[1] + kernel[1], length
    return _Geometry(channels, pixel, kernel, stride, out, group, window, columns, packed)


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    """The shape; torch.compile makes a graph for each, as launches depend on it."""
    return tuple(int(size) for size in tensor.shape)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _quotient_up(size: int, divisor: int) -> int:
    return -(-size // divisor)


def _rounded_up(size: int, multiple: int) -> int:
    return _quotient_up(size, multiple) * multiple


def _limits(case: Conv3dCase) -> str | None:
    if case.in_channels > 4:
        return f"in_channels={case.in_channels}: it takes 4 at most"
    if any(k > 1 and d > 1 for k, d in zip(case.kernel_size, case.dilation, strict=True)):
        return f"dilation={case.dilation}: it takes 1 alone"
    if case.batch_size * prod(case.y_shape[2:]) >= 2**31:
        return "more than 2**31 positions: they are counted in 32 bits"
    return launch.dtype_refusal(case, "fp32", "tf32", "fp16", "bf16")


def _packed_input(x: Tensor, geometry: _Geometry, padding: Triple) -> Tensor:
    """The clip as (N, T, H, elements of a row), zeros around it."""
    n, c, t, h, w = _sizes(x)
    frames, height, length = geometry.packed
    packed = x.new_empty((n, frames, height, length))
    rows = n * frames * height
    block = min(_power_of_2(length), 512)
    config = {"BLOCK_R": 1024 // block * 2, "BLOCK_E": block}
    launch.triton(
        f"{_KERNELS}:pack_input",
        (_quotient_up(rows, config["BLOCK_R"]), _quotient_up(length, block)),
        x,
        packed,
        rows,
        *(t, h, w),
        *(frames, height, length // _ALIGNED),
        *padding,
        *x.stride(),
        CHANNELS=c,
        PIXEL=geometry.pixel,
        num_warps=4,
        num_stages=1,
        **config,
    )
    return packed


@launch.custom_op(
    "conv3d_stem(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "str activation) -> Tensor"
)
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    activation: str,
) -> Tensor:
    """y in (N, T', H', W', C_out), of x (N, C_in, T, H, W) in any strides and a residual laid out as y."""
    pad = triple(padding, "padding")
    n, c, *sizes = _sizes(x)
    c_out, _, *taps = _sizes(weight)
    kernel = triple(taps, "kernel_size")
    geometry = _geometry(c, triple(sizes, "x"), kernel, triple(stride, "stride"), pad)
    y = x.new_empty((n, *geometry.out, c_out))
    groups, width = geometry.groups(n), geometry.group * c_out
    gpu = launch.gpu_of(x)
    candidates = [*_forward_candidates(x, geometry, c_out, groups, gpu)]
    config = tuning.pick("conv3d/triton_stem/forward", _key(x, geometry, c_out, groups), candidates, gpu)
    tiles = _quotient_up(width, config["BLOCK_N"])
    columns = tiles * config["BLOCK_N"]

    packed = _packed_input(x, geometry, pad)
    filters = x.new_empty((kernel[0] * kernel[1], geometry.window, columns))
    launch.triton(
        f"{_KERNELS}:pack_weight",
        (_quotient_up(filters.numel(), 1024),),
        weight.contiguous(),
        filters,
        C_OUT=c_out,
        C_IN=c,
        TAPS=kernel[0] * kernel[1],
        K_W=kernel[2],
        STRIDE_W=stride[2],
        PIXEL=geometry.pixel,
        WINDOW=geometry.window,
        COLUMNS=columns,
        BLOCK=1024,
        num_warps=4,
        num_stages=1,
    )
    launch.triton(
        f"{_KERNELS}:forward",
        (_quotient_up(groups, config["BLOCK_M"]), tiles),
        packed,
        filters,
        bias,
        residual if residual is None else residual.contiguous(),
        y,
        groups,
        *geometry.indices,
        C_OUT=c_out,
        GROUP=geometry.group,
        STEP=geometry.step,
        K_T=kernel[0],
        K_H=kernel[1],
        CHUNKS=geometry.window // config["BLOCK_K"],
        COLUMNS=columns,
        ACTIVATION=activation,
        PRECISION=launch.precision(x),
        **config,
    )
    return y


def _key(x: Tensor, geometry: _Geometry, c_out: int, groups: int) -> tuning.Key:
    dtype = "tf32" if launch.precision(x) == "tf32" else dtype_name(x)
    form = (*geometry.kernel, *geometry.stride)
    return tuning.Key(dtype, sizes=(geometry.channels, c_out), form=form, positions=groups)


def _forward_candidates(
    x: Tensor, geometry: _Geometry, c_out: int, groups: int, gpu: launch.Gpu
) -> Iterator[dict[str, int]]:
    exact = x.dtype is torch.float32 and launch.precision(x) == "ieee"
    widest = min(max(_power_of_2(geometry.group * c_out), 16), 64 if exact else 128)
    k = min(geometry.window, 16 if exact else 64)
    tiles = [(64, 4, 2), (64, 8, 2), (32, 4, 2)] if exact else [(128, 8, 4), (128, 4, 4), (64, 4, 4), (256, 8, 3)]
    if c_out % 8:
        # Results are stored one by one, each by an address of its own: larger tiles spill.
        tiles = [tile for tile in tiles if tile[0] < 256]
    if groups <= 64 * gpu.processors:
        tiles.sort()
    for rows, warps, stages in tiles:
        for columns in (widest, 64) if widest > 64 else (widest,):
            shared = stages * k * (rows + columns) * x.element_size()
            # The result passes through shared memory on its way out.
            if max(shared, rows * columns * 4) <= gpu.shared_bytes and rows * columns <= 128 * 32 * warps:
                yield {
                    "BLOCK_M": rows,
                    "BLOCK_N": columns,
                    "BLOCK_K": k,
                    "num_warps": warps,
                    "num_stages": stages,
                }


@launch.custom_op(
    "conv3d_stem_weight_gradient(Tensor x, Tensor g, int[] kernel_size, int[] stride, int[] padding) -> Tensor"
)
def weight_gradient(x: Tensor, g: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """(C_out, C_in, kT, kH, kW) of x (N, C_in, T, H, W) and g (N, T', H', W', C_out): sums in float32, rounded once."""
    pad, kernel = triple(padding, "padding"), triple(map(int, kernel_size), "kernel_size")
    n, c, *sizes = _sizes(x)
    c_out = _sizes(g)[4]
    geometry = _geometry(c, triple(sizes, "x"), kernel, triple(stride, "stride"), pad)
    groups, width, taps = geometry.groups(n), geometry.group * c_out, kernel[0] * kernel[1]
    length = taps * geometry.window
    gpu = launch.gpu_of(x)
    candidates = [*_gradient_candidates(x, length, width, gpu)]
    config = tuning.pick("conv3d/triton_stem/weight_gradient", _key(x, geometry, c_out, groups), candidates, gpu)
    tiles = _quotient_up(length, config["BLOCK_J"]), _quotient_up(width, config["BLOCK_N"])
    steps = _quotient_up(groups, config["BLOCK_M"])
    # Two rounds of blocks for each processor: few enough partial sums, and a short tail.
    steps_each = max(_quotient_up(steps * prod(tiles), 2 * gpu.processors), 1)
    splits = max(_quotient_up(steps, steps_each), 1)

    packed = _packed_input(x, geometry, pad)
    partial = x.new_empty((splits, width, length), dtype=torch.float32)
    launch.triton(
        f"{_KERNELS}:weight_gradient",
        (*tiles, splits),
        packed,
        g.contiguous(),
        partial,
        groups,
        *geometry.indices,
        steps_each if groups else 0,
        C_OUT=c_out,
        GROUP=geometry.group,
        STEP=geometry.step,
        K_H=kernel[1],
        WINDOW=geometry.window,
        TAPS=taps,
        PRECISION=launch.precision(x),
        **config,
    )
    gradient = x.new_empty((c_out, c, *kernel))
    launch.triton(
        f"{_KERNELS}:reduce_weight_gradient",
        (_quotient_up(gradient.numel(), 64),),
        partial,
        gradient,
        splits,
        C_OUT=c_out,
        C_IN=c,
        TAPS=taps,
        K_W=kernel[2],
        STRIDE_W=stride[2],
        GROUP=geometry.group,
        PIXEL=geometry.pixel,
        WINDOW=geometry.window,
        BLOCK_S=16,
        BLOCK_E=64,
        num_warps=4,
        num_stages=1,
    )
    return gradient


def _gradient_candidates(x: Tensor, length: int, width: int, gpu: launch.Gpu) -> Iterator[dict[str, int]]:
    exact = x.dtype is torch.float32 and launch.precision(x) == "ieee"
    columns = min(max(_power_of_2(width), 16), 64 if exact else 128)
    # 64 sums a thread: twice as many do not leave room for the addresses.
    longest = min(max(_power_of_2(length), 16), 64 if exact else 128 * 128 // max(columns, 64))
    for j in (longest, longest // 2, longest // 4):
        for rows, stages in ((16, 2),) if exact else ((64, 3), (32, 4)):
            warps = 8 if columns * j > 64 * 128 else 4
            shared = stages * rows * (columns + j) * x.element_size()
            if j >= 16 and shared <= gpu.shared_bytes:
                yield {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_J": j, "num_warps": warps, "num_stages": stages}


@launch.custom_op(
    "conv3d_stem_input_gradient(Tensor g, Tensor weight, int[] sizes, int[] stride, int[] padding) -> Tensor"
)
def input_gradient(g: Tensor, weight: Tensor, sizes: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """(N, T, H, W, C_in) of g (N, T', H', W', C_out); `sizes` are (T, H, W)."""
    n, t_out, h_out, w_out, c_out = _sizes(g)
    _, c, k_t, k_h, k_w = _sizes(weight)
    t, h, w = map(int, sizes)
    pixel = _power_of_2(c)
    # So many input positions are computed side by side that the matrix product has 16 columns at least.
    run = stride[2] * _quotient_up(16, pixel * stride[2])
    columns = max(_power_of_2(run * pixel), 16)
    first_shift = -((k_w - 1) // stride[2])
    shifts = (run - 1) // stride[2] - first_shift + 1
    runs = (padding[2] + w - 1) // run - padding[2] // run + 1

    gpu = launch.gpu_of(g)
    key = tuning.Key(
        "tf32" if launch.precision(g) == "tf32" else dtype_name(g),
        sizes=(c, c_out),
        form=(k_t, k_h, k_w, *stride),
        positions=n * t * h * w,
    )
    rows = _rounded_up(c_out, 16)
    candidates = [*_input_candidates(g, runs, shifts * rows)]
    config = tuning.pick("conv3d/triton_stem/input_gradient", key, candidates, gpu)
    length = _rounded_up(shifts * rows, config["BLOCK_K"])
    filters = g.new_empty((k_t * k_h, length, columns))
    form = {
        "C_OUT": c_out,
        "C_IN": c,
        "STRIDE_W": stride[2],
        "PIXEL": pixel,
        "RUN": run,
        "FIRST_SHIFT": first_shift,
        "ROWS": rows,
        "LENGTH": length,
        "COLUMNS": columns,
    }
    launch.triton(
        f"{_KERNELS}:pack_weight_transposed",
        (_quotient_up(filters.numel(), 1024),),
        weight.contiguous(),
        filters,
        TAPS=k_t * k_h,
        K_W=k_w,
        BLOCK=1024,
        num_warps=4,
        num_stages=1,
        **form,
    )
    gradient = g.new_empty((n, t, h, w, c))
    launch.triton(
        f"{_KERNELS}:input_gradient",
        (n * t * h, _quotient_up(runs, config["BLOCK_M"])),
        g.contiguous(),
        filters,
        gradient,
        *(t, h, w),
        *(t_out, h_out, w_out),
        *stride[:2],
        *padding,
        K_T=k_t,
        K_H=k_h,
        SHIFTS=shifts,
        PRECISION=launch.precision(g),
        **form,
        **config,
    )
    return gradient


def _input_candidates(g: Tensor, runs: int, length: int) -> Iterator[dict[str, int]]:
    exact = g.dtype is torch.float32 and launch.precision(g) == "ieee"
    wide = min(max(_power_of_2(runs), 16), 128)
    k = min(_power_of_2(length), 32 if exact else 64)
    for rows in sorted({wide, max(wide // 2, 16)}, reverse=True):
        for warps in (4, 2):
            yield {"BLOCK_M": rows, "BLOCK_K": k, "num_warps": warps, "num_stages": 3}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, ctx.stride, ctx.padding, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    g_x = g_weight = g_bias = None
    if ctx.needs_input_grad[0]:
        g_x = input_gradient(g, weight, list(x.shape[2:]), ctx.stride, ctx.padding).permute(0, 4, 1, 2, 3)
    if ctx.needs_input_grad[1]:
        g_weight = weight_gradient(x, g, list(weight.shape[2:]), ctx.stride, ctx.padding)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        g_bias = g.sum((0, 1, 2, 3), dtype=torch.float32).to(g.dtype)
    return g_x, g_weight, g_bias, None, None, None, None


forward.register_autograd(_backward, setup_context=_setup)  # type: ignore[attr-defined]


@OP.implementation("triton_stem", requires=("triton",), limits=_limits)
def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
    activation: str = "none",
) -> Tensor:
    """Convolution of a clip of few channels.

    A window holds up to a few pixels more than its filter's row, with weights of zero: an infinity or NaN in the clip
    reaches that many more outputs to its left.

    Args:
        x: Clip or flow, (N, C_in, T, H, W) in any strides, C_in ≤ 4.
        weight: Filters, (C_out, C_in, kT, kH, kW).
        bias: (C_out,), or None.
        residual: (N, C_out, T', H', W'), or None.
        stride: Between outputs.
        padding: Zeros at either end.
        dilation: 1, or anything where the kernel's size is 1.
        activation: Applied last; fused, with the residual, where no gradient is wanted.

    Returns:
        (N, C_out, T', H', W') in channels_last_3d.

    Raises:
        ValueError: x and weight of different dtypes.
    """
    x, weight, bias, residual = launch.autocast(x, weight, bias, residual)
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight is {weight.dtype}: they must be the same")
    step, pad = [*triple(stride, "stride")], [*triple(padding, "padding")]
    shortcut = residual if residual is None else residual.permute(0, 2, 3, 4, 1)
    if wants_gradients(x, weight, bias, residual):
        y: Tensor = forward(x, weight, bias, None, step, pad, "none")
        y = ACTIVATIONS[activation](y if shortcut is None else y + shortcut)
    else:
        y = forward(x, weight, bias, shortcut, step, pad, activation)
    return y.permute(0, 4, 1, 2, 3)
