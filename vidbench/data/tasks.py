"""Generated tasks: clips made on the fly that say exactly what must be learnt of them.

Example `index` of a (seed, split) is the same on every machine: its randomness is the raw output of a counter-based
generator, and its frames are whole numbers. Examples are never stored, so nothing can be memorised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidbench.data import scenes
from vidbench.data.scenes import Bytes, Domain, Integers, Pattern, Scene
from vidbench.sweep import RequestError, unknown

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

Condition = Literal["normal", "shuffled", "reversed", "frozen"]
CONDITIONS: tuple[Condition, ...] = ("normal", "shuffled", "reversed", "frozen")
"""shuffled: the clip's frames in random order; reversed: backwards; frozen: one of them, at random, throughout."""


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task whose clips are made on the fly.

    Example `index` has content `index // num_classes` and label `index % num_classes`, so neighbouring examples differ
    in nothing but what tells the classes apart.
    """

    name: str
    meaning: str
    classes: tuple[str, ...]
    """Their names, label by label."""
    clip_length: int
    content: Callable[[Bytes], Scene]
    """See `scenes`."""
    entropy_bytes: int
    """Random bytes that one content takes."""
    frame: tuple[int, ...] = (3, scenes.SIZE, scenes.SIZE)
    """Shape of a frame: (3, H, W), or of a feature vector: (F,)."""

    @property
    def num_classes(self) -> int:
        """Classes told apart."""
        return len(self.classes)

    @property
    def chance(self) -> float:
        """Top-1 accuracy of guessing."""
        return 1 / self.num_classes

    @property
    def size(self) -> int | None:
        """Pixels of a frame's side; None where there are no pictures."""
        return self.frame[-1] if len(self.frame) == 3 else None

    def make(
        self, indices: Sequence[int], *, seed: int, split: Split = "train", condition: Condition = "normal"
    ) -> tuple[Tensor, Tensor]:
        """The examples at `indices`.

        Args:
            indices: Which examples, each at least 0 and without upper bound.
            seed: Other seeds are other examples.
            split: The splits share no example.
            condition: What is done to the frames' order; the labels stay.

        Returns:
            Clips (N, 3, T, H, W), or features (N, T, F), float32, in [-2, 2], and labels (N,), int64.

        Raises:
            RequestError: The split or the condition is not known, an index or the seed is negative.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if condition not in CONDITIONS:
            raise unknown("condition", condition, CONDITIONS)
        if seed < 0 or min(indices, default=0) < 0:
            raise RequestError(f"seed={seed} and indices from {min(indices, default=0)}: wanted at least 0")
        examples = np.asarray(indices, dtype=np.int64)
        contents, place = np.unique(examples // self.num_classes, return_inverse=True)
        labels = examples % self.num_classes
        entropy = np.stack([_bytes(self.entropy_bytes, seed, split, "normal", int(c)) for c in contents])
        frames, orders = self.content(entropy)
        order = orders[place, labels]
        if condition != "normal":
            keys = np.stack([_bytes(8 * self.clip_length, seed, split, condition, int(e)) for e in examples])
            order = np.take_along_axis(order, _altered(condition, keys.view("<u8")), axis=1)
        clips = torch.from_numpy(frames)[torch.from_numpy(place)[:, None], torch.from_numpy(order)]
        # [N, T, 3, H, W] whole levels → [N, 3, T, H, W]: mean 0.5 and deviation 0.25 of [0, 1] become 0 and 1.
        clips = clips.transpose(1, 2) if len(self.frame) == 3 else clips
        clips = clips.to(torch.float32, memory_format=torch.contiguous_format)
        return clips.div_(63.75).sub_(2), torch.from_numpy(labels)

    def batches(
        self,
        *,
        batch_size: int,
        seed: int,
        split: Split = "train",
        condition: Condition = "normal",
        examples: int | None = None,
        step: int = 1,
        start: int = 0,
        limit: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Examples 0, `step`, 2 `step`, … in batches, from batch `start` on.

        With a step of 1 a content comes in all its classes, side by side; with `num_classes` + 1 the classes take
        turns as well, and every example has a content of its own.

        Args:
            batch_size: Examples in a batch; the last may have fewer.
            examples: How many there are in all; without, there is no end to them.
            step: From one example to the next.
            start: Number of the first batch.
            limit: After so many examples the first comes again.
        """
        first = start * batch_size
        while examples is None or first < examples:
            last = first + batch_size if examples is None else min(first + batch_size, examples)
            places = range(first, last) if limit is None else [place % limit for place in range(first, last)]
            indices = [place * step for place in places]
            yield self.make(indices, seed=seed, split=split, condition=condition)
            first = last


