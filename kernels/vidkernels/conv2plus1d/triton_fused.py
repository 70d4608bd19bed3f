"""The (2+1)D pair with its batch norm and ReLU inside the two convolutions.

Evaluation folds batch norm into the spatial filters. With batch statistics the spatial convolution also yields the
statistics of its tiles, and the temporal one normalises and rectifies what it loads: nothing is read or written for
batch norm and ReLU alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.conv2plus1d import triton_fused_gradients as gradients
from vidkernels.conv2plus1d import triton_fused_launches as kernels
from vidkernels.conv2plus1d.case import OP, BatchNorm, Conv2plus1dCase
from vidkernels.conv2plus1d.triton_fused_tiles import Pair, onchip_tiles
from vidkernels.conv3d import triton_igemm
from vidkernels.op import wants_gradients
from vidkernels.shapes import Triple, triple


def _limits(case: Conv2plus1dCase) -> str | None:
    return launch.dtype_refusal(case, "fp32", "tf32", "fp16", "bf16")


@launch.custom_op(
    "conv2plus1d_evaluation(Tensor x, Tensor w_spatial, Tensor bn_weight, Tensor bn_bias, Tensor mean, Tensor var, "
    "Tensor w_temporal, float eps, int[] stride, int[] padding) -> Tensor"
)
def _evaluation(
    x: Tensor,
    w_spatial: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    mean: Tensor,
    var: Tensor,
    w_temporal: Tensor,
    eps: float,
    stride: list[int],
    padding: list[int],
) -> Tensor:
    pair = Pair.of(x, w_spatial, w_temporal, stride, padding)
    packed, shift = kernels.fold(w_spatial, (bn_weight, bn_bias, mean, var), eps, pair)
    temporal = kernels.pack_temporal(w_temporal, pair)
    gpu = launch.gpu_of(x)
    # One kernel or two: {} stands for two, each with a configuration of its own.
    config = tuning.pick("conv2plus1d/triton_fused/onchip", pair.key(x), [{}, *onchip_tiles(x, pair, gpu)], gpu)
    if config:
        return kernels.onchip(x, packed, shift, temporal, pair, config)
    mid, _ = kernels.spatial(x, packed, shift, pair, moments=False)
    return kernels.temporal(mid, temporal, None, pair)


@launch.custom_op(
    "conv2plus1d_forward(Tensor x, Tensor w_spatial, Tensor bn_weight, Tensor bn_bias, Tensor? mean, Tensor? var, "
    "Tensor w_temporal, float eps, int[] stride, int[] padding) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _forward(
    x: Tensor,
    w_spatial: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    w_temporal: Tensor,
    eps: float,
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and for the gradients raw and batch norm's parts; last, mean and unbiased variance of the batch."""
    pair = Pair.of(x, w_spatial, w_temporal, stride, padding)
    packed = kernels.pack_spatial(w_spatial, pair)
    raw, parts = kernels.spatial(x, packed, None, pair, moments=mean is None)
    if mean is None or var is None:
        assert parts is not None
        affine, statistics = kernels.batch_normalisation(parts, bn_weight, bn_bias, eps, pair)
    else:
        affine = kernels.frozen_normalisation((bn_weight, bn_bias, mean, var), eps, pair)
        statistics = bn_weight.new_empty((2, 0))
    y = kernels.temporal(raw, kernels.pack_temporal(w_temporal, pair), affine, pair)
    return y, raw, affine, statistics


