"""What the claims' experiments do. Each is a function of what is given, a seed and a device, and returns rows."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vidbench import models
from vidbench.claims import Experiment, Row
from vidbench.data.tasks import create
from vidbench.sweep import RequestError, Value, unknown
from vidbench.training import Recipe, evaluate, seeded, train
from vidbench.trials import TaskData, model_for, trial

Given = Mapping[str, Value]

TEST_EXAMPLES = 300
"""Test clips behind each accuracy: one half is known to within 3 points by a seed, and better by several."""

LABELS = ("length", "count", "field")
"""What is given for the figures alone."""


def perform(experiment: Experiment, device: str) -> list[Row]:
    """The rows of an experiment; of a timing, the engine's `measure` makes them.

    Raises:
        RequestError: No such kind, or what is given does not fit it.
        FloatingPointError: A training diverged.
    """
    if experiment.kind not in KINDS:
        raise unknown("kind of experiment", experiment.kind, KINDS)
    return KINDS[experiment.kind](experiment.given, experiment.seed, device)


_RECIPE = tuple(field.name for field in fields(Recipe))


def _recipe(given: Given, **changed: Value) -> Recipe:
    values: dict[str, Any] = {name: given[name] for name in _RECIPE if name in given} | changed
    return Recipe(**values)


def _options(given: Given, *known: str) -> dict[str, Any]:
    """What is given besides the recipe and what the kind itself knows: options of the model."""
    return {name: value for name, value in given.items() if name not in (*_RECIPE, *known)}


def _trial(given: Given, seed: int, device: str) -> list[Row]:
    """A model is trained on a task, or on a few `examples` of it, and tested."""
    limit = given.get("examples")
    data = TaskData(
        create(str(given["task"])), limit=None if limit is None else _whole(limit), test_examples=TEST_EXAMPLES
    )
    losses: list[float] = []
    done = trial(
        str(given["model"]),
        data,
        seed=seed,
        recipe=_recipe(given),
        device=device,
        progress=lambda _step, _steps, loss: losses.append(loss),
        **_options(given, "model", "task", "examples", *LABELS),
    )
    accuracy = done.accuracy
    return [
        {
            "top1": accuracy.top1,
            **accuracy.conditions,
            "loss": math.fsum(losses) / len(losses),
            "params": sum(parameter.numel() for parameter in done.model.parameters()),
            "train_s": accuracy.train_s,
        }
    ]


def _transfer(given: Given, seed: int, device: str) -> list[Row]:
    """Training on few examples of `target`, from scratch and from what was learnt of `source`."""
    name, few = str(given["model"]), _whole(given["examples"])
    before = TaskData(create(str(given["source"])), test_examples=TEST_EXAMPLES)
    after = TaskData(create(str(given["target"])), limit=few, test_examples=TEST_EXAMPLES)
    tuned = _recipe(given, steps=_whole(given["tuning_steps"]))
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "source.pt"
        learnt = trial(name, before, seed=seed, recipe=_recipe(given), device=device, checkpoint=weights).accuracy
        pretrained = trial(name, after, seed=seed, recipe=tuned, device=device, weights=weights).accuracy
    scratch = trial(name, after, seed=seed, recipe=tuned, device=device).accuracy
    return [
        {"begun": "source", "top1": learnt.top1},
        {"begun": "pre-trained", "top1": pretrained.top1},
        {"begun": "scratch", "top1": scratch.top1},
    ]


@dataclass(frozen=True)
class Mixed:
    """Several tasks of one shape, taken in turn, batch by batch."""

    tasks: tuple[TaskData, ...]
    alone: int = 0
    """So many steps are the last task's before the others join: what is easy shows a network what to look for."""

    def training(self, batch_size: int, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of all steps from `start` on."""
        count = len(self.tasks)
        sources = [iter(data.training(batch_size, seed + 1000 * i, 0)) for i, data in enumerate(self.tasks)]
        for step in itertools.count():
            batch = next(sources[-1 if step < self.alone else step % count])
            if step >= start:
                yield batch


def _train_on_all(
    given: Given, names: list[str], seed: int, device: str, *, alone: float = 0.0
) -> tuple[nn.Module, list[TaskData], Recipe]:
    """A model trained on several tasks in turn, the last one alone for a first share of the steps."""
    data = [TaskData(create(name), test_examples=TEST_EXAMPLES) for name in names]
    recipe = _recipe(given)
    mixed = Mixed(tuple(data), round(alone * recipe.steps))
    with seeded(seed, device):
        options = _options(given, "model", "strong", "faint", "pattern")
        model = model_for(str(given["model"]), data[0], recipe.width_multiplier, **options).to(device)
        train(model, lambda start: mixed.training(recipe.batch_size, seed, start), recipe)
    return model, data, recipe


AMPLITUDES = {"texture": (0.0625, 0.125, 0.25, 0.5, 8.0), "disc": (0.75, 1.5, 3.0, 6.0, 48.0)}
"""Pixels from a clip's first frame to its last, by what moves: an easy one, and others where models begin to see it."""


def _amplitude(given: Given, seed: int, device: str) -> list[Row]:
    """The method of constant stimuli: trained on all `AMPLITUDES` of the motion of a `pattern`, tested on each.

    The first half of the training is on the largest alone.
    """
    pattern = str(given["pattern"])
    amplitudes = AMPLITUDES[pattern]
    names = [f"subtle_motion:amplitude={amplitude:g}:pattern={pattern}" for amplitude in amplitudes]
    model, data, recipe = _train_on_all(given, names, seed, device, alone=0.5)
    return [
        {"amplitude": amplitude, "top1": evaluate(model, one.testing(recipe.batch_size, seed, "normal")).top1}
        for amplitude, one in zip(amplitudes, data, strict=True)
    ]


SALIENT_FRAMES = (0, 2, 4, 8, 12, 16)
"""Of the sixteen frames of a clip."""


def _salience(given: Given, seed: int, device: str) -> list[Row]:
    """Clips of two shapes, a strong one in some frames and a faint one in the rest: which one is answered?

    Both kinds of clip are trained on, each by itself; `strong` and `faint` are contrasts of `appearance`.
    """
    names = [f"appearance:contrast={given[kind]}" for kind in ("strong", "faint")]
    model, (strong, faint), recipe = _train_on_all(given, names, seed, device)
    classes = strong.task.num_classes
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    rows: list[Row] = []
    for frames in SALIENT_FRAMES:
        answered = torch.zeros(2, dtype=torch.int64)
        for first in range(0, TEST_EXAMPLES, recipe.batch_size):
            contents = torch.arange(first, min(first + recipe.batch_size, TEST_EXAMPLES))
            shown = contents % classes
            other = (shown + 1 + contents // classes % (classes - 1)) % classes  # every pair of shapes in turn
            clips, _ = strong.task.make((contents * classes + shown).tolist(), seed=seed, split="test")
            rest, _ = faint.task.make((contents * classes + other).tolist(), seed=seed, split="test")
            order = torch.rand(len(clips), clips.shape[2], generator=generator).argsort(dim=1)
            mixed = torch.where((order < frames)[:, None, :, None, None], clips, rest)
            with torch.inference_mode():
                answer = model(mixed.to(device)).argmax(dim=1).cpu()
            answered += torch.stack(((answer == shown).sum(), (answer == other).sum()))
        salient, quiet = (answered / TEST_EXAMPLES).tolist()
        rows.append({"share": frames / strong.task.clip_length, "salient": salient, "faint_answers": quiet})
    return rows


def _gradient(given: Given, seed: int, device: str) -> list[Row]:
    """The norm of ∂loss/∂input by how many frames before the last it lies, before or after training.

    The loss is of the last frame's prediction. What is small at a long lag cannot be learnt of it.
    """
    data = TaskData(create(str(given["task"])), test_examples=TEST_EXAMPLES)
    name, options = str(given["model"]), _options(given, "model", "task")
    with seeded(seed, device):
        if given["steps"]:
            model = trial(name, data, seed=seed, recipe=_recipe(given), device=device, **options).model
        else:
            model = model_for(name, data, float(str(given.get("width_multiplier", 1.0))), **options).to(device)
    features, labels = next(iter(data.testing(TEST_EXAMPLES, seed, "normal")))
    features = features.to(device).requires_grad_()
    F.cross_entropy(model(features), labels.to(device), reduction="sum").backward()
    assert features.grad is not None  # it was asked for
    norms = features.grad.norm(dim=2).double().mean(dim=0).flip(0).tolist()  # [lag]
    return [{"lag": lag, "norm": norm} for lag, norm in enumerate(norms)]


class _CountRelus(TorchFunctionMode):
    """Counts the rectifications of a forward pass, and the values that they rectify."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.values = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_):
            self.calls += 1
            self.values += args[0].numel()
            return args[0]  # the shape is all that counts; a nested call would count twice
        return func(*args, **(kwargs or {}))


def _relus(given: Given, seed: int, device: str) -> list[Row]:
    """Rectifications in one clip's forward pass at the published size, counted on the meta device."""
    name = str(given["model"])
    with torch.device("meta"):
        model = models.create(name).eval()
        inputs = [torch.empty(shape) for shape in models.input_shapes(name).values()]
    with _CountRelus() as counted:
        model(*inputs)
    params = sum(parameter.numel() for parameter in model.parameters())
    return [{"relus": counted.calls, "rectified": counted.values, "params": params}]


def _stream_state(given: Given, seed: int, device: str) -> list[Row]:
    """Bytes that a model carries from frame to frame of one stream."""
    features, length = _whole(given["hidden_size"]), _whole(given["clip_length"])
    model = models.create(
        str(given["model"]), num_classes=2, clip_length=length, input_features=features, hidden_size=features
    )
    with torch.inference_mode():
        _, state = model.eval().step(torch.zeros(1, features))  # type: ignore[operator]
    params = sum(parameter.numel() for parameter in model.parameters())
    return [{"state_bytes": _bytes_of(state), "params": params}]


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, (tuple, list)) else 0


def _whole(value: Value) -> int:
    if not isinstance(value, int):
        raise RequestError(f"{value!r} is not a whole number")
    return value


KINDS: dict[str, Callable[[Given, int, str], list[Row]]] = {
    "trial": _trial,
    "transfer": _transfer,
    "amplitude": _amplitude,
    "salience": _salience,
    "gradient": _gradient,
    "relus": _relus,
    "stream_state": _stream_state,
}
"""By kind what is done; `timing` is the engine's."""
