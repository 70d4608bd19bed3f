"""The textbook equations, frame by frame. 16-bit inputs are computed, and their state is carried, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from vidkernels.op import widened
from vidkernels.recurrent.case import LSTM, RNN, LstmState


@widened
def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, Tensor]:
    """h[t] = tanh(W x[t] + U h[t−1] + b)."""
    h = x.new_zeros(x.shape[0], w_hh.shape[1]) if state is None else state
    b = 0.0 if bias is None else bias
    outputs = []
    for x_t in x.unbind(1):
        h = torch.tanh(x_t @ w_ih.T + h @ w_hh.T + b)
        outputs.append(h)
    return torch.stack(outputs, dim=1) if return_sequence else h, h


@widened
def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: LstmState | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, LstmState]:
    """The four gates' rows of W, U and b lie in the order i, f, g, o, as torch's do."""
    zeros = x.new_zeros(x.shape[0], w_hh.shape[1])
    h, c = (zeros, zeros) if state is None else state
    w_i, w_f, w_g, w_o = w_ih.chunk(4)
    u_i, u_f, u_g, u_o = w_hh.chunk(4)
    b_i, b_f, b_g, b_o = (0.0, 0.0, 0.0, 0.0) if bias is None else bias.chunk(4)
    outputs = []
    for x_t in x.unbind(1):
        i = torch.sigmoid(x_t @ w_i.T + h @ u_i.T + b_i)  # input gate:   i[t] = σ(W_i x[t] + U_i h[t−1] + b_i)
        f = torch.sigmoid(x_t @ w_f.T + h @ u_f.T + b_f)  # forget gate:  f[t] = σ(W_f x[t] + U_f h[t−1] + b_f)
        g = torch.tanh(x_t @ w_g.T + h @ u_g.T + b_g)  # candidate:    g[t] = tanh(W_g x[t] + U_g h[t−1] + b_g)
        o = torch.sigmoid(x_t @ w_o.T + h @ u_o.T + b_o)  # output gate:  o[t] = σ(W_o x[t] + U_o h[t−1] + b_o)
        c = f * c + i * g  # memory cell:  c[t] = f[t] ⊙ c[t−1] + i[t] ⊙ g[t]
        h = o * torch.tanh(c)  # hidden state: h[t] = o[t] ⊙ tanh(c[t])
        outputs.append(h)
    return torch.stack(outputs, dim=1) if return_sequence else h, (h, c)


# A step is the same function on one frame.
RNN.implementation("reference", step=rnn)(rnn)
LSTM.implementation("reference", step=lstm)(lstm)
