"""The commands that train and test models."""

from __future__ import annotations

import datetime
import json
import math
import re
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidbench.progress import Bar
from vidbench.records import Accuracy, Measurement
from vidbench.sweep import Point, RequestError

if TYPE_CHECKING:
    from vidbench.results import RunWriter
    from vidbench.training import Recipe, Score
    from vidbench.trials import TaskData, VideoData


class Amp(StrEnum):
    """Arithmetic of products."""

    none = "none"
    bf16 = "bf16"
    fp16 = "fp16"


class Output(StrEnum):
    """How results are printed."""

    text = "text"
    json = "json"


class OnError(StrEnum):
    """What is done about a video that cannot be read."""

    fail = "fail"
    skip = "skip"


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Of `vidbench list models`, or package.module:factory.")
]
TaskName = Annotated[
    str | None, typer.Option("--task", metavar="TASK[:KNOB=V…]", help="A generated task: `vidbench list tasks`.")
]
DataPath = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Videos: folders by class, UCF101, HMDB51, Kinetics, lists."),
]
Width = Annotated[float | None, typer.Option("--width-multiplier", min=0.0, help="Factor on the model's channels.")]
ClipLength = Annotated[int | None, typer.Option("--clip-length", min=1, help="Frames of a clip of --data.")]
InputSize = Annotated[int | None, typer.Option("--input-size", min=1, help="Pixels of a clip of --data.")]
TestClips = Annotated[int, typer.Option("--test-clips", min=1, help="Clips that a test takes of a video.")]
TestCrops = Annotated[int, typer.Option("--test-crops", help="Crops of each of them: 1, 3 or 10.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that read videos.")]
Broken = Annotated[OnError, typer.Option("--on-error", help="What to do about a video that cannot be read.")]
Cache = Annotated[Path | None, typer.Option("--cache", metavar="DIR", help="Keep decoded videos there.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
As = Annotated[Output, typer.Option("--format", help="text or json.")]


def train(
    model: ModelName,
    task: TaskName = None,
    data: DataPath = None,
    seeds: Annotated[str, typer.Option(metavar="N[,N…]", help="One training for each.")] = "0",
    steps: Annotated[int | None, typer.Option(min=1, help="Batches; default: the recipe's.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of --steps, for --data.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Clips in a batch, over all processes.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="The highest of the cycle.")] = None,
    width_multiplier: Width = None,
    amp: Annotated[Amp, typer.Option(help="Mixed precision.")] = Amp.none,
    examples: Annotated[int | None, typer.Option(min=1, help="Train on so few of --task, over and over.")] = None,
    clip_length: ClipLength = None,
    input_size: InputSize = None,
    test_clips: TestClips = 1,
    test_crops: TestCrops = 1,
    workers: Workers = 0,
    on_error: Broken = OnError.fail,
    cache: Cache = None,
    weights: Annotated[Path | None, typer.Option(help="Begin with these; another classifier is left out.")] = None,
    device: Device = "cpu",
    out: Annotated[Path | None, typer.Option(help="Run folder, new or not; default: runs/<utc>-train.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what lies in --out.")] = False,
    output: As = Output.text,
) -> None:
    """Train a model; test it on normal, shuffled, reversed and frozen clips; keep its accuracy.

    The accuracies are added to the run in --out, beside what was measured there. On several GPUs:
    `torchrun --nproc-per-node 8 --no-python vidbench train …`.
    """
    from vidbench.training import joined, rank
    from vidbench.trials import trial

    if resume and out is None:
        raise RequestError("--resume needs --out DIR: the folder to go on with")
    chosen = _data(
        model, task, data, examples, clip_length, input_size, test_clips, test_crops, workers, on_error, cache
    )
    recipe = _recipe(
        model, chosen, steps=steps, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        width_multiplier=width_multiplier, amp=amp.value,
    )  # fmt: skip
    numbers = _seeds(seeds)
    folder = out or Path("runs") / f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-train"
    found: list[Accuracy] = []
    score: Score | None = None
    with _plain_warnings(), joined(device) as mine, _run(folder, mine, writes=rank() == 0) as run:
        for seed in numbers:
            point = _point(model, chosen, recipe, seed, mine, examples)
            kept = (
                folder
                / "training"
                / (re.sub(r"[^\w.=+-]+", "-", f"{model}-{chosen.name}-{examples or ''}-{seed}") + ".pt")
            )
            if kept.exists() and not resume:
                raise RequestError(f"{kept} is there already: go on with it by --resume, or give another --out")
            steps_shown = _Steps(f"{model}, seed {seed}", shown=rank() == 0)
            try:
                done = trial(
                    model, chosen, seed=seed, recipe=recipe, weights=weights, device=mine, checkpoint=kept,
                    progress=steps_shown,
                )  # fmt: skip
            except KeyboardInterrupt:
                typer.echo(f"vidbench: interrupted: add --resume --out {folder} to go on", err=True)
                raise typer.Exit(130) from None
            finally:
                steps_shown.close()
            found.append(done.accuracy)
            score = done.score
            if run is not None and (point.key, 1) not in run.done:
                run.append(Measurement(point, 1, "ok", accuracy=done.accuracy))
        if rank() == 0 and score is not None:
            _print(model, found, score, chosen, output, folder)


def evaluate(
    model: ModelName,
    weights: Annotated[Path, typer.Option(help="A checkpoint of `vidbench train`, or a published file.")],
    task: TaskName = None,
    data: DataPath = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the test clips of a task.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Clips in a batch.")] = None,
    width_multiplier: Width = None,
    amp: Annotated[Amp, typer.Option(help="Mixed precision.")] = Amp.none,
    clip_length: ClipLength = None,
    input_size: InputSize = None,
    test_clips: TestClips = 1,
    test_crops: TestCrops = 1,
    workers: Workers = 0,
    on_error: Broken = OnError.fail,
    cache: Cache = None,
    device: Device = "cpu",
    output: As = Output.text,
) -> None:
    """Test a trained model: top-1, top-5, and every class."""
    from vidbench.training import joined
    from vidbench.trials import model_for, score_on

    chosen = _data(model, task, data, None, clip_length, input_size, test_clips, test_crops, workers, on_error, cache)
    recipe = _recipe(model, chosen, batch_size=batch_size, width_multiplier=width_multiplier, amp=amp.value)
    with _plain_warnings(), joined(device) as mine:
        made = model_for(model, chosen, recipe.width_multiplier, weights, replace_head=False).to(mine)
        accuracy, score = score_on(made, chosen, seed=seed, recipe=recipe)
        _print(model, [accuracy], score, chosen, output, None)


def pick(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run with latencies and accuracies of models.")],
    latency_ms: Annotated[float | None, typer.Option(min=0.0, help="The most that one call may take.")] = None,
    memory_mb: Annotated[float | None, typer.Option(min=0.0, help="The most that it may hold, in 10^6 bytes.")] = None,
    task: Annotated[str | None, typer.Option(metavar="TASK", help="Whose accuracy counts.")] = None,
    output: As = Output.text,
) -> None:
    """Name the models within a budget that no other beats in accuracy, latency and memory at once."""
    from vidbench.pick import within
    from vidbench.results import load

    chosen = within(
        load(run).frame(),
        latency_s=None if latency_ms is None else latency_ms / 1e3,
        memory_bytes=None if memory_mb is None else memory_mb * 1e6,
        task=task,
    )
    if output is Output.json:
        typer.echo(chosen.to_json(orient="records"))
        return
    shown = chosen.dropna(axis=1, how="all")
    shown = shown.assign(
        top1_accuracy=[f"{100 * share:.1f} %" for share in chosen["top1_accuracy"]],
        latency_s=[f"{1e3 * seconds:.3g} ms" for seconds in chosen["latency_s"]],
    )
    if "peak_memory_bytes" in shown:
        held = chosen["peak_memory_bytes"].astype("Float64") / 1e6
        shown["peak_memory_bytes"] = held.map(lambda mega: f"{mega:.3g} MB", na_action="ignore")
    names = {"top1_accuracy": "top-1", "latency_s": "latency", "peak_memory_bytes": "peak memory", "workload": "model"}
    typer.echo(shown.rename(columns=names).to_string(index=False))


def _data(
    model: str,
    task: str | None,
    data: Path | None,
    examples: int | None,
    clip_length: int | None,
    input_size: int | None,
    test_clips: int,
    test_crops: int,
    workers: int,
    on_error: OnError,
    cache: Path | None,
) -> TaskData | VideoData:
    from vidbench.data.tasks import create
    from vidbench.trials import TaskData, VideoData

    if (task is None) == (data is None):
        raise RequestError("give either --task, a generated task, or --data, a folder of videos")
    if task is not None:
        if clip_length is not None or input_size is not None:
            raise RequestError(f"a task sets its clips itself: --task {task}:clip_length={clip_length or 32}")
        return TaskData(create(task), limit=examples)
    if examples is not None:
        raise RequestError("--examples is for --task alone")
    from vidbench.data.datasets import open_dataset
    from vidbench.data.loading import ClipReader, Sampling
    from vidbench.models import spec_of

    spec = spec_of(model)
    sampling = Sampling(clip_length or spec.clip_length)
    reader = ClipReader(
        sampling, input_size or spec.input_size, test_clips=test_clips, test_crops=test_crops, cache=cache
    )
    train, test = (open_dataset(data or "", split=split) for split in ("train", "test"))
    return VideoData(train, test, reader, num_workers=workers, on_error=on_error.value)


def _recipe(model: str, data: TaskData | VideoData, *, epochs: int | None = None, **given: Any) -> Recipe:
    from dataclasses import replace

    from vidbench.trials import VideoData, recipe_for

    recipe = recipe_for(model, data.name)
    if isinstance(data, VideoData):
        recipe = replace(recipe, width_multiplier=1.0, batch_size=8)
    recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if epochs is None:
        return recipe
    if given.get("steps") is not None or not isinstance(data, VideoData):
        raise RequestError("--epochs is for --data, and in place of --steps")
    return replace(recipe, steps=epochs * -(-len(data.train.videos) // recipe.batch_size))


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise RequestError(f"--seeds {text}: wanted different whole numbers from 0 on, with commas between them")
    return numbers


def _point(
    model: str, data: TaskData | VideoData, recipe: Recipe, seed: int, device: str, examples: int | None
) -> Point:
    """As the points of a suite's tasks; steps and examples are part of it."""
    shape = data.shape
    case: dict[str, Any] = {"task": data.name, "clip_length": shape["clip_length"], "seed": seed}
    if (size := shape["input_size"]) is not None:
        case |= {"height": size, "width": size}
    case |= {"width_multiplier": recipe.width_multiplier, "steps": recipe.steps}
    if examples is not None:
        case["examples"] = examples
    return Point(model, "task", "eager", mode="evaluate", device=device.partition(":")[0], case=case)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as lines for people, each once."""
    with warnings.catch_warnings():
        said: set[str] = set()

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            if str(message) not in said:
                said.add(str(message))
                typer.echo(f"vidbench: warning: {message}", err=True)

        warnings.showwarning = show
        yield


@contextmanager
def _run(folder: Path, device: str, *, writes: bool) -> Iterator[RunWriter | None]:
    """The run that accuracies are added to; None where another process writes it."""
    if not writes:
        yield None
        return
    from vidbench.environment import describe
    from vidbench.results import RunWriter

    command = shlex.join(["vidbench", *sys.argv[1:]])
    with RunWriter.extend(
        folder, suite="train", environment=describe(device.partition(":")[0], ()), command=command
    ) as run:
        yield run


class _Steps:
    """Shows how far a training is."""

    def __init__(self, what: str, *, shown: bool) -> None:
        self.what = what
        self.bar = Bar(sys.stderr, every_s=15.0) if shown else None
        self.started = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int, steps: int, loss: float) -> None:
        if self.bar is None:
            return
        if self.first is None:
            self.first = done - 1
        rate = (done - self.first) / max(time.monotonic() - self.started, 1e-9)
        self.bar.update(done, steps, f"{self.what}  loss {loss:.3f}")
        left = (steps - done) / rate
        line = f"{self.what} [{done}/{steps}] loss {loss:.3f}, {rate:.2f} steps/s, {left:.0f} s left"
        self.bar.say(line, last=done == steps)

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()


def _print(
    model: str,
    found: Sequence[Accuracy],
    score: Score,
    data: TaskData | VideoData,
    output: Output,
    folder: Path | None,
) -> None:
    """The accuracies over seeds; classes and confusions are those of the last seed."""
    from vidbench.metrics import interval
    from vidbench.trials import VideoData

    mean, low, high = interval([one.top1 for one in found])
    names = data.train.classes if isinstance(data, VideoData) else data.task.classes
    per_class = dict(zip(names, score.per_class, strict=True))
    if output is Output.json:
        document = {
            "model": model,
            "task": data.name,
            "top1": mean,
            "top1_interval": None if len(found) == 1 else [low, high],
            "chance": found[0].chance,
            "seeds": [{"seed": a.seed, "top1": a.top1, "top5": a.top5, **a.conditions} for a in found],
            "examples": found[-1].examples,
            "per_class": {name: None if math.isnan(share) else share for name, share in per_class.items()},
            "confusion": score.confusion.tolist(),
            "run": None if folder is None else str(folder),
        }
        typer.echo(json.dumps(document))
        return
    spread = "" if len(found) == 1 else f" ({low:.1%} to {high:.1%} over {len(found)} seeds)"
    typer.echo(f"{model} on {data.name}: top-1 {mean:.1%}{spread}, chance {found[0].chance:.1%}")
    if found[-1].top5 is not None:
        typer.echo(f"  top-5 {sum(a.top5 or 0.0 for a in found) / len(found):.1%}")
    for condition in found[0].conditions:
        share = interval([one.conditions[condition] for one in found]).mean
        typer.echo(f"  {condition} frames {share:.1%}")
    seen = {name: share for name, share in per_class.items() if not math.isnan(share)}
    worst = sorted(seen.items(), key=lambda item: item[1])[:5]
    typer.echo("  hardest classes: " + ", ".join(f"{name} {share:.0%}" for name, share in worst))
    if folder is not None:
        number = "1 accuracy" if len(found) == 1 else f"{len(found)} accuracies"
        typer.echo(f"{folder}: {number}; next: vidbench report {folder}")
