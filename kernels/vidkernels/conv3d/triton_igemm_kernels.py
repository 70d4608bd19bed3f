# mypy: ignore-errors
"""Device code of the implicit GEMM: products over gathered rows or over boxes, and what follows them.

Rows of a product are positions of the result, its depth is taps × channels of the source, its columns are channels of
the result. One loop runs over the depth, tap by tap, with counters that are carried: it can be pipelined across taps,
and holds no division.
"""

import triton
import triton.language as tl


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _axis(residue, taps, stride, padding, dilation, tap_stride, RESIDUES: tl.constexpr):
    """How one axis runs: first tap, how many of them, first source position, its step from tap to tap.

    With RESIDUES, of the positions ≡ residue (mod stride) of an input gradient: they meet every tap_stride-th tap,
    from the first one on for which residue + padding − tap · dilation is a multiple of stride; none if there is none.
    """
    first = 0
    count = taps
    start = -padding
    step = dilation
    if RESIDUES:
        first = taps
        for back in range(tap_stride):
            tap = tap_stride - 1 - back
            first = tl.where((residue + padding - tap * dilation) % stride == 0, tap, first)
        count = tl.maximum(taps - first + tap_stride - 1, 0) // tap_stride
        start = tl.where(count > 0, (residue + padding - first * dilation) // stride, 0)
        step = -(dilation * tap_stride // stride)
    return first, count, start, step


@triton.jit
def _store(
    acc, bias, residual, y, rows, row_ok, column, channels, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Rounds activation(acc + bias + residual) to y, from `column` on; `rows` are offsets of elements."""
    columns = column + tl.arange(0, WIDTH)
    columns_ok = columns < channels
    if bias is not None:
        acc += tl.load(bias + tl.where(columns_ok, columns, 0), mask=columns_ok, other=0.0).to(tl.float32)[None, :]
    places = rows[:, None] + columns[None, :]  # [BLOCK_M, WIDTH]
    ok = row_ok[:, None] & columns_ok[None, :]
    if residual is not None:
        acc += tl.load(residual + tl.where(ok, places, 0), mask=ok, other=0.0).to(tl.float32)
    tl.store(y + places, _activated(acc, ACTIVATION).to(y.dtype.element_ty), mask=ok)


@triton.jit(
    do_not_specialize=[
        "samples", "in_t", "in_h", "in_w", "out_t", "out_h", "out_w", "in_units", "out_units",
        "taps_t", "taps_h", "taps_w", "stride_t", "stride_h", "stride_w", "padding_t", "padding_h", "padding_w",
        "dilation_t", "dilation_h", "dilation_w", "tap_stride_t", "tap_stride_h", "tap_stride_w",
    ]
)  # fmt: skip
def gather(
    x, weight, bias, residual, y,
    samples, in_t, in_h, in_w, out_t, out_h, out_w, in_units, out_units,
    taps_t, taps_h, taps_w, stride_t, stride_h, stride_w, padding_t, padding_h, padding_w,
    dilation_t, dilation_h, dilation_w, tap_stride_t, tap_stride_h, tap_stride_w,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, RESIDUES: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = activation(x ∗ weight + bias + residual), rows of x gathered by pointers.

    A source position is position · stride − padding + tap · dilation along each axis, all of which may be negative;
    with RESIDUES, see `_axis`. The weight is (out, taps, in), or (in, taps, out) with TRANSPOSED. Grid: tiles of rows
    × tiles of columns, residues, parts of the depth; part i goes to y[i].
    """
    # Units tell the compiler by what the channels are divisible, and so how wide a load may be.
    in_channels = in_units * IN_UNIT
    out_channels = out_units * OUT_UNIT

    residue = tl.program_id(1)
    across_w = tl.minimum(stride_w, out_w) if RESIDUES else 1
    across_h = tl.minimum(stride_h, out_h) if RESIDUES else 1
    residue_w = residue % across_w
    residue_h = (residue // across_w) % across_h
    residue_t = residue // (across_w * across_h)
    first_t, count_t, start_t, step_t = _axis(
        residue_t, taps_t, stride_t, padding_t, dilation_t, tap_stride_t, RESIDUES
    )  # fmt: skip
    first_h, count_h, start_h, step_h = _axis(
        residue_h, taps_h, stride_h, padding_h, dilation_h, tap_stride_h, RESIDUES
    )  # fmt: skip
    first_w, count_w, start_w, step_w = _axis(
        residue_w, taps_w, stride_w, padding_w, dilation_w, tap_stride_w, RESIDUES
    )  # fmt: skip
    apart_t = stride_t if RESIDUES else 1
    apart_h = stride_h if RESIDUES else 1
    apart_w = stride_w if RESIDUES else 1
    size_t = tl.cdiv(out_t - residue_t, apart_t)
    size_h = tl.cdiv(out_h - residue_h, apart_h)
    size_w = tl.cdiv(out_w - residue_w, apart_w)

    # The tile's first row as (n, t, h, w) in 64 bits; the rows after it by 32-bit carries.
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    column = (tl.program_id(0) % tiles_n) * BLOCK_N
    head = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    w = (head % size_w).to(tl.int32) + tl.arange(0, BLOCK_M)
    head = head // size_w
    h = (head % size_h).to(tl.int32) + w // size_w
    w = w % size_w
    head = head // size_h
    t = (head % size_t).to(tl.int32) + h // size_h
    h = h % size_h
    n = (head // size_t).to(tl.int32) + t // size_t
    t = t % size_t
    row_ok = n < samples  # [BLOCK_M]
    wide_n = tl.where(row_ok, n, 0).to(tl.int64)
    out_rows = (wide_n * out_t + residue_t + t * apart_t) * out_h + residue_h + h * apart_h
    out_rows = (out_rows * out_w + residue_w + w * apart_w) * out_channels

    t = t * (1 if RESIDUES else stride_t) + start_t
    h = h * (1 if RESIDUES else stride_h) + start_h
    w = w * (1 if RESIDUES else stride_w) + start_w
    rows = (((wide_n * in_t + t) * in_h + h) * in_w + w) * in_channels  # [BLOCK_M]

    k = tl.arange(0, BLOCK_K)
    columns = column + tl.arange(0, BLOCK_N)
    columns_ok = columns < out_channels
    # Where a column or a channel lies beyond the last, an aligned one that exists: loads stay wide and in bounds.
    columns = tl.where(columns_ok, columns, tl.arange(0, BLOCK_N) % OUT_UNIT)
    columns = tl.max_contiguous(tl.multiple_of(columns, OUT_UNIT), OUT_UNIT)

    blocks_k = tl.cdiv(in_channels, BLOCK_K)
    depth = count_t * count_h * count_w * blocks_k
    begin = (depth.to(tl.int64) * tl.program_id(2) // tl.num_programs(2)).to(tl.int32)
    end = (depth.to(tl.int64) * (tl.program_id(2) + 1) // tl.num_programs(2)).to(tl.int32)
    channel = (begin % blocks_k) * BLOCK_K
    tap = begin // blocks_k
    tap_w = tap
    tap_h = tap_w // tl.maximum(count_w, 1)
    tap_t = tap_h // tl.maximum(count_h, 1)
    tap_w -= tap_h * count_w
    tap_h -= tap_t * count_h

    taps = taps_t * taps_h * taps_w
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(begin, end):
        shift_t = tap_t * step_t
        shift_h = tap_h * step_h
        shift_w = tap_w * step_w
        ok = row_ok & (t >= -shift_t) & (t < in_t - shift_t) & (h >= -shift_h) & (h < in_h - shift_h)
        ok = ok & (w >= -shift_w) & (w < in_w - shift_w)  # [BLOCK_M]
        shift = ((shift_t.to(tl.int64) * in_h + shift_h) * in_w + shift_w) * in_channels
        places = tl.where(ok, rows + shift, 0)
        channels_ok = k < in_channels - channel
        channels = tl.where(channels_ok, k + channel, k % IN_UNIT)
        channels = tl.max_contiguous(tl.multiple_of(channels, IN_UNIT), IN_UNIT)
        a = tl.load(x + places[:, None] + channels[None, :], mask=ok[:, None] & channels_ok[None, :], other=0.0)

        if RESIDUES:
            tap = (first_t + tap_t * tap_stride_t) * taps_h + first_h + tap_h * tap_stride_h
            tap = tap * taps_w + first_w + tap_w * tap_stride_w
        if TRANSPOSED:
            spots = (channels * taps + tap)[:, None] * out_channels + columns[None, :]
        else:
            spots = (columns * taps + tap)[None, :] * in_channels + channels[:, None]
        b = tl.load(weight + spots, mask=channels_ok[:, None] & columns_ok[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

        channel += BLOCK_K
        carry = (channel >= in_channels).to(tl.int32)
        channel *= 1 - carry
        tap += carry
        tap_w += carry
        carry = (tap_w >= count_w).to(tl.int32)
        tap_w *= 1 - carry
        tap_h += carry
        carry = (tap_h >= count_h).to(tl.int32)
        tap_h *= 1 - carry
        tap_t += carry

    out_rows += tl.program_id(2) * (samples.to(tl.int64) * out_t * out_h * out_w * out_channels)
    _store(acc, bias, residual, y, out_rows, row_ok, column, out_channels, ACTIVATION, BLOCK_N)


@triton.jit(
    do_not_specialize=[
        "samples", "out_t", "out_h", "out_w", "in_channels", "out_units", "tap_channels", "taps_t", "taps_h", "taps_w",
        "stride_t", "stride_h", "stride_w", "padding_t", "padding_h", "padding_w",
        "dilation_t", "dilation_h", "dilation_w", "tap_stride_t", "tap_stride_h", "tap_stride_w",
    ]
)  # fmt: skip
def boxes(
    x, weight, weight_tail, bias, residual, y,
    samples, out_t, out_h, out_w, in_channels, out_units, tap_channels,
    taps_t, taps_h, taps_w, stride_t, stride_h, stride_w, padding_t, padding_h, padding_w,
    dilation_t, dilation_h, dilation_w, tap_stride_t, tap_stride_h, tap_stride_w,
    OUT_UNIT: tl.constexpr, BOX_N: tl.constexpr, BOX_T: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, TAIL: tl.constexpr, BLOCK_K: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    TRANSPOSED: tl.constexpr, RESIDUES: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `gather` where neighbours in the result are neighbours in x: rows come as boxes, by the copy engine.

    It fills with zeros what lies outside of x, so padding, edges and missing channels need no masks. The weight is a
    matrix of taps · tap_channels columns: where a block reaches into the next tap, x is zero or nothing is stored.

    WEIGHT_FIRST computes the transposed product: wgmma takes its left factor from shared memory only as it was copied,
    not reshaped. Otherwise a tile has BLOCK_N columns, and TAIL more that share its rows.
    """
    BLOCK_M: tl.constexpr = BOX_N * BOX_T * BOX_H * BOX_W
    out_channels = out_units * OUT_UNIT

    residue = tl.program_id(1)
    across_w = tl.minimum(stride_w, out_w) if RESIDUES else 1
    across_h = tl.minimum(stride_h, out_h) if RESIDUES else 1
    residue_w = residue % across_w
    residue_h = (residue // across_w) % across_h
    residue_t = residue // (across_w * across_h)
    first_t, count_t, start_t, step_t = _axis(
        residue_t, taps_t, stride_t, padding_t, dilation_t, tap_stride_t, RESIDUES
    )  # fmt: skip
    first_h, count_h, start_h, step_h = _axis(
        residue_h, taps_h, stride_h, padding_h, dilation_h, tap_stride_h, RESIDUES
    )  # fmt: skip
    first_w, count_w, start_w, step_w = _axis(
        residue_w, taps_w, stride_w, padding_w, dilation_w, tap_stride_w, RESIDUES
    )  # fmt: skip
    apart_t = stride_t if RESIDUES else 1
    apart_h = stride_h if RESIDUES else 1
    apart_w = stride_w if RESIDUES else 1
    size_t = tl.cdiv(out_t - residue_t, apart_t)
    size_h = tl.cdiv(out_h - residue_h, apart_h)
    size_w = tl.cdiv(out_w - residue_w, apart_w)

    tiles_n = tl.cdiv(out_channels, BLOCK_N + TAIL)
    column = (tl.program_id(0) % tiles_n) * (BLOCK_N + TAIL)
    box = tl.program_id(0) // tiles_n
    across = tl.cdiv(size_w, BOX_W)
    w = (box % across) * BOX_W
    box = box // across
    across = tl.cdiv(size_h, BOX_H)
    h = (box % across) * BOX_H
    box = box // across
    across = tl.cdiv(size_t, BOX_T)
    t = (box % across) * BOX_T
    n = (box // across) * BOX_N

    blocks_k = tl.cdiv(in_channels, BLOCK_K)
    # A residue with fewer positions than the first has blocks to spare.
    depth = tl.where(n < samples, count_t * count_h * count_w * blocks_k, 0)
    begin = (depth.to(tl.int64) * tl.program_id(2) // tl.num_programs(2)).to(tl.int32)
    end = (depth.to(tl.int64) * (tl.program_id(2) + 1) // tl.num_programs(2)).to(tl.int32)
    channel = (begin % blocks_k) * BLOCK_K
    tap = begin // blocks_k
    tap_w = tap
    tap_h = tap_w // tl.maximum(count_w, 1)
    tap_t = tap_h // tl.maximum(count_h, 1)
    tap_w -= tap_h * count_w
    tap_h -= tap_t * count_h

    t_in = t + start_t
    h_in = h + start_h
    w_in = w + start_w
    acc = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, BLOCK_N), tl.float32)
    if TAIL > 0:
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    for _ in range(begin, end):
        a = x.load([n, t_in + tap_t * step_t, h_in + tap_h * step_h, w_in + tap_w * step_w, channel])
        a = a.reshape(BLOCK_M, BLOCK_K)
        if RESIDUES:
            tap = (first_t + tap_t * tap_stride_t) * taps_h + first_h + tap_h * tap_stride_h
            tap = tap * taps_w + first_w + tap_w * tap_stride_w
        if TRANSPOSED:
            b = weight.load([channel, tap * tap_channels + column])
        else:
            b = weight.load([column, tap * tap_channels + channel]).T
        if WEIGHT_FIRST:
            acc = tl.dot(b.T, a.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if TAIL > 0:
            if TRANSPOSED:
                b_tail = weight_tail.load([channel, tap * tap_channels + column + BLOCK_N])
            else:
                b_tail = weight_tail.load([column + BLOCK_N, tap * tap_channels + channel]).T
            acc_tail = tl.dot(a, b_tail, acc_tail, input_precision=PRECISION)

        channel += BLOCK_K
        carry = (channel >= in_channels).to(tl.int32)
        channel *= 1 - carry
        tap += carry
        tap_w += carry
        carry = (tap_w >= count_w).to(tl.int32)
        tap_w *= 1 - carry
        tap_h += carry
        carry = (tap_h >= count_h).to(tl.int32)
        tap_h *= 1 - carry
        tap_t += carry

    row = tl.arange(0, BLOCK_M)
    w += row % BOX_W
    h += row // BOX_W % BOX_H
    t += row // (BOX_W * BOX_H) % BOX_T
    n += row // (BOX_W * BOX_H * BOX_T)
    row_ok = (n < samples) & (t < size_t) & (h < size_h) & (w < size_w)  # [BLOCK_M]
    rows = n.to(tl.int64) * out_t + residue_t + t * apart_t
    rows = (rows * out_h + residue_h + h * apart_h) * out_w + residue_w + w * apart_w
    rows = tl.program_id(2) * (samples.to(tl.int64) * out_t * out_h * out_w * out_channels) + rows * out_channels
    rows = tl.where(row_ok, rows, 0)
    if WEIGHT_FIRST:
        acc = acc.T
    _store(acc, bias, residual, y, rows, row_ok, column, out_channels, ACTIVATION, BLOCK_N)
    if TAIL > 0:
        _store(acc_tail, bias, residual, y, rows, row_ok, column + BLOCK_N, out_channels, ACTIVATION, TAIL)


@triton.jit(do_not_specialize=["elements", "channels", "parts"])
def add_parts(partial, bias, residual, y, elements, channels, parts, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """y = activation(Σ over parts of partial[part] + bias + residual), in the order of the parts."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = places < elements
    places = tl.where(ok, places, 0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        acc += tl.load(partial + part * elements.to(tl.int64) + places, mask=ok, other=0.0)
    if bias is not None:
        acc += tl.load(bias + places % channels, mask=ok, other=0.0).to(tl.float32)
    if residual is not None:
        acc += tl.load(residual + places, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + places, _activated(acc, ACTIVATION).to(y.dtype.element_ty), mask=ok)
