"""What the experiments of the claims measure, against closed forms and by other means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidbench import models
from vidbench.claims import (
    Experiment,
)
from vidbench.claims.contenders import (
    Averaged,
    ClipStreams,
    c3d_long_first_kernel,
    i3d_without_bottlenecks,
    lstm,
    lstm_forget_bias,
    rnn_orthogonal,
)
from vidbench.claims.experiments import LOST, Mixed, _in_turn, perform, salience_of
from vidbench.data.tasks import create
from vidbench.trials import TaskData


def rows_of(kind: str, seed: int = 0, **given: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in perform(Experiment(kind, given, seed), "cpu")]


def test_rectifications_are_those_of_the_papers_networks() -> None:
    """34 and 17 in one forward pass, 61.85 and 20.27 million values: counted by running torchvision's."""
    (factorised,), (whole,) = (rows_of("relus", model=name) for name in ("r2plus1d_18", "r3d_18"))
    (paper,) = rows_of("relus", model="r2plus1d_18", mid_channels="per_convolution")
    assert paper["params"] == pytest.approx(whole["params"], rel=1e-3)
    assert (factorised["relus"], whole["relus"]) == (34, 17)
    assert factorised["rectified"] == pytest.approx(61.85e6, rel=1e-3)
    assert whole["rectified"] == pytest.approx(20.27e6, rel=1e-3)


def test_a_stream_carries_the_state_or_the_history() -> None:
    own = "vidbench.claims.contenders:lstm"
    (recurrent,) = rows_of("stream_state", model=own, clip_length=64, hidden_size=32)
    assert recurrent["state_bytes"] == 2 * 32 * 4
    (convolutional,) = rows_of("stream_state", model="tcn", clip_length=64, hidden_size=32)
    reach = sum(2 * 2 * 2**level for level in range(5))  # two convolutions a level, three taps: field 125
    assert convolutional["state_bytes"] == reach * 32 * 4


def test_no_gradient_reaches_beyond_a_receptive_field() -> None:
    rows = rows_of("gradient", model="tcn", task="token_memory:clip_length=24", levels=2, width_multiplier=0.1)
    norms = {row["lag"]: row["norm"] for row in rows}
    assert sorted(norms) == list(range(24))
    assert all(norms[lag] > 0 for lag in (0, 6, 12))
    assert all(norms[lag] == 0 for lag in range(13, 24))


def test_the_gradient_is_that_of_finite_differences() -> None:
    """The mean over clips of the norm of ∂loss/∂frame, of an RNN, against central differences in float64."""
    name = "vidbench.claims.contenders:rnn"
    rows = rows_of("gradient", model=name, task="token_memory:clip_length=8", hidden_size=4, seed=3)
    from vidbench.claims.experiments import TEST_EXAMPLES
    from vidbench.training import seeded
    from vidbench.trials import model_for

    data = TaskData(create("token_memory:clip_length=8"), test_examples=TEST_EXAMPLES)
    with seeded(3, "cpu"):
        model = model_for(name, data, 1.0, hidden_size=4).double()
    features, labels = next(iter(data.testing(TEST_EXAMPLES, 3, "normal")))
    features = features.double()
    squares = torch.zeros(len(features), dtype=torch.float64)
    for feature in range(features.shape[2]):
        nudge = torch.zeros_like(features)
        nudge[:, 2, feature] = 1e-5
        with torch.no_grad():
            change = [
                nn.functional.cross_entropy(model(features + s * nudge), labels, reduction="none") for s in (1, -1)
            ]
        squares += ((change[0] - change[1]) / 2e-5) ** 2
    assert rows[5]["norm"] == pytest.approx(float(squares.sqrt().mean()), rel=1e-4)  # frame 2 of 8 lies 5 back


def test_tasks_take_turns() -> None:
    tasks = tuple(TaskData(create(f"subtle_motion:clip_length=4:amplitude={a}")) for a in (1, 8))
    mixed = Mixed(tasks).training(4, 5, 3)
    labels = next(mixed)[1]
    clips = next(mixed)[0]
    first = tasks[0].training(4, 5, 0)
    again = [next(first)[0] for _ in range(3)]
    assert torch.equal(clips, again[2])  # steps 0, 2, 4 are the first task's
    assert labels.tolist() == [(3 * i) % 2 for i in range(4, 8)]
    easy_first = Mixed(tasks, alone=2).training(4, 5, 0)
    ahead = tasks[1].training(4, 1005, 0)
    for _ in range(2):
        assert torch.equal(next(easy_first)[0], next(ahead)[0])
    assert torch.equal(next(easy_first)[0], next(tasks[0].training(4, 5, 0))[0])


