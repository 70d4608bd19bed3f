"""The registry: what it refuses, why, and what it names instead; and the functions in front of it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract_cases import AWKWARD, TYPICAL
from torch import Tensor

import vidkernels
from vidkernels import OPS, BatchNorm, Case, Inputs, Op, Unavailable, WeightNorm
from vidkernels import op as registry
from vidkernels.op import check_tensor, compiled, dtype_name, memory_format_name, tensors_of, wide, widened


@pytest.fixture
def double() -> Op:
    """An op of its own: y = 2x, with an implementation that wants a GPU and one that wants small clips."""
    op = Op(
        name="double",
        case_type=Case,
        case_of=lambda x: Case(batch_size=x.shape[0]),
        make_inputs=lambda case, generator: Inputs((torch.randn(case.batch_size, generator=generator),)),
        macs=lambda case: 0,
        bytes_moved=lambda case: 0,
    )

    @op.implementation("reference")
    def reference(x: Tensor) -> Tensor:
        return x + x

    @op.implementation("on_gpu", requires=("cuda",))
    def on_gpu(x: Tensor) -> Tensor:
        raise AssertionError("must not run")

    @op.implementation("small", limits=lambda case: None if case.batch_size < 4 else "batch_size must be below 4")
    def small(x: Tensor) -> Tensor:
        return 2 * x

    return op


def test_runs_the_implementation_that_is_named(double: Op) -> None:
    assert double(torch.ones(2), implementation="small").tolist() == [2.0, 2.0]


def test_unavailable_names_the_reason_and_the_alternatives(double: Op) -> None:
    with pytest.raises(Unavailable, match=r"^double/on_gpu: needs a CUDA device; available: reference, small$"):
        double(torch.ones(2), implementation="on_gpu")
    with pytest.raises(Unavailable, match=r"^double/small: batch_size must be below 4; available: reference$"):
        double(torch.ones(5), implementation="small")


def test_unknown_implementation_names_the_nearest(double: Op) -> None:
    with pytest.raises(ValueError, match=r"double has no implementation 'referense': did you mean 'reference'\?"):
        double(torch.ones(1), implementation="referense")
    with pytest.raises(ValueError, match="known: reference, on_gpu, small"):
        double["winograd"]


def test_a_name_is_registered_once(double: Op) -> None:
    with pytest.raises(ValueError, match="double has an implementation 'small' already"):
        double.implementation("small")(lambda x: x)


def test_every_op_has_the_same_three() -> None:
    for name, op in OPS.items():
        assert op.name == name
        assert {"reference", "library", "compiled"} <= set(op.implementations)
        for implementation in ("reference", "library"):
            assert op[implementation].why_not(op.case({}), "cpu") is None


def test_ops_over_time_stream() -> None:
    for name in ("causal_conv1d", "tcn_block", "rnn", "lstm"):
        assert all(OPS[name][i].step for i in ("reference", "library", "compiled"))


def test_tf32_is_refused_on_a_cpu() -> None:
    why = OPS["conv3d"]["library"].why_not(OPS["conv3d"].case({}, dtype="tf32"), "cpu")
    assert why == "tf32 is an arithmetic of CUDA devices, not of cpu"


def test_compiled_tells_of_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    why = OPS["conv3d"]["compiled"].why_not(OPS["conv3d"].case({}), "cpu")
    assert why == "needs a C++ compiler: no-such-compiler is not on PATH"


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = registry.REQUIREMENTS["triton"]
    cpu = torch.device("cpu")
    monkeypatch.setattr(registry, "_installed", lambda module: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert needs(cpu) == "needs a CUDA device, or TRITON_INTERPRET=1 to run in Triton's interpreter"
    assert needs(torch.device("cuda")) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert needs(cpu) is None
    monkeypatch.setattr(registry, "_installed", lambda module: False)
    assert needs(torch.device("cuda")) == "needs triton (pip install triton)"
    assert registry.REQUIREMENTS["cuda_core"](torch.device("cuda")) == "needs cuda-core (pip install vidbench[gpu])"


@pytest.mark.parametrize(
    ("op_name", "values", "message"),
    [
        ("conv3d", {"in_chanels": 3}, r"conv3d has no 'in_chanels': did you mean 'in_channels'\?"),
        ("depthwise_conv3d", {"out_channels": 3}, "depthwise_conv3d has no 'out_channels'"),
        ("conv3d", {"dtype": "fp8"}, "dtype='fp8' is not one of fp64, fp32, tf32, fp16, bf16"),
        ("conv3d", {"memory_format": "NHWC"}, "memory_format='NHWC' is not one of contiguous, channels_last"),
        ("conv3d", {"batch_size": -1}, "batch_size=-1 is not an integer of at least 0"),
        ("conv3d", {"clip_length": 0}, "clip_length=0 is not an integer of at least 1"),
        ("conv3d", {"out_channels": 2.5}, "out_channels=2.5 is not an integer of at least 1"),
        ("conv3d", {"stride": 0}, "stride=0 must be at least 1 along T, H and W"),
        ("conv3d", {"padding": (0, -1, 0)}, r"padding=\(0, -1, 0\) must be at least 0"),
        ("conv3d", {"kernel_size": (3, 3)}, r"kernel_size=\(3, 3\) is neither an integer nor three of them"),
        ("conv3d", {"clip_length": 1, "padding": 0}, "kernel_size=3 with dilation=1 spans 3, more than .* input's 1"),
        ("conv2plus1d", {"mid_channels": 0}, "mid_channels=0 is not an integer of at least 1"),
        (
            "conv2plus1d",
            {"clip_length": 1, "height": 1, "width": 1, "training": True},
            "batch statistics need more than 1 value a channel",
        ),
        ("causal_conv1d", {"kernel_size": (3, 3, 3)}, r"kernel_size=\(3, 3, 3\) is not an integer"),
        ("causal_conv1d", {"dilation": 0}, "dilation=0 is not an integer of at least 1"),
        ("tcn_block", {"dropout_p": 1.0}, r"dropout_p=1.0 is not in \[0, 1\)"),
        ("tcn_block", {"out_channels": 32, "downsample": False}, "in_channels=64 and out_channels=32 differ"),
        ("lstm", {"hidden_size": 0}, "hidden_size=0 is not an integer of at least 1"),
    ],
)
def test_a_case_that_cannot_be(op_name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OPS[op_name].case(values)
    assert "\n" not in str(caught.value)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


_BN = BatchNorm(*(torch.ones(4) for _ in range(4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f: f.conv3d(_zeros(3, 4, 5, 5), _zeros(2, 3, 1, 1, 1)),
            r"x must be \(N, C_in, T, H, W\), not of shape",
        ),
        (lambda f: f.conv3d([1], _zeros(2, 3, 1, 1, 1)), "x must be a tensor .*, not list"),
        (lambda f: f.conv3d(_zeros(1, 4, 5, 5, 5), _zeros(2, 3, 1, 1, 1)), "x has 4 channels and weight takes 3"),
        (
            lambda f: f.conv3d(_zeros(1, 3, 5, 5, 5), _zeros(2, 3, 1, 1, 1), _zeros(3)),
            r"bias must be \(2,\), not of shape \(3,\)",
        ),
        (lambda f: f.conv3d(_zeros(1, 3, 5, 5, 5), _zeros(2, 3, 1, 1, 1), stride=0), "stride=.* must be at least 1"),
        (lambda f: f.conv3d(_zeros(1, 3, 1, 1, 1), _zeros(2, 3, 3, 3, 3)), "spans 3, more than the padded input's 1"),
        (lambda f: f.conv3d(_zeros(1, 3, 5, 5, 5).int(), _zeros(2, 3, 1, 1, 1)), "dtype torch.int32 is not one of"),
        (
            lambda f: f.conv3d(_zeros(1, 3, 5, 5, 5), _zeros(2, 3, 1, 1, 1), implementation="librery"),
            "did you mean 'library'",
        ),
        (
            lambda f: f.depthwise_conv3d(_zeros(1, 3, 5, 5, 5), _zeros(4, 1, 1, 1, 1)),
            r"weight must be \(3, 1, kT, kH, kW\) for x of 3 channels, not \(4, 1, 1, 1, 1\)",
        ),
        (
            lambda f: f.conv2plus1d(_zeros(1, 3, 5, 5, 5), _zeros(4, 2, 1, 3, 3), _BN, _zeros(2, 4, 3, 1, 1)),
            r"w_spatial must be \(4, 3, 1, 3, 3\), not of shape \(4, 2, 1, 3, 3\)",
        ),
        (
            lambda f: f.conv2plus1d(_zeros(1, 3, 5, 5, 5), _zeros(4, 3, 1, 3, 3), _BN, _zeros(2, 5, 3, 1, 1)),
            r"w_temporal must be \(2, 4, 3, 1, 1\)",
        ),
        (
            lambda f: f.conv2plus1d(
                _zeros(1, 3, 5, 5, 5), _zeros(4, 3, 1, 3, 3), _BN._replace(mean=None), _zeros(2, 4, 3, 1, 1)
            ),
            "bn.mean is None: evaluation needs the running statistics",
        ),
        (
            lambda f: f.conv2plus1d(
                _zeros(1, 3, 5, 5, 5),
                _zeros(4, 3, 1, 3, 3),
                _BN._replace(mean=None),
                _zeros(2, 4, 3, 1, 1),
                training=True,
            ),
            "bn.mean and bn.var must both be tensors, or both None",
        ),
        (lambda f: f.causal_conv1d(_zeros(1, 3, 5), _zeros(2, 4, 3)), "x has 3 channels and weight takes 4"),
        (lambda f: f.causal_conv1d(_zeros(3, 5), _zeros(2, 4, 3)), r"x must be \(N, C_in, T\)"),
        (
            lambda f: f.tcn_block(_zeros(1, 3, 5), _zeros(2, 3, 3), None, _zeros(2, 2, 3), None, dilation=1),
            "in_channels=3 and out_channels=2 differ: the shortcut needs w_down",
        ),
        (
            lambda f: f.tcn_block(_zeros(1, 3, 5), _zeros(3, 3, 3), None, _zeros(3, 3, 2), None, dilation=1),
            r"w2 must be \(3, 3, 3\)",
        ),
        (
            lambda f: f.tcn_block(
                _zeros(1, 3, 5), WeightNorm(_zeros(3), _zeros(3, 3, 3)), None, _zeros(3, 3, 3), None, dilation=1
            ),
            r"w1.g must be \(3, 1, 1\), not of shape \(3,\)",
        ),
        (
            lambda f: f.tcn_block(
                _zeros(1, 3, 5), _zeros(3, 3, 3), None, _zeros(3, 3, 3), None, None, _zeros(3), dilation=1
            ),
            "b_down is given without w_down",
        ),
        (lambda f: f.rnn(_zeros(1, 5, 3), _zeros(4, 3), _zeros(4, 5)), r"w_hh must be \(5, 5\)"),
        (lambda f: f.rnn(_zeros(1, 5, 3), _zeros(4, 2), _zeros(4, 4)), r"w_ih must be \(4, 3\), not of shape \(4, 2\)"),
        (lambda f: f.lstm(_zeros(1, 5, 3), _zeros(4, 3), _zeros(4, 4)), r"w_hh must be \(16, 4\)"),
        (
            lambda f: f.lstm(_zeros(1, 5, 3), _zeros(16, 3), _zeros(16, 4), None, _zeros(1, 4)),
            r"state must be a pair \(h, c\), not Tensor",
        ),
        (
            lambda f: f.lstm(_zeros(1, 5, 3), _zeros(16, 3), _zeros(16, 4), None, (_zeros(1, 4), _zeros(2, 4))),
            r"state's c must be \(1, 4\), not of shape \(2, 4\)",
        ),
    ],
)
def test_bad_arguments_are_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(vidkernels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("op_name", list(OPS))
def test_the_case_of_a_call_is_the_case_of_its_inputs(op_name: str) -> None:
    op = OPS[op_name]
    for what, values in AWKWARD[op_name].items():
        case = op.case(values, dtype="fp16")
        inputs = op.inputs(case)
        assert op.case_of(*inputs.args, **inputs.kwargs) == case, what


@pytest.mark.parametrize("op_name", ["conv3d", "depthwise_conv3d", "conv2plus1d", "causal_conv1d", "tcn_block"])
def test_channels_last_inputs_are_known_as_such(op_name: str) -> None:
    op = OPS[op_name]
    case = op.case(TYPICAL[op_name], memory_format="channels_last")
    x = op.inputs(case).args[0]
    assert x.stride(1) == 1
    assert memory_format_name(x) == "channels_last"
    inputs = op.inputs(case)
    assert op.case_of(*inputs.args, **inputs.kwargs) == case


def test_a_call_trains_when_a_gradient_is_wanted() -> None:
    x, weight = torch.zeros(1, 3, 5, requires_grad=True), torch.zeros(2, 3, 3)
    assert OPS["causal_conv1d"].case_of(x, weight).training
    with torch.no_grad():
        assert not OPS["causal_conv1d"].case_of(x, weight).training


def test_each_call_is_judged_by_its_own_case(double: Op) -> None:
    """The same shape, with a gradient wanted and without."""
    op = replace(double, case_of=lambda x: Case(training=x.requires_grad and torch.is_grad_enabled()))
    op.implementation("forward", limits=lambda case: "forward only" if case.training else None)(lambda x: 2 * x)
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        with torch.no_grad():
            assert op(x, implementation="forward").tolist() == [2.0, 2.0]
        with pytest.raises(Unavailable, match="forward only"):
            op(x, implementation="forward")


def test_dropout_is_left_out_of_checks() -> None:
    case = OPS["tcn_block"].case({"dropout_p": 0.2}, training=True)
    assert case.without_randomness() == OPS["tcn_block"].case({}, training=True)
    assert OPS["lstm"].case({}).without_randomness() == OPS["lstm"].case({})


@pytest.mark.parametrize("op_name", list(OPS))
def test_inputs_are_seeded_and_rounded(op_name: str) -> None:
    op = OPS[op_name]
    values = TYPICAL[op_name]
    first, again = (op.inputs(op.case(values), seed=4).tensors() for _ in range(2))
    half = op.inputs(op.case(values, dtype="fp16"), seed=4).tensors()
    for a, b, c in zip(first, again, half, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.half(), c)
    other = op.inputs(op.case(values), seed=5).tensors()
    assert not torch.equal(first[0], other[0])


def test_inputs_map_keeps_names_and_numbers() -> None:
    bn = BatchNorm(torch.ones(2), torch.ones(2), None, None, momentum=0.5)
    mapped = Inputs((torch.ones(1), None, bn)).map(lambda tensor: 2 * tensor)
    assert isinstance(mapped.args[2], BatchNorm)
    assert mapped.args[2].momentum == 0.5
    assert mapped.args[2].mean is None
    assert [tensor.tolist() for tensor in mapped.tensors()] == [[2.0], [2.0, 2.0], [2.0, 2.0]]
    assert tensors_of(3.0) == ()


def test_widened_computes_in_float32_and_rounds_once() -> None:
    seen = []

    @widened
    def total(x: Tensor, *, offset: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((x.dtype, offset.dtype))
        return x.sum() + offset, offset

    y, offset = total(torch.ones(300, dtype=torch.bfloat16), offset=torch.tensor(1.0, dtype=torch.bfloat16))
    assert seen == [(torch.float32, torch.float32)]
    assert (y.dtype, offset.dtype) == (torch.bfloat16, torch.bfloat16)
    assert y.item() == 300.0  # 301 rounded; a sum in bfloat16 ends at 256
    assert wide(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_names_of_dtypes_and_layouts() -> None:
    assert dtype_name(torch.zeros(1, dtype=torch.bfloat16)) == "bf16"
    with pytest.raises(ValueError, match=r"dtype torch.int64 is not one of fp64, fp32"):
        dtype_name(torch.zeros(1, dtype=torch.int64))
    x = torch.zeros(2, 3, 4, 5, 6)
    assert memory_format_name(x) == "contiguous"
    assert memory_format_name(x.contiguous(memory_format=torch.channels_last_3d)) == "channels_last"
    assert memory_format_name(x[..., ::2]) == "contiguous"


def test_check_tensor_accepts_what_fits() -> None:
    check_tensor("x", torch.zeros(2, 3), "N C")
    check_tensor("x", torch.zeros(2, 3), (2, 3))


@pytest.mark.slow
def test_compiled_takes_more_cases_than_torch_recompiles() -> None:
    @compiled
    def twice(x: Tensor, *, scale: float = 2.0) -> Tensor:
        return scale * x

    for size in range(1, 13):
        assert twice(torch.ones(size)).sum().item() == 2 * size
    assert twice(torch.ones(3), scale=3.0).sum().item() == 9


def test_functions_compile_into_a_callers_graph() -> None:
    for name in ("conv2plus1d", "lstm"):
        op = OPS[name]
        inputs = op.inputs(op.case(TYPICAL[name]))
        call = getattr(vidkernels, name)
        graph = torch.compile(lambda *args, call=call, **kw: call(*args, **kw), backend="eager", fullgraph=True)
        torch.testing.assert_close(graph(*inputs.args, **inputs.kwargs), call(*inputs.args, **inputs.kwargs))


@pytest.mark.parametrize("op_name", list(OPS))
def test_function_and_folder_share_a_name(op_name: str) -> None:
    """`vidkernels.conv3d` is the function; its folder is still found by `from`."""
    function = getattr(vidkernels, op_name)
    assert callable(function)
    assert op_name in vidkernels.__all__
    inputs = OPS[op_name].inputs(OPS[op_name].case(TYPICAL[op_name]))
    got, want = (function(*inputs.args, **inputs.kwargs, implementation=i) for i in ("library", "reference"))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(function(*inputs.args, **inputs.kwargs), got)


def test_folders_stay_importable() -> None:
    lines = [
        "from vidkernels.conv3d.case import OP",
        "import vidkernels, vidkernels.conv3d.library, vidkernels.tcn_block.case",
        "from vidkernels.causal_conv1d import case",
        "assert callable(vidkernels.conv3d) and callable(vidkernels.tcn_block) and OP is vidkernels.OPS['conv3d']",
        "import sys; assert 'triton' not in sys.modules and 'torch._inductor' not in sys.modules",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
