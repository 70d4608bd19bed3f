"""One matrix product: filters that neither overlap nor reach beyond the edge, 1×1×1 above all.

Along every axis the kernel has one tap, or as many as the stride: no input is read by two outputs, so the patches are
a view of the input, and all the positions are the rows of one product with the filters.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels.conv3d.case import ACTIVATIONS, OP, Conv3dCase
from vidkernels.launch import autocast
from vidkernels.shapes import Triple, conv_sizes, triple


def _limits(case: Conv3dCase) -> str | None:
    if any(case.pad):
        return f"padding={case.pad}: it takes 0 alone"
    for k, s, d in zip(case.kernel_size, case.stride, case.dilation, strict=True):
        if k > 1 and (k != s or d > 1):
            return (
                f"kernel_size={case.kernel_size}, stride={case.stride}, dilation={case.dilation}: along every axis the "
                "kernel must have one tap, or as many as the stride at dilation 1"
            )
    if case.dtype == "fp32" and torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32:
        return "dtype=fp32: torch.backends.cuda.matmul.allow_tf32 rounds its products"
    return None


@OP.implementation("matmul", limits=_limits)
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
    """`torch.nn.functional.linear` of the patches, then the sum and the activation.

    float32 products are rounded as `torch.backends.cuda.matmul` says, not as cuDNN's switch.

    Args:
        x: Features, (N, C_in, T, H, W); nothing is copied where they are channels_last_3d and the kernel is 1×1×1.
        weight: Filters, (C_out, C_in, kT, kH, kW).
        bias: (C_out,), or None.
        residual: (N, C_out, T', H', W'), or None.
        stride: Between outputs; along every axis the kernel's size, or anything where that is 1.
        padding: 0.
        dilation: 1, or anything where the kernel's size is 1.
        activation: Applied last.

    Returns:
        (N, C_out, T', H', W') in channels_last_3d.
    """
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    n, c = x.shape[:2]
    kernel = triple(weight.shape[2:], "kernel_size")
    step = triple(stride, "stride")
    out = conv_sizes(triple(x.shape[2:], "x"), kernel, step, triple(padding, "padding"), triple(dilation, "dilation"))
    # Rows and columns that no patch covers are cut off; between taps of one, others are left out.
    used = tuple(
        slice(0, size * k) if k > 1 else slice(0, (size - 1) * s + 1, s)
        for size, k, s in zip(out, kernel, step, strict=True)
    )
    patches = x.permute(0, 2, 3, 4, 1)[:, used[0], used[1], used[2]]
    (t, h, w), (k_t, k_h, k_w) = out, kernel
    patches = patches.reshape(n, t, k_t, h, k_h, w, k_w, c).permute(0, 1, 3, 5, 2, 4, 6, 7)
    rows = patches.reshape(n * t * h * w, prod(kernel) * c)
    filters = weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], prod(kernel) * c)
    y = F.linear(rows, filters, bias).view(n, t, h, w, weight.shape[0])
    y = y if residual is None else y + residual.permute(0, 2, 3, 4, 1)
    return ACTIVATIONS[activation](y).permute(0, 4, 1, 2, 3)
