"""The definition, tap by tap."""

from __future__ import annotations

from torch import Tensor

from vidkernels.conv3d.case import ACTIVATIONS
from vidkernels.conv3d.reference import shifted_taps
from vidkernels.depthwise_conv3d.case import OP
from vidkernels.op import widened
from vidkernels.shapes import Triple, triple


@OP.implementation("reference")
@widened
def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
    activation: str = "none",
) -> Tensor:
    """y = activation(b + Σ over taps (i, j, k) of w[:, 0, i, j, k] ⊙ (the input shifted by that tap))."""
    kernel = triple(weight.shape[2:], "kernel_size")
    stride, padding, dilation = triple(stride, "stride"), triple(padding, "padding"), triple(dilation, "dilation")
    y = x.new_zeros(())
    for (i, j, k), shifted in shifted_taps(x, kernel, stride, padding, dilation):
        y = y + weight[:, 0, i, j, k, None, None, None] * shifted
    return ACTIVATIONS[activation](y if bias is None else y + bias[:, None, None, None])
