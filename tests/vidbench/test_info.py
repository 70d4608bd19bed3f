"""What `vidbench info` says: columns that add up, activations as fvcore counts them, fields by closed forms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from fvcore.nn import ActivationCountAnalysis
from torch import Tensor, nn
from typer.testing import CliRunner

from vidbench.cli import app
from vidbench.info import describe, parse_clip, receptive_fields, table, without_memory
from vidbench.models import create, input_shapes
from vidbench.sweep import RequestError
from vidkernels.shapes import tcn_receptive_field


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def field(layers: Iterable[tuple[int, int]]) -> int:
    """Frames that one output of a chain of (taps, stride) depends on: r ← r + (k - 1) j, j ← j s."""
    frames, jump = 1, 1
    for taps, stride in layers:
        frames, jump = frames + (taps - 1) * jump, jump * stride
    return frames


def fields(name: str, clip_length: int, **options: Any) -> dict[str, int | None]:
    """Of a narrow model on small frames; the whole model's under ""."""
    model = create(name, num_classes=2, clip_length=clip_length, input_size=32, width_multiplier=1 / 16, **options)
    return receptive_fields(model, input_shapes(name, clip_length=clip_length, height=32, width=32), clip_length)


# Receptive fields


def test_fields_of_c3d() -> None:
    found = fields("c3d", 72)
    chain = [(3, 1), (1, 1), (3, 1), (2, 2), (3, 1), (3, 1), (2, 2), (3, 1), (3, 1), (2, 2), (3, 1), (3, 1)]
    layers = [name for name in found if name.startswith(("conv", "pool")) and name != "pool5"]
    assert len(layers) == len(chain)
    for i, layer in enumerate(layers):
        assert found[layer] == field(chain[: i + 1]), layer
    assert found["conv5b"] == 68
    assert found["fc6"] == found[""] == 72


def test_fields_of_i3d() -> None:
    found = fields("i3d_rgb", 112)
    chain = [(7, 2), (3, 1), (3, 1), (3, 1), (3, 2), *[(3, 1)] * 5, (2, 2), (3, 1), (3, 1)]
    assert found["Conv3d_1a_7x7.conv3d"] == 7
    assert found["Mixed_3c.b2b.relu"] == field(chain[:4]) == 19
    assert found["Mixed_4f.b1b.relu"] == field(chain[:10]) == 63
    assert found["Mixed_5c.b1b.conv3d"] == field(chain) == 99
    assert found["Mixed_5c.b0.relu"] == field(chain[:-1])
    assert found[""] == 112


@pytest.mark.parametrize("name", ["r3d_18", "r2plus1d_18"])
def test_fields_of_residual_networks(name: str) -> None:
    found = fields(name, 48)
    chain = [(3, 1)] * 5 + [(3, 2)] + [(3, 1)] * 3 + [(3, 2)] + [(3, 1)] * 3
    assert found["layer1.1.relu"] == field(chain[:5]) == 11
    assert found["layer2.1.relu"] == field(chain[:9]) == 25
    assert found["layer2.0.downsample.0"] == 11
    assert found["fc"] == found[""] == 48


def test_mc3_sees_little_of_time_before_it_pools() -> None:
    found = fields("mc3_18", 16)
    assert found["layer4.1.relu"] == field([(3, 1)] * 5) == 11
    assert found[""] == 16


@pytest.mark.parametrize(("kernel", "levels"), [(2, 4), (3, 3), (5, 2)])
def test_fields_of_a_tcn(kernel: int, levels: int) -> None:
    found = fields("tcn", 40, kernel_size=kernel, levels=levels, hidden_size=2)
    for level in range(levels):
        closed = tcn_receptive_field(kernel, (2**i for i in range(level + 1)))
        assert found[f"tcn.network.{level}.relu"] == closed
    assert found["tcn.network.0.conv1"] == kernel
    assert found[""] == 1 + 2 * (kernel - 1) * (2**levels - 1)


def test_fields_of_an_encoder_decoder_tcn() -> None:
    found = fields("ed_tcn", 64, kernel_size=5)
    assert found["tcn.encoder.0.conv"] == 5
    encoder = field([(5, 1), (2, 2), (5, 1), (2, 2)])
    # Five repeated frames come from three positions, of four frames each.
    assert found["tcn.decoder.0.conv"] == encoder + 2 * 4
    # Then three positions, of two frames each: they and two more on both sides come from four of four frames.
    assert found["tcn.decoder.1.conv"] == found["tcn.fc"] == encoder + 3 * 4


