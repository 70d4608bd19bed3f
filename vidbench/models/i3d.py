"""I3D, Inception-v1 with every filter inflated in time.

Source: Carreira & Zisserman (2017), "Quo Vadis, Action Recognition?", arXiv:1705.07750, §2.4 and figure 3. Module names
are those of the PyTorch port of the published weights.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidbench.models.sizes import scaled
from vidkernels.shapes import Triple


def _same_padding(x: Tensor, kernel: Triple, stride: Triple) -> tuple[Triple, tuple[int, ...] | None]:
    """TensorFlow's SAME padding of (N, C, T, H, W): symmetric zeros for the operator itself, or else zeros for F.pad.

    An output of ⌈size / stride⌉ needs max((⌈size / stride⌉ - 1)·stride + kernel - size, 0) zeros, the odd one last.
    """
    totals = [
        max((-(-size // step) - 1) * step + taps - size, 0)
        for size, taps, step in zip(x.shape[2:], kernel, stride, strict=True)
    ]
    if all(total % 2 == 0 for total in totals):
        t, h, w = (total // 2 for total in totals)
        return (t, h, w), None
    pads = [pad for total in reversed(totals) for pad in (total // 2, total - total // 2)]
    return (0, 0, 0), tuple(pads)


class SameConv3d(nn.Conv3d):
    """A convolution with SAME padding and no bias."""

    def __init__(self, in_channels: int, channels: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__(in_channels, channels, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, channels, ⌈T / stride⌉, ⌈H / stride⌉, ⌈W / stride⌉)."""
        (k_t, k_h, k_w), (s_t, s_h, s_w) = self.kernel_size, self.stride
        padding, pads = _same_padding(x, (k_t, k_h, k_w), (s_t, s_h, s_w))
        return F.conv3d(x if pads is None else F.pad(x, pads), self.weight, None, self.stride, padding)


class SameMaxPool3d(nn.Module):
    """A max pool with SAME padding. Inputs are ≥ 0, after ReLU: zeros pad as TensorFlow's -∞ does."""

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, C, ⌈T / stride⌉, ⌈H / stride⌉, ⌈W / stride⌉)."""
        padding, pads = _same_padding(x, self.kernel, self.stride)
        return F.max_pool3d(x if pads is None else F.pad(x, pads), self.kernel, self.stride, padding)


class Unit3D(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, size: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = SameConv3d(in_channels, channels, (size,) * 3, (stride,) * 3)
        self.bn = nn.BatchNorm3d(channels, eps=1e-3, momentum=0.01)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, channels, ⌈T / stride⌉, ⌈H / stride⌉, ⌈W / stride⌉)."""
        out: Tensor = self.relu(self.bn(self.conv3d(x)))
        return out


class Mixed(nn.Module):
    """An inception module with four branches: figure 3, right.

    Args:
        in_channels: C of the input.
        widths: Channels of b0 (1×1×1), b1a → b1b (3×3×3), b2a → b2b (3×3×3), b3b (1×1×1 after a pool).
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit3D(in_channels, b0)
        self.b1a: nn.Module = Unit3D(in_channels, b1a)
        self.b1b = Unit3D(b1a, b1b, 3)
        self.b2a: nn.Module = Unit3D(in_channels, b2a)
        self.b2b = Unit3D(b2a, b2b, 3)
        self.b3a = SameMaxPool3d((3, 3, 3), (1, 1, 1))
        self.b3b = Unit3D(in_channels, b3b)
        self.out_channels = b0 + b1b + b2b + b3b
        """Channels of the four branches together."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) → (N, out_channels, T, H, W)."""
        return torch.cat((self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))), dim=1)


_LAYERS: tuple[tuple[str, tuple[int, ...] | tuple[Triple, Triple]], ...] = (
    ("MaxPool3d_2a_3x3", ((1, 3, 3), (1, 2, 2))),
    ("Conv3d_2b_1x1", (64, 1)),
    ("Conv3d_2c_3x3", (192, 3)),
    ("MaxPool3d_3a_3x3", ((1, 3, 3), (1, 2, 2))),
    ("Mixed_3b", (64, 96, 128, 16, 32, 32)),
    ("Mixed_3c", (128, 128, 192, 32, 96, 64)),
    ("MaxPool3d_4a_3x3", ((3, 3, 3), (2, 2, 2))),
    ("Mixed_4b", (192, 96, 208, 16, 48, 64)),
    ("Mixed_4c", (160, 112, 224, 24, 64, 64)),
    ("Mixed_4d", (128, 128, 256, 24, 64, 64)),
    ("Mixed_4e", (112, 144, 288, 32, 64, 64)),
    ("Mixed_4f", (256, 160, 320, 32, 128, 128)),
    ("MaxPool3d_5a_2x2", ((2, 2, 2), (2, 2, 2))),
    ("Mixed_5b", (256, 160, 320, 32, 128, 128)),
    ("Mixed_5c", (384, 192, 384, 48, 128, 128)),
)
"""After the first convolution, in order. Pool: kernel and stride; Conv: channels and size; Mixed: widths."""


