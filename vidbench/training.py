"""Training and testing a model on a generated task, the same way for every seed.

`train` and `evaluate` take any model and any batches; `train_and_test` is one accuracy of one model on one task.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidbench import models
from vidbench.data.tasks import CONDITIONS, Condition, Task, create
from vidbench.records import Accuracy
from vidbench.sweep import RequestError

Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs of clips (N, 3, T, H, W) and labels (N,)."""

Progress = Callable[[int, int, float], None]
"""Called after every step with the steps done, the steps in all, and the loss."""

TEST_EXAMPLES = 600
"""Test clips behind an accuracy."""

CONDITION_EXAMPLES = 300
"""At most so many of them are tested under each altered condition: one of six is known to within 2 points then."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained. The budget is a number of steps and not a time, so that a seed has one outcome."""

    width_multiplier: float
    """Factor on the model's channel counts."""
    learning_rate: float
    """The highest of the one cycle."""
    steps: int
    batch_size: int = 24
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Gradients of a larger Euclidean norm are scaled down to it."""


RECIPES: dict[str, dict[str, Recipe]] = {
    "frame_order": {
        "frame_pool_avg": Recipe(width_multiplier=0.125, learning_rate=3e-3, steps=50),
        "cnn_lstm": Recipe(width_multiplier=0.125, learning_rate=3e-3, steps=70),
        "cnn_tcn": Recipe(width_multiplier=0.125, learning_rate=3e-3, steps=90),
        "c3d": Recipe(width_multiplier=0.125, learning_rate=2e-3, steps=110),
    },
}
"""By task and model: the least that reaches the accuracy a model of its kind can reach, on two CPU cores."""


class Score(NamedTuple):
    """The outcome of a test."""

    top1: float
    examples: int


def train(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    progress: Progress | None = None,
) -> float:
    """Trains a model in place with AdamW, cross-entropy and one cycle of the learning rate.

    Args:
        model: From clips to logits; left in training mode, on the device that it is on.
        batches: At least `steps` of them are drawn.
        steps: Batches to train on.
        learning_rate: The highest of the cycle: reached after 30 % of the steps, almost nothing at the end.
        weight_decay: Of AdamW, decoupled.
        clip_norm: Gradients of a larger Euclidean norm are scaled down to it.
        progress: Told of every step.

    Returns:
        The loss of the last step.

    Raises:
        RequestError: `steps` is below 1, or the batches end early.
        FloatingPointError: The loss is no longer finite.

    Source: Loshchilov & Hutter (2019), arXiv:1711.05101 (AdamW); Smith & Topin (2018), arXiv:1708.07120 (one cycle).
    """
    if steps < 1:
        raise RequestError(f"steps={steps} is not a positive integer")
    device = _device(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=learning_rate, total_steps=steps)
    model.train()
    done, value = 0, float("nan")
    for done, (clips, labels) in enumerate(itertools.islice(batches, steps), start=1):
        loss = F.cross_entropy(model(clips.to(device)), labels.to(device))
        value = loss.item()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"training diverged: loss {value} at step {done} of {steps}; lower learning_rate={learning_rate:g}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(done, steps, value)
    if done < steps:
        raise RequestError(f"the batches ended after {done} of {steps} steps")
    return value


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches) -> Score:
    """Top-1 accuracy of a model in evaluation mode; afterwards it is in the mode that it was in.

    Raises:
        RequestError: There are no examples.
    """
    device, mode = _device(model), model.training
    model.eval()
    right = examples = 0
    for clips, labels in batches:
        right += int((model(clips.to(device)).argmax(dim=1).cpu() == labels).sum())
        examples += len(labels)
    model.train(mode)
    if examples == 0:
        raise RequestError("no examples to test on")
    return Score(right / examples, examples)


def train_and_test(
    model_name: str,
    task: Task | str,
    *,
    seed: int,
    recipe: Recipe | None = None,
    steps: int | None = None,
    width_multiplier: float | None = None,
    test_examples: int = TEST_EXAMPLES,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Accuracy:
    """Top-1 accuracy of one training of one model on one task, on normal and on altered test clips.

    One seed has one outcome on one machine and number of threads: it decides the weights, the dropout and the
    examples. Torch's own random state is left as it was.

    Args:
        model_name: One of `vidbench.models.MODELS`.
        task: A task or its name.
        seed: Of everything random.
        recipe: How to train; by default the model's row of `RECIPES`.
        steps: Instead of the recipe's.
        width_multiplier: Instead of the recipe's.
        test_examples: Test clips; rounded up to whole contents, so that every class is tested equally often.
        device: Where to train, such as `cpu` or `cuda`.
        progress: Told of every step.

    Raises:
        RequestError: The task or the model is not known, or there is no recipe for it.
        FloatingPointError: The training diverged.
    """
    if isinstance(task, str):
        task = create(task)
    recipe = recipe or _recipe(task.name, model_name)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    if width_multiplier is not None:
        recipe = replace(recipe, width_multiplier=width_multiplier)
    examples = _whole(test_examples, task)

    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        model = models.create(
            model_name,
            num_classes=task.num_classes,
            clip_length=task.clip_length,
            input_size=task.size,
            width_multiplier=recipe.width_multiplier,
        ).to(device)
        started = time.perf_counter()
        train(
            model,
            task.batches(batch_size=recipe.batch_size, seed=seed, step=task.num_classes + 1),
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            clip_norm=recipe.clip_norm,
            progress=progress,
        )
        train_s = time.perf_counter() - started

    def score(condition: Condition) -> Score:
        count = examples if condition == "normal" else min(examples, _whole(CONDITION_EXAMPLES, task))
        size = recipe.batch_size
        return evaluate(
            model, task.batches(batch_size=size, seed=seed, split="test", condition=condition, examples=count)
        )

    scores = {condition: score(condition) for condition in CONDITIONS}
    return Accuracy(
        task=task.name,
        seed=seed,
        top1=scores["normal"].top1,
        chance=task.chance,
        examples=scores["normal"].examples,
        train_s=train_s,
        conditions={name: score.top1 for name, score in scores.items() if name != "normal"},
    )


def _whole(examples: int, task: Task) -> int:
    """So many examples or a few more, that every content is there in every class."""
    return -(-examples // task.num_classes) * task.num_classes


def _recipe(task: str, model_name: str) -> Recipe:
    recipes = RECIPES.get(task, {})
    if model_name not in recipes:
        raise RequestError(
            f"no recipe for model {model_name!r} on task {task!r}; known: {', '.join(sorted(recipes)) or 'none'}"
        )
    return recipes[model_name]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
