# mypy: ignore-errors
"""Triton kernels of the TCN residual block; rows, taps and filter gradients are those of the causal convolution.

Inside, features have `padded` channels, whole groups of 16, zeros in the padding.
"""

import triton
import triton.language as tl

from vidkernels.causal_conv1d.triton_phased_kernels import (
    accumulate,
    correlate,
    finish_filter,
    pack_filter,
    phased_rows,
)

PASSED = tl.constexpr(1)
"""Bit of a gate: the block's last ReLU let the element through."""
BRANCH = tl.constexpr(2)
"""Bit of a gate: so did it, and the second convolution's ReLU and dropout."""


@triton.jit(do_not_specialize=["taps"])
def prepare(
    v1,
    g1,
    b1,
    v2,
    g2,
    b2,
    w_down,
    b_down,
    w1_packed,
    w2_packed,
    down_packed,
    vectors,
    ins,
    outs,
    padded_ins,
    padded_outs,
    taps,
    BLOCK: tl.constexpr,
):
    """Packs all filters of a block, weight norm applied. Grid: (padded C_out, 2, or 3 with a downsampling).

    `vectors`: b1, b2, ‖v1‖, ‖v2‖ and, with a downsampling, b_down, each of padded length in float32. Missing biases are
    zeros, the lengths of plain filters ones.
    """
    o = tl.program_id(0)
    if tl.program_id(1) == 0:
        pack_filter(
            v1, g1, b1, w1_packed, vectors + 2 * padded_outs, vectors, o, ins, outs, padded_ins, padded_outs, taps,
            BLOCK,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        pack_filter(
            v2, g2, b2, w2_packed, vectors + 3 * padded_outs, vectors + padded_outs, o, outs, outs, padded_outs,
            padded_outs, taps, BLOCK,
        )  # fmt: skip
    elif w_down is not None:
        pack_filter(
            w_down, None, b_down, down_packed, None, vectors + 4 * padded_outs, o, ins, outs, padded_ins, padded_outs,
            1, BLOCK,
        )  # fmt: skip


@triton.jit
def relu(z):
    """max(z, 0) that keeps NaN, as torch's does."""
    return tl.where(z < 0, 0.0, z)


@triton.jit
def drop(z, seed, row, start, threshold, scale, WHICH: tl.constexpr):
    """z, [BLOCK_M, BLOCK_N], with elements dropped and the others scaled.

    What is drawn depends on the seed, the row in memory and the column alone, not on the tiles. Every call of Philox
    serves 8 columns, 16 bits each. 7 rounds are the fewest that passed every test of Salmon et al. (2011),
    "Parallel random numbers: as easy as 1, 2, 3".
    """
    zero = tl.zeros([z.shape[0], z.shape[1] // 8], tl.uint32)
    group = start // 8 + tl.arange(0, z.shape[1] // 8)
    c0 = row.to(tl.uint32)[:, None] + zero
    c1 = group.to(tl.uint32)[None, :] + zero
    a, b, c, d = tl.philox(tl.load(seed), c0, c1, zero + WHICH, zero, 7)
    four = tl.join(tl.join(a, b), tl.join(c, d))
    eight = tl.join(four & 0xFFFF, four >> 16).to(tl.int32)
    keep = tl.reshape((eight >= threshold).to(tl.int8), [z.shape[0], z.shape[1]])
    return tl.where(keep != 0, z * scale, 0.0)


@triton.jit(
    do_not_specialize=[
        "batch", "frames", "spread", "tiles", "block_p", "block_q", "taps", "dilation", "threshold", "scale",
    ]
)  # fmt: skip
def forward(
    x,
    w1,
    w2,
    w_down,
    vectors,
    seed,
    y,
    hidden,
    gates,
    scratch,
    batch,
    frames,
    spread,
    tiles,
    block_p,
    block_q,
    taps,
    dilation,
    ins,
    outs,
    padded_ins,
    padded_outs,
    threshold,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first half of the block, the second, or both; both take all columns of a tile of rows, one half one tile.

    Grid: (tiles of rows, 1 for both, tiles of columns for one half). With both, the hidden tile goes through `scratch`,
    (tiles, BLOCK_M, padded C_out), which no other block reads; its first taps − 1 frames are computed anew.
    `hidden` and `gates` are kept for the gradient, or None.
    """
    BOTH: tl.constexpr = FIRST and SECOND
    tile = tl.program_id(0)
    row, t, valid, owned = phased_rows(
        tile, batch, frames, spread, tiles, taps - 1 if BOTH else 0, block_p, block_q, BLOCK_M, False
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    here = tile.to(tl.int64) * BLOCK_M + m
    first = tl.program_id(1) * BLOCK_N
    last = padded_outs if BOTH else first + BLOCK_N
    if FIRST:
        for start in range(first, last, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            inside = cols < padded_outs
            z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            z = accumulate(
                z, x, None, 0, row, t, valid, ins, w1, padded_outs * padded_ins, 1, padded_ins, padded_ins, padded_outs,
                cols, taps, dilation, False, 0, BLOCK_K, PRECISION,
            )  # fmt: skip
            z = relu(z + tl.load(vectors + cols, mask=inside, other=0.0)[None, :])
            if seed is not None:
                z = drop(z, seed, row, start, threshold, scale, 0)
            narrow = z.to(w1.dtype.element_ty)
            if BOTH:
                tl.store(scratch + ((here * padded_outs)[:, None] + cols[None, :]), narrow, mask=inside[None, :])
            if hidden is not None:
                place = (row * padded_outs)[:, None] + cols[None, :]
                tl.store(hidden + place, narrow, mask=owned[:, None] & inside[None, :])
    if BOTH:
        tl.debug_barrier()
        source, source_row, source_t, source_dilation = scratch, here, m, block_p
    else:
        source, source_row, source_t, source_dilation = hidden, row, t, dilation
    if SECOND:
        for start in range(first, last, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            inside = cols < padded_outs
            z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            z = accumulate(
                z, source, None, 0, source_row, source_t, valid, padded_outs, w2, padded_outs * padded_outs, 1,
                padded_outs, padded_outs, padded_outs, cols, taps, source_dilation, False, 0, BLOCK_K, PRECISION,
            )  # fmt: skip
            z = relu(z + tl.load(vectors + padded_outs + cols, mask=inside, other=0.0)[None, :])
            if seed is not None:
                z = drop(z, seed, row, start, threshold, scale, 1)
            mask = owned[:, None] & (cols < outs)[None, :]
            branch = (z > 0).to(tl.int8)
            if w_down is None:
                total = z + tl.load(x + ((row * ins)[:, None] + cols[None, :]), mask=mask, other=0.0).to(tl.float32)
            else:
                bias = tl.load(vectors + 4 * padded_outs + cols, mask=inside, other=0.0)
                total = accumulate(
                    z + bias[None, :], x, None, 0, row, t, valid, ins, w_down, 0, 1, padded_ins, padded_ins,
                    padded_outs, cols, 1, 0, False, 0, BLOCK_K, PRECISION,
                )  # fmt: skip
            tl.store(y + ((row * outs)[:, None] + cols[None, :]), relu(total).to(y.dtype.element_ty), mask=mask)
            if gates is not None:
                passed = tl.where(total > 0, PASSED + BRANCH * branch, 0)
                place = (row * padded_outs)[:, None] + cols[None, :]
                tl.store(gates + place, passed.to(tl.uint8), mask=owned[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["batch", "frames", "spread", "tiles", "block_p", "block_q", "taps", "dilation", "scale"])
def input_gradient(
    dy,
    gates,
    hidden,
    w1,
    w2,
    w_down,
    dz,
    dx,
    scratch,
    batch,
    frames,
    spread,
    tiles,
    block_p,
    block_q,
    taps,
    dilation,
    ins,
    outs,
    padded_ins,
    padded_outs,
    scale,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The forward pass backwards, in mirrored time: FIRST is dy → dz, before the first ReLU; SECOND is dz → dx.

    Grid and `scratch` as of `forward`. What dropout left out need not be drawn again: the gates and the zeros of
    `hidden` tell. `dz` is kept for the filters' gradients, or None.
    """
    BOTH: tl.constexpr = FIRST and SECOND
    tile = tl.program_id(0)
    row, t, valid, owned = phased_rows(
        tile, batch, frames, spread, tiles, taps - 1 if BOTH else 0, block_p, block_q, BLOCK_M, True
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    here = tile.to(tl.int64) * BLOCK_M + m
    first = tl.program_id(1) * BLOCK_N
    if FIRST:
        for start in range(first, padded_outs if BOTH else first + BLOCK_N, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            inside = cols < padded_outs
            z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            z = accumulate(
                z, dy, gates, padded_outs, row, t, valid, outs, w2, padded_outs * padded_outs, padded_outs, 1,
                padded_outs, padded_outs, cols, taps, dilation, True, BRANCH, BLOCK_K, PRECISION,
            )  # fmt: skip
            place = (row * padded_outs)[:, None] + cols[None, :]
            active = tl.load(hidden + place, mask=valid[:, None] & inside[None, :], other=0.0) > 0
            # Both dropouts scale: what follows the second convolution's, and this one.
            narrow = tl.where(active, z * (scale * scale), 0.0).to(w2.dtype.element_ty)
            if BOTH:
                tl.store(scratch + ((here * padded_outs)[:, None] + cols[None, :]), narrow, mask=inside[None, :])
            if dz is not None:
                tl.store(dz + place, narrow, mask=owned[:, None] & inside[None, :])
    if BOTH:
        tl.debug_barrier()
    if SECOND:
        for start in range(first, padded_ins if BOTH else first + BLOCK_N, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if BOTH:
                z = accumulate(
                    z, scratch, None, 0, here, m, valid, padded_outs, w1, padded_outs * padded_ins, padded_ins, 1,
                    padded_outs, padded_ins, cols, taps, block_p, False, 0, BLOCK_K, PRECISION,
                )  # fmt: skip
            else:
                z = accumulate(
                    z, dz, None, 0, row, t, valid, padded_outs, w1, padded_outs * padded_ins, padded_ins, 1,
                    padded_outs, padded_ins, cols, taps, dilation, True, 0, BLOCK_K, PRECISION,
                )  # fmt: skip
            mask = owned[:, None] & (cols < ins)[None, :]
            if w_down is None:
                shortcut = tl.load(dy + ((row * outs)[:, None] + cols[None, :]), mask=mask, other=0.0)
                gate = tl.load(gates + ((row * padded_outs)[:, None] + cols[None, :]), mask=mask, other=0)
                z += tl.where((gate & PASSED) != 0, shortcut.to(tl.float32), 0.0)
            else:
                z = accumulate(
                    z, dy, gates, padded_outs, row, t, valid, outs, w_down, 0, padded_ins, 1, padded_outs, padded_ins,
                    cols, 1, 0, True, PASSED, BLOCK_K, PRECISION,
                )  # fmt: skip
            tl.store(dx + ((row * ins)[:, None] + cols[None, :]), z.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["programs_1", "programs_2", "rows", "frames", "chunk", "taps", "dilation"])
def weight_gradients(
    dy,
    gates,
    hidden,
    dz,
    x,
    partial_1,
    bias_partial_1,
    partial_2,
    bias_partial_2,
    partial_down,
    bias_partial_down,
    programs_1,
    programs_2,
    rows,
    frames,
    chunk,
    taps,
    dilation,
    outs,
    ins,
    padded_outs,
    padded_ins,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every split's share of all filters' gradients. Grid: (programs of the second, first and 1×1 filters, splits)."""
    program = tl.program_id(0)
    split = tl.program_id(1)
    if program < programs_2:
        if partial_2 is not None:
            correlate(
                dy, gates, padded_outs, hidden, partial_2, bias_partial_2, program, split, rows, frames, chunk, taps,
                dilation, outs, padded_outs, padded_outs, padded_outs, BRANCH, BLOCK_O, BLOCK_C, BLOCK_R, PRECISION,
            )  # fmt: skip
    elif program < programs_2 + programs_1:
        if partial_1 is not None:
            correlate(
                dz, None, 0, x, partial_1, bias_partial_1, program - programs_2, split, rows, frames, chunk, taps,
                dilation, padded_outs, ins, padded_outs, padded_ins, 0, BLOCK_O, BLOCK_C, BLOCK_R, PRECISION,
            )  # fmt: skip
    elif partial_down is not None:
        correlate(
            dy, gates, padded_outs, x, partial_down, bias_partial_down, program - programs_2 - programs_1, split, rows,
            frames, chunk, 1, 0, outs, ins, padded_outs, padded_ins, PASSED, BLOCK_O, BLOCK_C, BLOCK_R, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "taps", "scale"])
def finish(
    partial_1,
    bias_partial_1,
    partial_2,
    bias_partial_2,
    partial_down,
    bias_partial_down,
    splits,
    scale,
    v1,
    g1,
    v2,
    g2,
    vectors,
    dv1,
    dg1,
    db1,
    dv2,
    dg2,
    db2,
    dw_down,
    db_down,
    ins,
    outs,
    padded_outs,
    padded_ins,
    taps,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All parameters' gradients from their shares, weight norm included. Grid: (C_out, 2, or 3 with a downsampling)."""
    o = tl.program_id(0)
    if tl.program_id(1) == 0:
        if partial_1 is not None:
            finish_filter(
                partial_1, bias_partial_1, splits, 1.0, v1, g1, vectors + 2 * padded_outs, dv1, dg1, db1, o, ins,
                padded_outs, padded_ins, taps, SPLITS, BLOCK,
            )  # fmt: skip
    elif tl.program_id(1) == 1:
        if partial_2 is not None:
            # The second dropout's scale was left out of what these shares sum.
            finish_filter(
                partial_2, bias_partial_2, splits, scale, v2, g2, vectors + 3 * padded_outs, dv2, dg2, db2, o, outs,
                padded_outs, padded_outs, taps, SPLITS, BLOCK,
            )  # fmt: skip
    elif partial_down is not None:
        finish_filter(
            partial_down, bias_partial_down, splits, 1.0, None, None, None, dw_down, None, db_down, o, ins,
            padded_outs, padded_ins, 1, SPLITS, BLOCK,
        )  # fmt: skip
