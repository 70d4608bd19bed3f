"""Two networks for mobile devices with every filter extended in time: 3D MobileNet-v2 and 3D ShuffleNet-v2.

Source: Köpüklü et al. (2019), "Resource Efficient 3D Convolutional Neural Networks", arXiv:1904.02422, §3.
Module names are those of the authors' code, so that its weights fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn


def _conv_norm(
    channels: tuple[int, int], size: int, stride: int | tuple[int, int, int] = 1, *, depthwise: bool = False
) -> tuple[nn.Conv3d, nn.BatchNorm3d]:
    """A convolution without bias that keeps the size, or strides it, and its batch norm."""
    groups = channels[0] if depthwise else 1
    return nn.Conv3d(*channels, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm3d(channels[1])


def _initialise(model: nn.Module) -> None:
    """He initialisation by the fan out, as the authors': depthwise filters are not told apart."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


class InvertedResidual(nn.Module):
    """1×1×1 to a wider layer, depthwise 3×3×3, 1×1×1 back without activation: Sandler et al. (2018), arXiv:1801.04381.

    Args:
        in_channels: C of the input.
        channels: C of the output.
        stride: Of the depthwise convolution, in T, H and W.
        expansion: The wider layer's channels over `in_channels`; 1 for none.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*_conv_norm((in_channels, inner), 1), nn.ReLU6(inplace=True)]
        layers += [*_conv_norm((inner, inner), 3, stride, depthwise=True), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*layers, *_conv_norm((inner, channels), 1))
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, channels, T / stride, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """3D MobileNet-v2: arXiv:1904.02422, §3.

    Args:
        num_classes: Classes told apart.
        width_multiplier: Factor on every channel count, rounded down; on the last one only above 1.

    The stem keeps the frames' rate; the stages halve it wherever they halve the frame.
    """

    heads: ClassVar[tuple[str, ...]] = ("classifier",)
    STAGES: ClassVar = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    """Expansion, channels, blocks, stride of the first block."""

    def __init__(self, *, num_classes: int = 400, width_multiplier: float = 1.0) -> None:
        super().__init__()
        channels = max(1, int(32 * width_multiplier))
        last = int(1280 * max(1.0, width_multiplier))
        layers: list[nn.Module] = [nn.Sequential(*_conv_norm((3, channels), 3, (1, 2, 2)), nn.ReLU6(inplace=True))]
        for expansion, published, blocks, stride in self.STAGES:
            width = max(1, int(published * width_multiplier))
            for block in range(blocks):
                layers.append(InvertedResidual(channels, width, stride if block == 0 else 1, expansion))
                channels = width
        layers.append(nn.Sequential(*_conv_norm((channels, last), 1), nn.ReLU6(inplace=True)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
        _initialise(self)

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes), for any T, H and W."""
        logits: Tensor = self.classifier(self.features(rgb).mean(dim=(2, 3, 4)))
        return logits


def _shuffle(x: Tensor) -> Tensor:
    """Interleaves the two halves of the channels: Zhang et al. (2018), arXiv:1707.01083, §3.1."""
    n, c, t, h, w = x.shape
    return x.reshape(n, 2, c // 2, t, h, w).transpose(1, 2).reshape(n, c, t, h, w)


class ShuffleUnit(nn.Module):
    """Half of the channels through 1×1×1, depthwise 3×3×3, 1×1×1; at stride 2 all of them, and a second branch.

    Source: Ma et al. (2018), "ShuffleNet V2", arXiv:1807.11164, §3 and figure 3(c, d). The branches' names are spelled
    as in the published weights.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        half = channels // 2
        self.banch1: nn.Sequential | None = None
        if stride != 1:
            self.banch1 = nn.Sequential(
                *_conv_norm((in_channels, in_channels), 3, stride, depthwise=True),
                *_conv_norm((in_channels, half), 1),
                nn.ReLU(inplace=True),
            )
        self.banch2 = nn.Sequential(
            *_conv_norm((half if stride == 1 else in_channels, half), 1),
            nn.ReLU(inplace=True),
            *_conv_norm((half, half), 3, stride, depthwise=True),
            *_conv_norm((half, half), 1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, channels, T / stride, H / stride, W / stride)."""
        if self.banch1 is None:
            kept, changed = x.chunk(2, dim=1)
        else:
            kept, changed = self.banch1(x), x
        return _shuffle(torch.cat((kept, self.banch2(changed)), dim=1))


_SHUFFLE_WIDTHS: dict[float, Sequence[int]] = {
    0.25: (24, 32, 64, 128, 1024),
    0.5: (24, 48, 96, 192, 1024),
    1.0: (24, 116, 232, 464, 1024),
    1.5: (24, 176, 352, 704, 1024),
    2.0: (24, 224, 488, 976, 2048),
}
"""By multiplier: channels of the stem, of the three stages and of the last convolution.

Source: Ma et al. (2018), arXiv:1807.11164, table 5.
"""


def _shuffle_widths(width_multiplier: float) -> Sequence[int]:
    """The published channels where there are any, else even numbers near the multiple of those of 1.0."""
    published = _SHUFFLE_WIDTHS.get(width_multiplier)
    if published is not None:
        return published
    stem, *stages, last = _SHUFFLE_WIDTHS[1.0]
    return (stem, *(2 * max(1, round(width * width_multiplier / 2)) for width in stages), last)


class ShuffleNetV2(nn.Module):
    """3D ShuffleNet-v2: arXiv:1904.02422, §3.

    Args:
        num_classes: Classes told apart.
        width_multiplier: 0.25, 0.5, 1, 1.5 and 2 are published; others scale the stages of 1.
    """

    heads: ClassVar[tuple[str, ...]] = ("classifier",)

    def __init__(self, *, num_classes: int = 400, width_multiplier: float = 1.0) -> None:
        super().__init__()
        channels, *stages, last = _shuffle_widths(width_multiplier)
        self.conv1 = nn.Sequential(*_conv_norm((3, channels), 3, (1, 2, 2)), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool3d(3, 2, 1)
        units: list[nn.Module] = []
        for width, repeats in zip(stages, (4, 8, 4), strict=True):
            for unit in range(repeats):
                units.append(ShuffleUnit(channels, width, 2 if unit == 0 else 1))
                channels = width
        self.features = nn.Sequential(*units)
        self.conv_last = nn.Sequential(*_conv_norm((channels, last), 1), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))
        _initialise(self)

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes), for any T, H and W."""
        x = self.conv_last(self.features(self.maxpool(self.conv1(rgb))))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3, 4)))
        return logits
