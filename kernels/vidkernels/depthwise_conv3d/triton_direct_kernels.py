# mypy: ignore-errors
"""The Triton kernels of triton_direct: x is (N, T, H, W, C); a program has BLOCK_P positions of a frame, BLOCK_C channels."""

import triton
import triton.language as tl


@triton.jit
def _source(position, k: tl.constexpr, stride: tl.constexpr, dilation: tl.constexpr, pad, size, TRANSPOSED: tl.constexpr):
    """Where a result meets tap k along one axis, and whether that lies in the source of `size`."""
    if TRANSPOSED:
        shifted = position + pad - k * dilation
        place = shifted // stride
        inside = (shifted >= 0) & (place < size)
        if stride > 1:
            inside = inside & (shifted % stride == 0)
    else:
        place = position * stride + k * dilation - pad
        inside = (place >= 0) & (place < size)
    return place, inside


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
    TRANSPOSED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """result = activation(bias + Σ over taps of weight ⊙ source); TRANSPOSED: the input's gradient from the output's."""
    blocks = tl.cdiv(result_h * result_w, BLOCK_P)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    clip, t = frame // result_t, (frame % result_t).to(tl.int32)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    h, w = p // result_w, p % result_w
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    channels = c < C
    results = (p < result_h * result_w)[:, None] & channels[None, :]  # [BLOCK_P, BLOCK_C]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for kt in tl.static_range(KT):
        source_frame, in_clip = _source(t, kt, ST, DT, pad_t, source_t, TRANSPOSED)
        place = tl.where(in_clip, source_frame, 0)
        base = source + (clip * source_t + place) * (source_h * source_w * C)
        for kh in tl.static_range(KH):
            row, in_rows = _source(h, kh, SH, DH, pad_h, source_h, TRANSPOSED)
            for kw in tl.static_range(KW):
                column, in_columns = _source(w, kw, SW, DW, pad_w, source_w, TRANSPOSED)
                mask = results & (in_clip & in_rows & in_columns)[:, None]
                offset = tl.where(mask, (row * source_w + column)[:, None] * C + c[None, :], 0)
                x = tl.load(base + offset, mask, 0.0)  # [BLOCK_P, BLOCK_C]
                tap = tl.load(weight + c * (KT * KH * KW) + (kt * KH + kh) * KW + kw, channels, 0.0)  # [BLOCK_C]
                total += x.to(tl.float32) * tap.to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + c, channels, 0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays
    elif ACTIVATION == "silu":
        total = total / (1.0 + tl.exp(-total))
    place = tl.where(results, p[:, None] * C + c[None, :], 0)
    tl.store(result + frame * (result_h * result_w * C) + place, total.to(result.dtype.element_ty), results)


@triton.jit(
    do_not_specialize=[
        "frames", "splits",
        "source_t", "source_h", "source_w", "result_t", "result_h", "result_w", "pad_t", "pad_h", "pad_w",
    ]
)  # fmt: skip
def correlate(
    source, gradient, partial, frames, splits,
    source_t, source_h, source_w, result_t, result_h, result_w, pad_t, pad_h, pad_w,
    C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of gradient · source for WIDTH taps of one row: partial (position blocks · splits, taps, C), float32.

    A program keeps its positions and goes through every `splits`-th frame of the batch.
    """
    GROUPS: tl.constexpr = (KW + WIDTH - 1) // WIDTH
    part = tl.program_id(0)
    split = part % splits
    line = tl.program_id(1) // GROUPS
    kt, kh = line // KH, line % KH
    first = tl.program_id(1) % GROUPS * WIDTH
    p = part // splits * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    h, w = p // result_w, p % result_w
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    channels = c < C
    row = h * SH + kh * DH - pad_h
    results = (p < result_h * result_w)[:, None] & channels[None, :]  # [BLOCK_P, BLOCK_C]
    rows = results & ((row >= 0) & (row < source_h))[:, None]
    left = w * SW + first * DW - pad_w
    place = tl.where(results, p[:, None] * C + c[None, :], 0)
    total0 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total1 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    frame = split.to(tl.int64)
    for _ in range(tl.cdiv(frames - split, splits)):
        clip, t = frame // result_t, frame % result_t
        source_frame = t * ST + kt * DT - pad_t
        in_clip = (source_frame >= 0) & (source_frame < source_t)
        here = clip * source_t + tl.where(in_clip, source_frame, 0)
        base = source + here * (source_h * source_w * C)
        g = tl.load(gradient + frame * (result_h * result_w * C) + place, results & in_clip, 0.0)
        g = g.to(tl.float32)  # [BLOCK_P, BLOCK_C]
        for i in tl.static_range(WIDTH):
            column = left + i * DW
            mask = rows & (in_clip & (column >= 0) & (column < source_w) & (first + i < KW))[:, None]
            offset = tl.where(mask, (row * source_w + column)[:, None] * C + c[None, :], 0)
            product = g * tl.load(base + offset, mask, 0.0).to(tl.float32)
            if i == 0:
                total0 += product
            elif i == 1:
                total1 += product
            else:
                total2 += product
        frame += splits
    out = partial + (part.to(tl.int64) * (KT * KH * KW) + line * KW + first) * C + c
    tl.store(out, tl.sum(total0, 0), channels)
    if WIDTH > 1:
        tl.store(out + C, tl.sum(total1, 0), channels & (first + 1 < KW))
    if WIDTH > 2:
        tl.store(out + 2 * C, tl.sum(total2, 0), channels & (first + 2 < KW))


@triton.jit(do_not_specialize=["parts"])
def sum_parts(
    partial, weight, parts, C: tl.constexpr, TAPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """weight (C, taps) = Σ over parts of partial (parts, taps, C), always in the same order."""
    tap = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        mask = (part < parts)[:, None] & (c < C)[None, :]
        offset = (part.to(tl.int64) * TAPS + tap)[:, None] * C + c[None, :]
        total += tl.load(partial + tl.where(mask, offset, 0), mask, 0.0)
    tl.store(weight + c * TAPS + tap, tl.sum(total, 0).to(weight.dtype.element_ty), c < C)
