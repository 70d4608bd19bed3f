"""Training and testing of a model: one loop for generated tasks and video files, resumable to the bit.

A training is a function of its recipe, its seed and its data: step i sees the batch that the data make for i. What a
checkpoint keeps is all the rest, so that a training that was killed and resumed ends with the same weights as one
that was not.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from vidbench.data.loading import average_views
from vidbench.models.sizes import channels_last_filters
from vidbench.sweep import RequestError

Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs of clips (N, …) and labels (N,), this process's share of them."""

Progress = Callable[[int, int, float], None]
"""Called after every step with the steps done, the steps in all, and the loss."""

Amp = Literal["none", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained. The budget is a number of steps and not a time, so that a seed has one outcome."""

    width_multiplier: float
    """Factor on the model's channel counts."""
    learning_rate: float
    """The highest of the one cycle."""
    steps: int
    batch_size: int = 24
    """Over all processes."""
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    """Gradients of a larger Euclidean norm are scaled down to it."""
    amp: Amp = "none"
    """Arithmetic of products: that of the weights, or automatic mixed precision."""
    dropout: float | None = None
    """Of every dropout layer; None leaves the model's own, which narrow networks cannot afford."""


@dataclass(frozen=True)
class Score:
    """The outcome of a test."""

    confusion: Tensor
    """Clips by true class (rows) and by answer (columns), int64."""
    top5: float
    """Share of clips whose class is among the five most likely."""

    @property
    def examples(self) -> int:
        """Clips tested."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of right answers."""
        return int(self.confusion.diagonal().sum()) / self.examples

    @property
    def per_class(self) -> list[float]:
        """Share of right answers of each class; NaN for one that had no clip."""
        right, all_ = self.confusion.diagonal().tolist(), self.confusion.sum(dim=1).tolist()
        return [r / n if n else math.nan for r, n in zip(right, all_, strict=True)]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a training is kept on its way."""

    path: Path
    what: str
    """Model, data and seed in words: another training's checkpoint is refused."""
    every_s: float = 30.0
    """Seconds from one writing to the next."""


def train(
    model: nn.Module,
    batches: Callable[[int], Batches],
    recipe: Recipe,
    *,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> float:
    """Trains a model in place with AdamW, cross-entropy and one cycle of the learning rate, cosine up and down.

    In a process group every process brings its share of each batch, and the gradients are averaged.

    Args:
        model: From clips to logits; left in training mode, on the device that it is on, with the recipe's dropout.
        batches: From the number of a step, the first being 0, to its batch and all later ones.
        recipe: The number of steps and how they are taken.
        checkpoint: Is gone on with where it exists, and written now and then and after the last step.
        progress: Told of every step.

    Returns:
        The loss of the last step.

    Raises:
        RequestError: `steps` is below 1, a batch cannot be shared out evenly, the batches end early, or the
            checkpoint is of another training.
        FloatingPointError: The loss is no longer finite.

    Source: Loshchilov & Hutter (2019), arXiv:1711.05101 (AdamW); Smith & Topin (2018), arXiv:1708.07120 (one cycle).
    """
    if recipe.steps < 1:
        raise RequestError(f"steps={recipe.steps} is not a positive integer")
    if recipe.batch_size % world():
        raise RequestError(f"batch_size={recipe.batch_size} cannot be shared by {world()} processes: give a multiple")
    device = device_of(model)
    channels_last_filters(model)  # a step of C3D takes half the time on a CPU; on a GPU it is what tensor cores want
    state = _State(model, recipe, device)
    value = float("nan")
    if checkpoint is not None and checkpoint.path.exists():
        value = state.restore(checkpoint)
    wrapped: nn.Module = model
    if world() > 1:
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    model.train()
    for module in model.modules():
        if recipe.dropout is not None and isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = recipe.dropout
    written = time.monotonic()
    source = iter(batches(state.step)) if state.step < recipe.steps else iter(())
    while state.step < recipe.steps:
        batch = next(source, None)
        if batch is None:
            raise RequestError(f"the batches ended after {state.step} of {recipe.steps} steps")
        clips, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        with autocast(device, recipe.amp):
            loss = F.cross_entropy(wrapped(clips), labels)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"training diverged: loss {value} at step {state.step + 1} of {recipe.steps}; "
                f"lower learning_rate={recipe.learning_rate:g}"
            )
        state.update(loss, recipe.clip_norm)
        if checkpoint is not None and (state.step == recipe.steps or time.monotonic() - written >= checkpoint.every_s):
            state.save(checkpoint, value)
            written = time.monotonic()
        if progress is not None:
            progress(state.step, recipe.steps, value)
    return value


class _State:
    """Everything that changes from step to step."""

    def __init__(self, model: nn.Module, recipe: Recipe, device: torch.device) -> None:
        self.step = 0
        self.model, self.recipe, self.device = model, recipe, device
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, max_lr=recipe.learning_rate, total_steps=recipe.steps
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")

    def update(self, loss: Tensor, clip_norm: float) -> None:
        """One step of the optimiser."""
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.schedule.step()
        self.step += 1

    def save(self, checkpoint: Checkpoint, loss: float) -> None:
        """Writes the checkpoint; a process that dies meanwhile, or a full disk, leaves the one before.

        Raises:
            RequestError: The disk refuses.
        """
        if rank() > 0:
            return
        cuda = self.device.type == "cuda"
        state = {
            "what": checkpoint.what,
            "recipe": asdict(self.recipe),
            "step": self.step,
            "loss": loss,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if cuda else None,
        }
        new = checkpoint.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            checkpoint.path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(checkpoint.path)
        except (OSError, RuntimeError) as problem:  # torch's writer wraps what the disk says into a RuntimeError
            reason = str(getattr(problem, "strerror", None) or problem).splitlines()[0]
            raise RequestError(
                f"cannot write {checkpoint.path}: {reason}; what was kept before can be resumed"
            ) from None
        finally:
            new.unlink(missing_ok=True)

    def restore(self, checkpoint: Checkpoint) -> float:
        """Goes on where the checkpoint stands; returns its last loss."""
        try:
            state: dict[str, Any] = torch.load(checkpoint.path, map_location=self.device, weights_only=True)
        except Exception as error:  # noqa: BLE001  a damaged file may raise anything
            raise RequestError(f"{checkpoint.path} is not a checkpoint: {error}".splitlines()[0]) from None
        if "schedule" not in state or "what" not in state:
            raise RequestError(f"{checkpoint.path} is not a checkpoint of a training; use --weights for weights")
        for name, before, now in (
            ("training", state["what"], checkpoint.what),
            ("recipe", state["recipe"], asdict(self.recipe)),
        ):
            if before != now:
                raise RequestError(f"{checkpoint.path} is of another {name}: {before}, not {now}; choose another --out")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"].cpu())
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)
        return float(state["loss"])


