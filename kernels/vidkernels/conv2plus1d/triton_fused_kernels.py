# mypy: ignore-errors
"""Forward kernels of the (2+1)D pair: packed filters, the two convolutions, and batch statistics between them.

All tensors are channels-last contiguous. `mid_channels` is the stored count of mid channels: a multiple of 16, of
which those that the filters do not have are zero. A tile is BLOCK_M positions by BLOCK_N + BLOCK_N2 channels in two
accumulators, so that 144 = 128 + 16 columns waste none.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "channels", "eps"])
def pack(
    source,
    packed,
    bn_weight,
    bn_bias,
    mean,
    var,
    shift,
    eps,
    rows,
    channels,
    packed_channels,
    TAPS: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Filters (rows, channels, taps) → (programs, taps, packed_channels), zeros where there is no source.

    FOLD multiplies every filter by its batch norm's scale in float32, rounded once, and writes the shift.
    """
    row = tl.program_id(0)
    live = row < rows
    here = tl.where(live, row, 0)
    scale = 1.0
    if FOLD:
        scale = tl.load(bn_weight + here) / tl.sqrt(tl.load(var + here) + eps)
        tl.store(shift + row, tl.where(live, tl.load(bn_bias + here) - tl.load(mean + here) * scale, 0.0))
    length = TAPS * packed_channels
    source += here.to(tl.int64) * channels * TAPS
    packed += row.to(tl.int64) * length
    for start in range(0, length, BLOCK):
        element = start + tl.arange(0, BLOCK)
        tap, channel = element // packed_channels, element % packed_channels
        inside = live & (element < length) & (channel < channels)
        value = tl.load(source + tl.where(inside, channel * TAPS + tap, 0), mask=inside, other=0.0)
        if FOLD:
            value = (value.to(tl.float32) * scale).to(packed.dtype.element_ty)
        tl.store(packed + element, value, mask=element < length)


@triton.jit
def write_mid(
    acc, mid, rows, live, count, n, mid_channels, shift, means, squares, tile, RELU: tl.constexpr, MOMENTS: tl.constexpr
):
    """One accumulator of the spatial convolution: shifted and rectified, or raw with its tile's statistics."""
    known = n < mid_channels
    if RELU:
        acc = tl.maximum(acc + tl.load(shift + n, mask=known, other=0.0)[None, :], 0.0)
    if MOMENTS:
        # Deviations from the tile's own mean: Σ v² alone would cancel where the mean is large.
        mean = tl.sum(tl.where(live[:, None], acc, 0.0), 0) / count
        deviation = tl.where(live[:, None], acc - mean[None, :], 0.0)
        place = tile.to(tl.int64) * mid_channels
        tl.store(means + place + n, mean, mask=known)
        tl.store(squares + place + n, tl.sum(deviation * deviation, 0), mask=known)
    tl.store(mid + (rows[:, None] + n[None, :]), acc.to(mid.dtype.element_ty), mask=live[:, None] & known[None, :])


