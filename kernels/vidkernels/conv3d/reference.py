"""The definition, tap by tap."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.conv3d.case import ACTIVATIONS, OP
from vidkernels.op import widened
from vidkernels.shapes import Triple, conv_sizes, triple


def shifted_taps(
    x: Tensor, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple
) -> Iterator[tuple[Triple, Tensor]]:
    """For every tap (i, j, k): the zero-padded input that it meets, (N, C, T', H', W')."""
    t_out, h_out, w_out = conv_sizes(triple(x.shape[2:], "x"), kernel, stride, padding, dilation)
    pad_t, pad_h, pad_w = padding
    padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h, pad_t, pad_t))
    for i, j, k in product(*map(range, kernel)):
        t0, h0, w0 = i * dilation[0], j * dilation[1], k * dilation[2]
        yield (
            (i, j, k),
            padded[
                :,
                :,
                t0 : t0 + stride[0] * (t_out - 1) + 1 : stride[0],
                h0 : h0 + stride[1] * (h_out - 1) + 1 : stride[1],
                w0 : w0 + stride[2] * (w_out - 1) + 1 : stride[2],
            ],
        )


@OP.implementation("reference")
@widened
def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
    activation: str = "none",
) -> Tensor:
    """y = activation(residual + b + Σ over taps (i, j, k) of w[:, :, i, j, k] · (the input shifted by that tap))."""
    kernel = triple(weight.shape[2:], "kernel_size")
    stride, padding, dilation = triple(stride, "stride"), triple(padding, "padding"), triple(dilation, "dilation")
    y = x.new_zeros(())
    for (i, j, k), shifted in shifted_taps(x, kernel, stride, padding, dilation):
        y = y + torch.einsum("oc,ncthw->nothw", weight[:, :, i, j, k], shifted)
    y = y if bias is None else y + bias[:, None, None, None]
    return ACTIVATIONS[activation](y if residual is None else y + residual)
