"""Every model builds, learns, streams, and has the published sizes; names, weights and errors of `create`."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidbench import models
from vidbench.models import MODELS, TemporalConvNet, create, input_shapes, load_weights
from vidbench.models.i3d import SameConv3d, SameMaxPool3d
from vidbench.sweep import RequestError

STREAMING = [name for name, spec in MODELS.items() if spec.streams]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(name: str, *, clip_length: int = 8, seed: int = 0, **options: Any) -> tuple[nn.Module, list[Tensor]]:
    """A narrow model on 32×32 frames, in eval mode, and two clips for it."""
    torch.manual_seed(seed)
    model = create(name, num_classes=5, clip_length=clip_length, input_size=32, width_multiplier=0.125, **options)
    shapes = input_shapes(name, batch_size=2, clip_length=clip_length, height=32, width=32)
    return model.eval(), [torch.randn(shape) for shape in shapes.values()]


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create(name, **options)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, vidbench.models as m; m.MODELS; m.input_shapes('c3d'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", MODELS)
def test_it_makes_logits_and_every_weight_learns(name: str) -> None:
    model, inputs = small(name)
    with torch.no_grad():
        logits = model(*inputs)
        assert torch.equal(logits, model(*inputs))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()

    model.train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(*inputs), torch.tensor([0, 3])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimiser.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_spec_repeats_the_sizes_that_its_factory_has(name: str) -> None:
    spec = MODELS[name]
    accepted = inspect.signature(models.load_factory(spec.factory)).parameters
    for size in ("clip_length", "input_size"):
        if size in accepted:
            assert accepted[size].default == getattr(spec, size)
    assert "arXiv:" in spec.paper or "CVPR" in spec.paper


@pytest.mark.parametrize(
    ("name", "num_classes", "published"),
    [
        ("single_frame", 487, 60_276_583),
        ("early_fusion", 487, 60_590_215),
        ("two_stream", 101, 90_627_813 + 90_707_781),
        ("two_stream", 51, 90_525_363 + 90_605_331),
        ("c3d", 487, 79_991_015),
        ("c3d", 400, 79_634_576),
        ("c3d", 101, 78_409_573),
        ("i3d_rgb", 400, 12_697_264),
        ("i3d_rgb", 101, 12_390_789),
        ("i3d_flow", 400, 12_675_312),
        ("r3d_18", 400, 33_371_472),
        ("r3d_18", 101, 33_218_085),
        ("mc3_18", 400, 11_695_440),
        ("mc3_18", 101, 11_542_053),
        ("r2plus1d_18", 400, 31_505_325),
        ("r2plus1d_18", 101, 31_351_938),
    ],
)
def test_full_size_is_the_published_size(name: str, num_classes: int, published: int) -> None:
    assert parameters(on_meta(name, num_classes=num_classes)) == published


@pytest.mark.parametrize(
    ("name", "tensors", "keys"),
    [
        ("r3d_18", 122, ["stem.0.weight", "layer1.0.conv1.0.weight", "layer2.0.downsample.0.weight"]),
        ("mc3_18", 122, ["stem.1.running_mean", "layer4.1.conv2.1.bias", "fc.weight"]),
        ("r2plus1d_18", 224, ["stem.3.weight", "layer1.0.conv1.0.0.weight", "layer1.0.conv1.0.3.weight"]),
        ("i3d_rgb", 344, ["Conv3d_1a_7x7.conv3d.weight", "Mixed_3b.b1a.bn.weight", "logits.conv3d.bias"]),
        ("c3d", 22, ["conv1.weight", "conv3a.bias", "fc8.weight"]),
    ],
)
def test_names_are_those_of_published_weights(name: str, tensors: int, keys: list[str]) -> None:
    state = on_meta(name).state_dict()
    assert len(state) == tensors
    assert set(keys) <= set(state)


@pytest.mark.parametrize(
    ("size", "kernel", "channels", "with_linear"),
    [(2, 6, [27] * 7, 58_051), (2, 7, [27] * 7, 67_582), (2, 8, [24] * 8, 70_369)],
)
def test_tcn_has_the_parameters_of_the_authors_code(
    size: int, kernel: int, channels: list[int], with_linear: int
) -> None:
    assert parameters(TemporalConvNet(size, channels, kernel)) + channels[-1] + 1 == with_linear


@pytest.mark.parametrize(("kernel", "levels", "frames"), [(6, 7, 1271), (7, 7, 1525), (8, 8, 3571)])
def test_tcn_receptive_field(kernel: int, levels: int, frames: int) -> None:
    assert TemporalConvNet(1, [1] * levels, kernel).receptive_field == frames


def test_tcn_is_causal_and_sees_exactly_its_receptive_field() -> None:
    torch.manual_seed(0)
    tcn = TemporalConvNet(3, [16, 16], 3).eval()
    x = torch.randn(1, 3, 40, requires_grad=True)
    tcn(x)[0, :, 30].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(0).nonzero().flatten()
    assert (seen.min().item(), seen.max().item()) == (31 - tcn.receptive_field, 30)


def test_tcn_covers_the_clip() -> None:
    for clip_length in (1, 5, 6, 64, 1024):
        model = create("tcn", clip_length=clip_length, hidden_size=2, input_features=2)
        assert model.tcn.receptive_field >= clip_length


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("clip_length", [1, 9])
def test_a_stream_ends_in_the_logits_of_the_clip(name: str, clip_length: int) -> None:
    model, (clip,) = small(name, clip_length=clip_length)
    frames = clip.unbind(1 if clip.dim() == 3 else 2)
    with torch.no_grad():
        state, logits = None, torch.empty(0)
        for frame in frames:
            logits, state = model.step(frame, state)
        assert torch.allclose(logits, model(clip), atol=1e-5)


def test_a_stream_goes_on_beyond_the_clip_that_the_model_was_made_for() -> None:
    torch.manual_seed(0)
    model = create("tcn", num_classes=3, clip_length=4, hidden_size=6, input_features=5).eval()
    features = torch.randn(2, 50, 5)
    with torch.no_grad():
        state = None
        for t in range(50):
            logits, state = model.step(features[:, t], state)
            assert torch.allclose(logits, model(features[:, : t + 1]), atol=1e-5)


def test_hidden_size_and_input_features() -> None:
    model = create("tcn", hidden_size=7, input_features=11, num_classes=3)
    assert model(torch.randn(2, 5, 11)).shape == (2, 3)
    assert create("cnn_lstm", hidden_size=9, width_multiplier=0.1).rnn.hidden_size == 9
    with pytest.raises(RequestError, match="model 'c3d' has no hidden_size, given 7"):
        create("c3d", hidden_size=7, width_multiplier=0.1)


@pytest.mark.parametrize("name", ["frame_pool_avg", "frame_pool_max"])
def test_pools_over_time_are_blind_to_order(name: str) -> None:
    model, (clip,) = small(name)
    assert not MODELS[name].temporal
    with torch.no_grad():
        assert torch.allclose(model(clip), model(clip.flip(2)), atol=1e-5)


def test_average_pool_is_the_mean_of_the_frames_logits() -> None:
    model, (clip,) = small("frame_pool_avg")
    with torch.no_grad():
        frames = torch.stack([model(clip[:, :, t : t + 1]) for t in range(clip.shape[2])])
        assert torch.allclose(model(clip), frames.mean(0), atol=1e-5)


def test_single_frame_sees_the_middle_frame_alone() -> None:
    model, (clip,) = small("single_frame")
    other = torch.randn_like(clip)
    other[:, :, 4] = clip[:, :, 4]
    with torch.no_grad():
        assert torch.equal(model(clip), model(other))


def test_two_streams_are_averaged_after_the_softmax() -> None:
    model, (rgb, flow) = small("two_stream", clip_length=14)
    assert model.flow_fields == 10
    with torch.no_grad():
        stacked = torch.stack([flow[:, axis, field] for field in range(1, 11) for axis in (0, 1)], dim=1)
        spatial, temporal = model.spatial(rgb[:, :, 7]).softmax(1), model.temporal(stacked).softmax(1)
        assert torch.allclose(model(rgb, flow).softmax(1), (spatial + temporal) / 2, atol=1e-6)


def test_two_streams_need_flow() -> None:
    with pytest.raises(RequestError, match=r"clip_length=1 has none: give at least 2"):
        input_shapes("two_stream", clip_length=1)
    with pytest.raises(RequestError, match=r"clip_length=1 has no optical flow"):
        create("two_stream", clip_length=1, width_multiplier=0.1)
    model, (rgb, flow) = small("two_stream")
    with pytest.raises(ValueError, match="fewer than the 7 fields"):
        model(rgb, flow[:, :, :3])


def tensorflow_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """SAME padding axis by axis, as its definition goes."""
    pads: list[int] = []
    for size in reversed(x.shape[2:]):
        total = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


@pytest.mark.parametrize("size", [6, 7, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 1), (3, 2), (2, 2), (1, 1)])
def test_i3d_pads_as_tensorflow_does(size: int, kernel: int, stride: int) -> None:
    x = torch.rand(1, 2, size, size, size + 1)
    padded = tensorflow_same(x, kernel, stride)
    conv = SameConv3d(2, 3, (kernel,) * 3, (stride,) * 3)
    assert torch.allclose(conv(x), F.conv3d(padded, conv.weight, None, stride), atol=1e-6)
    pool = SameMaxPool3d((kernel,) * 3, (stride,) * 3)
    assert torch.equal(pool(x), F.max_pool3d(padded, kernel, stride))


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18", "i3d_rgb", "frame_pool_max", "cnn_lstm"])
def test_convolutional_models_take_any_size(name: str) -> None:
    model, _ = small(name)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 5, 36, 40)).shape == (1, 5)


@pytest.mark.parametrize("name", ["c3d", "early_fusion", "slow_fusion", "single_frame", "late_fusion"])
def test_models_with_fixed_sizes_say_which(name: str) -> None:
    model, (clip,) = small(name)
    with pytest.raises(ValueError, match=r"TxHxW = \dx32x32.*create it with that clip_length and input_size"):
        model(clip[:, :, :, :30])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("clip_length", [2, 16])
def test_clip_length_and_oblong_frames_are_fitted(name: str, clip_length: int) -> None:
    model = on_meta(name, num_classes=3, clip_length=clip_length, input_size=(40, 48), width_multiplier=0.1)
    shapes = input_shapes(name, clip_length=clip_length, height=40, width=48)
    assert model(*(torch.empty(shape, device="meta") for shape in shapes.values())).shape == (1, 3)


def test_input_shapes() -> None:
    assert input_shapes("c3d", batch_size=2) == {"rgb": (2, 3, 16, 112, 112)}
    two = input_shapes("two_stream", clip_length=9, height=32, width=48)
    assert list(two.items()) == [("rgb", (1, 3, 9, 32, 48)), ("flow", (1, 2, 8, 32, 48))]
    assert input_shapes("i3d_flow")["flow"] == (1, 2, 64, 224, 224)
    assert input_shapes("tcn", batch_size=3, clip_length=7, input_features=5) == {"features": (3, 7, 5)}
    assert input_shapes("their.own:model", clip_length=4, height=8, width=8) == {"rgb": (1, 3, 4, 8, 8)}


# Names and a user's own models

OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width_multiplier=1.0):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)
        self.width_multiplier = width_multiplier

    def forward(self, rgb):
        return self.fc(rgb.mean((2, 3, 4)))

def bare():
    return Net(7)

def anything(**given):
    net = Net(given["num_classes"])
    net.given = given
    return net

def broken(num_classes):
    raise ValueError("no such size\\nmore")

def function(num_classes):
    return len

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with a user's models."""
    (tmp_path / "own_models.py").write_text(OWN)
    (tmp_path / "own_broken.py").write_text("import not_there_either\n")
    (tmp_path / "own_syntax.py").write_text("def (\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_models", "own_broken", "own_syntax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_models"


def test_a_users_model_gets_what_its_factory_takes(own: str) -> None:
    net = create(f"{own}:Net", num_classes=4, width_multiplier=0.5, clip_length=3, input_size=9)
    assert net(torch.randn(2, 3, 4, 5, 5)).shape == (2, 4)
    assert net.width_multiplier == 0.5
    assert create(f"{own}:bare").fc.out_features == 7
    assert create(f"{own}:anything", num_classes=4, input_size=9).given == {
        "num_classes": 4,
        "input_size": 9,
        "width_multiplier": 1.0,
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("c3dd", "unknown model 'c3dd': did you mean 'c3d'?"),
        ("nowhere_at_all:f", "model 'nowhere_at_all:f': no module 'nowhere_at_all'; is its folder on PYTHONPATH?"),
        ("own_models.sub:f", "model 'own_models.sub:f': no module 'own_models.sub'; is its folder on PYTHONPATH?"),
        ("own_broken:f", "importing own_broken raised ModuleNotFoundError: No module named 'not_there_either'"),
        ("own_syntax:f", "importing own_syntax raised SyntaxError:"),
        ("own_models:gone", "model 'own_models:gone': own_models has no 'gone'"),
        ("own_models:number", "model 'own_models:number': number is no factory but a int"),
        ("own_models:broken", "cannot be built with num_classes=400: ValueError: no such size"),
        ("own_models:function", "the factory made a builtin_function_or_method, wanted a torch.nn.Module"),
        ("own_models:", "is not package.module:factory"),
    ],
)
def test_what_is_wrong_with_a_name_is_one_line(own: str, name: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        create(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Weights


def test_weights_are_read_back(tmp_path: Path) -> None:
    model, inputs = small("c3d", seed=1)
    torch.save(model.state_dict(), tmp_path / "c3d.pt")
    other, _ = small("c3d", seed=2, weights=tmp_path / "c3d.pt")
    with torch.no_grad():
        assert torch.equal(model(*inputs), other(*inputs))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model, _ = small("c3d")
    state = model.state_dict()
    state["fc9.weight"] = state.pop("fc7.weight")
    state["fc8.bias"] = torch.zeros(6)
    torch.save(state, tmp_path / "c3d.pt")
    before = model.fc8.weight.clone()
    with pytest.raises(RequestError) as error:
        load_weights(model, tmp_path / "c3d.pt")
    for part in ("missing fc7.weight", "unexpected fc9.weight", "wrongly shaped fc8.bias (6,) instead of (5,)"):
        assert part in str(error.value)
    assert torch.equal(model.fc8.weight, before)


def test_a_head_can_be_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = create("two_stream", num_classes=9, clip_length=3, input_size=32, width_multiplier=0.1)
    torch.save(published.state_dict(), tmp_path / "two.pt")
    model = create("two_stream", num_classes=4, clip_length=3, input_size=32, width_multiplier=0.1)
    head = model.spatial.full8.weight.clone()
    with pytest.raises(RequestError, match=r"wrongly shaped spatial\.full8\.weight"):
        load_weights(model, tmp_path / "two.pt")
    load_weights(model, tmp_path / "two.pt", replace_head=True)
    assert torch.equal(model.spatial.full8.weight, head)
    assert torch.equal(model.temporal.conv1.weight, published.temporal.conv1.weight)
    with pytest.raises(RequestError, match="Linear names no classifier"):
        load_weights(nn.Linear(2, 2), tmp_path / "two.pt", replace_head=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_names_its_head(name: str) -> None:
    model = on_meta(name, num_classes=3, clip_length=8, input_size=32, width_multiplier=0.1)
    for head in model.heads:
        weights = dict(model.get_submodule(head).named_parameters())
        assert {parameter.shape[0] for parameter in weights.values()} == {3}


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        create("c3d", width_multiplier=0.1, weights=tmp_path / "gone.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(RequestError, match=r"no file of torch\.save with tensors alone"):
        load_weights(nn.Linear(1, 1), tmp_path / "text.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Path))
    with pytest.raises(RequestError, match=r"no file of torch\.save with tensors alone"):
        load_weights(nn.Linear(1, 1), tmp_path / "code.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(RequestError, match="hold no state_dict"):
        load_weights(nn.Linear(1, 1), tmp_path / "other.pt")
