"""The face of everything that is timed, and what all workloads share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidbench.records import Cost, Error
from vidbench.sweep import Point
from vidkernels.op import DTYPES

TIMED_SEED, CHECK_SEED = 0, 1


class Unfit(Exception):
    """A point that cannot run here, with the reason; it becomes a skipped row."""


class CheckFailed(Exception):
    """Wrong numbers: a red check has no latency."""

    def __init__(self, reason: str, error: Error) -> None:
        super().__init__(reason)
        self.error = error


class Workload(ABC):
    """What is timed. Use: `cost()`, `check()`, `prepare()` → call it repeatedly → `check()` again."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self.device = torch.device(point.device)
        self.dtype = DTYPES[point.dtype]

    @abstractmethod
    def cost(self) -> Cost:
        """Multiply-adds, parameters and compulsory bytes of one call."""

    @abstractmethod
    def check(self) -> Error | None:
        """The errors on fresh inputs; None where nothing independent is at hand."""

    @abstractmethod
    def prepare(self) -> Callable[[], Any]:
        """Allocates the timed inputs and state, and returns the call."""


STREAMED_FRAMES = 4
"""Frames that a stream goes round with, so that its memory is that of a camera and not of a stored clip."""


def streamer(frames: list[Tensor], step: Callable[[Tensor, Any], tuple[Tensor, Any]]) -> Callable[[], Tensor]:
    """A call that takes the next frame and carries the state; after as many frames as given a new clip begins."""
    clip_length = len(frames)
    frames = [frame.clone() for frame in frames[:STREAMED_FRAMES]]  # copies: a view would keep the clip alive
    position, state = 0, None

    def call() -> Tensor:
        nonlocal position, state
        if position == clip_length:
            position, state = 0, None
        with torch.inference_mode():
            y, state = step(frames[position % len(frames)], state)
        position += 1
        return y

    return call


class Latest:
    """Keeps the last computed value: the implementations of one case come one after another."""

    def __init__(self) -> None:
        self.key: object = None
        self.value: Any = None

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        if key != self.key:
            self.key, self.value = None, None  # frees the old one first
            self.value = make()
            self.key = key
        return self.value


ORACLE = Latest()
"""float64 results of the case at hand."""
