"""Launch configurations of the implicit GEMM: what a GPU can run, the best guess first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from math import prod

import torch.nn.functional as F
from torch import Tensor

from vidkernels import launch
from vidkernels.launch import Gpu, TensorMap
from vidkernels.op import dtype_name
from vidkernels.tuning import Config

Box = tuple[int, int, int, int]
"""Positions of one tile along (N, T, H, W), powers of two."""


def arithmetic(x: Tensor) -> str:
    """The dtype of a tuning key."""
    return "tf32" if launch.precision(x) == "tf32" else dtype_name(x)


def copied_as_boxes(gpu: Gpu) -> bool:
    """The GPU has a copy engine that fetches boxes of a tensor."""
    return gpu.capability >= 90


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose innermost size has been filled up to whole units of 16 bytes, which begins at one."""
    units = 16 // tensor.element_size()
    missing = -tensor.shape[-1] % units
    if missing:
        return F.pad(tensor, (0, missing))
    return tensor if tensor.storage_offset() % units == 0 else tensor.clone()


def tensor_map(tensor: Tensor, block: tuple[int, ...]) -> TensorMap:
    """A contiguous tensor in blocks."""
    # Not its own strides: torch lets those of axes of size 1 be anything, the copy engine does not.
    strides = tuple(prod(tensor.shape[axis + 1 :]) for axis in range(tensor.dim()))
    return TensorMap(tensor, tuple(tensor.shape), strides, block)


def sides(box: Box) -> dict[str, int]:
    """A box as compile-time constants."""
    return dict(zip(("BOX_N", "BOX_T", "BOX_H", "BOX_W"), box, strict=True))


