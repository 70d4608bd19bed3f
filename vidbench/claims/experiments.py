"""What the claims' experiments do. Each is a function of what is given, a seed and a device, and returns rows."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from vidbench import counting, models
from vidbench.claims import Experiment, Row
from vidbench.claims.contenders import Averaged
from vidbench.data.tasks import CONDITIONS, create
from vidbench.memory import measure_memory
from vidbench.sweep import RequestError, Value, unknown
from vidbench.timing import Budget, Timer, calls_per_sample, warm_up
from vidbench.training import Recipe, evaluate, seeded, train
from vidbench.trials import TaskData, model_for, trial

Given = Mapping[str, Value]

CONTENDERS = "vidbench.claims.contenders"

TEST_EXAMPLES = 300
"""Test clips behind each accuracy: one half is known to within 3 points by a seed, and better by several."""

LABELS = ("length", "count", "field")
"""What is given for the figures alone."""

LOST = 1e3
"""The loss, in nats, of a training that diverged: more than any other has."""

ALONE = ("scaling", "cost")
"""Kinds that are timed: on all cores, with nothing beside them."""

TIMING = Budget(seconds=0.3)


def perform(experiment: Experiment, device: str) -> list[Row]:
    """The rows of an experiment.

    Raises:
        RequestError: No such kind, or what is given does not fit it.
        FloatingPointError: A training diverged that has no other rate.
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
    try:
        done = trial(
            str(given["model"]),
            data,
            seed=seed,
            recipe=_recipe(given),
            device=device,
            progress=lambda _step, _steps, loss: losses.append(loss),
            **_options(given, "model", "task", "examples", *LABELS),
        )
    except FloatingPointError:  # at too high a rate: nothing was learnt, and another rate may do better
        return [{"top1": 1 / data.task.num_classes, "loss": LOST}]
    accuracy = done.accuracy
    return [
        {
            "top1": accuracy.top1,
            **accuracy.conditions,
            "loss": math.fsum(losses) / len(losses),
            "params": _params(done.model),
            "train_s": accuracy.train_s,
        }
    ]


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _transfer(given: Given, seed: int, device: str) -> list[Row]:
    """Training on few examples of `target`, from scratch and from what was learnt of `source`."""
    name, few = str(given["model"]), _whole(given["examples"])
    before = TaskData(create(str(given["source"])), test_examples=TEST_EXAMPLES)
    after = TaskData(create(str(given["target"])), limit=few, test_examples=TEST_EXAMPLES)
    tuned = _recipe(given, steps=given["tuning_steps"])
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "source.pt"
        learnt = trial(name, before, seed=seed, recipe=_recipe(given), device=device, checkpoint=weights).accuracy
        pretrained = trial(name, after, seed=seed, recipe=tuned, device=device, weights=weights).accuracy
    scratch = trial(name, after, seed=seed, recipe=tuned, device=device).accuracy
    outcomes = {"source": learnt, "pre-trained": pretrained, "scratch": scratch}
    return [{"begun": begun, "top1": found.top1, **found.conditions} for begun, found in outcomes.items()]


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


def _streams(given: Given, seed: int, device: str) -> list[Row]:
    """The two streams trained by themselves, as in the paper, and the average of their scores."""
    data = TaskData(create(str(given["task"])), test_examples=TEST_EXAMPLES)
    recipe = _recipe(given)
    streams = {
        name: trial(name, data, seed=seed, recipe=recipe, device=device).model
        for name in (f"{CONTENDERS}:spatial_stream", f"{CONTENDERS}:temporal_stream")
    }
    tested = {**streams, f"{CONTENDERS}:both": Averaged(*streams.values())}
    return [
        {"model": name, "top1": evaluate(model, data.testing(recipe.batch_size, seed, "normal")).top1}
        for name, model in tested.items()
    ]


AMPLITUDES = {
    "texture": (0.015625, 0.03125, 0.0625, 0.125, 0.25, 8.0),
    "disc": (0.1875, 0.375, 0.75, 1.5, 3.0, 48.0),
}
"""Pixels from a clip's first frame to its last, by what moves: octaves where models begin to see it, and one beyond."""

BETWEEN = {"texture": (0.5, 1.0, 2.0, 4.0), "disc": (6.0, 12.0, 24.0)}
"""Tested and not trained on, so that a threshold among them is found to the octave."""


