"""Dense 3D convolution: its case, inputs and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidkernels.op import Case, Inputs, Op, check_tensor, dtype_name, memory_format_name, wants_gradients
from vidkernels.shapes import Shape, Triple, conv_macs, conv_sizes, tensor_bytes, triple

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}
"""What may follow a convolution, by name; silu is X3D's swish (Ramachandran et al. 2017, arXiv:1710.05941)."""


def check_activation(name: str) -> None:
    """That an activation exists.

    Raises:
        ValueError: It does not.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True, kw_only=True)
class ConvolutionCase(Case):
    """Sizes of a 3D convolution, but for its filters. An integer stands for three equal sizes (T, H, W)."""

    in_channels: int = 64
    clip_length: int = 16
    height: int = 56
    width: int = 56
    kernel_size: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    padding: Triple | None = None
    """None keeps T, H and W at stride 1, for odd kernels."""
    dilation: Triple = (1, 1, 1)
    bias: bool = False
    activation: str = "none"
    """Applied last: a name in `ACTIVATIONS`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "in_channels", "clip_length", "height", "width")
        check_activation(self.activation)
        for name in ("kernel_size", "stride", "dilation"):
            object.__setattr__(self, name, positive_triple(getattr(self, name), name))
        if self.padding is None:
            same = (d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True))
            object.__setattr__(self, "padding", triple(same, "padding"))
        else:
            object.__setattr__(self, "padding", positive_triple(self.padding, "padding", least=0))
        conv_sizes(self.sizes, self.kernel_size, self.stride, self.pad, self.dilation)

    @property
    def sizes(self) -> Triple:
        """(T, H, W) of the input."""
        return self.clip_length, self.height, self.width

    @property
    def pad(self) -> Triple:
        """Zeros at either end of (T, H, W), never None."""
        assert self.padding is not None  # set in __post_init__
        return self.padding

    @property
    def x_shape(self) -> Shape:
        """(N, C_in, T, H, W)."""
        return (self.batch_size, self.in_channels, *self.sizes)

    @property
    def weight_shape(self) -> Shape:
        """(C_out, C_in per group, kT, kH, kW)."""
        raise NotImplementedError

    @property
    def y_shape(self) -> Shape:
        """(N, C_out, T', H', W')."""
        out = conv_sizes(self.sizes, self.kernel_size, self.stride, self.pad, self.dilation)
        return (self.batch_size, self.weight_shape[0], *out)

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass."""
        n, c, t, h, w = self.y_shape
        k_t, k_h, k_w = self.kernel_size
        return conv_macs(n * c * t * h * w, self.weight_shape[1], k_t * k_h * k_w)

    @property
    def bytes_moved(self) -> int:
        """Compulsory bytes of the forward pass."""
        bias = (self.weight_shape[0],) if self.bias else (0,)
        return tensor_bytes(self.dtype, self.x_shape, self.weight_shape, bias, self.y_shape)


@dataclass(frozen=True, kw_only=True)
class Conv3dCase(ConvolutionCase):
    """Sizes of one dense 3D convolution. An integer stands for three equal sizes (T, H, W)."""

    out_channels: int = 64
    residual: bool = False
    """A tensor of the output's shape is added before the activation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "out_channels")

    @property
    def weight_shape(self) -> Shape:
        """(C_out, C_in, kT, kH, kW)."""
        return (self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def bytes_moved(self) -> int:
        """Compulsory bytes of the forward pass."""
        return super().bytes_moved + (tensor_bytes(self.dtype, self.y_shape) if self.residual else 0)


def positive_triple(value: int | Triple, name: str, least: int = 1) -> Triple:
    """`triple` of sizes that are at least `least`.

    Raises:
        ValueError: One is not.
    """
    sizes = triple(value, name)
    if min(sizes) < least:
        raise ValueError(f"{name}={value!r} must be at least {least} along T, H and W")
    return sizes


def make_conv_inputs(case: ConvolutionCase, generator: torch.Generator) -> Inputs:
    """x of unit variance, and weights that keep it: std 1/√(taps · C_in per group)."""
    x = torch.randn(case.x_shape, generator=generator)
    weight = torch.randn(case.weight_shape, generator=generator)
    weight /= weight[0].numel() ** 0.5
    bias = torch.randn(case.weight_shape[0], generator=generator) if case.bias else None
    residual = (torch.randn(case.y_shape, generator=generator),) if getattr(case, "residual", False) else ()
    parameters: dict[str, Any] = {"stride": case.stride, "padding": case.pad, "dilation": case.dilation}
    if case.activation != "none":
        parameters["activation"] = case.activation
    return Inputs((x, weight, bias, *residual), parameters)


def case_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
    activation: str = "none",
) -> Conv3dCase:
    """The case of a call.

    Raises:
        ValueError: Ranks, channels or sizes that do not fit.
    """
    check_tensor("x", x, "N C_in T H W")
    check_tensor("weight", weight, "C_out C_in kT kH kW")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} channels and weight takes {weight.shape[1]}")
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],))
    n, c, t, h, w = x.shape
    case = Conv3dCase(
        batch_size=n,
        dtype=dtype_name(x),
        memory_format=memory_format_name(x),
        training=wants_gradients(x, weight, bias, residual),
        in_channels=c,
        out_channels=weight.shape[0],
        clip_length=t,
        height=h,
        width=w,
        kernel_size=triple(weight.shape[2:], "kernel_size"),
        stride=triple(stride, "stride"),
        padding=triple(padding, "padding"),
        dilation=triple(dilation, "dilation"),
        bias=bias is not None,
        activation=activation,
        residual=residual is not None,
    )
    if residual is not None:
        check_tensor("residual", residual, case.y_shape)
    return case


OP = Op(
    name="conv3d",
    case_type=Conv3dCase,
    case_of=case_of,
    make_inputs=make_conv_inputs,
    macs=lambda case: case.macs,
    bytes_moved=lambda case: case.bytes_moved,
)
