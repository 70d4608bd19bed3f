# mypy: ignore-errors
"""A whole clip in one launch, W_hh on chip: forward, and backward in time."""

import triton
import triton.language as tl

from vidkernels.recurrent.cell_kernels import lstm_backward, tanh


@triton.jit
def _rows(N, BLOCK_N: tl.constexpr):
    """The batch rows of this block, those beyond N standing on row 0, and which of them exist."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.where(rows < N, rows, 0).to(tl.int64)[:, None], (rows < N)[:, None]


@triton.jit
def _units(H: tl.constexpr, BLOCK_H: tl.constexpr):
    """The hidden units, those beyond H standing on unit 0, and which of them exist."""
    units = tl.arange(0, BLOCK_H)
    inside = units < H
    if H < BLOCK_H:
        units = tl.where(inside, units, 0)
        if H % 8 == 0:
            units = tl.max_contiguous(tl.multiple_of(units, 8), 8)
    return units, inside


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0)


@triton.jit
def _product(a, w, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """[BLOCK_N, K] times [K, BLOCK_H] in float32; one row goes without the matrix units."""
    return tl.dot(a.to(w.dtype), w, input_precision=PRECISION) if DOT else tl.sum(tl.trans(a) * w, axis=0)[None, :]


@triton.jit(do_not_specialize=["N", "T"])
def forward(
    products,
    w_hh,
    h_0,
    c_0,
    y,
    h_n,
    c_n,
    gates,
    cells,
    N,
    T,
    H: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):
    rows, row_mask = _rows(N, BLOCK_N)
    units, inside = _units(H, BLOCK_H)
    mask = row_mask & inside[None, :]  # [BLOCK_N, BLOCK_H]
    # W_hh is (G·H, H): the transpose of one gate's rows meets h from the right.
    weight = w_hh + units[:, None] + units[None, :] * H  # [BLOCK_H of h, BLOCK_H of the gate]
    square = inside[:, None] & inside[None, :]
    w_0 = _load(weight, square)
    if GATES == 4:
        w_1 = _load(weight + H * H, square)
        w_2 = _load(weight + 2 * H * H, square)
        w_3 = _load(weight + 3 * H * H, square)
    state = rows * H + units[None, :]
    at = rows * T * H + units[None, :]  # of frame t in (N, T, H)
    gate_at = rows * T * (GATES * H) + units[None, :]  # of gate 0 of frame t in (N, T, G·H)
    h = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    if h_0 is not None:
        h += _load(h_0 + state, mask)
    c = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    if c_0 is not None:
        c += _load(c_0 + state, mask)

    for _ in tl.range(0, T, num_stages=AHEAD):
        p_0 = _load(products + gate_at, mask)
        if GATES == 4:
            p_1 = _load(products + gate_at + H, mask)
            p_2 = _load(products + gate_at + 2 * H, mask)
            p_3 = _load(products + gate_at + 3 * H, mask)
            i = tl.sigmoid(p_0 + _product(h, w_0, DOT, PRECISION))
            f = tl.sigmoid(p_1 + _product(h, w_1, DOT, PRECISION))
            g = tanh(p_2 + _product(h, w_2, DOT, PRECISION))
            o = tl.sigmoid(p_3 + _product(h, w_3, DOT, PRECISION))
            if gates is not None:
                tl.store(gates + gate_at, i, mask=mask)
                tl.store(gates + gate_at + H, f, mask=mask)
                tl.store(gates + gate_at + 2 * H, g, mask=mask)
                tl.store(gates + gate_at + 3 * H, o, mask=mask)
                tl.store(cells + at, c, mask=mask)
            c = f * c + i * g
            h = o * tanh(c)
        else:
            h = tanh(p_0 + _product(h, w_0, DOT, PRECISION))
            if gates is not None:
                tl.store(gates + gate_at, h, mask=mask)
        if y is not None:
            tl.store(y + at, h, mask=mask)
        at += H
        gate_at += GATES * H

    tl.store(h_n + state, h, mask=mask)
    if c_n is not None:
        tl.store(c_n + state, c, mask=mask)


@triton.jit(do_not_specialize=["N", "T"])
def backward(
    grad_y,
    grad_h,
    grad_c,
    w_hh,
    gates,
    cells,
    grad_products,
    grad_c_0,
    N,
    T,
    H: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):
    rows, row_mask = _rows(N, BLOCK_N)
    units, inside = _units(H, BLOCK_H)
    mask = row_mask & inside[None, :]  # [BLOCK_N, BLOCK_H]
    weight = w_hh + units[:, None] * H + units[None, :]  # [BLOCK_H of the gate, BLOCK_H of h]
    square = inside[:, None] & inside[None, :]
    w_0 = _load(weight, square)
    if GATES == 4:
        w_1 = _load(weight + H * H, square)
        w_2 = _load(weight + 2 * H * H, square)
        w_3 = _load(weight + 3 * H * H, square)
    state = rows * H + units[None, :]
    at = (rows * T + T - 1) * H + units[None, :]
    gate_at = (rows * T + T - 1) * (GATES * H) + units[None, :]
    dh = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    if grad_h is not None:
        dh += _load(grad_h + state, mask)
    dc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    if grad_c is not None:
        dc += _load(grad_c + state, mask)

    for _ in tl.range(0, T, num_stages=AHEAD):
        if grad_y is not None:
            dh += _load(grad_y + at, mask)
        a_0 = _load(gates + gate_at, mask).to(tl.float32)
        if GATES == 4:
            a_1 = _load(gates + gate_at + H, mask).to(tl.float32)
            a_2 = _load(gates + gate_at + 2 * H, mask).to(tl.float32)
            a_3 = _load(gates + gate_at + 3 * H, mask).to(tl.float32)
            c_before = _load(cells + at, mask).to(tl.float32)
            d_0, d_1, d_2, d_3, dc = lstm_backward(a_0, a_1, a_2, a_3, c_before, dh, dc)
            tl.store(grad_products + gate_at, d_0, mask=mask)
            tl.store(grad_products + gate_at + H, d_1, mask=mask)
            tl.store(grad_products + gate_at + 2 * H, d_2, mask=mask)
            tl.store(grad_products + gate_at + 3 * H, d_3, mask=mask)
            dh = _product(d_0, w_0, DOT, PRECISION) + _product(d_1, w_1, DOT, PRECISION)
            dh += _product(d_2, w_2, DOT, PRECISION) + _product(d_3, w_3, DOT, PRECISION)
        else:
            d_0 = dh * (1 - a_0 * a_0)
            tl.store(grad_products + gate_at, d_0, mask=mask)
            dh = _product(d_0, w_0, DOT, PRECISION)
        at -= H
        gate_at -= GATES * H

    if grad_c_0 is not None:
        tl.store(grad_c_0 + state, dc, mask=mask)
