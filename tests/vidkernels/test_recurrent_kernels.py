"""The recurrent kernels in Triton beyond the contract: several blocks, every configuration, carried state, extremes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vidkernels import OPS, Inputs, Unavailable, launch, lstm, tuning
from vidkernels.checking import check, compare, oracle, relative_error, run

OP_NAMES = ("rnn", "lstm")
NAMES = ("triton_block", "triton_gates")
BOTH = pytest.mark.parametrize(("op_name", "name"), [(op, name) for op in OP_NAMES for name in NAMES])


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """fp32 means fp32, unless a test says otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _inputs(
    op_name: str, *, n: int = 2, frames: int = 2, features: int = 5, hidden: int = 7, state: bool = True
) -> Inputs:
    op = OPS[op_name]
    case = op.case({"batch_size": n, "clip_length": frames, "input_features": features, "hidden_size": hidden})
    made = op.inputs(case)
    if not state:
        return made
    generator = torch.Generator().manual_seed(2)
    h, c = (torch.randn(n, hidden, generator=generator) * 0.5 for _ in range(2))
    return Inputs((*made.args, (h, c) if op_name == "lstm" else h), made.kwargs)


def _fn(op_name: str, name: str) -> Callable[..., Any]:
    return OPS[op_name][name].fn


def _assert_exact(op_name: str, name: str, inputs: Inputs, dtype: str = "fp32") -> None:
    op = OPS[op_name]
    case = op.case({}, dtype=dtype, training=True)
    want = oracle(op, case, inputs, gradients=True)
    assert not compare(op, run(_fn(op_name, name), inputs, gradients=True), want).failures(op, case)


@pytest.mark.parametrize(("dtype", "hidden"), [("fp32", 40), ("fp16", 20)])
@BOTH
def test_several_blocks_of_rows_and_units(op_name: str, name: str, hidden: int, dtype: str) -> None:
    rows = 3 if (name, dtype) == ("triton_block", "fp32") else 19  # there, each row is a block
    values = {"batch_size": rows, "clip_length": 2, "input_features": 9, "hidden_size": hidden}
    case = OPS[op_name].case(values, dtype=dtype, training=True)
    assert not check(OPS[op_name], name, case).failures(OPS[op_name], case)


@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [
        ("triton_block", "fp32", "sm_90"),
        ("triton_block", "tf32", "sm_90"),
        ("triton_block", "fp16", "sm_80"),
        ("triton_gates", "fp32", "sm_90"),
        pytest.param("triton_gates", "tf32", "sm_90", marks=pytest.mark.slow),
        pytest.param("triton_gates", "fp16", "sm_80", marks=pytest.mark.slow),
    ],
)
def test_every_configuration(name: str, dtype: str, target: str) -> None:
    """Forward and backward with each that a GPU may be given; the interpreter multiplies tf32 as fp32."""
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    inputs = _inputs("lstm", hidden=20)
    if dtype == "fp16":
        inputs = inputs.map(Tensor.half)
    op = OPS["lstm"]
    case = op.case({}, dtype="fp16" if dtype == "fp16" else "fp32", training=True)
    want = oracle(op, case, inputs, gradients=True)
    with launch.assume(launch.TARGETS[target]):
        with tuning.watching() as choices:
            run(_fn("lstm", name), inputs, gradients=True)
        forward, backward = choices
        for choice in choices:
            assert 2 <= len(choice.candidates) <= 8
        rounds = max(len(_distinct(forward)), len(_distinct(backward)))
        for i in range(rounds):
            one, other = (found[min(i, len(found) - 1)] for found in (_distinct(forward), _distinct(backward)))
            with tuning.forced(forward.kernel, forward.key, one), tuning.forced(backward.kernel, backward.key, other):
                got = run(_fn("lstm", name), inputs, gradients=True)
            assert not compare(op, got, want).failures(op, case), (one, other)


def _distinct(choice: tuning.Chosen) -> list[tuning.Config]:
    """The candidates that the interpreter tells apart: it knows neither warps nor stages."""
    blocks = {tuple((k, v) for k, v in config.items() if k.startswith("BLOCK")): config for config in choice.candidates}
    return list(blocks.values())


