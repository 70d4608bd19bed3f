"""Dense 3D convolution as an implicit GEMM: rows are positions, the depth is taps × channels, nothing is unfolded.

Source: Chetlur et al. (2014), arXiv:1410.0759, §3, for the product whose left factor is gathered while it runs.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from vidkernels import launch
from vidkernels.conv3d.case import ACTIVATIONS, OP, Conv3dCase, check_activation
from vidkernels.conv3d.triton_igemm_products import forward, input_gradient
from vidkernels.conv3d.triton_igemm_weights import weight_gradient
from vidkernels.op import wants_gradients
from vidkernels.shapes import Triple, triple

__all__ = ["conv3d", "forward", "input_gradient", "weight_gradient"]


def _limits(case: Conv3dCase) -> str | None:
    if prod(case.weight_shape) >= 2**31:
        return f"{prod(case.weight_shape)} weights: offsets within them are of 32 bits"
    return launch.dtype_refusal(case, "fp32", "tf32", "fp16", "bf16")


@launch.custom_op(
    "conv3d_igemm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, str activation) -> Tensor"
)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
) -> Tensor:
    residual = None if residual is None else residual.contiguous()
    steps, edges, gaps = _triples(stride, padding, dilation)
    return forward(x.contiguous(), weight.contiguous(), bias, residual, steps, edges, gaps, activation)


@launch.custom_op(
    "conv3d_igemm_input_gradient(Tensor g, Tensor weight, SymInt[] x_shape, int[] stride, int[] padding, "
    "int[] dilation) -> Tensor"
)
def _input_gradient(
    g: Tensor, weight: Tensor, x_shape: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    g, weight = g.contiguous(), weight.contiguous()
    return input_gradient(g, weight, tuple(x_shape), *_triples(stride, padding, dilation))


@launch.custom_op(
    "conv3d_igemm_weight_gradient(Tensor x, Tensor g, SymInt[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation) -> Tensor"
)
def _weight_gradient(
    x: Tensor, g: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    return weight_gradient(x.contiguous(), g.contiguous(), *_triples(kernel_size, stride, padding, dilation))


def _triples(*values: list[int]) -> Any:
    """Of sizes that may be symbols: they are not looked at."""
    return tuple(tuple(value) for value in values)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, *ctx.geometry, activation = inputs
    if residual is not None or activation != "none":
        raise ValueError("conv3d_igemm has no gradient through a residual or an activation: apply them after it")
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad[:3]
    gx = gw = gb = None
    if wanted_x:
        gx = _input_gradient(g, weight, x.shape, *ctx.geometry)
    if wanted_weight:
        gw = _weight_gradient(x, g, weight.shape[1:4], *ctx.geometry)
    if wanted_bias:
        gb = g.sum((0, 1, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)
    return gx, gw, gb, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_keep)  # type: ignore[attr-defined]


@OP.implementation("triton_igemm", requires=("triton",), limits=_limits)
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
    """activation(x ∗ weight + bias + residual), in one kernel where no gradient is wanted.

    Args:
        x: Clips, (N, C_in, T, H, W), in any strides; channels_last_3d is taken without a copy.
        weight: Filters, (C_out, C_in, kT, kH, kW); likewise.
        bias: (C_out,).
        residual: Of the result's shape, added before the activation.
        stride, padding, dilation: Of (T, H, W).
        activation: A name in `ACTIVATIONS`.

    Returns:
        (N, C_out, T', H', W') in channels_last_3d, dtype of x.

    Raises:
        ValueError: The dtypes of x and weight differ, an unknown activation, or sizes that do not fit.
    """
    check_activation(activation)
    x, weight, bias, residual = launch.autocast(x, weight, bias, residual)
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: they must be of one dtype")
    rows = x.permute(0, 2, 3, 4, 1).contiguous()
    filters = weight.permute(0, 2, 3, 4, 1).contiguous()
    geometry = triple(stride, "stride"), triple(padding, "padding"), triple(dilation, "dilation")
    if wants_gradients(x, weight, bias, residual):
        y: Tensor = _forward(rows, filters, bias, None, *geometry, "none").permute(0, 4, 1, 2, 3)
        return ACTIVATIONS[activation](y if residual is None else y + residual)
    added = None if residual is None else residual.permute(0, 2, 3, 4, 1).contiguous()
    fused: Tensor = _forward(rows, filters, bias, added, *geometry, activation)
    return fused.permute(0, 4, 1, 2, 3)
