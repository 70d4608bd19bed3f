"""Host side of the implicit GEMM's weight gradient."""

from __future__ import annotations

from math import gcd, prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vidkernels import launch, tuning
from vidkernels.conv3d.triton_igemm_products import add_parts
from vidkernels.conv3d.triton_igemm_tiles import (
    aligned,
    arithmetic,
    box,
    copied_as_boxes,
    sides,
    tensor_map,
    weight_tiles,
)
from vidkernels.shapes import Triple

_KERNELS = "conv3d.triton_igemm_weight_kernels"


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
    gw = x.new_empty((g.shape[-1], *kernel_size, x.shape[-1]))
    if isinstance(x, FakeTensor):
        return gw  # Its sizes may be symbols, and there is nothing to launch.
    gpu = launch.gpu_of(x)
    boxed = copied_as_boxes(gpu) and stride == (1, 1, 1)
    x, g = aligned(x), aligned(g)
    if not boxed and (x.shape[-1] != gw.shape[-1] or g.shape[-1] != gw.shape[0]):
        # The gradients of the channels that filled up the last unit are dropped.
        whole = weight_gradient(x, g, kernel_size, stride, padding, dilation)
        return gw.copy_(whole[: gw.shape[0], ..., : gw.shape[-1]])
    samples, in_channels, out_channels = x.shape[0], gw.shape[-1], gw.shape[0]
    t, h, w = g.shape[1:4]
    taps, positions = prod(kernel_size), samples * t * h * w
    if positions == 0:
        return gw.zero_()
    candidates = weight_tiles(x, positions, in_channels, out_channels, taps, gpu, boxed=boxed)
    key = tuning.Key(arithmetic(x), (in_channels, out_channels), (*kernel_size, *stride), positions)
    config = tuning.pick("conv3d/triton_igemm/weight_gradient", key, candidates, gpu)
    block_m, block_n, split = (config[name] for name in ("BLOCK_M", "BLOCK_N", "SPLIT"))
    group = config["GROUP"] if boxed else 1
    target = gw if split == 1 else x.new_empty((split, *gw.shape), dtype=torch.float32)
    grid = (-(-taps // group) * -(-in_channels // block_n), -(-out_channels // block_m), split)
    constants: dict[str, Any] = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "PRECISION": launch.precision(x),
        "num_warps": config["num_warps"],
        "num_stages": config["num_stages"],
    }
    in_unit = gcd(in_channels, 16)
    if boxed:
        shape = box(config["BLOCK_K"], (samples, t, h, w))
        launch.triton(
            f"{_KERNELS}:boxes",
            grid,
            tensor_map(x, (*shape, block_n)),
            tensor_map(g, (*shape, block_m)),
            target,
            samples,
            t,
            h,
            w,
            in_channels // in_unit,
            out_channels,
            *kernel_size,
            *padding,
            *dilation,
            IN_UNIT=in_unit,
            GROUP=group,
            **sides(shape),
            **constants,
        )
    else:
        out_unit = gcd(out_channels, 16)
        launch.triton(
            f"{_KERNELS}:gather",
            grid,
            x,
            g,
            target,
            samples,
            *x.shape[1:4],
            t,
            h,
            w,
            in_channels // in_unit,
            out_channels // out_unit,
            *kernel_size,
            *stride,
            *padding,
            *dilation,
            IN_UNIT=in_unit,
            OUT_UNIT=out_unit,
            BLOCK_K=config["BLOCK_K"],
            **constants,
        )
    if split > 1:
        add_parts(target, None, None, gw, "none")
    return gw
