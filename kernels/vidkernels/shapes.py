"""Output sizes, receptive fields, multiply-adds and bytes: pure integers, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

Shape = tuple[int, ...]
Triple = tuple[int, int, int]

ITEM_BYTES = {"fp64": 8, "fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}


def triple(value: int | Iterable[int], name: str) -> Triple:
    """An integer or three of them, for (T, H, W).

    Raises:
        ValueError: Neither.
    """
    sizes = (value, value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Iterable) else ()
    if len(sizes) != 3 or not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"{name}={value!r} is neither an integer nor three of them (T, H, W)")
    return sizes[0], sizes[1], sizes[2]


def conv_size(size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Positions that a convolution yields along one axis.

    Raises:
        ValueError: The dilated kernel is longer than the padded input.
    """
    span = dilation * (kernel - 1) + 1
    padded = size + 2 * padding
    if padded < span:
        raise ValueError(
            f"kernel_size={kernel} with dilation={dilation} spans {span}, more than the padded input's {padded}"
        )
    return (padded - span) // stride + 1


def conv_sizes(sizes: Triple, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple) -> Triple:
    """`conv_size` along T, H and W."""
    t, h, w = map(conv_size, sizes, kernel, stride, padding, dilation)
    return t, h, w


def conv_macs(out_elements: int, in_channels: int, kernel_taps: int, groups: int = 1) -> int:
    """Multiply-adds of a convolution: every tap of every output element, taps on padding included.

    Args:
        out_elements: N · C_out · positions.
        in_channels: C_in, all groups together.
        kernel_taps: kT · kH · kW.
    """
    return out_elements * (in_channels // groups) * kernel_taps


def conv2plus1d_macs(spatial_shape: Shape, y_shape: Shape, in_channels: int, kernel: Triple) -> int:
    """Multiply-adds of a (2+1)D pair: 1×k×k to the mid channels, then k×1×1; batch norm and ReLU are not counted.

    Args:
        spatial_shape: (N, M, T, H', W') between the two.
        y_shape: (N, C_out, T', H', W').
        in_channels: C_in.
        kernel: (kT, kH, kW).
    """
    spatial = conv_macs(prod(spatial_shape), in_channels, kernel[1] * kernel[2])
    return spatial + conv_macs(prod(y_shape), spatial_shape[1], kernel[0])


def tcn_block_macs(frames: int, in_channels: int, out_channels: int, kernel: int, downsample: bool) -> int:
    """Multiply-adds of a TCN residual block: two causal convolutions, and the 1×1 where there is one.

    Args:
        frames: N · T.
        in_channels: C_in.
        out_channels: C_out, of both convolutions.
        kernel: Taps of each.
        downsample: A 1×1 convolution stands on the shortcut.
    """
    macs = conv_macs(frames * out_channels, in_channels, kernel) + conv_macs(
        frames * out_channels, out_channels, kernel
    )
    return macs + (conv_macs(frames * out_channels, in_channels, 1) if downsample else 0)


def recurrent_macs(frames: int, input_features: int, hidden_size: int, gates: int) -> int:
    """Multiply-adds of a recurrent layer's matrix products; products of one element with another are not counted.

    Args:
        frames: N · T.
        input_features: F.
        hidden_size: H.
        gates: 1 for a plain RNN, 4 for an LSTM.
    """
    return frames * gates * hidden_size * (input_features + hidden_size)


def mid_channels(in_channels: int, out_channels: int, kernel: Triple) -> int:
    """Channels between the halves of a (2+1)D pair that give it the parameters of the full 3D convolution.

    M = floor(t·d²·N_in·N_out / (d²·N_in + t·N_out)).

    Source: Tran et al. (2018), arXiv:1711.11248, §3.5.
    """
    t, d2 = kernel[0], kernel[1] * kernel[2]
    return t * d2 * in_channels * out_channels // (d2 * in_channels + t * out_channels)


def tcn_receptive_field(kernel: int, dilations: Iterable[int], convolutions_per_block: int = 2) -> int:
    """Frames that the last output of a stack of causal blocks depends on.

    Source: Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.3, for two convolutions a block.
    """
    return 1 + convolutions_per_block * (kernel - 1) * sum(dilations)


def tensor_bytes(dtype: str, *shapes: Iterable[int]) -> int:
    """Bytes of tensors of these shapes, each counted once."""
    return ITEM_BYTES[dtype] * sum(prod(shape) for shape in shapes)
