"""The checker finds what is wrong: at the border, in a gradient, by NaN; and leaves its inputs alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from contract_cases import TYPICAL
from torch import Tensor

from vidkernels import OPS
from vidkernels.checking import Errors, Results, border, check, compare, oracle, relative_error, run

CONV = OPS["conv3d"]
CASE = CONV.case(TYPICAL["conv3d"], training=True)


def test_relative_error() -> None:
    want = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(want + torch.tensor([0.0, 0.05]), want) == pytest.approx(0.01)
    assert relative_error(want, want) == 0
    assert relative_error(torch.zeros(3), want) == math.inf
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert math.isnan(relative_error(torch.tensor([math.nan, 4.0]), want))


def test_border_is_the_outermost_positions() -> None:
    x = torch.arange(27).reshape(1, 1, 3, 3, 3)
    assert sorted(border(x).flatten().tolist()) == [i for i in range(27) if i != 13]
    assert border(torch.arange(4).reshape(1, 1, 4)).flatten().tolist() == [0, 3]


@pytest.mark.parametrize("name", ["reference", "library"])
def test_what_is_right_passes(name: str) -> None:
    errors = check(CONV, name, CASE)
    assert errors.failures(CONV, CASE) == []
    assert None not in (errors.border, errors.input_gradient, errors.weight_gradient)


def test_a_wrong_border_is_told_apart() -> None:
    inputs = CONV.inputs(CASE)
    want = oracle(CONV, CASE, inputs)
    wrong = want.outputs[0].float()
    wrong[0, 0, 0, 0, 0] *= 1.1
    errors = compare(CONV, Results((wrong,)), want)
    assert errors.border is not None
    assert errors.border > errors.output > 0
    assert [text.split(" error")[0] for text in errors.failures(CONV, CASE)] == ["output", "border"]


def test_nan_passes_no_gate() -> None:
    assert Errors(math.nan, input_gradient=math.nan).failures(CONV, CASE) == [
        "output error nan exceeds 2.0e-06",
        "input gradient error nan exceeds 2.0e-06",
    ]


def test_a_missing_gradient_fails() -> None:
    want = oracle(CONV, CASE, CONV.inputs(CASE), gradients=True)
    got = replace(want, gradients=(want.gradients[0], None))
    assert compare(CONV, got, want).weight_gradient == math.inf
    assert compare(CONV, Results(want.outputs), want).output == math.inf


def test_twice_the_weight_gradient_error_of_the_library_passes() -> None:
    errors = Errors(1e-7, weight_gradient=1e-4)
    assert len(errors.failures(CONV, CASE)) == 1
    assert errors.failures(CONV, CASE, Errors(1.0, weight_gradient=6e-5)) == []
    assert Errors(1e-4).failures(CONV, CASE, Errors(1.0)) == ["output error 1.00e-04 exceeds 2.0e-06"]


def test_twice_the_input_gradient_error_of_the_library_passes_in_16_bits_alone() -> None:
    library = Errors(1.0, input_gradient=1.0, weight_gradient=1.0)
    errors = Errors(1e-7, input_gradient=1.5, weight_gradient=1e-7)
    assert errors.failures(CONV, CASE, library) == ["input gradient error 1.50e+00 exceeds 2.0e-06"]
    narrow = CONV.case(TYPICAL["conv3d"], training=True, dtype="bf16")
    assert errors.failures(CONV, narrow, library) == []


def test_slack_widens_every_gate() -> None:
    assert Errors(3e-6, input_gradient=3e-6).failures(CONV, CASE, slack=2.0) == []
    assert len(Errors(5e-6, input_gradient=5e-6).failures(CONV, CASE, slack=2.0)) == 2


def test_a_call_that_writes_to_its_input_is_told() -> None:
    inputs = CONV.inputs(CASE)
    library = CONV["library"].fn

    def spoil(x: Tensor, *args: Tensor, **kwargs: object) -> Tensor:
        y: Tensor = library(x, *args, **kwargs)
        with torch.no_grad():
            x.mul_(2.0)
        return y

    assert run(spoil, inputs).inputs_changed
    assert not run(library, inputs).inputs_changed
    assert not run(library, inputs, gradients=True).inputs_changed


def test_run_keeps_strides_and_inputs() -> None:
    seen = []

    def spoil(x: Tensor) -> Tensor:
        seen.append(x.stride())
        with torch.no_grad():
            x.zero_()
        return x * 1

    x = torch.ones(4, 6)[:, ::2]
    inputs = replace(CONV.inputs(CASE), args=(x,), kwargs={})
    for gradients in (False, True):
        run(spoil, inputs, gradients=gradients)
    assert seen == [(6, 2), (6, 2)]
    assert x.min() == 1
    run(spoil, replace(inputs, args=(torch.ones(1).expand(5).clone(),)))


def test_expanded_inputs_run() -> None:
    x = torch.ones(1).expand(5)
    inputs = replace(CONV.inputs(CASE), args=(x,), kwargs={})
    assert run(lambda x: 2 * x, inputs, gradients=True).gradients[0] is not None


def test_checks_leave_dropout_out() -> None:
    op = OPS["tcn_block"]
    case = op.case({**TYPICAL["tcn_block"], "dropout_p": 0.5}, training=True)
    assert check(op, "library", case).failures(op, case) == []


def test_running_statistics_survive_a_check() -> None:
    op = OPS["conv2plus1d"]
    inputs = op.inputs(op.case(TYPICAL["conv2plus1d"], training=True))
    before = [tensor.clone() for tensor in inputs.tensors()]
    for gradients in (False, True):
        run(op["library"].fn, inputs, gradients=gradients)
    for tensor, kept in zip(inputs.tensors(), before, strict=True):
        assert torch.equal(tensor, kept)
