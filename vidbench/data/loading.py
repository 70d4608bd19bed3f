"""From the videos of a dataset to batches: which frames, which part of the picture, in which order.

Everything random in training is a function of (seed, epoch, position in the epoch): neither the number of workers nor
where a training was resumed changes a pixel.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vidbench.data.cache import FrameCache
from vidbench.data.datasets import VideoDataset
from vidbench.data.video import VideoWarning, at_least_one, clip_starts, decode, resize, resize_normalise
from vidbench.sweep import RequestError, unknown

How = Literal["dense", "uniform", "segment"]
OnError = Literal["fail", "skip"]

LARGEST_SCALE = 1.25
"""Training pictures are shown with their shorter side between `short_side` and so many times that: 256 to 320 pixels
for crops of 224. Source: Feichtenhofer et al. (2019), arXiv:1812.03982, §4."""

SHOWN = 20
"""Skipped files that a report names; all are in `VideoBatches.problems`."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of a video make a clip. A clip longer than its video goes on from the first frame."""

    clip_length: int
    how: How = "dense"
    """dense: frames `stride` apart, from a random start in training, from evenly spread ones in a test;
    uniform: from the first frame to the last at even distances, in training as well;
    segment: one from each of `clip_length` equal parts of the video, a random one in training, in a test the middle
    one, or where there are several clips those at even distances. Source: Wang et al. (2016), arXiv:1608.00859."""
    stride: int = 1
    """Distance of neighbouring frames of dense clips, in frames of the video."""

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise unknown("sampling", self.how, get_args(How))
        at_least_one(clip_length=self.clip_length, stride=self.stride)
        if self.stride != 1 and self.how != "dense":
            raise RequestError(
                f"stride={self.stride} is for dense sampling alone, and this is {self.how}; leave it out"
            )

    def training(self, count: int, draws: Sequence[float]) -> list[int]:
        """Frames of one clip of a video of `count` frames; `draws` are `clip_length` random numbers in [0, 1)."""
        if self.how == "uniform":
            return self.testing(count, 1)
        if self.how == "segment":
            return [first + int(draw * frames) for (first, frames), draw in zip(self._parts(count), draws, strict=True)]
        start = int(draws[0] * (max(count - self._span, 0) + 1))
        return self._dense(count, start)

    def testing(self, count: int, clips: int) -> list[int]:
        """Frames of `clips` clips of a video of `count` frames, one clip after the other."""
        if self.how == "uniform":
            steps = max(self.clip_length - 1, 1)
            return clips * [(count - 1) * step // steps for step in range(self.clip_length)]
        if self.how == "segment":
            return [
                first + (2 * clip + 1) * frames // (2 * clips)
                for clip in range(clips)
                for first, frames in self._parts(count)
            ]
        return [frame for start in clip_starts(count, clips, self._span) for frame in self._dense(count, start)]

    @property
    def _span(self) -> int:
        return (self.clip_length - 1) * self.stride + 1

    def _dense(self, count: int, start: int) -> list[int]:
        return [(start + self.stride * step) % count for step in range(self.clip_length)]

    def _parts(self, count: int) -> list[tuple[int, int]]:
        """First frame and number of frames of each part; parts of a short video share frames."""
        bounds = [count * part // self.clip_length for part in range(self.clip_length + 1)]
        return [(first, max(after - first, 1)) for first, after in itertools.pairwise(bounds)]


class ClipReader:
    """Makes square clips of video files, for training or for a test by several views."""

    def __init__(
        self,
        sampling: Sampling,
        size: int,
        *,
        short_side: int | None = None,
        flip: bool = True,
        test_clips: int = 1,
        test_crops: int = 1,
        cache: str | Path | None = None,
    ) -> None:
        """Opens no video.

        Args:
            sampling: Which frames.
            size: Height and width of a clip, pixels.
            short_side: The picture is shown with its shorter side of so many pixels when it is cropped, in training
                up to a quarter more; by default 8/7 of `size`, as in 128 for 112 and 256 for 224.
            flip: Whether half of the training clips are mirrored; not where left and right tell classes apart.
            test_clips: Clips along the time of a video.
            test_crops: Crops of each: 1, the centre; 3, along the long side; 10, the corners and the centre, each
                mirrored as well.
            cache: Folder that keeps the decoded videos, see `FrameCache`; by default nothing is kept.

        Raises:
            RequestError: An argument is out of range, or the folder cannot be made.
        """
        at_least_one(size=size, test_clips=test_clips)
        self.sampling, self.size, self.flip = sampling, size, flip
        self.test_clips, self.test_crops = test_clips, test_crops
        self.short_side = round(size * 8 / 7) if short_side is None else short_side
        if self.short_side < size:
            raise RequestError(f"short_side={short_side} is less than size={size}; give at least that")
        if test_crops not in (1, 3, 10):
            raise RequestError(f"test_crops={test_crops}; wanted 1, 3 or 10")
        if sampling.how == "uniform" and test_clips > 1:
            raise RequestError(f"test_clips={test_clips}: uniform clips of one video are all the same; wanted 1")
        self._cache = FrameCache(Path(cache), self.short_side) if cache is not None else None

    @property
    def views(self) -> int:
        """Clips that a test makes of a video."""
        return self.test_clips * self.test_crops

    def training_clip(self, path: str, draws: Sequence[float]) -> tuple[Tensor, list[str]]:
        """A random clip of a video.

        Args:
            path: A video file.
            draws: `clip_length` + 4 random numbers in [0, 1).

        Returns:
            RGB, (1, T, size, size, 3), uint8, and what is to be said of the file.

        Raises:
            RequestError: The file cannot be read.
        """
        scale, top, left, mirror, *times = draws
        frames, notes = self._frames(path, lambda count: self.sampling.training(count, times))
        side = self._side(frames, self.short_side * (1 + (LARGEST_SCALE - 1) * scale))
        height, width = frames.shape[1:3]
        clip = self._crop(frames, int(top * (height - side + 1)), int(left * (width - side + 1)), side)
        return (clip.flip(2) if self.flip and mirror < 0.5 else clip)[None], notes

    def test_views(self, path: str) -> tuple[Tensor, list[str]]:
        """The views of a video, the crops of the first clip first: RGB, (views, T, size, size, 3), uint8, and notes.

        Raises:
            RequestError: The file cannot be read.
        """
        frames, notes = self._frames(path, lambda count: self.sampling.testing(count, self.test_clips))
        side = self._side(frames, self.short_side)
        bottom, right = frames.shape[1] - side, frames.shape[2] - side
        centre = (bottom // 2, right // 2)
        if self.test_crops == 1:
            places = [centre]
        elif self.test_crops == 3 and bottom > right:
            places = [(0, centre[1]), centre, (bottom, centre[1])]
        elif self.test_crops == 3:
            places = [(centre[0], 0), centre, (centre[0], right)]
        else:
            places = [(0, 0), (0, right), (bottom, 0), (bottom, right), centre]
        crops = [self._crop(frames, top, left, side) for top, left in places]
        if self.test_crops == 10:
            crops += [crop.flip(2) for crop in crops]
        views = torch.stack(crops).unflatten(1, (self.test_clips, self.sampling.clip_length)).transpose(0, 1)
        return views.flatten(0, 1), notes

    def _frames(self, path: str, choose: Callable[[int], Sequence[int]]) -> tuple[Tensor, list[str]]:
        if self._cache is not None:
            return self._cache.read(path, choose)
        # One thread: there are workers, and a damaged file decodes alike whatever their number.
        frames, info = decode(path, choose, short_side=self.short_side, threads=1)
        return frames, [info.warning] if info.warning else []

    def _side(self, frames: Tensor, shown: float) -> int:
        """Side of the square that fills a clip where the picture's shorter side is shown with `shown` pixels."""
        short_side = min(frames.shape[1:3])
        return max(1, min(round(short_side * self.size / shown), short_side))

    def _crop(self, frames: Tensor, top: int, left: int, side: int) -> Tensor:
        return resize(frames[:, top : top + side, left : left + side], self.size, self.size)


def average_views(logits: Tensor, videos: int) -> Tensor:
    """Probabilities of the classes for each video: the mean over its views of each view's softmax.

    Args:
        logits: (N·V, num_classes), the V views of a video one after the other.
        videos: N.

    Returns:
        (N, num_classes), float32.
    """
    probabilities = logits.softmax(dim=1, dtype=torch.float32)
    return probabilities.view(videos, -1, logits.shape[1]).mean(dim=1)


class VideoBatches:
    """Batches of the videos of a dataset, read by worker processes.

    Files that cannot be read are skipped or end it, as `on_error` says. In training the next video of the epoch takes
    the place of a skipped one, so that every batch is full; in a test it is left out. What was skipped is said once, by
    a VideoWarning at the end of the iteration, and is in `problems`.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        reader: ClipReader,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        on_error: OnError = "fail",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Opens no file.

        Args:
            dataset: The videos.
            reader: What is made of each.
            batch_size: Videos in a batch of this process.
            seed: Of the order and of everything random in a clip, at least 0.
            num_workers: Processes that read; 0 reads in this one.
            on_error: What to do about files that are missing or cannot be read.
            rank: Of this process among `world_size` that share the videos of an epoch.
            world_size: Processes that train together.

        Raises:
            RequestError: An argument is out of range; or files are missing and `on_error` is `fail`.
        """
        at_least_one(batch_size=batch_size, world_size=world_size)
        if on_error not in get_args(OnError):
            raise unknown("on_error", on_error, get_args(OnError))
        if seed < 0 or num_workers < 0 or not 0 <= rank < world_size:
            raise RequestError(
                f"seed={seed}, num_workers={num_workers}, rank={rank} of {world_size}; wanted at least 0, "
                "and a rank below the number of processes"
            )
        if dataset.missing and on_error == "fail":
            raise RequestError(
                f"{dataset.path}: {len(dataset.missing)} of {len(dataset.missing) + len(dataset.videos)} listed videos "
                f"are not there, such as {dataset.missing[0]}; get them, or skip them: on_error='skip', --on-error skip"
            )
        self.dataset, self.reader, self.batch_size = dataset, reader, batch_size
        self.problems: dict[str, str] = dict.fromkeys(dataset.missing, "not there")
        """By file, why it was skipped."""
        self._seed, self._workers, self._on_error = seed, num_workers, on_error
        self._rank, self._world = rank, world_size
        self._noted: set[str] = set()
        self._reported = 0

    def __len__(self) -> int:
        """Batches in an epoch of training, the same for every rank."""
        return -(-len(self.dataset.videos) // (self.batch_size * self._world))

    def training(self, *, epoch: int = 0, batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for training, epoch after epoch without an end, each epoch in an order of its own.

        Every batch is full: the last one of an epoch is filled up with the epoch's first videos.

        Args:
            epoch: Where to begin or to go on.
            batch: Of that epoch, in 0 … len(self) − 1.

        Yields:
            Clips (N, 3, T, size, size), float32, normalised, and labels (N,), int64.

        Raises:
            RequestError: `batch` is out of range, a file cannot be read and `on_error` is `fail`, or none can be read.
        """
        if epoch < 0 or not 0 <= batch < len(self):
            raise RequestError(
                f"epoch={epoch}, batch={batch}: wanted an epoch from 0 and a batch from 0 to {len(self) - 1}"
            )
        return self._batches(_TrainingKeys(self, epoch, batch), training=True)

    def testing(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every video of this rank once, in the dataset's order.

        Yields:
            The views of N videos, (N · views, 3, T, size, size), float32, normalised, those of a video one after the
            other as `average_views` takes them, and labels (N,), int64. The last batch may be smaller.

        Raises:
            RequestError: As `training`.
        """
        keys = [(0, index) for index in range(self._rank, len(self.dataset.videos), self._world)]
        return self._batches(keys, training=False)

    def report(self) -> str | None:
        """What was skipped and why, a line per file; None where nothing was."""
        if not self.problems:
            return None
        count = len(self.dataset.videos) + len(self.dataset.missing)
        lines = [f"{len(self.problems)} of {count} videos of {self.dataset.path} were skipped:"]
        lines += [f"  {_said(*problem)}" for problem in itertools.islice(self.problems.items(), SHOWN)]
        if len(self.problems) > SHOWN:
            lines.append(f"  and {len(self.problems) - SHOWN} more")
        return "\n".join(lines)

    def _batches(self, keys: Iterable[tuple[int, int]], *, training: bool) -> Iterator[tuple[Tensor, Tensor]]:
        samples = _Samples(self.dataset, self.reader, self._seed, training, self._on_error)
        loader: Iterable[_Sample] = DataLoader(
            samples,
            batch_size=None,
            sampler=keys,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            # One batch ahead of the one that is waited for.
            prefetch_factor=1 + -(-self.batch_size // self._workers) if self._workers else None,
            # Otherwise torch's own generator gives a number away, and a dropout after it another mask.
            generator=torch.Generator(),
        )
        read: list[_Sample] = []
        asked = used = 0
        try:
            for sample in loader:
                asked += 1
                self._hear(sample)
                if sample.clips is not None:
                    read.append(sample)
                    used += 1
                elif training:
                    break
                if asked % self.batch_size == 0 and read:
                    yield self._batch(read)
                    read = []
            if read:
                yield self._batch(read)
            if used == 0 and asked:
                first = _said(*next(iter(self.problems.items())))
                raise RequestError(f"no video of {self.dataset.path} can be read; the first: {first}")
        finally:
            if len(self.problems) > self._reported:
                self._reported = len(self.problems)
                warnings.warn(self.report() or "", VideoWarning, stacklevel=2)

    def _hear(self, sample: _Sample) -> None:
        for note in sample.notes:
            if note not in self._noted:
                self._noted.add(note)
                warnings.warn(note, VideoWarning, stacklevel=3)
        for path, reason in sample.failures:
            if self._on_error == "fail":
                raise RequestError(
                    f"{_said(path, reason)}; repair or remove it, or skip it: on_error='skip', --on-error skip"
                )
            self.problems.setdefault(path, reason)

    def _batch(self, samples: Sequence[_Sample]) -> tuple[Tensor, Tensor]:
        clips = torch.cat([sample.clips for sample in samples if sample.clips is not None])
        labels = torch.tensor([sample.label for sample in samples])
        return resize_normalise(clips, height=self.reader.size, width=self.reader.size), labels


def _said(path: str, reason: str) -> str:
    return reason if path in reason else f"{path}: {reason}"


class _Sample(NamedTuple):
    """What a worker has to say of one video, or in training of those that it tried."""

    clips: Tensor | None
    label: int
    notes: list[str]
    failures: list[tuple[str, str]]


def _as_it_is(sample: Any) -> Any:
    return sample


class _TrainingKeys:
    """(epoch, position) of every sample of a rank, from a batch on."""

    def __init__(self, batches: VideoBatches, epoch: int, batch: int) -> None:
        self._size, self._rank, self._world = batches.batch_size, batches._rank, batches._world
        self._length, self._epoch, self._batch = len(batches), epoch, batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, batch = self._epoch, self._batch
        while True:
            for number in range(batch, self._length):
                first = (number * self._world + self._rank) * self._size
                for position in range(first, first + self._size):
                    yield epoch, position
            epoch, batch = epoch + 1, 0


class _Samples(Dataset[_Sample]):
    """The samples by key, as a worker makes them."""

    def __init__(self, dataset: VideoDataset, reader: ClipReader, seed: int, training: bool, on_error: OnError) -> None:
        self._videos, self._reader, self._seed = dataset.videos, reader, seed
        self._training, self._on_error = training, on_error
        self._unreadable: set[str] = set()
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, position = key
        if not self._training:
            return self._read([position], self._reader.test_views)
        if self._order is None or self._order[0] != epoch:
            order = np.argsort(_raw(self._seed, epoch, 0, "order", len(self._videos)), kind="stable")
            self._order = (epoch, order)
        order = self._order[1]
        raw = _raw(self._seed, epoch, position, "clip", self._reader.sampling.clip_length + 4)
        draws: list[float] = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
        candidates = (int(order[(position + step) % len(order)]) for step in range(len(order)))
        return self._read(candidates, lambda path: self._reader.training_clip(path, draws))

    def _read(self, candidates: Iterable[int], clips_of: Callable[[str], tuple[Tensor, list[str]]]) -> _Sample:
        """The first of the videos that can be read."""
        failures: list[tuple[str, str]] = []
        for index in candidates:
            path, label = self._videos[index]
            if path in self._unreadable:
                continue
            try:
                clips, notes = clips_of(path)
            except RequestError as error:
                self._unreadable.add(path)
                failures.append((path, str(error)))
                if self._on_error == "fail":
                    break
                continue
            return _Sample(clips, label, notes, failures)
        return _Sample(None, -1, [], failures)


def _raw(seed: int, epoch: int, position: int, purpose: Literal["order", "clip"], count: int) -> npt.NDArray[np.uint64]:
    """Random integers, a function of the arguments alone. NumPy promises that Philox's raw output never changes."""
    stream = ("order", "clip").index(purpose)
    return np.random.Philox(key=[seed, epoch], counter=[0, position, 0, stream]).random_raw(count)
