"""Host side of the (2+1)D forward kernels; tensors are channels-last contiguous."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.conv2plus1d.triton_fused_tiles import Pair, box_tiles, product_tiles

_KERNELS = "conv2plus1d.triton_fused_kernels"


def pack_spatial(w_spatial: Tensor, pair: Pair) -> Tensor:
    """(M, C_in, 1, kH, kW) → (stored M, 1, kH, kW, C_in)."""
    packed = w_spatial.new_empty((pair.mid, 1, *pair.kernel[1:], pair.channels))
    _pack(w_spatial, packed, None, None, 0.0)
    return packed


def pack_temporal(w_temporal: Tensor, pair: Pair) -> Tensor:
    """(C_out, M, kT, 1, 1) → (C_out, kT, stored M)."""
    packed = w_temporal.new_empty((pair.out_channels, pair.kernel[0], pair.mid))
    _pack(w_temporal, packed, None, None, 0.0)
    return packed


def fold(
    w_spatial: Tensor, normalisation: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, pair: Pair
) -> tuple[Tensor, Tensor]:
    """Packed spatial filters times their batch norm's scale, and the shift, (stored M,) in float32.

    Args:
        normalisation: Weight, bias, mean and variance, each (M,) in float32.
    """
    packed = w_spatial.new_empty((pair.mid, 1, *pair.kernel[1:], pair.channels))
    shift = w_spatial.new_empty(pair.mid, dtype=torch.float32)
    _pack(w_spatial, packed, normalisation, shift, eps)
    return packed, shift


def _pack(
    source: Tensor,
    packed: Tensor,
    normalisation: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    shift: Tensor | None,
    eps: float,
) -> None:
    taps = source.shape[2] * source.shape[3] * source.shape[4]
    launch.triton(
        f"{_KERNELS}:pack",
        (packed.shape[0],),
        source,
        packed,
        *(normalisation or (None,) * 4),
        shift,
        eps,
        source.shape[0],
        source.shape[1],
        packed.shape[-1],
        TAPS=taps,
        FOLD=normalisation is not None,
        BLOCK=1024,
        num_warps=4,
        num_stages=1,
    )


def spatial(
    x: Tensor, weight: Tensor, shift: Tensor | None, pair: Pair, *, moments: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The 1×k×k convolution: relu(x ∗ weight + shift), or raw where there is no shift.

    Args:
        x: (N, T, H, W, C_in).
        weight: (stored M, 1, kH, kW, C_in).
        shift: (stored M,) in float32.
        moments: Also return every tile's count of positions, mean and Σ (value − mean)², in float32.

    Returns:
        (N, T, H', W', stored M), and (tiles,), (tiles, stored M), (tiles, stored M).
    """
    gpu = launch.gpu_of(x)
    candidates = [*box_tiles(x, pair, gpu), *product_tiles(x, pair.positions, pair.mid, pair.depth, gpu)]
    config = tuning.pick("conv2plus1d/triton_fused/spatial", pair.key(x), candidates, gpu)
    _, out_height, out_width = pair.out_sizes
    frames = pair.clips * pair.sizes[0]
    mid = x.new_empty(pair.mid_shape)
    columns = -(-pair.mid // (config["BLOCK_N"] + config["BLOCK_N2"]))
    boxed = "BLOCK_F" in config
    if boxed:
        tiles = (
            -(-frames // config["BLOCK_F"]) * -(-out_height // config["BLOCK_H"]) * -(-out_width // config["BLOCK_W"])
        )
    else:
        tiles = -(-pair.positions // config["BLOCK_M"])
    parts = _moments(x, tiles, pair.mid) if moments else None
    tensors = shift, mid, *(parts or (None,) * 3)
    sizes = pair.channels, pair.mid, *pair.sizes[1:], out_height, out_width, *pair.padding[1:]
    constants: dict[str, Any] = {
        "KERNEL_H": pair.kernel[1],
        "KERNEL_W": pair.kernel[2],
        "RELU": shift is not None,
        "MOMENTS": moments,
        "PRECISION": launch.precision(x),
        **config,
    }
    if boxed:
        maps = _maps(x, weight, pair, config)
        launch.triton(f"{_KERNELS}:spatial_tma", (tiles * columns,), *maps, *tensors, frames, *sizes, **constants)
    else:
        constants["STRIDE_H"], constants["STRIDE_W"] = pair.stride[1:]
        constants["MERGED"] = pair.merged
        constants["EVEN"] = not pair.merged and pair.channels % config["BLOCK_K"] == 0
        grid = (tiles * columns,)
        launch.triton(f"{_KERNELS}:spatial", grid, x, weight, *tensors, pair.positions, *sizes, **constants)
    return mid, parts


def _maps(x: Tensor, weight: Tensor, pair: Pair, config: tuning.Config) -> tuple[launch.TensorMap, ...]:
    """x in boxes of pixels, and the filters for either accumulator."""
    _, height, width = pair.sizes
    channels, block_k = pair.channels, config["BLOCK_K"]
    box = config["BLOCK_F"], config["BLOCK_H"], config["BLOCK_W"], block_k
    shape = pair.clips * pair.sizes[0], height, width, channels
    strides = height * width * channels, width * channels, channels, 1
    depth = pair.kernel[1] * pair.kernel[2] * channels
    # A second map is wanted in any case; where there is no second accumulator it is never read.
    widths = config["BLOCK_N"], config["BLOCK_N2"] or 16
    filters = (launch.TensorMap(weight, (pair.mid, depth), (depth, 1), (block_n, block_k)) for block_n in widths)
    return launch.TensorMap(x, shape, strides, box), *filters


def onchip(
    x: Tensor, w_spatial: Tensor, shift: Tensor, w_temporal: Tensor, pair: Pair, config: tuning.Config
) -> Tensor:
    """Both convolutions in one kernel, with a configuration of `onchip_tiles`.

    Args:
        x: (N, T, H, W, C_in).
        w_spatial: (stored M, 1, kH, kW, C_in), batch norm folded in.
        shift: (stored M,) in float32.
        w_temporal: (C_out, kT, stored M).

    Returns:
        (N, T', H', W', C_out).
    """
    config = dict(config)
    frames_each = config.pop("FRAMES")
    out_frames, out_height, out_width = pair.out_sizes
    chunks = -(-out_frames // frames_each)
    tiles = -(-out_height // config["BLOCK_H"]) * -(-out_width // config["BLOCK_W"])
    y = x.new_empty((pair.clips, *pair.out_sizes, pair.out_channels))
    launch.triton(
        "conv2plus1d.triton_fused_onchip_kernels:onchip",
        (tiles * chunks * pair.clips,),
        x,
        w_spatial,
        shift,
        w_temporal,
        y,
        pair.channels,
        pair.mid,
        pair.out_channels,
        *pair.sizes,
        *pair.out_sizes,
        *pair.padding,
        frames_each,
        chunks,
        KERNEL_H=pair.kernel[1],
        KERNEL_W=pair.kernel[2],
        STRIDE_H=pair.stride[1],
        STRIDE_W=pair.stride[2],
        TAIL=pair.mid % config["BLOCK_MID"] != 0,
        BLOCK_MID2=16,
        PRECISION=launch.precision(x),
        **config,
    )
    return y


def _moments(x: Tensor, tiles: int, mid: int) -> tuple[Tensor, Tensor, Tensor]:
    counts = x.new_empty(tiles, dtype=torch.int32)
    means, squares = (x.new_empty((tiles, mid), dtype=torch.float32) for _ in range(2))
    return counts, means, squares


def batch_normalisation(
    parts: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor, eps: float, pair: Pair
) -> tuple[Tensor, Tensor]:
    """Batch norm by the batch's own statistics, from those of its tiles.

    Returns:
        (4, stored M): mean, 1/σ, scale and shift; and (2, M): mean and unbiased variance; float32.
    """
    affine, statistics = weight.new_empty((4, pair.mid)), weight.new_empty((2, pair.filters))
    _normalise(parts, weight, bias, affine, statistics, eps, pair)
    return affine, statistics


def frozen_normalisation(normalisation: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, pair: Pair) -> Tensor:
    """Batch norm by running statistics, (4, stored M) as `batch_normalisation`'s.

    Args:
        normalisation: Weight, bias, mean and variance, each (M,) in float32.
    """
    weight, bias, mean, var = normalisation
    affine = weight.new_empty((4, pair.mid))
    _normalise((None, mean, var), weight, bias, affine, None, eps, pair)
    return affine


def _normalise(
    parts: tuple[Tensor | None, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    affine: Tensor,
    statistics: Tensor | None,
    eps: float,
    pair: Pair,
) -> None:
    tiles = parts[1].shape[0] if statistics is not None else 0
    launch.triton(
        f"{_KERNELS}:normalisation",
        (-(-pair.mid // 8),),
        *parts,
        weight,
        bias,
        affine,
        statistics,
        eps,
        tiles,
        pair.positions,
        pair.filters,
        pair.mid,
        BATCH=statistics is not None,
        BLOCK_T=1024 if tiles > 64 else 64,
        # Eight floats are one sector of memory; few channels to a block make more blocks.
        BLOCK_C=8,
        num_warps=8 if tiles > 64 else 1,
        num_stages=1,
    )


def temporal(mid: Tensor, weight: Tensor, affine: Tensor | None, pair: Pair) -> Tensor:
    """The k×1×1 convolution of mid, or of relu(scale · mid + shift).

    Args:
        mid: (N, T, H', W', stored M).
        weight: (C_out, kT, stored M).
        affine: (4, stored M) as `batch_normalisation`'s.

    Returns:
        (N, T', H', W', C_out).
    """
    gpu = launch.gpu_of(mid)
    candidates = product_tiles(mid, pair.out_positions, pair.out_channels, 64, gpu, split=False, spare=True)
    config = dict(tuning.pick("conv2plus1d/triton_fused/temporal", pair.key(mid), candidates, gpu))
    del config["BLOCK_N2"]
    y = mid.new_empty((pair.clips, *pair.out_sizes, pair.out_channels))
    rows = -(-pair.out_positions // config["BLOCK_M"])
    launch.triton(
        f"{_KERNELS}:temporal",
        (rows * -(-pair.out_channels // config["BLOCK_N"]),),
        mid,
        weight,
        None if affine is None else affine[2],
        None if affine is None else affine[3],
        y,
        pair.clips,
        pair.mid,
        pair.out_channels,
        pair.sizes[0],
        pair.out_sizes[0],
        pair.pixels,
        pair.padding[0],
        KERNEL_T=pair.kernel[0],
        STRIDE=pair.stride[0],
        AFFINE=affine is not None,
        TAIL=pair.mid % config["BLOCK_K"] != 0,
        BLOCK_K2=16,
        PRECISION=launch.precision(mid),
        **config,
    )
    return y
