"""Depthwise convolutions beyond the contract's small cases, in Triton's interpreter and in CUDA C++ on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import host_cuda
import pytest
import torch
from contract_cases import AWKWARD
from torch import Tensor

from vidkernels import cubins, launch, tuning
from vidkernels.checking import check, run
from vidkernels.depthwise_conv3d import OP, DepthwiseConv3dCase, cuda_rolling, triton_direct
from vidkernels.op import Inputs

IMPLEMENTATIONS = ("cuda_rolling", "triton_direct")
SEVERAL_TILES = {"batch_size": 2, "in_channels": 70, "clip_length": 5, "height": 7, "width": 18, "bias": True}
SMALL = {"in_channels": 6, "clip_length": 3, "height": 4, "width": 5, "kernel_size": (2, 1, 3), "bias": True}
OPS = {
    "cuda_rolling": (cuda_rolling._forward, cuda_rolling._input_gradient, cuda_rolling._weight_gradient),
    "triton_direct": (triton_direct._forward, triton_direct._input_gradient, triton_direct._weight_gradient),
}
FAST = {("odd sizes", "bf16", 6), ("uneven strides", "fp32", 5), ("silu", "fp16", 6)}


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    if why := host_cuda.why_not():
        pytest.skip(why)
    with host_cuda.installed():
        yield


def _case(values: dict[str, Any], **more: Any) -> DepthwiseConv3dCase:
    case = OP.case({"training": True, **values, **more})
    assert isinstance(case, DepthwiseConv3dCase)
    return case


def _assert_agrees(name: str, case: DepthwiseConv3dCase) -> None:
    assert OP[name].why_not(case, "cpu") is None
    assert not check(OP, name, case).failures(OP, case)


@pytest.mark.parametrize(
    ("what", "dtype", "channels"),
    [
        pytest.param(*chosen, marks=[] if chosen in FAST else pytest.mark.slow)
        for chosen in product(AWKWARD["depthwise_conv3d"], ("fp32", "fp16", "bf16"), (5, 6))
    ],
)
def test_cuda_agrees_with_float64(what: str, dtype: str, channels: int) -> None:
    """One channel at a time, and two."""
    _assert_agrees("cuda_rolling", _case(AWKWARD["depthwise_conv3d"][what], dtype=dtype, in_channels=channels))


def _recorded(name: str, inputs: Inputs, wanted: tuple[bool, ...], target: str = "") -> list[launch.Launch]:
    """What a call on meta tensors and the gradients that are wanted launch."""
    leaves = [tensor.requires_grad_(asked) for tensor, asked in zip(inputs.tensors(), wanted, strict=False)]
    with launch.recording(launch.TARGETS[target] if target else launch.gpu_of(leaves[0])) as launches:
        y = OP[name].fn(*inputs.args, **inputs.kwargs)
        if any(wanted):
            y.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == list(wanted[: len(leaves)])
    return launches


@contextmanager
def _configured(case: DepthwiseConv3dCase, name: str, choose: Any) -> Iterator[None]:
    """Every launch takes `choose(its candidates)`."""
    with tuning.watching() as choices:
        _recorded(name, OP.inputs(case, device="meta"), (True, True, case.bias))
    with ExitStack() as stack:
        for chosen in choices:
            stack.enter_context(tuning.forced(chosen.kernel, chosen.key, choose(chosen.candidates)))
        yield


def _in_short_pieces(candidates: tuple[tuning.Config, ...]) -> tuning.Config:
    """The best guess with frames in chunks of 2 where frames are chunked: T ends within one."""
    return {**candidates[0], "FRAMES": 2} if "FRAMES" in candidates[0] else candidates[0]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_several_tiles_along_every_axis(name: str) -> None:
    less = {"in_channels": 20, "height": 4, "width": 9, "clip_length": 4} if name == "triton_direct" else {}
    case = _case({**SEVERAL_TILES, **less}, dtype="fp16" if less else "bf16")
    with _configured(case, name, _in_short_pieces):
        _assert_agrees(name, case)


@pytest.mark.parametrize("number", range(4))
def test_every_configuration_in_triton(number: int) -> None:
    case = _case(SMALL, in_channels=10)
    with _configured(case, "triton_direct", lambda candidates: candidates[number % len(candidates)]):
        _assert_agrees("triton_direct", case)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("number", range(8))
def test_every_configuration_in_cuda(number: int, target: str, stride: tuple[int, int, int]) -> None:
    case = _case(SEVERAL_TILES, dtype="fp32", stride=stride, width=14)
    with (
        launch.assume(launch.TARGETS[target]),
        _configured(case, "cuda_rolling", lambda candidates: candidates[number % len(candidates)]),
    ):
        _assert_agrees("cuda_rolling", case)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [(5, 1, 1), (1, 5, 5), (3, 1, 1), (2, 4, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, (2, 1, 3)])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_other_kernels(name: str, stride: Any, dilation: int, kernel: tuple[int, int, int]) -> None:
    sizes = {"in_channels": 6, "clip_length": 11, "height": 9, "width": 12}
    _assert_agrees(name, _case(sizes, kernel_size=kernel, dilation=dilation, stride=stride, padding=(1, 2, 2)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_results_are_the_same_bit_for_bit(name: str) -> None:
    """Again, and in every order of a block's threads."""
    inputs = OP.inputs(_case(SMALL))
    orders = list(host_cuda.ORDERS) if name == "cuda_rolling" else ["forward"]
    found = []
    for order in [orders[0], *orders]:
        with host_cuda.installed(order):
            got = run(OP[name].fn, inputs, gradients=True)
        found.append([*got.outputs, *got.gradients])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_two_channels_are_one_word_only_where_they_begin_at_one() -> None:
    case = _case(SMALL, dtype="bf16", memory_format="channels_last")
    x, weight, bias = OP.inputs(case).args
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.permute(0, 2, 3, 4, 1).shape).permute(0, 4, 1, 2, 3)
    shifted.copy_(x)
    with torch.no_grad():
        want = cuda_rolling.depthwise_conv3d(x, weight, bias, padding=1)
        assert torch.equal(cuda_rolling.depthwise_conv3d(shifted, weight, bias, padding=1), want)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_ops_keep_the_rules_of_torch(name: str) -> None:
    x, weight, bias = OP.inputs(_case(SMALL)).args
    x = x.permute(0, 2, 3, 4, 1).contiguous()
    form = [1, 1, 1], [0, 0, 1], [1, 1, 1]
    forward, input_gradient, weight_gradient = OPS[name]
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(forward, (*leaves, *form, "none"))
    x, weight = x.detach(), weight.detach()
    gradient = torch.randn(1, 2, 4, 5, 6)
    torch.library.opcheck(input_gradient, (gradient, weight, [3, 4, 5], *form))
    torch.library.opcheck(weight_gradient, (gradient, x, [2, 1, 3], True, *form))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_compiles_as_one_graph(name: str) -> None:
    fn = OP[name].fn

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = fn(x * 2, weight, bias, padding=1, activation="relu")
        return y.square()

    inputs = OP.inputs(_case(SMALL))
    leaves = [tensor.requires_grad_() for tensor in inputs.args]
    want = layer(*leaves)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got.stride() == want.stride()
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_autocast_decides_the_dtype(name: str) -> None:
    x, weight, bias = OP.inputs(_case(SMALL)).args
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        y = OP[name].fn(x, weight, bias, padding=1)
    assert y.dtype == torch.float16
    with pytest.raises(ValueError, match="of one dtype, not float32, float16"):
        OP[name].fn(x, weight.half(), None)