@launch.custom_op(
    "conv2plus1d_backward(Tensor g, Tensor x, Tensor raw, Tensor affine, Tensor w_spatial, Tensor w_temporal, "
    "bool batch_statistics, int[] stride, int[] padding, bool[] wanted) -> Tensor[]"
)
def _backward(
    g: Tensor,
    x: Tensor,
    raw: Tensor,
    affine: Tensor,
    w_spatial: Tensor,
    w_temporal: Tensor,
    batch_statistics: bool,
    stride: list[int],
    padding: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    """Those gradients of x, w_spatial, batch norm's (weight, bias) as (2, M), and w_temporal that are wanted."""
    pair = Pair.of(x, w_spatial, w_temporal, stride, padding)
    g = g.contiguous()
    wants_x, wants_spatial, wants_normalisation, wants_temporal = wanted
    found: list[Tensor] = []
    if wants_x or wants_spatial or wants_normalisation:
        packed = kernels.pack_temporal(w_temporal, pair)
        gz, parts = gradients.hidden_gradient(g, packed, raw, affine, pair)
        normalisation, coefficients = gradients.normalisation_gradient(
            parts, affine, pair, batch_statistics=batch_statistics
        )
        spatial = (1, *pair.stride[1:]), (0, *pair.padding[1:]), (1, 1, 1)
        if wants_x or wants_spatial:
            gradients.raw_gradient_(gz, raw, affine, coefficients, pair)
        if wants_x:
            packed = kernels.pack_spatial(w_spatial, pair)
            found.append(triton_igemm.input_gradient(gz, packed, (pair.clips, *pair.sizes, pair.channels), *spatial))
        if wants_spatial:
            gw = triton_igemm.weight_gradient(x, gz, (1, *pair.kernel[1:]), *spatial)
            found.append(gw[: pair.filters].permute(0, 4, 1, 2, 3).contiguous())
        if wants_normalisation:
            found.append(normalisation)
    if wants_temporal:
        found.append(gradients.temporal_weight_gradient(raw, g, affine, pair))
    return found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_spatial, _, _, mean, _, w_temporal, _, *ctx.geometry = inputs
    _, raw, affine, statistics = output
    ctx.batch_statistics = mean is None
    ctx.mark_non_differentiable(raw, affine, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_spatial, w_temporal, raw, affine)


def _differentiate(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 10
    x, w_spatial, w_temporal, raw, affine = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2] or needs[3], needs[6]]
    found = iter(_backward(g, x, raw, affine, w_spatial, w_temporal, ctx.batch_statistics, *ctx.geometry, wanted))
    gx, gw_spatial, normalisation, gw_temporal = (next(found) if want else None for want in wanted)
    gamma, beta = (None, None) if normalisation is None else normalisation.unbind()
    return gx, gw_spatial, gamma, beta, None, None, gw_temporal, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)  # type: ignore[attr-defined]


@OP.implementation("triton_fused", requires=("triton",), limits=_limits)
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
    """y = w_temporal ∗ relu(bn(w_spatial ∗ x)) in two kernels.

    Args:
        x: Clips, (N, C_in, T, H, W), in any strides; channels_last_3d is taken without a copy.
        w_spatial: Filters, (M, C_in, 1, kH, kW).
        bn: Batch norm of the M mid channels, in any dtype, taken as float32.
        w_temporal: Filters, (C_out, M, kT, 1, 1).
        stride, padding: Of (T, H, W).
        training: Normalise by the batch's statistics and update the running ones in place.

    Returns:
        (N, C_out, T', H', W') in channels_last_3d, dtype of x.

    Raises:
        ValueError: The dtypes of x and the filters differ.

    Source: Tran et al. (2018), arXiv:1711.11248, §3.5; Ioffe & Szegedy (2015), arXiv:1502.03167, §3.
    """
    x, w_spatial, w_temporal = launch.autocast(x, w_spatial, w_temporal)
    if not x.dtype == w_spatial.dtype == w_temporal.dtype:
        raise ValueError(
            f"x is {x.dtype}, w_spatial {w_spatial.dtype} and w_temporal {w_temporal.dtype}: they must be of one dtype"
        )
    geometry = list(triple(stride, "stride")), list(triple(padding, "padding"))
    rows = x.permute(0, 2, 3, 4, 1).contiguous()
    filters = w_spatial.contiguous(), w_temporal.contiguous()
    weight, bias = bn.weight.float().contiguous(), bn.bias.float().contiguous()
    mean = var = None
    if not training:
        assert bn.mean is not None  # the case of a call holds it to that
        assert bn.var is not None
        mean, var = bn.mean.detach().float().contiguous(), bn.var.detach().float().contiguous()
        if not wants_gradients(x, w_spatial, bn, w_temporal):
            y: Tensor = _evaluation(rows, filters[0], weight, bias, mean, var, filters[1], bn.eps, *geometry)
            return y.permute(0, 4, 1, 2, 3)
    y, _, _, statistics = _forward(rows, filters[0], weight, bias, mean, var, filters[1], bn.eps, *geometry)
    if training and bn.mean is not None and bn.var is not None and y.numel():
        with torch.no_grad():
            for running, found in ((bn.mean, statistics[0]), (bn.var, statistics[1])):
                running.copy_(torch.lerp(running.float(), found, bn.momentum))
    return y.permute(0, 4, 1, 2, 3)