def _amplitude(given: Given, seed: int, device: str) -> list[Row]:
    """The method of constant stimuli: trained on all `AMPLITUDES` of the motion of a `pattern`, tested on each.

    The first half of the training is on the largest alone. That one is tested under altered frames, too.
    """
    pattern = str(given["pattern"])
    largest = AMPLITUDES[pattern][-1]

    def name(amplitude: float) -> str:
        return f"subtle_motion:amplitude={amplitude:g}:pattern={pattern}"

    shown = sorted((*AMPLITUDES[pattern], *BETWEEN[pattern]))
    try:
        model, _, recipe = _train_on_all(given, [*map(name, AMPLITUDES[pattern])], seed, device, alone=0.5)
    except FloatingPointError:  # at too high a rate: nothing was learnt, and another rate may do better
        return [{"amplitude": amplitude, "top1": 0.5} for amplitude in shown]
    rows: list[Row] = []
    for amplitude in shown:
        one = TaskData(create(name(amplitude)), test_examples=TEST_EXAMPLES)
        asked = CONDITIONS if amplitude == largest else CONDITIONS[:1]
        found: dict[str, float] = {
            how: evaluate(model, one.testing(recipe.batch_size, seed, how)).top1 for how in asked
        }
        rows.append({"amplitude": amplitude, "top1": found.pop("normal"), **found})
    return rows


SALIENT_FRAMES = (0, 2, 4, 8, 12, 16)
"""Of the sixteen frames of a clip."""


def _salience(given: Given, seed: int, device: str) -> list[Row]:
    """Clips of two shapes, a strong one in some frames and a faint one in the rest: which one is answered?

    Both kinds of clip are trained on, each by itself; `strong` and `faint` are contrasts of `appearance`.
    """
    names = [f"appearance:contrast={given[kind]}" for kind in ("strong", "faint")]
    model, (strong, faint), recipe = _train_on_all(given, names, seed, device)
    return salience_of(model, strong, faint, recipe.batch_size, seed, device)


def salience_of(
    model: nn.Module, strong: TaskData, faint: TaskData, batch_size: int, seed: int, device: str
) -> list[Row]:
    """How often a model answers the shape that some frames show strongly, and the one that the others show faintly."""
    classes = strong.task.num_classes
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    rows: list[Row] = []
    for frames in SALIENT_FRAMES:
        answered = torch.zeros(2, dtype=torch.int64)
        for first in range(0, TEST_EXAMPLES, batch_size):
            contents = torch.arange(first, min(first + batch_size, TEST_EXAMPLES))
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
        both = salient + quiet
        rows.append(
            {
                "share": frames / strong.task.clip_length,
                "salient": salient,
                "faint": quiet,
                "preference": salient / both if both else math.nan,
            }
        )
    return rows


def _gradient(given: Given, seed: int, device: str) -> list[Row]:
    """The norm of ∂loss/∂input by how many frames before the last it lies, before training.

    The loss is of the last frame's prediction. What is small at a long lag cannot be learnt of it.
    """
    data = TaskData(create(str(given["task"])), test_examples=TEST_EXAMPLES)
    name, options = str(given["model"]), _options(given, "model", "task")
    with seeded(seed, device):
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
        model = models.create(name, **_options(given, "model")).eval()
        inputs = [torch.empty(shape) for shape in models.input_shapes(name).values()]
    with _CountRelus() as counted:
        model(*inputs)
    return [{"relus": counted.calls, "rectified": counted.values, "params": _params(model)}]


SEQUENCE_CLASSES = 10


def _sequence_model(name: str, hidden_size: int, clip_length: int, device: str) -> nn.Module:
    """A model on as many features as it has units."""
    return models.create(
        name, num_classes=SEQUENCE_CLASSES, clip_length=clip_length, input_features=hidden_size, hidden_size=hidden_size
    ).to(device)


def _stream_state(given: Given, seed: int, device: str) -> list[Row]:
    """Bytes that a model carries from frame to frame of one stream."""
    features = _whole(given["hidden_size"])
    model = _sequence_model(str(given["model"]), features, _whole(given["clip_length"]), "cpu")
    with torch.inference_mode():
        _, state = model.eval().step(torch.zeros(1, features))  # type: ignore[operator]
    return [{"state_bytes": _bytes_of(state), "params": _params(model)}]


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, (tuple, list)) else 0


def _sequence_step(model: nn.Module, features: Tensor) -> Callable[[], None]:
    """Forward and backward of the last frame's prediction."""
    labels = torch.arange(len(features), device=features.device) % SEQUENCE_CLASSES

    def step() -> None:
        F.cross_entropy(model(features), labels).backward()
        model.zero_grad(set_to_none=True)

    return step


