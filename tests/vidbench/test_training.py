"""Training: one seed, one outcome, killed or not; and who can and who cannot tell the order of frames."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vidbench import models, training
from vidbench.data.tasks import TASKS, create
from vidbench.metrics import interval
from vidbench.sweep import RequestError
from vidbench.training import Checkpoint, Recipe, Score, evaluate, train
from vidbench.trials import RECIPES, TaskData, altered, recipe_for, trial

TASK = TASKS["frame_order"]
PLAIN = Recipe(width_multiplier=1.0, learning_rate=0.1, steps=150)
TINY = Recipe(width_multiplier=0.0625, learning_rate=1e-3, steps=2, batch_size=6)


def points(start: int = 0, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Two well separated clouds, without end."""
    while True:
        generator = torch.Generator().manual_seed(1000 * seed + start)
        labels = torch.randint(2, (16,), generator=generator)
        yield torch.randn(16, 4, generator=generator) + 6.0 * labels[:, None], labels
        start += 1


class Fixed(nn.Module):
    """Always says the same class, and counts in which mode it was asked."""

    def __init__(self, answer: int, classes: int = 3) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.eye(classes)[answer])
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.scores.expand(len(x), -1)


# ---- train and evaluate on anything ----


def test_training_learns_what_can_be_learnt() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    told: list[tuple[int, int, float]] = []
    loss = train(model, points, PLAIN, progress=lambda *step: told.append(step))
    assert [step[:2] for step in told] == [(i, 150) for i in range(1, 151)]
    assert told[-1][2] == loss < 0.2 < told[0][2]
    score = evaluate(model, [next(points(seed=1)), next(points(start=5, seed=1))])
    assert (score.top1, score.examples) == (1.0, 32)


def test_a_score_counts_by_class() -> None:
    model = Fixed(2)
    batches = [(torch.zeros(4, 1), torch.tensor([2, 2, 0, 0])), (torch.zeros(1, 1), torch.tensor([2]))]
    score = evaluate(model, batches)
    assert score.confusion.tolist() == [[0, 0, 2], [0, 0, 0], [0, 0, 3]]
    assert (score.top1, score.top5, score.examples) == (3 / 5, 1.0, 5)
    assert score.per_class[0] == 0
    assert math.isnan(score.per_class[1])
    assert score.per_class[2] == 1


def test_top5_takes_the_five_most_likely() -> None:
    class Ranked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(-torch.arange(8.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scores.expand(len(x), -1)

    score = evaluate(Ranked(), [(torch.zeros(8, 1), torch.arange(8))])
    assert (score.top1, score.top5) == (1 / 8, 5 / 8)


def test_views_are_averaged_as_probabilities() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, clips: Tensor) -> Tensor:
            return torch.stack([torch.zeros(len(clips)), self.scale * clips.mean(dim=(1, 2, 3, 4))], dim=1)

    # Logits 9, -1, -1, -1, -1 have a positive mean, but four of five views are for the first class, and the mean of
    # their probabilities, 0.54, is for it.
    clips = torch.tensor([9.0, -1, -1, -1, -1]).view(5, 1, 1, 1, 1).expand(5, 3, 2, 2, 2)
    assert evaluate(Mean(), [(clips, torch.tensor([0]))]).top1 == 1.0


def test_evaluation_leaves_the_mode() -> None:
    model, batches = Fixed(2), [(torch.zeros(4, 1), torch.tensor([2, 2, 0, 1]))]
    evaluate(model, batches)
    assert model.training
    assert model.modes == [False]
    model.eval()
    evaluate(model, batches)
    assert not model.training


def test_gradients_are_clipped() -> None:
    seen: list[float] = []

    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.weight.grad is not None:
                seen.append(float(self.weight.grad.norm()))
            return 1e4 * super().forward(x)

    train(Loud(4, 2, bias=False), points, replace(PLAIN, steps=3, learning_rate=1e-3, clip_norm=0.5))
    assert seen
    assert all(norm <= 0.5 + 1e-6 for norm in seen)


def test_mixed_precision_computes_in_it() -> None:
    seen: list[torch.dtype] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    torch.manual_seed(0)
    model = Watched(4, 2)
    assert train(model, points, replace(PLAIN, amp="bf16")) < 0.2
    assert set(seen) == {torch.bfloat16}
    assert model.weight.dtype == torch.float32


def test_what_cannot_be_trained_or_tested_says_so() -> None:
    with pytest.raises(RequestError, match="steps=0 is not a positive integer"):
        train(nn.Linear(4, 2), points, replace(PLAIN, steps=0))
    two = [next(points()), next(points())]
    with pytest.raises(RequestError, match="the batches ended after 2 of 5 steps"):
        train(nn.Linear(4, 2), lambda start: two[start:], replace(PLAIN, steps=5))
    with pytest.raises(RequestError, match="no examples to test on"):
        evaluate(nn.Linear(4, 2), [])
    nothing = (torch.full((2, 4), float("nan")), torch.tensor([0, 1]))
    with pytest.raises(
        FloatingPointError, match=r"training diverged: loss nan at step 1 of 5; lower learning_rate=0\.1"
    ):
        train(nn.Linear(4, 2), lambda start: [nothing], replace(PLAIN, steps=5))


def test_a_batch_is_shared_out_evenly_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "world", lambda: 5)
    with pytest.raises(RequestError, match="batch_size=24 cannot be shared by 5 processes: give a multiple"):
        train(nn.Linear(4, 2), points, PLAIN)


