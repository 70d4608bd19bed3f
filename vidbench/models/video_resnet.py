"""R3D, MC3 and R(2+1)D: one residual network of 18 or 34 layers, three kinds of convolution.

Source: Tran et al. (2018), "A Closer Look at Spatiotemporal Convolutions for Action Recognition", arXiv:1711.11248.
Module names are torchvision's, so that its published weights fit.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from vidbench.models.sizes import scaled
from vidkernels import shapes

Kind = Literal["3d", "2d", "2plus1d"]
"""3×3×3; 1×3×3; 1×3×3 and 3×1×1 with batch norm and ReLU between."""

MidChannels = Literal["per_convolution", "per_block"]
"""Where the middle width M of a (2+1)D pair comes from: from the widths of the pair itself, as in the paper and its
authors' code, or from those of the block's first pair for both, as in torchvision. They differ where a block widens."""


def _conv(kind: Kind, in_channels: int, channels: int, middle: int, stride: int) -> nn.Module:
    if kind == "3d":
        return nn.Conv3d(in_channels, channels, 3, stride, 1, bias=False)
    if kind == "2d":
        return nn.Conv3d(in_channels, channels, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
    return nn.Sequential(
        nn.Conv3d(in_channels, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
    )


class BasicBlock(nn.Module):
    """Two convolutions of a kind beside a shortcut: arXiv:1711.11248, §3."""

    def __init__(
        self, kind: Kind, in_channels: int, channels: int, stride: int, middle: MidChannels = "per_block"
    ) -> None:
        super().__init__()
        first = shapes.mid_channels(in_channels, channels, (3, 3, 3))
        second = first if middle == "per_block" else shapes.mid_channels(channels, channels, (3, 3, 3))
        self.conv1 = nn.Sequential(
            _conv(kind, in_channels, channels, first, stride), nn.BatchNorm3d(channels), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(_conv(kind, channels, channels, second, 1), nn.BatchNorm3d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            strides = (1 if kind == "2d" else stride, stride, stride)
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, channels, 1, strides, bias=False), nn.BatchNorm3d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, channels, T / stride, H / stride, W / stride); T stays in a 2D block."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.conv2(self.conv1(x)) + shortcut)
        return out


class VideoResNet(nn.Module):
    """Stem, four stages of blocks, global average pool, linear layer: arXiv:1711.11248, table 1.

    Args:
        kinds: Of the convolutions in each stage.
        factored_stem: Whether the stem is a 1×7×7 convolution to 45 channels and a 3×1×1 one.
        blocks: Blocks in each stage: (2, 2, 2, 2) of 18 layers, (3, 4, 6, 3) of 34.
        mid_channels: Where the middle width of a (2+1)D pair comes from.
        num_classes: Classes told apart.
        width_multiplier: Factor on every channel count.
    """

    heads: ClassVar[tuple[str, ...]] = ("fc",)

    def __init__(
        self,
        kinds: tuple[Kind, Kind, Kind, Kind],
        *,
        factored_stem: bool = False,
        blocks: tuple[int, int, int, int] = (2, 2, 2, 2),
        mid_channels: MidChannels = "per_block",
        num_classes: int = 400,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        if mid_channels not in get_args(MidChannels):
            raise ValueError(f"mid_channels={mid_channels!r} is neither per_convolution nor per_block")
        widths = tuple(scaled(c, width_multiplier) for c in (64, 128, 256, 512))
        if factored_stem:
            middle = scaled(45, width_multiplier)
            self.stem = nn.Sequential(
                nn.Conv3d(3, middle, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
                nn.BatchNorm3d(middle),
                nn.ReLU(inplace=True),
                nn.Conv3d(middle, widths[0], (3, 1, 1), 1, (1, 0, 0), bias=False),
                nn.BatchNorm3d(widths[0]),
                nn.ReLU(inplace=True),
            )
        else:
            self.stem = nn.Sequential(
                nn.Conv3d(3, widths[0], (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
                nn.BatchNorm3d(widths[0]),
                nn.ReLU(inplace=True),
            )
        channels, stages = widths[0], []
        for i, (kind, width, depth) in enumerate(zip(kinds, widths, blocks, strict=True)):
            stage = [BasicBlock(kind, channels, width, 1 if i == 0 else 2, mid_channels)]
            stage += [BasicBlock(kind, width, width, 1, mid_channels) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*stage))
            channels = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes), for any T, H and W."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(rgb)))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


_34 = (3, 4, 6, 3)
"""Blocks in each stage of 34 layers: arXiv:1711.11248, table 1."""


def r3d_18(*, num_classes: int = 400, width_multiplier: float = 1.0) -> VideoResNet:
    """R3D-18, 3D convolutions throughout: arXiv:1711.11248, §3.2."""
    return VideoResNet(("3d",) * 4, num_classes=num_classes, width_multiplier=width_multiplier)


def r3d_34(*, num_classes: int = 400, width_multiplier: float = 1.0) -> VideoResNet:
    """R3D-34: arXiv:1711.11248, §3.2 and table 1."""
    return VideoResNet(("3d",) * 4, blocks=_34, num_classes=num_classes, width_multiplier=width_multiplier)


def mc3_18(*, num_classes: int = 400, width_multiplier: float = 1.0) -> VideoResNet:
    """MC3-18, 3D convolutions in the stem and the first stage, 2D ones after: arXiv:1711.11248, §3.4."""
    return VideoResNet(("3d", "2d", "2d", "2d"), num_classes=num_classes, width_multiplier=width_multiplier)


def r2plus1d_18(
    *, num_classes: int = 400, width_multiplier: float = 1.0, mid_channels: MidChannels = "per_block"
) -> VideoResNet:
    """R(2+1)D-18, every 3D convolution factored: arXiv:1711.11248, §3.5.

    The middle widths are torchvision's, whose weights they fit; `mid_channels="per_convolution"` gives the paper's.
    """
    return VideoResNet(
        ("2plus1d",) * 4,
        factored_stem=True,
        mid_channels=mid_channels,
        num_classes=num_classes,
        width_multiplier=width_multiplier,
    )


def r2plus1d_34(
    *, num_classes: int = 400, width_multiplier: float = 1.0, mid_channels: MidChannels = "per_convolution"
) -> VideoResNet:
    """R(2+1)D-34: arXiv:1711.11248, §3.5 and table 1, with the paper's middle widths."""
    return VideoResNet(
        ("2plus1d",) * 4,
        factored_stem=True,
        blocks=_34,
        mid_channels=mid_channels,
        num_classes=num_classes,
        width_multiplier=width_multiplier,
    )
