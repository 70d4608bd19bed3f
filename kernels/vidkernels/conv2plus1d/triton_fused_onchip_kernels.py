# mypy: ignore-errors
"""The (2+1)D pair of evaluation in one kernel: what lies between the convolutions never leaves the chip."""

import triton
import triton.language as tl


@triton.jit
def _hidden(
    x,
    weight,
    shift,
    offset,
    h0,
    w0,
    live,
    channels,
    mid_channels,
    height,
    width,
    m,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """relu(x ∗ weight + shift) of one frame for BLOCK_MID mid channels from m on, in the dtype of x."""
    n = m + tl.arange(0, BLOCK_MID)
    filters = n * (KERNEL_H * KERNEL_W * channels)
    acc = tl.zeros([BLOCK_M, BLOCK_MID], tl.float32)
    i = 0
    j = 0
    c = 0
    for step in range(KERNEL_H * KERNEL_W * (channels // BLOCK_K)):
        k = tl.arange(0, BLOCK_K)
        inside = live & (h0 + i >= 0) & (h0 + i < height) & (w0 + j >= 0) & (w0 + j < width)
        place = tl.where(inside, offset + ((i * width + j) * channels + c), 0)[:, None] + k[None, :]
        a = tl.load(x + place, mask=inside[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(weight + (filters[None, :] + (step * BLOCK_K + k)[:, None]))  # [BLOCK_K, BLOCK_MID]
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        c += BLOCK_K
        wrap = c == channels
        c = tl.where(wrap, 0, c)
        j = tl.where(wrap, j + 1, j)
        turn = j == KERNEL_W
        j = tl.where(turn, 0, j)
        i = tl.where(turn, i + 1, i)
    return tl.maximum(acc + tl.load(shift + n)[None, :], 0.0).to(x.dtype.element_ty)


@triton.jit
def _taps(
    hidden,
    early,
    middle,
    late,
    weight,
    filters,
    mid_channels,
    m,
    BLOCK_MID: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One frame's part in the three frames of the result that it meets, through taps 2, 1 and 0."""
    k = (m + tl.arange(0, BLOCK_MID))[:, None] + filters[None, :]  # [BLOCK_MID, BLOCK_N]
    late = tl.dot(hidden, tl.load(weight + k), late, input_precision=PRECISION)
    middle = tl.dot(hidden, tl.load(weight + mid_channels + k), middle, input_precision=PRECISION)
    early = tl.dot(hidden, tl.load(weight + 2 * mid_channels + k), early, input_precision=PRECISION)
    return early, middle, late


@triton.jit(
    do_not_specialize=[
        "frames", "height", "width", "out_frames", "out_height", "out_width", "pad_t", "pad_h", "pad_w",
        "frames_each", "chunks",
    ]
)  # fmt: skip
def onchip(
    x,
    w_spatial,
    shift,
    w_temporal,
    y,
    channels,
    mid_channels,
    out_channels,
    frames,
    height,
    width,
    out_frames,
    out_height,
    out_width,
    pad_t,
    pad_h,
    pad_w,
    frames_each,
    chunks,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_MID: tl.constexpr,
    BLOCK_MID2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = w_temporal ∗ relu(w_spatial ∗ x + shift) with three temporal taps at stride 1.

    A block owns BLOCK_H × BLOCK_W pixels of `frames_each` frames of one clip's result and all its channels. It walks
    through the input's frames with three frames of the result open: the one that frame t completes, and two more.
    TAIL: BLOCK_MID does not divide M; what remains goes in steps of BLOCK_MID2.
    """
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    tiles_w = tl.cdiv(out_width, BLOCK_W)
    tiles_h = tl.cdiv(out_height, BLOCK_H)
    block = tl.program_id(0)
    column = block % tiles_w * BLOCK_W
    line = block // tiles_w % tiles_h * BLOCK_H
    chunk = block // (tiles_w * tiles_h) % chunks
    clip = block // (tiles_w * tiles_h) // chunks
    lane = tl.arange(0, BLOCK_M)
    h = line + lane // BLOCK_W
    w = column + lane % BLOCK_W
    live = (h < out_height) & (w < out_width)
    h0 = h * STRIDE_H - pad_h
    w0 = w * STRIDE_W - pad_w
    offset = (h0 * width + w0) * channels  # [BLOCK_M]
    n = tl.arange(0, BLOCK_N)
    filters = tl.where(n < out_channels, n, 0) * (3 * mid_channels)
    inside = live[:, None] & (n < out_channels)[None, :]
    place = tl.where(live, h * out_width + w, 0)[:, None] * out_channels + n[None, :]

    start = chunk * frames_each
    stop = tl.minimum(start + frames_each, out_frames)
    main = mid_channels // BLOCK_MID * BLOCK_MID
    early = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    middle = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    late = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in range(start - pad_t, stop - pad_t + 2):
        if (t >= 0) & (t < frames):
            frame = x + (clip.to(tl.int64) * frames + t) * height * width * channels
            for m in range(0, main, BLOCK_MID):
                hidden = _hidden(
                    frame, w_spatial, shift, offset, h0, w0, live, channels, mid_channels, height, width, m,
                    KERNEL_H, KERNEL_W, BLOCK_M, BLOCK_MID, BLOCK_K, PRECISION,
                )  # fmt: skip
                early, middle, late = _taps(
                    hidden, early, middle, late, w_temporal, filters, mid_channels, m, BLOCK_MID, PRECISION
                )
            if TAIL:
                for m in range(main, mid_channels, BLOCK_MID2):
                    hidden = _hidden(
                        frame, w_spatial, shift, offset, h0, w0, live, channels, mid_channels, height, width, m,
                        KERNEL_H, KERNEL_W, BLOCK_M, BLOCK_MID2, BLOCK_K, PRECISION,
                    )  # fmt: skip
                    early, middle, late = _taps(
                        hidden, early, middle, late, w_temporal, filters, mid_channels, m, BLOCK_MID2, PRECISION
                    )
        done = t + pad_t - 2
        if (done >= start) & (done < stop):
            out = y + (clip.to(tl.int64) * out_frames + done) * out_height * out_width * out_channels
            tl.store(out + place, early.to(y.dtype.element_ty), mask=inside)
        early = middle
        middle = late
        late = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