def _bytes(count: int, seed: int, split: Split, condition: Condition, number: int) -> Bytes:
    """Random bytes, a function of the arguments alone. NumPy promises that Philox's raw output never changes."""
    stream = SPLITS.index(split) * len(CONDITIONS) + CONDITIONS.index(condition)
    generator = np.random.Philox(key=[seed, number], counter=[0, 0, 0, stream])
    return generator.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


def _altered(condition: Condition, keys: npt.NDArray[np.uint64]) -> Integers:
    """Which frame of each clip is shown when, (N, T)."""
    clips, clip_length = keys.shape
    if condition == "shuffled":
        return np.argsort(keys, axis=1, kind="stable")
    if condition == "reversed":
        return np.tile(np.arange(clip_length)[::-1], (clips, 1))
    return np.repeat((keys[:, :1] % clip_length).astype(np.int64), clip_length, axis=1)


_WAYS = ("to the right", "to the left")


def _appearance(*, clip_length: int = 16, contrast: int = 192) -> Task:
    _in_range(clip_length=(clip_length, 1, 1024), contrast=(contrast, 1, 256))
    return Task(
        name="appearance",
        meaning="which of four shapes is shown: any single frame suffices",
        classes=scenes.SHAPES,
        clip_length=clip_length,
        content=partial(scenes.appearance, clip_length=clip_length, contrast=contrast),
        entropy_bytes=scenes.noise_bytes(clip_length),
    )


def _time_direction(*, clip_length: int = 16, speed: int = 2, domain: Domain = "a") -> Task:
    _in_range(clip_length=(clip_length, 2, 1024), speed=(speed, 1, 8))
    return Task(
        name="time_direction",
        meaning="whether a clip of a moving shape runs forwards or backwards",
        classes=("forwards", "backwards"),
        clip_length=clip_length,
        content=partial(scenes.time_direction, clip_length=clip_length, speed=speed, domain=domain),
        entropy_bytes=scenes.noise_bytes(clip_length),
    )


def _frame_order(*, clip_length: int = 16, delay: int = 0, domain: Domain = "a") -> Task:
    _in_range(clip_length=(clip_length, 3 * scenes.EVENT_LENGTH + 2 * delay, 1024), delay=(delay, 0, 500))
    names = scenes.COLOUR_NAMES if domain == "a" else scenes.TINT_NAMES
    return Task(
        name="frame_order",
        meaning="the order of three coloured flashes; all six classes of a content show the very same frames",
        classes=tuple(" ".join(names[event] for event in order) for order in scenes.ORDERS),
        clip_length=clip_length,
        content=partial(scenes.frame_order, clip_length=clip_length, delay=delay, domain=domain),
        entropy_bytes=scenes.noise_bytes(clip_length),
    )


def _random_dots(*, clip_length: int = 16, coherence: float = 0.5) -> Task:
    _in_range(clip_length=(clip_length, 2, 1024), coherence=(coherence, 0, 1))
    return Task(
        name="random_dots",
        meaning="which way a share of short-lived dots moves: local motion, which no frame and no path shows",
        classes=_WAYS,
        clip_length=clip_length,
        content=partial(scenes.random_dots, clip_length=clip_length, coherence=coherence),
        entropy_bytes=scenes.dot_bytes(clip_length),
    )


def _long_memory(*, clip_length: int = 32) -> Task:
    _in_range(clip_length=(clip_length, 8, 4096))
    return Task(
        name="long_memory",
        meaning="which of four flashes comes first, at the very beginning; distractors follow to the end",
        classes=scenes.COLOUR_NAMES,
        clip_length=clip_length,
        content=partial(scenes.long_memory, clip_length=clip_length),
        entropy_bytes=scenes.memory_bytes(clip_length, 3 * scenes.SIZE**2),
    )


def _token_memory(*, clip_length: int = 32) -> Task:
    _in_range(clip_length=(clip_length, 8, 4096))
    return Task(
        name="token_memory",
        meaning="long_memory for models on features: eight to a frame, no pictures",
        classes=tuple(f"cue {i + 1}" for i in range(scenes.CUES)),
        clip_length=clip_length,
        content=partial(scenes.token_memory, clip_length=clip_length),
        entropy_bytes=scenes.memory_bytes(clip_length, scenes.TOKEN),
        frame=(scenes.TOKEN,),
    )


