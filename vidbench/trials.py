"""Trials: a model is trained from a seed and tested, on a generated task; one trial is one accuracy.

Several seeds make an interval, and every trial on a task also tells what is left of the accuracy when the test clips'
frames are shuffled, reversed or frozen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from vidbench import models
from vidbench.data.tasks import CONDITIONS, Condition, Task, create
from vidbench.records import Accuracy
from vidbench.training import Batches, Checkpoint, Progress, Recipe, Score, evaluate, seeded, train

TEST_EXAMPLES = 600
"""Test clips behind an accuracy."""

CONDITION_EXAMPLES = 300
"""At most so many of them are tested under each altered condition: one of six is known to within 2 points then."""

DEFAULT = Recipe(width_multiplier=0.125, learning_rate=2e-3, steps=200)
"""For a model and a task that have no recipe of their own."""

RECIPES: dict[str, dict[str, Recipe]] = {
    "frame_order": {
        "frame_pool_avg": Recipe(width_multiplier=0.125, learning_rate=3e-3, steps=50),
        "cnn_lstm": Recipe(width_multiplier=0.125, learning_rate=3e-3, steps=70),
        "cnn_tcn": Recipe(width_multiplier=0.125, learning_rate=3e-3, steps=90),
        "c3d": Recipe(width_multiplier=0.125, learning_rate=2e-3, steps=110),
    },
}
"""By task and model: the least that reaches the accuracy a model of its kind can reach, on two CPU cores."""


def recipe_for(model_name: str, task: str) -> Recipe:
    """The recipe of a model on a task, whatever the task's knobs."""
    return RECIPES.get(task.partition(":")[0], {}).get(model_name, DEFAULT)


class Trial(NamedTuple):
    """A trained model and how it did."""

    model: nn.Module
    accuracy: Accuracy
    score: Score
    """On the normal test clips."""


def trial(
    model_name: str,
    task: Task | str,
    *,
    seed: int,
    recipe: Recipe | None = None,
    weights: Path | None = None,
    limit: int | None = None,
    test_examples: int = TEST_EXAMPLES,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Trial:
    """Trains a model on a task from a seed, and tests it on normal and on altered clips.

    One seed has one outcome on one machine and number of threads: it decides the weights, the dropout and the
    examples. Torch's own random state is left as it was.

    Args:
        model_name: One of `vidbench.models.MODELS`, or `package.module:factory`.
        task: A task, or its name with knobs.
        seed: Of everything random.
        recipe: How to train; by default that of `recipe_for`.
        weights: A file to begin with; its classifier is left where it has other classes.
        limit: Train on so many examples, over and over; without, no example is seen twice.
        test_examples: Test clips; rounded up to whole contents, so that every class is tested equally often.
        device: Where to train, such as `cpu` or `cuda`.
        checkpoint: Where to keep the training on its way, and what to go on with.
        progress: Told of every step.

    Raises:
        RequestError: The task or the model is not known, they do not fit, or the checkpoint is of another training.
        FloatingPointError: The training diverged.
    """
    if isinstance(task, str):
        task = create(task)
    recipe = recipe or recipe_for(model_name, task.name)
    if limit is not None:
        limit = _whole(limit, task)

    def batches(start: int) -> Batches:
        step = task.num_classes + 1
        return task.batches(batch_size=recipe.batch_size, seed=seed, step=step, start=start, limit=limit)

    kept = None
    if checkpoint is not None:
        few = "" if limit is None else f", {limit} examples"
        kept = Checkpoint(checkpoint, f"{model_name} on {task.name}, seed {seed}{few}")
    with seeded(seed, device):
        model = _model(model_name, task, recipe, weights).to(device)
        started = time.perf_counter()
        train(model, batches, recipe, checkpoint=kept, progress=progress)
        train_s = time.perf_counter() - started
        accuracy, score = score_on(model, task, recipe, seed=seed, test_examples=test_examples)
    return Trial(model, replace(accuracy, train_s=train_s), score)


def score_on(
    model: nn.Module, task: Task, recipe: Recipe, *, seed: int, test_examples: int = TEST_EXAMPLES
) -> tuple[Accuracy, Score]:
    """How a trained model does on a task's test clips, normal and altered."""
    whole = _whole(test_examples, task)
    scores = {
        condition: evaluate(model, _test_batches(task, recipe, seed, condition, whole), amp=recipe.amp)
        for condition in CONDITIONS
    }
    normal = scores["normal"]
    accuracy = Accuracy(
        task=task.name,
        seed=seed,
        top1=normal.top1,
        chance=task.chance,
        examples=normal.examples,
        train_s=0.0,
        conditions={name: score.top1 for name, score in scores.items() if name != "normal"},
        top5=normal.top5 if task.num_classes > _FIVE else None,
    )
    return accuracy, normal


_FIVE = 5


def _test_batches(task: Task, recipe: Recipe, seed: int, condition: Condition, whole: int) -> Batches:
    count = whole if condition == "normal" else min(whole, _whole(CONDITION_EXAMPLES, task))
    return task.batches(batch_size=recipe.batch_size, seed=seed, split="test", condition=condition, examples=count)


def _model(name: str, task: Task, recipe: Recipe, weights: Path | None) -> nn.Module:
    features = None if task.size is not None else task.frame[0]
    return models.create(
        name,
        num_classes=task.num_classes,
        clip_length=task.clip_length,
        input_size=task.size,
        width_multiplier=recipe.width_multiplier,
        weights=weights,
        replace_head=True,
        input_features=features,
    )


def _whole(examples: int, task: Task) -> int:
    """So many examples or a few more, that every content is there in every class."""
    return -(-examples // task.num_classes) * task.num_classes


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """The mean of the outcomes of seeds, with Student's 95 % interval; NaN ends for a single one.

    Source: Student (1908), Biometrika 6(1), on the mean of a small sample.
    """
    from scipy.special import stdtrit

    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    half = float(stdtrit(count - 1, 0.975)) * spread
    return Interval(mean, mean - half, mean + half)
