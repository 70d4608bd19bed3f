"""The definition, tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor

from vidkernels.causal_conv1d.case import OP
from vidkernels.op import widened


@widened
def step(
    x_t: Tensor, weight: Tensor, bias: Tensor | None = None, *, state: Tensor | None = None, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """The next frames (N, C_in, n): their outputs, and the last (K−1)·d frames of input for the next call."""
    taps, frames = weight.shape[2], x_t.shape[2]
    past = (taps - 1) * dilation
    if state is None:
        state = x_t.new_zeros(*x_t.shape[:2], past)
    window = torch.cat((state, x_t), dim=2)
    y = x_t.new_zeros(())
    for k in range(taps):
        shifted = window[:, :, k * dilation : k * dilation + frames]
        y = y + torch.einsum("oc,nct->not", weight[:, :, k], shifted)
    y = y if bias is None else y + bias[:, None]
    return y, window[:, :, frames:]


@OP.implementation("reference", step=step)
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> Tensor:
    """y[t] = b + Σ over taps k of w[:, :, k] · x[t − (K−1−k)·d]: one step over the whole clip, from a past of zeros."""
    y, _ = step(x, weight, bias, dilation=dilation)
    return y