def test_fields_of_fused_networks() -> None:
    slow = fields("slow_fusion", 10)
    assert [slow[f"trunk.conv{i}"] for i in (1, 2, 3)] == [4, field([(4, 2), (2, 2)]), 10]
    assert fields("early_fusion", 10)["trunk.conv1"] == 10
    late = fields("late_fusion", 16)
    assert (late["trunk.pool5"], late["fc6"], late[""]) == (1, 2, 2)
    assert fields("single_frame", 5)[""] == 1


def test_fields_over_optical_flow_are_in_frames() -> None:
    """A field lies between two frames: ten of them see eleven frames."""
    found = fields("two_stream", 14)
    assert (found["spatial.full8"], found["temporal.conv1"], found[""]) == (1, 11, 11)


def test_fields_of_recurrent_and_pooled_frames() -> None:
    lstm = fields("cnn_lstm", 6)
    assert (lstm["backbone.avgpool"], lstm["rnn"], lstm[""]) == (1, 6, 6)
    pooled = fields("frame_pool_max", 5)
    assert (pooled["backbone.avgpool"], pooled["fc"]) == (1, 5)


def test_squeeze_and_excitation_sees_the_whole_clip() -> None:
    found = fields("x3d_s", 13)
    assert found["blocks.0.activation"] == 5
    assert found["blocks.1.res_blocks.0.branch2.norm_b.0"] == 7
    assert found["blocks.1.res_blocks.0.branch2.norm_b.1.block.0"] == 13


