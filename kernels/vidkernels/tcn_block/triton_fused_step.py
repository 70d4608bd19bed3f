"""A step of the fused TCN block: one launch for narrow blocks, two for wide ones, weight norm included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidkernels import launch
from vidkernels.causal_conv1d.triton_phased import COPY, dense, no_gradient, power_of_2, same_dtype, step_tiles
from vidkernels.tcn_block.case import TcnState, WeightNorm

_KERNELS = "tcn_block.triton_fused_step_kernels"
_NARROW = 128
"""The most channels that one block of threads takes through a whole step by itself."""


def arguments(x: Tensor, w1: Any, b1: Any, w2: Any, b2: Any, w_down: Any, b_down: Any) -> tuple[Any, ...]:
    """x, v1, g1, b1, v2, g2, b2, w_down, b_down, as autocast wants them; plain filters have no g."""
    (v1, g1), (v2, g2) = ((w.v, w.g) if isinstance(w, WeightNorm) else (w, None) for w in (w1, w2))
    return launch.autocast(x, v1, g1, b1, v2, g2, b2, w_down, b_down)


def dropout_seed(x: Tensor, p: float) -> Tensor | None:
    """A seed on the device of x, so that a CUDA graph draws anew at every replay; None where nothing is dropped."""
    return torch.randint(2**62, (1,), device=x.device) if p else None


def dropout(p: float) -> tuple[int, float]:
    """An element of 16 random bits is kept from this threshold on, and scaled by this."""
    return round(p * 2**16), 1 / (1 - p)


@launch.custom_op(
    "tcn_block_fused_step(Tensor x, Tensor v1, Tensor? g1, Tensor? b1, Tensor v2, Tensor? g2, Tensor? b2,"
    " Tensor? w_down, Tensor? b_down, Tensor? seed, Tensor? past_x, Tensor? past_hidden, int dilation,"
    " float dropout_p) -> (Tensor, Tensor, Tensor)"
)
def _step(
    x: Tensor,
    v1: Tensor,
    g1: Tensor | None,
    b1: Tensor | None,
    v2: Tensor,
    g2: Tensor | None,
    b2: Tensor | None,
    w_down: Tensor | None,
    b_down: Tensor | None,
    seed: Tensor | None,
    past_x: Tensor | None,
    past_hidden: Tensor | None,
    dilation: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New frames, (N, n, C_in), after the remembered ones: outputs, and the two states as (N, (K−1)·d, C)."""
    batch, frames, ins = x.shape
    outs, _, taps = v1.shape
    past = (taps - 1) * dilation
    y, hidden = x.new_empty(batch, frames, outs), x.new_empty(batch, frames, outs)
    kept_x, kept_hidden = x.new_empty(batch, past, ins), x.new_empty(batch, past, outs)
    tiles = step_tiles(batch * frames, outs * taps, x.element_size())
    fused = outs <= _NARROW and frames <= tiles["BLOCK_M"]
    rows_per_tile, warps = tiles["BLOCK_M"], 4
    if fused:
        rows_per_tile -= rows_per_tile % max(frames, 1)
        tiles |= {"BLOCK_N": power_of_2(outs), "BLOCK_K": min(tiles["BLOCK_K"], 64)}
        warps = 8
    row_tiles, column_tiles = -(-batch * frames // rows_per_tile), -(-outs // tiles["BLOCK_N"])
    copies = [-(-kept.numel() // COPY) for kept in (kept_x, kept_hidden)]
    threshold, scale = dropout(dropout_p)
    for half in ((True, True),) if fused else ((True, False), (False, True)):
        launch.triton(
            f"{_KERNELS}:step",
            (row_tiles * column_tiles + (sum(copies) if half[0] else 0),),
            *(x, past_x, past_hidden, *map(dense, (v1, g1, b1, v2, g2, b2, w_down, b_down)), seed),
            *(hidden, y, kept_x, kept_hidden, batch, frames, past, ins, outs, taps, dilation),
            *(row_tiles, column_tiles, copies[0], rows_per_tile, threshold, scale),
            FIRST=half[0],
            SECOND=half[1],
            **tiles,
            COPY=COPY,
            PRECISION=launch.precision(x),
            num_warps=warps,
            num_stages=2,
        )
    return y, kept_x, kept_hidden


def step(
    x_t: Tensor,
    w1: Tensor | WeightNorm,
    b1: Tensor | None,
    w2: Tensor | WeightNorm,
    b2: Tensor | None,
    w_down: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    state: TcnState | None = None,
    dilation: int,
    dropout_p: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, TcnState]:
    """The next frames (N, C_in, n): their outputs, and what the next call must remember.

    Meant for inference: it has no gradient, and asking for one raises RuntimeError.
    """
    x_t, *parameters = arguments(x_t, w1, b1, w2, b2, w_down, b_down)
    past_x, past_hidden = (None, None) if state is None else (part.to(x_t.dtype) for part in state)
    same_dtype(x_t, *parameters)
    no_gradient(x_t, *parameters, past_x, past_hidden)
    p = dropout_p if training else 0.0
    frames, *pasts = (None if t is None else t.transpose(1, 2).contiguous() for t in (x_t, past_x, past_hidden))
    y, kept_x, kept_hidden = _step(frames, *parameters, dropout_seed(x_t, p), *pasts, dilation, p)
    return y.transpose(1, 2), TcnState(kept_x.transpose(1, 2), kept_hidden.transpose(1, 2))
