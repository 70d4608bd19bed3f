"""Causal dilated 1-D convolution: its case, inputs and costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidkernels.op import Case, Inputs, Op, check_tensor, dtype_name, memory_format_name, wants_gradients
from vidkernels.shapes import Shape, conv_macs, tensor_bytes


@dataclass(frozen=True, kw_only=True)
class CausalConv1dCase(Case):
    """Sizes of one causal convolution. `channels_last` stores the features as (N, T, C)."""

    in_channels: int = 64
    out_channels: int = 64
    clip_length: int = 256
    kernel_size: int = 3
    dilation: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "in_channels", "out_channels", "clip_length", "kernel_size", "dilation")

    @property
    def x_shape(self) -> Shape:
        """(N, C_in, T)."""
        return (self.batch_size, self.in_channels, self.clip_length)

    @property
    def weight_shape(self) -> Shape:
        """(C_out, C_in, K)."""
        return (self.out_channels, self.in_channels, self.kernel_size)

    @property
    def y_shape(self) -> Shape:
        """(N, C_out, T)."""
        return (self.batch_size, self.out_channels, self.clip_length)

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass."""
        return conv_macs(self.batch_size * self.out_channels * self.clip_length, self.in_channels, self.kernel_size)

    @property
    def bytes_moved(self) -> int:
        """Compulsory bytes of the forward pass."""
        bias = (self.out_channels,) if self.bias else (0,)
        return tensor_bytes(self.dtype, self.x_shape, self.weight_shape, bias, self.y_shape)


def make_inputs(case: CausalConv1dCase, generator: torch.Generator) -> Inputs:
    """x of unit variance, and weights that keep it: std 1/√(K · C_in)."""
    x = torch.randn(case.x_shape, generator=generator)
    weight = torch.randn(case.weight_shape, generator=generator) / (case.kernel_size * case.in_channels) ** 0.5
    bias = torch.randn(case.out_channels, generator=generator) if case.bias else None
    return Inputs((x, weight, bias), {"dilation": case.dilation})


def case_of(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dilation: int = 1) -> CausalConv1dCase:
    """The case of a call.

    Raises:
        ValueError: Ranks, channels or sizes that do not fit.
    """
    check_tensor("x", x, "N C_in T")
    check_tensor("weight", weight, "C_out C_in K")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} channels and weight takes {weight.shape[1]}")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],))
    n, c, t = x.shape
    return CausalConv1dCase(
        batch_size=n,
        dtype=dtype_name(x),
        memory_format=memory_format_name(x),
        training=wants_gradients(x, weight, bias),
        in_channels=c,
        out_channels=weight.shape[0],
        clip_length=t,
        kernel_size=weight.shape[2],
        dilation=dilation,
        bias=bias is not None,
    )


OP = Op(
    name="causal_conv1d",
    case_type=CausalConv1dCase,
    case_of=case_of,
    make_inputs=make_inputs,
    macs=lambda case: case.macs,
    bytes_moved=lambda case: case.bytes_moved,
)
