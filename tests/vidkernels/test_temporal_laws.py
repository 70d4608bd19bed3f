"""Laws of the ops over time that hold without the reference: causality, streaming, and torch's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract_cases import TYPICAL, implementations
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from vidkernels import OPS, Inputs, WeightNorm, causal_conv1d, lstm, rnn, tcn_block
from vidkernels.checking import relative_error, run

TEMPORAL = [p for name in ("causal_conv1d", "tcn_block", "rnn", "lstm") for p in implementations(OPS[name])]
STREAMED = [p for name in ("causal_conv1d", "tcn_block", "rnn", "lstm") for p in implementations(OPS[name], step=True)]


EXACT = ("fp64", "fp32", "fp16")
ROUNDED = ("bf16", "fp16")


def _case_inputs(op_name: str, name: str, dtypes: tuple[str, ...] = EXACT, **values: Any) -> Inputs:
    """Inputs of the first of some dtypes that the implementation takes."""
    op, why = OPS[op_name], None
    for dtype in dtypes:
        case = op.case({**TYPICAL[op_name], **values}, dtype=dtype)
        why = op[name].why_not(case, "cpu")
        if why is None:
            return op.inputs(case)
    pytest.skip(str(why))


def _time(op_name: str) -> int:
    return 1 if op_name in ("rnn", "lstm") else 2


def _sequence(op_name: str, name: str, inputs: Inputs) -> Tensor:
    result = OPS[op_name][name].fn(*inputs.args, **inputs.kwargs)
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize(("op_name", "name"), TEMPORAL)
def test_the_future_changes_nothing(op_name: str, name: str) -> None:
    dilation = {"dilation": 2} if _time(op_name) == 2 else {}
    inputs = _case_inputs(op_name, name, clip_length=9, **dilation)
    axis = _time(op_name)
    x = inputs.args[0].clone()
    x.narrow(axis, 5, 4).fill_(float("nan"))
    changed = Inputs((x, *inputs.args[1:]), inputs.kwargs)
    got, want = _sequence(op_name, name, changed), _sequence(op_name, name, inputs)
    torch.testing.assert_close(got.narrow(axis, 0, 5), want.narrow(axis, 0, 5))
    assert got.narrow(axis, 5, 4).isnan().any()


@pytest.mark.parametrize(("op_name", "name"), TEMPORAL)
def test_a_clip_is_its_own_batch(op_name: str, name: str) -> None:
    inputs = _case_inputs(op_name, name)
    whole = _sequence(op_name, name, inputs)
    for n in range(whole.shape[0]):
        alone = Inputs((inputs.args[0][n : n + 1], *inputs.args[1:]), inputs.kwargs)
        torch.testing.assert_close(_sequence(op_name, name, alone), whole[n : n + 1])


@pytest.mark.parametrize("dtypes", [EXACT, ROUNDED], ids=["exact", "rounded"])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize(("op_name", "name"), STREAMED)
def test_streaming_is_the_whole_clip(op_name: str, name: str, chunk: int, dtypes: tuple[str, ...]) -> None:
    dilation = {"dilation": 2} if _time(op_name) == 2 else {}
    inputs = _case_inputs(op_name, name, dtypes, clip_length=9, **dilation)
    axis, step, state, outputs = _time(op_name), OPS[op_name][name].step, None, []
    assert step is not None
    for x_t in inputs.args[0].split(chunk, axis):
        y_t, state = step(x_t, *inputs.args[1:], state=state, **inputs.kwargs)
        assert y_t.shape[axis] == chunk
        outputs.append(y_t)
    # The state is rounded to x's dtype between two calls.
    error = relative_error(torch.cat(outputs, axis), _sequence(op_name, name, inputs))
    assert error < {torch.float64: 1e-12, torch.float32: 1e-6}.get(inputs.args[0].dtype, 1e-2)


@pytest.mark.parametrize("name", ["reference", "library"])
def test_streaming_needs_no_memory_for_one_tap(name: str) -> None:
    inputs = _case_inputs("causal_conv1d", name, kernel_size=1)
    step = OPS["causal_conv1d"][name].step
    assert step is not None
    y, state = step(*inputs.args, **inputs.kwargs)
    assert state.shape[2] == 0
    torch.testing.assert_close(y, _sequence("causal_conv1d", name, inputs))


@pytest.mark.parametrize(("op_name", "name"), implementations(OPS["causal_conv1d"]))
def test_causal_linear_and_shift_equivariant(op_name: str, name: str) -> None:
    inputs = _case_inputs(op_name, name, bias=False, dilation=2)
    x, weight, _ = inputs.args
    fn = OPS[op_name][name].fn
    y = fn(x, weight, **inputs.kwargs)
    torch.testing.assert_close(fn(-2 * x, weight, **inputs.kwargs), -2 * y)
    torch.testing.assert_close(fn(F.pad(x, (3, 0)), weight, **inputs.kwargs), F.pad(y, (3, 0)))


@pytest.mark.parametrize(("op_name", "name"), implementations(OPS["causal_conv1d"]))
def test_the_last_tap_meets_the_present_frame(op_name: str, name: str) -> None:
    x = torch.zeros(1, 1, 6)
    x[0, 0, 1] = 1.0
    weight = torch.tensor([[[2.0, 3.0, 5.0]]])
    y = OPS[op_name][name].fn(x, weight, dilation=2)
    assert y.flatten().tolist() == [0.0, 5.0, 0.0, 3.0, 0.0, 2.0]


def _residual_block(inputs: Inputs, dilation: int) -> nn.Module:
    """The block of Bai et al. as they build it: padding at both ends, the surplus cut off."""
    _, w1, b1, w2, b2, w_down, b_down = inputs.args
    taps = w1.v.shape[2]

    class Chomp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :, : -(taps - 1) * dilation]

    def convolution(w: WeightNorm, b: Tensor) -> nn.Module:
        out, inp, _ = w.v.shape
        layer = weight_norm(nn.Conv1d(inp, out, taps, padding=(taps - 1) * dilation, dilation=dilation).double(), dim=0)
        with torch.no_grad():
            layer.parametrizations.weight.original0.copy_(w.g)
            layer.parametrizations.weight.original1.copy_(w.v)
            layer.bias.copy_(b)
        return layer

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(convolution(w1, b1), Chomp(), nn.ReLU(), convolution(w2, b2), Chomp(), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.net(x) + (x if w_down is None else F.conv1d(x, w_down, b_down)))

    return Block()


@pytest.mark.parametrize("out_channels", [5, 7], ids=["equal widths", "downsample"])
@pytest.mark.parametrize(("op_name", "name"), implementations(OPS["tcn_block"]))
def test_block_is_that_of_the_authors(op_name: str, name: str, out_channels: int) -> None:
    inputs = _case_inputs(op_name, name, out_channels=out_channels, dilation=2, clip_length=8)
    block = _residual_block(inputs, dilation=2).to(inputs.args[0].dtype)
    torch.testing.assert_close(_sequence(op_name, name, inputs), block(inputs.args[0]).detach())


@pytest.mark.parametrize(("op_name", "name"), implementations(OPS["tcn_block"]))
def test_block_depends_on_its_receptive_field(op_name: str, name: str) -> None:
    """1 + 2·(K−1)·d frames, no fewer and no more."""
    inputs = _case_inputs(op_name, name, dilation=3, clip_length=20, kernel_size=3)
    x = inputs.args[0].clone().requires_grad_()
    y = OPS[op_name][name].fn(x, *inputs.args[1:], **inputs.kwargs)
    (gradient,) = torch.autograd.grad(y[:, :, -1].sum(), x)
    reached = gradient.abs().sum((0, 1)).nonzero().flatten()
    assert reached.min() == 20 - (1 + 2 * 2 * 3)
    assert reached.max() == 19


@pytest.mark.parametrize(("op_name", "name"), implementations(OPS["tcn_block"]))
def test_dropout_acts_in_training_alone(op_name: str, name: str) -> None:
    """Of the second half's outputs, p are dropped and the others grow by 1/(1−p)."""
    x = torch.zeros(4, 8, 125)
    w1, b = torch.zeros(8, 8, 1), torch.ones(8)
    call = {"dilation": 1, "dropout_p": 0.25, "implementation": name}
    if why := OPS[op_name][name].why_not(OPS[op_name].case({}), "cpu"):
        pytest.skip(why)
    torch.manual_seed(0)
    y = tcn_block(x, w1, b, w1, b, training=True, **call)  # type: ignore[arg-type]
    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / 0.75))
    torch.testing.assert_close(tcn_block(x, w1, b, w1, b, **call), torch.ones_like(y))  # type: ignore[arg-type]


