"""What torch itself offers: four calls, each of which writes its result, and torch.compile around them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vidkernels.conv2plus1d.case import OP, BatchNorm
from vidkernels.op import compiled
from vidkernels.shapes import Triple, triple


@OP.implementation("library")
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
    """`conv3d`, `batch_norm`, `relu` and `conv3d` of `torch.nn.functional`."""
    s_t, s_h, s_w = triple(stride, "stride")
    p_t, p_h, p_w = triple(padding, "padding")
    hidden = F.conv3d(x, w_spatial, None, (1, s_h, s_w), (0, p_h, p_w))
    # detach() shares the storage: the statistics are updated in place, and no gradient is asked of them.
    mean = None if bn.mean is None else bn.mean.detach()
    var = None if bn.var is None else bn.var.detach()
    hidden = F.batch_norm(hidden, mean, var, bn.weight, bn.bias, training, bn.momentum, bn.eps)
    return F.conv3d(F.relu(hidden, inplace=True), w_temporal, None, (s_t, 1, 1), (p_t, 0, 0))


OP.implementation("compiled", requires=("compiler",))(compiled(conv2plus1d))