def test_what_was_learnt_is_gone_on_with() -> None:
    """Where tuning changes nothing, the pre-trained network does as well on the target as it did on the source."""
    given: dict[str, Any] = {
        "model": "frame_pool_avg", "source": "appearance:clip_length=1", "target": "appearance:clip_length=1",
        "examples": 8, "steps": 100, "tuning_steps": 1, "width_multiplier": 0.0625, "learning_rate": 5e-3,
        "batch_size": 16, "clip_norm": 1e-9,
    }  # fmt: skip
    learnt = {**given, "clip_norm": 1.0, "tuning_steps": 1}
    rows = {row["begun"]: row["top1"] for row in rows_of("transfer", **learnt)}
    assert sorted(rows) == ["pre-trained", "scratch", "source"]
    assert rows["source"] > 0.4
    assert rows["pre-trained"] == pytest.approx(rows["source"], abs=0.15)
    assert rows["scratch"] < rows["pre-trained"] - 0.1


class Contrast(nn.Module):
    """Answers the shape of the frame that differs most from noise, by comparison with shapes drawn by the task."""

    def forward(self, clips: Tensor) -> Tensor:
        colourful = (clips.amax(dim=1) - clips.amin(dim=1)).flatten(2).mean(dim=2)  # [N, T]: noise has less
        strongest = clips[torch.arange(len(clips)), :, colourful.argmax(dim=1)]  # [N, 3, H, W]
        return torch.nn.functional.one_hot(_shape_of(strongest), 4).float()


def _shape_of(frames: Tensor) -> Tensor:
    """By the mass of colour: at the centre (disc, cross), off it along H but not at it (bars), all round (ring)."""
    colour = (frames.amax(dim=1) - frames.amin(dim=1) - 0.9).clamp(min=0, max=0.3)  # [N, H, W]
    found = []
    for one in colour:
        row, column = ((one.sum(dim=axis) * torch.arange(32)).sum() / one.sum() for axis in (1, 0))
        y, x = torch.arange(32)[:, None] - row, torch.arange(32)[None] - column
        centre = one[(y.abs() < 2) & (x.abs() < 2)].mean()
        beside = one[(y.abs() < 2) & (x.abs() > 4) & (x.abs() < 6)].mean()
        corner = one[(y.abs() > 3.5) & (y.abs() < 5) & (x.abs() > 3.5) & (x.abs() < 5)].mean()
        if centre > 0.12:
            found.append(2 if corner < 0.1 else 0)
        else:
            found.append(1 if beside < 0.1 else 3)
    return torch.tensor(found)


def test_salience_is_of_the_frames_that_stand_out() -> None:
    """A model that looks at the most colourful frame alone follows the strong shape, wherever there is one."""
    strong, faint = (TaskData(create(f"appearance:contrast={contrast}")) for contrast in (256, 160))
    rows = {row["share"]: row for row in salience_of(Contrast(), strong, faint, 50, 3, "cpu")}
    assert rows[0.0]["salient"] < 0.2
    assert rows[0.0]["faint"] > 0.6
    assert all(rows[share]["preference"] > 0.8 for share in (0.125, 0.25, 0.5))
    assert rows[1.0]["salient"] > 0.75
    assert rows[1.0]["faint"] < 0.2


def test_streams_see_what_they_are_for() -> None:
    torch.manual_seed(0)
    clip = create("time_direction:clip_length=24").make(range(4), seed=0)[0]
    spatial, temporal = (
        ClipStreams(kind, num_classes=3, clip_length=24, input_size=32, width_multiplier=0.0625).eval()  # type: ignore[arg-type]
        for kind in ("spatial", "temporal")
    )
    others = clip.clone()
    others[:, :, :12] = 0
    others[:, :, 13:] = 0
    with torch.inference_mode():
        assert torch.equal(spatial(clip), spatial(others))  # the middle frame alone
        assert not torch.equal(temporal(clip), temporal(others))
        # Windows of ten fields at 0, 5 and 10: their order is nothing to the average, that within them is.
        both = Averaged(spatial, temporal)(clip).exp()
        assert both.numpy() == pytest.approx(
            (spatial(clip).softmax(1) + temporal(clip).softmax(1)).numpy() / 2, abs=1e-5
        )
        still = clip[:, :, :1].expand(-1, -1, 24, -1, -1)
        assert torch.allclose(temporal(still), temporal(still.flip(4)), atol=1e-5)  # no motion, whatever is shown
    with pytest.raises(ValueError, match="neither spatial nor temporal"):
        ClipStreams("audio", num_classes=3, clip_length=16, input_size=32)  # type: ignore[arg-type]


