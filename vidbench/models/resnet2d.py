"""ResNet-18 on single frames: the backbone of the frame-level and the recurrent models.

Source: He et al. (2016), "Deep Residual Learning for Image Recognition", arXiv:1512.03385.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidbench.models.sizes import FrameSize, height_width, scaled


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: arXiv:1512.03385, figure 5, left."""

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


class ResNet18(nn.Module):
    """Frames (N, 3, H, W) → features (N, `features`): ResNet-18 up to its global average pool.

    Args:
        input_size: Pixels of a frame, or (H, W). Below 64 the max pool of the stem is left out, so that the last
            feature map of a 32×32 frame is 2×2 and not a single position.
        width_multiplier: Factor on every channel count.

    Module names are torchvision's.
    """

    def __init__(self, *, input_size: FrameSize = 224, width_multiplier: float = 1.0) -> None:
        super().__init__()
        c64, c128, c256, c512 = (scaled(c, width_multiplier) for c in (64, 128, 256, 512))
        self.features = c512
        self.conv1 = nn.Conv2d(3, c64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(c64)
        self.relu = nn.ReLU(inplace=True)
        small = min(height_width(input_size)) < 64
        self.maxpool: nn.Module = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(c64, c64), BasicBlock(c64, c64))
        self.layer2 = nn.Sequential(BasicBlock(c64, c128, 2), BasicBlock(c128, c128))
        self.layer3 = nn.Sequential(BasicBlock(c128, c256, 2), BasicBlock(c256, c256))
        self.layer4 = nn.Sequential(BasicBlock(c256, c512, 2), BasicBlock(c512, c512))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, features)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(frames))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(x), 1)

    def per_frame(self, rgb: Tensor) -> Tensor:
        """A clip (N, 3, T, H, W) → a sequence (N, T, features): the frames of all clips as one batch."""
        n, c, t, h, w = rgb.shape
        frames = rgb.transpose(1, 2).reshape(n * t, c, h, w)
        sequence: Tensor = self(frames).reshape(n, t, self.features)
        return sequence
