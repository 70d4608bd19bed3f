"""Sizes and costs against torch's own, and against published figures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contract_cases import AWKWARD, TYPICAL
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vidkernels import OPS
from vidkernels.op import tensors_of
from vidkernels.shapes import conv_size, mid_channels, tcn_receptive_field, tensor_bytes, triple


@given(
    size=st.integers(1, 40),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 5),
    dilation=st.integers(1, 4),
)
def test_conv_size_is_what_torch_yields(size: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    x, weight = torch.empty(1, 1, size, device="meta"), torch.empty(1, 1, kernel, device="meta")
    try:
        want = F.conv1d(x, weight, None, stride, padding, dilation).shape[2]
    except RuntimeError:
        with pytest.raises(ValueError, match="more than the padded input's"):
            conv_size(size, kernel, stride, padding, dilation)
    else:
        assert conv_size(size, kernel, stride, padding, dilation) == want


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "published"),
    [
        (64, 64, 144),
        (64, 128, 230),
        (128, 128, 288),
        (128, 256, 460),
        (256, 256, 576),
        (256, 512, 921),
        (512, 512, 1152),
    ],
)
def test_mid_channels_of_r2plus1d(in_channels: int, out_channels: int, published: int) -> None:
    assert mid_channels(in_channels, out_channels, (3, 3, 3)) == published
    case = OPS["conv2plus1d"].case({"in_channels": in_channels, "out_channels": out_channels})
    assert case.mid_channels == published  # type: ignore[attr-defined]


@pytest.mark.parametrize(("in_channels", "out_channels"), [(3, 64), (64, 64), (256, 512)])
def test_mid_channels_keep_the_parameters_of_the_3d_convolution(in_channels: int, out_channels: int) -> None:
    full = 27 * in_channels * out_channels
    one_more = 9 * in_channels + 3 * out_channels
    mid = mid_channels(in_channels, out_channels, (3, 3, 3))
    assert mid * one_more <= full < (mid + 1) * one_more


@pytest.mark.parametrize(("kernel", "blocks", "published"), [(6, 7, 1271), (7, 7, 1525), (8, 8, 3571), (7, 8, 3061)])
def test_receptive_field_of_published_tcns(kernel: int, blocks: int, published: int) -> None:
    assert tcn_receptive_field(kernel, [2**i for i in range(blocks)]) == published
    assert published == 1 + 2 * (kernel - 1) * (2**blocks - 1)


@pytest.mark.parametrize("op_name", list(OPS))
def test_macs_are_those_torch_counts(op_name: str) -> None:
    op = OPS[op_name]
    # torch's recurrent layers are one call each that its counter does not know.
    name = "reference" if op_name in ("rnn", "lstm") else "library"
    for what, values in AWKWARD[op_name].items():
        case = op.case(values)
        inputs = op.inputs(case, device="meta")
        with FlopCounterMode(display=False) as counter:
            op[name].fn(*inputs.args, **inputs.kwargs)
        assert op.macs(case) == counter.get_total_flops() / 2, what


@pytest.mark.parametrize("op_name", [name for name in OPS if name not in ("rnn", "lstm")])
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_bytes_are_those_of_the_tensors(op_name: str, dtype: str) -> None:
    op = OPS[op_name]
    for what, values in AWKWARD[op_name].items():
        case = op.case(values, dtype=dtype)
        inputs = op.inputs(case, device="meta")
        outputs = tensors_of(op["library"].fn(*inputs.args, **inputs.kwargs))
        want = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs.tensors(), *outputs))
        assert op.bytes_moved(case) == want, what


@pytest.mark.parametrize(("op_name", "cells"), [("rnn", 0), ("lstm", 1)])
def test_bytes_of_recurrent_layers_count_the_last_state_once(op_name: str, cells: int) -> None:
    op = OPS[op_name]
    for values in AWKWARD[op_name].values():
        case = op.case(values)
        inputs = op.inputs(case)
        y, _ = op["library"].fn(*inputs.args, **inputs.kwargs)
        cell = cells * case.batch_size * values["hidden_size"]
        assert op.bytes_moved(case) == 4 * (sum(t.numel() for t in (*inputs.tensors(), y)) + cell)


def test_costs_of_known_layers() -> None:
    """R3D-18's 64→64 layer at 16×56², 88.8 GFLOP for a batch of 8; and the pair, within a percent of it."""
    sizes = {"batch_size": 8, "in_channels": 64, "out_channels": 64, "clip_length": 16, "height": 56, "width": 56}
    dense = OPS["conv3d"].macs(OPS["conv3d"].case(sizes))
    assert round(2 * dense / 1e9, 1) == 88.8
    assert OPS["conv2plus1d"].macs(OPS["conv2plus1d"].case(sizes)) == pytest.approx(dense, rel=0.01)


def test_one_lstm_frame() -> None:
    case = OPS["lstm"].case({"clip_length": 1, "input_features": 3, "hidden_size": 5})
    assert OPS["lstm"].macs(case) == 4 * 5 * (3 + 5)


def test_output_shapes() -> None:
    for op_name, cases in AWKWARD.items():
        for what, values in cases.items():
            case = OPS[op_name].case(values)
            inputs = OPS[op_name].inputs(case, device="meta")
            y = tensors_of(OPS[op_name]["library"].fn(*inputs.args, **inputs.kwargs))[0]
            assert tuple(y.shape) == case.y_shape, (op_name, what)  # type: ignore[attr-defined]


def test_typical_cases_cover_every_op() -> None:
    assert set(TYPICAL) == set(AWKWARD) == set(OPS)


@pytest.mark.parametrize("value", [(1, 2), 1.5, "3x3", None, (1, 2, 3.0)])
def test_triple_wants_an_integer_or_three(value: object) -> None:
    with pytest.raises(ValueError, match=r"stride=.* is neither an integer nor three of them \(T, H, W\)"):
        triple(value, "stride")  # type: ignore[arg-type]


def test_triple_repeats_an_integer() -> None:
    assert triple(2, "stride") == (2, 2, 2)
    assert triple([1, 2, 3], "stride") == (1, 2, 3)


def test_tensor_bytes_counts_each_tensor_once() -> None:
    assert tensor_bytes("bf16", (2, 3), (4,)) == 2 * (6 + 4)
