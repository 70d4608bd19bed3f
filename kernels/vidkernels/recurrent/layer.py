"""What every kernel of the recurrence shares: the input products of all frames before it, its gradients after it.

A recurrence is a custom op on the products of all frames with W_ih, (N, T, G·H) for G gates, and on W_hh; the rest
of the layer is matrix products, and autograd differentiates them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkernels import launch
from vidkernels.op import wants_gradients
from vidkernels.recurrent.case import LstmState

SIGNATURE = (
    "(Tensor products, Tensor w_hh, Tensor? h, Tensor? c, bool sequence, bool train) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
"""Of a recurrence. `y` is empty without `sequence`. `gates` (N, T, G·H), activated, in `gates_dtype`, and `cells`
(N, T, H), the c before each frame, are empty without `train`, which implies `sequence`. c_n and `cells` of an RNN are
empty."""

BACKWARD_SIGNATURE = (
    "(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, Tensor w_hh, Tensor gates, Tensor cells) "
    "-> (Tensor grad_products, Tensor grad_c)"
)
"""Of the recurrence in reverse, back to the products and to the first c (empty for an RNN)."""

Recurrence = Callable[..., Any]


def gates_of(w_hh: Tensor) -> int:
    """4 for an LSTM, 1 for an RNN."""
    return w_hh.shape[0] // w_hh.shape[1]


def gates_dtype(x: Tensor) -> torch.dtype:
    """What activated gates are kept in: float16 for bfloat16 too, for they lie within ±1 and three more bits count."""
    return torch.float32 if x.dtype is torch.float32 else torch.float16


def rnn(
    recurrence: Recurrence,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    return_sequence: bool,
) -> tuple[Tensor, Tensor]:
    """The RNN around a recurrence."""
    y, h, _ = _layer(recurrence, x, w_ih, w_hh, bias, state, None, return_sequence)
    return y, h


def lstm(
    recurrence: Recurrence,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    state: LstmState | None,
    return_sequence: bool,
) -> tuple[Tensor, LstmState]:
    """The LSTM around a recurrence."""
    h, c = (None, None) if state is None else state
    y, h_n, c_n = _layer(recurrence, x, w_ih, w_hh, bias, h, c, return_sequence)
    return y, (h_n, c_n)


def arguments(*tensors: Tensor | None) -> tuple[Any, ...]:
    """x, w_ih, w_hh, bias, h, c in the dtype that autocast wants, and all contiguous.

    Raises:
        ValueError: Their dtypes differ.
    """
    cast = launch.autocast(*tensors)
    dtypes = {str(tensor.dtype) for tensor in cast if tensor is not None}
    if len(dtypes) > 1:
        raise ValueError(f"x, the weights and the state must have one dtype, not {', '.join(sorted(dtypes))}")
    return tuple(None if tensor is None else tensor.contiguous() for tensor in cast)


def _layer(
    recurrence: Recurrence,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    return_sequence: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, w_ih, w_hh, bias, h, c = arguments(x, w_ih, w_hh, bias, h, c)
    train = wants_gradients(x, w_ih, w_hh, bias, h, c)
    # The bias is added before the one rounding of a 16-bit product.
    products = F.linear(x, w_ih, bias)
    y, h_n, c_n, _, _ = recurrence(products, w_hh, h, c, return_sequence or train, train)
    return y if return_sequence else h_n, h_n, c_n


def differentiate(forward: Any, backward: Recurrence) -> None:
    """Makes `backward`, with matrix products after it, the gradient of a recurrence."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, w_hh, h, c, _, _ = inputs
        y, _, _, gates, cells = output
        ctx.save_for_backward(w_hh, h, c, y, gates, cells)
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        w_hh, h, c, y, gates, cells = ctx.saved_tensors
        _, for_w_hh, for_h, for_c, _, _ = ctx.needs_input_grad
        if grad_y is None and grad_h is None and grad_c is None:
            return (None,) * 6
        grad_products, grad_c_0 = backward(grad_y, grad_h, grad_c, w_hh, gates, cells)
        grad_w_hh = grad_h_0 = None
        if for_w_hh:
            first = torch.zeros_like(y[:, :1]) if h is None else h[:, None]
            before = torch.cat((first, y[:, :-1]), dim=1)
            grad_w_hh = grad_products.flatten(0, 1).T @ before.flatten(0, 1)
        if for_h and h is not None:
            grad_h_0 = grad_products[:, 0] @ w_hh
        return grad_products, grad_w_hh, grad_h_0, grad_c_0 if for_c and c is not None else None, None, None

    forward.register_autograd(gradients, setup_context=setup_context)
