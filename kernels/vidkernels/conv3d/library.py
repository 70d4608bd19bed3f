"""What torch itself offers: cuDNN or oneDNN, in the layout of the input, and torch.compile around it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vidkernels.conv3d.case import ACTIVATIONS, OP
from vidkernels.op import compiled
from vidkernels.shapes import Triple


@OP.implementation("library")
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
    """`torch.nn.functional.conv3d`, then the sum and the activation."""
    y = F.conv3d(x, weight, bias, stride, padding, dilation)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


OP.implementation("compiled", requires=("compiler",))(compiled(conv3d))
