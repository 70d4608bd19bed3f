# mypy: ignore-errors
"""One frame per launch: recurrent product and gates together, forward, backward in time, and of a single new frame."""

import triton
import triton.language as tl

from vidkernels.recurrent.cell_kernels import lstm_backward, tanh


@triton.jit
def _clamped(index, size, EVEN: tl.constexpr, VECTOR: tl.constexpr):
    """Indices with those beyond `size` on 0, so that no pointer leaves its tensor; runs of VECTOR stay together."""
    clamped = tl.where(index < size, index, 0)
    return index if EVEN else tl.max_contiguous(tl.multiple_of(clamped, VECTOR), VECTOR)


@triton.jit
def _tile(N, H, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr):
    """Batch rows and hidden units of this block, clamped, and which of them exist."""
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (rows < N)[:, None] & (units < H)[None, :]  # [BLOCK_N, BLOCK_H]
    return (
        tl.where(rows < N, rows, 0).to(tl.int64)[:, None],
        _clamped(units, H, EVEN, min(VECTOR, BLOCK_H))[None, :],
        mask,
    )


@triton.jit
def _gate_rows(H, GATES: tl.constexpr, BLOCK_H: tl.constexpr, EVEN: tl.constexpr):
    """The rows of W_hh and W_ih for this block's units, their gates side by side: unit 0's i, f, g, o, unit 1's …"""
    columns = tl.arange(0, GATES * BLOCK_H)
    units = tl.program_id(0) * BLOCK_H + columns // GATES
    return ((columns % GATES) * H + _clamped(units, H, EVEN, 1))[None, :]


