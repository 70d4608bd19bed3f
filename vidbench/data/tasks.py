"""Generated tasks: clips made on the fly that say exactly what must be learnt of them.

Example `index` of a (seed, split) is the same on every machine: its randomness is the raw output of a counter-based
generator, and its frames are whole numbers. Examples are never stored, so nothing can be memorised.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidbench.sweep import RequestError, unknown

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

Condition = Literal["normal", "shuffled", "reversed", "frozen"]
CONDITIONS: tuple[Condition, ...] = ("normal", "shuffled", "reversed", "frozen")
"""shuffled: the clip's frames in random order; reversed: backwards; frozen: one of them, at random, throughout."""

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task whose clips are made on the fly.

    Example `index` has content `index // num_classes` and label `index % num_classes`, so neighbouring examples differ
    in nothing but what tells the classes apart.
    """

    name: str
    meaning: str
    num_classes: int
    clip_length: int
    height: int
    width: int
    content: Callable[[Bytes], tuple[Bytes, Integers]]
    """From random bytes (C, `entropy_bytes`) to the frames of C contents (C, F, 3, H, W) and the order in which each
    class shows them (C, num_classes, T), indices into F."""
    entropy_bytes: int
    """Random bytes that one content takes."""

    @property
    def chance(self) -> float:
        """Top-1 accuracy of guessing."""
        return 1 / self.num_classes

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
            Clips (N, 3, T, H, W), float32, in [-2, 2], and labels (N,), int64.

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
        clips = clips.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
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
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Examples 0, `step`, 2 `step`, … in batches; without `examples`, their number, there is no end to them.

        With a step of 1 a content comes in all its classes, side by side; with `num_classes` + 1 the classes take
        turns as well, and every example has a content of its own.
        """
        start = 0
        while examples is None or start < examples:
            stop = start + batch_size if examples is None else min(start + batch_size, examples)
            yield self.make(range(start * step, stop * step, step), seed=seed, split=split, condition=condition)
            start = stop


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


CLIP_LENGTH, SIZE = 16, 32
EVENT_LENGTH = 4
EVENTS = np.array([[224, 64, 64], [64, 224, 64], [64, 64, 224]])
"""The three events: a disc flashes up in red, green or blue."""
ORDERS = np.array(list(itertools.permutations(range(3))))
"""By class, which event fills the first, second and third slot."""


def _frame_order(entropy: Bytes) -> tuple[Bytes, Integers]:
    """Three flashes on noise; a class is their order. Every class shows the same frames, noise included."""
    contents = len(entropy)
    head, noise = entropy[:, :16].astype(np.int64), entropy[:, 16:]
    frames: Bytes = np.right_shift(noise.reshape(contents, CLIP_LENGTH, 3, SIZE, SIZE), 2)
    frames += 96  # 96 … 159

    # The slots begin at a random onset and with random gaps, so the time of a frame does not tell its slot.
    slack = CLIP_LENGTH - 3 * EVENT_LENGTH
    waits = np.sort(head[:, :3] * (slack + 1) >> 8, axis=1)
    starts = waits + EVENT_LENGTH * np.arange(3)  # [C, 3]
    slots = starts[:, :, None] + np.arange(EVENT_LENGTH)  # [C, 3, L]: the frames of each slot

    # In the frames as made, event e is in slot e: a disc with a centre, a radius and a strength of its own.
    centre = 8 + (head[:, 3:9].reshape(contents, 3, 2) * (SIZE - 16) >> 8)
    radius = 7 + (head[:, 9:12] * 4 >> 8)
    strength = 192 + (head[:, 12:15] >> 2)  # of 256
    rows = (np.arange(SIZE) - centre[:, :, :1]) ** 2
    columns = (np.arange(SIZE) - centre[:, :, 1:]) ** 2
    disc = rows[:, :, :, None] + columns[:, :, None, :] <= (radius**2)[:, :, None, None]  # [C, 3, H, W]
    which = np.arange(contents)[:, None, None]
    shown = frames[which, slots].astype(np.int64)  # [C, 3, L, 3, H, W]
    amount = (disc * strength[:, :, None, None])[:, :, None, None]
    colour = EVENTS[None, :, None, :, None, None]
    frames[which, slots] = (shown + ((colour - shown) * amount >> 8)).astype(np.uint8)

    order: Integers = np.tile(np.arange(CLIP_LENGTH, dtype=np.int64), (contents, len(ORDERS), 1))
    classes = np.arange(len(ORDERS))[None, :, None]
    order[which, classes, slots.reshape(contents, 1, -1)] = slots[:, ORDERS].reshape(contents, len(ORDERS), -1)
    return frames, order


FRAME_ORDER = Task(
    name="frame_order",
    meaning="the order of three coloured flashes; all six classes of a content show the very same frames",
    num_classes=len(ORDERS),
    clip_length=CLIP_LENGTH,
    height=SIZE,
    width=SIZE,
    content=_frame_order,
    entropy_bytes=16 + CLIP_LENGTH * 3 * SIZE * SIZE,
)

TASKS: dict[str, Task] = {task.name: task for task in (FRAME_ORDER,)}