# ---- checkpoints ----


def _dropped() -> nn.Module:
    """A small network with everything that a step may change: dropout, running statistics, momenta."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


class _StopAt(Exception):
    pass


@pytest.mark.parametrize("stop", [1, 7, 19])
def test_a_training_that_was_stopped_ends_with_the_same_weights(tmp_path: Path, stop: int) -> None:
    recipe = replace(PLAIN, steps=20)
    whole = _dropped()
    torch.manual_seed(8)
    loss = train(whole, points, recipe)

    def stopping(done: int, _steps: int, _loss: float) -> None:
        if done == stop:
            raise _StopAt

    kept = Checkpoint(tmp_path / "training.pt", "a test", every_s=0)
    stopped = _dropped()
    torch.manual_seed(8)
    with pytest.raises(_StopAt):
        train(stopped, points, recipe, checkpoint=kept, progress=stopping)
    resumed = _dropped()
    torch.manual_seed(99)  # what was drawn before it is resumed does not matter
    assert train(resumed, points, recipe, checkpoint=kept) == loss
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert train(_dropped(), points, recipe, checkpoint=kept) == loss  # and is not trained further


def test_anothers_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    recipe = replace(PLAIN, steps=2)
    train(_dropped(), points, recipe, checkpoint=Checkpoint(path, "one"))
    with pytest.raises(RequestError, match="is of another training: one, not two; choose another --out"):
        train(_dropped(), points, recipe, checkpoint=Checkpoint(path, "two"))
    with pytest.raises(RequestError, match="is of another recipe"):
        train(_dropped(), points, replace(recipe, steps=3), checkpoint=Checkpoint(path, "one"))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(RequestError, match=r"training\.pt is not a checkpoint"):
        train(_dropped(), points, recipe, checkpoint=Checkpoint(path, "one"))
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(RequestError, match="is not a checkpoint of a training; use --weights for weights"):
        train(_dropped(), points, recipe, checkpoint=Checkpoint(path, "one"))


_SCRIPT = """
import sys, torch
from functools import partial
from pathlib import Path
from vidbench import training, trials
torch.set_num_threads(1)
trials.Checkpoint = partial(training.Checkpoint, every_s=0.0)
recipe = training.Recipe(width_multiplier=0.0625, learning_rate=1e-3, steps=20, batch_size=6)
path = Path(sys.argv[1])
data = trials.TaskData(trials.create("frame_order"), test_examples=6)
done = trials.trial("cnn_lstm", data, seed=0, recipe=recipe, checkpoint=path,
                    progress=lambda done, steps, loss: print(done, flush=True))
