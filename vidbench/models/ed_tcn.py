"""The encoder-decoder TCN.

Source: Lea et al. (2017), "Temporal Convolutional Networks for Action Segmentation and Detection", arXiv:1611.05267,
§3.1.
Widths, order of the layers and the normalisation are those of the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vidbench.models.sizes import scaled


class _Layer(nn.Module):
    """A convolution over time that keeps T, dropout of whole channels, normalised ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, channels, kernel_size)
        self.dropout = nn.Dropout1d(dropout)
        self.relu = nn.ReLU()
        self.pads = (kernel_size - 1) // 2, kernel_size // 2
        """Frames of zeros before and after: of an even number of taps, the odd one comes last."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) → (N, channels, T), each frame divided by its largest channel."""
        y = self.relu(self.dropout(self.conv(F.pad(x, self.pads))))
        out: Tensor = y / (y.amax(dim=1, keepdim=True) + 1e-5)
        return out


class EncoderDecoderTcn(nn.Module):
    """Convolutions and pools over time down to T / 2^L, then repetition and convolutions back to T: figure 2.

    Args:
        in_features: F of the input.
        out_features: F of the output.
        channels: Of each encoder layer; the decoder has them in reverse. As many layers, L.
        kernel_size: Taps.
        dropout: Probability that a channel is dropped in training.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        channels: Sequence[int] = (64, 96),
        kernel_size: int = 25,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("channels is empty: an EncoderDecoderTcn has one encoder layer per entry")
        down, up = (in_features, *channels), (channels[-1], *reversed(channels))
        self.encoder = nn.ModuleList(_Layer(down[i], down[i + 1], kernel_size, dropout) for i in range(len(channels)))
        self.decoder = nn.ModuleList(_Layer(up[i], up[i + 1], kernel_size, dropout) for i in range(len(channels)))
        self.pool = nn.MaxPool1d(2)
        self.fc = nn.Linear(channels[0], out_features)

    def forward(self, features: Tensor) -> Tensor:
        """(N, T, F) → (N, T, F_out), for any T: zeros fill it to a multiple of 2^L and are cut off again."""
        frames, multiple = features.shape[1], 2 ** len(self.encoder)
        x = F.pad(features.transpose(1, 2), (0, -frames % multiple))
        for layer in self.encoder:
            x = self.pool(layer(x))
        for layer in self.decoder:
            x = layer(x.repeat_interleave(2, dim=2))
        out: Tensor = self.fc(x[:, :, :frames].transpose(1, 2))
        return out


class EdTcn(nn.Module):
    """An encoder-decoder TCN on features per frame; a clip's logits are the mean of its frames'.

    Args:
        num_classes: Classes told apart.
        width_multiplier: Factor on the channels, 64 and 96.
        input_features: Features per frame.
        kernel_size: Taps; 25 on 50 Salads and GTEA, 20 on JIGSAWS, 5 on MERL.
        dropout: Probability that a channel is dropped in training.

    Source: arXiv:1611.05267, §3.1; the paper labels every frame, as `frame_logits` does.
    """

    heads: ClassVar[tuple[str, ...]] = ("tcn.fc",)

    def __init__(
        self,
        *,
        num_classes: int = 400,
        width_multiplier: float = 1.0,
        input_features: int = 256,
        kernel_size: int = 25,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        channels = [scaled(width, width_multiplier) for width in (64, 96)]
        self.tcn = EncoderDecoderTcn(input_features, num_classes, channels, kernel_size, dropout)

    def frame_logits(self, features: Tensor) -> Tensor:
        """(N, T, input_features) → logits of every frame (N, T, num_classes)."""
        logits: Tensor = self.tcn(features)
        return logits

    def forward(self, features: Tensor) -> Tensor:
        """(N, T, input_features) → logits (N, num_classes)."""
        return self.frame_logits(features).mean(dim=1)
