"""Recurrence of any number of hidden units: one launch per frame, the recurrent product and the gates in it.

A block holds the columns of all gates for some hidden units, so that it has what these units' cells need: neither the
product nor the gates travel through memory. Fusing the two: Appleyard, Kočiský & Blunsom (2016), arXiv:1604.01946, §3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidkernels import launch
from vidkernels.recurrent import layer
from vidkernels.recurrent.case import LSTM, RNN, LstmState, RecurrentCase
from vidkernels.recurrent.triton_frame import Products, lstm_step, rnn_step


def _limits(case: RecurrentCase) -> str | None:
    return launch.dtype_refusal(case, "fp32", "tf32", "fp16", "bf16")


@launch.custom_op("recurrent_gates" + layer.SIGNATURE)
def _forward(
    products: Tensor, w_hh: Tensor, h: Tensor | None, c: Tensor | None, sequence: bool, train: bool
) -> tuple[Tensor, ...]:
    (n, frames, _), hidden, gates = products.shape, w_hh.shape[1], layer.gates_of(w_hh)
    # Without a sequence, two frames take turns: one is read while the other is written.
    slots = frames if sequence else 2
    y = products.new_empty(n, slots, hidden)
    h_n = products.new_empty(n, hidden)
    cell = None
    if gates == 4:
        cell = products.new_zeros(n, hidden, dtype=torch.float32)
        if c is not None:
            cell.copy_(c)
    activated = products.new_empty(products.shape if train else 0, dtype=layer.gates_dtype(products))
    cells = products.new_empty((n, frames, hidden) if train and gates == 4 else 0)
    grid, constants = Products("forward", products, hidden, columns=gates, sums=(hidden,)).launch()
    for t in range(frames):
        launch.triton(
            "recurrent.triton_gates_kernels:forward",
            grid,
            products,
            w_hh,
            h,
            cell,
            y,
            h_n,
            activated if train else None,
            cells if train and gates == 4 else None,
            t,
            n,
            frames,
            slots,
            hidden,
            GATES=gates,
            **constants,
        )
    c_n = products.new_empty(0) if cell is None else cell.to(products.dtype)
    return y if sequence else products.new_empty(0), h_n, c_n, activated, cells


@launch.custom_op("recurrent_gates_backward" + layer.BACKWARD_SIGNATURE)
def _backward(
    grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, w_hh: Tensor, activated: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    (n, frames, _), hidden, gates = activated.shape, w_hh.shape[1], layer.gates_of(w_hh)
    grad_products = torch.empty_like(activated, dtype=w_hh.dtype)
    grad_cell = None
    if gates == 4:
        grad_cell = activated.new_zeros(n, hidden, dtype=torch.float32)
        if grad_c is not None:
            grad_cell.copy_(grad_c)
    grad_y, grad_h = (None if grad is None else grad.contiguous() for grad in (grad_y, grad_h))
    grid, constants = Products("backward", grad_products, hidden, columns=1, sums=(gates * hidden,)).launch()
    for t in reversed(range(frames)):
        launch.triton(
            "recurrent.triton_gates_kernels:backward",
            grid,
            grad_y,
            grad_h,
            grad_cell,
            w_hh,
            activated,
            cells if gates == 4 else None,
            grad_products,
            t,
            n,
            frames,
            hidden,
            GATES=gates,
            **constants,
        )
    return grad_products, w_hh.new_empty(0) if grad_cell is None else grad_cell.to(w_hh.dtype)


layer.differentiate(_forward, _backward)


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, Tensor]:
    """The RNN with one launch per frame.

    Args:
        x: Features, (N, T, F).
        w_ih: (H, F).
        w_hh: (H, H).
        bias: (H,), or None.
        state: h before the first frame, (N, H); None: zeros.
        return_sequence: Outputs of every frame, not of the last alone.

    Returns:
        y, (N, T, H) or (N, H), and the last h, (N, H); dtype of x.

    Raises:
        ValueError: Dtypes differ.

    Source: Elman (1990), Cognitive Science 14(2).
    """
    return layer.rnn(_forward, x, w_ih, w_hh, bias, state, return_sequence)


def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: LstmState | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, LstmState]:
    """The LSTM with one launch per frame; c stays in float32 from frame to frame.

    Args:
        x: Features, (N, T, F).
        w_ih: (4·H, F), rows in the order i, f, g, o.
        w_hh: (4·H, H), likewise.
        bias: (4·H,), or None.
        state: (h, c) before the first frame, (N, H) each; None: zeros.
        return_sequence: Outputs of every frame, not of the last alone.

    Returns:
        y, (N, T, H) or (N, H), and the last (h, c), (N, H) each; dtype of x.

    Raises:
        ValueError: Dtypes differ.

    Source: Hochreiter & Schmidhuber (1997), Neural Computation 9(8); Gers et al. (2000).
    """
    return layer.lstm(_forward, x, w_ih, w_hh, bias, state, return_sequence)


RNN.implementation("triton_gates", requires=("triton",), limits=_limits, step=rnn_step(rnn))(rnn)
LSTM.implementation("triton_gates", requires=("triton",), limits=_limits, step=lstm_step(lstm))(lstm)