@cache
def box(rows: int, sizes: tuple[int, int, int, int]) -> Box:
    """The box of so many positions that covers (N, T, H, W) with the least waste, then the widest along W, H, T."""
    powers = [1 << i for i in range(rows.bit_length())]
    boxes = ((rows // (t * h * w), t, h, w) for t, h, w in product(powers, repeat=3) if t * h * w <= rows)

    def cost(box: Box) -> tuple[int, ...]:
        covered = prod(-(-size // block) * block for size, block in zip(sizes, box, strict=True))
        return covered, -box[3], -box[2], -box[1]

    return min(boxes, key=cost)


def convolution_tiles(
    x: Tensor, rows: int, in_channels: int, out_channels: int, taps: int, gpu: Gpu, *, boxed: bool
) -> list[Config]:
    """Tiles of a product of rows × (taps · in_channels) × out_channels.

    Args:
        x: Its left factor.
        boxed: Rows come as boxes, and columns may be split unevenly.
    """
    kind = arithmetic(x)
    candidates: list[Config] = []
    shapes = _boxed_shapes if boxed and kind != "fp32" else _plain_shapes
    # Rows of odd lengths are stored in small pieces, each with its pointer: large tiles of them would spill registers.
    whole = out_channels * x.element_size() % 16 == 0
    most = 4096 if whole else 2048 if boxed else 1024
    if kind == "tf32" and not boxed:
        most = 1024  # Its factors take twice the registers of 16 bits, beside the pointers.
    tiles = [tile for tile in shapes(kind, rows, out_channels, gpu) if tile[0] * (tile[1] + tile[2]) <= most * tile[4]]
    for block_m, block_n, tail, weight_first, warps, stages in tiles[:6]:
        block_k = _depth(in_channels, 16 if kind == "fp32" else 32 if kind == "tf32" or gpu.capability < 90 else 64)
        while stages > 1 and stages * (block_m + block_n + tail) * block_k * x.element_size() > _operand_bytes(gpu):
            stages -= 1
        blocks = -(-rows // block_m) * -(-out_channels // (block_n + tail))
        # Adding the parts up is a launch of its own: each has to save some steps.
        split = max(1, min(gpu.processors // max(blocks, 1), taps * -(-in_channels // block_k) // 16, 16))
        config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
        if boxed:
            config |= {"TAIL": tail, "WEIGHT_FIRST": weight_first}
        for parts in dict.fromkeys((split, 1)):
            if (candidate := {**config, "SPLIT": parts}) not in candidates:
                candidates.append(candidate)
    return candidates[:8]


Tile = tuple[int, int, int, int, int, int]
"""BLOCK_M, BLOCK_N, TAIL, WEIGHT_FIRST, num_warps, num_stages."""


def _plain_shapes(kind: str, rows: int, out_channels: int, gpu: Gpu) -> Iterator[Tile]:
    """Tiles whose rows are multiplied by their columns, the best guess first."""
    if kind == "fp32":
        # Multiplied without matrix instructions: operands and sums all lie in registers.
        for most in (64, 32):
            # Not 128 rows: their pointers and masks take registers too.
            width = power_of_two(out_channels, 16, most)
            yield 64, width, 0, 0, 8 if width > 32 else 4, 2
        return
    for most in (128, 64):
        width = power_of_two(out_channels, 16, most)
        tiles = [(128, 8, 3), (64, 4, 3)]
        for block_m, warps, stages in tiles if rows > 64 else reversed(tiles):
            yield block_m, width, 0, 0, 8 if width > 64 else warps, stages


def _boxed_shapes(kind: str, rows: int, out_channels: int, gpu: Gpu) -> Iterator[Tile]:
    """Tiles of either order, by what is multiplied for nothing and how often the rows are fetched."""
    first = [
        (64, 256, 4, 4),
        (64, 256, 4, 2),
        (64, 128, 4, 4),
        (128, 256, 8, 4),
        (128, 128, 8, 4),
        (256, 128, 8, 4),
        (64, 64, 4, 4),
    ]
    tiles: list[tuple[float, Tile]] = []
    for width, block_m, warps, stages in first:
        if kind == "tf32" and width * block_m > 2048 * warps:
            continue
        tiles.append((_cost(rows, out_channels, block_m, width), (block_m, width, 0, 1, warps, stages)))
    pairs = [(width, 0) for width in (16, 32)]
    pairs += [(width, tail) for width in (32, 64, 128) for tail in (16, 32, 64) if tail < width]
    for width, tail in pairs:
        # The rows pass through registers, and at width 16 or 32 hardly anything is done with them [estimate].
        tiles.append(
            (1.25 * _cost(rows, out_channels, 128, width + tail), (128, width, tail, 0, 4 if width < 128 else 8, 3))
        )
    for _, tile in sorted(tiles, key=lambda one: one[0]):
        yield tile


def _cost(rows: int, channels: int, block_m: int, width: int) -> float:
    """Products of a tiling, those for nothing and the time to fetch both factors included [estimate]."""
    tiles = -(-rows // block_m) * -(-channels // width)
    return tiles * (block_m * width + 24 * (block_m + width))


def _depth(channels: int, most: int) -> int:
    """BLOCK_K: the largest that wastes at most an eighth more than the smaller one."""
    block = power_of_two(channels, 16, most)
    while block > 16:
        padded, finer = (-(-channels // size) * size for size in (block, block // 2))
        if 8 * padded <= 9 * finer:
            break
        block //= 2
    return block


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, within bounds."""
    block = least
    while block < min(size, most):
        block *= 2
    return block


def weight_tiles(
    x: Tensor, positions: int, in_channels: int, out_channels: int, taps: int, gpu: Gpu, *, boxed: bool
) -> list[Config]:
    """Tiles of a product of out_channels × positions × in_channels for every tap.

    Args:
        x: Its right factor.
        boxed: Positions come as boxes, those of g for GROUP taps at a time.
    """
    candidates: list[Config] = []
    for block_m, block_n, block_k, group, warps, stages in _weight_shapes(
        arithmetic(x), in_channels, out_channels, taps, gpu, boxed
    ):
        while stages > 1 and stages * (block_m + group * block_n) * block_k * x.element_size() > _operand_bytes(gpu):
            stages -= 1
        blocks = -(-taps // group) * -(-in_channels // block_n) * -(-out_channels // block_m)
        # Two blocks for every processor, unless each had but a few steps.
        split = max(1, min(2 * gpu.processors // blocks, positions // (16 * block_k), 64))
        config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
        config |= {"GROUP": group, "SPLIT": split} if boxed else {"SPLIT": split}
        if config not in candidates:
            candidates.append(config)
    return candidates


def _weight_shapes(
    kind: str, in_channels: int, out_channels: int, taps: int, gpu: Gpu, boxed: bool
) -> Iterator[tuple[int, int, int, int, int, int]]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, GROUP, num_warps, num_stages), the best guess first."""
    groups = (3, 1) if boxed and taps % 3 == 0 else (1,)
    if kind == "tf32" and in_channels % 2:
        groups = (1,)  # Sums stored one by one have a pointer each.
    if kind == "fp32":
        for group in groups:
            side, warps = (32, 4) if boxed else (64, 8)
            yield power_of_two(out_channels, 16, side), power_of_two(in_channels, 16, side), 32, group, warps, 2
        return
    depth = 32 if kind == "tf32" or gpu.capability < 90 else 64
    for most in (128, 64):
        # wgmma has 64 rows at least.
        rows = power_of_two(out_channels, 16 if gpu.capability < 90 else 64, most)
        for group in groups:
            columns = power_of_two(in_channels, 16, 64 if group > 1 else most)
            # A step of a narrow tile is over before the next one is there: it takes twice the positions.
            steps = 2 * depth if columns <= 32 and kind != "tf32" else depth
            yield rows, columns, steps, group, 8 if rows * columns > 64 * 64 else 4, 3


def _operand_bytes(gpu: Gpu) -> int:
    """Shared memory for the operands on their way: a little is kept for barriers."""
    return gpu.shared_bytes - 4096
