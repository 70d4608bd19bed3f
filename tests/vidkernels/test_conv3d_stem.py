"""First layers of four channels at most, and convolutions that are one matrix product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vidkernels import OPS, launch, tuning
from vidkernels.checking import check, relative_error
from vidkernels.conv3d import triton_stem
from vidkernels.conv3d.case import Conv3dCase

OP = OPS["conv3d"]
STEM = OP["triton_stem"]
MATMUL = OP["matmul"]

SIZES = {"batch_size": 1, "in_channels": 3, "out_channels": 6, "clip_length": 2, "height": 4, "width": 7}
AWKWARD: dict[str, dict[str, Any]] = {
    "odd sizes": {"batch_size": 2, "clip_length": 1, "height": 3, "bias": True},
    "one position": {"clip_length": 1, "height": 1, "width": 1},
    "strided": {"stride": (2, 2, 2), "clip_length": 3},
    "uneven strides": {"stride": (1, 3, 2), "kernel_size": (1, 3, 3)},
    "stride 3 along W": {"stride": (3, 1, 3), "kernel_size": (3, 1, 3), "width": 11},
    "unpadded": {"padding": (0, 0, 0), "clip_length": 3},
    "even kernel": {"kernel_size": (2, 4, 2), "padding": (1, 1, 0)},
    "pointwise": {"kernel_size": (1, 1, 1)},
    "kernel smaller than stride": {"kernel_size": (1, 1, 1), "stride": (2, 2, 2)},
    "more padding than kernel": {"padding": (1, 3, 3), "kernel_size": (1, 2, 3), "clip_length": 1},
    "7 taps": {"kernel_size": (1, 7, 7), "stride": (1, 2, 2), "bias": True, "activation": "relu"},
    "a window in two parts": {"kernel_size": (1, 2, 19), "clip_length": 1, "width": 20},
    "one channel": {"in_channels": 1, "height": 2, "kernel_size": (1, 3, 3), "residual": True, "activation": "silu"},
    "flow": {"in_channels": 2, "stride": (1, 2, 2), "clip_length": 1, "bias": True},
    "four channels": {"in_channels": 4, "height": 2, "kernel_size": (1, 3, 3), "residual": True, "activation": "relu"},
    "empty batch": {"batch_size": 0},
}
LARGE = {**SIZES, "out_channels": 45, "height": 12, "width": 30, "kernel_size": (1, 3, 3), "bias": True}


def _case(values: dict[str, Any], **common: Any) -> Conv3dCase:
    case = OP.case({**SIZES, **values}, **common)
    assert isinstance(case, Conv3dCase)
    return case


def _assert_agrees(name: str, case: Conv3dCase) -> None:
    errors = check(OP, name, case)
    assert not errors.failures(OP, case, check(OP, "library", case))


@pytest.fixture
def poisoned() -> Any:
    """Fresh memory holds NaN, so that an element never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("what", AWKWARD)
