"""Multiply-adds: three counters against each other, published figures and hand-made sums."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidbench import counting
from vidbench.counting import count_model, count_op, multiplies_nothing, recurrent_macs
from vidbench.models import MODELS, create, input_shapes
from vidkernels import OPS


def published(name: str, **sizes: Any) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    """A full-size model without memory, and its input shapes."""
    with torch.device("meta"):
        model = create(name, num_classes=sizes.pop("num_classes", 400))
    return model, input_shapes(name, **sizes)


@pytest.mark.parametrize(
    ("name", "sizes", "giga_macs"),
    [
        ("single_frame", {"num_classes": 487}, 1.129),
        ("early_fusion", {"num_classes": 487}, 2.044),
        ("two_stream", {"num_classes": 101}, 1.664 + 2.614),
        ("c3d", {}, 38.55),
        ("i3d_rgb", {}, 111.15),
        ("i3d_rgb", {"clip_length": 16}, 27.79),
        ("i3d_flow", {}, 102.34),
        ("r3d_18", {}, 40.697),
        ("mc3_18", {}, 43.343),
        ("r2plus1d_18", {}, 40.519),
    ],
)
def test_published_macs(name: str, sizes: dict[str, int], giga_macs: float) -> None:
    counts = count_model(*published(name, **sizes))
    assert counts.macs == pytest.approx(giga_macs * 1e9, rel=5e-4)
    assert set(counts.by.values()) == {counts.macs}


@pytest.mark.parametrize("name", MODELS)
def test_all_counters_agree_on_every_model(name: str) -> None:
    with torch.device("meta"):
        model = create(name, num_classes=5, clip_length=8, input_size=32, width_multiplier=0.25)
    shapes = input_shapes(name, batch_size=2, clip_length=8, height=32, width=32)
    forward, train = count_model(model, shapes), count_model(model, shapes, train=True)
    assert forward.uncounted == train.uncounted == ()
    assert set(forward.by) == {"closed_form", "meta", "fvcore"}
    assert set(train.by) == {"closed_form", "meta"}
    assert forward.macs is not None
    assert train.macs is not None
    assert 2 * forward.macs < train.macs < 3 * forward.macs


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.streams])
def test_a_streaming_step_is_counted(name: str) -> None:
    class Step(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, frame: Tensor) -> Tensor:
            return self.model.step(frame)[0]

    model = create(name, num_classes=5, clip_length=8, input_size=32, width_multiplier=0.125)
    (shape,) = input_shapes(name, clip_length=8, height=32, width=32).values()
    frame = (shape[0], shape[2]) if len(shape) == 3 else (*shape[:2], *shape[3:])
    step = count_model(Step(model), [frame])
    single = count_model(model, [(shape[0], 1, shape[2]) if len(shape) == 3 else (*shape[:2], 1, *shape[3:])])
    assert step.uncounted == ()
    assert step.macs == single.macs


def test_the_model_itself_is_neither_run_nor_changed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_model(model, [(2, 3, 8, 8)], train=True)
    assert not model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.is_meta for parameter in model.parameters())
    assert not model[0]._forward_hooks


# Recurrent layers


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers(kind: type[nn.RNNBase], layers: int, bidirectional: bool) -> None:
    model = kind(5, 7, num_layers=layers, bidirectional=bidirectional, batch_first=True)
    gates, d = {nn.RNN: 1, nn.LSTM: 4, nn.GRU: 3}[kind], 2 if bidirectional else 1
    by_hand = 2 * 4 * sum(d * gates * 7 * ((5 if layer == 0 else d * 7) + 7) for layer in range(layers))
    forward, train = count_model(model, [(2, 4, 5)]), count_model(model, [(2, 4, 5)], train=True)
    assert forward.by == {"closed_form": by_hand, "meta": by_hand, "fvcore": by_hand}
    # No gradient is wanted of the features, nor of the zeros before the first frame.
    features, start = d * gates * 7 * 2 * 4 * 5, layers * d * gates * 7 * 2 * 7
    assert train.by == dict.fromkeys(("closed_form", "meta"), 3 * by_hand - features - start)
    assert forward.uncounted == train.uncounted == ()


def test_lstm_closed_form() -> None:
    assert recurrent_macs(32 * 16, 128, 256, gates=4) == 32 * 16 * 4 * 256 * (128 + 256)
    assert recurrent_macs(1, 3, 5, gates=4, proj_size=2) == 4 * 5 * (3 + 2) + 5 * 2


def test_lstm_with_projection() -> None:
    counts = count_model(nn.LSTM(5, 7, proj_size=3, num_layers=2), [(9, 2, 5)])
    assert counts.uncounted == ()
    assert counts.macs == 9 * 2 * (4 * 7 * (5 + 3) + 7 * 3 + 4 * 7 * (3 + 3) + 7 * 3)


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNNCell, 1), (nn.LSTMCell, 4), (nn.GRUCell, 3)])
def test_cells(kind: type[nn.RNNCellBase], gates: int) -> None:
    counts = count_model(kind(5, 7), [(2, 5)])
    assert counts.uncounted == ()
    assert counts.macs == 2 * gates * 7 * (5 + 7)


# Convolutions


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_convolutions_train_at_three_times_forward(groups: int) -> None:
    model = nn.Sequential(nn.Conv3d(8, 8, 1), nn.Conv3d(8, 16, 3, padding=1, groups=groups))
    shape = (2, 8, 4, 6, 6)
    positions = 2 * 4 * 6 * 6
    pointwise, grouped = positions * 8 * 8, positions * 16 * (8 // groups) * 27
    assert count_model(model, [shape]).macs == pointwise + grouped
    train = count_model(model, [shape], train=True)
    assert train.by == dict.fromkeys(("closed_form", "meta"), 2 * pointwise + 3 * grouped)
    assert train.uncounted == ()


@pytest.mark.parametrize("groups", [1, 4])
def test_transposed_convolutions(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 4, 3, stride=2, groups=groups))
    forward, train = count_model(model, [(2, 8, 5, 6)]), count_model(model, [(2, 8, 5, 6)], train=True)
    pointwise, transposed = 60 * 64, 60 * 8 * (4 // groups) * 9
    assert set(forward.by.values()) == {pointwise + transposed}
    assert set(train.by.values()) == {2 * pointwise + 3 * transposed}


def test_frozen_layers_make_no_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6))
    model[0].requires_grad_(False)
    train = count_model(model, [(2, 3)], train=True)
    assert train.by == dict.fromkeys(("closed_form", "meta"), 2 * (12 + 2 * 20 + 3 * 30))


# What counters do not know


@pytest.fixture
def shape_op() -> Iterator[Callable[[Tensor], Tensor]]:
    """An operator that torch.library knows and no counter does."""
    with torch.library._scoped_library("counting_test", "FRAGMENT") as library:
        library.define("mystery(Tensor x) -> Tensor")
        library.impl("mystery", lambda x: x @ x, "CompositeExplicitAutograd")
        library.impl("mystery", torch.empty_like, "Meta")
        yield lambda x: torch.ops.counting_test.mystery(x)


def test_a_custom_operator_is_named(shape_op: Callable[[Tensor], Tensor]) -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return shape_op(self.fc(x))

    counts = count_model(Custom(), [(4, 4)])
    assert counts.macs == 64
    assert counts.uncounted == ("meta: counting_test::mystery", "fvcore: counting_test::mystery")


class Functional(nn.Module):
    """A product outside any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_a_difference_is_named_and_the_larger_count_is_used() -> None:
    counts = count_model(Functional(), [(2, 3)])
    assert counts.macs == 36
    assert counts.uncounted == ("meta 36 != closed form 0", "fvcore 36 != closed form 0")


