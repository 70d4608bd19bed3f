# mypy: ignore-errors
"""One step of the TCN residual block: new frames after remembered ones, filters read as the caller holds them."""

import triton
import triton.language as tl

from vidkernels.causal_conv1d.triton_phased_step_kernels import remember, step_tile
from vidkernels.tcn_block.triton_fused_kernels import drop, relu


@triton.jit(
    do_not_specialize=[
        "batch",
        "frames",
        "past",
        "taps",
        "dilation",
        "row_tiles",
        "column_tiles",
        "copies",
        "threshold",
    ]
)
def step(
    x,
    past_x,
    past_hidden,
    v1,
    g1,
    b1,
    v2,
    g2,
    b2,
    w_down,
    b_down,
    seed,
    hidden,
    y,
    kept_x,
    kept_hidden,
    batch,
    frames,
    past,
    ins,
    outs,
    taps,
    dilation,
    row_tiles,
    column_tiles,
    copies,
    rows_per_tile,
    threshold,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first half of a step, the second, or both. Both: a tile of rows holds whole clips, and all columns.

    Grid: (row tiles × column tiles, then `copies` for the state of x and as many programs as are left for the hidden
    state,); the state is carried over with the first half.
    """
    program = tl.program_id(0)
    work = row_tiles * column_tiles
    if program < work:
        m = tl.arange(0, BLOCK_M)
        index = program // column_tiles * rows_per_tile + m
        valid = (m < rows_per_tile) & (index < batch * frames)
        index = tl.where(valid, index, 0).to(tl.int64)
        clip = index // frames
        frame = (index % frames).to(tl.int32)
        cols = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = valid[:, None] & (cols < outs)[None, :]
        place = (index * outs)[:, None] + cols[None, :]
        if FIRST:
            z = step_tile(
                x, past_x, v1, g1, b1, clip, frame, valid, frames, past, ins, outs, cols, taps, dilation, BLOCK_K,
                PRECISION,
            )  # fmt: skip
            z = relu(z)
            if seed is not None:
                z = drop(z, seed, index, program % column_tiles * BLOCK_N, threshold, scale, 0)
            narrow = z.to(y.dtype.element_ty)
            tl.store(hidden + place, narrow, mask=mask)
            at = frame + past - frames
            place_kept = ((clip * past + at) * outs)[:, None] + cols[None, :]
            tl.store(kept_hidden + place_kept, narrow, mask=mask & (at >= 0)[:, None])
        if FIRST and SECOND:
            tl.debug_barrier()
        if SECOND:
            z = step_tile(
                hidden, past_hidden, v2, g2, b2, clip, frame, valid, frames, past, outs, outs, cols, taps, dilation,
                BLOCK_K, PRECISION,
            )  # fmt: skip
            z = relu(z)
            if seed is not None:
                z = drop(z, seed, index, program % column_tiles * BLOCK_N, threshold, scale, 1)
            if w_down is None:
                z += tl.load(x + ((index * ins)[:, None] + cols[None, :]), mask=mask, other=0.0).to(tl.float32)
            else:
                z += step_tile(
                    x, None, w_down, None, b_down, clip, frame, valid, frames, 0, ins, outs, cols, 1, 0, BLOCK_K,
                    PRECISION,
                )  # fmt: skip
            tl.store(y + place, relu(z).to(y.dtype.element_ty), mask=mask)
    elif program < work + copies:
        if FIRST:
            remember(x, past_x, kept_x, program - work, batch, frames, past, ins, COPY)
    else:
        if FIRST:
            remember(None, past_hidden, kept_hidden, program - work - copies, batch, frames, past, outs, COPY)
