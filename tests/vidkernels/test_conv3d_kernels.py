"""The implicit GEMM of conv3d beyond the contract: both ways to fetch rows, every configuration, many tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import prod
from typing import Any

import pytest
import torch
from contract_cases import AWKWARD
from torch import Tensor

from vidkernels import OPS, launch, tuning
from vidkernels.checking import check, relative_error
from vidkernels.conv3d.reference import conv3d as reference
from vidkernels.conv3d.triton_igemm import conv3d, forward, input_gradient, weight_gradient
from vidkernels.conv3d.triton_igemm_tiles import box
from vidkernels.shapes import Triple
from vidkernels.tuning import Chosen

pytest.importorskip("triton")

OP = OPS["conv3d"]
NAME = "triton_igemm"
Geometry = tuple[Triple, Triple, Triple]
"""Stride, padding, dilation."""
ARCHITECTURES = [pytest.param(launch.TARGETS[name], id=name) for name in ("sm_80", "sm_90")]
"""The first gathers rows by pointers, the second fetches boxes where the stride is 1."""


@pytest.fixture(autouse=True)
def _on_a_cpu() -> None:
    if why := OP[NAME].why_not(OP.case({}), "cpu"):
        pytest.skip(why)


def _agrees(dtype: str = "fp32", **values: Any) -> None:
    case = OP.case(values, dtype=dtype, training=True)
    assert not check(OP, NAME, case).failures(OP, case)


def _random(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _three(x: Tensor, weight: Tensor, g: Tensor, geometry: Geometry) -> list[Tensor]:
    """Result, input gradient and weight gradient of channels-last tensors."""
    y = forward(x, weight, None, None, *geometry, "none")
    gx = input_gradient(g, weight, tuple(x.shape), *geometry)
    size = weight.shape[1:4]
    return [y, gx, weight_gradient(x, g, (size[0], size[1], size[2]), *geometry)]


def _exact(x: Tensor, weight: Tensor, g: Tensor, geometry: Geometry) -> list[Tensor]:
    """The same in float64, by the reference."""
    x, weight = (t.double().permute(0, 4, 1, 2, 3).requires_grad_() for t in (x, weight))
    y: Tensor = reference(x, weight, stride=geometry[0], padding=geometry[1], dilation=geometry[2])
    gx, gw = torch.autograd.grad(y, (x, weight), g.double().permute(0, 4, 1, 2, 3))
    return [t.detach().permute(0, 2, 3, 4, 1) for t in (y, gx, gw)]


GEOMETRY: Geometry = (1, 1, 1), (1, 0, 1), (1, 1, 1)
EACH = [pytest.param(i, id=name) for i, name in enumerate(("forward", "input_gradient", "weight_gradient"))]


def _operands() -> tuple[Tensor, Tensor, Tensor]:
    """Of a 3×1×2 kernel, 24 to 40 channels, on odd sizes."""
    return _random(2, 2, 3, 7, 24), _random(40, 3, 1, 2, 24, seed=1) / 12, _random(2, 2, 3, 8, 40, seed=2)


def _choices(gpu: launch.Gpu) -> list[Chosen]:
    with launch.assume(gpu), tuning.watching() as chosen:
        x, weight, g = (t.to("meta") for t in _operands())
        _three(x, weight, g, GEOMETRY)
    return chosen


@pytest.mark.parametrize(
    "what", [pytest.param("even kernel", marks=pytest.mark.slow), "uneven strides", "one position", "residual"]
)
def test_rows_gathered_by_pointers(what: str) -> None:
    with launch.assume(launch.TARGETS["sm_80"]):
        _agrees("fp32", **{**AWKWARD["conv3d"][what], "batch_size": 1})


@pytest.mark.parametrize("gpu", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_many_tiles(gpu: launch.Gpu, dtype: str) -> None:
    """Of rows, columns and depth at once, none of them full."""
    with launch.assume(gpu):
        _agrees(dtype, in_channels=72, out_channels=150, clip_length=3, height=9, width=11, kernel_size=(2, 1, 1))


def test_one_position_of_any_strides() -> None:
    """torch calls them contiguous, whatever the strides of axes of size 1; descriptors want multiples of 16 bytes."""
    x = _random(2, 16).as_strided((2, 1, 1, 1, 16), (16, 1, 1, 1, 1))
    assert x.is_contiguous()
    weight, g = _random(24, 1, 1, 1, 16, seed=1), _random(2, 24).as_strided((2, 1, 1, 1, 24), (24, 1, 1, 1, 1))
    operands = x, weight, g, ((1, 1, 1), (0, 0, 0), (1, 1, 1))
    with launch.assume(launch.TARGETS["sm_90"]):
        found = _three(*operands)
    for got, want in zip(found, _exact(*operands), strict=True):
        assert relative_error(got, want) < 1e-3


@pytest.mark.parametrize("gpu", ARCHITECTURES)
@pytest.mark.parametrize("which", EACH)
def test_every_configuration(gpu: launch.Gpu, which: int) -> None:
    operands = _operands()
    want = _exact(*operands, GEOMETRY)[which]
    chosen = _choices(gpu)[which]
    for config in chosen.candidates:
        with launch.assume(gpu), tuning.forced(chosen.kernel, chosen.key, config):
            got = _one(which, *operands, GEOMETRY)
        assert relative_error(got, want) < OP.tolerances["fp16"].forward, config


def _one(which: int, x: Tensor, weight: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    calls: list[Callable[[], Tensor]] = [
        lambda: forward(x, weight, None, None, *geometry, "none"),
        lambda: input_gradient(g, weight, tuple(x.shape), *geometry),
        lambda: weight_gradient(x, g, (3, 1, 2), *geometry),
    ]
    return calls[which]()


@pytest.mark.parametrize("gpu", ARCHITECTURES)
def test_parts_of_the_depth(gpu: launch.Gpu) -> None:
    """Sums of parts are the same sums, bias, residual and activation come once, and all is repeatable to the bit."""
    x, weight, g = _operands()
    bias, residual = _random(40, seed=3), _random(2, 2, 3, 8, 40, seed=4)
    with ExitStack() as stack:
        stack.enter_context(launch.assume(gpu))
        for chosen in _choices(gpu):
            stack.enter_context(tuning.forced(chosen.kernel, chosen.key, {**chosen.config, "SPLIT": 3}))
        first, again = (_three(x, weight, g, GEOMETRY) for _ in range(2))
        fused = forward(x, weight, bias, residual, *GEOMETRY, "silu")
    for got, same, want in zip(first, again, _exact(x, weight, g, GEOMETRY), strict=True):
        assert torch.equal(got, same)
        assert relative_error(got, want) < OP.tolerances["fp16"].forward
    raw = _exact(x, weight, g, GEOMETRY)[0]
    want = torch.nn.functional.silu(raw + bias.double() + residual.double())
    assert relative_error(fused, want) < OP.tolerances["fp16"].forward


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"),
    [((1, 1, 1), (2, 3, 2), (1, 1, 1)), ((2, 3, 1), (2, 4, 3), (2, 2, 1)), ((3, 1, 2), (4, 1, 2), (2, 1, 3))],
)
@pytest.mark.parametrize("gpu", ARCHITECTURES)
def test_positions_that_no_tap_meets(gpu: launch.Gpu, kernel_size: Triple, stride: Triple, dilation: Triple) -> None:
    """Strides longer than kernels, and strides that share a factor with the dilation, leave zeros."""
    sizes: dict[str, Any] = {
        "in_channels": 5,
        "out_channels": 6,
        "clip_length": 4,
        "height": 6,
        "width": 7,
        "padding": (1, 0, 2),
    }
    with launch.assume(gpu):
        _agrees("fp32", **sizes, kernel_size=kernel_size, stride=stride, dilation=dilation)


def test_opcheck() -> None:
    x, weight, bias = _random(2, 1, 3, 2, 5, dtype=torch.float32), _random(6, 1, 2, 1, 5, dtype=torch.float32), None
    x.requires_grad_()
    weight.requires_grad_()
    geometry = [1, 1, 1], [0, 1, 0], [1, 1, 1]
    ops = torch.ops.vidkernels
    torch.library.opcheck(ops.conv3d_igemm, (x, weight, bias, None, *geometry, "none"))
    g = _random(2, 1, 4, 2, 6, dtype=torch.float32)
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(ops.conv3d_igemm, (x, weight, _random(6, dtype=torch.float32), g, *geometry, "silu"))
    torch.library.opcheck(ops.conv3d_igemm_input_gradient, (g, weight, list(x.shape), *geometry))
    torch.library.opcheck(ops.conv3d_igemm_weight_gradient, (x, g, [1, 2, 1], *geometry))


def test_compiles_as_one_graph() -> None:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = OP(x, weight, bias, residual, padding=(0, 1, 0), activation="relu", implementation=NAME)
        return y.square().sum()

    tensors = [_random(*s, dtype=torch.float32).requires_grad_() for s in ((2, 5, 2, 3, 4), (6, 5, 1, 2, 1), (6,))]
    tensors.append(_random(2, 6, 2, 4, 4, dtype=torch.float32).requires_grad_())
    want = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*tensors), tensors)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), loss(*tensors))


def test_autocast() -> None:
    x, weight, bias = (_random(*s, dtype=torch.float32) for s in ((1, 5, 2, 3, 4), (6, 5, 1, 1, 1), (6,)))
    weight.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = conv3d(x, weight, bias)
    assert y.dtype is torch.float16
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32


def test_dtypes_that_differ() -> None:
    x, weight = _random(1, 5, 2, 3, 4), _random(6, 5, 1, 1, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"x is torch.float16 and weight torch.float32: they must be of one dtype"):
        conv3d(x, weight)


def test_channels_last_always() -> None:
    x, weight = _random(2, 5, 2, 3, 4), _random(6, 5, 1, 1, 1)
    for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        assert conv3d(given, weight).is_contiguous(memory_format=torch.channels_last_3d)


def _launched(*wanted: str) -> Iterator[str]:
    """The kernels of a backward pass that wants these gradients."""
    shapes = {"x": (2, 8, 4, 9, 9), "weight": (16, 8, 3, 3, 3), "bias": (16,)}
    tensors = {name: torch.empty(shape, device="meta", requires_grad=name in wanted) for name, shape in shapes.items()}
    y = conv3d(tensors["x"], tensors["weight"], tensors["bias"], padding=1)
    with launch.recording(launch.TARGETS["sm_90"]) as launches:
        torch.autograd.grad(y.sum(), [tensors[name] for name in wanted])
    for one in launches:
        yield one.kernel


def test_gradients_only_where_wanted() -> None:
    convolution, product = "conv3d.triton_igemm_kernels:boxes", "conv3d.triton_igemm_weight_kernels:boxes"
    assert convolution in _launched("x")
    assert product not in _launched("x")
    assert product in _launched("weight")
    assert convolution not in _launched("weight")
    assert [*_launched("bias")] == []
    assert {convolution, product} <= {*_launched("x", "weight", "bias")}


def test_one_kernel_where_no_gradient_is_wanted() -> None:
    x, weight, bias = (torch.empty(s, device="meta") for s in ((8, 64, 16, 56, 56), (64, 64, 3, 3, 3), (64,)))
    residual = torch.empty((8, 64, 16, 56, 56), device="meta")
    for gpu, kernel in (("sm_90", "boxes"), ("sm_80", "gather")):
        with launch.recording(launch.TARGETS[gpu]) as launches:
            conv3d(x, weight, bias, residual, padding=1, activation="relu")
        assert [one.kernel for one in launches] == [f"conv3d.triton_igemm_kernels:{kernel}"]


@pytest.mark.parametrize("sizes", [(8, 16, 56, 56), (8, 8, 28, 28), (8, 4, 14, 14), (8, 2, 7, 7), (1, 1, 1, 1)])
def test_boxes_cover_positions_with_little_waste(sizes: tuple[int, int, int, int]) -> None:
    shape = box(128, sizes)
    covered = prod(-(-size // side) * side for size, side in zip(sizes, shape, strict=True))
    assert prod(shape) == 128
    assert all(side & (side - 1) == 0 for side in shape)
    assert covered <= max(128, 1.15 * prod(sizes))