def test_a_long_first_kernel_is_all_that_differs() -> None:
    plain = models.create("c3d", num_classes=2, clip_length=16, input_size=32, width_multiplier=0.0625)
    long = c3d_long_first_kernel(num_classes=2, clip_length=16, input_size=32, width_multiplier=0.0625)
    before, after = ({name: tuple(tensor.shape) for name, tensor in m.state_dict().items()} for m in (plain, long))
    assert {name for name in before if before[name] != after[name]} == {"conv1.weight"}
    assert after["conv1.weight"] == (4, 3, 11, 3, 3)
    assert long(torch.zeros(1, 3, 16, 32, 32)).shape == (1, 2)


def test_memory_is_compared_at_equal_parameters() -> None:
    given: dict[str, Any] = {"like": "vidbench.claims.contenders:lstm", "hidden_size": 64, "batch_size": 4}
    (recurrent,), (convolutional,) = (
        rows_of("training_memory", model=name, clip_length=29, **given) for name in (given["like"], "tcn")
    )
    assert recurrent["units"] == 64
    assert convolutional["params"] == pytest.approx(recurrent["params"], rel=0.2)
    assert min(recurrent["peak_bytes"], convolutional["peak_bytes"]) > 4 * recurrent["params"]  # gradients at least


def _convolved(model: nn.Module, clip: Tensor) -> int:
    """Multiply-adds of a model's convolutions, from the sizes of what they put out."""
    found: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            per_value = module.weight.numel() // module.out_channels
            module.register_forward_hook(lambda _m, _i, out, per_value=per_value: found.append(out.numel() * per_value))
    with torch.inference_mode():
        model(clip)
    return sum(found)


def test_what_is_timed_is_timed_side_by_side() -> None:
    rows = rows_of("scaling", mode="train", hidden_size=16, lengths=(5, 13))
    assert [(row["network"], row["clip_length"]) for row in rows][:4] == [
        ("lstm", 5), ("tcn", 5), ("lstm", 13), ("tcn", 13),
    ]  # fmt: skip
    assert all(row["latency_s"] > 0 for row in rows)
    assert {(row["cores"], row["line"]) for row in rows if row["clip_length"] == 13} == {
        (cores, f"{network}, train") for cores in ("all", "one") for network in ("LSTM", "TCN")
    }
    costs = rows_of("cost", clip_length=8, input_size=32, width_multiplier=0.125)
    for row in costs:
        model = models.create(row["model"], width_multiplier=0.125).eval()
        assert row["macs"] == _convolved(model, torch.zeros(1, 3, 8, 32, 32))
    assert costs[1]["macs"] > costs[0]["macs"]


def test_timed_samples_alternate() -> None:
    log: list[str] = []

    class Fake:
        cuda = cold = False
        step_s = 0.0

        def __call__(self, call: Any, calls: int = 1) -> tuple[float, float]:
            call()
            return 1.0, 1.0

    found = _in_turn({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, Fake())  # type: ignore[arg-type]
    assert found == {"a": 1.0, "b": 1.0}
    assert "".join(log).endswith("aabb" * 6)  # a call for the caches and a sample, then the other


def test_an_orthogonal_rnn_keeps_the_length_of_its_state() -> None:
    matrix = rnn_orthogonal(num_classes=2, input_features=3, hidden_size=8).rnn.get_parameter("weight_hh_l0")
    assert torch.allclose(matrix @ matrix.T, torch.eye(8), atol=1e-5)


def test_a_training_that_diverges_learnt_nothing() -> None:
    rate = {"steps": 3, "width_multiplier": 0.25, "learning_rate": 1e30, "batch_size": 8, "clip_norm": 1e30}
    (row,) = rows_of("trial", model="vidbench.claims.contenders:rnn", task="token_memory:clip_length=8", **rate)
    assert (row["top1"], row["loss"]) == (0.25, LOST)


def test_a_forget_bias_of_five_is_added_to_the_forget_gate_alone() -> None:
    torch.manual_seed(1)
    plain = lstm(num_classes=2, input_features=3, hidden_size=4)
    torch.manual_seed(1)
    biased = lstm_forget_bias(num_classes=2, input_features=3, hidden_size=4)
    gap = biased.rnn.get_parameter("bias_ih_l0") - plain.rnn.get_parameter("bias_ih_l0")
    assert gap.tolist() == pytest.approx(4 * [0.0] + 4 * [5.0] + 8 * [0.0])


def test_without_bottlenecks_the_large_filters_take_the_whole_input() -> None:
    model = i3d_without_bottlenecks(num_classes=5, width_multiplier=0.125)
    block = model.get_submodule("Mixed_3b")
    assert block.get_parameter("b1b.conv3d.weight").shape == (16, 24, 3, 3, 3)  # 128 of 192, at an eighth
    assert model.eval()(torch.zeros(1, 3, 8, 32, 32)).shape == (1, 5)
