# mypy: ignore-errors
"""One step of a causal convolution: new frames after remembered ones, (N, n, C) after (N, past, C)."""

import triton
import triton.language as tl


@triton.jit
def step_tile(
    new,
    state,
    v,
    g,
    bias,
    clip,
    frame,
    valid,
    frames,
    past,
    ins,
    outs,
    cols,
    taps,
    dilation,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """conv + bias, [BLOCK_M, BLOCK_N] in float32, of new frames after remembered ones.

    The filters are read as the caller holds them, (C_out, C_in, K), so that nothing need be packed for one frame; their
    length, where they are normed, is gathered on the way.
    """
    size = ins * taps
    e = tl.arange(0, BLOCK_K)
    acc = tl.zeros([clip.shape[0], cols.shape[0]], tl.float32)
    squares = tl.zeros([BLOCK_K, cols.shape[0]], tl.float32)
    wide = cols < outs
    v_cols = v + tl.where(wide, cols, 0) * size
    new_clip = new + (clip * frames * ins)[:, None]
    if state is not None:
        # The end of the memory: frame −1 lies just before it.
        state_clip = state + ((clip + 1) * past * ins)[:, None]
    for start in range(0, size, BLOCK_K):
        r = start + e
        inside = r < size
        c = tl.where(inside, r // taps, 0)
        at = frame[:, None] - ((taps - 1 - r % taps) * dilation)[None, :]  # [BLOCK_M, BLOCK_K]
        offset = at * ins + c[None, :]
        mask = valid[:, None] & inside[None, :]
        fresh = mask & (at >= 0)
        left = tl.load(new_clip + tl.where(fresh, offset, 0), mask=fresh, other=0.0)
        if state is not None:
            remembered = mask & (at < 0)
            old = tl.load(state_clip + tl.where(remembered, offset, 0), mask=remembered, other=0.0)
            left = tl.where(fresh, left, old)
        right = tl.load(
            v_cols[None, :] + tl.where(inside, r, 0)[:, None], mask=inside[:, None] & wide[None, :], other=0.0
        )
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if g is not None:
            wider = right.to(tl.float32)
            squares += wider * wider
    if g is not None:
        length = tl.sqrt(tl.sum(squares, 0))
        factor = tl.load(g + tl.where(wide, cols, 0)).to(tl.float32) / tl.where(wide, length, 1.0)
        acc *= factor[None, :]
    if bias is not None:
        acc += tl.load(bias + cols, mask=wide, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def remember(new, state, kept, program, batch, frames, past, width, BLOCK: tl.constexpr):
    """The last `past` frames of the remembered and the new ones, into `kept`, (N, past, width).

    Without `new` the places of new frames are left to whoever makes them.
    """
    e = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < batch.to(tl.int64) * past * width
    at = e // width % tl.maximum(past, 1) + frames - past
    clip = e // width // tl.maximum(past, 1)
    value = tl.zeros([BLOCK], kept.dtype.element_ty)
    if state is not None:
        old = mask & (at < 0)
        value = tl.load(state + tl.where(old, (clip * past + past + at) * width + e % width, 0), mask=old, other=0.0)
    if new is not None:
        fresh = mask & (at >= 0)
        place = tl.where(fresh, (clip * frames + at) * width + e % width, 0)
        value = tl.where(fresh, tl.load(new + place, mask=fresh, other=0.0), value)
        tl.store(kept + e, value, mask=mask)
    else:
        tl.store(kept + e, value, mask=mask & (at < 0))


@triton.jit(do_not_specialize=["batch", "frames", "past", "taps", "dilation", "column_tiles"])
def step(
    new,
    state,
    v,
    bias,
    y,
    kept,
    batch,
    frames,
    past,
    ins,
    outs,
    taps,
    dilation,
    column_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COPY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The next frames' outputs and the state after them. Grid: (programs of rows and columns, then of the state,)."""
    program = tl.program_id(0)
    work = tl.cdiv(batch * frames, BLOCK_M) * column_tiles
    if program < work:
        m = program // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        clip = (m // frames).to(tl.int64)
        valid = clip < batch
        acc = step_tile(
            new, state, v, None, bias, clip, m % frames, valid, frames, past, ins, outs, cols, taps, dilation,
            BLOCK_K, PRECISION,
        )  # fmt: skip
        place = tl.where(valid, m, 0).to(tl.int64)[:, None] * outs + cols[None, :]
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=valid[:, None] & (cols < outs)[None, :])
    else:
        remember(new, state, kept, program - work, batch, frames, past, ins, COPY)
