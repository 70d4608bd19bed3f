"""Host side of the (2+1)D backward kernels; tensors are channels-last contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.conv2plus1d.triton_fused_tiles import Pair, product_tiles, rows_each, sum_tiles

_KERNELS = "conv2plus1d.triton_fused_gradient_kernels"


def hidden_gradient(
    g: Tensor, weight: Tensor, raw: Tensor, affine: Tensor, pair: Pair
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The gradient of batch norm's result, before the ReLU.

    Args:
        g: By the result, (N, T', H', W', C_out).
        weight: (C_out, kT, stored M).
        raw: What the spatial convolution gave, (N, T, H', W', stored M).
        affine: (4, stored M): mean, 1/σ, scale and shift.

    Returns:
        As raw; and of every tile its sum and its sum of products with the normalised raw, (tiles, stored M).
    """
    gpu = launch.gpu_of(g)
    candidates = product_tiles(g, pair.positions, pair.mid, pair.out_channels, gpu, spare=True)
    config = tuning.pick("conv2plus1d/triton_fused/hidden_gradient", pair.key(g), candidates, gpu)
    stride = pair.stride[0]
    class_positions = pair.clips * -(-pair.sizes[0] // stride) * pair.pixels
    tiles = -(-class_positions // config["BLOCK_M"])
    columns = -(-pair.mid // (config["BLOCK_N"] + config["BLOCK_N2"]))
    gz = raw.new_empty(pair.mid_shape)
    sums, products = (raw.new_empty((stride * tiles, pair.mid), dtype=torch.float32) for _ in range(2))
    launch.triton(
        f"{_KERNELS}:hidden_gradient",
        (tiles * columns, stride),
        g,
        weight,
        raw,
        affine,
        gz,
        sums,
        products,
        pair.clips,
        pair.mid,
        pair.out_channels,
        pair.sizes[0],
        pair.out_sizes[0],
        pair.pixels,
        pair.padding[0],
        tiles,
        KERNEL_T=pair.kernel[0],
        STRIDE=stride,
        EVEN=pair.out_channels % config["BLOCK_K"] == 0,
        PRECISION=launch.precision(g),
        **config,
    )
    return gz, (sums, products)


def normalisation_gradient(
    parts: tuple[Tensor, Tensor], affine: Tensor, pair: Pair, *, batch_statistics: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of batch norm's weight and bias, (2, M), and what `raw_gradient_` takes off with batch statistics."""
    gradients = affine.new_empty((2, pair.filters))
    coefficients = affine.new_empty((2, pair.mid)) if batch_statistics else None
    tiles = parts[0].shape[0]
    launch.triton(
        f"{_KERNELS}:normalisation_gradient",
        (-(-pair.mid // 8),),
        *parts,
        affine,
        gradients,
        coefficients,
        tiles,
        pair.positions,
        pair.filters,
        pair.mid,
        BATCH=batch_statistics,
        BLOCK_T=1024 if tiles > 64 else 64,
        BLOCK_C=8,
        num_warps=8 if tiles > 64 else 1,
        num_stages=1,
    )
    return gradients, coefficients


def raw_gradient_(gz: Tensor, raw: Tensor, affine: Tensor, coefficients: Tensor | None, pair: Pair) -> None:
    """Turns `hidden_gradient`'s result into the gradient of raw, in place."""
    block_c = 128 if pair.mid > 64 else 64
    launch.triton(
        f"{_KERNELS}:raw_gradient",
        (-(-pair.positions // 32), -(-pair.mid // block_c)),
        gz,
        raw,
        affine,
        coefficients,
        pair.positions,
        pair.mid,
        BATCH=coefficients is not None,
        BLOCK_R=32,
        BLOCK_C=block_c,
        num_warps=4,
        num_stages=1,
    )


def temporal_weight_gradient(raw: Tensor, g: Tensor, affine: Tensor, pair: Pair) -> Tensor:
    """The gradient of the temporal filters, (C_out, M, kT, 1, 1): float32 sums, rounded to the dtype of raw.

    Args:
        raw: (N, T, H', W', stored M).
        g: By the result, (N, T', H', W', C_out).
        affine: (4, stored M): mean, 1/σ, scale and shift.
    """
    gpu = launch.gpu_of(raw)
    candidates = sum_tiles(raw, pair, gpu)
    config = tuning.pick("conv2plus1d/triton_fused/temporal_weight", pair.key(raw), candidates, gpu)
    columns = pair.kernel[0] * -(-pair.mid // (config["BLOCK_N"] + config["BLOCK_N2"]))
    rows = -(-pair.out_channels // config["BLOCK_M"])
    each = rows_each(pair.out_positions, columns * rows, config["BLOCK_K"], gpu)
    splits = max(1, -(-pair.out_positions // each))
    partial = raw.new_empty((splits, pair.out_channels, pair.kernel[0], pair.mid), dtype=torch.float32)
    launch.triton(
        f"{_KERNELS}:temporal_weight",
        (columns, rows, splits),
        raw,
        g,
        affine,
        partial,
        pair.clips,
        pair.mid,
        pair.out_channels,
        pair.sizes[0],
        pair.out_sizes[0],
        pair.pixels,
        pair.padding[0],
        each,
        KERNEL_T=pair.kernel[0],
        STRIDE=pair.stride[0],
        ALIGNED=pair.out_channels % 16 == 0,
        PRECISION=launch.precision(raw),
        **config,
    )
    gradient = raw.new_empty((pair.out_channels, pair.filters, pair.kernel[0], 1, 1))
    launch.triton(
        f"{_KERNELS}:sum_splits",
        (-(-gradient.numel() // 256),),
        partial,
        gradient,
        splits,
        pair.out_channels,
        pair.filters,
        pair.mid,
        KERNEL_T=pair.kernel[0],
        BLOCK=256,
        num_warps=4,
        num_stages=1,
    )
    return gradient
