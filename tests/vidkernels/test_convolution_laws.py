"""Laws of the 3D convolutions that hold without the reference: dense, depthwise and (2+1)D."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_cases import TYPICAL, implementations
from torch import Tensor

from vidkernels import OPS, BatchNorm, Inputs, conv2plus1d, conv3d

CONVOLUTIONS = [*implementations(OPS["conv3d"]), *implementations(OPS["depthwise_conv3d"])]
PAIRS = implementations(OPS["conv2plus1d"])


def _inputs(op_name: str, name: str, **values: Any) -> Inputs:
    op = OPS[op_name]
    case = op.case({**TYPICAL[op_name], **values}, dtype="fp64")
    if why := op[name].why_not(case, "cpu"):
        pytest.skip(why)
    return op.inputs(case)


def _noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("op_name", "name"), CONVOLUTIONS)
def test_linear_in_x(op_name: str, name: str) -> None:
    inputs, fn = _inputs(op_name, name), OPS[op_name][name].fn
    x, weight, _ = inputs.args
    other = _noise(*x.shape)
    got = fn(2 * x - 3 * other, weight, **inputs.kwargs)
    torch.testing.assert_close(got, 2 * fn(x, weight, **inputs.kwargs) - 3 * fn(other, weight, **inputs.kwargs))


@pytest.mark.parametrize(("op_name", "name"), CONVOLUTIONS)
def test_linear_in_the_weight(op_name: str, name: str) -> None:
    inputs, fn = _inputs(op_name, name), OPS[op_name][name].fn
    x, weight, _ = inputs.args
    other = _noise(*weight.shape)
    got = fn(x, weight + other, **inputs.kwargs)
    torch.testing.assert_close(got, fn(x, weight, **inputs.kwargs) + fn(x, other, **inputs.kwargs))


@pytest.mark.parametrize(("op_name", "name"), CONVOLUTIONS)
def test_shift_equivariance(op_name: str, name: str) -> None:
    """A shifted input yields shifted outputs, away from the border: by one position in each of T, H and W."""
    inputs = _inputs(op_name, name, padding=(0, 0, 0), clip_length=6, height=7, width=8)
    x, weight, _ = inputs.args
    fn = OPS[op_name][name].fn
    whole = fn(x, weight, **inputs.kwargs)
    torch.testing.assert_close(fn(x[:, :, 1:, 1:, 1:], weight, **inputs.kwargs), whole[:, :, 1:, 1:, 1:])


@pytest.mark.parametrize(("op_name", "name"), CONVOLUTIONS)
def test_strided_is_every_other_output(op_name: str, name: str) -> None:
    inputs, fn = _inputs(op_name, name), OPS[op_name][name].fn
    dense = fn(*inputs.args, **inputs.kwargs)
    strided = fn(*inputs.args, **{**inputs.kwargs, "stride": (1, 2, 3)})
    torch.testing.assert_close(strided, dense[:, :, :, ::2, ::3])


@pytest.mark.parametrize(("op_name", "name"), CONVOLUTIONS)
def test_dilation_is_a_kernel_with_zeros_between(op_name: str, name: str) -> None:
    inputs = _inputs(op_name, name, dilation=(2, 1, 3), clip_length=6, width=9)
    x, weight, _ = inputs.args
    stuffed = weight.new_zeros(*weight.shape[:2], 5, 3, 7)
    stuffed[:, :, ::2, :, ::3] = weight
    fn = OPS[op_name][name].fn
    dilated = fn(x, weight, **inputs.kwargs)
    torch.testing.assert_close(fn(x, stuffed, padding=inputs.kwargs["padding"]), dilated)


@pytest.mark.parametrize(("op_name", "name"), CONVOLUTIONS)
def test_bias_is_added_to_every_position(op_name: str, name: str) -> None:
    inputs = _inputs(op_name, name, bias=True)
    x, weight, bias = inputs.args
    fn = OPS[op_name][name].fn
    got = fn(x, weight, bias, **inputs.kwargs) - fn(x, weight, **inputs.kwargs)
    torch.testing.assert_close(got, bias[:, None, None, None].expand_as(got))


@pytest.mark.parametrize(("op_name", "name"), CONVOLUTIONS)
def test_batches_and_channels_of_torch(op_name: str, name: str) -> None:
    """Against torch's convolution; a depthwise one is that of as many groups as channels."""
    inputs = _inputs(op_name, name, stride=(2, 1, 2), dilation=(1, 2, 1), padding=(1, 2, 0), bias=True)
    groups = TYPICAL[op_name]["in_channels"] if op_name == "depthwise_conv3d" else 1
    got = OPS[op_name][name].fn(*inputs.args, **inputs.kwargs)
    torch.testing.assert_close(got, F.conv3d(*inputs.args, **inputs.kwargs, groups=groups))


@pytest.mark.parametrize(("op_name", "name"), implementations(OPS["depthwise_conv3d"]))
def test_depthwise_is_dense_with_a_diagonal(op_name: str, name: str) -> None:
    inputs = _inputs(op_name, name)
    x, weight, _ = inputs.args
    channels = x.shape[1]
    diagonal = weight.new_zeros(channels, channels, *weight.shape[2:])
    diagonal[torch.arange(channels), torch.arange(channels)] = weight[:, 0]
    got = OPS[op_name][name].fn(x, weight, **inputs.kwargs)
    torch.testing.assert_close(got, conv3d(x, diagonal, padding=1))


