"""The TCN residual block in two launches: one packs the filters, one computes both convolutions and all between.

Frames of one phase t mod d stand side by side in a tile, so that its halo is 2·(K−1) frames for every dilation d.
README.md has the design. Backward: three launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.causal_conv1d.triton_phased import (
    LAUNCH_CLOCKS,
    Tiles,
    apart,
    dense,
    finish_tiles,
    gradient_candidates,
    key_dtype,
    pack_block,
    padded,
    phased_tiles,
    reach,
    refusal,
    same_dtype,
    split_rows,
    tile_candidates,
    tile_clocks,
    waves,
)
from vidkernels.launch import Gpu
from vidkernels.op import wants_gradients
from vidkernels.tcn_block.case import OP, TcnBlockCase, WeightNorm
from vidkernels.tcn_block.triton_fused_step import arguments, dropout, dropout_seed, step

_KERNELS = "tcn_block.triton_fused_kernels"


class Sizes(NamedTuple):
    """Of one block; see `sizes_of`."""

    batch: int
    frames: int
    ins: int
    outs: int
    taps: int
    dilation: int
    """At most the clip's length."""

    @property
    def filters(self) -> tuple[int, int, int]:
        """Elements of the packed first, second and 1×1 filters."""
        wide, narrow = padded(self.outs), padded(self.ins)
        return self.taps * wide * narrow, self.taps * wide * wide, wide * narrow

    def tiles(self, block_m: int) -> Tiles | None:
        """Of both halves fused."""
        return phased_tiles(self.batch, self.frames, self.dilation, self.taps - 1, block_m)


def sizes_of(x: Tensor, v1: Tensor, dilation: int) -> Sizes:
    """From x, (N, T, C_in), and the first filters, (C_out, C_in, K)."""
    batch, frames, ins = x.shape
    outs, _, taps = v1.shape
    return Sizes(batch, frames, ins, outs, taps, reach(dilation, frames))