def test_attention_is_seen_by_those_who_can() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    counts = count_model(Attention(), [(2, 3, 5, 8)])
    assert counts.by["meta"] == counts.by["fvcore"] == 2 * 3 * 2 * 5 * 5 * 8


def test_what_adds_up_to_nothing_is_not_named() -> None:
    for name in ("aten::relu_", "aten::max_pool3d", "aten::batch_norm", "aten::threshold_backward", "aten::add_"):
        assert multiplies_nothing(name)
    for name in ("aten::mm", "aten::lstm", "aten::convolution_backward", "aten::cdist", "mine::relu", "aten::einsum"):
        assert not multiplies_nothing(name)


def test_a_model_that_needs_values_is_said_to() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    counts = count_model(Branch(), [(2, 3)])
    assert counts.macs is None
    assert counts.uncounted[0].startswith("the model does not run on the meta device: ")


def test_without_fvcore_its_count_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "fvcore", None)
    counts = count_model(nn.Linear(3, 4), [(2, 3)])
    assert counts.by == {"closed_form": 24, "meta": 24}
    assert counts.uncounted == ()


# Ops


@pytest.mark.parametrize("name", OPS)
def test_ops_agree_with_the_meta_device(name: str) -> None:
    op = OPS[name]
    case = op.case_type()
    forward, train = count_op(op, case), count_op(op, case, train=True)
    assert forward.uncounted == train.uncounted == ()
    assert forward.by == {"closed_form": op.macs(case), "meta": op.macs(case)}
    assert train.macs == 3 * op.macs(case)
