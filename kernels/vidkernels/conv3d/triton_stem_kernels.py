# mypy: ignore-errors
"""Triton kernels of the stem: a packed copy of the clip, in which a filter's row is one contiguous window."""

import triton
import triton.language as tl


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        # exp of a large number is infinity, and the quotient the 0 that it should be.
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _guarded(offsets, mask, C_OUT: tl.constexpr):
    """Offsets with 0 where masked, still known to come in aligned runs where channels do.

    A run is masked as a whole, as its length divides C_OUT; `tl.where` alone would lead to loads of single elements.
    """
    RUN: tl.constexpr = 8 if C_OUT % 8 == 0 else 4 if C_OUT % 4 == 0 else 2 if C_OUT % 2 == 0 else 1
    return tl.max_contiguous(tl.multiple_of(tl.where(mask, offsets, 0), [1, RUN]), [1, RUN])


@triton.jit
def _position(m, columns, height, frames):
    """n, t, h of the output row, and the group within it, of flattened groups."""
    row = m // columns
    return row // height // frames, row // height % frames, row % height, m % columns, row


@triton.jit(
    do_not_specialize=[
        "rows",
        "frames",
        "height",
        "width",
        "frames_packed",
        "height_packed",
        "row_eighths",
        "pad_t",
        "pad_h",
        "pad_w",
        "stride_n",
        "stride_c",
        "stride_t",
        "stride_h",
        "stride_w",
    ]
)
def pack_input(
    x,
    packed,
    rows,
    frames,
    height,
    width,
    frames_packed,
    height_packed,
    row_eighths,
    pad_t,
    pad_h,
    pad_w,
    stride_n,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    CHANNELS: tl.constexpr,
    PIXEL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """packed[n, t, h, w, c] = x[n, c, t−pad_t, h−pad_h, w−pad_w], zero beyond the clip and its channels."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    h = row % height_packed - pad_h
    t = row // height_packed % frames_packed - pad_t
    n = row // height_packed // frames_packed
    inside = (row < rows) & (t >= 0) & (t < frames) & (h >= 0) & (h < height)
    element = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    w = element // PIXEL - pad_w
    c = element % PIXEL
    mask = inside[:, None] & ((w >= 0) & (w < width) & (c < CHANNELS))[None, :]  # [BLOCK_R, BLOCK_E]
    base = n.to(tl.int64) * stride_n + t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h
    offsets = base[:, None] + (w.to(tl.int64) * stride_w + c.to(tl.int64) * stride_c)[None, :]
    values = tl.load(x + tl.where(mask, offsets, 0), mask=mask, other=0.0)
    length = row_eighths * 8
    stored = (row < rows)[:, None] & (element < length)[None, :]
    tl.store(packed + (row.to(tl.int64) * length)[:, None] + element[None, :], values, mask=stored)


@triton.jit
def pack_weight(
    weight,
    packed,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    TAPS: tl.constexpr,
    K_W: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PIXEL: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed[tap, pixel·PIXEL + c, j·C_OUT + o] = weight[o, c, tap, pixel − j·stride]: a group's filters."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    column = index % COLUMNS
    k = index // COLUMNS % WINDOW
    tap = index // COLUMNS // WINDOW
    o = column % C_OUT
    c = k % PIXEL
    kw = k // PIXEL - column // C_OUT * STRIDE_W
    mask = (tap < TAPS) & (c < C_IN) & (kw >= 0) & (kw < K_W)
    source = tl.where(mask, ((o * C_IN + c) * TAPS + tap) * K_W + kw, 0)
    tl.store(packed + index, tl.load(weight + source, mask=mask, other=0.0), mask=tap < TAPS)


@triton.jit(
    do_not_specialize=[
        "groups",
        "columns",
        "height_out",
        "frames_out",
        "width_out",
        "frames_packed",
        "height_packed",
        "row_eighths",
        "stride_t",
        "stride_h",
    ]
)
def forward(
    packed,
    weight,
    bias,
    residual,
    y,
    groups,
    columns,
    height_out,
    frames_out,
    width_out,
    frames_packed,
    height_packed,
    row_eighths,
    stride_t,
    stride_h,
    C_OUT: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    K_T: tl.constexpr,
    K_H: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y of BLOCK_M groups of GROUP neighbours along W: Σ over (kt, kh) of a window of the packed row times filters."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    # Rows beyond the last repeat it, so that no load needs a mask.
    n, t, h, group, row = _position(tl.minimum(m, groups - 1), columns, height_out, frames_out)
    length = row_eighths * 8
    start = ((n * frames_packed + t * stride_t) * height_packed + h * stride_h).to(tl.int64) * length + group * STEP
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    a = packed + start[:, None] + k[None, :]  # [BLOCK_M, BLOCK_K]
    b = weight + k[:, None] * COLUMNS + column[None, :]  # [BLOCK_K, BLOCK_N]
    next_row = length - (CHUNKS - 1) * BLOCK_K
    next_frame = next_row + (height_packed - K_H) * length
    kh = 0
    chunk = 0
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(K_T * K_H * CHUNKS):
        accumulator = tl.dot(tl.load(a), tl.load(b), accumulator, input_precision=PRECISION)
        b += BLOCK_K * COLUMNS
        if CHUNKS == 1:
            kh += 1
            a += tl.where(kh == K_H, next_frame, next_row)
            kh = tl.where(kh == K_H, 0, kh)
        else:
            chunk += 1
            kh += tl.where(chunk == CHUNKS, 1, 0)
            a += tl.where(chunk < CHUNKS, BLOCK_K, tl.where(kh == K_H, next_frame, next_row))
            kh = tl.where(kh == K_H, 0, kh)
            chunk = tl.where(chunk == CHUNKS, 0, chunk)

    first = group * GROUP
    limit = tl.where(m < groups, tl.minimum(width_out - first, GROUP) * C_OUT, 0)
    mask = column[None, :] < limit[:, None]
    offsets = ((row.to(tl.int64) * width_out + first) * C_OUT)[:, None] + column[None, :]
    if bias is not None:
        accumulator += tl.load(bias + column % C_OUT).to(tl.float32)[None, :]
    if residual is not None:
        accumulator += tl.load(residual + _guarded(offsets, mask, C_OUT), mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, _activated(accumulator, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "groups",
        "columns",
        "height_out",
        "frames_out",
        "width_out",
        "frames_packed",
        "height_packed",
        "row_eighths",
        "stride_t",
        "stride_h",
        "steps",
    ]
)
def weight_gradient(
    packed,
    g,
    partial,
    groups,
    columns,
    height_out,
    frames_out,
    width_out,
    frames_packed,
    height_packed,
    row_eighths,
    stride_t,
    stride_h,
    steps,
    C_OUT: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    K_H: tl.constexpr,
    WINDOW: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """partial[split, j·C_OUT + o, tap·WINDOW + k] = Σ over the split's groups of g[group, j, o] · its window."""
    n_all = TAPS * WINDOW
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)  # [BLOCK_J]
    tap = tl.minimum(j // WINDOW, TAPS - 1)
    length = row_eighths * 8
    window = (tap // K_H * height_packed + tap % K_H) * length + j % WINDOW
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    split = tl.program_id(2)
    accumulator = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    for step in range(steps):
        m = (split * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        n, t, h, group, row = _position(tl.minimum(m, groups - 1), columns, height_out, frames_out)
        start = ((n * frames_packed + t * stride_t) * height_packed + h * stride_h).to(tl.int64) * length + group * STEP
        first = group * GROUP
        limit = tl.where(m < groups, tl.minimum(width_out - first, GROUP) * C_OUT, 0)
        mask = column[None, :] < limit[:, None]
        offsets = ((row.to(tl.int64) * width_out + first) * C_OUT)[:, None] + column[None, :]
        a = tl.load(packed + start[:, None] + window[None, :])  # [BLOCK_M, BLOCK_J]
        b = tl.load(g + _guarded(offsets, mask, C_OUT), mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        accumulator = tl.dot(tl.trans(b), a, accumulator, input_precision=PRECISION)
    place = (split.to(tl.int64) * (GROUP * C_OUT) + column)[:, None] * n_all + j[None, :]
    tl.store(partial + place, accumulator, mask=(column < GROUP * C_OUT)[:, None] & (j < n_all)[None, :])


@triton.jit(do_not_specialize=["splits"])
def reduce_weight_gradient(
    partial,
    gradient,
    splits,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    TAPS: tl.constexpr,
    K_W: tl.constexpr,
    STRIDE_W: tl.constexpr,
    GROUP: tl.constexpr,
    PIXEL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """gradient[o, c, tap, kw] = Σ over splits and neighbours j of partial[split, j, o, tap, kw + j·stride, c]."""
    element = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)  # [BLOCK_E]
    inside = element < C_OUT * C_IN * TAPS * K_W
    element = tl.where(inside, element, 0)
    # Neighbours in `partial` are neighbours here.
    c = element % C_IN
    kw = element // C_IN % K_W
    tap = element // (C_IN * K_W) % TAPS
    o = element // (C_IN * K_W * TAPS)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for j in tl.static_range(GROUP):
        place = (j * C_OUT + o) * (TAPS * WINDOW) + tap * WINDOW + (kw + j * STRIDE_W) * PIXEL + c
        sums = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
        for first in range(0, splits, BLOCK_S):
            split = first + tl.arange(0, BLOCK_S)  # [BLOCK_S]
            offsets = split.to(tl.int64)[:, None] * (GROUP * C_OUT * TAPS * WINDOW) + place[None, :]
            mask = (split < splits)[:, None] & inside[None, :]
            sums += tl.load(partial + tl.where(mask, offsets, 0), mask=mask, other=0.0)
        total += tl.sum(sums, axis=0)
    target = ((o * C_IN + c) * TAPS + tap) * K_W + kw
    tl.store(gradient + target, total.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def pack_weight_transposed(
    weight,
    packed,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    TAPS: tl.constexpr,
    K_W: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PIXEL: tl.constexpr,
    RUN: tl.constexpr,
    FIRST_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed[tap, shift·ROWS + o, r·PIXEL + c] = weight[o, c, tap, r − stride·(shift + FIRST_SHIFT)], 0 elsewhere."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    column = index % COLUMNS
    k = index // COLUMNS % LENGTH
    o = k % ROWS
    shift = k // ROWS
    tap = index // COLUMNS // LENGTH
    c = column % PIXEL
    r = column // PIXEL
    kw = r - STRIDE_W * (shift + FIRST_SHIFT)
    mask = (tap < TAPS) & (o < C_OUT) & (c < C_IN) & (r < RUN) & (kw >= 0) & (kw < K_W)
    source = tl.where(mask, ((o * C_IN + c) * TAPS + tap) * K_W + kw, 0)
    tl.store(packed + index, tl.load(weight + source, mask=mask, other=0.0), mask=tap < TAPS)


@triton.jit(
    do_not_specialize=[
        "frames",
        "height",
        "width",
        "frames_out",
        "height_out",
        "width_out",
        "stride_t",
        "stride_h",
        "pad_t",
        "pad_h",
        "pad_w",
    ]
)
def input_gradient(
    g,
    weight,
    gradient,
    frames,
    height,
    width,
    frames_out,
    height_out,
    width_out,
    stride_t,
    stride_h,
    pad_t,
    pad_h,
    pad_w,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    K_T: tl.constexpr,
    K_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PIXEL: tl.constexpr,
    RUN: tl.constexpr,
    SHIFTS: tl.constexpr,
    FIRST_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A row of the input, in runs of RUN positions: each tap row meeting it adds shifted rows of g times filters."""
    row = tl.program_id(0)
    h = row % height + pad_h
    t = row // height % frames + pad_t
    n = row // height // frames
    run = pad_w // RUN + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    column = tl.arange(0, COLUMNS)  # [COLUMNS]
    # Output t' meets padded input t by tap kt = t − stride·t'; the taps that do are a stride apart.
    first_t = tl.maximum(t % stride_t, t - stride_t * (frames_out - 1))
    first_h = tl.maximum(h % stride_h, h - stride_h * (height_out - 1))
    taps_t = tl.maximum(tl.minimum(K_T, t + 1) - first_t + stride_t - 1, 0) // stride_t
    taps_h = tl.maximum(tl.minimum(K_H, h + 1) - first_h + stride_h - 1, 0) // stride_h
    t_out = (t - first_t) // stride_t
    h_out = (h - first_h) // stride_h
    kt = first_t
    kh = first_h
    first = 0
    accumulator = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for _ in range(taps_t * taps_h * (LENGTH // BLOCK_K)):
        k = first + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        o = k % ROWS
        shift = k // ROWS
        w_out = (RUN // STRIDE_W * run)[:, None] + (shift + FIRST_SHIFT)[None, :]  # [BLOCK_M, BLOCK_K]
        mask = (w_out >= 0) & (w_out < width_out) & ((o < C_OUT) & (shift < SHIFTS))[None, :]
        source = g + ((n * frames_out + t_out) * height_out + h_out).to(tl.int64) * width_out * C_OUT
        a = tl.load(source + _guarded(w_out * C_OUT + o[None, :], mask, C_OUT), mask=mask, other=0.0)
        filters = weight + ((kt * K_H + kh) * LENGTH + k) * COLUMNS
        b = tl.load(filters[:, None] + column[None, :])  # [BLOCK_K, COLUMNS]
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        # The next block of channels, then the next tap along H, then along T.
        first += BLOCK_K
        row_ends = first == LENGTH
        first = tl.where(row_ends, 0, first)
        kh = tl.where(row_ends, kh + stride_h, kh)
        h_out = tl.where(row_ends, h_out - 1, h_out)
        frame_ends = kh >= tl.minimum(K_H, h + 1)
        kh = tl.where(frame_ends, first_h, kh)
        h_out = tl.where(frame_ends, (h - first_h) // stride_h, h_out)
        kt = tl.where(frame_ends, kt + stride_t, kt)
        t_out = tl.where(frame_ends, t_out - 1, t_out)
    c = column % PIXEL
    r = column // PIXEL
    w = run[:, None] * RUN + r[None, :] - pad_w  # [BLOCK_M, COLUMNS]
    mask = (w >= 0) & (w < width) & ((c < C_IN) & (r < RUN))[None, :]
    offsets = row.to(tl.int64) * width * C_IN + w * C_IN + c[None, :]
    tl.store(gradient + tl.where(mask, offsets, 0), accumulator.to(gradient.dtype.element_ty), mask=mask)