def block_candidates(
    sizes: Sizes, dtype: str, gpu: Gpu, *, mirror: bool = False, keep: bool = False
) -> list[dict[str, int]]:
    """Configurations of a block, fused and in two launches, the fastest by estimate first.

    Args:
        dtype: As in `key_dtype`.
        mirror: The gradient, whose second half has C_in columns.
        keep: The forward pass, for a gradient.
    """
    wide, narrow = padded(sizes.outs), padded(sizes.ins)
    found: list[tuple[float, dict[str, int]]] = []
    aligned = sizes.ins % 8 == 0 and sizes.outs % 8 == 0
    for tile in tile_candidates(wide, max(wide, narrow), dtype, gpu, aligned=aligned):
        columns = [-(-width // tile["BLOCK_N"]) for width in (wide, narrow if mirror else wide)]
        clocks = [tile_clocks(tile, sizes.taps, depth) for depth in (wide if mirror else narrow, wide)]
        # Both halves in one kernel need more registers: larger tiles would spill, and 4 warps hold half as much.
        area = tile["BLOCK_M"] * tile["BLOCK_N"]
        most = 2048 if dtype == "fp32" or (mirror and dtype == "tf32") else 4096 if dtype == "tf32" else 8192
        if mirror and gpu.capability < 90:
            most = min(most, 4096)
        if area <= most and (tiles := sizes.tiles(tile["BLOCK_M"])) is not None:
            each = sum(number * one for number, one in zip(columns, clocks, strict=True))
            small = 1024 if mirror and dtype == "tf32" else 2048
            found.append((waves(tiles.total, gpu) * each, {"FUSED": 1, **tile, "num_warps": 8 if area > small else 4}))
        if keep and area > 8192:
            continue  # The gates, kept until the residual is added, would spill.
        count = apart(sizes.batch, sizes.frames, sizes.dilation, tile["BLOCK_M"]).total
        halves = (waves(count * number, gpu) * one for number, one in zip(columns, clocks, strict=True))
        found.append((LAUNCH_CLOCKS + sum(halves), {"FUSED": 0, **tile}))
    found.sort(key=lambda pair: pair[0])
    return [config for _, config in found[:8]]


class Plan(NamedTuple):
    """How the halves of a block are launched."""

    tiles: Tiles
    halves: tuple[tuple[bool, bool], ...]
    """Of every launch: whether it computes the first half, the second."""
    config: dict[str, int]
    """Tile sizes, num_warps and num_stages."""

    def grid(self, columns: tuple[int, int], half: tuple[bool, bool]) -> tuple[int, int]:
        """Of the launch of a half, or of both at once."""
        if all(half):
            return self.tiles.total, 1
        return self.tiles.total, -(-columns[half[1]] // self.config["BLOCK_N"])


def _plan(x: Tensor, sizes: Sizes, direction: str, *, second: bool = True, keep: bool = False) -> Plan:
    gpu, dtype = launch.gpu_of(x), key_dtype(x)
    candidates = block_candidates(sizes, dtype, gpu, mirror=direction == "input_gradient", keep=keep)
    key = tuning.Key(dtype, (sizes.ins, sizes.outs), (sizes.taps, sizes.dilation), sizes.batch * sizes.frames)
    config = dict(tuning.pick(f"tcn_block/triton_fused/{direction}", key, candidates, gpu))
    fused = config.pop("FUSED")
    if fused and second and (tiles := sizes.tiles(config["BLOCK_M"])) is not None:
        return Plan(tiles, ((True, True),), config)
    halves = ((True, False), (False, True)) if second else ((True, False),)
    return Plan(apart(sizes.batch, sizes.frames, sizes.dilation, config["BLOCK_M"]), halves, config)


@launch.custom_op(
    "tcn_block_fused(Tensor x, Tensor v1, Tensor? g1, Tensor? b1, Tensor v2, Tensor? g2, Tensor? b2, Tensor? w_down,"
    " Tensor? b_down, Tensor? seed, int dilation, float dropout_p, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _forward(
    x: Tensor,
    v1: Tensor,
    g1: Tensor | None,
    b1: Tensor | None,
    v2: Tensor,
    g2: Tensor | None,
    b2: Tensor | None,
    w_down: Tensor | None,
    b_down: Tensor | None,
    seed: Tensor | None,
    dilation: int,
    dropout_p: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, (N, T, C_in), to y, (N, T, C_out), and what the gradient needs: empty unless `keep`.

    That is hidden, (N, T, padded C_out); gates, likewise in bytes; the packed filters, flat; and the `vectors` of
    `prepare`.
    """
    sizes = sizes_of(x, v1, dilation)
    batch, frames, ins, outs, taps, dilation = sizes
    wide, narrow = padded(outs), padded(ins)
    downsample = w_down is not None
    filters = x.new_empty(sum(sizes.filters[: 2 + downsample]))
    w1, w2, *down = filters.split(sizes.filters[: 2 + downsample])
    vectors = x.new_empty(4 + downsample, wide, dtype=torch.float32)
    launch.triton(
        f"{_KERNELS}:prepare",
        (wide, 2 + downsample),
        *map(dense, (v1, g1, b1, v2, g2, b2, w_down, b_down)),
        *(w1, w2, down[0] if downsample else None, vectors, ins, outs, narrow, wide, taps),
        BLOCK=pack_block(outs, taps),
        num_warps=4,
        num_stages=2,
    )
    plan = _plan(x, sizes, "forward", keep=keep)
    fused = len(plan.halves) == 1
    y = x.new_empty(batch, frames, outs)
    hidden = x.new_empty(batch, frames, wide) if keep or not fused else None
    gates = x.new_empty(batch, frames, wide, dtype=torch.uint8) if keep else None
    scratch = x.new_empty(plan.tiles.total, plan.config["BLOCK_M"], wide) if fused else None
    threshold, scale = dropout(dropout_p)
    for half in plan.halves:
        launch.triton(
            f"{_KERNELS}:forward",
            plan.grid((wide, wide), half),
            *(x, w1, w2, down[0] if downsample else None, vectors, seed, y, hidden, gates, scratch),
            *(batch, frames, *plan.tiles.shape, taps, dilation, ins, outs, narrow, wide, threshold, scale),
            FIRST=half[0],
            SECOND=half[1],
            PRECISION=launch.precision(x),
            **plan.config,
        )
    if hidden is None or gates is None:
        return y, x.new_empty(0), x.new_empty(0, dtype=torch.uint8), filters, vectors
    return y, hidden, gates, filters, vectors


@launch.custom_op(
    "tcn_block_fused_gradient(Tensor dy, Tensor x, Tensor hidden, Tensor gates, Tensor filters, Tensor vectors,"
    " Tensor v1, Tensor? g1, Tensor v2, Tensor? g2, bool downsample, int dilation, float dropout_p, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _gradient(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    gates: Tensor,
    filters: Tensor,
    vectors: Tensor,
    v1: Tensor,
    g1: Tensor | None,
    v2: Tensor,
    g2: Tensor | None,
    downsample: bool,
    dilation: int,
    dropout_p: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x, v1, g1, b1, v2, g2, b2, w_down and b_down; those that are not `wanted` may be empty."""
    sizes = sizes_of(x, v1, dilation)
    dy = dy.contiguous()
    first, second, down = any(wanted[1:4]), any(wanted[4:7]), downsample and any(wanted[7:])
    dx, dz = x.new_empty(x.shape if wanted[0] else 0), torch.empty_like(hidden) if first or wanted[0] else None
    if dz is not None:
        _input_gradient(dy, x, hidden, gates, filters, dz, dx, sizes, downsample, dropout_p, wanted[0], first)
    if not (first or second or down):
        return dx, *(x.new_empty(0) for _ in range(8))
    gradients = _weight_gradients(
        *(dy, x, hidden, gates, vectors, dz, v1, g1, v2, g2, sizes, dropout_p, (first, second, down))
    )
    return dx, *gradients


def _input_gradient(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    gates: Tensor,
    filters: Tensor,
    dz: Tensor,
    dx: Tensor,
    sizes: Sizes,
    downsample: bool,
    dropout_p: float,
    whole: bool,
    keep: bool,
) -> None:
    """Fills dz, the gradient before the first ReLU, where it is to `keep`, and dx for the `whole`."""
    batch, frames, ins, outs, taps, dilation = sizes
    wide, narrow = padded(outs), padded(ins)
    w1, w2, *down = filters.split(sizes.filters[: 2 + downsample])
    plan = _plan(x, sizes, "input_gradient", second=whole)
    fused = all(plan.halves[0])
    scratch = x.new_empty(plan.tiles.total, plan.config["BLOCK_M"], wide) if fused else None
    for half in plan.halves:
        launch.triton(
            f"{_KERNELS}:input_gradient",
            plan.grid((wide, narrow), half),
            *(dy, gates, hidden, w1, w2, down[0] if downsample else None),
            *(dz if keep or not fused else None, dx if whole else None, scratch),
            *(batch, frames, *plan.tiles.shape, taps, dilation, ins, outs, narrow, wide, dropout(dropout_p)[1]),
            FIRST=half[0],
            SECOND=half[1],
            PRECISION=launch.precision(x),
            **plan.config,
        )


def _weight_gradients(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    gates: Tensor,
    vectors: Tensor,
    dz: Tensor | None,
    v1: Tensor,
    g1: Tensor | None,
    v2: Tensor,
    g2: Tensor | None,
    sizes: Sizes,
    dropout_p: float,
    wanted: tuple[bool, bool, bool],
) -> list[Tensor]:
    """v1, g1, b1, v2, g2, b2, w_down, b_down; what is not wanted of (first, second, 1×1 filters) stays undefined."""
    batch, frames, ins, outs, taps, dilation = sizes
    wide, narrow, rows = padded(outs), padded(ins), batch * frames
    gpu, dtype = launch.gpu_of(x), key_dtype(x)
    key = tuning.Key(dtype, (ins, outs), (taps,), rows)
    candidates = gradient_candidates(outs, max(ins, outs), dtype, aligned=outs % 8 == 0 and ins % 8 == 0)
    config = dict(tuning.pick("tcn_block/triton_fused/weight_gradients", key, candidates, gpu))
    o_tiles = -(-wide // config["BLOCK_O"])
    narrow_tiles, wide_tiles = (o_tiles * -(-width // config["BLOCK_C"]) for width in (narrow, wide))
    programs = [
        count * want for count, want in zip((taps * narrow_tiles, taps * wide_tiles, narrow_tiles), wanted, strict=True)
    ]
    splits, chunk = split_rows(rows, sum(programs), config["BLOCK_R"], gpu)
    shapes = ((taps, wide, narrow), (taps, wide, wide), (1, wide, narrow))
    shares = [
        # One share at least: the sum over all is kept in the place of the first.
        x.new_empty(max(splits, 1), *size, dtype=torch.float32) if want else None
        for shape, want in zip(shapes, wanted, strict=True)
        for size in (shape, (wide,))
    ]
    launch.triton(
        f"{_KERNELS}:weight_gradients",
        (sum(programs), splits),
        *(dy, gates, hidden, hidden if dz is None else dz, x, *shares),
        *(programs[0], programs[1], rows, frames, chunk, taps, dilation, outs, ins, wide, narrow),
        PRECISION=launch.precision(x),
        **config,
    )
    gradients = [
        x.new_empty(shape if want else 0)
        for want, group in zip(
            wanted,
            (
                ((outs, ins, taps), (outs, 1, 1) if g1 is not None else 0, outs),
                ((outs, outs, taps), (outs, 1, 1) if g2 is not None else 0, outs),
                ((outs, ins, 1), outs),
            ),
            strict=True,
        )
        for shape in group
    ]
    launch.triton(
        f"{_KERNELS}:finish",
        (outs, 3 if wanted[2] else 2),
        *(*shares, splits, dropout(dropout_p)[1], *map(dense, (v1, g1, v2, g2)), vectors, *gradients),
        *(ins, outs, wide, narrow, taps),
        **finish_tiles(splits),
        num_warps=4,
        num_stages=1,
    )
    return gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, v1, g1, b1, v2, g2, b2, w_down, b_down, _, ctx.dilation, ctx.dropout_p, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.downsample = w_down is not None
    ctx.given = [tensor is not None for tensor in (x, v1, g1, b1, v2, g2, b2, w_down, b_down)]
    ctx.save_for_backward(x, *output[1:], v1, g1, v2, g2)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    wanted = [want and given for want, given in zip(ctx.needs_input_grad[:9], ctx.given, strict=True)]
    if dy is None or not any(wanted):
        return (None,) * 13
    found = _gradient(dy, *ctx.saved_tensors, ctx.downsample, ctx.dilation, ctx.dropout_p, wanted)
    return *(value if want else None for value, want in zip(found, wanted, strict=True)), *(None,) * 4


_forward.register_autograd(_backward, setup_context=_setup)  # type: ignore[attr-defined]


def _limits(case: TcnBlockCase) -> str | None:
    return refusal(case)


@OP.implementation("triton_fused", requires=("triton",), limits=_limits, step=step)
def tcn_block(
    x: Tensor,
    w1: Tensor | WeightNorm,
    b1: Tensor | None,
    w2: Tensor | WeightNorm,
    b2: Tensor | None,
    w_down: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    dilation: int,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """TCN residual block: [causal convolution, ReLU, dropout] twice, plus the input, and a ReLU.

    Args:
        x: Features, (N, C_in, T); those stored as (N, T, C_in) are not copied.
        w1: Filters of the first convolution, (C_out, C_in, K), or their `WeightNorm`.
        b1: (C_out,), or None.
        w2: Filters of the second, (C_out, C_out, K), or their `WeightNorm`.
        b2: (C_out,), or None.
        w_down: 1×1 filters on the shortcut, (C_out, C_in, 1); needed where the widths differ.
        b_down: (C_out,), or None.
        dilation: Distance between taps, in frames.
        dropout_p: Probability that an element is dropped, in [0, 1), taken in steps of 2⁻¹⁶.
        training: Dropout acts, with a seed that torch's generator draws on the device of x.

    Returns:
        (N, C_out, T), stored as (N, T, C_out), dtype of x.

    Raises:
        ValueError: Dtypes that differ.

    Source: Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.4, figure 1(b).
    """
    x, *parameters = arguments(x, w1, b1, w2, b2, w_down, b_down)
    same_dtype(x, *parameters)
    p = dropout_p if training else 0.0
    keep = wants_gradients(x, *parameters)
    y: Tensor = _forward(x.transpose(1, 2).contiguous(), *parameters, dropout_seed(x, p), dilation, p, keep)[0]
    return y.transpose(1, 2)
