"""What the custom implementations share: arguments, channels-last layout, and how their three custom ops differentiate.

Each of them is three ops on channels-last tensors (N, T, H, W, C): `forward`, `input_gradient` and `weight_gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vidkernels import launch
from vidkernels.shapes import Triple, triple

FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, str activation) -> Tensor"
)
INPUT_GRADIENT = (
    "(Tensor gradient, Tensor weight, SymInt[] sizes, int[] stride, int[] padding, int[] dilation) -> Tensor"
)
WEIGHT_GRADIENT = (
    "(Tensor gradient, Tensor x, SymInt[] kernel, bool bias, int[] stride, int[] padding, int[] dilation)"
    " -> (Tensor, Tensor)"
)
"""Schemas, less the names. `sizes` are x's (T, H, W); gradients of weight (C, 1, kT, kH, kW) and bias (C), the latter
empty where it is not asked for."""


@dataclass(frozen=True)
class Ops:
    """The custom ops of one implementation."""

    forward: Callable[..., Any]
    input_gradient: Callable[..., Any]
    weight_gradient: Callable[..., Any]

    def __post_init__(self) -> None:
        def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, weight, bias, *ctx.form, ctx.activation = inputs
            ctx.save_for_backward(x, weight, bias, output if ctx.activation == "relu" else None)

        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            x, weight, bias, y = ctx.saved_tensors
            wanted = ctx.needs_input_grad
            gradient = gradient.contiguous()
            if ctx.activation == "relu":
                gradient = torch.where(y > 0, gradient, 0)
            elif ctx.activation == "silu":
                # What stood before the activation is computed again rather than kept: silu follows this convolution
                # in evaluation, where batch norm is folded into the weight.
                gradient = torch.ops.aten.silu_backward(gradient, self.forward(x, weight, bias, *ctx.form, "none"))
            input_gradient = weight_gradient = bias_gradient = None
            if wanted[0]:
                input_gradient = self.input_gradient(gradient, weight, x.shape[1:4], *ctx.form)
            if wanted[1] or wanted[2]:
                found = self.weight_gradient(gradient, x, weight.shape[2:], wanted[2], *ctx.form)
                weight_gradient = found[0] if wanted[1] else None
                bias_gradient = found[1] if wanted[2] else None
            return input_gradient, weight_gradient, bias_gradient, None, None, None, None

        self.forward.register_autograd(backward, setup_context=save)  # type: ignore[attr-defined]

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int | Triple,
        padding: int | Triple,
        dilation: int | Triple,
        activation: str,
    ) -> Tensor:
        """The convolution of (N, C, T, H, W) in any layout; the result is channels-last.

        Raises:
            ValueError: dtypes that differ.
        """
        x, weight, bias = launch.autocast(x, weight, bias)
        if {weight.dtype, x.dtype if bias is None else bias.dtype} != {x.dtype}:
            given = ", ".join(str(t.dtype).removeprefix("torch.") for t in (x, weight, bias) if t is not None)
            raise ValueError(f"x, weight and bias must be of one dtype, not {given}")
        form = triple(stride, "stride"), triple(padding, "padding"), triple(dilation, "dilation")
        rows = x.permute(0, 2, 3, 4, 1).contiguous()
        y: Tensor = self.forward(rows, weight.contiguous(), bias, *form, activation)
        return y.permute(0, 4, 1, 2, 3)


def only_shapes(tensor: Tensor) -> bool:
    """A tensor of torch.compile's: results are allocated, and no launch is configured for sizes that may be symbols."""
    return isinstance(tensor, FakeTensor)


def in_pairs(channels: int, *tensors: Tensor) -> bool:
    """Two channels can be loaded as one word: C is even, and the tensors begin at a word."""
    return channels % 2 == 0 and all(tensor.storage_offset() % 2 == 0 for tensor in tensors)


def three(sizes: Sequence[int]) -> Triple:
    """Sizes along T, H and W out of an op's list."""
    t, h, w = sizes
    return t, h, w
