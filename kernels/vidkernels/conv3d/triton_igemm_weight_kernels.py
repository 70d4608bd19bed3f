# mypy: ignore-errors
"""Device code of the implicit GEMM's weight gradient."""

import triton
import triton.language as tl


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
    columns_ok = columns < in_channels
    safe_columns = tl.where(columns_ok, columns, tl.arange(0, BLOCK_N) % IN_UNIT)
    safe_columns = tl.max_contiguous(tl.multiple_of(safe_columns, IN_UNIT), IN_UNIT)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_ok = rows < out_channels
    safe_rows = tl.where(rows_ok, rows, tl.arange(0, BLOCK_M) % OUT_UNIT)
    safe_rows = tl.max_contiguous(tl.multiple_of(safe_rows, OUT_UNIT), OUT_UNIT)

    positions = samples.to(tl.int64) * out_t * out_h * out_w
    blocks = tl.cdiv(positions, BLOCK_K)
    begin = blocks * tl.program_id(2) // tl.num_programs(2)
    end = blocks * (tl.program_id(2) + 1) // tl.num_programs(2)

    # The first block's positions as (n, t, h, w), and a whole block as such digits: adding needs carries, no division.
    head = begin * BLOCK_K
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
    next_t = (BLOCK_K // (out_w * out_h)) % out_t
    next_n = BLOCK_K // (out_w * out_h * out_t)

    shift_t = (tap // (taps_h * taps_w)) * dilation_t - padding_t
    shift_h = (tap // taps_w) % taps_h * dilation_h - padding_h
    shift_w = tap % taps_w * dilation_w - padding_w

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    place = begin * BLOCK_K + tl.arange(0, BLOCK_K)
    for _ in range((end - begin).to(tl.int32)):
        place_ok = n < samples  # [BLOCK_K]
        g_places = tl.where(place_ok, place, 0) * out_channels
        a = tl.load(g + g_places[:, None] + safe_rows[None, :], mask=place_ok[:, None] & rows_ok[None, :], other=0.0)
        in_row_t = t * stride_t + shift_t
        in_row_h = h * stride_h + shift_h
        in_row_w = w * stride_w + shift_w
        ok = place_ok & (in_row_t >= 0) & (in_row_t < in_t) & (in_row_h >= 0) & (in_row_h < in_h)
        ok = ok & (in_row_w >= 0) & (in_row_w < in_w)
        x_places = ((n.to(tl.int64) * in_t + in_row_t) * in_h + in_row_h) * in_w + in_row_w
        x_places = tl.where(ok, x_places, 0) * in_channels
        b = tl.load(x + x_places[:, None] + safe_columns[None, :], mask=ok[:, None] & columns_ok[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

        place += BLOCK_K
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

    spots = (rows[:, None].to(tl.int64) * taps + tap) * in_channels + columns[None, :]
    spots += tl.program_id(2) * (out_channels.to(tl.int64) * taps * in_channels)
    tl.store(gw + spots, acc.to(gw.dtype.element_ty), mask=rows_ok[:, None] & columns_ok[None, :])
