"""What torch itself offers: its fused layers (cuDNN, oneDNN), and torch.compile around one cell.

The compiled layers put a Python loop over time around one compiled cell. Compiling torch's layer leaves its one
call as it is, and compiling the unrolled loop takes minutes for a clip of some hundred frames.

The layers of torch take two biases; the second is zero here. cuDNN wants all weights in one buffer: separate tensors,
as these functions take them, are copied into one in every call, where `torch.nn.LSTM` holds one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.op import compiled, wants_gradients, wide
from vidkernels.recurrent.case import LSTM, RNN, LstmState


def _parameters(w_ih: Tensor, w_hh: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return (w_ih, w_hh) if bias is None else (w_ih, w_hh, bias, torch.zeros_like(bias))


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, Tensor]:
    """`torch.rnn_tanh`, the call behind `torch.nn.RNN`."""
    h = x.new_zeros(x.shape[0], w_hh.shape[1]) if state is None else state
    # cuDNN keeps what its backward needs only when told that it trains.
    train = wants_gradients(x, w_ih, w_hh, bias, state)
    weights = _parameters(w_ih, w_hh, bias)
    y, h = torch.rnn_tanh(x, h[None], weights, bias is not None, 1, 0.0, train, False, True)
    return y if return_sequence else y[:, -1], h[0]


def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: LstmState | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, LstmState]:
    """`torch.lstm`, the call behind `torch.nn.LSTM`."""
    zeros = x.new_zeros(x.shape[0], w_hh.shape[1])
    h, c = (zeros, zeros) if state is None else state
    train = wants_gradients(x, w_ih, w_hh, bias, state)
    weights = _parameters(w_ih, w_hh, bias)
    y, h, c = torch.lstm(x, (h[None], c[None]), weights, bias is not None, 1, 0.0, train, False, True)
    return y if return_sequence else y[:, -1], (h[0], c[0])


def _input_products(x: Tensor, w_ih: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """W x[t] + b of every frame, in one matrix product."""
    return F.linear(x.transpose(0, 1), w_ih, bias).contiguous().unbind(0)


@compiled
def _rnn_cell(product: Tensor, h: Tensor, w_hh: Tensor) -> Tensor:
    return torch.tanh(wide(product) + wide(h @ w_hh.T)).to(product.dtype)


@compiled
def _lstm_cell(product: Tensor, h: Tensor, c: Tensor, w_hh: Tensor) -> LstmState:
    """c is carried in float32 for 16-bit features."""
    i, f, g, o = (wide(product) + wide(h @ w_hh.T)).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return (torch.sigmoid(o) * torch.tanh(c)).to(product.dtype), c


def compiled_rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, Tensor]:
    """One compiled cell in a Python loop over time: the whole layer does not compile to anything better."""
    h = x.new_zeros(x.shape[0], w_hh.shape[1]) if state is None else state
    outputs = []
    for product in _input_products(x, w_ih, bias):
        h = _rnn_cell(product, h, w_hh)
        outputs.append(h)
    return torch.stack(outputs, dim=1) if return_sequence else h, h


def compiled_lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: LstmState | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, LstmState]:
    """One compiled cell in a Python loop over time: the whole layer does not compile to anything better."""
    zeros = x.new_zeros(x.shape[0], w_hh.shape[1])
    h, c = (zeros, zeros) if state is None else state
    c = wide(c)
    outputs = []
    for product in _input_products(x, w_ih, bias):
        h, c = _lstm_cell(product, h, c, w_hh)
        outputs.append(h)
    return torch.stack(outputs, dim=1) if return_sequence else h, (h, c.to(x.dtype))


# A step is the same function on one frame.
RNN.implementation("library", step=rnn)(rnn)
LSTM.implementation("library", step=lstm)(lstm)
RNN.implementation("compiled", requires=("compiler",), step=compiled_rnn)(compiled_rnn)
LSTM.implementation("compiled", requires=("compiler",), step=compiled_lstm)(compiled_lstm)
