"""What torch itself offers: one call for every part of the block, and torch.compile around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.causal_conv1d.library import step as conv_step
from vidkernels.op import compiled
from vidkernels.tcn_block.case import OP, TcnState, WeightNorm


def filters(w: Tensor | WeightNorm) -> Tensor:
    """w = g · v / ‖v‖, by the fused call behind `torch.nn.utils.parametrizations.weight_norm`."""
    return torch._weight_norm(w.v, w.g, 0) if isinstance(w, WeightNorm) else w


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
    hidden = F.dropout(F.relu(hidden, inplace=True), dropout_p, training)
    y, past_hidden = conv_step(hidden, filters(w2), b2, state=past_hidden, dilation=dilation)
    y = F.dropout(F.relu(y, inplace=True), dropout_p, training)
    shortcut = x_t if w_down is None else F.conv1d(x_t, w_down, b_down)
    return F.relu(y + shortcut, inplace=True), TcnState(past_x, past_hidden)


@OP.implementation("library", step=step)
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
    """`pad`, `conv1d`, `relu` and `dropout` of `torch.nn.functional`, twice, and the residual."""
    y, _ = step(x, w1, b1, w2, b2, w_down, b_down, dilation=dilation, dropout_p=dropout_p, training=training)
    return y


OP.implementation("compiled", requires=("compiler",), step=compiled(step))(compiled(tcn_block))
