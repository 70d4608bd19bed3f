"""Recurrence of few hidden units, 128 of an LSTM in 16 bits: one launch for a clip, W_hh on chip for all its frames.

After the persistent recurrent kernels of Diamos et al. (2016), "Persistent RNNs: stashing recurrent weights on-chip",
ICML, §3, within one multiprocessor, so that no frame waits for another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.launch import Gpu
from vidkernels.op import DTYPES, dtype_name
from vidkernels.recurrent import layer
from vidkernels.recurrent.case import LSTM, RNN, LstmState, RecurrentCase
from vidkernels.recurrent.triton_frame import lstm_step, rnn_step

_WEIGHT_BYTES = 128 * 1024
"""Of W_hh, in shared memory beside the frames that are read ahead; half of it where it stands in registers, exact
float32. It is padded to a power of two of hidden units."""


def _limits(case: RecurrentCase, gates: int) -> str | None:
    if why := launch.dtype_refusal(case, "fp32", "tf32", "fp16", "bf16"):
        return why
    size = DTYPES[case.dtype].itemsize
    room = _WEIGHT_BYTES if case.dtype != "fp32" else _WEIGHT_BYTES // 2
    if gates * _block(case.hidden_size) ** 2 * size <= room:
        return None
    most = next(units for units in (256, 128, 64) if gates * units**2 * size <= room)
    return f"hidden_size={case.hidden_size}: W_hh in {case.dtype} stays on chip up to {most}"


def _constants(x: Tensor, hidden: int, gates: int) -> dict[str, Any]:
    return {
        "H": hidden,
        "GATES": gates,
        "BLOCK_H": _block(hidden),
        "DOT": not _exact(x),
        "PRECISION": launch.precision(x),
    }


def _block(hidden: int) -> int:
    """A power of two, and no less than the depth of a matrix instruction."""
    return max(16, 1 << (hidden - 1).bit_length())


def _exact(x: Tensor) -> bool:
    """Exact float32 products have no matrix instruction: a block takes one row and needs no padding to 16."""
    return x.dtype is torch.float32 and launch.precision(x) == "ieee"


def _config(name: str, x: Tensor, w_hh: Tensor, read: int, turned: int) -> tuning.Config:
    """How to launch a kernel that reads `read` numbers of each hidden unit in every frame.

    `turned` of them pass through shared memory from the layout of one instruction to that of another.
    ."""
    gpu, hidden, gates = launch.gpu_of(x), w_hh.shape[1], layer.gates_of(w_hh)
    key = tuning.Key(dtype_name(x), sizes=(hidden,), form=(gates,), positions=x.shape[0])
    candidates = list(_candidates(x, hidden, gates, read, turned, gpu))
    return tuning.pick(f"recurrent/triton_block/{name}", key, candidates, gpu)


def _candidates(x: Tensor, hidden: int, gates: int, read: int, turned: int, gpu: Gpu) -> Iterator[tuning.Config]:
    rows = 1 if _exact(x) else 16
    tile = rows * _block(hidden) * x.element_size()
    weights = 0 if _exact(x) else gates * _block(hidden) ** 2 * x.element_size()
    # The numbers of the next frame are read while this one is computed, where two frames have room.
    ahead = 2 if weights + (turned + read) * tile <= gpu.shared_bytes else 1
    # Four warps would have to spill what eight hold of 128 units.
    for warps in (8, 16) if _block(hidden) > 64 else (8, 4):
        yield {"BLOCK_N": rows, "AHEAD": ahead, "num_warps": warps, "num_stages": 1}


@launch.custom_op("recurrent_block" + layer.SIGNATURE)
def _forward(
    products: Tensor, w_hh: Tensor, h: Tensor | None, c: Tensor | None, sequence: bool, train: bool
) -> tuple[Tensor, ...]:
    (n, frames, _), hidden, gates = products.shape, w_hh.shape[1], layer.gates_of(w_hh)
    y = products.new_empty((n, frames, hidden) if sequence else 0)
    h_n = products.new_empty(n, hidden)
    c_n = products.new_empty((n, hidden) if gates == 4 else 0)
    activated = products.new_empty(products.shape if train else 0, dtype=layer.gates_dtype(products))
    cells = products.new_empty((n, frames, hidden) if train and gates == 4 else 0)
    config = _config("forward", products, w_hh, read=gates, turned=2)
    launch.triton(
        "recurrent.triton_block_kernels:forward",
        (-(-n // config["BLOCK_N"]),),
        products,
        w_hh,
        h,
        c,
        y if sequence else None,
        h_n,
        c_n if gates == 4 else None,
        activated if train else None,
        cells if train and gates == 4 else None,
        n,
        frames,
        **_constants(products, hidden, gates),
        **config,
    )
    return y, h_n, c_n, activated, cells


@launch.custom_op("recurrent_block_backward" + layer.BACKWARD_SIGNATURE)
def _backward(
    grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, w_hh: Tensor, activated: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    (n, frames, _), hidden, gates = activated.shape, w_hh.shape[1], layer.gates_of(w_hh)
    grad_products = torch.empty_like(activated, dtype=w_hh.dtype)
    grad_c_0 = w_hh.new_empty((n, hidden) if gates == 4 else 0)
    grad_y, grad_h, grad_c = (None if grad is None else grad.contiguous() for grad in (grad_y, grad_h, grad_c))
    config = _config("backward", grad_products, w_hh, read=gates + 2 if gates == 4 else 2, turned=gates + 1)
    launch.triton(
        "recurrent.triton_block_kernels:backward",
        (-(-n // config["BLOCK_N"]),),
        grad_y,
        grad_h,
        grad_c if gates == 4 else None,
        w_hh,
        activated,
        cells if gates == 4 else None,
        grad_products,
        grad_c_0 if gates == 4 else None,
        n,
        frames,
        **_constants(grad_products, hidden, gates),
        **config,
    )
    return grad_products, grad_c_0


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
    """The RNN with one launch for all frames; h stays in float32 on chip and is rounded for products alone.

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

    Source: Elman (1990), Cognitive Science 14(2); Diamos et al. (2016), ICML, §3.
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
    """The LSTM with one launch for all frames; h and c stay in float32 on chip, h is rounded for products alone.

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

    Source: Hochreiter & Schmidhuber (1997), Neural Computation 9(8); Diamos et al. (2016), ICML, §3.
    """
    return layer.lstm(_forward, x, w_ih, w_hh, bias, state, return_sequence)


RNN.implementation("triton_block", requires=("triton",), limits=partial(_limits, gates=1), step=rnn_step(rnn))(rnn)
LSTM.implementation("triton_block", requires=("triton",), limits=partial(_limits, gates=4), step=lstm_step(lstm))(lstm)
