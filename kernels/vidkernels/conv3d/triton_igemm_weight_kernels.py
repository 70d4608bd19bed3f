# mypy: ignore-errors
"""Device code of the implicit GEMM's weight gradient: one product for every tap, its depth the positions."""

import triton
import triton.language as tl


@triton.jit
def _store(gw, acc, rows, columns, tap, out_channels, taps, in_channels):
    """Writes the sums of one tap to part `program_id(2)`; rows are output, columns input channels."""
    spots = (rows[:, None].to(tl.int64) * taps + tap) * in_channels + columns[None, :]
    spots += tl.program_id(2) * (out_channels.to(tl.int64) * taps * in_channels)
    ok = (rows < out_channels)[:, None] & ((columns < in_channels) & (tap < taps))[None, :]
    tl.store(gw + spots, acc.to(gw.dtype.element_ty), mask=ok)


@triton.jit(
    do_not_specialize=[
        "samples", "in_t", "in_h", "in_w", "out_t", "out_h", "out_w", "in_units", "out_units",
        "taps_t", "taps_h", "taps_w", "stride_t", "stride_h", "stride_w", "padding_t", "padding_h", "padding_w",
        "dilation_t", "dilation_h", "dilation_w",
    ]
)  # fmt: skip
def gather(
    x, g, gw,
    samples, in_t, in_h, in_w, out_t, out_h, out_w, in_units, out_units,
    taps_t, taps_h, taps_w, stride_t, stride_h, stride_w, padding_t, padding_h, padding_w,
    dilation_t, dilation_h, dilation_w,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """gw[o, tap, c] = Σ over positions of g[position, o] · x[position · stride − padding + tap · dilation, c].

    Grid: taps × tiles of c, tiles of o, parts of the positions; part i goes to gw[i].
    """
    in_channels = in_units * IN_UNIT
    out_channels = out_units * OUT_UNIT
    taps = taps_t * taps_h * taps_w
    tap = tl.program_id(0) % taps
    columns = (tl.program_id(0) // taps) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Where a channel lies beyond the last, an aligned one that exists: loads stay wide and in bounds.
    columns_ok = columns < in_channels
    near_columns = tl.where(columns_ok, columns, tl.arange(0, BLOCK_N) % IN_UNIT)
    near_columns = tl.max_contiguous(tl.multiple_of(near_columns, IN_UNIT), IN_UNIT)
    rows_ok = rows < out_channels
    near_rows = tl.where(rows_ok, rows, tl.arange(0, BLOCK_M) % OUT_UNIT)
    near_rows = tl.max_contiguous(tl.multiple_of(near_rows, OUT_UNIT), OUT_UNIT)

    positions = samples.to(tl.int64) * out_t * out_h * out_w
    blocks = tl.cdiv(positions, BLOCK_K)
    begin = blocks * tl.program_id(2) // tl.num_programs(2)
    end = blocks * (tl.program_id(2) + 1) // tl.num_programs(2)

    # The first block's positions as (n, t, h, w), and a whole block as such digits: adding needs carries, no division.
    head = begin * BLOCK_K
    g += head * out_channels
    left = positions - head
    w = (head % out_w).to(tl.int32) + tl.arange(0, BLOCK_K)
    head = head // out_w
    h = (head % out_h).to(tl.int32) + w // out_w
    w = w % out_w
    head = head // out_h
    t = (head % out_t).to(tl.int32) + h // out_h
    h = h % out_h
    n = (head // out_t).to(tl.int32) + t // out_t
    t = t % out_t
    next_w = BLOCK_K % out_w
    next_h = (BLOCK_K // out_w) % out_h
    next_t = (BLOCK_K // out_w // out_h) % out_t
    next_n = BLOCK_K // out_w // out_h // out_t

    shift_t = tap // (taps_h * taps_w) * dilation_t - padding_t
    shift_h = tap // taps_w % taps_h * dilation_h - padding_h
    shift_w = tap % taps_w * dilation_w - padding_w
    block = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range((end - begin).to(tl.int32)):
        block_ok = block < left  # [BLOCK_K]
        places = tl.where(block_ok, block, 0) * out_channels
        # As [BLOCK_M, BLOCK_K]: a transposed block would not be copied ahead on sm_80.
        a = tl.load(g + near_rows[:, None] + places[None, :], mask=rows_ok[:, None] & block_ok[None, :], other=0.0)
        t_in = t * stride_t + shift_t
        h_in = h * stride_h + shift_h
        w_in = w * stride_w + shift_w
        ok = block_ok & (t_in >= 0) & (t_in < in_t) & (h_in >= 0) & (h_in < in_h) & (w_in >= 0) & (w_in < in_w)
        places = ((n.to(tl.int64) * in_t + t_in) * in_h + h_in) * in_w + w_in
        places = tl.where(ok, places, 0) * in_channels
        b = tl.load(x + places[:, None] + near_columns[None, :], mask=ok[:, None] & columns_ok[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

        g += BLOCK_K * out_channels
        left -= BLOCK_K
        w += next_w
        carry = (w >= out_w).to(tl.int32)
        w -= carry * out_w
        h += next_h + carry
        carry = (h >= out_h).to(tl.int32)
        h -= carry * out_h
        t += next_t + carry
        carry = (t >= out_t).to(tl.int32)
        t -= carry * out_t
        n += next_n + carry

    _store(gw, acc, rows, columns, tap, out_channels, taps, in_channels)


@triton.jit(
    do_not_specialize=[
        "samples", "out_t", "out_h", "out_w", "in_units", "out_channels", "taps_t", "taps_h", "taps_w",
        "padding_t", "padding_h", "padding_w", "dilation_t", "dilation_h", "dilation_w",
    ]
)  # fmt: skip
def boxes(
    x, g, gw,
    samples, out_t, out_h, out_w, in_units, out_channels, taps_t, taps_h, taps_w,
    padding_t, padding_h, padding_w, dilation_t, dilation_h, dilation_w,
    IN_UNIT: tl.constexpr, BOX_N: tl.constexpr, BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `gather` at stride 1, positions in boxes by the copy engine, for GROUP (1 or 3) taps that share those of g.

    Beyond the edges of g it fills in zeros, which add nothing.
    """
    BLOCK_K: tl.constexpr = BOX_N * BOX_T * BOX_H * BOX_W
    in_channels = in_units * IN_UNIT
    taps = taps_t * taps_h * taps_w
    groups = tl.cdiv(taps, GROUP)
    tap = (tl.program_id(0) % groups) * GROUP
    column = (tl.program_id(0) // groups) * BLOCK_N
    row = tl.program_id(1) * BLOCK_M
    t0 = tap // (taps_h * taps_w) * dilation_t - padding_t
    h0 = tap // taps_w % taps_h * dilation_h - padding_h
    w0 = tap % taps_w * dilation_w - padding_w
    if GROUP == 3:
        t1 = (tap + 1) // (taps_h * taps_w) * dilation_t - padding_t
        h1 = (tap + 1) // taps_w % taps_h * dilation_h - padding_h
        w1 = (tap + 1) % taps_w * dilation_w - padding_w
        t2 = (tap + 2) // (taps_h * taps_w) * dilation_t - padding_t
        h2 = (tap + 2) // taps_w % taps_h * dilation_h - padding_h
        w2 = (tap + 2) % taps_w * dilation_w - padding_w

    across_w = tl.cdiv(out_w, BOX_W)
    across_h = tl.cdiv(out_h, BOX_H)
    across_t = tl.cdiv(out_t, BOX_T)
    number = tl.cdiv(samples, BOX_N) * across_t * across_h * across_w
    begin = (number.to(tl.int64) * tl.program_id(2) // tl.num_programs(2)).to(tl.int32)
    end = (number.to(tl.int64) * (tl.program_id(2) + 1) // tl.num_programs(2)).to(tl.int32)
    w = (begin % across_w) * BOX_W
    h = (begin // across_w % across_h) * BOX_H
    t = (begin // (across_w * across_h) % across_t) * BOX_T
    n = (begin // (across_w * across_h * across_t)) * BOX_N

    acc0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GROUP == 3:
        acc1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(begin, end):
        a = g.load([n, t, h, w, row]).reshape(BLOCK_K, BLOCK_M).T
        b = x.load([n, t + t0, h + h0, w + w0, column]).reshape(BLOCK_K, BLOCK_N)
        acc0 = tl.dot(a, b, acc0, input_precision=PRECISION)
        if GROUP == 3:
            b1 = x.load([n, t + t1, h + h1, w + w1, column]).reshape(BLOCK_K, BLOCK_N)
            acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
            b2 = x.load([n, t + t2, h + h2, w + w2, column]).reshape(BLOCK_K, BLOCK_N)
            acc2 = tl.dot(a, b2, acc2, input_precision=PRECISION)

        w += BOX_W
        carry = (w >= out_w).to(tl.int32)
        w *= 1 - carry
        h += carry * BOX_H
        carry = (h >= out_h).to(tl.int32)
        h *= 1 - carry
        t += carry * BOX_T
        carry = (t >= out_t).to(tl.int32)
        t *= 1 - carry
        n += carry * BOX_N

    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    _store(gw, acc0, rows, columns, tap, out_channels, taps, in_channels)
    if GROUP == 3:
        _store(gw, acc1, rows, columns, tap + 1, out_channels, taps, in_channels)
        _store(gw, acc2, rows, columns, tap + 2, out_channels, taps, in_channels)
