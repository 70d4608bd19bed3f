"""The definition: two convolutions with batch norm and ReLU between them."""

from __future__ import annotations

import torch
from torch import Tensor

from vidkernels.conv2plus1d.case import OP, BatchNorm
from vidkernels.conv3d.reference import conv3d
from vidkernels.op import wide
from vidkernels.shapes import Triple, triple


@OP.implementation("reference")
def conv2plus1d(
    x: Tensor,
    w_spatial: Tensor,
    bn: BatchNorm,
    w_temporal: Tensor,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    training: bool = False,
) -> Tensor:
    """y = w_temporal ∗ relu(bn(w_spatial ∗ x)); 16-bit inputs are rounded once, at the end."""
    s_t, s_h, s_w = triple(stride, "stride")
    p_t, p_h, p_w = triple(padding, "padding")
    hidden = conv3d(wide(x), wide(w_spatial), stride=(1, s_h, s_w), padding=(0, p_h, p_w))
    normed = batch_norm(hidden, bn, training).relu()
    return conv3d(normed, wide(w_temporal), stride=(s_t, 1, 1), padding=(p_t, 0, 0)).to(x.dtype)


def batch_norm(hidden: Tensor, bn: BatchNorm, training: bool) -> Tensor:
    """weight · (hidden − mean) / √(var + eps) + bias, over every axis but the channels'."""
    if training:
        count = hidden.numel() // hidden.shape[1]
        mean = hidden.sum((0, 2, 3, 4)) / max(count, 1)
        squares = ((hidden - mean[:, None, None, None]) ** 2).sum((0, 2, 3, 4))
        var = squares / max(count, 1)
        if bn.mean is not None and bn.var is not None and count:
            with torch.no_grad():
                # The running variance is the unbiased one, though the batch is normalised by the biased.
                bn.mean.copy_(torch.lerp(wide(bn.mean), mean, bn.momentum))
                bn.var.copy_(torch.lerp(wide(bn.var), squares / (count - 1), bn.momentum))
    else:
        assert bn.mean is not None  # the case of a call holds it to that
        assert bn.var is not None
        mean, var = wide(bn.mean).detach(), wide(bn.var).detach()
    scale = wide(bn.weight) / torch.sqrt(var + bn.eps)
    return (hidden - mean[:, None, None, None]) * scale[:, None, None, None] + wide(bn.bias)[:, None, None, None]
