"""Recurrence of up to 512 hidden units: one launch for a clip, W_hh spread over the blocks of a cluster.

Persistent recurrent kernels after Diamos et al. (2016), "Persistent RNNs: stashing recurrent weights on-chip", ICML,
§3; the blocks exchange h through distributed shared memory instead of global memory, behind one cluster barrier per
frame. CUDA C++ Programming Guide 13, "Thread block clusters", "Distributed shared memory".
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import c_int

import torch
from torch import Tensor

from vidkernels import cuda_source, launch, tuning
from vidkernels.launch import TARGETS, Gpu
from vidkernels.op import dtype_name
from vidkernels.recurrent import layer
from vidkernels.recurrent.case import LSTM, RNN, LstmState, RecurrentCase
from vidkernels.recurrent.triton_frame import lstm_step, rnn_step

_ROWS = 16
"""Batch rows of a cluster: the M of a matrix instruction."""
_SCALARS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
_OTHER_REGISTERS = 112
"""What a thread needs besides its weights, as compiled for sm_90 and sm_100."""


def _limits(gates: int, case: RecurrentCase) -> str | None:
    if why := launch.dtype_refusal(case, "fp16", "bf16"):
        return why
    hidden = case.hidden_size
    multiple = 128 // gates
    if hidden % multiple:
        return f"hidden_size={hidden} is no multiple of {multiple}"
    if any(not list(_candidates(kernel, hidden, gates, 1, TARGETS["sm_90"])) for kernel in ("forward", "backward")):
        return f"hidden_size={hidden}: W_hh does not fit a cluster of 8 blocks"
    return None


def _candidates(kernel: str, hidden: int, gates: int, rows: int, gpu: Gpu) -> Iterator[tuning.Config]:
    """Blocks of a cluster, and how many groups of 32 terms of W_hh a thread keeps in registers."""
    # Fewer, larger blocks exchange less; more, smaller ones are faster while the GPU has room for them.
    crowded = -(-rows // _ROWS) * 8 > 2 * gpu.processors
    for cluster in (4, 8) if crowded else (8, 4):
        units = hidden // cluster
        threads = 4 * units
        if gpu.capability < 90 or hidden % (8 * cluster) or threads > 512 or gates * units % 32:
            continue
        groups, tiles = (hidden // 32, gates) if kernel == "forward" else (gates * units // 32, cluster)
        # Each quarter of a multiprocessor has registers for 512 threads of 32, whole warps of them.
        warps = -(-threads // 128)
        registers = min(255, 512 // warps // 8 * 8) - _OTHER_REGISTERS
        kept = min(groups, registers // (4 * tiles))
        if kept >= 1 and _shared_bytes(kernel, hidden, gates, cluster, kept) <= gpu.shared_bytes:
            yield {"CLUSTER": cluster, "KEPT": kept}


def _shared_bytes(kernel: str, hidden: int, gates: int, cluster: int, kept: int) -> int:
    """As cuda_cluster.cu lays it out: h twice, or parts of dh twice and the gates' gradients; then W_hh's rest."""
    units = hidden // cluster
    if kernel == "forward":
        state, groups, tiles = 2 * _ROWS * _pitch(hidden) * 2, hidden // 32, gates
    else:
        state = 2 * cluster * _ROWS * units * 4 + _ROWS * _pitch(gates * units) * 2
        groups, tiles = gates * units // 32, cluster
    return state + units // 8 * (groups - kept) * tiles * 512


def _pitch(columns: int) -> int:
    return -(-columns // 64) * 64 + 32


def _run(kernel: str, w_hh: Tensor, n: int, *args: Tensor | c_int | None) -> None:
    gpu, hidden, gates = launch.gpu_of(w_hh), min(w_hh.shape), max(w_hh.shape) // min(w_hh.shape)
    key = tuning.Key(dtype_name(w_hh), sizes=(hidden,), form=(gates,), positions=n)
    config = tuning.pick(f"recurrent/cuda_cluster/{kernel}", key, list(_candidates(kernel, hidden, gates, n, gpu)), gpu)
    cluster = config["CLUSTER"]
    cuda_source.cuda(
        f"recurrent/cuda_cluster.cu:{kernel}",
        (-(-n // _ROWS) * cluster, 1, 1),
        *args,
        block=4 * hidden // cluster,
        cluster=cluster,
        shared_bytes=_shared_bytes(kernel, hidden, gates, **{k.lower(): v for k, v in config.items()}),
        BACKWARD=int(kernel == "backward"),
        SCALAR=_SCALARS[w_hh.dtype],
        GATES=gates,
        HIDDEN=hidden,
        **config,
    )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that begins in the middle of 16 bytes, which are read at once."""
    return tensor if tensor.storage_offset() % 8 == 0 else tensor.clone()


