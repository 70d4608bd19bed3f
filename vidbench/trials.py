"""Trials: a model is trained from a seed and tested, on a generated task or on videos; one trial is one accuracy.

Several seeds make an interval, and every trial also tells what is left of the accuracy when the test clips' frames
are shuffled, reversed or frozen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidbench import models
from vidbench.data.datasets import VideoDataset
from vidbench.data.loading import ClipReader, OnError, VideoBatches
from vidbench.data.tasks import CONDITIONS, Condition, Task, create
from vidbench.records import Accuracy
from vidbench.training import Batches, Checkpoint, Progress, Recipe, Score, evaluate, rank, seeded, train, world

TEST_EXAMPLES = 600
"""Test clips behind an accuracy on a generated task."""

CONDITION_EXAMPLES = 300
"""At most so many of them are tested under each altered condition: one of six is known to within 2 points then."""

DEFAULT = Recipe(width_multiplier=0.125, learning_rate=2e-3, steps=200)
"""For a model and a task that have no recipe of their own."""

RECIPES: dict[str, dict[str, Recipe]] = {
    "appearance": {
        "frame_pool_avg": Recipe(width_multiplier=0.0625, learning_rate=5e-3, steps=220),
        "cnn_lstm": Recipe(width_multiplier=0.0625, learning_rate=5e-3, steps=350),
        "cnn_tcn": Recipe(width_multiplier=0.0625, learning_rate=3e-3, steps=300),
        "c3d": Recipe(width_multiplier=0.0625, learning_rate=2e-3, steps=300, dropout=0.0),
        "r2plus1d_18": Recipe(width_multiplier=0.0625, learning_rate=1e-2, steps=220),
    },
    "time_direction": {
        "frame_pool_avg": Recipe(width_multiplier=0.0625, learning_rate=5e-3, steps=150),
        "cnn_lstm": Recipe(width_multiplier=0.0625, learning_rate=5e-3, steps=200),
        "cnn_tcn": Recipe(width_multiplier=0.0625, learning_rate=3e-3, steps=250),
        "c3d": Recipe(width_multiplier=0.0625, learning_rate=2e-3, steps=150, dropout=0.0),
        "r2plus1d_18": Recipe(width_multiplier=0.0625, learning_rate=1e-2, steps=200),
    },
    "frame_order": {
        "frame_pool_avg": Recipe(width_multiplier=0.125, learning_rate=3e-3, steps=50),
        "cnn_lstm": Recipe(width_multiplier=0.125, learning_rate=3e-3, steps=70),
        "cnn_tcn": Recipe(width_multiplier=0.125, learning_rate=3e-3, steps=90),
        "c3d": Recipe(width_multiplier=0.125, learning_rate=2e-3, steps=110),
        "r2plus1d_18": Recipe(width_multiplier=0.0625, learning_rate=1e-2, steps=150),
    },
}
"""By task and model: the least that reaches the accuracy a model of its kind can reach, on two CPU cores."""


def recipe_for(model_name: str, data: str) -> Recipe:
    """The recipe of a model on a task, whatever the task's knobs; `DEFAULT` where there is none."""
    return RECIPES.get(data.partition(":")[0], {}).get(model_name, DEFAULT)


