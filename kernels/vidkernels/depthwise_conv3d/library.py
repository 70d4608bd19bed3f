"""What torch itself offers: its own depthwise kernels or cuDNN, by layout, and torch.compile around it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vidkernels.conv3d.case import ACTIVATIONS
from vidkernels.depthwise_conv3d.case import OP
from vidkernels.op import compiled
from vidkernels.shapes import Triple


@OP.implementation("library")
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
    """`torch.nn.functional.conv3d` with a group for every channel, then the activation."""
    return ACTIVATIONS[activation](F.conv3d(x, weight, bias, stride, padding, dilation, groups=x.shape[1]))


OP.implementation("compiled", requires=("compiler",))(compiled(depthwise_conv3d))
