"""Host side of the implicit GEMM's convolutions: forward, and the input gradient, which is one as well."""

from __future__ import annotations

from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vidkernels import launch, tuning
from vidkernels.conv3d.triton_igemm_tiles import (
    aligned,
    arithmetic,
    box,
    convolution_tiles,
    copied_as_boxes,
    sides,
    tensor_map,
)
from vidkernels.shapes import Shape, Triple, conv_sizes, triple

_KERNELS = "conv3d.triton_igemm_kernels"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    activation: str,
) -> Tensor:
    """activation(x ∗ weight + bias + residual).

    Args:
        x: (N, T, H, W, C_in), contiguous.
        weight: (C_out, kT, kH, kW, C_in), contiguous.
        bias: (C_out,).
        residual: Of the result's shape, contiguous.

    Returns:
        (N, T', H', W', C_out), contiguous, dtype of x.
    """
    (t, h, w), (k_t, k_h, k_w) = x.shape[1:4], weight.shape[1:4]
    y = x.new_empty((x.shape[0], *conv_sizes((t, h, w), (k_t, k_h, k_w), stride, padding, dilation), weight.shape[0]))
    _convolve("forward", x, weight, bias, residual, y, stride, padding, dilation, activation, transposed=False)
    return y


def input_gradient(
    g: Tensor, weight: Tensor, x_shape: Shape, stride: Triple, padding: Triple, dilation: Triple
) -> Tensor:
    """The gradient of `forward` by x.

    Args:
        g: By the result, (N, T', H', W', C_out), contiguous.
        weight: (C_out, kT, kH, kW, C_in), contiguous.
        x_shape: (N, T, H, W, C_in).

    Returns:
        (N, T, H, W, C_in), contiguous, dtype of g.
    """
    gx = g.new_empty(x_shape)
    if stride == (1, 1, 1):
        # The convolution of g that walks the taps backwards, from p on: all of its offsets change sign.
        padding, dilation = triple((-p for p in padding), "padding"), triple((-d for d in dilation), "dilation")
    _convolve("input_gradient", g, weight, None, None, gx, stride, padding, dilation, "none", transposed=True)
    return gx


def _convolve(
    direction: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    activation: str,
    *,
    transposed: bool,
) -> None:
    """Launches what computes y from x; all are channels-last and contiguous."""
    if isinstance(x, FakeTensor):
        return  # Its sizes may be symbols, and there is nothing to launch.
    gpu = launch.gpu_of(x)
    samples, in_channels, out_channels = x.shape[0], x.shape[-1], y.shape[-1]
    out_sizes = triple(y.shape[1:4], "y")
    taps = triple(weight.shape[1:4], "weight")
    residues = transposed and stride != (1, 1, 1)
    boxed = copied_as_boxes(gpu) and (transposed or stride == (1, 1, 1))
    # Positions of one residue along each axis; the first residue has the most.
    steps = stride if residues else (1, 1, 1)
    classes = prod(min(s, size) for s, size in zip(steps, out_sizes, strict=True))
    t, h, w = (-(-size // s) for s, size in zip(steps, out_sizes, strict=True))

    positions = samples * prod(out_sizes)
    candidates = convolution_tiles(x, positions, in_channels, out_channels, prod(taps), gpu, boxed=boxed)
    key = tuning.Key(arithmetic(x), (in_channels, out_channels), (*taps, *stride), positions)
    config = tuning.pick(f"conv3d/triton_igemm/{direction}", key, candidates, gpu)
    block_m, block_n, block_k, split = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT"))
    target = y if split == 1 else x.new_empty((split, *y.shape), dtype=torch.float32)
    added = (bias, residual) if split == 1 else (None, None)
    tap_strides = (s // gcd(s, d) for s, d in zip(steps, dilation, strict=True))
    geometry = (*taps, *stride, *padding, *dilation, *tap_strides)
    out_unit = gcd(out_channels, 16)
    constants: dict[str, Any] = {
        "OUT_UNIT": out_unit,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "TRANSPOSED": transposed,
        "RESIDUES": residues,
        "ACTIVATION": activation if split == 1 else "none",
        "PRECISION": launch.precision(x),
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }
    if boxed:
        tail = config["TAIL"]
        shape = box(block_m, (samples, t, h, w))
        blocks = prod(-(-size // side) for size, side in zip((samples, t, h, w), shape, strict=True))
        x, filters = aligned(x), aligned(weight)
        tap_channels = filters.shape[-1]
        filters = filters.flatten(1)
        launch.triton(
            f"{_KERNELS}:boxes",
            (blocks * -(-out_channels // (block_n + tail)), classes, split),
            tensor_map(x, (*shape, block_k)),
            tensor_map(filters, (block_k, block_n) if transposed else (block_n, block_k)),
            tensor_map(filters, (block_k, tail) if transposed else (tail, block_k)) if tail else None,
            *added,
            target,
            samples,
            *out_sizes,
            in_channels,
            out_channels // out_unit,
            tap_channels,
            *geometry,
            TAIL=tail,
            WEIGHT_FIRST=config["WEIGHT_FIRST"],
            **sides(shape),
            **constants,
        )
    else:
        x = aligned(x)
        missing = x.shape[-1] - in_channels
        weight = F.pad(weight, (0,) * 9 + (missing,) if transposed else (0, missing)) if missing else weight
        in_channels = x.shape[-1]
        in_unit = gcd(in_channels, 16)
        launch.triton(
            f"{_KERNELS}:gather",
            (-(-(samples * t * h * w) // block_m) * -(-out_channels // block_n), classes, split),
            x,
            weight,
            *added,
            target,
            samples,
            *x.shape[1:4],
            *out_sizes,
            in_channels // in_unit,
            out_channels // out_unit,
            *geometry,
            IN_UNIT=in_unit,
            BLOCK_M=block_m,
            **constants,
        )
    if split > 1:
        add_parts(target, bias, residual, y, activation)


def add_parts(partial: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, activation: str) -> None:
    """Writes activation(Σ partial + bias + residual) to y: float32 sums of a fixed order, rounded once."""
    block = 1024
    launch.triton(
        f"{_KERNELS}:add_parts",
        (-(-y.numel() // block), 1, 1),
        partial,
        bias,
        residual,
        y,
        y.numel(),
        y.shape[-1],
        partial.shape[0],
        BLOCK=block,
        ACTIVATION=activation,
        num_warps=4,
        num_stages=2,
    )
