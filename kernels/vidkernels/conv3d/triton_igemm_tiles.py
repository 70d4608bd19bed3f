"""Launch configurations of the implicit GEMM: what a GPU can run, the best guess first."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vidkernels import launch
from vidkernels.launch import Gpu
from vidkernels.op import dtype_name
from vidkernels.tuning import Config


def arithmetic(x: Tensor) -> str:
    """The dtype of a tuning key."""
    return "tf32" if launch.precision(x) == "tf32" else dtype_name(x)


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, within bounds."""
    block = least
    while block < min(size, most):
        block *= 2
    return block


def convolution_tiles(
    x: Tensor, positions: int, in_channels: int, out_channels: int, taps: int, gpu: Gpu
) -> list[Config]:
    """Tiles of a product of positions × (taps · in_channels) × out_channels."""
    block_n = power_of_two(out_channels, 16, 128)
    block_k = power_of_two(in_channels, 16, 32)
    tile = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 3}
    return [{**tile, "SPLIT": 1}]


def weight_tiles(
    x: Tensor, positions: int, in_channels: int, out_channels: int, taps: int, gpu: Gpu
) -> list[Config]:
    """Tiles of a product of out_channels × positions × in_channels, one for every tap."""
    block_m = power_of_two(out_channels, 16, 128)
    block_n = power_of_two(in_channels, 16, 128)
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    return [{**tile, "SPLIT": 2 if positions > 100 else 1}]