@pytest.mark.parametrize(
    ("wanted", "cuda", "triton"),
    [
        ((True, False, False), ["walk", "walk"], ["gather", "gather"]),
        ((False, True, False), ["walk", "collect", "sum"], ["gather", "correlate", "sum_parts"]),
        ((True, True, True), ["walk", "walk", "collect", "sum"], ["gather", "gather", "correlate", "sum_parts"]),
        ((False, False, False), ["walk"], ["gather"]),
    ],
)
def test_only_gradients_that_are_wanted_are_computed(
    wanted: tuple[bool, ...], cuda: list[str], triton: list[str]
) -> None:
    for name, want in (("cuda_rolling", cuda), ("triton_direct", triton)):
        launches = _recorded(name, OP.inputs(_case(SMALL), device="meta"), wanted)
        assert [each.kernel.partition(":")[2] for each in launches] == want


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"kernel_size": 5}, "kernel_size=(5, 5, 5) has 125 taps, more than the 32 that registers hold"),
        (
            {"kernel_size": 3, "dilation": (9, 1, 1), "clip_length": 32},
            "kernel_size=(3, 3, 3), dilation=(9, 1, 1) and stride=(1, 1, 1) keep 19 results open, "
            "too many for one walk",
        ),
        ({"dtype": "fp64"}, "dtype=fp64: it computes in fp32, tf32, fp16, bf16"),
    ],
)
def test_what_cuda_refuses(values: dict[str, Any], why: str) -> None:
    assert OP["cuda_rolling"].why_not(_case(SMALL, **values), "cpu") == why
    assert (OP["triton_direct"].why_not(_case(SMALL, **values), "cpu") is None) == ("dtype" not in values)


@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "sm_100"))])
def test_registers_hold_all_of_a_thread(target: str) -> None:
    """X3D-M's second stage in bf16: no stack, nothing in local memory."""
    gpu = launch.TARGETS[target]
    x = torch.empty(8, 54, 16, 56, 56, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(54, 1, 3, 3, 3, dtype=torch.bfloat16, device="meta")
    for each in _recorded("cuda_rolling", Inputs((x, weight), {"padding": 1}), (True, True), target):
        found = cubins.resources(*cubins.build(each, gpu), gpu)
        assert (found.stack_bytes, found.local_accesses) == (0, 0), each
        assert found.registers <= 168