@triton.jit(do_not_specialize=["positions", "height", "width", "out_height", "out_width", "pad_h", "pad_w"])
def spatial(
    x,
    weight,
    shift,
    mid,
    counts,
    means,
    squares,
    positions,
    channels,
    mid_channels,
    height,
    width,
    out_height,
    out_width,
    pad_h,
    pad_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    MERGED: tl.constexpr,
    EVEN: tl.constexpr,
    RELU: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """1×k×k convolution of single frames, rows of pixels gathered by pointers: any stride, padding and size.

    MERGED takes a row of taps and their channels as one axis: KERNEL_W · channels values that lie side by side.
    EVEN: BLOCK_K divides that axis.
    """
    columns = tl.cdiv(mid_channels, BLOCK_N + BLOCK_N2)
    tile = tl.program_id(0) // columns
    column = (tl.program_id(0) % columns) * (BLOCK_N + BLOCK_N2)
    first = tile * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    live = first + lane < positions
    pixels = out_height * out_width
    frame0 = first // pixels
    within = first - frame0 * pixels + lane
    pixel = within % pixels
    h0 = (pixel // out_width) * STRIDE_H - pad_h
    w0 = (pixel % out_width) * STRIDE_W - pad_w
    # Offsets within the tile's frames fit int32, that of its first frame does not.
    offset = ((within // pixels * height + h0) * width + w0) * channels  # [BLOCK_M]
    x += frame0.to(tl.int64) * height * width * channels

    depth = channels
    taps_w = KERNEL_W
    if MERGED:
        depth = channels * KERNEL_W
        taps_w = 1
    n = column + tl.arange(0, BLOCK_N)
    filters = tl.where(n < mid_channels, n, 0) * (KERNEL_H * KERNEL_W * channels)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2:
        n2 = column + BLOCK_N + tl.arange(0, BLOCK_N2)
        filters2 = tl.where(n2 < mid_channels, n2, 0) * (KERNEL_H * KERNEL_W * channels)
        acc2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)

    i = 0
    j = 0
    c = 0
    for _ in range(KERNEL_H * taps_w * tl.cdiv(depth, BLOCK_K)):
        k = c + tl.arange(0, BLOCK_K)
        inside = live & (h0 + i >= 0) & (h0 + i < height)
        step = (i * width + j) * channels
        kk = (i * taps_w + j) * depth + k
        if MERGED:
            element = w0[:, None] * channels + k[None, :]
            mask = inside[:, None] & (element >= 0) & (element < width * channels) & (k < depth)[None, :]
            place = tl.where(mask, offset[:, None] + step + k[None, :], 0)
        else:
            inside = inside & (w0 + j >= 0) & (w0 + j < width)
            if EVEN:
                mask = inside[:, None]
                place = tl.where(inside, offset + step, 0)[:, None] + k[None, :]
            else:
                mask = inside[:, None] & (k < depth)[None, :]
                place = tl.where(inside, offset + step, 0)[:, None] + tl.where(k < depth, k, 0)[None, :]
        a = tl.load(x + place, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if EVEN:
            b = tl.load(weight + (filters[None, :] + kk[:, None]))  # [BLOCK_K, BLOCK_N]
        else:
            some = (k < depth)[:, None]
            kk = tl.where(k < depth, kk, 0)
            b = tl.load(weight + (filters[None, :] + kk[:, None]), mask=some, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if BLOCK_N2:
            if EVEN:
                b2 = tl.load(weight + (filters2[None, :] + kk[:, None]))  # [BLOCK_K, BLOCK_N2]
            else:
                b2 = tl.load(weight + (filters2[None, :] + kk[:, None]), mask=some, other=0.0)
            acc2 = tl.dot(a, b2, acc2, input_precision=PRECISION)
        # Carried counters: a division of one flat counter is miscompiled at 8 warps (pytorch#173068).
        c += BLOCK_K
        wrap = c >= depth
        c = tl.where(wrap, 0, c)
        j = tl.where(wrap, j + 1, j)
        turn = j == taps_w
        j = tl.where(turn, 0, j)
        i = tl.where(turn, i + 1, i)

    count = tl.minimum(positions - first, BLOCK_M)
    if MOMENTS:
        tl.store(counts + tile, count)
    mid += first.to(tl.int64) * mid_channels
    rows = lane * mid_channels
    write_mid(acc, mid, rows, live, count, n, mid_channels, shift, means, squares, tile, RELU, MOMENTS)
    if BLOCK_N2:
        write_mid(acc2, mid, rows, live, count, n2, mid_channels, shift, means, squares, tile, RELU, MOMENTS)


@triton.jit(do_not_specialize=["frames", "height", "width", "out_height", "out_width", "pad_h", "pad_w"])
def spatial_tma(
    x,
    weight,
    weight2,
    shift,
    mid,
    counts,
    means,
    squares,
    frames,
    channels,
    mid_channels,
    height,
    width,
    out_height,
    out_width,
    pad_h,
    pad_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    RELU: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """1×k×k convolution at stride 1, boxes of pixels fetched by the copy engine, which fills the padding.

    x: map of (frames, height, width, channels) in boxes (BLOCK_F, BLOCK_H, BLOCK_W, BLOCK_K).
    weight, weight2: maps of (M, taps · channels) in blocks (BLOCK_N or BLOCK_N2, BLOCK_K); BLOCK_K divides channels.
    """
    BLOCK_M: tl.constexpr = BLOCK_F * BLOCK_H * BLOCK_W
    columns = tl.cdiv(mid_channels, BLOCK_N + BLOCK_N2)
    tile = tl.program_id(0) // columns
    column = (tl.program_id(0) % columns) * (BLOCK_N + BLOCK_N2)
    tiles_w = tl.cdiv(out_width, BLOCK_W)
    tiles_h = tl.cdiv(out_height, BLOCK_H)
    w0 = tile % tiles_w * BLOCK_W
    h0 = tile // tiles_w % tiles_h * BLOCK_H
    f0 = tile // tiles_w // tiles_h * BLOCK_F

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N2:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N2], tl.float32)
    i = 0
    j = 0
    c = 0
    kk = 0
    for _ in range(KERNEL_H * KERNEL_W * tl.cdiv(channels, BLOCK_K)):
        a = x.load([f0, h0 + i - pad_h, w0 + j - pad_w, c]).reshape(BLOCK_M, BLOCK_K)
        b = weight.load([column, kk])  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if BLOCK_N2:
            b2 = weight2.load([column + BLOCK_N, kk])  # [BLOCK_N2, BLOCK_K]
            acc2 = tl.dot(a, b2.T, acc2, input_precision=PRECISION)
        kk += BLOCK_K
        c += BLOCK_K
        wrap = c >= channels
        c = tl.where(wrap, 0, c)
        j = tl.where(wrap, j + 1, j)
        turn = j == KERNEL_W
        j = tl.where(turn, 0, j)
        i = tl.where(turn, i + 1, i)

    lane = tl.arange(0, BLOCK_M)
    f = lane // (BLOCK_H * BLOCK_W)
    h = lane // BLOCK_W % BLOCK_H
    w = lane % BLOCK_W
    live = (f0 + f < frames) & (h0 + h < out_height) & (w0 + w < out_width)
    count = tl.minimum(frames - f0, BLOCK_F) * tl.minimum(out_height - h0, BLOCK_H)
    count = count * tl.minimum(out_width - w0, BLOCK_W)
    if MOMENTS:
        tl.store(counts + tile, count)
    mid += ((f0.to(tl.int64) * out_height + h0) * out_width + w0) * mid_channels
    rows = ((f * out_height + h) * out_width + w) * mid_channels
    n = column + tl.arange(0, BLOCK_N)
    write_mid(acc, mid, rows, live, count, n, mid_channels, shift, means, squares, tile, RELU, MOMENTS)
    if BLOCK_N2:
        n2 = column + BLOCK_N + tl.arange(0, BLOCK_N2)
        write_mid(acc2, mid, rows, live, count, n2, mid_channels, shift, means, squares, tile, RELU, MOMENTS)


@triton.jit(do_not_specialize=["eps", "tiles", "positions", "filters", "mid_channels"])
def normalisation(
    counts,
    means,
    squares,
    bn_weight,
    bn_bias,
    affine,
    statistics,
    eps,
    tiles,
    positions,
    filters,
    mid_channels,
    BATCH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Batch norm as mean, 1/σ, scale and shift, (4, mid_channels) in float32; padded channels become 0.

    BATCH combines the tiles' statistics (Chan, Golub & LeVeque 1983) and writes mean and unbiased variance,
    (2, filters); else `means` and `squares` are the running mean and variance.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < filters
    if BATCH:
        total = tl.maximum(positions, 1).to(tl.float32)
        sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            inside = (tile < tiles)[:, None] & known[None, :]
            place = tl.where(inside, tile[:, None].to(tl.int64) * mid_channels + c[None, :], 0)
            count = tl.load(counts + tl.where(tile < tiles, tile, 0), mask=tile < tiles, other=0).to(tl.float32)
            sums += count[:, None] * tl.load(means + place, mask=inside, other=0.0)
        mean = tl.sum(sums, 0) / total
        sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for start in range(0, tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            inside = (tile < tiles)[:, None] & known[None, :]
            place = tl.where(inside, tile[:, None].to(tl.int64) * mid_channels + c[None, :], 0)
            count = tl.load(counts + tl.where(tile < tiles, tile, 0), mask=tile < tiles, other=0).to(tl.float32)
            away = tl.load(means + place, mask=inside, other=0.0) - mean[None, :]
            away = tl.where(inside, away, 0.0)
            sums += tl.load(squares + place, mask=inside, other=0.0) + count[:, None] * away * away
        square = tl.sum(sums, 0)
        var = square / total
        tl.store(statistics + c, mean, mask=known)
        tl.store(statistics + filters + c, square / tl.maximum(positions - 1, 1).to(tl.float32), mask=known)
    else:
        mean = tl.load(means + c, mask=known, other=0.0)
        var = tl.load(squares + c, mask=known, other=0.0)
    rstd = tl.where(known, 1.0 / tl.sqrt(var + eps), 0.0)
    scale = tl.load(bn_weight + c, mask=known, other=0.0) * rstd
    shift = tl.load(bn_bias + c, mask=known, other=0.0) - mean * scale
    stored = c < mid_channels
    tl.store(affine + c, tl.where(known, mean, 0.0), mask=stored)
    tl.store(affine + mid_channels + c, rstd, mask=stored)
    tl.store(affine + 2 * mid_channels + c, scale, mask=stored)
    tl.store(affine + 3 * mid_channels + c, shift, mask=stored)


@triton.jit
def _temporal_sum(
    acc,
    mid,
    offset,
    t0,
    live,
    weight,
    filters,
    scale,
    shift,
    frames,
    frame_step,
    mid_channels,
    start,
    stop,
    KERNEL_T: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the taps of mid channels [start, stop), a multiple of BLOCK_K of them, to an accumulator."""
    tap = 0
    k = start + tl.arange(0, BLOCK_K)
    for _ in range(KERNEL_T * ((stop - start) // BLOCK_K)):
        inside = live & (t0 + tap >= 0) & (t0 + tap < frames)
        place = tl.where(inside, offset + tap * frame_step, 0)[:, None] + k[None, :]
        a = tl.load(mid + place, mask=inside[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
        if AFFINE:
            hidden = a.to(tl.float32) * tl.load(scale + k)[None, :] + tl.load(shift + k)[None, :]
            # Frames beyond the clip are zero after batch norm, not before: relu(shift) is no padding.
            a = tl.where(inside[:, None], tl.maximum(hidden, 0.0), 0.0).to(a.dtype)
        b = tl.load(weight + (filters[None, :] + tap * mid_channels + k[:, None]))  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        tap += 1
        turn = tap == KERNEL_T
        tap = tl.where(turn, 0, tap)
        k = tl.where(turn, k + BLOCK_K, k)
    return acc


@triton.jit(do_not_specialize=["clips", "frames", "out_frames", "pixels", "pad"])
def temporal(
    mid,
    weight,
    scale,
    shift,
    y,
    clips,
    mid_channels,
    out_channels,
    frames,
    out_frames,
    pixels,
    pad,
    KERNEL_T: tl.constexpr,
    STRIDE: tl.constexpr,
    AFFINE: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """k×1×1 convolution of (clips, frames, pixels, M), of relu(scale · mid + shift) where AFFINE.

    TAIL: BLOCK_K does not divide M; what remains goes in steps of BLOCK_K2.
    """
    columns = tl.cdiv(out_channels, BLOCK_N)
    first = tl.program_id(0) // columns * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    live = first + lane < clips * out_frames * pixels
    clip0 = first // (out_frames * pixels)
    within = first - clip0 * out_frames * pixels + lane
    t = within // pixels % out_frames
    t0 = t * STRIDE - pad
    # Offsets count from the first row's frame, which lies within the clip, so that they fit int32.
    frame0 = tl.minimum((first // pixels % out_frames) * STRIDE, frames - 1)
    clip = within // (out_frames * pixels)
    offset = ((clip * frames + t0 - frame0) * pixels + within % pixels) * mid_channels  # [BLOCK_M]
    mid += (clip0.to(tl.int64) * frames + frame0) * pixels * mid_channels
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    filters = tl.where(n < out_channels, n, 0) * (KERNEL_T * mid_channels)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    step = pixels * mid_channels
    main = mid_channels // BLOCK_K * BLOCK_K
    acc = _temporal_sum(
        acc, mid, offset, t0, live, weight, filters, scale, shift, frames, step, mid_channels, 0, main,
        KERNEL_T, AFFINE, BLOCK_K, PRECISION,
    )  # fmt: skip
    if TAIL:
        acc = _temporal_sum(
            acc, mid, offset, t0, live, weight, filters, scale, shift, frames, step, mid_channels, main, mid_channels,
            KERNEL_T, AFFINE, BLOCK_K2, PRECISION,
        )  # fmt: skip
    y += first.to(tl.int64) * out_channels
    inside = live[:, None] & (n < out_channels)[None, :]
    tl.store(y + (lane[:, None] * out_channels + n[None, :]), acc.to(y.dtype.element_ty), mask=inside)