@triton.jit
def _multiplied(
    products,
    a,
    w,
    w_step,
    size,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """products + Σ_k a[row, k]·w[k, column], k < size; `a` and `w` point at k = 0."""
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN:
            left = tl.load(a + k[None, :])  # [BLOCK_N, BLOCK_K]
            right = tl.load(w + k[:, None] * w_step)  # [BLOCK_K, columns]
        else:
            inside = k < size
            k = _clamped(k, size, EVEN, VECTOR)
            left = tl.load(a + k[None, :], mask=inside[None, :], other=0)
            right = tl.load(w + k[:, None] * w_step, mask=inside[:, None], other=0)
        products = tl.dot(left, right, products, input_precision=PRECISION)
    return products


@triton.jit
def _four(products, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):
    """The gates i, f, g, o, [BLOCK_N, BLOCK_H] each, of columns that hold them side by side."""
    i_g, f_o = tl.split(tl.reshape(products, (BLOCK_N, BLOCK_H, 2, 2)))
    i, g = tl.split(i_g)
    f, o = tl.split(f_o)
    return i, f, g, o


@triton.jit(do_not_specialize=["t", "N", "T", "SLOTS"])
def forward(
    products,
    w_hh,
    h_0,
    c,
    y,
    h_n,
    gates,
    cells,
    t,
    N,
    T,
    SLOTS,
    H,
    GATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, units, mask = _tile(N, H, BLOCK_N, BLOCK_H, EVEN, VECTOR)
    acc = tl.zeros((BLOCK_N, GATES * BLOCK_H), tl.float32)
    weight = w_hh + _gate_rows(H, GATES, BLOCK_H, EVEN) * H
    if t > 0:
        # Frame t of h lies in slot t mod SLOTS of y, (N, SLOTS, H).
        before = y + (rows * SLOTS + (t - 1) % SLOTS) * H
        acc = _multiplied(acc, before, weight, 1, H, BLOCK_K, EVEN, VECTOR, PRECISION)
    elif h_0 is not None:
        acc = _multiplied(acc, h_0 + rows * H, weight, 1, H, BLOCK_K, EVEN, VECTOR, PRECISION)
    state = rows * H + units
    gate_at = (rows * T + t) * (GATES * H) + units
    p_0 = tl.load(products + gate_at, mask=mask, other=0)
    if GATES == 4:
        p_1 = tl.load(products + gate_at + H, mask=mask, other=0)
        p_2 = tl.load(products + gate_at + 2 * H, mask=mask, other=0)
        p_3 = tl.load(products + gate_at + 3 * H, mask=mask, other=0)
        c_before = tl.load(c + state, mask=mask, other=0)
        r_0, r_1, r_2, r_3 = _four(acc, BLOCK_N, BLOCK_H)
        i = tl.sigmoid(p_0 + r_0)
        f = tl.sigmoid(p_1 + r_1)
        g = tanh(p_2 + r_2)
        o = tl.sigmoid(p_3 + r_3)
        if gates is not None:
            tl.store(gates + gate_at, i, mask=mask)
            tl.store(gates + gate_at + H, f, mask=mask)
            tl.store(gates + gate_at + 2 * H, g, mask=mask)
            tl.store(gates + gate_at + 3 * H, o, mask=mask)
            tl.store(cells + (rows * T + t) * H + units, c_before, mask=mask)
        c_after = f * c_before + i * g
        h = o * tanh(c_after)
        tl.store(c + state, c_after, mask=mask)
    else:
        h = tanh(p_0 + acc)
        if gates is not None:
            tl.store(gates + gate_at, h, mask=mask)
    tl.store(y + (rows * SLOTS + t % SLOTS) * H + units, h, mask=mask)
    tl.store(h_n + state, h, mask=mask & (t == T - 1))


@triton.jit(do_not_specialize=["t", "N", "T"])
def backward(
    grad_y,
    grad_h,
    grad_c,
    w_hh,
    gates,
    cells,
    grad_products,
    t,
    N,
    T,
    H,
    GATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, units, mask = _tile(N, H, BLOCK_N, BLOCK_H, EVEN, VECTOR)
    dh = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    state = rows * H + units
    if t + 1 < T:
        after = grad_products + (rows * T + t + 1) * (GATES * H)
        dh = _multiplied(dh, after, w_hh + units, H, GATES * H, BLOCK_K, EVEN, VECTOR, PRECISION)
    elif grad_h is not None:
        dh += tl.load(grad_h + state, mask=mask, other=0)
    at = (rows * T + t) * H + units
    gate_at = (rows * T + t) * (GATES * H) + units
    if grad_y is not None:
        dh += tl.load(grad_y + at, mask=mask, other=0)
    a_0 = tl.load(gates + gate_at, mask=mask, other=0).to(tl.float32)
    if GATES == 4:
        a_1 = tl.load(gates + gate_at + H, mask=mask, other=0).to(tl.float32)
        a_2 = tl.load(gates + gate_at + 2 * H, mask=mask, other=0).to(tl.float32)
        a_3 = tl.load(gates + gate_at + 3 * H, mask=mask, other=0).to(tl.float32)
        c_before = tl.load(cells + at, mask=mask, other=0).to(tl.float32)
        dc = tl.load(grad_c + state, mask=mask, other=0)
        d_0, d_1, d_2, d_3, dc = lstm_backward(a_0, a_1, a_2, a_3, c_before, dh, dc)
        tl.store(grad_products + gate_at, d_0, mask=mask)
        tl.store(grad_products + gate_at + H, d_1, mask=mask)
        tl.store(grad_products + gate_at + 2 * H, d_2, mask=mask)
        tl.store(grad_products + gate_at + 3 * H, d_3, mask=mask)
        tl.store(grad_c + state, dc, mask=mask)
    else:
        tl.store(grad_products + gate_at, dh * (1 - a_0 * a_0), mask=mask)


@triton.jit(do_not_specialize=["N"])
def step(
    x,
    w_ih,
    w_hh,
    bias,
    h,
    c,
    h_n,
    c_n,
    N,
    F,
    H,
    GATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, units, mask = _tile(N, H, BLOCK_N, BLOCK_H, EVEN, VECTOR)
    gate_rows = _gate_rows(H, GATES, BLOCK_H, EVEN)
    acc = tl.zeros((BLOCK_N, GATES * BLOCK_H), tl.float32)
    if bias is not None:
        acc += tl.load(bias + gate_rows)
    acc = _multiplied(acc, x + rows * F, w_ih + gate_rows * F, 1, F, BLOCK_K, EVEN, VECTOR, PRECISION)
    if h is not None:
        acc = _multiplied(acc, h + rows * H, w_hh + gate_rows * H, 1, H, BLOCK_K, EVEN, VECTOR, PRECISION)
    state = rows * H + units
    if GATES == 4:
        i, f, g, o = _four(acc, BLOCK_N, BLOCK_H)
        c_after = tl.sigmoid(i) * tanh(g)
        if c is not None:
            c_after += tl.sigmoid(f) * tl.load(c + state, mask=mask, other=0)
        tl.store(h_n + state, tl.sigmoid(o) * tanh(c_after), mask=mask)
        tl.store(c_n + state, c_after, mask=mask)
    else:
        tl.store(h_n + state, tanh(acc), mask=mask)
