"""Host side of the implicit GEMM's convolutions: forward, and the input gradient, which is one as well."""

from __future__ import annotations

from math import gcd, prod

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.conv3d.triton_igemm_tiles import arithmetic, convolution_tiles
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
    sizes = conv_sizes(triple(x.shape[1:4], "x"), triple(weight.shape[1:4], "weight"), stride, padding, dilation)
    y = x.new_empty((x.shape[0], *sizes, weight.shape[0]))
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
    gpu = launch.gpu_of(x)
    samples, *in_sizes, in_channels = x.shape
    *out_sizes, out_channels = y.shape[1:]
    taps = triple(weight.shape[1:4], "weight")
    residues = transposed and stride != (1, 1, 1)
    positions = y.numel() // out_channels
    candidates = convolution_tiles(x, positions, in_channels, out_channels, prod(taps), gpu)
    key = tuning.Key(arithmetic(x), (in_channels, out_channels), (*taps, *stride), positions)
    config = tuning.pick(f"conv3d/triton_igemm/{direction}", key, candidates, gpu)
    tiles = {name: value for name, value in config.items() if name != "SPLIT"}
    split = config["SPLIT"]

    # Positions of one residue along each axis; the first residue has the most.
    steps = stride if residues else (1, 1, 1)
    classes = prod(min(s, size) for s, size in zip(steps, out_sizes, strict=True))
    rows = samples * prod(-(-size // s) for s, size in zip(steps, out_sizes, strict=True))
    blocks = -(-rows // config["BLOCK_M"]) * -(-out_channels // config["BLOCK_N"])
    target = y if split == 1 else x.new_empty((split, *y.shape), dtype=torch.float32)
    whole = split == 1
    in_unit, out_unit = gcd(in_channels, 16), gcd(out_channels, 16)
    launch.triton(
        f"{_KERNELS}:gather",
        (blocks, classes, split),
        x,
        weight,
        bias if whole else None,
        residual if whole else None,
        target,
        samples,
        *in_sizes,
        *out_sizes,
        in_channels // in_unit,
        out_channels // out_unit,
        *taps,
        *stride,
        *padding,
        *dilation,
        *(s // gcd(s, d) for s, d in zip(steps, dilation, strict=True)),
        IN_UNIT=in_unit,
        OUT_UNIT=out_unit,
        TRANSPOSED=transposed,
        RESIDUES=residues,
        ACTIVATION=activation if whole else "none",
        PRECISION=launch.precision(x),
        **tiles,
    )
    if not whole:
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