def test_a_stem_agrees_with_float64(what: str, dtype: str) -> None:
    _assert_agrees("triton_stem", _case(AWKWARD[what], dtype=dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", AWKWARD)
def test_gradients_of_a_stem_agree_with_float64(what: str, dtype: str) -> None:
    _assert_agrees("triton_stem", _case(AWKWARD[what], dtype=dtype, training=True))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_many_tiles(target: str) -> None:
    with launch.assume(launch.TARGETS[target]):
        _assert_agrees("triton_stem", _case({**LARGE, "residual": True, "activation": "relu"}, dtype="fp16"))


def _launches(kernel: str, case: Conv3dCase) -> tuple[Callable[[], Tensor], Tensor]:
    """A call of one kernel, and its result in float64."""
    x, weight, *_ = OP.inputs(case).args
    g = torch.randn(case.y_shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    y = OP["reference"].fn(*leaves, stride=case.stride, padding=case.pad)
    stride, padding = list(case.stride), list(case.pad)
    if kernel == "forward":
        return lambda: triton_stem.forward(x, weight, None, None, stride, padding, "none"), y.permute(0, 2, 3, 4, 1)
    rows = g.permute(0, 2, 3, 4, 1)
    gx, gw = torch.autograd.grad(y, leaves, g.double())
    if kernel == "weight_gradient":
        return lambda: triton_stem.weight_gradient(x, rows, list(case.kernel_size), stride, padding), gw
    gx = gx.permute(0, 2, 3, 4, 1)
    return lambda: triton_stem.input_gradient(rows, weight, list(case.sizes), stride, padding), gx


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kernel", ["forward", "weight_gradient", "input_gradient"])
def test_every_configuration(kernel: str, dtype: str) -> None:
    """Each gives the same, at 4 warps and at 8."""
    case = _case({**LARGE, "height": 2, "width": 20, "bias": False, "clip_length": 1, "out_channels": 20}, dtype=dtype)
    call, want = _launches(kernel, case)
    with tuning.watching() as choices:
        call()
    (chosen,) = choices
    assert chosen.kernel == f"conv3d/triton_stem/{kernel}"
    assert 1 < len(chosen.candidates) <= 8
    for config in chosen.candidates:
        with tuning.forced(chosen.kernel, chosen.key, config):
            gate = OP.tolerances[dtype]
            assert relative_error(call(), want) < max(gate.forward, gate.weight_gradient), config


def test_sums_are_repeatable() -> None:
    """Several blocks each add up their positions; the order is always the same."""
    case = _case({**LARGE, "out_channels": 6, "clip_length": 1, "kernel_size": (1, 1, 3)}, dtype="fp16")
    for kernel in ("forward", "weight_gradient"):
        call, want = _launches(kernel, case)
        once = call()
        assert relative_error(once, want) < OP.tolerances["fp16"].weight_gradient
        assert torch.equal(call(), once)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
def test_any_layout_of_a_clip_gives_channels_last(layout: str) -> None:
    case = _case({"kernel_size": (1, 3, 3)})
    x, weight, *_ = OP.inputs(case).args
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "expanded":
        x = x[:, :, :1].expand(-1, -1, 2, -1, -1)
    y = STEM.fn(x, weight, padding=case.pad)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    want = OP["reference"].fn(x.double(), weight.double(), padding=case.pad)
    assert relative_error(y, want) < 2e-6


def test_gradients_are_computed_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    real = launch.triton
    monkeypatch.setattr(launch, "triton", lambda kernel, *a, **k: (launched.append(kernel), real(kernel, *a, **k))[1])
    case = _case({"kernel_size": (1, 1, 1), "clip_length": 1, "height": 2})
    x, weight, *_ = OP.inputs(case).args
    STEM.fn(x, weight.requires_grad_()).sum().backward()
    assert any("weight_gradient" in kernel for kernel in launched)
    assert not any("input_gradient" in kernel for kernel in launched)
    launched.clear()
    STEM.fn(x.requires_grad_(), weight.detach()).sum().backward()
    assert any("input_gradient" in kernel for kernel in launched)
    assert not any("weight_gradient" in kernel for kernel in launched)


def test_opcheck() -> None:
    case = _case({"kernel_size": (1, 2, 2), "clip_length": 1, "height": 3, "width": 4, "bias": True, "padding": 0})
    x, weight, bias = (tensor.requires_grad_() for tensor in OP.inputs(case).args)
    torch.library.opcheck(
        torch.ops.vidkernels.conv3d_stem.default, (x, weight, bias, None, [1, 1, 1], [0, 0, 0], "none")
    )


def test_a_whole_graph_compiles() -> None:
    case = _case({"kernel_size": (1, 2, 2), "clip_length": 1, "height": 3, "bias": True, "padding": 0})
    x, weight, bias = (tensor.requires_grad_() for tensor in OP.inputs(case).args)

    def loss(fn: Callable[..., Tensor]) -> Tensor:
        return fn(x, weight, bias, activation="relu").square().sum()

    for implementation in (STEM, MATMUL):
        if implementation is MATMUL:
            weight = weight[..., :1, :1].detach().requires_grad_()
        compiled = torch.compile(implementation.fn, fullgraph=True, backend="aot_eager")
        got = torch.autograd.grad(loss(compiled), (x, weight, bias))
        want = torch.autograd.grad(loss(implementation.fn), (x, weight, bias))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("implementation", [STEM, MATMUL], ids=lambda implementation: implementation.name)
def test_autocast(implementation: Any) -> None:
    case = _case({"kernel_size": (1, 1, 1), "clip_length": 1, "bias": True})
    x, weight, bias = OP.inputs(case).args
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = implementation.fn(x, weight, bias)
    y.float().sum().backward()
    assert y.dtype is torch.float16
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is torch\.float16 and weight is torch\.float32"):
        STEM.fn(torch.zeros(1, 3, 1, 2, 2, dtype=torch.float16), torch.zeros(2, 3, 1, 1, 1))


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("triton_stem", {"in_channels": 5}, "in_channels=5: it takes 4 at most"),
        ("triton_stem", {"dilation": (1, 2, 1)}, "dilation=(1, 2, 1): it takes 1 alone"),
        ("triton_stem", {"dtype": "fp64"}, "dtype=fp64: it computes in fp32, tf32, fp16, bf16"),
        ("matmul", {}, "padding=(1, 1, 1): it takes 0 alone"),
        ("matmul", {"padding": (0, 0, 0), "stride": (1, 2, 2), "clip_length": 3}, "along every axis the kernel must"),
    ],
)
def test_limits_say_why(name: str, values: dict[str, Any], why: str) -> None:
    assert why in str(OP[name].why_not(_case(values), "cpu"))


def test_dilation_of_single_taps_is_no_limit() -> None:
    assert STEM.why_not(_case({"kernel_size": (1, 3, 3), "dilation": (2, 1, 1)}), "cpu") is None


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "values",
    [
        {"kernel_size": (1, 1, 1), "stride": (2, 3, 2), "bias": True},
        {"kernel_size": (2, 2, 3), "stride": (2, 2, 3), "clip_length": 5, "padding": 0, "bias": True},
        {"kernel_size": (1, 2, 1), "stride": (2, 2, 1), "padding": 0, "residual": True, "activation": "silu"},
        {"kernel_size": (1, 1, 1), "memory_format": "channels_last", "residual": True, "activation": "relu"},
        {"kernel_size": (2, 2, 2), "stride": (2, 2, 2), "padding": 0, "batch_size": 0},
    ],
    ids=["subsampled", "patches", "patches and subsampled", "channels last", "empty batch"],
)
def test_one_matrix_product(values: dict[str, Any], dtype: str) -> None:
    _assert_agrees("matmul", _case({"in_channels": 5, **values}, dtype=dtype, training=True))


def test_a_matrix_product_reads_channels_last_in_place() -> None:
    case = _case({"kernel_size": (1, 1, 1), "memory_format": "channels_last"})
    x, weight, *_ = OP.inputs(case).args
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = MATMUL.fn(x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert not {"aten::copy_", "aten::contiguous"} & {event.key for event in profile.key_averages()}
