"""One frame: how a block's share of it is chosen, and the step of a stream, all of it in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.launch import Gpu
from vidkernels.op import dtype_name, wants_gradients
from vidkernels.recurrent import layer
from vidkernels.recurrent.case import LstmState


def config(name: str, x: Tensor, w_hh: Tensor, features: int) -> tuning.Config:
    """How to launch a kernel whose products sum over `features` (and, in a step, over the hidden units)."""
    gpu = launch.gpu_of(x)
    hidden, gates = w_hh.shape[1], layer.gates_of(w_hh)
    key = tuning.Key(dtype_name(x), sizes=(hidden, features), form=(gates,), positions=x.shape[0])
    candidates = list(_candidates(name, x, hidden, gates, gpu))
    return tuning.pick(f"recurrent/triton_gates/{name}", key, candidates, gpu)


def _candidates(name: str, x: Tensor, hidden: int, gates: int, gpu: Gpu) -> Iterator[tuning.Config]:
    exact = x.dtype is torch.float32 and launch.precision(x) == "ieee"
    rows = 16 if x.shape[0] <= 16 else 32 if x.shape[0] <= 32 else 64
    # Columns of a block: all gates of its units in the forward product, the units alone in the backward one.
    columns_per_unit = 1 if name == "backward" else gates
    depth = 32 if exact else 64 if x.dtype is torch.float32 else 128
    # The fewer the columns, the more multiprocessors share the reading of W_hh.
    for columns, block_k in ((32, depth), (16, depth), (32, depth // 2), (64, depth // 2)):
        yield {
            "BLOCK_N": rows,
            "BLOCK_H": columns // columns_per_unit,
            "BLOCK_K": block_k,
            "num_warps": 4,
            "num_stages": 3,
        }


def even(config: tuning.Config, hidden: int, features: int) -> bool:
    """No block or slice reaches beyond the hidden units or the features."""
    return hidden % config["BLOCK_H"] == 0 and hidden % config["BLOCK_K"] == 0 and features % config["BLOCK_K"] == 0


def grid(config: tuning.Config, rows: int, hidden: int) -> tuple[int, int]:
    return -(-hidden // config["BLOCK_H"]), -(-rows // config["BLOCK_N"])


@launch.custom_op(
    "recurrent_step(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? bias, Tensor? h, Tensor? c) -> (Tensor h_n, Tensor c_n)"
)
def _step(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    (n, features), hidden, gates = x.shape, w_hh.shape[1], layer.gates_of(w_hh)
    h_n = x.new_empty(n, hidden)
    c_n = x.new_empty((n, hidden) if gates == 4 else 0)
    chosen = config("step", x, w_hh, features)
    launch.triton(
        "recurrent.triton_gates_kernels:step",
        grid(chosen, n, hidden),
        x,
        w_ih,
        w_hh,
        bias,
        h,
        c,
        h_n,
        c_n if gates == 4 else None,
        n,
        features,
        hidden,
        GATES=gates,
        EVEN=even(chosen, hidden, features),
        PRECISION=launch.precision(x),
        **chosen,
    )
    return h_n, c_n


def _alone(x: Tensor, *others: Tensor | None) -> bool:
    return x.shape[1] == 1 and not wants_gradients(x, *others)


def rnn_step(whole: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The step of an RNN: one frame in one launch, input product included; `whole` of several, or with gradients."""

    def step(
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        bias: Tensor | None = None,
        state: Tensor | None = None,
        *,
        return_sequence: bool = True,
    ) -> tuple[Tensor, Tensor]:
        if not _alone(x, w_ih, w_hh, bias, state):
            y, h_n = whole(x, w_ih, w_hh, bias, state, return_sequence=return_sequence)
            return y, h_n
        x, w_ih, w_hh, bias, h = layer.arguments(x, w_ih, w_hh, bias, state)
        h_n, _ = _step(x[:, 0], w_ih, w_hh, bias, h, None)
        return h_n[:, None] if return_sequence else h_n, h_n

    return step


def lstm_step(whole: Callable[..., Any]) -> Callable[..., tuple[Tensor, LstmState]]:
    """The step of an LSTM: one frame in one launch, input product included; `whole` of several, or with gradients."""

    def step(
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        bias: Tensor | None = None,
        state: LstmState | None = None,
        *,
        return_sequence: bool = True,
    ) -> tuple[Tensor, LstmState]:
        h, c = (None, None) if state is None else state
        if not _alone(x, w_ih, w_hh, bias, h, c):
            y, after = whole(x, w_ih, w_hh, bias, state, return_sequence=return_sequence)
            return y, after
        x, w_ih, w_hh, bias, h, c = layer.arguments(x, w_ih, w_hh, bias, h, c)
        h_n, c_n = _step(x[:, 0], w_ih, w_hh, bias, h, c)
        return h_n[:, None] if return_sequence else h_n, (h_n, c_n)

    return step
