"""Recurrent layers: their case, inputs and costs. An RNN has one gate's worth of weights, an LSTM four."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidkernels.op import TOLERANCES, Case, Inputs, Op, Tolerance, check_tensor, dtype_name, wants_gradients
from vidkernels.shapes import Shape, recurrent_macs, tensor_bytes

LstmState = tuple[Tensor, Tensor]
"""(h, c), each (N, H)."""


@dataclass(frozen=True, kw_only=True)
class RecurrentCase(Case):
    """Sizes of one recurrent layer, on features (N, T, F)."""

    clip_length: int = 16
    input_features: int = 512
    hidden_size: int = 256
    bias: bool = True
    return_sequence: bool = True
    """Outputs of every frame; otherwise of the last alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "clip_length", "input_features", "hidden_size")
        if self.memory_format != "contiguous":
            raise ValueError(
                f"memory_format={self.memory_format!r}: features (N, T, F) of a recurrent layer are always contiguous"
            )

    @property
    def x_shape(self) -> Shape:
        """(N, T, F)."""
        return (self.batch_size, self.clip_length, self.input_features)

    @property
    def y_shape(self) -> Shape:
        """(N, T, H), or (N, H) of the last frame."""
        frames = (self.clip_length,) if self.return_sequence else ()
        return (self.batch_size, *frames, self.hidden_size)

    def macs(self, gates: int) -> int:
        """Multiply-adds of the forward pass."""
        return recurrent_macs(self.batch_size * self.clip_length, self.input_features, self.hidden_size, gates)

    def bytes_moved(self, gates: int) -> int:
        """Compulsory bytes of the forward pass, from a state of zeros; the last h is part of y, an LSTM's c is not."""
        rows = gates * self.hidden_size
        weights = ((rows, self.input_features), (rows, self.hidden_size), (rows if self.bias else 0,))
        cell = (self.batch_size if gates == 4 else 0, self.hidden_size)
        return tensor_bytes(self.dtype, self.x_shape, *weights, self.y_shape, cell)


def _make_inputs(case: RecurrentCase, generator: torch.Generator, gates: int) -> Inputs:
    """x of unit variance, weights of std 1/√(F + H), so that no gate saturates, and an initial state of zeros."""
    rows, scale = gates * case.hidden_size, (case.input_features + case.hidden_size) ** -0.5
    x = torch.randn(case.x_shape, generator=generator)
    w_ih = torch.randn(rows, case.input_features, generator=generator) * scale
    w_hh = torch.randn(rows, case.hidden_size, generator=generator) * scale
    bias = 0.5 * torch.randn(rows, generator=generator) if case.bias else None
    return Inputs((x, w_ih, w_hh, bias), {"return_sequence": case.return_sequence})


def _case_of(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None, state: object, return_sequence: bool, gates: int
) -> RecurrentCase:
    check_tensor("x", x, "N T F")
    check_tensor("w_hh", w_hh, "H H" if gates == 1 else "4·H H")
    n, t, f = x.shape
    hidden = w_hh.shape[1]
    check_tensor("w_hh", w_hh, (gates * hidden, hidden))
    check_tensor("w_ih", w_ih, (gates * hidden, f))
    if bias is not None:
        check_tensor("bias", bias, (gates * hidden,))
    return RecurrentCase(
        batch_size=n,
        dtype=dtype_name(x),
        training=wants_gradients(x, w_ih, w_hh, bias, state),
        clip_length=t,
        input_features=f,
        hidden_size=hidden,
        bias=bias is not None,
        return_sequence=return_sequence,
    )


def rnn_case_of(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    return_sequence: bool = True,
) -> RecurrentCase:
    """The case of a call to `rnn`.

    Raises:
        ValueError: Ranks or sizes that do not fit.
    """
    case = _case_of(x, w_ih, w_hh, bias, state, return_sequence, gates=1)
    if state is not None:
        check_tensor("state", state, (case.batch_size, case.hidden_size))
    return case


def lstm_case_of(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: LstmState | None = None,
    *,
    return_sequence: bool = True,
) -> RecurrentCase:
    """The case of a call to `lstm`.

    Raises:
        ValueError: Ranks or sizes that do not fit, or a state that is not a pair.
    """
    case = _case_of(x, w_ih, w_hh, bias, state, return_sequence, gates=4)
    if state is not None:
        if not isinstance(state, tuple) or len(state) != 2:
            raise ValueError(f"state must be a pair (h, c), not {type(state).__name__}")
        for name, tensor in zip(("h", "c"), state, strict=True):
            check_tensor(f"state's {name}", tensor, (case.batch_size, case.hidden_size))
    return case


# An error of one frame is carried to the next, so bf16 is held closer than elsewhere: a state kept in float32
# meets it, one that is rounded in every frame may not.
_TOLERANCES = {**TOLERANCES, "bf16": Tolerance(4e-3, 5e-3)}

RNN = Op(
    name="rnn",
    case_type=RecurrentCase,
    case_of=rnn_case_of,
    make_inputs=lambda case, generator: _make_inputs(case, generator, gates=1),
    macs=lambda case: case.macs(gates=1),
    bytes_moved=lambda case: case.bytes_moved(gates=1),
    tolerances=_TOLERANCES,
    has_border=False,
)

LSTM = Op(
    name="lstm",
    case_type=RecurrentCase,
    case_of=lstm_case_of,
    make_inputs=lambda case, generator: _make_inputs(case, generator, gates=4),
    macs=lambda case: case.macs(gates=4),
    bytes_moved=lambda case: case.bytes_moved(gates=4),
    tolerances=_TOLERANCES,
    has_border=False,
)
