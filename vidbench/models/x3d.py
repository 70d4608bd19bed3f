"""X3D, a small 2D network expanded one axis at a time, with depthwise convolutions and squeeze-and-excitation.

Source: Feichtenhofer (2020), "X3D: Expanding Architectures for Efficient Video Recognition", arXiv:2004.04730, §3.1 and
table 3. Widths, shortcuts and module names are those of pytorchvideo, so that its published weights fit.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

import torch
from torch import Tensor, nn

from vidbench.models.sizes import scaled

_STAGES = ((24, 3), (48, 5), (96, 11), (192, 7))
"""Channels and blocks of each stage: width 2 and depth 2.2 times those of the 2D network that X3D starts from."""


def _eighths(channels: float) -> int:
    """The multiple of 8 nearest to a channel count, at least 8, at most a tenth below it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


class SqueezeExcitation(nn.Module):
    """Channels weighted by what the whole clip says of them: Hu et al. (2018), arXiv:1709.01507, §3.

    Args:
        channels: C.
        reduced: Channels between the two 1×1×1 convolutions.
    """

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv3d(channels, reduced, 1), nn.ReLU(), nn.Conv3d(reduced, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → the same shape."""
        weights: Tensor = self.block(x.mean(dim=(2, 3, 4), keepdim=True))
        return x * weights


class Bottleneck(nn.Module):
    """1×1×1 to the inner width, depthwise 3×3×3, 1×1×1 back.

    Args:
        in_channels: C of the input.
        inner: Channels of the depthwise convolution.
        channels: C of the output.
        stride: Of the depthwise convolution, in H and W.
        reduced: Channels inside squeeze-and-excitation; 0 for none.
    """

    def __init__(self, in_channels: int, inner: int, channels: int, stride: int, reduced: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv3d(in_channels, inner, 1, bias=False)
        self.norm_a = nn.BatchNorm3d(inner)
        self.act_a = nn.ReLU(inplace=True)
        self.conv_b = nn.Conv3d(inner, inner, 3, (1, stride, stride), 1, groups=inner, bias=False)
        squeeze = SqueezeExcitation(inner, reduced) if reduced else nn.Identity()
        self.norm_b = nn.Sequential(nn.BatchNorm3d(inner), squeeze)
        self.act_b = nn.SiLU(inplace=True)
        self.conv_c = nn.Conv3d(inner, channels, 1, bias=False)
        self.norm_c = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, channels, T, H / stride, W / stride)."""
        x = self.act_a(self.norm_a(self.conv_a(x)))
        x = self.act_b(self.norm_b(self.conv_b(x)))
        out: Tensor = self.norm_c(self.conv_c(x))
        return out


class ResBlock(nn.Module):
    """A bottleneck beside a shortcut; one that keeps the width has no batch norm, as in the published weights."""

    def __init__(self, in_channels: int, inner: int, channels: int, stride: int, reduced: int) -> None:
        super().__init__()
        self.branch1_conv: nn.Conv3d | None = None
        self.branch1_norm: nn.BatchNorm3d | None = None
        if stride != 1 or in_channels != channels:
            self.branch1_conv = nn.Conv3d(in_channels, channels, 1, (1, stride, stride), bias=False)
        if in_channels != channels:
            self.branch1_norm = nn.BatchNorm3d(channels)
        self.branch2 = Bottleneck(in_channels, inner, channels, stride, reduced)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, channels, T, H / stride, W / stride)."""
        shortcut = x if self.branch1_conv is None else self.branch1_conv(x)
        if self.branch1_norm is not None:
            shortcut = self.branch1_norm(shortcut)
        out: Tensor = self.activation(shortcut + self.branch2(x))
        return out


class _Stem(nn.Module):
    """1×3×3 and depthwise 5×1×1. The names are pytorchvideo's: its `conv_t`, which runs first, is the spatial one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        spatial = nn.Conv3d(3, channels, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
        temporal = nn.Conv3d(channels, channels, (5, 1, 1), 1, (2, 0, 0), groups=channels, bias=False)
        self.conv = nn.Sequential(OrderedDict(conv_t=spatial, conv_xy=temporal))
        self.norm = nn.BatchNorm3d(channels)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, rgb: Tensor) -> Tensor:
        out: Tensor = self.activation(self.norm(self.conv(rgb)))
        return out


class _Stage(nn.Module):
    """Blocks, of which every other one has squeeze-and-excitation."""

    def __init__(self, in_channels: int, channels: int, depth: int) -> None:
        super().__init__()
        inner = max(1, int(2.25 * channels))
        reduced = _eighths(inner / 16)
        self.res_blocks = nn.Sequential(
            *(
                ResBlock(
                    in_channels if i == 0 else channels, inner, channels, 2 if i == 0 else 1, 0 if i % 2 else reduced
                )
                for i in range(depth)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.res_blocks(x)
        return out


class _Head(nn.Module):
    """1×1×1, average over the clip, 1×1×1 without batch norm, linear layer."""

    def __init__(self, in_channels: int, inner: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.Sequential(
            OrderedDict(
                pre_conv=nn.Conv3d(in_channels, inner, 1, bias=False),
                pre_norm=nn.BatchNorm3d(inner),
                pre_act=nn.ReLU(inplace=True),
                pool=nn.AdaptiveAvgPool3d(1),
                post_conv=nn.Conv3d(inner, width, 1, bias=False),
                post_act=nn.ReLU(inplace=True),
            )
        )
        self.dropout = nn.Dropout(0.5)
        self.proj = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.proj(self.dropout(torch.flatten(self.pool(x), 1)))
        return logits


class X3D(nn.Module):
    """Stem, four stages, head: arXiv:2004.04730, table 3.

    Args:
        num_classes: Classes told apart.
        width_multiplier: Factor on every channel count.

    The head averages over the whole clip. So does pytorchvideo's at the size that it was built for; on larger frames
    it slides a window of that size and averages the softmax of its positions.
    """

    heads: ClassVar[tuple[str, ...]] = ("blocks.5.proj",)

    def __init__(self, *, num_classes: int = 400, width_multiplier: float = 1.0) -> None:
        super().__init__()
        channels = scaled(24, width_multiplier)
        blocks: list[nn.Module] = [_Stem(channels)]
        for stage_width, depth in _STAGES:
            width = scaled(stage_width, width_multiplier)
            blocks.append(_Stage(channels, width, depth))
            channels = width
        inner = max(1, int(2.25 * channels))
        blocks.append(_Head(channels, inner, scaled(2048, width_multiplier), num_classes))
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes), for any T, H and W."""
        logits: Tensor = self.blocks(rgb)
        return logits


def x3d_s(*, num_classes: int = 400, width_multiplier: float = 1.0) -> X3D:
    """X3D-S: the network of X3D-M on 13 frames of 160×160. arXiv:2004.04730, table 3."""
    return X3D(num_classes=num_classes, width_multiplier=width_multiplier)


def x3d_m(*, num_classes: int = 400, width_multiplier: float = 1.0) -> X3D:
    """X3D-M, on 16 frames of 224×224: arXiv:2004.04730, table 3."""
    return X3D(num_classes=num_classes, width_multiplier=width_multiplier)