@dataclass(frozen=True)
class TaskData:
    """A generated task as what a model is trained and tested on."""

    task: Task
    limit: int | None = None
    """Train on so many examples, over and over; without, no example is seen twice."""
    test_examples: int = TEST_EXAMPLES
    """Rounded up to whole contents, so that every class is tested equally often."""

    @property
    def name(self) -> str:
        """Of the task, its knobs included."""
        return self.task.name

    @property
    def shape(self) -> dict[str, int | None]:
        """What a model must be made for."""
        task = self.task
        features = task.frame[0] if task.size is None else None
        return {
            "num_classes": task.num_classes,
            "clip_length": task.clip_length,
            "input_size": task.size,
            "input_features": features,
        }

    def training(self, batch_size: int, seed: int, start: int) -> Batches:
        """The batches of steps `start`, `start` + 1, …, without end."""
        limit = None if self.limit is None else self._whole(self.limit)
        step = self.task.num_classes + 1
        for clips, labels in self.task.batches(batch_size=batch_size, seed=seed, step=step, start=start, limit=limit):
            yield clips[rank() :: world()], labels[rank() :: world()]

    def testing(self, batch_size: int, seed: int, condition: Condition) -> Batches:
        """The test clips, once."""
        count = self._whole(self.test_examples)
        if condition != "normal":
            count = min(count, self._whole(CONDITION_EXAMPLES))
        batches = self.task.batches(batch_size=batch_size, seed=seed, split="test", condition=condition, examples=count)
        return (batch for number, batch in enumerate(batches) if number % world() == rank())

    def _whole(self, examples: int) -> int:
        classes = self.task.num_classes
        return -(-examples // classes) * classes


@dataclass(frozen=True)
class VideoData:
    """Two splits of a dataset as what a model is trained and tested on."""

    train: VideoDataset
    test: VideoDataset
    reader: ClipReader
    num_workers: int = 0
    """Processes that read videos."""
    on_error: OnError = "fail"

    @property
    def name(self) -> str:
        """Of the folder or list."""
        return self.train.path.stem

    @property
    def shape(self) -> dict[str, int | None]:
        """What a model must be made for."""
        return {
            "num_classes": len(self.train.classes),
            "clip_length": self.reader.sampling.clip_length,
            "input_size": self.reader.size,
        }

    def training(self, batch_size: int, seed: int, start: int) -> Batches:
        """The batches of steps `start`, `start` + 1, …, without end."""
        batches = self._batches(self.train, batch_size, seed)
        epoch, batch = divmod(start, len(batches))
        return batches.training(epoch=epoch, batch=batch)

    def testing(self, batch_size: int, seed: int, condition: Condition) -> Batches:
        """The views of the test videos, once."""
        generator = torch.Generator().manual_seed(seed)
        for clips, labels in self._batches(self.test, batch_size, seed).testing():
            yield altered(clips, condition, generator), labels

    def _batches(self, dataset: VideoDataset, batch_size: int, seed: int) -> VideoBatches:
        return VideoBatches(
            dataset,
            self.reader,
            batch_size=max(batch_size // world(), 1),  # of a test, any will do
            seed=seed,
            num_workers=self.num_workers,
            on_error=self.on_error,
            rank=rank(),
            world_size=world(),
        )


def altered(clips: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
    """Clips (N, C, T, H, W) with their frames in random order, backwards, or one of them throughout."""
    count, length = clips.shape[0], clips.shape[2]
    if condition == "normal":
        return clips
    if condition == "reversed":
        return clips.flip(2)
    order = torch.rand(count, length, generator=generator).argsort(dim=1)
    if condition == "frozen":
        order = order[:, :1].expand(-1, length)
    return clips[torch.arange(count)[:, None], :, order].transpose(1, 2)


class Trial(NamedTuple):
    """A trained model and how it did."""

    model: nn.Module
    accuracy: Accuracy
    score: Score
    """On the normal test clips."""


def trial(
    model_name: str,
    data: TaskData | VideoData | str,
    *,
    seed: int,
    recipe: Recipe | None = None,
    weights: Path | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Trial:
    """Trains a model from a seed, and tests it on normal and on altered clips.

    One seed has one outcome on one machine and number of threads: it decides the weights, the dropout and the
    examples. Torch's own random state is left as it was.

    Args:
        model_name: One of `vidbench.models.MODELS`, or `package.module:factory`.
        data: What to train and test on, or the name of a task with its knobs.
        seed: Of everything random.
        recipe: How to train; by default that of `recipe_for`.
        weights: A file to begin with; its classifier is left where it has other classes.
        device: Where to train, such as `cpu` or `cuda`.
        checkpoint: Where to keep the training on its way, and what to go on with.
        progress: Told of every step.
        options: What the model takes besides; see `vidbench.models.create`.

    Raises:
        RequestError: The data or the model are not known, they do not fit, or the checkpoint is of another training.
        FloatingPointError: The training diverged.
    """
    if isinstance(data, str):
        data = TaskData(create(data))
    recipe = recipe or recipe_for(model_name, data.name)
    kept = None
    if checkpoint is not None:
        limit = getattr(data, "limit", None)
        few = "" if limit is None else f", {limit} examples"
        begun = "" if weights is None else f", from {weights}"
        kept = Checkpoint(checkpoint, f"{model_name} on {data.name}, seed {seed}{few}{begun}")
    with seeded(seed, device):
        model = model_for(model_name, data, recipe.width_multiplier, weights, **options).to(device)
        started = time.perf_counter()
        train(
            model,
            lambda start: data.training(recipe.batch_size, seed, start),
            recipe,
            checkpoint=kept,
            progress=progress,
        )
        train_s = time.perf_counter() - started
        accuracy, score = score_on(model, data, seed=seed, recipe=recipe)
    return Trial(model, replace(accuracy, train_s=train_s), score)


def model_for(
    name: str,
    data: TaskData | VideoData,
    width_multiplier: float,
    weights: Path | None = None,
    *,
    replace_head: bool = True,
    **options: Any,
) -> nn.Module:
    """A model with the inputs and classes of some data.

    Args:
        name: As of `trial`.
        data: What it is made for.
        width_multiplier: Factor on its channels.
        weights: A file to read.
        replace_head: Whether a classifier for other classes is left out, rather than refused.
        options: As of `trial`.
    """
    shape: dict[str, Any] = data.shape
    return models.create(
        name, width_multiplier=width_multiplier, weights=weights, replace_head=replace_head, **shape, **options
    )


def score_on(model: nn.Module, data: TaskData | VideoData, *, seed: int, recipe: Recipe) -> tuple[Accuracy, Score]:
    """How a trained model does on the test clips, normal and altered."""
    scores = {
        condition: evaluate(model, data.testing(recipe.batch_size, seed, condition), amp=recipe.amp)
        for condition in CONDITIONS
    }
    normal, classes = scores["normal"], data.shape["num_classes"] or 1
    accuracy = Accuracy(
        task=data.name,
        seed=seed,
        top1=normal.top1,
        chance=1 / classes,
        examples=normal.examples,
        train_s=0.0,
        conditions={name: score.top1 for name, score in scores.items() if name != "normal"},
        top5=normal.top5 if classes > 5 else None,
    )
    return accuracy, normal
