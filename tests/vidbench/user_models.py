"""Models as users bring them, good and bad; found as `user_models:name` from this folder."""

import ctypes
import time

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """A mean over the clip and one linear layer."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(clip.mean((2, 3, 4)))


class Segfaults(Tiny):
    """Reads address 0."""

    def forward(self, clip: Tensor) -> Tensor:
        ctypes.string_at(0)
        return super().forward(clip)


class Hangs(Tiny):
    """Sleeps for an hour."""

    def forward(self, clip: Tensor) -> Tensor:
        time.sleep(3600)
        return super().forward(clip)


class Hogs(Tiny):
    """Touches memory until there is none."""

    def forward(self, clip: Tensor) -> Tensor:
        if clip.device.type == "cpu":
            kept = [torch.ones(2**24) for _ in range(2**12)]
            assert kept
        return super().forward(clip)


class Raises(Tiny):
    """Raises in forward."""

    def forward(self, clip: Tensor) -> Tensor:
        raise IndexError("list index out of range")


class NotANumber(Tiny):
    """Returns NaN."""

    def forward(self, clip: Tensor) -> Tensor:
        return super().forward(clip) * (float("nan") if clip.dtype is torch.float32 else 1.0)


class Caches(Tiny):
    """Returns its first answer for ever."""

    def forward(self, clip: Tensor) -> Tensor:
        if clip.dtype is torch.float64:
            return super().forward(clip)
        if not hasattr(self, "answer"):
            self.answer = super().forward(clip)
        return self.answer


class Mutates(Tiny):
    """Adds one to the clip it was given."""

    def forward(self, clip: Tensor) -> Tensor:
        answer = super().forward(clip)
        if clip.dtype is torch.float32:
            clip.add_(1.0)
        return answer


class Exits(Tiny):
    """Ends the process."""

    def forward(self, clip: Tensor) -> Tensor:
        raise SystemExit(3)


def tiny(num_classes: int = 4) -> nn.Module:
    """A factory."""
    return Tiny(num_classes)


def no_module() -> int:
    """A factory that makes no module."""
    return 3
