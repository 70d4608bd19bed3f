"""(2+1)D convolution: its case, inputs and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vidkernels.conv3d.case import positive_triple
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
from vidkernels.shapes import Shape, Triple, conv2plus1d_macs, conv_sizes, mid_channels, tensor_bytes, triple


class BatchNorm(NamedTuple):
    """Batch norm between the two convolutions; every tensor is (M,)."""

    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    """Running mean; training updates it in place where there is one, evaluation needs it. No gradient flows to it."""
    var: Tensor | None
    """Running variance, likewise."""
    eps: float = 1e-5
    momentum: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Conv2plus1dCase(Case):
    """Sizes of one (2+1)D pair. An integer stands for three equal sizes (T, H, W)."""

    in_channels: int = 64
    out_channels: int = 64
    mid_channels: int | None = None
    """None gives the pair as many parameters as the full 3D convolution."""
    clip_length: int = 16
    height: int = 56
    width: int = 56
    kernel_size: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    """H and W stride in the first convolution, T in the second; padding likewise."""
    padding: Triple | None = None
    """None keeps T, H and W at stride 1, for odd kernels."""
    batch_statistics: bool | None = None
    """Normalise by the batch's statistics, not the running ones. None: as `training` says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "in_channels", "out_channels", "clip_length", "height", "width")
        for name in ("kernel_size", "stride"):
            object.__setattr__(self, name, positive_triple(getattr(self, name), name))
        if self.padding is None:
            object.__setattr__(self, "padding", triple(((k - 1) // 2 for k in self.kernel_size), "padding"))
        else:
            object.__setattr__(self, "padding", positive_triple(self.padding, "padding", least=0))
        if self.mid_channels is None:
            mid = mid_channels(self.in_channels, self.out_channels, self.kernel_size)
            object.__setattr__(self, "mid_channels", mid)
        self._at_least(1, "mid_channels")
        if self.batch_statistics is None:
            object.__setattr__(self, "batch_statistics", self.training)
        n, _, t, h, w = self.spatial_shape
        if self.batch_statistics and n * t * h * w == 1:
            raise ValueError("batch statistics need more than 1 value a channel: batch_size·T·H'·W' = 1")

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
    def mid(self) -> int:
        """Channels between the convolutions, M, never None."""
        assert self.mid_channels is not None  # set in __post_init__
        return self.mid_channels

    @property
    def x_shape(self) -> Shape:
        """(N, C_in, T, H, W)."""
        return (self.batch_size, self.in_channels, *self.sizes)

    @property
    def spatial_weight_shape(self) -> Shape:
        """(M, C_in, 1, kH, kW)."""
        return (self.mid, self.in_channels, 1, *self.kernel_size[1:])

    @property
    def temporal_weight_shape(self) -> Shape:
        """(C_out, M, kT, 1, 1)."""
        return (self.out_channels, self.mid, self.kernel_size[0], 1, 1)

    @property
    def y_shape(self) -> Shape:
        """(N, C_out, T', H', W')."""
        out = conv_sizes(self.sizes, self.kernel_size, self.stride, self.pad, (1, 1, 1))
        return (self.batch_size, self.out_channels, *out)

    @property
    def spatial_shape(self) -> Shape:
        """(N, M, T, H', W') between the convolutions."""
        return (self.batch_size, self.mid, self.clip_length, *self.y_shape[3:])

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass."""
        return conv2plus1d_macs(self.spatial_shape, self.y_shape, self.in_channels, self.kernel_size)

    @property
    def bytes_moved(self) -> int:
        """Compulsory bytes of the forward pass; what lies between the convolutions can stay on chip.

        Batch norm has four vectors; with batch statistics the running ones are written, not read.
        """
        weights = (self.spatial_weight_shape, self.temporal_weight_shape, (4, self.mid))
        return tensor_bytes(self.dtype, self.x_shape, *weights, self.y_shape)


def make_inputs(case: Conv2plus1dCase, generator: torch.Generator) -> Inputs:
    """x of unit variance, weights that keep it, and batch norm parameters about those of a trained network."""

    def noise(shape: Shape) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, w_spatial, w_temporal = noise(case.x_shape), noise(case.spatial_weight_shape), noise(case.temporal_weight_shape)
    w_spatial /= w_spatial[0].numel() ** 0.5
    w_temporal /= w_temporal[0].numel() ** 0.5
    weight, var = (0.5 + torch.rand(case.mid, generator=generator) for _ in range(2))
    bias, mean = (0.5 * noise((case.mid,)) for _ in range(2))
    bn = BatchNorm(weight, bias, mean, var)
    parameters = {"stride": case.stride, "padding": case.pad, "training": case.batch_statistics}
    return Inputs((x, w_spatial, bn, w_temporal), parameters)


def case_of(
    x: Tensor,
    w_spatial: Tensor,
    bn: BatchNorm,
    w_temporal: Tensor,
    *,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    training: bool = False,
) -> Conv2plus1dCase:
    """The case of a call.

    Raises:
        ValueError: Ranks, channels or sizes that do not fit, or no running statistics to evaluate with.
    """
    check_tensor("x", x, "N C_in T H W")
    check_tensor("w_spatial", w_spatial, "M C_in 1 kH kW")
    check_tensor("w_temporal", w_temporal, "C_out M kT 1 1")
    n, c, t, h, w = x.shape
    mid, kernel = w_spatial.shape[0], (w_temporal.shape[2], w_spatial.shape[3], w_spatial.shape[4])
    check_tensor("w_spatial", w_spatial, (mid, c, 1, *kernel[1:]))
    check_tensor("w_temporal", w_temporal, (w_temporal.shape[0], mid, kernel[0], 1, 1))
    check_tensor("bn.weight", bn.weight, (mid,))
    check_tensor("bn.bias", bn.bias, (mid,))
    for name, statistic in (("bn.mean", bn.mean), ("bn.var", bn.var)):
        if statistic is not None:
            check_tensor(name, statistic, (mid,))
        elif not training:
            raise ValueError(f"{name} is None: evaluation needs the running statistics")
    if (bn.mean is None) != (bn.var is None):
        raise ValueError("bn.mean and bn.var must both be tensors, or both None")
    return Conv2plus1dCase(
        batch_size=n,
        dtype=dtype_name(x),
        memory_format=memory_format_name(x),
        training=training or wants_gradients(x, w_spatial, bn, w_temporal),
        in_channels=c,
        out_channels=w_temporal.shape[0],
        mid_channels=mid,
        clip_length=t,
        height=h,
        width=w,
        kernel_size=kernel,
        stride=triple(stride, "stride"),
        padding=triple(padding, "padding"),
        batch_statistics=training,
    )


OP = Op(
    name="conv2plus1d",
    case_type=Conv2plus1dCase,
    case_of=case_of,
    make_inputs=make_inputs,
    macs=lambda case: case.macs,
    bytes_moved=lambda case: case.bytes_moved,
    tolerances=RELU_TOLERANCES,
)