def _dtype(op_name: str, name: str) -> torch.dtype:
    """The first of float64 and float32 that the implementation takes."""
    sizes = {"clip_length": 5, "input_features": 4, "hidden_size": 6}
    dtype: torch.dtype = _case_inputs(op_name, name, ("fp64", "fp32"), **sizes).args[0].dtype
    return dtype


def _cell_inputs(
    gates: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((3, 5, 4), (gates * 6, 4), (gates * 6, 6), (gates * 6,), (3, 6), (3, 6))
    x, w_ih, w_hh, bias, h, c = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return x, w_ih, w_hh, bias, h, c


def _load(cell: nn.RNNCellBase, w_ih: Tensor, w_hh: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        cell.weight_ih.copy_(w_ih)
        cell.weight_hh.copy_(w_hh)
        cell.bias_ih.copy_(bias)
        cell.bias_hh.zero_()


@pytest.mark.parametrize(("op_name", "name"), implementations(OPS["lstm"]))
def test_lstm_is_a_loop_over_torch_cells(op_name: str, name: str) -> None:
    x, w_ih, w_hh, bias, h, c = _cell_inputs(gates=4, dtype=_dtype(op_name, name))
    cell = nn.LSTMCell(4, 6).to(x.dtype)
    _load(cell, w_ih, w_hh, bias)
    y, (h_n, c_n) = lstm(x, w_ih, w_hh, bias, (h, c), implementation=name)
    with torch.no_grad():
        for t in range(5):
            h, c = cell(x[:, t], (h, c))
            torch.testing.assert_close(y[:, t], h)
    torch.testing.assert_close((h_n, c_n), (h, c))


@pytest.mark.parametrize(("op_name", "name"), implementations(OPS["rnn"]))
def test_rnn_is_a_loop_over_torch_cells(op_name: str, name: str) -> None:
    x, w_ih, w_hh, bias, h, _ = _cell_inputs(gates=1, dtype=_dtype(op_name, name))
    cell = nn.RNNCell(4, 6).to(x.dtype)
    _load(cell, w_ih, w_hh, bias)
    y, h_n = rnn(x, w_ih, w_hh, bias, h, implementation=name)
    with torch.no_grad():
        for t in range(5):
            h = cell(x[:, t], h)
            torch.testing.assert_close(y[:, t], h)
    torch.testing.assert_close(h_n, h)


@pytest.mark.parametrize(("op_name", "name"), [*implementations(OPS["rnn"]), *implementations(OPS["lstm"])])
def test_gradients_flow_to_the_initial_state(op_name: str, name: str) -> None:
    x, w_ih, w_hh, bias, h, c = _cell_inputs(4 if op_name == "lstm" else 1, _dtype(op_name, name))
    state = (h, c) if op_name == "lstm" else h
    inputs = Inputs((x, w_ih, w_hh, bias, state))
    got, want = (run(OPS[op_name][i].fn, inputs, gradients=True) for i in (name, "reference"))
    assert len(want.gradients) == len(inputs.tensors())
    assert all(gradient is not None for gradient in want.gradients)
    torch.testing.assert_close(got.gradients, want.gradients)


@pytest.mark.parametrize(("op_name", "name"), [*implementations(OPS["rnn"]), *implementations(OPS["lstm"])])
def test_many_to_one_is_the_last_frame(op_name: str, name: str) -> None:
    inputs = _case_inputs(op_name, name)
    fn = OPS[op_name][name].fn
    whole, state = fn(*inputs.args, return_sequence=True)
    last, same = fn(*inputs.args, return_sequence=False)
    torch.testing.assert_close(last, whole[:, -1])
    torch.testing.assert_close(same, state)


def test_forget_gate_keeps_the_cell() -> None:
    """Input gate shut and forget gate open: the memory is what it was."""
    x, w_ih, w_hh, _, h, c = _cell_inputs(gates=4)
    shut, still = torch.full((6,), -1e3, dtype=x.dtype), torch.zeros(6, dtype=x.dtype)
    bias = torch.cat((shut, -shut, still, still))
    for name in ("reference", "library"):
        _, (_, kept) = lstm(x, 0 * w_ih, 0 * w_hh, bias, (h, c), implementation=name)
        torch.testing.assert_close(kept, c)


def test_16_bit_reference_carries_its_state_in_float32() -> None:
    """Over 200 frames its error stays that of one rounding."""
    op = OPS["lstm"]
    case = op.case({"clip_length": 200, "input_features": 8, "hidden_size": 8}, dtype="bf16")
    inputs = op.inputs(case)
    exact = inputs.map(lambda tensor: tensor.double())
    got, want = _sequence("lstm", "reference", inputs), _sequence("lstm", "reference", exact)
    assert relative_error(got, want) < 2e-3


def test_a_clip_stored_frame_by_frame() -> None:
    """(N, T, C) features seen as (N, C, T), as a 2D network before a TCN yields them."""
    inputs = _case_inputs("causal_conv1d", "library")
    x, weight, bias = inputs.args
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(causal_conv1d(transposed, weight, bias), causal_conv1d(x, weight, bias))
