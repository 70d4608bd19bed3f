"""Depthwise 3D convolution in Triton, tap by tap: any kernel, stride and dilation; README.md tells how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, gcd, prod
from typing import Any

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.depthwise_conv3d.autograd import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Ops, only_shapes, three
from vidkernels.depthwise_conv3d.case import OP, DepthwiseConv3dCase
from vidkernels.op import dtype_name
from vidkernels.shapes import Triple, conv_sizes

_MODULE = "depthwise_conv3d.triton_direct_kernels"
_PARTS = 512
"""Partial sums of the weight's gradient, at about which enough programs run."""


def _candidates(positions: int, channels: int) -> Iterator[dict[str, int]]:
    """Tiles by the share of them that is used; narrow ones load short pieces of memory, small ones hide less of it."""
    found: list[tuple[float, int, int, int]] = []
    for block_c, loss in ((64, 1.0), (32, 1.0), (16, 0.9), (8, 0.7)):
        for elements in (2048, 1024):
            block_p = elements // block_c
            used = channels / (ceil(channels / block_c) * block_c) * positions / (ceil(positions / block_p) * block_p)
            found.append((-used * loss * (1.0 if elements == 2048 else 0.8), len(found), block_p, block_c))
    for _, _, block_p, block_c in sorted(found)[:4]:
        yield {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4, "num_stages": 1}


def _config(kind: str, tensor: Tensor, channels: int, form: Sequence[int], clips: int, result: Triple) -> tuning.Config:
    key = tuning.Key(dtype_name(tensor), (channels,), tuple(form), clips * prod(result))
    candidates = list(_candidates(prod(result), channels))
    return tuning.pick(f"depthwise_conv3d/triton_direct/{kind}", key, candidates, launch.gpu_of(tensor))


def _constants(channels: int, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> dict[str, Any]:
    names = {"K": kernel, "S": stride, "D": dilation}
    form = {a + axis: n for a, ns in names.items() for axis, n in zip("THW", ns, strict=True)}
    return {"C": channels, "VECTOR": gcd(channels, 8), **form}


def _gather(
    kind: str,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    result_sizes: Triple,
    form: tuple[Sequence[int], Sequence[int], Sequence[int]],
    activation: str = "none",
) -> Tensor:
    """One launch of `gather` over (N, T, H, W, C)."""
    n, *sizes, c = source.shape
    stride, padding, dilation = form
    kernel = weight.shape[2:]
    result = source.new_empty(n, *result_sizes, c)
    if only_shapes(source):
        return result
    config = dict(_config(kind, source, c, (*kernel, *stride, *dilation), n, result_sizes))
    t, h, w = result_sizes
    grid = n * ceil(t * h * w / config["BLOCK_P"]), ceil(c / config["BLOCK_C"])
    args = source.contiguous(), weight.flatten(1).t().contiguous(), bias, result, *sizes, *result_sizes, *padding
    constants = _constants(c, kernel, stride, dilation)
    constants |= {"TRANSPOSED": kind == "input_gradient", "ACTIVATION": activation}
    launch.triton(f"{_MODULE}:gather", grid, *args, **constants, **config)
    return result


@launch.custom_op("depthwise_conv3d_direct" + FORWARD)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    kernel = three(weight.shape[2:])
    out = conv_sizes(three(x.shape[1:4]), kernel, three(stride), three(padding), three(dilation))
    return _gather("forward", x, weight, bias, out, (stride, padding, dilation), activation)


@launch.custom_op("depthwise_conv3d_direct_input_gradient" + INPUT_GRADIENT)
def _input_gradient(
    gradient: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return _gather("input_gradient", gradient, weight, None, three(sizes), (stride, padding, dilation))


@launch.custom_op("depthwise_conv3d_direct_weight_gradient" + WEIGHT_GRADIENT)
def _weight_gradient(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    bias: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor]:
    gradient = gradient.contiguous()
    n, *sizes, c = x.shape
    weight_gradient = x.new_empty(c, 1, *kernel)
    bias_gradient = gradient.sum((0, 1, 2, 3), dtype=torch.float32).to(x.dtype) if bias else x.new_empty(0)
    if only_shapes(x):
        return weight_gradient, bias_gradient
    out = three(gradient.shape[1:4])
    config = dict(_config("weight_gradient", x, c, (*kernel, *stride, *dilation), n, out))
    width = min(kernel[2], 3)
    tiles = n * ceil(prod(out) / config["BLOCK_P"])
    parts = max(1, min(tiles, _PARTS))
    partial = x.new_empty(parts, prod(kernel), c, dtype=torch.float32)
    grid = parts, kernel[0] * kernel[1] * ceil(kernel[2] / width), ceil(c / config["BLOCK_C"])
    args = x.contiguous(), gradient, partial, n, parts, *sizes, *out, *padding
    constants = _constants(c, kernel, stride, dilation)
    launch.triton(f"{_MODULE}:correlate", grid, *args, **constants, WIDTH=width, **config)
    launch.triton(
        f"{_MODULE}:sum_parts", (ceil(prod(kernel) * c / 32),), partial, weight_gradient, parts,
        C=c, TAPS=prod(kernel), BLOCK_S=32, BLOCK_E=32, num_warps=4, num_stages=1,
    )  # fmt: skip
    return weight_gradient, bias_gradient


_OPS = Ops(_forward, _input_gradient, _weight_gradient)


def _limits(case: DepthwiseConv3dCase) -> str | None:
    if why := launch.dtype_refusal(case, "fp32", "tf32", "fp16", "bf16"):
        return why
    clip = max(prod(case.sizes), prod(case.y_shape[2:])) * case.in_channels
    return "one clip has 2**31 elements or more" if clip >= 2**31 else None


@OP.implementation("triton_direct", requires=("triton",), limits=_limits)
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
    """y = activation(b + Σ taps), (N, C, T', H', W') channels-last; a program for each tile of positions and channels.

    Raises:
        ValueError: dtypes that differ.
    """
    return _OPS(x, weight, bias, stride, padding, dilation, activation)
