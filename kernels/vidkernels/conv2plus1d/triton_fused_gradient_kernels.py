# mypy: ignore-errors
"""Backward kernels of the (2+1)D pair, up to the gradient of the raw spatial convolution.

Tensors are as in `triton_fused_kernels`; `affine` is (4, M): mean, 1/σ, scale and shift of the batch norm.
"""

import triton
import triton.language as tl


@triton.jit
def _within(n, count):
    """Channels of a tile, those beyond `count`, a multiple of 16, replaced by 0 to 15, in runs that load as vectors."""
    return tl.max_contiguous(tl.multiple_of(tl.where(n < count, n, n % 16), 16), 16)


@triton.jit
def _write_gradient(
    acc, raw, gz, affine, rows, live, n, mid_channels, tile, sums, products
):  # fmt: skip
    """One accumulator: through the ReLU, and the two sums over positions that batch norm's gradients are made of."""
    known = n < mid_channels
    inside = live[:, None] & known[None, :]
    place = rows[:, None] + n[None, :]
    value = tl.load(raw + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(affine + n, mask=known, other=0.0)
    scale = tl.load(affine + 2 * mid_channels + n, mask=known, other=0.0)
    shift = tl.load(affine + 3 * mid_channels + n, mask=known, other=0.0)
    passes = inside & (value * scale[None, :] + shift[None, :] > 0)
    grad = tl.where(passes, acc, 0.0)
    tl.store(gz + place, grad.to(gz.dtype.element_ty), mask=inside)
    out = tile.to(tl.int64) * mid_channels + n
    tl.store(sums + out, tl.sum(grad, 0), mask=known)
    # 1/σ once for each column, not for each value: it is loaded when the other vectors are done with their registers.
    product = tl.sum(grad * (value - mean[None, :]), 0) * tl.load(affine + mid_channels + n, mask=known, other=0.0)
    tl.store(products + out, product, mask=known)


@triton.jit(do_not_specialize=["clips", "frames", "out_frames", "pixels", "pad", "tiles"])
def hidden_gradient(
    g,
    weight,
    raw,
    affine,
    gz,
    sums,
    products,
    clips,
    mid_channels,
    out_channels,
    frames,
    out_frames,
    pixels,
    pad,
    tiles,
    KERNEL_T: tl.constexpr,
    STRIDE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the batch norm's result, and per tile its sum and its sum of products with the normalised input.

    At stride s the frames t ≡ c (mod s) meet the same taps: program_id(1) is c, and no tap falls between frames.
    """
    columns = tl.cdiv(mid_channels, BLOCK_N + BLOCK_N2)
    tile = tl.program_id(0) // columns
    column = (tl.program_id(0) % columns) * (BLOCK_N + BLOCK_N2)
    residue = tl.program_id(1)
    first = tile * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    class_frames = (frames - residue + STRIDE - 1) // STRIDE
    live = first + lane < clips * class_frames * pixels
    # Where a class has no frames nothing is live, but the divisions below must stand.
    class_frames = tl.maximum(class_frames, 1)
    clip0 = first // (class_frames * pixels)
    within = first - clip0 * class_frames * pixels + lane
    clip = within // (class_frames * pixels)
    turn = within // pixels % class_frames
    pixel = within % pixels
    # y's frame of tap residue_tap + q·STRIDE is turn + late − q.
    late = (residue + pad) // STRIDE
    tap0 = (residue + pad) % STRIDE
    t0 = turn + late
    turn0 = first // pixels % class_frames
    frame0 = tl.minimum(turn0 + late, out_frames - 1)
    clip0 = tl.minimum(clip0, clips - 1)
    offset = ((clip * out_frames + t0 - frame0) * pixels + pixel) * out_channels  # [BLOCK_M]
    g += (clip0.to(tl.int64) * out_frames + frame0) * pixels * out_channels

    n = column + tl.arange(0, BLOCK_N)
    filters = _within(n, mid_channels)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2:
        n2 = column + BLOCK_N + tl.arange(0, BLOCK_N2)
        filters2 = _within(n2, mid_channels)
        acc2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
    taps = (tl.maximum(KERNEL_T - tap0, 0) + STRIDE - 1) // STRIDE
    q = 0
    c = 0
    for _ in range(taps * tl.cdiv(out_channels, BLOCK_K)):
        k = c + tl.arange(0, BLOCK_K)
        inside = live & (t0 >= q) & (t0 - q < out_frames)
        place = tl.where(inside, offset - q * pixels * out_channels, 0)[:, None]
        tap = tap0 + q * STRIDE
        if EVEN:
            a = tl.load(g + (place + k[None, :]), mask=inside[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            row = (k * KERNEL_T + tap) * mid_channels
            b = tl.load(weight + (row[:, None] + filters[None, :]))  # [BLOCK_K, BLOCK_N]
        else:
            some = k < out_channels
            k = tl.where(some, k, 0)
            a = tl.load(g + (place + k[None, :]), mask=inside[:, None] & some[None, :], other=0.0)
            row = (k * KERNEL_T + tap) * mid_channels
            b = tl.load(weight + (row[:, None] + filters[None, :]), mask=some[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if BLOCK_N2:
            if EVEN:
                b2 = tl.load(weight + (row[:, None] + filters2[None, :]))  # [BLOCK_K, BLOCK_N2]
            else:
                b2 = tl.load(weight + (row[:, None] + filters2[None, :]), mask=some[:, None], other=0.0)
            acc2 = tl.dot(a, b2, acc2, input_precision=PRECISION)
        c += BLOCK_K
        wrap = c >= out_channels
        c = tl.where(wrap, 0, c)
        q = tl.where(wrap, q + 1, q)

    start = (clip0.to(tl.int64) * frames + turn0 * STRIDE) * pixels * mid_channels
    rows = ((clip * frames + (turn - turn0) * STRIDE + residue) * pixels + pixel) * mid_channels
    place = residue * tiles + tile
    _write_gradient(acc, raw + start, gz + start, affine, rows, live, n, mid_channels, place, sums, products)
    if BLOCK_N2:
        _write_gradient(acc2, raw + start, gz + start, affine, rows, live, n2, mid_channels, place, sums, products)


@triton.jit(do_not_specialize=["tiles", "positions", "filters", "mid_channels"])
def normalisation_gradient(
    sums,
    products,
    affine,
    gradients,
    coefficients,
    tiles,
    positions,
    filters,
    mid_channels,
    BATCH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of scale and shift, (2, filters), and with batch statistics what `raw_gradient` needs, (2, M)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    stored = c < mid_channels
    sum_g = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        inside = (tile < tiles)[:, None] & stored[None, :]
        place = tl.where(inside, tile[:, None].to(tl.int64) * mid_channels + c[None, :], 0)
        sum_g += tl.load(sums + place, mask=inside, other=0.0)
        sum_gx += tl.load(products + place, mask=inside, other=0.0)
    total_g = tl.sum(sum_g, 0)
    total_gx = tl.sum(sum_gx, 0)
    tl.store(gradients + c, total_gx, mask=c < filters)
    tl.store(gradients + filters + c, total_g, mask=c < filters)
    if BATCH:
        count = tl.maximum(positions, 1).to(tl.float32)
        rstd = tl.load(affine + mid_channels + c, mask=stored, other=0.0)
        tl.store(coefficients + c, total_g / count, mask=stored)
        tl.store(coefficients + mid_channels + c, rstd * total_gx / count, mask=stored)


@triton.jit(do_not_specialize=["positions"])
def raw_gradient(
    gz,
    raw,
    affine,
    coefficients,
    positions,
    mid_channels,
    BATCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Batch norm's gradient in place: scale · (gz − mean(gz) − x̂ · mean(gz · x̂)), or scale · gz.

    Source: Ioffe & Szegedy (2015), arXiv:1502.03167, §3.
    """
    first = tl.program_id(0) * BLOCK_R
    lane = tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < mid_channels
    inside = (first + lane < positions)[:, None] & known[None, :]
    start = first.to(tl.int64) * mid_channels
    place = lane[:, None] * mid_channels + c[None, :]
    grad = tl.load(gz + start + place, mask=inside, other=0.0).to(tl.float32)
    if BATCH:
        value = tl.load(raw + start + place, mask=inside, other=0.0).to(tl.float32)
        away = value - tl.load(affine + c, mask=known, other=0.0)[None, :]
        grad -= tl.load(coefficients + c, mask=known, other=0.0)[None, :]
        grad -= away * tl.load(coefficients + mid_channels + c, mask=known, other=0.0)[None, :]
    grad *= tl.load(affine + 2 * mid_channels + c, mask=known, other=0.0)[None, :]
    tl.store(gz + start + place, grad.to(gz.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["clips", "frames", "out_frames", "pixels", "pad", "rows_each"])
def temporal_weight(
    raw,
    g,
    affine,
    partial,
    clips,
    mid_channels,
    out_channels,
    frames,
    out_frames,
    pixels,
    pad,
    rows_each,
    KERNEL_T: tl.constexpr,
    STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial gradients of the temporal filters, (splits, C_out, kT, M) in float32: g against relu(bn(raw)).

    program_id: (tap, tile of M; tile of C_out; split); every split sums `rows_each` output positions in order.
    ALIGNED: C_out is a multiple of 16.
    """
    columns = tl.cdiv(mid_channels, BLOCK_N + BLOCK_N2)
    tap = tl.program_id(0) // columns
    column = (tl.program_id(0) % columns) * (BLOCK_N + BLOCK_N2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_safe = _within(m, out_channels) if ALIGNED else tl.where(m < out_channels, m, 0)
    n = column + tl.arange(0, BLOCK_N)
    n_safe = _within(n, mid_channels)
    scale, shift = tl.load(affine + 2 * mid_channels + n_safe), tl.load(affine + 3 * mid_channels + n_safe)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2:
        n2 = column + BLOCK_N + tl.arange(0, BLOCK_N2)
        n2_safe = _within(n2, mid_channels)
        scale2, shift2 = tl.load(affine + 2 * mid_channels + n2_safe), tl.load(affine + 3 * mid_channels + n2_safe)
        acc2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
    rows = clips * out_frames * pixels
    start = tl.program_id(2) * rows_each
    stop = tl.minimum(start + rows_each, rows)
    for first in range(start, stop, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        clip_frame = row // pixels
        t = clip_frame % out_frames * STRIDE + tap - pad
        inside = (row < stop) & (t >= 0) & (t < frames)
        # Rows without a frame count nothing because their g is zero; what stands in for their frame is row 0.
        here = tl.where(inside, row, 0).to(tl.int64)
        there = tl.where(inside, (clip_frame // out_frames * frames + t) * pixels + row % pixels, 0).to(tl.int64)
        a = tl.load(g + (here[:, None] * out_channels + m_safe[None, :]), mask=inside[:, None], other=0.0)
        b = tl.load(raw + (there[:, None] * mid_channels + n_safe[None, :]), mask=inside[:, None], other=0.0)
        b = tl.maximum(b.to(tl.float32) * scale[None, :] + shift[None, :], 0.0).to(a.dtype)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        if BLOCK_N2:
            b2 = tl.load(raw + (there[:, None] * mid_channels + n2_safe[None, :]), mask=inside[:, None], other=0.0)
            b2 = tl.maximum(b2.to(tl.float32) * scale2[None, :] + shift2[None, :], 0.0).to(a.dtype)
            acc2 = tl.dot(a.T, b2, acc2, input_precision=PRECISION)
    partial += tl.program_id(2).to(tl.int64) * out_channels * KERNEL_T * mid_channels
    place = (m * KERNEL_T + tap) * mid_channels
    inside = (m < out_channels)[:, None] & (n < mid_channels)[None, :]
    tl.store(partial + (place[:, None] + n[None, :]), acc, mask=inside)
    if BLOCK_N2:
        inside = (m < out_channels)[:, None] & (n2 < mid_channels)[None, :]
        tl.store(partial + (place[:, None] + n2[None, :]), acc2, mask=inside)


@triton.jit(do_not_specialize=["splits", "out_channels", "filters", "mid_channels"])
def sum_splits(
    partial,
    gradient,
    splits,
    out_channels,
    filters,
    mid_channels,
    KERNEL_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(splits, C_out, kT, M) → the gradient of the temporal filters, (C_out, filters, kT), summed in order."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < out_channels * filters * KERNEL_T
    tap = element % KERNEL_T
    channel = element // KERNEL_T % filters
    out = element // KERNEL_T // filters
    place = tl.where(inside, (out * KERNEL_T + tap) * mid_channels + channel, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partial + place, mask=inside, other=0.0)
        partial += out_channels * KERNEL_T * mid_channels
    tl.store(gradient + element, total.to(gradient.dtype.element_ty), mask=inside)