torch.save(done.model.state_dict(), path.with_suffix(".end"))
"""


def test_a_training_killed_at_any_moment_ends_with_the_same_weights(tmp_path: Path) -> None:
    """By SIGKILL, at a random moment, as often as it takes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(path: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        )

    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    assert start(whole).wait() == 0
    process = start(broken)
    assert process.stdout is not None
    steps = [int(line) for _, line in zip(range(7), process.stdout, strict=False)]
    time.sleep(torch.rand(()).item() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps[0] == 1
    process = start(broken)
    assert process.stdout is not None
    steps = [int(line) for line in process.stdout]
    assert process.wait() == 0
    assert steps[0] > 5
    assert steps[-1] == 20
    one, other = (torch.load(path.with_suffix(".end"), weights_only=True) for path in (whole, broken))
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---- models on tasks ----


def test_an_order_blind_model_is_at_chance_under_every_condition() -> None:
    done = trial("frame_pool_avg", TaskData(TASK, test_examples=60), seed=0, recipe=TINY)
    accuracy = done.accuracy
    assert (accuracy.task, accuracy.seed, accuracy.examples) == ("frame_order", 0, 60)
    assert accuracy.chance == pytest.approx(1 / 6)
    assert accuracy.train_s > 0
    # Each content is there in all six orders, and gets one answer: one of six is right.
    assert accuracy.top1 == pytest.approx(1 / 6)
    assert set(accuracy.conditions) == {"shuffled", "reversed", "frozen"}
    assert accuracy.conditions["shuffled"] == pytest.approx(1 / 6)
    assert accuracy.conditions["reversed"] == pytest.approx(1 / 6)
    assert done.score.confusion.sum(dim=1).tolist() == [10] * 6
    assert accuracy.top5 == done.score.top5 == pytest.approx(5 / 6)


@pytest.mark.parametrize("name", ["cnn_lstm", "c3d"])
def test_a_seed_has_one_outcome(name: str) -> None:
    def losses(seed: int) -> tuple[list[float], float]:
        seen: list[float] = []
        done = trial(
            name, TaskData(TASK, test_examples=12), seed=seed, recipe=replace(TINY, steps=3),
            progress=lambda _done, _steps, loss: seen.append(loss),
        )  # fmt: skip
        return seen, done.accuracy.top1

    first = losses(0)
    torch.manual_seed(99)  # what else was drawn in the process does not matter
    assert losses(0) == first
    assert losses(1) != first


def test_few_examples_are_seen_over_and_over() -> None:
    few = TaskData(create("appearance:clip_length=1"), limit=6)  # two contents of four classes: eight examples
    batches = iter(few.training(batch_size=12, seed=0, start=0))
    clips = torch.cat([next(batches)[0] for _ in range(2)])
    assert torch.equal(clips[:8], clips[8:16])
    assert len({clip.numpy().tobytes() for clip in clips}) == 8
    many = next(iter(TaskData(few.task).training(batch_size=24, seed=0, start=0)))[0]
    assert len({clip.numpy().tobytes() for clip in many}) == 24


def test_a_step_has_its_batch_wherever_a_training_begins() -> None:
    data = TaskData(TASK, limit=18)
    later = next(iter(data.training(batch_size=5, seed=1, start=7)))
    batches = iter(data.training(batch_size=5, seed=1, start=0))
    for _ in range(7):
        next(batches)
    assert torch.equal(next(batches)[0], later[0])


def test_frames_of_videos_are_altered_as_those_of_tasks() -> None:
    clips = torch.arange(3.0 * 8).view(3, 1, 8, 1, 1)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(altered(clips, "normal", generator), clips)
    assert torch.equal(altered(clips, "reversed", generator), clips.flip(2))
    shuffled = altered(clips, "shuffled", generator)
    assert shuffled.shape == clips.shape
    assert torch.equal(shuffled.sort(dim=2).values, clips)
    assert not torch.equal(shuffled, clips)
    frozen = altered(clips, "frozen", generator)
    assert (frozen == frozen[:, :, :1]).all()
    assert all(frame in clip for frame, clip in zip(frozen[:, 0, 0, 0, 0], clips, strict=True))


def test_features_go_to_models_on_features() -> None:
    done = trial("tcn", TaskData(create("token_memory:clip_length=8"), test_examples=8), seed=0, recipe=TINY)
    assert done.accuracy.task == "token_memory:clip_length=8"
    assert done.accuracy.chance == 0.25
    with pytest.raises(RequestError, match="model 'c3d' has no input_features"):
        trial("c3d", "token_memory", seed=0, recipe=TINY)


def test_torchs_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    trial("frame_pool_avg", TaskData(TASK, test_examples=6), seed=0, recipe=replace(TINY, steps=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_test_examples_are_whole_contents() -> None:
    done = trial("frame_pool_avg", TaskData(TASK, test_examples=7), seed=0, recipe=replace(TINY, steps=1))
    assert done.accuracy.examples == 12


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RequestError, match="unknown task 'frame_odrer': did you mean 'frame_order'"):
        trial("c3d", "frame_odrer", seed=0)
    with pytest.raises(RequestError, match="unknown model 'c4d': did you mean 'c3d'"):
        trial("c4d", "frame_order", seed=0)


def test_every_recipe_is_of_a_task_and_a_model() -> None:
    assert set(RECIPES) <= set(TASKS)
    for task, recipes in RECIPES.items():
        assert set(recipes) <= set(models.MODELS)
        assert all(recipe_for(name, f"{task}:clip_length=32") is recipe for name, recipe in recipes.items())


def test_an_interval_is_students() -> None:
    """Against the closed form for two values: half a difference times t = 12.706."""
    mean, low, high = interval([0.8, 0.9])
    assert mean == pytest.approx(0.85)
    assert [high - mean, mean - low] == pytest.approx([0.05 * 12.7062] * 2, rel=1e-4)
    assert math.isnan(interval([0.5]).low)


def test_a_score_without_answers_has_no_top1() -> None:
    with pytest.raises(ZeroDivisionError):
        _ = Score(torch.zeros(2, 2, dtype=torch.int64), 0.0).top1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", RECIPES["frame_order"])
def test_models_that_see_time_tell_the_order_and_others_do_not(name: str, seed: int) -> None:
    accuracy = trial(name, "frame_order", seed=seed).accuracy
    assert accuracy.examples >= 600
    assert accuracy.conditions["shuffled"] == pytest.approx(accuracy.chance, abs=0.09)  # four deviations
    assert accuracy.conditions["frozen"] == pytest.approx(accuracy.chance, abs=0.09)
    if models.MODELS[name].temporal:
        assert accuracy.top1 >= 0.95
        assert accuracy.conditions["reversed"] < 0.05  # every order backwards is another class
    else:
        assert accuracy.top1 == pytest.approx(accuracy.chance, abs=0.03)
        assert accuracy.conditions["reversed"] == pytest.approx(accuracy.chance, abs=0.03)