class _Logits(nn.Module):
    """The classifier, a 1×1×1 convolution with bias."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3d(x)
        return out


class I3D(nn.Module):
    """Inflated Inception-v1.

    Args:
        in_channels: 3 for RGB, 2 for optical flow.
        num_classes: Classes told apart.
        width_multiplier: Factor on every channel count.
        dropout: Before the classifier.

    Where fewer than 2 steps or 7×7 positions are left, the average pool extends over those.

    Source: arXiv:1705.07750, §2.4.
    """

    heads: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(
        self, in_channels: int = 3, *, num_classes: int = 400, width_multiplier: float = 1.0, dropout: float = 0.5
    ) -> None:
        super().__init__()
        channels = scaled(64, width_multiplier)
        self.Conv3d_1a_7x7 = Unit3D(in_channels, channels, 7, 2)
        self.order = ["Conv3d_1a_7x7"]
        for name, sizes in _LAYERS:
            layer: nn.Module
            if isinstance(sizes[0], tuple) and isinstance(sizes[1], tuple):
                layer = SameMaxPool3d(sizes[0], sizes[1])
            else:
                numbers = tuple(size for size in sizes if isinstance(size, int))
                if name.startswith("Mixed"):
                    layer = Mixed(channels, tuple(scaled(width, width_multiplier) for width in numbers))
                    channels = layer.out_channels
                else:
                    width = scaled(numbers[0], width_multiplier)
                    layer, channels = Unit3D(channels, width, numbers[1]), width
            self.add_module(name, layer)
            self.order.append(name)
        self.dropout = nn.Dropout(dropout)
        self.logits = _Logits(channels, num_classes)

    def features(self, clip: Tensor) -> Tensor:
        """(N, in_channels, T, H, W) → the last inception module's (N, 1024, ⌈T / 8⌉, ⌈H / 32⌉, ⌈W / 32⌉)."""
        x = clip
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, clip: Tensor) -> Tensor:
        """(N, in_channels, T, H, W) → logits (N, num_classes), the mean over time, for any T, H and W."""
        x = self.features(clip)
        t, h, w = x.shape[2:]
        x = F.avg_pool3d(x, (min(2, t), min(7, h), min(7, w)), 1)
        return torch.mean(self.logits(self.dropout(x)), dim=(2, 3, 4))


def i3d_rgb(*, num_classes: int = 400, width_multiplier: float = 1.0) -> I3D:
    """I3D on RGB: arXiv:1705.07750, §2.4."""
    return I3D(3, num_classes=num_classes, width_multiplier=width_multiplier)


def i3d_flow(*, num_classes: int = 400, width_multiplier: float = 1.0) -> I3D:
    """I3D on optical flow (N, 2, T-1, H, W): arXiv:1705.07750, §2.4."""
    return I3D(2, num_classes=num_classes, width_multiplier=width_multiplier)


class I3DTwoStream(nn.Module):
    """I3D on RGB and I3D on optical flow, trained apart, their logits averaged: arXiv:1705.07750, §2.4.

    Args:
        num_classes: Classes told apart.
        width_multiplier: Factor on every channel count.

    Published files hold one stream: `load_weights(model.rgb, …)` and `load_weights(model.flow, …)`.
    """

    heads: ClassVar[tuple[str, ...]] = ("rgb.logits", "flow.logits")

    def __init__(self, *, num_classes: int = 400, width_multiplier: float = 1.0) -> None:
        super().__init__()
        self.rgb = i3d_rgb(num_classes=num_classes, width_multiplier=width_multiplier)
        self.flow = i3d_flow(num_classes=num_classes, width_multiplier=width_multiplier)

    def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
        """rgb (N, 3, T, H, W) and flow (N, 2, T-1, H, W) → logits (N, num_classes).

        The last frame, at which no flow begins, is left out, so that both streams see the same moments.
        """
        logits: Tensor = (self.rgb(rgb[:, :, : flow.shape[2]]) + self.flow(flow)) / 2
        return logits
