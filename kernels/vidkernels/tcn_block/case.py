"""TCN residual block: its case, inputs and costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vidkernels.op import (
    RELU_TOLERANCES,
    Case,
    Inputs,
    Op,
    check_tensor,
    dtype_name,
    memory_format_name,
    wants_gradients,
)
from vidkernels.shapes import Shape, tcn_block_macs, tensor_bytes


class WeightNorm(NamedTuple):
    """Filters as length and direction: w = g · v / ‖v‖, a norm for every output channel.

    Source: Salimans & Kingma (2016), arXiv:1602.07868, §2, equation 2.
    """

    g: Tensor
    """(C_out, 1, 1)."""
    v: Tensor
    """(C_out, C_in, K)."""


class TcnState(NamedTuple):
    """What a block remembers between frames: the last (K−1)·d frames that each convolution has met."""

    x: Tensor
    """(N, C_in, (K−1)·d)."""
    hidden: Tensor
    """(N, C_out, (K−1)·d)."""


@dataclass(frozen=True, kw_only=True)
class TcnBlockCase(Case):
    """Sizes of one residual block. `channels_last` stores the features as (N, T, C)."""

    in_channels: int = 64
    out_channels: int = 64
    clip_length: int = 256
    kernel_size: int = 3
    dilation: int = 1
    bias: bool = True
    dropout_p: float = 0.0
    """Acts where the case trains."""
    weight_norm: bool = True
    """The filters come as `WeightNorm`, not as one tensor."""
    downsample: bool | None = None
    """A 1×1 convolution stands on the shortcut. None: where the widths differ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "in_channels", "out_channels", "clip_length", "kernel_size", "dilation")
        if not 0 <= self.dropout_p < 1:
            raise ValueError(f"dropout_p={self.dropout_p!r} is not in [0, 1)")
        if self.downsample is None:
            object.__setattr__(self, "downsample", self.in_channels != self.out_channels)
        if not self.downsample and self.in_channels != self.out_channels:
            raise ValueError(
                f"in_channels={self.in_channels} and out_channels={self.out_channels} differ: the shortcut needs w_down"
            )

    def without_randomness(self) -> TcnBlockCase:
        """The case without dropout."""
        return replace(self, dropout_p=0.0)

    @property
    def x_shape(self) -> Shape:
        """(N, C_in, T)."""
        return (self.batch_size, self.in_channels, self.clip_length)

    @property
    def weight_shapes(self) -> tuple[Shape, Shape]:
        """(C_out, C_in, K) and (C_out, C_out, K)."""
        out, taps = self.out_channels, self.kernel_size
        return (out, self.in_channels, taps), (out, out, taps)

    @property
    def y_shape(self) -> Shape:
        """(N, C_out, T)."""
        return (self.batch_size, self.out_channels, self.clip_length)

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass; weight norm is not counted."""
        frames = self.batch_size * self.clip_length
        return tcn_block_macs(frames, self.in_channels, self.out_channels, self.kernel_size, bool(self.downsample))

    @property
    def bytes_moved(self) -> int:
        """Compulsory bytes of the forward pass; what lies between the convolutions can stay on chip."""
        out = self.out_channels
        vectors = 2 * self.bias + 2 * self.weight_norm + bool(self.bias and self.downsample)
        down = (out, self.in_channels) if self.downsample else (0,)
        return tensor_bytes(self.dtype, self.x_shape, *self.weight_shapes, (vectors, out), down, self.y_shape)


def make_inputs(case: TcnBlockCase, generator: torch.Generator) -> Inputs:
    """x of unit variance, and filters that keep it through a ReLU: ‖w‖² about 2 for every output channel."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def filters(shape: Shape) -> Tensor | WeightNorm:
        v = noise(*shape)
        if case.weight_norm:
            return WeightNorm(1 + torch.rand(shape[0], 1, 1, generator=generator), v / v[0].numel() ** 0.5)
        return v * math.sqrt(2 / v[0].numel())

    def bias() -> Tensor | None:
        return 0.5 * noise(case.out_channels) if case.bias else None

    x = noise(*case.x_shape)
    w1, b1, w2, b2 = filters(case.weight_shapes[0]), bias(), filters(case.weight_shapes[1]), bias()
    w_down = noise(case.out_channels, case.in_channels, 1) / case.in_channels**0.5 if case.downsample else None
    b_down = bias() if case.downsample else None
    parameters = {"dilation": case.dilation, "dropout_p": case.dropout_p, "training": case.training}
    return Inputs((x, w1, b1, w2, b2, w_down, b_down), parameters)


def case_of(
    x: Tensor,
    w1: Tensor | WeightNorm,
    b1: Tensor | None,
    w2: Tensor | WeightNorm,
    b2: Tensor | None,
    w_down: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    dilation: int,
    dropout_p: float = 0.0,
    training: bool = False,
) -> TcnBlockCase:
    """The case of a call.

    Raises:
        ValueError: Ranks, channels or sizes that do not fit, or widths that differ without `w_down`.
    """
    check_tensor("x", x, "N C_in T")
    n, c, t = x.shape
    v1, v2 = (w.v if isinstance(w, WeightNorm) else w for w in (w1, w2))
    check_tensor("w1", v1, "C_out C_in K")
    out, _, taps = v1.shape
    if v1.shape[1] != c:
        raise ValueError(f"x has {c} channels and w1 takes {v1.shape[1]}")
    check_tensor("w2", v2, (out, out, taps))
    for name, w in (("w1", w1), ("w2", w2)):
        if isinstance(w, WeightNorm):
            check_tensor(f"{name}.g", w.g, (out, 1, 1))
    for name, bias in (("b1", b1), ("b2", b2), ("b_down", b_down)):
        if bias is not None:
            check_tensor(name, bias, (out,))
    if w_down is not None:
        check_tensor("w_down", w_down, (out, c, 1))
    elif b_down is not None:
        raise ValueError("b_down is given without w_down")
    return TcnBlockCase(
        batch_size=n,
        dtype=dtype_name(x),
        memory_format=memory_format_name(x),
        training=training or wants_gradients(x, w1, b1, w2, b2, w_down, b_down),
        in_channels=c,
        out_channels=out,
        clip_length=t,
        kernel_size=taps,
        dilation=dilation,
        bias=any(bias is not None for bias in (b1, b2, b_down)),
        dropout_p=dropout_p if training else 0.0,
        weight_norm=isinstance(w1, WeightNorm) or isinstance(w2, WeightNorm),
        downsample=w_down is not None,
    )


OP = Op(
    name="tcn_block",
    case_type=TcnBlockCase,
    case_of=case_of,
    make_inputs=make_inputs,
    macs=lambda case: case.macs,
    bytes_moved=lambda case: case.bytes_moved,
    tolerances=RELU_TOLERANCES,
)
