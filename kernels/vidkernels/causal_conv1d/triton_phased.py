"""Causal convolution as matrix products, tap by tap, on frames stored as (N, T, C).

The data gradient is the same kernel in mirrored time; the filters' gradient is split over the frames and its shares
are summed in a fixed order. README.md has the design.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.causal_conv1d.case import OP, CausalConv1dCase
from vidkernels.launch import Gpu
from vidkernels.op import dtype_name, wants_gradients

_KERNELS = "causal_conv1d.triton_phased_kernels"
_ROWS_MAX = 2**31


class Tiles(NamedTuple):
    """How frames are dealt to tiles; see `phased_rows`."""

    spread: int
    """Phases of a clip."""
    per_phase: int
    """Tiles that one phase takes."""
    block_p: int
    block_q: int
    total: int
    """Tiles in all."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What `phased_rows` takes of it."""
        return self.spread, self.per_phase, self.block_p, self.block_q


def phased_tiles(batch: int, frames: int, dilation: int, halo: int, block_m: int) -> Tiles | None:
    """The fewest tiles of block_m frames, by phases of t mod dilation; None where the halo fills them.

    Args:
        halo: Frames of a phase that a tile shares with the one before.
    """
    length = -(-frames // dilation)
    best: Tiles | None = None
    block_q = block_m
    while block_q:
        block_p = block_m // block_q
        if length <= block_q or halo < block_q:
            per_phase = 1 if length <= block_q else 1 + -(-(length - block_q) // (block_q - halo))
            total = -(-batch * dilation // block_p) * per_phase
            if best is None or total < best.total:
                best = Tiles(dilation, per_phase, block_p, block_q, total)
        block_q //= 2
    return best


def apart(batch: int, frames: int, dilation: int, block_m: int) -> Tiles:
    """`phased_tiles` without a halo, for one convolution by itself."""
    tiles = phased_tiles(batch, frames, dilation, 0, block_m)
    assert tiles is not None
    return tiles


def padded(channels: int) -> int:
    """Channels as they are stored inside: whole groups of 16 keep rows aligned to the widest loads."""
    return -(-channels // 16) * 16


def power_of_2(value: int, least: int = 16) -> int:
    """The least power of 2 that is neither below value nor below `least`."""
    return max(least, 1 << max(value - 1, 0).bit_length())


def key_dtype(x: Tensor) -> str:
    """The arithmetic of kernels on x, as tuned tables know it."""
    return "tf32" if launch.precision(x) == "tf32" else dtype_name(x)


def reach(dilation: int, frames: int) -> int:
    """The dilation, or the clip's length where that is less: taps further back meet zeros alone."""
    return max(1, min(dilation, frames))


LOOP_CLOCKS, LAUNCH_CLOCKS = 1000, 2500
"""Estimates of what it takes to fill a pipeline of loads, and to start another kernel."""


def tile_clocks(config: dict[str, int], taps: int, depth: int) -> int:
    """Estimated clocks of one tile of products, for the order of configurations alone: L2 bandwidth counts most."""
    m, n = config["BLOCK_M"], config["BLOCK_N"]
    return LOOP_CLOCKS + taps * depth * (m * n // 16 + 4 * (m + n)) // 128


def waves(tiles: int, gpu: Gpu) -> float:
    """How often every processor has a tile to do; processors hold several at once, so that no wave need be whole."""
    return max(1.0, tiles / gpu.processors)


def tile_candidates(outs: int, depth: int, dtype: str, gpu: Gpu, *, aligned: bool) -> list[dict[str, int]]:
    """Tiles of a convolution's matrix products.

    Args:
        outs: Columns.
        depth: Channels that are summed over.
        dtype: As in `key_dtype`.
        aligned: Rows of features begin at multiples of 16 bytes; others are loaded element by element.
    """
    shapes: tuple[tuple[int, int, int, int], ...]
    if dtype in ("fp16", "bf16"):
        shapes = ((128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 4), (64, 128, 8, 3), (32, 64, 4, 4), (16, 64, 4, 4))
        inner, item = 64 if aligned else 32, 2
    elif dtype == "tf32":
        shapes = ((128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3), (16, 32, 4, 3))
        inner, item = 32, 4
    else:
        # Without matrix instructions every product passes through registers.
        shapes = ((64, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2))
        inner, item = 16, 4
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for block_m, block_n, warps, stages in shapes:
        config = {
            "BLOCK_M": block_m,
            "BLOCK_N": min(block_n, power_of_2(outs)),
            "BLOCK_K": min(inner, power_of_2(depth)),
            "num_warps": warps,
            "num_stages": stages,
        }
        shared = stages * item * (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"]
        if shared <= gpu.shared_bytes:
            found.setdefault(tuple(config.values())[:3], config)
    return list(found.values())


class Split(NamedTuple):
    """How the rows of a filter gradient are shared out."""

    splits: int
    chunk: int
    """Rows of a split."""


def split_rows(rows: int, programs: int, block_r: int, gpu: Gpu) -> Split:
    """About two blocks for every processor, as far as there are rows for them."""
    blocks = -(-rows // block_r)
    splits = max(1, min(blocks, 2 * gpu.processors // max(programs, 1)))
    per_split = -(-blocks // splits)
    return Split(-(-blocks // per_split) if blocks else 0, per_split * block_r)


def gradient_candidates(outs: int, ins: int, dtype: str, *, aligned: bool) -> list[dict[str, int]]:
    """Tiles of a filter gradient; arguments as of `tile_candidates`."""
    shapes: tuple[tuple[int, int, int, int, int], ...]
    if dtype in ("fp16", "bf16"):
        shapes = ((64, 64, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 128, 8, 3), (32, 32, 64, 4, 4))
        if not aligned:
            shapes = ((64, 32, 64, 8, 2), (32, 32, 64, 4, 2))
    elif dtype == "tf32":
        shapes = ((64, 64, 32, 4, 3), (32, 32, 64, 4, 3))
    else:
        shapes = ((32, 32, 16, 4, 2), (64, 32, 16, 4, 2))
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for block_o, block_c, block_r, warps, stages in shapes:
        config = {
            "BLOCK_O": min(block_o, power_of_2(outs)),
            "BLOCK_C": min(block_c, power_of_2(ins)),
            "BLOCK_R": block_r,
            "num_warps": warps,
            "num_stages": stages,
        }
        found.setdefault(tuple(config.values())[:3], config)
    return list(found.values())


def finish_tiles(splits: int) -> dict[str, int]:
    """Tiles of the sum over splits: shares side by side, so that their loads overlap."""
    shares = 1 if splits <= 1 else 4 if splits <= 4 else 16
    return {"SPLITS": shares, "BLOCK": min(1024, 2048 // shares)}


def pack_block(ins: int, taps: int) -> int:
    """Elements of a filter that its packing takes at once."""
    return min(2048, power_of_2(ins * taps, 128))


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, contiguous; None stays None."""
    return None if tensor is None else tensor.contiguous()


def same_dtype(x: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError where a tensor's dtype is not that of x."""
    for other in others:
        if other is not None and other.dtype is not x.dtype:
            raise ValueError(f"x is {x.dtype} and a parameter {other.dtype}: give them one dtype, or use autocast")


def refusal(case: Any) -> str | None:
    """Why a case of this op or of the TCN block is beyond kernels that count frames in 32 bits."""
    if why := launch.dtype_refusal(case, "fp32", "tf32", "fp16", "bf16"):
        return why
    if max(case.batch_size, 1) * case.clip_length * case.kernel_size >= _ROWS_MAX:
        return f"batch_size={case.batch_size} times clip_length={case.clip_length} and the taps pass 2³¹"
    return None


def _limits(case: CausalConv1dCase) -> str | None:
    return refusal(case)


def _packed(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    outs, ins, taps = weight.shape
    w = weight.new_empty(taps, padded(outs), padded(ins))
    b = weight.new_empty(padded(outs), dtype=torch.float32)
    launch.triton(
        f"{_KERNELS}:pack",
        (padded(outs),),
        *(weight.contiguous(), dense(bias), w, b, ins, outs, padded(ins), padded(outs), taps),
        BLOCK=pack_block(ins, taps),
        num_warps=4,
        num_stages=1,
    )
    return w, b


def _convolve(x: Tensor, w: Tensor, bias: Tensor | None, outs: int, dilation: int, *, mirror: bool) -> Tensor:
    """x, (N, T, C), with packed filters; mirrored, with their axes exchanged."""
    batch, frames, width = x.shape
    taps, padded_outs, padded_ins = w.shape
    strides, depth = (padded_outs * padded_ins, 1, padded_ins), padded_ins
    if mirror:
        strides, depth, padded_outs = (padded_outs * padded_ins, padded_ins, 1), padded_outs, padded_ins
    gpu, dtype, dilation = launch.gpu_of(x), key_dtype(x), reach(dilation, frames)
    candidates = tile_candidates(padded_outs, depth, dtype, gpu, aligned=width % 8 == 0)

    def clocks(config: dict[str, int]) -> float:
        tiles = apart(batch, frames, dilation, config["BLOCK_M"]).total * -(-outs // config["BLOCK_N"])
        return waves(tiles, gpu) * tile_clocks(config, taps, depth)

    candidates.sort(key=clocks)
    direction = "input_gradient" if mirror else "forward"
    key = tuning.Key(dtype, (width, outs), (taps,), batch * frames)
    config = dict(tuning.pick(f"causal_conv1d/triton_phased/{direction}", key, candidates, gpu))
    tiles = apart(batch, frames, dilation, config["BLOCK_M"])
    y = x.new_empty(batch, frames, outs)
    launch.triton(
        f"{_KERNELS}:convolve",
        (tiles.total, -(-outs // config["BLOCK_N"])),
        *(x, w, bias, y, batch, frames, *tiles.shape, taps, dilation),
        *(width, outs, *strides, depth, padded_outs),
        MIRROR=mirror,
        PRECISION=launch.precision(x),
        **config,
    )
    return y


@launch.custom_op("causal_conv1d_phased(Tensor x, Tensor weight, Tensor? bias, int dilation) -> Tensor")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """x, (N, T, C_in), to (N, T, C_out)."""
    w, b = _packed(weight, bias)
    return _convolve(x, w, b, weight.shape[0], dilation, mirror=False)


@launch.custom_op("causal_conv1d_phased_input_gradient(Tensor dy, Tensor weight, int dilation) -> Tensor")
def _input_gradient(dy: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """dy, (N, T, C_out), to dx, (N, T, C_in)."""
    w, _ = _packed(weight, None)
    return _convolve(dy.contiguous(), w, None, weight.shape[1], dilation, mirror=True)


@launch.custom_op(
    "causal_conv1d_phased_weight_gradient(Tensor dy, Tensor x, int taps, int dilation) -> (Tensor, Tensor)"
)
def _weight_gradient(dy: Tensor, x: Tensor, taps: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The gradients of the filters, (C_out, C_in, K), and of the bias."""
    dy = dy.contiguous()
    batch, frames, ins = x.shape
    outs, rows = dy.shape[2], batch * frames
    gpu, dtype = launch.gpu_of(x), key_dtype(x)
    key = tuning.Key(dtype, (ins, outs), (taps,), rows)
    candidates = gradient_candidates(outs, ins, dtype, aligned=outs % 8 == 0 and ins % 8 == 0)
    config = dict(tuning.pick("causal_conv1d/triton_phased/weight_gradient", key, candidates, gpu))
    programs = taps * -(-padded(outs) // config["BLOCK_O"]) * -(-padded(ins) // config["BLOCK_C"])
    splits, chunk = split_rows(rows, programs, config["BLOCK_R"], gpu)
    partial = x.new_empty(splits, taps, padded(outs), padded(ins), dtype=torch.float32)
    bias_partial = x.new_empty(splits, padded(outs), dtype=torch.float32)
    launch.triton(
        f"{_KERNELS}:weight_gradient",
        (programs, splits),
        *(dy, x, partial, bias_partial, rows, frames, chunk, taps, reach(dilation, frames)),
        *(outs, ins, padded(outs), padded(ins)),
        PRECISION=launch.precision(x),
        **config,
    )
    dw, db = x.new_empty(outs, ins, taps), x.new_empty(outs)
    launch.triton(
        f"{_KERNELS}:finish",
        (outs,),
        *(partial, bias_partial, splits, dw, db, ins, padded(outs), padded(ins), taps),
        **finish_tiles(splits),
        num_warps=4,
        num_stages=1,
    )
    return dw, db


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, dilation = inputs
    ctx.save_for_backward(x, weight)
    ctx.dilation = dilation


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, weight, ctx.dilation)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dw, db = _weight_gradient(dy, x, weight.shape[2], ctx.dilation)
    return dx, dw if ctx.needs_input_grad[1] else None, db if ctx.needs_input_grad[2] else None, None


_forward.register_autograd(_backward, setup_context=_setup)  # type: ignore[attr-defined]


def step_tiles(rows: int, size: int, item_bytes: int) -> dict[str, int]:
    """Tiles of one step: narrow ones, so that every processor reads a share of the filters."""
    block_k = min(128 if item_bytes == 2 else 64, power_of_2(size))
    return {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": 16, "BLOCK_K": block_k}


COPY = 1024
"""Elements of a state that one program carries over."""


@launch.custom_op(
    "causal_conv1d_phased_step(Tensor x, Tensor weight, Tensor? bias, Tensor? state, int dilation) -> (Tensor, Tensor)"
)
def _step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, dilation: int) -> tuple[Tensor, Tensor]:
    """New frames, (N, n, C_in), after the remembered ones, (N, (K−1)·d, C_in)."""
    batch, frames, ins = x.shape
    outs, _, taps = weight.shape
    past = (taps - 1) * dilation
    y, kept = x.new_empty(batch, frames, outs), x.new_empty(batch, past, ins)
    tiles = step_tiles(batch * frames, ins * taps, x.element_size())
    column_tiles = -(-outs // tiles["BLOCK_N"])
    programs = -(-batch * frames // tiles["BLOCK_M"]) * column_tiles + -(-kept.numel() // COPY)
    launch.triton(
        "causal_conv1d.triton_phased_step_kernels:step",
        (programs,),
        *(x, state, weight.contiguous(), dense(bias), y, kept),
        *(batch, frames, past, ins, outs, taps, dilation, column_tiles),
        **tiles,
        COPY=COPY,
        PRECISION=launch.precision(x),
        num_warps=4,
        num_stages=2,
    )
    return y, kept


def step(
    x_t: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor | None = None, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """The next frames (N, C_in, n): their outputs, and the last (K−1)·d frames of input for the next call.

    One launch. Meant for inference: it has no gradient, and asking for one raises RuntimeError.
    """
    x_t, weight, bias, state = (
        launch.autocast(x_t, weight, bias, state)
        if state is not None
        else (
            *launch.autocast(x_t, weight, bias),
            None,
        )
    )
    same_dtype(x_t, weight, bias, state)
    no_gradient(x_t, weight, bias, state)
    remembered = None if state is None else state.transpose(1, 2).contiguous()
    y, kept = _step(x_t.transpose(1, 2).contiguous(), weight, bias, remembered, dilation)
    return y.transpose(1, 2), kept.transpose(1, 2)


def no_gradient(*tensors: Any) -> None:
    """Raises RuntimeError where a gradient of a step would be recorded."""
    if wants_gradients(*tensors):
        raise RuntimeError("a step has no gradient: call it under torch.no_grad()")


@OP.implementation("triton_phased", requires=("triton",), limits=_limits, step=step)
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
    """Causal dilated 1-D convolution: y[t] depends on x[≤ t] alone.

    Args:
        x: Features, (N, C_in, T); those stored as (N, T, C_in) are not copied.
        weight: Filters, (C_out, C_in, K); tap K-1 meets the present frame.
        bias: (C_out,), or None.
        dilation: Distance between taps, in frames.

    Returns:
        (N, C_out, T), stored as (N, T, C_out), dtype of x.

    Raises:
        ValueError: Dtypes that differ.

    Source: Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.2-3.3.
    """
    x, weight, bias = launch.autocast(x, weight, bias)
    same_dtype(x, weight, bias)
    y: Tensor = _forward(x.transpose(1, 2).contiguous(), weight, bias, dilation)
    return y.transpose(1, 2)
