"""Launch configurations of the (2+1)D kernels, ranked by an estimate; tuned tables come before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vidkernels import launch
from vidkernels.launch import Gpu
from vidkernels.op import dtype_name
from vidkernels.shapes import Triple, conv_sizes, triple
from vidkernels.tuning import Config, Key

MID_MULTIPLE = 16
"""Mid channels are stored in multiples of this: rows then start at 32 bytes, and no product's depth has a remainder."""

_WIDTHS = ((256, 0), (128, 32), (128, 16), (128, 0), (64, 32), (64, 16), (64, 0), (32, 16), (32, 0), (16, 0))
"""Channels of a tile, in one accumulator or two."""

_CANDIDATES = 6


@dataclass(frozen=True)
class Pair:
    """Sizes of one (2+1)D pair in channels-last layout."""

    clips: int
    sizes: Triple
    """(T, H, W) of the input."""
    channels: int
    filters: int
    """Mid channels."""
    out_channels: int
    kernel: Triple
    stride: Triple
    padding: Triple

    @classmethod
    def of(cls, x: Tensor, w_spatial: Tensor, w_temporal: Tensor, stride: list[int], padding: list[int]) -> Pair:
        """The sizes of a call.

        Args:
            x: (N, T, H, W, C_in).
            w_spatial: (M, C_in, 1, kH, kW).
            w_temporal: (C_out, M, kT, 1, 1).
        """
        # int(): what torch.compile traces with a symbol for a size is compiled for the size itself, as kernels are.
        clips, t, h, w, channels = map(int, x.shape)
        return cls(
            clips=clips,
            sizes=(t, h, w),
            channels=channels,
            filters=int(w_spatial.shape[0]),
            out_channels=int(w_temporal.shape[0]),
            kernel=triple(map(int, (w_temporal.shape[2], *w_spatial.shape[3:])), "kernel"),
            stride=triple(stride, "stride"),
            padding=triple(padding, "padding"),
        )

    @property
    def mid(self) -> int:
        """Mid channels as stored."""
        return -(-self.filters // MID_MULTIPLE) * MID_MULTIPLE

    @property
    def out_sizes(self) -> Triple:
        """(T', H', W')."""
        return conv_sizes(self.sizes, self.kernel, self.stride, self.padding, (1, 1, 1))

    @property
    def pixels(self) -> int:
        """Of one frame, after the spatial convolution."""
        return self.out_sizes[1] * self.out_sizes[2]

    @property
    def mid_shape(self) -> tuple[int, ...]:
        """(N, T, H', W', stored M)."""
        return (self.clips, self.sizes[0], *self.out_sizes[1:], self.mid)

    @property
    def positions(self) -> int:
        """Between the two convolutions."""
        return self.clips * self.sizes[0] * self.pixels

    @property
    def out_positions(self) -> int:
        """Of the result."""
        return self.clips * self.out_sizes[0] * self.pixels

    @property
    def merged(self) -> bool:
        """So few channels that a row of taps makes one product with them, instead of one for each tap."""
        return self.channels < 16 and self.kernel[2] > 1

    @property
    def depth(self) -> int:
        """Values that lie side by side in a product of the spatial convolution."""
        return self.channels * (self.kernel[2] if self.merged else 1)

    def key(self, x: Tensor) -> Key:
        """Of the tuned tables, the same for all of the pair's kernels."""
        arithmetic = "tf32" if launch.precision(x) == "tf32" else dtype_name(x)
        sizes = (self.channels, self.filters, self.out_channels)
        return Key(arithmetic, sizes, (*self.kernel, *self.stride), self.positions)


def product_tiles(
    x: Tensor, rows: int, columns: int, depth: int, gpu: Gpu, *, split: bool = True, spare: bool = False
) -> list[Config]:
    """Tiles of a product of rows × depth × columns, where depth is what one tap contributes.

    Args:
        split: Two accumulators may share the columns.
        spare: Registers are wanted for more than accumulators: what is loaded is normalised, or another tensor of the
            tile's size comes in at the end.
    """
    ieee = x.dtype is torch.float32 and launch.precision(x) == "ieee"
    block_k = _depth(depth, 16 if ieee else 128 // x.element_size())
    found: list[tuple[float, Config]] = []
    for block_m, width, width2 in _shapes(ieee, columns, gpu, split=split):
        # A tile that is twice as high as needed is none; but there must be one.
        if (spare and block_m * (width + width2) > 128 * 128) or (block_m > 64 and block_m >= 2 * rows):
            continue
        if config := _staged(x, block_m, width, width2, block_k, gpu):
            found.append((_cost(rows, columns, block_m, width + width2, gpu), config))
    found.sort(key=lambda entry: entry[0])
    return [config for _, config in found[:_CANDIDATES]]


def box_tiles(x: Tensor, pair: Pair, gpu: Gpu) -> list[Config]:
    """Tiles of the spatial convolution by the copy engine; none where it cannot run it, or would waste much."""
    block_k = 128 // x.element_size()
    strided = pair.stride[1:] != (1, 1) or pair.channels % block_k != 0
    if gpu.capability < 90 or strided or (x.dtype is torch.float32 and launch.precision(x) == "ieee"):
        return []
    found: list[tuple[float, Config]] = []
    for block_m, width, width2 in _shapes(False, pair.mid, gpu):
        if (box := _box(pair, block_m)) and (config := _staged(x, block_m, width, width2, block_k, gpu)):
            cost = _cost(pair.positions, pair.mid, block_m, width + width2, gpu)
            sizes = dict(zip(("BLOCK_F", "BLOCK_H", "BLOCK_W"), box, strict=True))
            found.append((cost, {**sizes, **{k: v for k, v in config.items() if k != "BLOCK_M"}}))
    found.sort(key=lambda entry: entry[0])
    return [config for _, config in found[: _CANDIDATES // 2]]


def sum_tiles(x: Tensor, pair: Pair, gpu: Gpu) -> list[Config]:
    """Tiles of the temporal filters' gradient, C_out × M, which steps through positions."""
    ieee = x.dtype is torch.float32 and launch.precision(x) == "ieee"
    block_k = 16 if ieee else 64 if x.element_size() == 2 else 32
    found: list[tuple[float, Config]] = []
    for block_m, width, width2 in _shapes(ieee, pair.mid, gpu):
        # Two accumulators, or matrix instructions that take registers, leave less room for what is normalised.
        most = 64 * (144 if width2 else 256) if gpu.capability >= 90 else 0 if width2 else 64 * 128
        if block_m <= max(64, pair.out_channels) and block_m * (width + width2) <= most:
            padded = -(-pair.out_channels // block_m) * -(-pair.mid // (width + width2))
            cost = padded * (max(block_m * (width + width2) / 32, 2.5 * (block_m + width + width2)) + 100)
            if config := _staged(x, block_m, width, width2, block_k, gpu):
                # Batch norm and ReLU of what is loaded take registers next to the accumulators.
                warps = 8 if block_m * (width + width2) >= 64 * 96 else 4
                found.append((cost, {**config, "num_warps": warps}))
    found.sort(key=lambda entry: entry[0])
    return [config for _, config in found[:_CANDIDATES]]


def onchip_tiles(x: Tensor, pair: Pair, gpu: Gpu) -> list[Config]:
    """Ways to run evaluation in one kernel: few channels in the result, three temporal taps at stride 1."""
    fits = pair.out_channels <= 64 and pair.kernel[0] == 3 and pair.stride[0] == 1 and pair.channels % 16 == 0
    if not fits or x.element_size() != 2 or gpu.capability < 90:
        return []
    block_n = next(block for block in (16, 32, 64) if block >= pair.out_channels)
    tile = {"BLOCK_N": block_n, "BLOCK_K": _depth(pair.channels, 64), "num_warps": 8, "num_stages": 3}
    # Three frames of the result and the mid channels at hand are in registers: 128 pixels of them with wgmma alone.
    block_w = 16 if gpu.capability == 90 else 8
    shape = {"BLOCK_H": 8, "BLOCK_W": block_w, "BLOCK_MID": 64 if pair.mid >= 64 else 16}
    tiles = pair.clips * -(-pair.out_sizes[1] // 8) * -(-pair.out_sizes[2] // block_w)
    # Two of the frames that a block walks through are its neighbours' as well: as few blocks as fill the GPU.
    chunks = max(1, min(gpu.processors // max(tiles, 1), pair.out_sizes[0] // 4))
    each = -(-pair.out_sizes[0] // chunks)
    return [{**shape, **tile, "FRAMES": frames} for frames in dict.fromkeys((each, pair.out_sizes[0]))]


def _shapes(ieee: bool, columns: int, gpu: Gpu, *, split: bool = True) -> Iterator[tuple[int, int, int]]:
    """(BLOCK_M, BLOCK_N, BLOCK_N2) that spill no registers."""
    # Without matrix instructions products are in registers as well. Only wgmma reads both factors from shared memory
    # and leaves its result where the epilogue needs it.
    most = 64 * 32 if ieee else 256 * 160 if gpu.capability == 90 else 128 * 144
    for block_m in (64,) if ieee else (64, 128, 256) if gpu.capability == 90 else (64, 128):
        for width, width2 in _WIDTHS:
            if (width2 == 32 and gpu.capability < 90) or (width == 16 and columns > 32):
                continue
            narrow = width <= 16 or width // 2 < columns
            if block_m * (width + width2) <= most and narrow and not (width2 and (ieee or not split)):
                yield block_m, width, width2


def _staged(x: Tensor, block_m: int, width: int, width2: int, block_k: int, gpu: Gpu) -> Config | None:
    """The tile with as many warps and stages as fit."""
    size = block_m * (width + width2)
    warps = 8 if block_m == 256 or size > 64 * (64 if width2 and gpu.capability < 90 else 128) else 4
    stage = (block_m + width + width2) * block_k * x.element_size()
    # Two blocks of 4 warps hide each other's start and end; the registers hold but one of 8.
    shared = gpu.shared_bytes // (2 if warps == 4 else 1)
    stages = next((s for s in (4, 3, 2) if s * stage <= shared - 4096), 2)
    if stages * stage > gpu.shared_bytes - 4096:
        return None
    tile = {"BLOCK_M": block_m, "BLOCK_N": width, "BLOCK_N2": width2, "BLOCK_K": block_k}
    return {**tile, "num_warps": warps, "num_stages": stages}


def _depth(depth: int, most: int) -> int:
    """The largest power of two up to `most` that divides a product's depth, or the smallest that holds it."""
    for block in (64, 32):
        if block <= most and depth % block == 0:
            return block
    return 16 if depth % 16 == 0 or depth <= 16 or most == 16 else 32


def _cost(rows: int, columns: int, block_m: int, width: int, gpu: Gpu) -> float:
    """Estimated clock cycles for a depth of 64: what multiplies, or what is fetched through the L2 cache."""
    blocks = -(-rows // block_m) * -(-columns // width)
    return -(-blocks // gpu.processors) * (max(block_m * width / 32, 2.5 * (block_m + width)) + 100)


def rows_each(rows: int, blocks: int, block_k: int, gpu: Gpu) -> int:
    """Rows for each split of a sum over them: blocks for two waves, but no split below 16 steps."""
    splits = max(1, min(-(-2 * gpu.processors // blocks), rows // (16 * block_k)))
    return -(-max(rows, 1) // (splits * block_k)) * block_k


def _box(pair: Pair, block_m: int) -> tuple[int, int, int] | None:
    """(frames, rows, columns) of pixels that tile a stride-1 result; None where they would not fill it."""
    _, height, width = pair.out_sizes
    block_h, block_w = _power(height, 8), _power(width, 8)
    block_f = block_m // (block_h * block_w)
    if block_w * block_h < 4 or not 1 <= block_f <= pair.clips * pair.sizes[0]:
        return None
    return block_f, block_h, block_w


def _power(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides a size."""
    return next(block for block in (8, 4, 2, 1) if block <= most and size % block == 0)