class Own(nn.Module):
    """Frames 1 and 2 of the clip, by a filter of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 2, (2, 1, 1))
        nn.init.zeros_(self.conv.weight)
        self.unused = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, rgb: Tensor) -> Tensor:
        return self.scale * self.conv(rgb[:, :, 1:3]).mean((2, 3, 4))


def test_zero_weights_hide_nothing_and_the_model_is_left_alone() -> None:
    model = Own()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = receptive_fields(model, {"rgb": (1, 3, 6, 2, 2)}, 6)
    assert found == {"": 2, "conv": 2, "unused": None}
    assert model.training
    assert not model.conv._forward_hooks
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_makes_nan_by_itself_has_no_known_field() -> None:
    class Broken(nn.Module):
        def forward(self, rgb: Tensor) -> Tensor:
            return rgb.mean((1, 2, 3, 4)).unsqueeze(1) * torch.nan

    assert receptive_fields(Broken(), {"rgb": (1, 3, 2, 2, 2)}, 2) == {"": None}


# Counts


@pytest.mark.parametrize(
    "name", ["late_fusion", "two_stream", "cnn_rnn", "ed_tcn", "i3d_flow", "r2plus1d_18", "shufflenet_v2_3d"]
)
def test_columns_add_up(name: str) -> None:
    """At a size at which every layer is there."""
    info = describe(name, num_classes=7, clip_length=8, input_size=64, width_multiplier=0.25, fields=False)
    with without_memory():
        model = create(name, num_classes=7, clip_length=8, input_size=64, width_multiplier=0.25)
    assert info.params == sum(parameter.numel() for parameter in model.parameters())
    assert info.macs == sum(module.macs for module in info.modules)
    assert info.uncounted == ()
    assert {module.name for module in info.modules} <= {name for name, _ in model.named_modules()}
    assert all(module.output_shape for module in info.modules if module.macs)


@pytest.mark.parametrize("name", ["mc3_18", "c3d", "two_stream", "tcn"])
def test_activations_are_those_of_fvcore(name: str) -> None:
    sizes = {"clip_length": 4, "input_size": 32, "width_multiplier": 0.125}
    info = describe(name, num_classes=7, fields=False, **sizes)
    model = create(name, num_classes=7, **sizes).eval()
    inputs = tuple(torch.zeros(shape) for shape in info.inputs.values())
    analysis = ActivationCountAnalysis(model, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        assert info.activations == analysis.total()


def test_recurrent_layers_are_rows_with_their_gates() -> None:
    info = describe("cnn_lstm", num_classes=3, clip_length=5, input_size=32, width_multiplier=0.125, hidden_size=9)
    lstm = next(module for module in info.modules if module.name == "rnn")
    assert (lstm.type, lstm.output_shape, lstm.receptive_field) == ("LSTM", (1, 5, 9), 5)
    assert lstm.macs == 5 * 4 * 9 * (64 + 9)
    assert lstm.params == 4 * 9 * (64 + 9) + 2 * 4 * 9
    assert lstm.activations == 45


def test_weight_norm_belongs_to_its_layer() -> None:
    info = describe("tcn", num_classes=3, clip_length=5, hidden_size=6, input_features=4, kernel_size=3, fields=False)
    first = info.modules[0]
    assert (first.name, first.type, first.params) == ("tcn.network.0.conv1", "CausalConv1d", 6 + 6 * 4 * 3 + 6)
    assert not any("parametrizations" in module.name for module in info.modules)


def test_what_is_in_no_layer_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Functional(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(num_classes, 3))

        def forward(self, rgb: Tensor) -> Tensor:
            return nn.functional.linear(rgb.mean((2, 3, 4)), self.weight)

    monkeypatch.setattr("vidbench.models.load_factory", lambda path: Functional)
    info = describe("own:functional", num_classes=5)
    assert [(module.name, module.params, module.macs) for module in info.modules] == [
        ("(model)", 15, 0),
        ("(in no layer)", 0, 15),
    ]
    assert (info.params, info.macs, info.receptive_field) == (15, 15, 16)
    assert any("closed form 0" in line for line in info.uncounted)


# The command


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["info", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_json_of_the_published_size() -> None:
    read = json.loads(run("r2plus1d_18", "--clip", "3x16x112x112", "--no-fields", "--format", "json"))
    assert read["total"]["params"] == 31_505_325
    assert read["total"]["macs"] == pytest.approx(40.519e9, rel=1e-4)
    assert read["total"]["flops"] == 2 * read["total"]["macs"]
    assert read["inputs"] == {"rgb": [1, 3, 16, 112, 112]}
    for column in ("params", "macs", "flops", "activations"):
        assert sum(module[column] for module in read["modules"]) == read["total"][column]


def test_the_table() -> None:
    lines = run("c3d", "--clip-length", "8", "--input-size", "32", "--width-multiplier", "0.25").splitlines()
    assert lines[0] == "c3d: rgb 1×3×8×32×32 → 400 classes"
    assert " ".join(lines[1].split()) == "module type output params MACs FLOPs activations frames seen"
    assert lines[2].split()[:3] == ["conv1", "Conv3d", "1×16×8×32×32"]
    assert lines[-1].split()[0] == "total"
    assert lines[-1].split()[-1] == "8"


def test_depth_groups_layers() -> None:
    info = describe("r3d_18", clip_length=4, input_size=32, fields=False)
    shallow, deep = table(info, depth=1), table(info, depth=9)
    assert "layer1.0.conv1.0" in deep
    assert [line.split()[0] for line in shallow.splitlines()[2:]] == [
        *("stem", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc", "total")
    ]
    assert shallow.splitlines()[-1].split() == deep.splitlines()[-1].split()


def test_a_clip_is_read_with_or_without_its_channels() -> None:
    assert parse_clip("c3d", "3x16x112x96") == parse_clip("c3d", "16×112×96") == (16, (112, 96))
    assert parse_clip("i3d_flow", "2x65x224x224") == (65, (224, 224))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c3dd"], "unknown model 'c3dd': did you mean 'c3d'?"),
        (["c3d", "--clip", "16"], "clip '16' is not channels, frames, rows and columns, such as 3x16x112x112"),
        (["c3d", "--clip", "2x8x32x32"], "clip '2x8x32x32' has 2 channels; model 'c3d' takes 3"),
        (["tcn", "--clip", "3x8x32x32"], "takes features of frames, not a clip: give --clip-length"),
        (["c3d", "--clip", "3x8x32x32", "--clip-length", "8"], "give one or the other"),
        (["c3d", "--backbone", "resnet50"], "model 'c3d' has no backbone, given resnet50"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(RequestError) as error:
        run(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
