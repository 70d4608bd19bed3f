"""ResNet-18 and -50 on single frames: backbones of the frame-level, the recurrent and the temporal models.

Source: He et al. (2016), "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vidbench.models.sizes import FrameSize, height_width, scaled


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: arXiv:1512.03385, figure 5, left."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, channels, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(y + shortcut)
        return out


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut: arXiv:1512.03385, figure 5, right.

    The 3×3 convolution has the stride, as in torchvision; the paper's first 1×1 has it.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, 4 · channels, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out: Tensor = self.relu(self.bn3(self.conv3(y)) + shortcut)
        return out


class ResNet(nn.Module):
    """Frames (N, 3, H, W) → features (N, `features`): a ResNet up to its global average pool.

    Args:
        block: Kind of block.
        depths: Blocks in each stage.
        input_size: Pixels of a frame, or (H, W). Below 64 the max pool of the stem is left out, so that the last
            feature map of a 32×32 frame is 2×2 and not a single position.
        width_multiplier: Factor on every channel count.

    Module names are torchvision's.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        input_size: FrameSize = 224,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        widths = tuple(scaled(c, width_multiplier) for c in (64, 128, 256, 512))
        self.features = widths[-1] * block.expansion
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        small = min(height_width(input_size)) < 64
        self.maxpool: nn.Module = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        channels, stages = widths[0], []
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = [block(channels, width, 1 if i == 0 else 2)]
            channels = width * block.expansion
            stage += [block(channels, width) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, features)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(frames))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)


def resnet18(*, input_size: FrameSize = 224, width_multiplier: float = 1.0) -> ResNet:
    """ResNet-18 without its classifier: arXiv:1512.03385, table 1."""
    return ResNet(BasicBlock, (2, 2, 2, 2), input_size=input_size, width_multiplier=width_multiplier)


def resnet50(*, input_size: FrameSize = 224, width_multiplier: float = 1.0) -> ResNet:
    """ResNet-50 without its classifier: arXiv:1512.03385, table 1."""
    return ResNet(Bottleneck, (3, 4, 6, 3), input_size=input_size, width_multiplier=width_multiplier)
