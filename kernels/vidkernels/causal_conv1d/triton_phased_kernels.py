# mypy: ignore-errors
"""Triton kernels of causal convolutions: rows by phase, taps as matrix products, packed filters.

Features are (N, T, C), contiguous. Time may run backwards (`MIRROR`): the gradient of a causal convolution is one in
mirrored time. Filters are packed as (K, padded C_out, padded C_in), zeros in the padding, so that rows are aligned.
"""

import triton
import triton.language as tl


@triton.jit
def phased_rows(
    tile, batch, frames, spread, tiles, halo, block_p, block_q, BLOCK_M: tl.constexpr, MIRROR: tl.constexpr
):
    """The frames of a tile: block_q successive ones of each of block_p phases, phases innermost.

    The phases of a clip are t mod spread; within one of them a convolution of dilation `spread` has dilation 1. All
    clips' phases are numbered through. Where a phase takes several tiles, each begins with the last `halo` frames of
    the one before it, which it does not own.

    Returns:
        row, n·T + t in memory; t, in the direction of time; valid, within the clips; owned.
    """
    m = tl.arange(0, BLOCK_M)
    q = m // block_p
    part = tile % tiles
    phase = tile // tiles * block_p + m % block_p
    clip = phase // spread
    t = (part * (block_q - halo) + q) * spread + phase % spread
    valid = (clip < batch) & (t < frames)
    owned = valid & ((part == 0) | (q >= halo))
    place = frames - 1 - t if MIRROR else t
    # N·T·C passes 2³¹: rows are int64.
    row = clip.to(tl.int64) * frames + place
    return row, t, valid, owned


@triton.jit
def within(index, size):
    """The index where it is below the size, and one of the first 16 where a mask hides it.

    Runs of 16 stay runs of 16, where a constant in their place would cost the wide loads and with them the pipeline.
    """
    return tl.where(index < size, index, index % 16)