def _training_memory(given: Given, seed: int, device: str) -> list[Row]:
    """The most bytes alive in a training step beyond weights and inputs, at equal numbers of parameters.

    The width given is the recurrent network's; the other one has the width that comes nearest in parameters.
    """
    length, hidden = _whole(given["clip_length"]), _whole(given["hidden_size"])
    name, other = str(given["model"]), str(given["like"])
    width = hidden
    if name != other:
        wanted = _params(_sequence_model(other, hidden, length, "cpu"))
        width = min(
            range(16, 2 * hidden, 8), key=lambda w: abs(_params(_sequence_model(name, w, length, "meta")) - wanted)
        )
    with seeded(seed, device):
        model = _sequence_model(name, width, length, device)
        features = torch.randn(_whole(given["batch_size"]), length, width, device=device)
    step = _sequence_step(model, features)
    with _without_denormals():
        step()
    memory = measure_memory(device, step, 0)
    return [{"peak_bytes": memory.peak_bytes - memory.live_before_bytes, "params": _params(model), "units": width}]


def _scaling(given: Given, seed: int, device: str) -> list[Row]:
    """Latency over clip length, the networks in turn at every length; on a CPU also on one thread at the longest.

    Weight normalisation is folded into the weights in `forward`, as it is where a network is deployed. Gradients of
    the last frame that have shrunk below the smallest normal number over some hundreds of frames would be computed
    many times slower on a CPU: they count as 0, as they do on a GPU.
    """
    mode, hidden = str(given["mode"]), _whole(given["hidden_size"])
    lengths = given["lengths"]
    assert isinstance(lengths, tuple)
    timer = Timer(device, "hot")
    rows: list[Row] = []
    for length in lengths:
        steps = {}
        for network, name in (("lstm", f"{CONTENDERS}:lstm"), ("tcn", "tcn")):
            with seeded(seed, device):
                model = _sequence_model(name, hidden, length, device).train(mode == "train")
                features = torch.randn(1, length, hidden, device=device)
            steps[network] = _sequence_step(model, features) if mode == "train" else _forward(model, features)
        cores = {"all": torch.get_num_threads()}
        if device == "cpu" and length == lengths[-1]:
            cores["one"] = 1
        for which, count in cores.items():
            torch.set_num_threads(count)
            with _without_denormals():
                latencies = _in_turn(steps, timer)
            rows += [
                {
                    "network": network,
                    "line": f"{network.upper()}, {mode}",
                    "clip_length": length,
                    "cores": which,
                    "latency_s": latency,
                }
                for network, latency in latencies.items()
            ]
        torch.set_num_threads(cores["all"])
    return rows


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)  # does nothing where the processor cannot
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _in_turn(calls: Mapping[str, Callable[[], Any]], timer: Timer) -> dict[str, float]:
    """Seconds per call of each: medians of samples that are taken in turn, so that a slow moment is slow for all.

    What the others left in the caches is no part of a sample: a call that is not timed comes before it.
    """
    counts = {}
    for name, call in calls.items():
        warm_up(call, timer, seconds=TIMING.warm_up_s)
        counts[name] = calls_per_sample(call, timer, TIMING)
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for taken in range(TIMING.most):
        if taken >= TIMING.least and time.perf_counter() - began > 2 * TIMING.seconds * len(calls):
            break
        for name, call in calls.items():
            timer(call)
            times[name].append(timer(call, counts[name])[0])
    return {name: statistics.median(taken) for name, taken in times.items()}


def _forward(model: nn.Module, features: Tensor) -> Callable[[], Tensor]:
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")

    def forward() -> Tensor:
        with torch.inference_mode():
            out: Tensor = model(features)
            return out

    return forward


def _cost(given: Given, seed: int, device: str) -> list[Row]:
    """Multiply-adds and latency of two models on one clip, timed in turn."""
    names = ("i3d_rgb", f"{CONTENDERS}:i3d_without_bottlenecks")
    size, length = _whole(given["input_size"]), _whole(given["clip_length"])
    counted: dict[str, int] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name in names:
        with seeded(seed, device):
            model = models.create(name, width_multiplier=float(str(given["width_multiplier"]))).eval()
        counts = counting.count_model(counting.on_meta(model), [(1, 3, length, size, size)])
        counted[name] = counts.macs or 0
        calls[name] = _forward(model.to(device), torch.randn(1, 3, length, size, size).to(device))
    latencies = _in_turn(calls, Timer(device, "hot"))
    return [{"model": name, "macs": counted[name], "latency_s": latencies[name]} for name in names]


def _whole(value: Value) -> int:
    if not isinstance(value, int):
        raise RequestError(f"{value!r} is not a whole number")
    return value


KINDS: dict[str, Callable[[Given, int, str], list[Row]]] = {
    "trial": _trial,
    "transfer": _transfer,
    "streams": _streams,
    "amplitude": _amplitude,
    "salience": _salience,
    "gradient": _gradient,
    "relus": _relus,
    "stream_state": _stream_state,
    "training_memory": _training_memory,
    "scaling": _scaling,
    "cost": _cost,
}
"""By kind what is done."""
