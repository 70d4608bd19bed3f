"""Depthwise 3D convolution: its case, inputs and costs, which are those of a dense one with one channel a group."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vidkernels.conv3d.case import ConvolutionCase, make_conv_inputs
from vidkernels.op import Op, check_tensor, dtype_name, memory_format_name, wants_gradients
from vidkernels.shapes import Shape, Triple, triple


@dataclass(frozen=True, kw_only=True)
class DepthwiseConv3dCase(ConvolutionCase):
    """Sizes of one depthwise 3D convolution: as many channels out as in."""

    @property
    def weight_shape(self) -> Shape:
        """(C, 1, kT, kH, kW)."""
        return (self.in_channels, 1, *self.kernel_size)


def case_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
    activation: str = "none",
) -> DepthwiseConv3dCase:
    """The case of a call.

    Raises:
        ValueError: Ranks, channels or sizes that do not fit.
    """
    check_tensor("x", x, "N C T H W")
    check_tensor("weight", weight, "C 1 kT kH kW")
    n, c, t, h, w = x.shape
    if tuple(weight.shape[:2]) != (c, 1):
        raise ValueError(f"weight must be ({c}, 1, kT, kH, kW) for x of {c} channels, not {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, (c,))
    return DepthwiseConv3dCase(
        batch_size=n,
        dtype=dtype_name(x),
        memory_format=memory_format_name(x),
        training=wants_gradients(x, weight, bias),
        in_channels=c,
        clip_length=t,
        height=h,
        width=w,
        kernel_size=triple(weight.shape[2:], "kernel_size"),
        stride=triple(stride, "stride"),
        padding=triple(padding, "padding"),
        dilation=triple(dilation, "dilation"),
        bias=bias is not None,
        activation=activation,
    )


OP = Op(
    name="depthwise_conv3d",
    case_type=DepthwiseConv3dCase,
    case_of=case_of,
    make_inputs=make_conv_inputs,
    macs=lambda case: case.macs,
    bytes_moved=lambda case: case.bytes_moved,
)
