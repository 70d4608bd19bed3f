# mypy: ignore-errors
"""Device code of triton_direct: x is (N, T, H, W, C); a tile is BLOCK_P positions of one clip by BLOCK_C channels.

Positions and channels beyond the last are read as the first ones, and not stored: only taps that meet the padding need
a mask, and it is one for a position, not one for an element.
"""

import triton
import triton.language as tl


@triton.jit
def _met(start, k, stride: tl.constexpr, dilation: tl.constexpr, size, TRANSPOSED: tl.constexpr):
    """What a result meets with tap k along one axis, and whether that exists. `start`: see `_start`."""
    if TRANSPOSED:
        shifted = start - k * dilation
        exists = shifted >= 0
        if stride > 1:
            exists = exists & (shifted % stride == 0)
            shifted = shifted // stride
        return shifted, exists & (shifted < size)
    else:  # noqa: RET505 - a branch at compile time
        place = start + k * dilation
        return place, (place >= 0) & (place < size)


@triton.jit
def _start(position, stride: tl.constexpr, pad, TRANSPOSED: tl.constexpr):
    """What a result meets with the first tap; in the input's gradient, times the stride."""
    if TRANSPOSED:
        return position + pad
    else:  # noqa: RET505 - a branch at compile time
        return position * stride - pad


@triton.jit
def _channels(block, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels of a tile, the first ones in place of those beyond the last; and which exist. VECTOR divides C."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < C
    c = tl.max_contiguous(tl.multiple_of(tl.where(exists, c, 0), VECTOR), VECTOR)
    return c[None, :], exists[None, :]


@triton.jit(
    do_not_specialize=[
        "source_t", "source_h", "source_w", "result_t", "result_h", "result_w", "pad_t", "pad_h", "pad_w"
    ]
)  # fmt: skip
def gather(
    source, weight, bias, result,
    source_t, source_h, source_w, result_t, result_h, result_w, pad_t, pad_h, pad_w,
    C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """result = activation(bias + Σ over taps of weight ⊙ source); TRANSPOSED: x's gradient from that of y.

    The weight is (taps, C): as torch keeps it, a thread would load each of its channels by itself.
    """
    positions = result_t * result_h * result_w
    blocks = tl.cdiv(positions, BLOCK_P)
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    source += clip * source_t * source_h * source_w * C
    result += clip * positions * C
    p = (tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]  # [BLOCK_P, 1]
    c, channels = _channels(tl.program_id(1), C, VECTOR, BLOCK_C)  # [1, BLOCK_C]
    stored = (p < positions) & channels  # [BLOCK_P, BLOCK_C]
    p = tl.where(p < positions, p, 0)
    start_t = _start(p // (result_h * result_w), ST, pad_t, TRANSPOSED)
    start_h = _start(p // result_w % result_h, SH, pad_h, TRANSPOSED)
    start_w = _start(p % result_w, SW, pad_w, TRANSPOSED)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    # Loops: taps that are all unrolled would all be loaded first, into more registers than there are.
    for kt in range(KT):
        t, in_clip = _met(start_t, kt, ST, DT, source_t, TRANSPOSED)
        for kh in range(KH):
            h, in_frame = _met(start_h, kh, SH, DH, source_h, TRANSPOSED)
            in_frame = in_frame & in_clip
            row = (t * source_h + h) * source_w
            for kw in tl.static_range(KW):
                w, in_row = _met(start_w, kw, SW, DW, source_w, TRANSPOSED)
                exists = in_row & in_frame  # [BLOCK_P, 1]
                x = tl.load(source + (tl.where(exists, row + w, 0) * C + c), exists, 0.0)  # [BLOCK_P, BLOCK_C]
                tap = tl.load(weight + (((kt * KH + kh) * KW + kw) * C + c))  # [1, BLOCK_C]
                total += x.to(tl.float32) * tap.to(tl.float32)
    if bias is not None:
        total += tl.load(bias + c).to(tl.float32)
    if ACTIVATION == "relu":
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays
    elif ACTIVATION == "silu":
        total = total / (1.0 + tl.exp(-total))
    tl.store(result + (p * C + c), total.to(result.dtype.element_ty), stored)


@triton.jit(
    do_not_specialize=[
        "clips", "parts",
        "source_t", "source_h", "source_w", "result_t", "result_h", "result_w", "pad_t", "pad_h", "pad_w",
    ]
)  # fmt: skip
def correlate(
    source, gradient, partial, clips, parts,
    source_t, source_h, source_w, result_t, result_h, result_w, pad_t, pad_h, pad_w,
    C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of gradient · source over every `parts`-th tile, for WIDTH taps of one row: partial (parts, taps, C)."""
    GROUPS: tl.constexpr = (KW + WIDTH - 1) // WIDTH
    part = tl.program_id(0)
    line = tl.program_id(1) // GROUPS
    first = tl.program_id(1) % GROUPS * WIDTH
    c, stored = _channels(tl.program_id(2), C, VECTOR, BLOCK_C)  # [1, BLOCK_C]
    positions = result_t * result_h * result_w
    blocks = tl.cdiv(positions, BLOCK_P)
    total0 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total1 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    tile = part.to(tl.int64)
    for _ in range(tl.cdiv(clips * blocks - part, parts)):
        clip = tile // blocks
        p = ((tile % blocks).to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]  # [BLOCK_P, 1]
        exists = p < positions
        p = tl.where(exists, p, 0)
        t, in_clip = _met(_start(p // (result_h * result_w), ST, pad_t, False), line // KH, ST, DT, source_t, False)
        h, in_frame = _met(_start(p // result_w % result_h, SH, pad_h, False), line % KH, SH, DH, source_h, False)
        row = (t * source_h + h) * source_w
        exists = exists & in_clip & in_frame
        g = tl.load(gradient + clip * positions * C + (p * C + c), exists, 0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
        start_w = _start(p % result_w, SW, pad_w, False) + first * DW
        here = source + clip * source_t * source_h * source_w * C
        for i in tl.static_range(WIDTH):
            w, in_row = _met(start_w, i, SW, DW, source_w, False)
            met = in_row & exists
            product = g * tl.load(here + (tl.where(met, row + w, 0) * C + c), met, 0.0).to(tl.float32)
            if i == 0:
                total0 += product
            elif i == 1:
                total1 += product
            else:
                total2 += product
        tile += parts
    out = partial + (part.to(tl.int64) * (KT * KH * KW) + line * KW + first) * C + c
    tl.store(out, tl.sum(total0, 0, keep_dims=True), stored)
    if WIDTH > 1:
        tl.store(out + C, tl.sum(total1, 0, keep_dims=True), stored & (first + 1 < KW))
    if WIDTH > 2:
        tl.store(out + 2 * C, tl.sum(total2, 0, keep_dims=True), stored & (first + 2 < KW))


@triton.jit(do_not_specialize=["parts"])
def sum_parts(
    partial, weight, parts, C: tl.constexpr, TAPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr
):
    """weight (C, taps) = Σ over parts of partial (parts, taps, C), always in the same order."""
    element = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    stored = element < TAPS * C
    total = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    for first in range(0, parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        mask = (part < parts)[:, None] & stored[None, :]
        offset = part[:, None].to(tl.int64) * (TAPS * C) + element[None, :]
        total += tl.load(partial + tl.where(mask, offset, 0), mask, 0.0)
    place = element % C * TAPS + element // C
    tl.store(weight + place, tl.sum(total, 0).to(weight.dtype.element_ty), stored)
