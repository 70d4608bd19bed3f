"""The definition, after figure 1(b) of the paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.causal_conv1d.reference import step as conv_step
from vidkernels.op import widened
from vidkernels.tcn_block.case import OP, TcnState, WeightNorm


def filters(w: Tensor | WeightNorm) -> Tensor:
    """w = g · v / ‖v‖ (Salimans & Kingma 2016, equation 2)."""
    if isinstance(w, WeightNorm):
        length: Tensor = torch.linalg.vector_norm(w.v, dim=(1, 2), keepdim=True)
        return w.g * w.v / length
    return w


@widened
def step(
    x_t: Tensor,
    w1: Tensor | WeightNorm,
    b1: Tensor | None,
    w2: Tensor | WeightNorm,
    b2: Tensor | None,
    w_down: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    state: TcnState | None = None,
    dilation: int,
    dropout_p: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, TcnState]:
    """The next frames (N, C_in, n): their outputs, and what the next call must remember."""
    past_x, past_hidden = (None, None) if state is None else state
    hidden, past_x = conv_step(x_t, filters(w1), b1, state=past_x, dilation=dilation)
    hidden = F.dropout(hidden.relu(), dropout_p, training)
    y, past_hidden = conv_step(hidden, filters(w2), b2, state=past_hidden, dilation=dilation)
    y = F.dropout(y.relu(), dropout_p, training)
    shortcut = x_t if w_down is None else conv_step(x_t, w_down, b_down)[0]
    return (y + shortcut).relu(), TcnState(past_x, past_hidden)


@OP.implementation("reference", step=step)
def tcn_block(
    x: Tensor,
    w1: Tensor | WeightNorm,
    b1: Tensor | None,
    w2: Tensor | WeightNorm,
    b2: Tensor | None,
    w_down: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    dilation: int,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """One step over the whole clip, from a past of zeros."""
    y, _ = step(x, w1, b1, w2, b2, w_down, b_down, dilation=dilation, dropout_p=dropout_p, training=training)
    return y
