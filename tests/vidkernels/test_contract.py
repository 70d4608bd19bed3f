"""Every op × implementation × awkward case, forward and gradients, against float64 with the op's own tolerances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from contract_cases import AWKWARD, TYPICAL
from torch import Tensor

from vidkernels import OPS, Inputs, Op
from vidkernels.checking import compare, oracle, run
from vidkernels.op import TOLERANCES, Case

DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16")
LAYOUTS = ("sliced", "channels_last")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


SAMPLE = ("odd sizes", "strided", "dilated")
"""Cases that stand for all where all would take too long."""


def _parameters(compiled: bool) -> Iterator[Any]:
    """What compiles takes seconds a case: a few of them, and one of them among the fast tests."""
    for op in OPS.values():
        for name in op.implementations:
            if (name == "compiled") != compiled:
                continue
            slow = [pytest.mark.slow] if compiled else []
            chosen = list(AWKWARD[op.name].items())
            dtypes: tuple[str, ...] = DTYPES
            if compiled:
                chosen = [
                    (what, case) for what, case in chosen if what in ("odd sizes", "strided", "dilated", "no bias")
                ]
                chosen, dtypes = chosen[:2], ("fp32", "bf16")
            for (what, case), dtype in product(chosen, dtypes):
                # tf32 is refused on a CPU: one row tells so.
                if dtype != "tf32" or what in SAMPLE:
                    # Interpreted kernels take seconds: what cases have to tell, fp32 tells, and fp16 the rounding.
                    rare = name.startswith("triton") and dtype == "fp16" and what not in SAMPLE
                    marks = slow or ([pytest.mark.slow] if rare else [])
                    yield pytest.param(op.name, name, case, dtype, id=f"{op.name}-{name}-{what}-{dtype}", marks=marks)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element never written is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """fp32 means fp32: TF32 is on for tf32 alone."""
    tf32 = "dtype" in request.fixturenames and request.getfixturevalue("dtype") == "tf32"
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _require(op: Op, name: str, case: Case, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if why := op[name].why_not(case, device):
        pytest.skip(why)


def _assert_agrees(op: Op, name: str, case: Case, inputs: Inputs) -> None:
    want = oracle(op, case, inputs, gradients=case.training)
    errors = compare(op, run(op[name].fn, inputs, gradients=case.training), want)
    if name == "library":
        # The yardstick: its own rounding passes, but it must be the same function.
        if not errors.output <= 2 * op.tolerances[case.dtype].forward and (why := _wrong_in_torch(op, case, inputs)):
            pytest.xfail(why)
        assert errors.output <= 2 * op.tolerances[case.dtype].forward
        assert not errors.failures(replace(op, tolerances={case.dtype: _TWICE}), case, errors)
        if case.dtype in ("fp16", "bf16"):
            return
    library = compare(op, run(op["library"].fn, inputs, gradients=case.training), want)
    assert not errors.failures(op, case, library)
    if case.dtype in ("fp64", "fp32"):
        # So few elements that none of them lies close enough to a ReLU's kink to change sides.
        assert not errors.failures(replace(op, tolerances=TOLERANCES), case, library)


def _wrong_in_torch(op: Op, case: Any, inputs: Inputs) -> str:
    """Why torch itself is known to be wrong here; empty where it is not."""
    if op.name == "conv3d" and case.dtype == "bf16" and inputs.args[0].device.type == "cpu":
        one_frame = case.clip_length == 1 and case.kernel_size[0] > 1 and case.in_channels < 16
        if one_frame and torch.cpu._is_amx_tile_supported():
            return "oneDNN 3.12 leaves the output unwritten on processors with AMX (pytorch#169688 is of its kind)"
    return ""


_TWICE = replace(TOLERANCES["bf16"], forward=1e-2, weight_gradient=0.2, input_gradient=0.2)


@pytest.mark.usefixtures("poisoned", "arithmetic")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize(("op_name", "name", "values", "dtype"), [*_parameters(compiled=False)])
def test_agrees_with_float64(
    op_name: str, name: str, values: dict[str, Any], dtype: str, training: bool, device: str
) -> None:
    op = OPS[op_name]
    case = op.case(values, dtype=dtype, training=training)
    _require(op, name, case, device)
    _assert_agrees(op, name, case, op.inputs(case, device=device))


@pytest.mark.usefixtures("poisoned", "arithmetic")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op_name", "name", "values", "dtype"), [*_parameters(compiled=True)])
def test_compiled_agrees_with_float64(op_name: str, name: str, values: dict[str, Any], dtype: str, device: str) -> None:
    op = OPS[op_name]
    case = op.case(values, dtype=dtype, training=dtype == "fp32")
    _require(op, name, case, device)
    _assert_agrees(op, name, case, op.inputs(case, device=device))


@pytest.mark.usefixtures("poisoned", "arithmetic")
@pytest.mark.parametrize("op_name", ["depthwise_conv3d"])
def test_a_compiled_op_agrees_with_float64(op_name: str) -> None:
    op = OPS[op_name]
    case = op.case(TYPICAL[op_name], training=True)
    _require(op, "compiled", case, "cpu")
    _assert_agrees(op, "compiled", case, op.inputs(case))


@pytest.mark.usefixtures("poisoned", "arithmetic")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("op_name", "name"),
    [(op.name, name) for op in OPS.values() for name in op.implementations if name != "compiled"],
)
def test_any_layout(op_name: str, name: str, layout: str, training: bool, device: str) -> None:
    op = OPS[op_name]
    if layout == "channels_last" and op_name in ("rnn", "lstm"):
        with pytest.raises(ValueError, match=r"features .* of a recurrent layer are always contiguous"):
            op.case(TYPICAL[op_name], memory_format="channels_last")
        return
    memory_format = "channels_last" if layout == "channels_last" else "contiguous"
    case = op.case(TYPICAL[op_name], memory_format=memory_format, training=training)
    _require(op, name, case, device)
    inputs = op.inputs(case, device=device)
    if layout == "sliced":
        inputs = inputs.map(_sliced)
    assert not inputs.args[0].is_contiguous()
    _assert_agrees(op, name, case, inputs)


def _sliced(tensor: Tensor) -> Tensor:
    """The same values in every other element of a storage that holds NaN between them."""
    gaps = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype, device=tensor.device)
    gaps[..., 1] = tensor
    return gaps[..., 1]


@pytest.mark.parametrize("op_name", list(OPS))
def test_inputs_are_left_as_they_are(op_name: str) -> None:
    """But for running statistics, which only training changes."""
    op = OPS[op_name]
    case = op.case(TYPICAL[op_name])
    for name, implementation in op.implementations.items():
        if name == "compiled" or implementation.why_not(case, "cpu"):
            continue
        inputs, untouched = op.inputs(case), op.inputs(case)
        implementation.fn(*inputs.args, **inputs.kwargs)
        for got, want in zip(inputs.tensors(), untouched.tensors(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("op_name", list(OPS))
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_results_have_the_dtype_of_x(op_name: str, dtype: str) -> None:
    op = OPS[op_name]
    case = op.case(TYPICAL[op_name], dtype=dtype)
    inputs = op.inputs(case)
    for name, implementation in op.implementations.items():
        if name != "compiled" and implementation.why_not(case, "cpu") is None:
            assert {y.dtype for y in run(implementation.fn, inputs).outputs} == {inputs.args[0].dtype}


@pytest.mark.parametrize("op_name", list(OPS))
def test_gradcheck(op_name: str) -> None:
    """Gradients of the reference and the library against finite differences of themselves."""
    op = OPS[op_name]
    shrink = {"in_channels": 2, "out_channels": 3, "height": 3, "width": 3, "clip_length": 3, "input_features": 2}
    values = {**TYPICAL[op_name], **{k: v for k, v in shrink.items() if k in TYPICAL[op_name]}}
    case = op.case(values, dtype="fp64", training=True)
    for name in ("reference", "library"):
        inputs = op.inputs(case)
        wanted = [t for t, g in zip(inputs.tensors(), _flows(op, name, inputs), strict=True) if g]
        for tensor in wanted:
            tensor.requires_grad_()
        fn = op[name].fn

        def call(*_: Tensor, inputs: Inputs = inputs, fn: Any = fn) -> tuple[Tensor, ...]:
            result = fn(*inputs.args, **inputs.kwargs)
            return result if isinstance(result, Tensor) else (result[0], *_flat(result[1]))

        assert torch.autograd.gradcheck(call, wanted, fast_mode=True)


def _flows(op: Op, name: str, inputs: Inputs) -> list[bool]:
    return [gradient is not None for gradient in run(op[name].fn, inputs, gradients=True).gradients]


def _flat(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state