@pytest.mark.parametrize("only", ["y", "h", "c"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_one_output_alone(name: str, only: str) -> None:
    """The kernels are told which gradients there are: none is read that is not there."""
    inputs = _inputs("lstm")

    def pick(*args: Any, implementation: str = name, **kwargs: Any) -> Tensor:
        y, (h, c) = OPS["lstm"][implementation].fn(*args, **kwargs)
        return {"y": y, "h": h, "c": c}[only]

    def reference(*args: Any, **kwargs: Any) -> Tensor:
        return pick(*args, implementation="reference", **kwargs)

    got = run(pick, inputs, gradients=True)
    want = run(reference, inputs.map(Tensor.double), gradients=True, noise_dtype=torch.float32)
    for gradient, exact in zip(got.gradients, want.gradients, strict=True):
        assert gradient is not None
        assert exact is not None
        assert relative_error(gradient, exact) < 1e-6


@BOTH
def test_gradients_are_exact_with_a_given_state(op_name: str, name: str) -> None:
    _assert_exact(op_name, name, _inputs(op_name))


@pytest.mark.parametrize("wanted", [2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_only_where_wanted(name: str, wanted: int) -> None:
    inputs = _inputs("lstm")
    leaves = inputs.tensors()
    leaves[wanted].requires_grad_()
    y, _ = _fn("lstm", name)(*inputs.args)
    y.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(len(leaves))]
    alone = leaves[wanted].grad
    for leaf in leaves:
        leaf.requires_grad_().grad = None
    y, _ = _fn("lstm", name)(*inputs.args)
    y.sum().backward()
    torch.testing.assert_close(alone, leaves[wanted].grad, rtol=0, atol=0)


@BOTH
def test_runs_repeat_bit_for_bit(op_name: str, name: str) -> None:
    one, other = (run(_fn(op_name, name), _inputs(op_name), gradients=True) for _ in range(2))
    assert all(map(torch.equal, one.outputs, other.outputs))
    assert all(map(torch.equal, one.gradients, other.gradients))


@pytest.mark.parametrize("return_sequence", [True, False])
@BOTH
def test_without_gradients_the_results_are_the_same(op_name: str, name: str, return_sequence: bool) -> None:
    made = _inputs(op_name)
    inputs = Inputs(made.args, {"return_sequence": return_sequence})
    one, other = (run(_fn(op_name, name), inputs, gradients=g).outputs for g in (False, True))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("state", [True, False])
@BOTH
def test_a_step_is_a_frame_of_the_clip(op_name: str, name: str, state: bool) -> None:
    inputs = _inputs(op_name, frames=3, features=9, hidden=20, state=state)
    x, *weights = inputs.args[:4]
    carried = inputs.args[4] if state else None
    step = OPS[op_name][name].step
    assert step is not None
    want, after = _fn(op_name, name)(*inputs.args)
    outputs = []
    for x_t in x.split(1, dim=1):
        y, carried = step(x_t, *weights, carried)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), want)
    torch.testing.assert_close(carried, after)
    last, _ = step(x[:, :1], *weights, return_sequence=False)
    assert last.shape == (2, 20)


@BOTH
def test_a_step_differentiates(op_name: str, name: str) -> None:
    inputs = _inputs(op_name, frames=1)
    got, want = (run(OPS[op_name][i].step, inputs, gradients=True) for i in (name, "reference"))  # type: ignore[arg-type]
    torch.testing.assert_close(got.gradients, want.gradients)


@pytest.mark.parametrize(("name", "launches"), [("triton_block", 1), ("triton_gates", 6)])
def test_launches_of_a_clip_and_of_a_step(name: str, launches: int) -> None:
    x, w_ih, w_hh = (torch.empty(shape, device="meta") for shape in ((2, 6, 5), (64, 5), (64, 16)))
    with launch.recording(launch.TARGETS["sm_90"]) as recorded:
        _fn("lstm", name)(x, w_ih, w_hh)
    assert len(recorded) == launches
    with launch.recording(launch.TARGETS["sm_90"]) as recorded, torch.no_grad():
        OPS["lstm"][name].step(x[:, :1], w_ih, w_hh)  # type: ignore[misc]
    assert len(recorded) == 1


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("scale", [1e-5, 1e4])
@BOTH
def test_tiny_and_huge_features(op_name: str, name: str, scale: float) -> None:
    """Nothing becomes NaN where gates saturate, and tanh keeps its relative error near 0."""
    made = _inputs(op_name, state=False)
    x, w_ih, w_hh, _ = made.args
    y, _ = _fn(op_name, name)(x * scale, w_ih, w_hh)
    want, _ = _fn(op_name, "reference")(x.double() * scale, w_ih.double(), w_hh.double())
    assert relative_error(y, want) < 2e-6
    assert y.abs().max() <= 1


@pytest.mark.parametrize(
    ("op_name", "name"),
    [pytest.param(op, name, marks=[pytest.mark.slow] if op == "rnn" else []) for op in OP_NAMES for name in NAMES],
)
def test_compiles_to_one_graph(op_name: str, name: str) -> None:
    fn = _fn(op_name, name)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    inputs = _inputs(op_name)
    got, want = (run(f, inputs, gradients=True) for f in (compiled, fn))
    torch.testing.assert_close(got.outputs, want.outputs)
    torch.testing.assert_close(got.gradients, want.gradients)
    torch.testing.assert_close(run(compiled, inputs).outputs, want.outputs)


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("recurrent_block", 1),
        pytest.param("recurrent_block", 4, marks=pytest.mark.slow),
        pytest.param("recurrent_gates", 1, marks=pytest.mark.slow),
        ("recurrent_gates", 4),
    ],
)
def test_the_recurrence_is_a_sound_custom_op(name: str, gates: int) -> None:
    op = getattr(torch.ops.vidkernels, name)
    products, w_hh, h, c = (
        torch.randn(shape, requires_grad=True) for shape in ((2, 2, gates * 3), (gates * 3, 3), (2, 3), (2, 3))
    )
    state = (h, c) if gates == 4 else (h, None)
    torch.library.opcheck(op, (products, w_hh, *state, True, True))
    torch.library.opcheck(op, (products.detach(), w_hh.detach(), None, None, False, False))
    _, _, _, activated, cells = op(products, w_hh, *state, True, True)
    grads = (torch.randn(2, 2, 3), None, torch.randn(2, 3) if gates == 4 else None)
    backward = getattr(torch.ops.vidkernels, f"{name}_backward")
    torch.library.opcheck(backward, (*grads, w_hh.detach(), activated.detach(), cells.detach()))