def autocast(device: torch.device, amp: Amp) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision, or none."""
    if amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, *, amp: Amp = "none") -> Score:
    """The score of a model in evaluation mode; afterwards it is in the mode that it was in.

    The processes of a group bring their share of the clips, and all of them return the score of all.

    Args:
        model: From clips to logits (N, classes).
        batches: Labels (N,), and clips, N of them or N · V: views, those of one clip after the other, whose
            probabilities are averaged.
        amp: Arithmetic of products.

    Raises:
        RequestError: There are no examples.
    """
    device, mode = device_of(model), model.training
    model.eval()
    confusion, among_five = None, 0
    try:
        for clips, labels in batches:
            with autocast(device, amp):
                logits = model(clips.to(device))
            likely = average_views(logits, len(labels)).cpu()
            classes = likely.shape[1]
            if confusion is None:
                confusion = torch.zeros(classes, classes, dtype=torch.int64)
            confusion += torch.bincount(labels * classes + likely.argmax(dim=1), minlength=classes**2).view(
                classes, classes
            )
            best = likely.topk(min(5, classes), dim=1).indices
            among_five += int((best == labels[:, None]).any(dim=1).sum())
    finally:
        model.train(mode)
    parts: list[tuple[Tensor | None, int]] = [(confusion, among_five)]
    if world() > 1:
        parts = [(None, 0)] * world()
        distributed.all_gather_object(parts, (confusion, among_five))
    found = [part for part, _ in parts if part is not None]
    examples = sum(int(part.sum()) for part in found)
    if not examples:
        raise RequestError("no examples to test on")
    return Score(torch.stack(found).sum(dim=0), sum(five for _, five in parts) / examples)


def world() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """The process group that torchrun has asked for, if any; yields this process's device.

    Raises:
        RequestError: torch cannot join it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    try:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (KeyError, RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise RequestError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but no process group: {text}") from None
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next(model.parameters()).device


@contextlib.contextmanager
def seeded(seed: int, device: str) -> Iterator[None]:
    """Torch's random numbers from a seed on; afterwards they are as they were."""
    with torch.random.fork_rng(devices=[] if device == "cpu" else None):
        torch.manual_seed(seed)
        yield
