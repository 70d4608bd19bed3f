"""One frame: how a block's share of it is chosen, and the step of a stream, all of it in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidkernels import launch, tuning
from vidkernels.launch import Gpu
from vidkernels.op import dtype_name, wants_gradients
from vidkernels.recurrent import layer
from vidkernels.recurrent.case import LstmState


@dataclass(frozen=True)
class Products:
    """The products of one frame: of batch rows with all columns of some hidden units, summed over `sums`."""

    kernel: str
    x: Tensor
    hidden: int
    columns: int
    """For each hidden unit."""
    sums: tuple[int, ...]
    """How many terms each product has, one after another."""

    def launch(self) -> tuple[tuple[int, int], dict[str, Any]]:
        """The grid and the constants of a launch."""
        gpu, rows = launch.gpu_of(self.x), self.x.shape[0]
        key = tuning.Key(dtype_name(self.x), (self.hidden, *self.sums), form=(self.columns,), positions=rows)
        chosen = tuning.pick(f"recurrent/triton_gates/{self.kernel}", key, list(self._candidates(gpu)), gpu)
        even = not any(size % chosen["BLOCK_K"] for size in self.sums) and self.hidden % chosen["BLOCK_H"] == 0
        constants: dict[str, Any] = {
            **chosen,
            "EVEN": even,
            "VECTOR": 1 if even or self.hidden % 16 or any(size % 16 for size in self.sums) else 16,
            "PRECISION": launch.precision(self.x),
        }
        return (-(-self.hidden // chosen["BLOCK_H"]), -(-rows // chosen["BLOCK_N"])), constants

    def _candidates(self, gpu: Gpu) -> Iterator[tuning.Config]:
        exact = self.x.dtype is torch.float32 and launch.precision(self.x) == "ieee"
        rows = min(max(16, _power_of_two(self.x.shape[0])), 64)
        # What exact float32 products sum over stands in registers.
        depths = [depth for depth in ((32, 16) if exact else (256, 128, 64, 32)) if depth < 2 * max(self.sums)] or [16]
        depths.sort(key=lambda depth: any(size % depth for size in self.sums))
        # Half of the multiprocessors at least should share the reading of the weights, or as many as there can be.
        widths = [width for width in (64, 32, 16) if rows * width <= 2048]
        busy = [width for width in widths if 2 * (self.hidden * self.columns // width) >= gpu.processors]
        for width in busy + [width for width in reversed(widths) if width not in busy]:
            for depth in depths[:2]:
                for stages in (4, 2):
                    if stages * (rows + width) * depth * self.x.element_size() <= gpu.shared_bytes:
                        yield {
                            "BLOCK_N": rows,
                            "BLOCK_H": width // self.columns,
                            "BLOCK_K": depth,
                            "num_warps": 4,
                            "num_stages": stages,
                        }
                        break


def _power_of_two(size: int) -> int:
    """The least one that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


@launch.custom_op(
    "recurrent_step(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? bias, Tensor? h, Tensor? c) -> (Tensor h_n, Tensor c_n)"
)
def _step(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    (n, features), hidden, gates = x.shape, w_hh.shape[1], layer.gates_of(w_hh)
    h_n = x.new_empty(n, hidden)
    c_n = x.new_empty((n, hidden) if gates == 4 else 0)
    grid, constants = Products("step", x, hidden, columns=gates, sums=(features, hidden)).launch()
    launch.triton(
        "recurrent.triton_gates_kernels:step",
        grid,
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
        **constants,
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