@launch.custom_op("recurrent_cluster" + layer.SIGNATURE)
def _forward(
    products: Tensor, w_hh: Tensor, h: Tensor | None, c: Tensor | None, sequence: bool, train: bool
) -> tuple[Tensor, ...]:
    (n, frames, _), hidden, gates = products.shape, w_hh.shape[1], layer.gates_of(w_hh)
    y = products.new_empty((n, frames, hidden) if sequence else 0)
    h_n = products.new_empty(n, hidden)
    c_n = products.new_empty((n, hidden) if gates == 4 else 0)
    # Within ±1, float16 is eight times closer than bfloat16.
    activated = products.new_empty(products.shape if train else 0, dtype=torch.float16)
    cells = products.new_empty((n, frames, hidden) if train and gates == 4 else 0)
    _run(
        "forward",
        w_hh,
        n,
        products,
        _aligned(w_hh),
        None if h is None else _aligned(h),
        None if c is None else _aligned(c),
        y if sequence else None,
        h_n,
        c_n,
        activated if train else None,
        cells,
        c_int(n),
        c_int(frames),
    )
    return y, h_n, c_n, activated, cells


@launch.custom_op("recurrent_cluster_backward" + layer.BACKWARD_SIGNATURE)
def _backward(
    grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, w_hh: Tensor, activated: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor]:
    (n, frames, _), hidden, gates = activated.shape, w_hh.shape[1], layer.gates_of(w_hh)
    grad_products = w_hh.new_empty(activated.shape)
    grad_c_0 = w_hh.new_empty((n, hidden) if gates == 4 else 0)
    grad_y, grad_h, grad_c = (
        None if grad is None else _aligned(grad.contiguous()) for grad in (grad_y, grad_h, grad_c)
    )
    transposed = w_hh.t().contiguous()
    _run(
        "backward",
        transposed,
        n,
        grad_y,
        grad_h,
        grad_c,
        transposed,
        activated,
        cells,
        grad_products,
        grad_c_0,
        c_int(n),
        c_int(frames),
    )
    return grad_products, grad_c_0


layer.differentiate(_forward, _backward)


def rnn(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, Tensor]:
    """The RNN with one launch for all frames, its hidden units spread over a cluster.

    Args:
        x: Features, (N, T, F), in 16 bits.
        w_ih: (H, F).
        w_hh: (H, H), H a multiple of 128.
        bias: (H,), or None.
        state: h before the first frame, (N, H); None: zeros.
        return_sequence: Outputs of every frame, not of the last alone.

    Returns:
        y, (N, T, H) or (N, H), and the last h, (N, H); dtype of x.

    Raises:
        ValueError: Dtypes differ.

    Source: Elman (1990), Cognitive Science 14(2); Diamos et al. (2016), ICML, §3.
    """
    return layer.rnn(_forward, x, w_ih, w_hh, bias, state, return_sequence)


def lstm(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    bias: Tensor | None = None,
    state: LstmState | None = None,
    *,
    return_sequence: bool = True,
) -> tuple[Tensor, LstmState]:
    """The LSTM with one launch for all frames, its hidden units spread over a cluster; c stays in float32 on chip.

    Args:
        x: Features, (N, T, F), in 16 bits.
        w_ih: (4·H, F), rows in the order i, f, g, o.
        w_hh: (4·H, H), likewise, H a multiple of 32.
        bias: (4·H,), or None.
        state: (h, c) before the first frame, (N, H) each; None: zeros.
        return_sequence: Outputs of every frame, not of the last alone.

    Returns:
        y, (N, T, H) or (N, H), and the last (h, c), (N, H) each; dtype of x.

    Raises:
        ValueError: Dtypes differ.

    Source: Hochreiter & Schmidhuber (1997), Neural Computation 9(8); Diamos et al. (2016), ICML, §3.
    """
    return layer.lstm(_forward, x, w_ih, w_hh, bias, state, return_sequence)


def _lstm_limits(case: RecurrentCase) -> str | None:
    return _limits(4, case)


def _rnn_limits(case: RecurrentCase) -> str | None:
    return _limits(1, case)


_NEEDS = ("cuda_core", "sm_90")
RNN.implementation("cuda_cluster", requires=_NEEDS, limits=_rnn_limits, step=rnn_step(rnn))(rnn)
LSTM.implementation("cuda_cluster", requires=_NEEDS, limits=_lstm_limits, step=lstm_step(lstm))(lstm)
