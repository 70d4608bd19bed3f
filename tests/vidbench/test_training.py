"""Training: one seed, one outcome; and who can and who cannot tell the order of frames."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from vidbench import training
from vidbench.data.tasks import TASKS
from vidbench.sweep import RequestError
from vidbench.training import RECIPES, Recipe, evaluate, train, train_and_test

TASK = TASKS["frame_order"]


def points(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Two well separated clouds, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(2, (16,), generator=generator)
        yield torch.randn(16, 4, generator=generator) + 6.0 * labels[:, None], labels


class Fixed(nn.Module):
    """Always says the same class, and counts in which mode it was asked."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.eye(3)[answer])
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.scores.expand(len(x), 3)


# ---- train and evaluate on anything ----


def test_training_learns_what_can_be_learnt() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    told: list[tuple[int, int, float]] = []
    loss = train(model, points(), steps=150, learning_rate=0.1, progress=lambda *step: told.append(step))
    assert [step[:2] for step in told] == [(i, 150) for i in range(1, 151)]
    assert told[-1][2] == loss < 0.2 < told[0][2]
    score = evaluate(model, [next(points(seed=1)) for _ in range(4)])
    assert score == (1.0, 64)


def test_evaluation_counts_and_leaves_the_mode() -> None:
    model = Fixed(2)
    batches = [(torch.zeros(4, 1), torch.tensor([2, 2, 0, 1])), (torch.zeros(1, 1), torch.tensor([2]))]
    assert evaluate(model, batches) == (3 / 5, 5)
    assert model.training
    assert model.modes == [False, False]
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

    train(Loud(4, 2, bias=False), points(), steps=3, learning_rate=1e-3, clip_norm=0.5)
    assert seen
    assert all(norm <= 0.5 + 1e-6 for norm in seen)


def test_what_cannot_be_trained_or_tested_says_so() -> None:
    with pytest.raises(RequestError, match="steps=0 is not a positive integer"):
        train(nn.Linear(4, 2), points(), steps=0, learning_rate=0.1)
    with pytest.raises(RequestError, match="the batches ended after 2 of 5 steps"):
        train(nn.Linear(4, 2), [next(points()), next(points())], steps=5, learning_rate=0.1)
    with pytest.raises(RequestError, match="no examples to test on"):
        evaluate(nn.Linear(4, 2), [])
    with pytest.raises(FloatingPointError, match="training diverged: loss nan at step 1 of 5"):
        train(nn.Linear(4, 2), [(torch.full((2, 4), float("nan")), torch.tensor([0, 1]))], steps=5, learning_rate=0.1)


# ---- models on tasks ----


def test_an_order_blind_model_is_at_chance_under_every_condition() -> None:
    accuracy = train_and_test("frame_pool_avg", TASK, seed=0, steps=2, width_multiplier=0.0625, test_examples=60)
    assert (accuracy.task, accuracy.seed, accuracy.examples) == ("frame_order", 0, 60)
    assert accuracy.chance == pytest.approx(1 / 6)
    assert accuracy.train_s > 0
    # Each content is there in all six orders, and gets one answer: one of six is right.
    assert accuracy.top1 == pytest.approx(1 / 6)
    assert set(accuracy.conditions) == {"shuffled", "reversed", "frozen"}
    assert accuracy.conditions["shuffled"] == pytest.approx(1 / 6)
    assert accuracy.conditions["reversed"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("name", ["cnn_lstm", "c3d"])
def test_a_seed_has_one_outcome(name: str) -> None:
    def losses(seed: int) -> tuple[list[float], float]:
        seen: list[float] = []
        accuracy = train_and_test(
            name, "frame_order", seed=seed, test_examples=12,
            recipe=Recipe(width_multiplier=0.0625, learning_rate=1e-3, steps=3, batch_size=6),
            progress=lambda _done, _steps, loss: seen.append(loss),
        )  # fmt: skip
        return seen, accuracy.top1

    first = losses(0)
    torch.manual_seed(99)  # what else was drawn in the process does not matter
    assert losses(0) == first
    assert losses(1) != first


def test_torchs_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train_and_test("frame_pool_avg", TASK, seed=0, steps=1, width_multiplier=0.0625, test_examples=6)
    assert torch.equal(torch.get_rng_state(), state)


def test_test_examples_are_whole_contents() -> None:
    accuracy = train_and_test("frame_pool_avg", TASK, seed=0, steps=1, width_multiplier=0.0625, test_examples=7)
    assert accuracy.examples == 12


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RequestError, match="unknown task 'frame_odrer': did you mean 'frame_order'"):
        train_and_test("c3d", "frame_odrer", seed=0)
    with pytest.raises(RequestError, match="no recipe for model 'c4d' on task 'frame_order'; known: c3d, cnn_lstm"):
        train_and_test("c4d", "frame_order", seed=0)
    with pytest.raises(RequestError, match="unknown model 'c4d': did you mean 'c3d'"):
        train_and_test("c4d", "frame_order", seed=0, recipe=Recipe(1.0, 1e-3, 1))


def test_every_recipe_is_of_a_task_and_a_model() -> None:
    assert set(RECIPES) <= set(TASKS)
    for recipes in RECIPES.values():
        assert set(recipes) <= set(training.models.MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", RECIPES["frame_order"])
def test_models_that_see_time_tell_the_order_and_others_do_not(name: str, seed: int) -> None:
    accuracy = train_and_test(name, TASK, seed=seed)
    assert accuracy.examples >= 600
    assert accuracy.conditions["shuffled"] == pytest.approx(accuracy.chance, abs=0.09)  # four deviations
    assert accuracy.conditions["frozen"] == pytest.approx(accuracy.chance, abs=0.09)
    if training.models.MODELS[name].temporal:
        assert accuracy.top1 >= 0.95
        assert accuracy.conditions["reversed"] < 0.05  # every order backwards is another class
    else:
        assert accuracy.top1 == pytest.approx(accuracy.chance, abs=0.03)
        assert accuracy.conditions["reversed"] == pytest.approx(accuracy.chance, abs=0.03)
