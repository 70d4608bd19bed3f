"""C3D, after Tran et al. (2015), "Learning Spatiotemporal Features with 3D Convolutional Networks", arXiv:1412.0767."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vidbench.models.sizes import FrameSize, expect_clip, height_width, scaled


class C3D(nn.Module):
    """Eight 3×3×3 convolutions, five max pools, three fully connected layers.

    Args:
        num_classes: Classes told apart; 487 in the Sports-1M weights.
        clip_length: Frames; the first fully connected layer is sized by it. An axis that has shrunk to 1 is not
            pooled further, so that clips shorter than 16 frames work.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.

    pool5 pads H and W by 1 as the PyTorch ports of the published weights do: 7×7 becomes 4×4, the size that Caffe's
    rounding up gives, which makes 8192 features. Module names are those of the ported Sports-1M weights.

    Source: arXiv:1412.0767, §3.2 and figure 3.
    """

    heads: ClassVar[tuple[str, ...]] = ("fc8",)

    def __init__(
        self,
        *,
        num_classes: int = 400,
        clip_length: int = 16,
        input_size: FrameSize = 112,
        width_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.clip_length, self.frame = clip_length, height_width(input_size)
        c64, c128, c256, c512, c4096 = (scaled(c, width_multiplier) for c in (64, 128, 256, 512, 4096))
        sizes: tuple[int, ...] = (clip_length, *self.frame)

        def pool(sizes: tuple[int, ...], kernel: tuple[int, ...], pad: int = 0) -> tuple[nn.MaxPool3d, tuple[int, ...]]:
            kernel = tuple(min(k, size) for k, size in zip(kernel, sizes, strict=True))
            pads = tuple(pad if axis and k > 1 else 0 for axis, k in enumerate(kernel))
            after = tuple((s + 2 * p - k) // k + 1 for s, p, k in zip(sizes, pads, kernel, strict=True))
            return nn.MaxPool3d(kernel, kernel, pads), after

        self.conv1 = nn.Conv3d(3, c64, 3, padding=1)
        self.pool1, sizes = pool(sizes, (1, 2, 2))
        self.conv2 = nn.Conv3d(c64, c128, 3, padding=1)
        self.pool2, sizes = pool(sizes, (2, 2, 2))
        self.conv3a = nn.Conv3d(c128, c256, 3, padding=1)
        self.conv3b = nn.Conv3d(c256, c256, 3, padding=1)
        self.pool3, sizes = pool(sizes, (2, 2, 2))
        self.conv4a = nn.Conv3d(c256, c512, 3, padding=1)
        self.conv4b = nn.Conv3d(c512, c512, 3, padding=1)
        self.pool4, sizes = pool(sizes, (2, 2, 2))
        self.conv5a = nn.Conv3d(c512, c512, 3, padding=1)
        self.conv5b = nn.Conv3d(c512, c512, 3, padding=1)
        self.pool5, sizes = pool(sizes, (2, 2, 2), pad=1)
        self.fc6 = nn.Linear(c512 * sizes[0] * sizes[1] * sizes[2], c4096)
        self.fc7 = nn.Linear(c4096, c4096)
        self.fc8 = nn.Linear(c4096, num_classes)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self._initialise()

    def _initialise(self) -> None:
        """He initialisation: eight convolutions without batch norm do not train from PyTorch's default."""
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.Linear)) and module is not self.fc8:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, rgb: Tensor) -> Tensor:
        """The fc6 activations that the paper uses as a descriptor: (N, 4096), from (N, 3, T, H, W)."""
        expect_clip(rgb, self.clip_length, self.frame)
        x = self.pool1(self.relu(self.conv1(rgb)))
        x = self.pool2(self.relu(self.conv2(x)))
        x = self.relu(self.conv3a(x))
        x = self.pool3(self.relu(self.conv3b(x)))
        x = self.relu(self.conv4a(x))
        x = self.pool4(self.relu(self.conv4b(x)))
        x = self.relu(self.conv5a(x))
        x = self.pool5(self.relu(self.conv5b(x)))
        descriptor: Tensor = self.relu(self.fc6(x.flatten(1)))
        return descriptor

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes)."""
        x = self.dropout(self.features(rgb))
        logits: Tensor = self.fc8(self.dropout(self.relu(self.fc7(x))))
        return logits