def test_the_step_is_a_sound_custom_op() -> None:
    x, w_ih, w_hh, h, c = (torch.randn(shape) for shape in ((2, 5), (12, 5), (12, 3), (2, 3), (2, 3)))
    torch.library.opcheck(torch.ops.vidkernels.recurrent_step, (x, w_ih, w_hh, None, h, c))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_features_weights_and_state(name: str) -> None:
    inputs = _inputs("lstm")
    with torch.autocast("cpu", torch.float16):
        got = run(_fn("lstm", name), inputs, gradients=True)
    assert {output.dtype for output in got.outputs} == {torch.float16}
    assert {gradient.dtype for gradient in got.gradients if gradient is not None} == {torch.float32}
    want = run(_fn("lstm", name), inputs.map(Tensor.half))
    torch.testing.assert_close(got.outputs, want.outputs, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_must_agree(name: str) -> None:
    x, *weights = _inputs("lstm", state=False).args
    with pytest.raises(ValueError, match=r"one dtype, not torch\.float16, torch\.float32"):
        lstm(x.half(), *weights, implementation=name)


def test_the_limit_of_a_block_is_told() -> None:
    x, w_ih, w_hh = (torch.zeros(shape) for shape in ((1, 1, 2), (4 * 65, 2), (4 * 65, 65)))
    with pytest.raises(
        Unavailable, match=r"hidden_size=65: W_hh in fp32 stays on chip up to 64; available: .*triton_gates"
    ):
        lstm(x, w_ih, w_hh, implementation="triton_block")