@triton.jit
def accumulate(
    acc,
    a,
    gates,
    gate_width,
    row,
    t,
    valid,
    width,
    w,
    w_tap,
    w_in,
    w_out,
    depth,
    outs,
    cols,
    taps,
    dilation,
    MIRROR: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + Σ over taps of a[t − (K−1−k)·d] · w[k], frames before the clip's start being zeros.

    Args:
        acc: [BLOCK_M, BLOCK_N], float32.
        a: Rows of `width` features, found by `row`; `t` is the frame within the clip, which time shifts.
        gates: Bits of (rows, gate_width) that let an element of `a` through, where GATE names one.
        w: Packed filters: element (k, c, o) at k·w_tap + c·w_in + o·w_out, c < depth, o < outs.
        cols: [BLOCK_N], the filters of this tile.
    """
    k = tl.arange(0, BLOCK_K)
    wide = cols < outs
    w_cols = w + within(cols, outs) * w_out
    tap = 0
    start = 0
    # One pipelined loop over taps and channels, with carried counters: no division.
    for _ in range(taps * tl.cdiv(depth, BLOCK_K)):
        shift = (taps - 1 - tap) * dilation
        inner = start + k
        there = valid & (t >= shift)
        moved = row + shift if MIRROR else row - shift
        moved = tl.where(there, moved, 0)
        mask = there[:, None] & (inner < width)[None, :]
        narrow = within(inner, width)
        left = tl.load(a + ((moved * width)[:, None] + narrow[None, :]), mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if GATE:
            gate = tl.load(gates + ((moved * gate_width)[:, None] + narrow[None, :]), mask=mask, other=0)
            left = tl.where((gate & GATE) != 0, left, 0.0)
        deep = inner < depth
        w_rows = tap * w_tap + within(inner, depth) * w_in
        mask = deep[:, None] & wide[None, :]
        right = tl.load(w_rows[:, None] + w_cols[None, :], mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        start += BLOCK_K
        last = start >= depth
        tap = tl.where(last, tap + 1, tap)
        start = tl.where(last, 0, start)
    return acc


@triton.jit(do_not_specialize=["batch", "frames", "spread", "tiles", "block_p", "block_q", "taps", "dilation"])
def convolve(
    x,
    w,
    bias,
    y,
    batch,
    frames,
    spread,
    tiles,
    block_p,
    block_q,
    taps,
    dilation,
    width,
    outs,
    w_tap,
    w_in,
    w_out,
    depth,
    padded_outs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MIRROR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = conv(x) + bias, or the input gradient of it, in mirrored time with the filters' axes exchanged.

    Grid: (tiles of rows, tiles of columns). `bias` is float32 of padded length, or None.
    """
    row, t, valid, owned = phased_rows(
        tl.program_id(0), batch, frames, spread, tiles, 0, block_p, block_q, BLOCK_M, MIRROR
    )
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = accumulate(
        acc, x, None, 0, row, t, valid, width, w, w_tap, w_in, w_out, depth, padded_outs, cols, taps, dilation,
        MIRROR, 0, BLOCK_K, PRECISION,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < padded_outs, other=0.0)[None, :]
    mask = owned[:, None] & (cols < outs)[None, :]
    tl.store(y + ((row * outs)[:, None] + cols[None, :]), acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def pack_filter(v, g, bias, w, lengths, bias_out, o, ins, outs, padded_ins, padded_outs, taps, BLOCK: tl.constexpr):
    """One filter of (C_out, C_in, K), scaled to the length g where it is given, into its packed place."""
    e = tl.arange(0, BLOCK)
    size = ins * taps
    base = v + tl.where(o < outs, o, 0) * size
    factor = 1.0
    length = 1.0
    if g is not None:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            value = tl.load(base + start + e, mask=start + e < size, other=0.0).to(tl.float32)
            squares += value * value
        length = tl.sqrt(tl.sum(squares))
        factor = tl.load(g + tl.where(o < outs, o, 0)).to(tl.float32) / length
    if lengths is not None:
        tl.store(lengths + o, length)
    # In the order of v, channels outer and taps inner: v is read in whole lines.
    for start in range(0, padded_ins * taps, BLOCK):
        r = start + e
        value = tl.load(base + r, mask=(r < size) & (o < outs), other=0.0).to(tl.float32)
        value = tl.where((r < size) & (o < outs), value * factor, 0.0)
        place = (r % taps * padded_outs + o) * padded_ins + r // taps
        tl.store(w + place, value.to(w.dtype.element_ty), mask=r < padded_ins * taps)
    value = 0.0
    if bias is not None:
        value = tl.load(bias + o, mask=o < outs, other=0.0).to(tl.float32)
    tl.store(bias_out + o, value)


@triton.jit(do_not_specialize=["taps"])
def pack(v, bias, w, bias_out, ins, outs, padded_ins, padded_outs, taps, BLOCK: tl.constexpr):
    """Packs the filters and the bias of one convolution. Grid: (padded C_out,)."""
    o = tl.program_id(0)
    pack_filter(v, None, bias, w, None, bias_out, o, ins, outs, padded_ins, padded_outs, taps, BLOCK)


@triton.jit
def correlate(
    dz,
    gates,
    gate_width,
    a,
    partial,
    bias_partial,
    program,
    split,
    rows,
    frames,
    chunk,
    taps,
    dilation,
    outs,
    ins,
    padded_outs,
    padded_ins,
    GATE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split's share of a filter gradient: dw[k, o, c] = Σ over its rows of dz[t, o] · a[t − (K−1−k)·d, c].

    Args:
        program: Tile of filters, of channels, and tap, channels innermost.
        chunk: Rows of a split, a multiple of BLOCK_R.
        partial: (splits, K, padded C_out, padded C_in), float32; bias_partial: (splits, padded C_out).
    """
    c_tiles = tl.cdiv(padded_ins, BLOCK_C)
    o_tiles = tl.cdiv(padded_outs, BLOCK_O)
    c_tile = program % c_tiles
    o_tile = program // c_tiles % o_tiles
    tap = program // (c_tiles * o_tiles)
    shift = (taps - 1 - tap) * dilation
    o = o_tile * BLOCK_O + tl.arange(0, BLOCK_O)
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    o_safe = within(o, outs)
    c_safe = within(c, ins)
    acc = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_O], tl.float32)
    for start in range(0, chunk, BLOCK_R):
        r = split * chunk + start + tl.arange(0, BLOCK_R)
        inside = r < rows
        there = inside & (r % frames >= shift)
        left_row = tl.where(inside, r, 0).to(tl.int64)
        right_row = tl.where(there, r - shift, 0).to(tl.int64)
        mask = inside[:, None] & (o < outs)[None, :]
        left = tl.load(dz + ((left_row * outs)[:, None] + o_safe[None, :]), mask=mask, other=0.0)  # [BLOCK_R, BLOCK_O]
        if GATE:
            gate = tl.load(gates + ((left_row * gate_width)[:, None] + o_safe[None, :]), mask=mask, other=0)
            left = tl.where((gate & GATE) != 0, left, 0.0)
        mask = there[:, None] & (c < ins)[None, :]
        right = tl.load(a + ((right_row * ins)[:, None] + c_safe[None, :]), mask=mask, other=0.0)  # [BLOCK_R, BLOCK_C]
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)
        sums += left.to(tl.float32)
    place = ((split * taps + tap).to(tl.int64) * padded_outs + o)[:, None] * padded_ins + c[None, :]
    tl.store(partial + place, acc, mask=(o < padded_outs)[:, None] & (c < padded_ins)[None, :])
    if (tap == taps - 1) & (c_tile == 0):
        tl.store(bias_partial + split * padded_outs + o, tl.sum(sums, 0), mask=o < padded_outs)


@triton.jit(do_not_specialize=["rows", "frames", "chunk", "taps", "dilation"])
def weight_gradient(
    dz,
    a,
    partial,
    bias_partial,
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
    """Every split's share of the gradients of filters and bias. Grid: (taps and tiles, splits)."""
    correlate(
        dz, None, 0, a, partial, bias_partial, tl.program_id(0), tl.program_id(1), rows, frames, chunk, taps, dilation,
        outs, ins, padded_outs, padded_ins, 0, BLOCK_O, BLOCK_C, BLOCK_R, PRECISION,
    )  # fmt: skip


@triton.jit
def finish_filter(
    partial,
    bias_partial,
    splits,
    scale,
    v,
    g,
    lengths,
    dv,
    dg,
    dbias,
    o,
    ins,
    padded_outs,
    padded_ins,
    taps,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the shares of one filter in a fixed order, and takes the sum through the weight norm where there is one.

    Salimans & Kingma (2016), arXiv:1602.07868, equation 3: dg = dw·v / ‖v‖, dv = g/‖v‖ · (dw − dg · v / ‖v‖).
    """
    e = tl.arange(0, BLOCK)
    s = tl.arange(0, SPLITS)
    size = ins * taps
    plane = (taps * padded_outs).to(tl.int64) * padded_ins
    along = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        r = start + e
        mask = r < size
        place = (r % taps * padded_outs + o) * padded_ins + r // taps
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, splits, SPLITS):
            split = first + s
            share = partial + split.to(tl.int64)[:, None] * plane + place[None, :]
            total += tl.sum(tl.load(share, mask=(split < splits)[:, None] & mask[None, :], other=0.0), 0)
        total *= scale
        if g is None:
            tl.store(dv + o * size + r, total.to(dv.dtype.element_ty), mask=mask)
        else:
            along += total * tl.load(v + o * size + r, mask=mask, other=0.0).to(tl.float32)
            # The first share's place is this program's alone: it keeps the sum until the whole filter's is known.
            tl.store(partial + place, total, mask=mask)
    if g is not None:
        length = tl.load(lengths + o)
        slope = tl.sum(along) / length
        tl.store(dg + o, slope.to(dg.dtype.element_ty))
        factor = tl.load(g + o).to(tl.float32) / length
        tl.debug_barrier()
        for start in range(0, size, BLOCK):
            r = start + e
            mask = r < size
            place = (r % taps * padded_outs + o) * padded_ins + r // taps
            total = tl.load(partial + place, mask=mask, other=0.0)
            value = tl.load(v + o * size + r, mask=mask, other=0.0).to(tl.float32)
            value = factor * (total - slope * value / length)
            tl.store(dv + o * size + r, value.to(dv.dtype.element_ty), mask=mask)
    if dbias is not None:
        total = tl.zeros([SPLITS], tl.float32)
        for first in range(0, splits, SPLITS):
            split = first + s
            total += tl.load(bias_partial + split * padded_outs + o, mask=split < splits, other=0.0)
        tl.store(dbias + o, (tl.sum(total) * scale).to(dbias.dtype.element_ty))


@triton.jit(do_not_specialize=["splits", "taps"])
def finish(
    partial,
    bias_partial,
    splits,
    dv,
    dbias,
    ins,
    padded_outs,
    padded_ins,
    taps,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of filters and bias from their shares. Grid: (C_out,)."""
    finish_filter(
        partial, bias_partial, splits, 1.0, None, None, None, dv, None, dbias, tl.program_id(0), ins, padded_outs,
        padded_ins, taps, SPLITS, BLOCK,
    )  # fmt: skip
