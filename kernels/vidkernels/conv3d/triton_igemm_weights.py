"""Host side of the implicit GEMM's weight gradient."""

from __future__ import annotations

from math import gcd, prod

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.conv3d.triton_igemm_products import add_parts
from vidkernels.conv3d.triton_igemm_tiles import arithmetic, weight_tiles
from vidkernels.shapes import Triple


def weight_gradient(
    x: Tensor, g: Tensor, kernel_size: Triple, stride: Triple, padding: Triple, dilation: Triple
) -> Tensor:
    """The gradient of a convolution by its weight.

    Args:
        x: (N, T, H, W, C_in), contiguous.
        g: By the result, (N, T', H', W', C_out), contiguous.

    Returns:
        (C_out, kT, kH, kW, C_in), contiguous: float32 sums, rounded to the dtype of x.
    """
    gpu = launch.gpu_of(x)
    samples, *in_sizes, in_channels = x.shape
    *out_sizes, out_channels = g.shape[1:]
    positions = samples * prod(out_sizes)
    gw = x.new_empty((out_channels, *kernel_size, in_channels))
    candidates = weight_tiles(x, positions, in_channels, out_channels, prod(kernel_size), gpu)
    key = tuning.Key(arithmetic(x), (in_channels, out_channels), (*kernel_size, *stride), positions)
    config = tuning.pick("conv3d/triton_igemm/weight_gradient", key, candidates, gpu)
    tiles = {name: value for name, value in config.items() if name != "SPLIT"}
    split = config["SPLIT"]
    target = gw if split == 1 else x.new_empty((split, *gw.shape), dtype=torch.float32)
    in_unit, out_unit = gcd(in_channels, 16), gcd(out_channels, 16)
    launch.triton(
        "conv3d.triton_igemm_weight_kernels:gather",
        (
            prod(kernel_size) * -(-in_channels // config["BLOCK_N"]),
            -(-out_channels // config["BLOCK_M"]),
            split,
        ),
        x,
        g,
        target,
        samples,
        *in_sizes,
        *out_sizes,
        in_channels // in_unit,
        out_channels // out_unit,
        *kernel_size,
        *stride,
        *padding,
        *dilation,
        IN_UNIT=in_unit,
        OUT_UNIT=out_unit,
        PRECISION=launch.precision(x),
        **tiles,
    )
    if split > 1:
        add_parts(target, None, None, gw, "none")
    return gw
