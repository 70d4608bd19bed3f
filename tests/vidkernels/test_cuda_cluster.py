"""The recurrence over a cluster of blocks, run on a CPU: what the small cases of the contract do not reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import host_cuda
import pytest
import torch

from vidkernels import launch, tuning
from vidkernels.checking import check, compare, oracle, run
from vidkernels.op import Inputs, Op
from vidkernels.recurrent import LSTM, RNN, RecurrentCase, cuda_cluster

pytestmark = pytest.mark.skipif(host_cuda.why_not() is not None, reason=str(host_cuda.why_not()))

CASES = {
    "lstm": (LSTM, {"hidden_size": 64, "batch_size": 3, "clip_length": 4, "input_features": 10}),
    # Groups of 32 terms that begin in one gate and end in another; two clusters, the last one with two rows.
    "lstm 96": (LSTM, {"hidden_size": 96, "batch_size": 18, "clip_length": 3, "input_features": 8, "dtype": "fp16"}),
    "rnn": (RNN, {"hidden_size": 128, "batch_size": 5, "clip_length": 3, "input_features": 9}),
}


def _case(op: Op, values: dict[str, Any], **more: Any) -> RecurrentCase:
    case = op.case({"dtype": "bf16", "training": True, **values, **more})
    assert isinstance(case, RecurrentCase)
    return case


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    with host_cuda.installed():
        yield


@contextmanager
def _forced(gates: int, case: RecurrentCase, config: dict[str, int]) -> Iterator[None]:
    key = tuning.Key(case.dtype, sizes=(case.hidden_size,), form=(gates,), positions=case.batch_size)
    with ExitStack() as stack:
        for kernel in ("forward", "backward"):
            stack.enter_context(tuning.forced(f"recurrent/cuda_cluster/{kernel}", key, config))
        yield


@pytest.mark.parametrize("name", list(CASES))
def test_agrees_with_float64_in_every_order_of_threads(name: str) -> None:
    op, values = CASES[name]
    case = _case(op, values)
    assert op["cuda_cluster"].why_not(case, "cpu") is None
    inputs = op.inputs(case)
    results = []
    for order in host_cuda.ORDERS:
        with host_cuda.installed(order):
            results.append(run(op["cuda_cluster"].fn, inputs, gradients=True))
    assert not compare(op, results[0], oracle(op, case, inputs, gradients=True)).failures(op, case)
    for other in results[1:]:
        for got, want in zip(
            (*other.outputs, *other.gradients), (*results[0].outputs, *results[0].gradients), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    "values",
    [
        {"clip_length": 1},
        {"batch_size": 1, "bias": False},
        {"batch_size": 16},
        {"batch_size": 33, "clip_length": 2},
        {"return_sequence": False},
        {"batch_size": 0},
        {"training": False},
        {"clip_length": 40, "batch_size": 2},
    ],
    ids=lambda value: value.name if isinstance(value, Op) else str(value),
)
def test_awkward_cases(values: dict[str, Any]) -> None:
    case = _case(LSTM, {**CASES["lstm"][1], **values})
    assert not check(LSTM, "cuda_cluster", case).failures(LSTM, case)


@pytest.mark.parametrize(("cluster", "kept"), [(8, 1), (4, 1)])
def test_weights_partly_in_shared_memory(cluster: int, kept: int) -> None:
    case = _case(*CASES["lstm"])
    with _forced(4, case, {"CLUSTER": cluster, "KEPT": kept}):
        assert not check(LSTM, "cuda_cluster", case).failures(LSTM, case)


@pytest.mark.slow
@pytest.mark.parametrize("gates", [4, 1])
@pytest.mark.parametrize("hidden", [256, 384, 512])
def test_every_candidate_at_full_size(hidden: int, gates: int) -> None:
    op, gpu = (LSTM, launch.TARGETS["sm_90"]) if gates == 4 else (RNN, launch.TARGETS["sm_90"])
    case = _case(op, {"hidden_size": hidden, "batch_size": 2, "clip_length": 3, "input_features": 16})
    key = tuning.Key(case.dtype, sizes=(hidden,), form=(gates,), positions=2)
    lists = {
        kernel: list(cuda_cluster._candidates(kernel, hidden, gates, 2, gpu)) for kernel in ("forward", "backward")
    }
    for i in range(max(map(len, lists.values()))):
        with ExitStack() as stack:
            for kernel, configs in lists.items():
                config = configs[min(i, len(configs) - 1)]
                stack.enter_context(tuning.forced(f"recurrent/cuda_cluster/{kernel}", key, config))
            assert not check(op, "cuda_cluster", case).failures(op, case)


def test_a_given_state_and_its_gradients() -> None:
    case = _case(*CASES["lstm"])
    made = LSTM.inputs(case)
    generator = torch.Generator().manual_seed(5)
    state = tuple(torch.randn(3, 64, generator=generator).bfloat16() for _ in "hc")
    inputs = Inputs((*made.args, state), made.kwargs)
    want = oracle(LSTM, case, inputs, gradients=True)
    errors = compare(LSTM, run(LSTM["cuda_cluster"].fn, inputs, gradients=True), want)
    assert not errors.failures(LSTM, case)


def test_gradients_only_where_wanted() -> None:
    case = _case(*CASES["lstm"])
    inputs = LSTM.inputs(case)
    x, *weights = inputs.args
    x.requires_grad_()
    y, _ = LSTM["cuda_cluster"].fn(x, *weights)
    (grad,) = torch.autograd.grad(y.sum(), [x])
    everything = run(LSTM["cuda_cluster"].fn, inputs, gradients=True)
    assert grad.shape == everything.gradients[0].shape
    assert all(weight.grad is None for weight in weights)


def test_weights_in_the_middle_of_a_buffer() -> None:
    case = _case(*CASES["lstm"])
    inputs = LSTM.inputs(case)
    x, w_ih, w_hh, bias = inputs.args
    buffer = torch.empty(w_hh.numel() + 1, dtype=w_hh.dtype)
    shifted = buffer[1:].view_as(w_hh).copy_(w_hh)
    got, _ = LSTM["cuda_cluster"].fn(x, w_ih, shifted, bias)
    want, _ = LSTM["cuda_cluster"].fn(x, w_ih, w_hh, bias)
    assert torch.equal(got, want)


def test_custom_ops_are_registered_rightly() -> None:
    case = _case(*CASES["lstm"])
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(3, 4, 256, generator=generator).bfloat16().requires_grad_()
    w_hh = (torch.randn(256, 64, generator=generator) / 8).bfloat16().requires_grad_()
    h = torch.randn(3, 64, generator=generator).bfloat16().requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = torch.ops.vidkernels.recurrent_cluster.default
    torch.library.opcheck(forward, (products, w_hh, h, None, True, True), test_utils=tests, rtol=1e-2, atol=1e-2)
    assert case.hidden_size == 64


def test_compiles_whole() -> None:
    inputs = LSTM.inputs(_case(*CASES["lstm"]))

    def layer(*args: Any) -> torch.Tensor:
        y, (h, c) = LSTM["cuda_cluster"].fn(*args)
        return y.sum() + h.sum() + c.sum()

    args = [arg.requires_grad_() for arg in inputs.args]
    want = layer(*args)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*args)
    assert torch.equal(got, want)
    for one, other in zip(torch.autograd.grad(got, args), torch.autograd.grad(want, args), strict=True):
        assert torch.equal(one, other)


def test_autocast_casts_all_inputs() -> None:
    inputs = LSTM.inputs(_case(LSTM, CASES["lstm"][1], dtype="fp32"))
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = LSTM["cuda_cluster"].fn(*inputs.args)
    assert {tensor.dtype for tensor in (y, h, c)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("op", "values", "why"),
    [
        (LSTM, {"hidden_size": 512}, None),
        (LSTM, {"hidden_size": 320, "dtype": "fp16"}, None),
        (RNN, {"hidden_size": 768}, None),
        (LSTM, {"hidden_size": 256, "dtype": "fp32"}, "dtype=fp32: it computes in fp16, bf16"),
        (LSTM, {"hidden_size": 250}, "hidden_size=250 is no multiple of 32"),
        (RNN, {"hidden_size": 320}, "hidden_size=320 is no multiple of 128"),
        (LSTM, {"hidden_size": 1024}, "hidden_size=1024: W_hh does not fit a cluster of 8 blocks"),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else str(value),
)
def test_limits(op: Op, values: dict[str, Any], why: str | None) -> None:
    assert op["cuda_cluster"].why_not(_case(op, values), "cpu") == why


def test_launches_fit_every_architecture() -> None:
    for target in ("sm_90", "sm_100"):
        gpu = launch.TARGETS[target]
        with launch.recording(gpu) as launches:
            for hidden in (256, 512):
                case = _case(LSTM, {"hidden_size": hidden, "batch_size": 64})
                inputs = LSTM.inputs(case, device="meta")
                args = [arg.requires_grad_() for arg in inputs.args]
                y, _ = LSTM["cuda_cluster"].fn(*args)
                y.sum().backward()
        assert [one.kernel.partition(":")[2] for one in launches] == ["forward", "backward"] * 2
        assert all(one.options["shared_bytes"] <= gpu.shared_bytes for one in launches)
        assert all(one.options["cluster"] == 8 and one.options["block"] <= 512 for one in launches)
    assert not list(cuda_cluster._candidates("forward", 256, 4, 1, replace(gpu, capability=80)))
