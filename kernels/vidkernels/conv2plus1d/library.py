"""What torch itself offers: four calls, each of which writes its result, and torch.compile around them.

On a CPU, `onednn` is the same with `vidkernels.conv3d.onednn` for its convolutions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from vidkernels.conv2plus1d.case import OP, BatchNorm
from vidkernels.conv3d.onednn import conv3d as onednn_conv3d
from vidkernels.conv3d.onednn import limits as onednn_limits
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
    return _pair(F.conv3d, x, w_spatial, bn, w_temporal, stride, padding, training)


def onednn(
    x: Tensor,
    w_spatial: Tensor,
    bn: BatchNorm,
    w_temporal: Tensor,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    training: bool = False,
) -> Tensor:
    """As `library`, its convolutions by oneDNN at every batch size."""
    return _pair(onednn_conv3d, x, w_spatial, bn, w_temporal, stride, padding, training)


def _pair(
    conv3d: Callable[..., Tensor],
    x: Tensor,
    w_spatial: Tensor,
    bn: BatchNorm,
    w_temporal: Tensor,
    stride: int | Triple,
    padding: int | Triple,
    training: bool,
) -> Tensor:
    s_t, s_h, s_w = triple(stride, "stride")
    p_t, p_h, p_w = triple(padding, "padding")
    hidden = conv3d(x, w_spatial, stride=(1, s_h, s_w), padding=(0, p_h, p_w))
    # detach() shares the storage: the statistics are updated in place, and no gradient is asked of them.
    mean = None if bn.mean is None else bn.mean.detach()
    var = None if bn.var is None else bn.var.detach()
    # The gradient of a channels-last batch norm takes no weight with gaps (torch 2.13: it is silently wrong).
    hidden = F.batch_norm(hidden, mean, var, bn.weight.contiguous(), bn.bias, training, bn.momentum, bn.eps)
    return conv3d(F.relu(hidden, inplace=True), w_temporal, stride=(s_t, 1, 1), padding=(p_t, 0, 0))


OP.implementation("onednn", requires=("onednn",), limits=onednn_limits)(onednn)
OP.implementation("compiled", requires=("compiler",))(compiled(conv2plus1d))