def test_an_integer_stands_for_three() -> None:
    inputs = _inputs("conv3d", "library")
    x, weight, _ = inputs.args
    for name in ("reference", "library"):
        got = conv3d(x, weight, stride=2, padding=1, dilation=1, implementation=name)
        want = conv3d(x, weight, stride=(2, 2, 2), padding=(1, 1, 1), dilation=(1, 1, 1), implementation=name)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(("op_name", "name"), PAIRS)
def test_pair_is_the_factorised_3d_convolution(op_name: str, name: str) -> None:
    """w[o,c,i,j,k] = Σ_m v[o,m,i] u[m,c,j,k], where batch norm changes nothing and ReLU finds nothing negative."""
    inputs = _inputs(op_name, name, stride=(2, 1, 2))
    x, w_spatial, _, w_temporal = inputs.args
    x, w_spatial = x.abs(), w_spatial.abs()
    mid = w_spatial.shape[0]
    one, zero = torch.ones(mid, dtype=x.dtype), torch.zeros(mid, dtype=x.dtype)
    identity = BatchNorm(one, zero, zero.clone(), one.clone(), eps=0.0)
    got = OPS[op_name][name].fn(x, w_spatial, identity, w_temporal, **inputs.kwargs)
    full = torch.einsum("omi,mcjk->ocijk", w_temporal[..., 0, 0], w_spatial[:, :, 0])
    want = F.conv3d(x, full, None, inputs.kwargs["stride"], inputs.kwargs["padding"])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("op_name", "name"), PAIRS)
def test_pair_is_torch_modules_in_sequence(op_name: str, name: str, training: bool) -> None:
    """Outputs and running statistics."""
    inputs = _inputs(op_name, name, stride=(2, 2, 1), batch_statistics=training)
    x, w_spatial, bn, w_temporal = inputs.args
    first = torch.nn.Conv3d(5, w_spatial.shape[0], (1, 3, 3), (1, 2, 1), (0, 1, 1), bias=False)
    norm = torch.nn.BatchNorm3d(w_spatial.shape[0], eps=1e-3, momentum=0.3)
    second = torch.nn.Conv3d(w_spatial.shape[0], 7, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=False)
    model = torch.nn.Sequential(first, norm, torch.nn.ReLU(), second).double().train(training)
    bn = bn._replace(eps=1e-3, momentum=0.3)
    with torch.no_grad():
        first.weight.copy_(w_spatial)
        second.weight.copy_(w_temporal)
        for parameter, value in zip((norm.weight, norm.bias, norm.running_mean, norm.running_var), bn, strict=False):
            parameter.copy_(value)
        want = model(x)
        got = OPS[op_name][name].fn(x, w_spatial, bn, w_temporal, **inputs.kwargs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(bn.mean, norm.running_mean)
    torch.testing.assert_close(bn.var, norm.running_var)


@pytest.mark.parametrize(("op_name", "name"), PAIRS)
def test_pair_trains_without_running_statistics(op_name: str, name: str) -> None:
    inputs = _inputs(op_name, name, batch_statistics=True)
    x, w_spatial, bn, w_temporal = inputs.args
    fn = OPS[op_name][name].fn
    without = fn(x, w_spatial, bn._replace(mean=None, var=None), w_temporal, **inputs.kwargs)
    torch.testing.assert_close(without, fn(x, w_spatial, bn, w_temporal, **inputs.kwargs))


@pytest.mark.parametrize(("op_name", "name"), PAIRS)
def test_pair_keeps_statistics_of_an_empty_batch(op_name: str, name: str) -> None:
    inputs = _inputs(op_name, name, batch_statistics=True, batch_size=0)
    bn = inputs.args[2]
    before = bn.mean.clone(), bn.var.clone()
    OPS[op_name][name].fn(*inputs.args, **inputs.kwargs)
    torch.testing.assert_close((bn.mean, bn.var), before)


@pytest.mark.parametrize("name", ["reference", "library"])
def test_pair_of_16_bits_keeps_float32_statistics(name: str) -> None:
    op = OPS["conv2plus1d"]
    case = op.case({**TYPICAL["conv2plus1d"], "batch_statistics": True}, dtype="bf16")
    x, w_spatial, bn, w_temporal = op.inputs(case).args
    bn = bn._replace(mean=torch.zeros_like(bn.mean, dtype=torch.float32), var=torch.ones_like(bn.var).float())
    bn = bn._replace(weight=bn.weight.float(), bias=bn.bias.float())
    y = conv2plus1d(x, w_spatial, bn, w_temporal, padding=1, training=True, implementation=name)
    assert y.dtype == torch.bfloat16
    hidden = F.conv3d(x.double(), w_spatial.double(), padding=(0, 1, 1))
    torch.testing.assert_close(bn.mean.double(), 0.1 * hidden.mean((0, 2, 3, 4)), rtol=0.05, atol=1e-3)
    assert bn.mean.dtype == torch.float32