def _subtle_motion(*, clip_length: int = 16, amplitude: float = 1.0, pattern: Pattern = "texture") -> Task:
    # From half a frame's width a frame on, a disc that goes round the edges has no direction.
    most = scenes.REACH - 3 if pattern == "texture" else min(64, (scenes.SIZE // 2 - 1) * (clip_length - 1))
    _in_range(clip_length=(clip_length, 2, 1024), amplitude=(amplitude, 0, most))
    content, entropy_bytes = {
        "texture": (scenes.subtle_motion, scenes.texture_bytes),
        "disc": (scenes.subtle_disc, scenes.noise_bytes),
    }[pattern]
    return Task(
        name="subtle_motion",
        meaning="which way a texture (or a disc) under noise moves, by so few pixels in all",
        classes=_WAYS,
        clip_length=clip_length,
        content=partial(content, clip_length=clip_length, amplitude=amplitude),
        entropy_bytes=entropy_bytes(clip_length),
    )


def _shape_direction(*, clip_length: int = 16) -> Task:
    _in_range(clip_length=(clip_length, 2, 1024))
    return Task(
        name="shape_direction",
        meaning="which of three shapes moves, and which way: appearance and motion are both needed",
        classes=tuple(f"{shape} {way}" for shape in scenes.SHAPES[:3] for way in _WAYS),
        clip_length=clip_length,
        content=partial(scenes.shape_direction, clip_length=clip_length),
        entropy_bytes=scenes.noise_bytes(clip_length),
    )


def _colour_binding(*, clip_length: int = 16) -> Task:
    _in_range(clip_length=(clip_length, 2, 1024))
    return Task(
        name="colour_binding",
        meaning="which of two discs moves which way: both colours and both motions are in every clip",
        classes=("red to the right, blue to the left", "red to the left, blue to the right"),
        clip_length=clip_length,
        content=partial(scenes.colour_binding, clip_length=clip_length),
        entropy_bytes=scenes.noise_bytes(clip_length),
    )


def _motion_order(*, clip_length: int = 16, delay: int = 0, margin: int = 0) -> Task:
    _in_range(
        clip_length=(clip_length, 2 * (scenes.MOVE_LENGTH + margin) + delay, 1024),
        delay=(delay, 0, 1000),
        margin=(margin, 0, 500),
    )
    return Task(
        name="motion_order",
        meaning="which of two movements comes first; both classes show the very same frames",
        classes=("right, then left", "left, then right"),
        clip_length=clip_length,
        content=partial(scenes.motion_order, clip_length=clip_length, delay=delay, margin=margin),
        entropy_bytes=scenes.noise_bytes(clip_length),
    )


def _in_range(**knobs: tuple[float, float, float]) -> None:
    for name, (value, least, most) in knobs.items():
        if not least <= value <= most:
            raise RequestError(f"{name}={value:g}: wanted {least:g} to {most:g}")


_BUILDERS: dict[str, Callable[..., Task]] = {
    "appearance": _appearance,
    "time_direction": _time_direction,
    "frame_order": _frame_order,
    "random_dots": _random_dots,
    "long_memory": _long_memory,
    "token_memory": _token_memory,
    "subtle_motion": _subtle_motion,
    "shape_direction": _shape_direction,
    "colour_binding": _colour_binding,
    "motion_order": _motion_order,
}

TASKS: dict[str, Task] = {name: builder() for name, builder in _BUILDERS.items()}
"""Every task as it is by default."""


def knobs(name: str) -> dict[str, int | float | str]:
    """What can be set of a task, and its defaults."""
    return {knob.name: knob.default for knob in inspect.signature(_BUILDERS[name], eval_str=True).parameters.values()}


def create(text: str) -> Task:
    """A task by its name, with knobs set where wanted: `frame_order`, `frame_order:delay=8:clip_length=32`.

    The task's name is this text with its knobs in order and those at their defaults left out, so that one task has
    one name.

    Raises:
        RequestError: No such task or knob, or a value that it cannot have.
    """
    name, *settings = text.split(":")
    if name not in _BUILDERS:
        raise unknown("task", name, _BUILDERS)
    known = inspect.signature(_BUILDERS[name], eval_str=True).parameters
    values: dict[str, Any] = {}
    for setting in settings:
        knob, equals, value = setting.partition("=")
        if not equals:
            raise RequestError(f"task {text!r}: {setting!r} is not knob=value")
        if knob not in known:
            raise unknown(f"knob of task {name}", knob, known)
        values[knob] = _value(f"task {text!r}: {knob}", known[knob].annotation, value)
    try:
        task = _BUILDERS[name](**values)
    except RequestError as error:
        raise RequestError(f"task {text!r}: {error}") from None
    changed = [
        f"{knob}={values[knob]}" for knob in known if values.get(knob, known[knob].default) != known[knob].default
    ]
    return replace(task, name=":".join([name, *changed]))


def _value(what: str, kind: Any, text: str) -> int | float | str:
    choices = get_args(kind)
    if choices:
        if text not in choices:
            raise RequestError(f"{what}={text}: wanted one of {', '.join(choices)}")
        return text
    try:
        number: int | float = kind(text)
    except ValueError:
        raise RequestError(f"{what}={text}: wanted {'a whole number' if kind is int else 'a number'}") from None
    return number
