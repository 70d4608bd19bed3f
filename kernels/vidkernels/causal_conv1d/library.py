"""What torch itself offers: conv1d on an input padded at its left end, and torch.compile around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.causal_conv1d.case import OP
from vidkernels.op import compiled


def step(
    x_t: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor | None = None, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """The next frames (N, C_in, n): their outputs, and the last (K−1)·d frames of input for the next call."""
    past = (weight.shape[2] - 1) * dilation
    window = F.pad(x_t, (past, 0)) if state is None else torch.cat((state, x_t), dim=2)
    return F.conv1d(window, weight, bias, dilation=dilation), window[:, :, x_t.shape[2] :]


@OP.implementation("library", step=step)
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
    """`torch.nn.functional.conv1d` after `pad`: padding both ends would compute frames only to drop them."""
    return F.conv1d(F.pad(x, ((weight.shape[2] - 1) * dilation, 0)), weight, bias, dilation=dilation)


OP.implementation("compiled", requires=("compiler",), step=compiled(step))(compiled(causal_conv1d))
