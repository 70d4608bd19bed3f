"""oneDNN's convolution called directly, on a CPU, channels last.

`torch.nn.functional.conv3d` hands a batch of one clip to an im2col product, and only larger ones to oneDNN: called
directly, a 3×3×3 convolution of one clip takes a third to a tenth of the time. Its gradients are the library's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.conv3d.case import ACTIVATIONS, OP
from vidkernels.launch import custom_op, dtype_refusal, pretended
from vidkernels.op import Case
from vidkernels.shapes import Triple, triple


def limits(case: Case) -> str | None:
    """Why oneDNN cannot take a case."""
    return "batch_size=0: oneDNN takes no empty batch" if case.batch_size == 0 else dtype_refusal(case, "fp32")


@custom_op(
    "onednn_conv3d(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor"
)
def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    if pretended(x):
        y = F.conv3d(x, weight, bias, stride, padding, dilation)
        return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last_3d)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    packed: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, 1)
    return packed.contiguous(memory_format=torch.channels_last_3d)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.sizes = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias = None if bias is None else list(bias.shape)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.aten.convolution_backward(g, x, weight, ctx.bias, *ctx.sizes, False, [0, 0, 0], 1, wanted)
    return (*gradients, None, None, None)


_convolution.register_autograd(_gradients, setup_context=_keep)  # type: ignore[attr-defined]


@OP.implementation("onednn", requires=("onednn",), limits=limits)
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
    """`aten::mkldnn_convolution`, then the sum and the activation."""
    sizes = [triple(value, name) for value, name in ((stride, "stride"), (padding, "padding"), (dilation, "dilation"))]
    y = _convolution(x, weight, bias, *sizes)
    return ACTIVATIONS[activation](y if residual is None else y + residual)
