"""A 2D CNN on every frame and a recurrent network over the frames.

Source: Donahue et al. (2015), "Long-term Recurrent Convolutional Networks", arXiv:1411.4389, §4, with ResNet-18 as the
frame encoder; the vanilla RNN is its baseline without gates.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vidbench.models.resnet2d import ResNet18
from vidbench.models.sizes import FrameSize, scaled

RecurrentState = tuple[Tensor, ...]
"""(h,) of an RNN, (h, c) of an LSTM; each (1, N, hidden_size)."""


class _CnnRecurrent(nn.Module):
    """ResNet-18 per frame, one recurrent layer, a linear layer on its last output."""

    heads: ClassVar[tuple[str, ...]] = ("fc",)
    rnn: nn.RNN | nn.LSTM

    def __init__(
        self,
        cell: type[nn.RNN] | type[nn.LSTM],
        num_classes: int,
        input_size: FrameSize,
        width_multiplier: float,
        hidden_size: int | None,
    ) -> None:
        super().__init__()
        hidden = scaled(256, width_multiplier) if hidden_size is None else hidden_size
        self.backbone = ResNet18(input_size=input_size, width_multiplier=width_multiplier)
        self.rnn = cell(self.backbone.features, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, num_classes)

    def _recur(self, sequence: Tensor, state: RecurrentState | None) -> tuple[Tensor, RecurrentState]:
        """Logits of the last step, and the state after it."""
        if isinstance(self.rnn, nn.LSTM):
            outputs, carried = self.rnn(sequence, state)
            after: RecurrentState = carried
        else:
            outputs, hidden = self.rnn(sequence, None if state is None else state[0])
            after = (hidden,)
        return self.fc(outputs[:, -1]), after

    def forward(self, rgb: Tensor) -> Tensor:
        """(N, 3, T, H, W) → logits (N, num_classes) from the last output, for any T."""
        return self._recur(self.backbone.per_frame(rgb), None)[0]

    def step(self, frame: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """One frame (N, 3, H, W) of a stream → logits of the clip so far, and the state to hand to the next step."""
        return self._recur(self.backbone(frame).unsqueeze(1), state)


class CnnRnn(_CnnRecurrent):
    """CNN + vanilla RNN (tanh).

    Args:
        num_classes: Classes told apart.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count and on the hidden size.
        hidden_size: Width of the recurrent state; 256 times the multiplier where not given.

    Source: Elman (1990), "Finding structure in time", over the frame encoder of arXiv:1411.4389.
    """

    def __init__(
        self,
        *,
        num_classes: int = 400,
        input_size: FrameSize = 224,
        width_multiplier: float = 1.0,
        hidden_size: int | None = None,
    ) -> None:
        super().__init__(nn.RNN, num_classes, input_size, width_multiplier, hidden_size)


class CnnLstm(_CnnRecurrent):
    """CNN + LSTM, the last output classified (the paper averages the predictions of all steps).

    Args:
        num_classes: Classes told apart.
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count and on the hidden size.
        hidden_size: Width of the recurrent state; 256 (the paper's RGB network) times the multiplier where not given.

    Source: arXiv:1411.4389, §4.
    """

    def __init__(
        self,
        *,
        num_classes: int = 400,
        input_size: FrameSize = 224,
        width_multiplier: float = 1.0,
        hidden_size: int | None = None,
    ) -> None:
        super().__init__(nn.LSTM, num_classes, input_size, width_multiplier, hidden_size)
