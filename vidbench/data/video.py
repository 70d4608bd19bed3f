"""Video files as clips of RGB frames, decoded by FFmpeg through PyAV (the extra `video`).

Frames are numbered in the order in which they are shown. A file is decoded from its first frame on, as the usual action
clips have one keyframe each; it is entered at later keyframes only where that spares the decoder much (`SEEK_SAVES`).
"""

from __future__ import annotations

import contextlib
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vidbench.sweep import RequestError

KINETICS_MEAN = (0.43216, 0.394666, 0.37645)
KINETICS_STD = (0.22803, 0.22145, 0.216989)
"""Mean and standard deviation of red, green and blue in [0, 1], as torchvision's video models expect them."""


TEXT_CODECS = frozenset({"ansi", "bintext", "idf", "xbin"})
"""FFmpeg draws text files as pictures with these, whatever the text."""


SEEK_SAVES = 32
"""Frames that entering a file at its keyframes must spare the decoder, and half of all as well: to read the table of
packets and to open the file again takes about as long as to decode so many."""


class VideoWarning(UserWarning):
    """A file was read, but not as its container promised; the message says in which way."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a file holds, as it is shown: sizes are those after rotation."""

    path: str
    name: str
    """The file's name without its folder and suffix."""
    codec: str
    frames: int | None
    """As the container declares it; None where it does not. Once the end was reached: as they were decoded."""
    fps: float | None
    """Mean frames per second; None where the container does not say."""
    height: int
    width: int
    rotation: int
    """Degrees by which the stored picture is turned counter-clockwise to be shown: 0, 90, 180 or 270."""
    keyframes: int | None = None
    """Frames that decode without an earlier one; counted by `probe` alone."""
    warning: str | None = None
    """In which way the file falls short of what it declares; None for a sound one."""


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise RequestError('reading video files needs PyAV: pip install "vidbench[video]"') from None
    return av


@contextlib.contextmanager
def _opened(path: str | Path, threads: int) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; every way in which there is none is one clear line."""
    av = _av()
    file = Path(path)
    if file.is_dir():
        raise RequestError(f"{file} is a directory; wanted a video file")
    if not file.is_file():
        raise RequestError(f"no such video file: {file}")
    try:
        if file.stat().st_size == 0:
            raise RequestError(f"{file} is empty (0 bytes)")
        container = av.open(str(file))
    except PermissionError:
        raise RequestError(f"{file} cannot be read: permission denied") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        text = f"{file} is not a video that FFmpeg can open, or it is cut short: {_reason(error)}"
        raise RequestError(text) from None
    with container:
        # A cover picture in a sound file is a video stream to FFmpeg, and not to anyone else.
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
            raise RequestError(f"{file} has no video stream, only {kinds}")
        stream = streams[0]
        if stream.codec_context is None:
            raise RequestError(f"{file}: this build of FFmpeg has no decoder for its video stream")
        if stream.codec_context.name in TEXT_CODECS:
            raise RequestError(f"{file} is not a video that FFmpeg can open, or it is cut short: it is text")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        yield container, stream


def _reason(error: Exception) -> str:
    """What FFmpeg says, without the number and the function that said it."""
    return str(getattr(error, "strerror", None) or error)


def _frames(container: Any, stream: Any, damaged: list[str]) -> Iterator[Any]:
    """Every frame that decodes, in the order shown; what did not decode is noted in `damaged`, and passed over."""
    av = _av()
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.FFmpegError, OSError) as error:
            damaged.append(_reason(error))
            return
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError) as error:
            damaged.append(_reason(error))
            continue
        yield from frames


def _info(path: str | Path, stream: Any, frame: Any) -> VideoInfo:
    rotation = round(frame.rotation / 90) * 90 % 360
    height, width = (frame.width, frame.height) if rotation % 180 else (frame.height, frame.width)
    rate = stream.average_rate
    return VideoInfo(
        path=str(path),
        name=Path(path).stem,
        codec=stream.codec_context.name,
        frames=stream.frames or None,
        fps=float(rate) if rate else None,
        height=height,
        width=width,
        rotation=rotation,
    )


def _nothing_decodes(path: str | Path, damaged: Sequence[str]) -> RequestError:
    return RequestError(f"{path}: no frame decodes" + (f": {damaged[0]}" if damaged else "; the file is cut short"))


def probe(path: str | Path) -> VideoInfo:
    """What a video file holds, from its first frame and its table of packets; the other frames are not decoded.

    Raises:
        RequestError: There is no such file, it is no video, it has no video stream, or no frame decodes.
    """
    damaged: list[str] = []
    with _opened(path, threads=1) as (container, stream):
        first = next(_frames(container, stream, damaged), None)
        if first is None:
            raise _nothing_decodes(path, damaged)
        info = _info(path, stream, first)
    packets = keyframes = 0
    with _opened(path, threads=1) as (container, stream):
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0
                keyframes += packet.size > 0 and packet.is_keyframe
        except (_av().FFmpegError, OSError) as error:
            damaged.append(_reason(error))
    warning = None
    if info.frames is not None and packets < info.frames:
        warning = f"{path} is incomplete: it declares {info.frames} frames and holds {packets}"
    elif damaged:
        warning = f"{path} is damaged: {damaged[0]}"
    return replace(info, keyframes=keyframes, warning=warning)


def decode(
    path: str | Path, choose: Callable[[int], Sequence[int]], *, short_side: int | None = None, threads: int = 0
) -> tuple[Tensor, VideoInfo]:
    """The chosen frames of a video, in RGB, upright, in the order chosen.

    Args:
        choose: From the number of frames in the video to the indices wanted, each from 0 to below that number;
            repeats are allowed. It is asked again with the true number if the file holds fewer than it declares.
        short_side: Larger pictures are shrunk until their shorter side has so many pixels; smaller ones stay.
        threads: Threads of the decoder; 0 lets FFmpeg choose.

    Returns:
        Frames, (F, H, W, 3), uint8, and what is known of the file; its `warning` tells what was not as declared.

    Raises:
        RequestError: As `probe`; or an index is outside the video.
    """
    count: int | None = None
    enter = True
    while True:
        with _opened(path, threads) as (container, stream):
            declared = stream.frames or None
            if count is None:
                count = declared
            damaged: list[str] = []
            if count is None:
                count = sum(1 for _ in _frames(container, stream, damaged))
                if count == 0:
                    raise _nothing_decodes(path, damaged)
                continue
            canvas = _Canvas(path, stream, chosen(path, choose, count), short_side)
            if enter and count == declared and _seeking_pays(stream, canvas):
                enter = False
                if not _collect_by_seeking(container, stream, canvas):
                    continue
                seen = count
            else:
                seen = _collect(_frames(container, stream, damaged), canvas)
        if canvas.info is None:
            raise _nothing_decodes(path, damaged)
        warning = f"{path} is damaged: {len(damaged)} packets did not decode: {damaged[0]}" if damaged else None
        if not canvas.wanted:
            if declared is not None and count < declared:
                warning = f"{path} is incomplete: it declares {declared} frames and {count} decode"
            return torch.from_numpy(canvas.frames), replace(canvas.info, frames=count, warning=warning)
        count = seen


def chosen(path: str | Path, choose: Callable[[int], Sequence[int]], count: int) -> Sequence[int]:
    """What `choose` says for a video of `count` frames.

    Raises:
        RequestError: It chose nothing, or an index outside the video.
    """
    indices = choose(count)
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise RequestError(f"{path} has {count} frames; wanted {_span(indices)}")
    return indices


def _span(indices: Sequence[int]) -> str:
    return f"frames {min(indices)} to {max(indices)}" if indices else "at least one frame"


class _Canvas:
    """The frames that are wanted, put in their places as they come."""

    def __init__(self, path: str | Path, stream: Any, indices: Sequence[int], short_side: int | None) -> None:
        self.wanted: dict[int, list[int]] = {}
        """By the index of a frame that has not come yet, the places that it goes to."""
        for place, index in enumerate(indices):
            self.wanted.setdefault(index, []).append(place)
        self.info: VideoInfo | None = None
        """Known once a frame has come, wanted or not."""
        self.frames: npt.NDArray[np.uint8]
        self._path, self._stream, self._short_side, self._places = path, stream, short_side, len(indices)
        self._reformatter = _av().video.reformatter.VideoReformatter()

    def put(self, index: int, frame: Any) -> None:
        if self.info is None:
            self.info = _info(self._path, self._stream, frame)
            self._stored = (frame.width, frame.height)
        places = self.wanted.pop(index, None)
        if places is None:
            return
        # A stream may change its size on the way; a clip has the size that it began with.
        width, height = self._stored
        picture = self._reformatter.reformat(frame, width=width, height=height, format="rgb24").to_ndarray()
        if self._short_side is not None and min(width, height) > self._short_side:
            scale = self._short_side / min(width, height)
            size = (round(height * scale), round(width * scale))
            picture = resize(torch.from_numpy(picture)[None], *size)[0].numpy()
        if self.info.rotation:
            picture = np.rot90(picture, self.info.rotation // 90)
        if not hasattr(self, "frames"):
            self.frames = np.empty((self._places, *picture.shape), dtype=np.uint8)
        for place in places:
            self.frames[place] = picture


def _collect(frames: Iterator[Any], canvas: _Canvas) -> int:
    """Puts frames, from the first on, until none is wanted or the video ends; how many came."""
    last = max(canvas.wanted)
    seen = 0
    for seen, frame in enumerate(frames, start=1):
        canvas.put(seen - 1, frame)
        if seen > last:
            break
    return seen


def _runs(wanted: Sequence[int], keyframes: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches to decode, from a keyframe to a frame that is wanted, that hold all that are wanted; both ascend.

    >>> _runs([3, 25, 31, 90], [0, 12, 24, 36, 48, 60, 72, 84])
    [(0, 3), (24, 31), (84, 90)]
    """
    runs: list[tuple[int, int]] = []
    for index in wanted:
        keyframe = keyframes[bisect_right(keyframes, index) - 1]
        if runs and keyframe <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((keyframe, index))
    return runs


def _seeking_pays(stream: Any, canvas: _Canvas) -> bool:
    """Whether the container's index, where it has one, promises enough keyframes in the right places."""
    wanted = sorted(canvas.wanted)
    if wanted[-1] < SEEK_SAVES:
        return False
    # Older releases of PyAV do not show the index.
    entries = getattr(stream, "index_entries", None) or ()
    # The index is in the order of decoding, which is near enough to the order shown.
    keyframes = [number for number, entry in enumerate(entries) if entry.is_keyframe]
    if len(entries) != stream.frames or len(keyframes) < 2 or keyframes[0] != 0:
        return False
    through = wanted[-1] + 1
    decoded = sum(last - first + 1 for first, last in _runs(wanted, keyframes))
    return through - decoded >= max(SEEK_SAVES, through // 2)


def _collect_by_seeking(container: Any, stream: Any, canvas: _Canvas) -> bool:
    """Puts the frames that are wanted, entering the file at keyframes; False where that cannot be relied upon.

    A frame is known by its time stamp: whatever a seek lands on, no other frame is taken for it.
    """
    av = _av()
    damaged: list[str] = []
    try:
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        times = sorted({packet.pts for packet in packets if packet.pts is not None})
        if len(times) != len(packets) or len(times) != stream.frames:
            return False
        number = {time: index for index, time in enumerate(times)}
        # Of the two stamps the one of decoding is the earlier: no container takes it for a later keyframe.
        entries = {number[p.pts]: p.pts if p.dts is None else p.dts for p in packets if p.is_keyframe}
        keyframes = sorted(entries)
        if not keyframes or keyframes[0] != 0:
            return False
        for first, last in _runs(sorted(canvas.wanted), keyframes):
            container.seek(entries[first], stream=stream)
            for frame in _frames(container, stream, damaged):
                index = number.get(frame.pts)
                if index is None or damaged:
                    return False
                # Frames that come after a keyframe and are shown before it may lack what they refer to.
                if index >= first:
                    canvas.put(index, frame)
                if index >= last:
                    break
    except (av.FFmpegError, OSError):
        return False
    return not canvas.wanted and not damaged


def read_clip(path: str | Path, *, clip_length: int, start: int = 0, stride: int = 1, threads: int = 0) -> Tensor:
    """One clip of a video file. A clip that runs past the end of the video goes on from its first frame.

    Args:
        clip_length: Frames in the clip.
        start: Index of the clip's first frame.
        stride: Distance between the clip's frames, in frames of the video.
        threads: Threads of the decoder; 0 lets FFmpeg choose.

    Returns:
        Frames in RGB, (T, H, W, 3), uint8.

    Raises:
        RequestError: As `probe`; or `start` is outside the video, or a size is below 1.

    Warns:
        VideoWarning: The file holds fewer frames than it declares, or some did not decode.
    """
    at_least_one(clip_length=clip_length, stride=stride)

    def choose(count: int) -> list[int]:
        if not 0 <= start < count:
            raise RequestError(f"start={start} is outside {path}, which has {count} frames")
        return [(start + stride * step) % count for step in range(clip_length)]

    return _warned(*decode(path, choose, threads=threads))


def read_clips(path: str | Path, *, batch_size: int, clip_length: int, stride: int = 1, threads: int = 0) -> Tensor:
    """Clips spread evenly over a video file: the first at its start, the last at its end, a single one in the middle.

    Where the video is shorter than a clip, every clip begins at its start and goes round.

    Args:
        batch_size: Clips.
        clip_length: Frames in each.
        stride: Distance between a clip's frames, in frames of the video.
        threads: Threads of the decoder; 0 lets FFmpeg choose.

    Returns:
        Frames in RGB, (N, T, H, W, 3), uint8.

    Raises:
        RequestError: As `probe`; or a size is below 1.

    Warns:
        VideoWarning: The file holds fewer frames than it declares, or some did not decode.
    """
    at_least_one(batch_size=batch_size, clip_length=clip_length, stride=stride)

    def choose(count: int) -> list[int]:
        return [
            (start + stride * step) % count
            for start in clip_starts(count, batch_size, (clip_length - 1) * stride + 1)
            for step in range(clip_length)
        ]

    frames = _warned(*decode(path, choose, threads=threads))
    return frames.view(batch_size, clip_length, *frames.shape[1:])


def clip_starts(frames: int, batch_size: int, span: int) -> list[int]:
    """First frames of `batch_size` clips of `span` frames spread evenly over a video of `frames` frames.

    >>> clip_starts(100, 3, 16)
    [0, 42, 84]
    """
    room = max(frames - span, 0)
    if batch_size == 1:
        return [room // 2]
    return [room * clip // (batch_size - 1) for clip in range(batch_size)]


def at_least_one(**sizes: int) -> None:
    """Refuses, by name, a size that is not a positive integer."""
    """Refuses, by name, a size that is not a positive integer."""
    for name, size in sizes.items():
        if size < 1:
            raise RequestError(f"{name}={size} is not a positive integer")


def _warned(frames: Tensor, info: VideoInfo) -> Tensor:
    if info.warning:
        warnings.warn(info.warning, VideoWarning, stacklevel=3)
    return frames


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Frames (F, H, W, 3), uint8, as (F, height, width, 3): bilinear, antialiased where it shrinks, rounded."""
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    # Whole levels and channels last: torch resizes these some twenty times faster than floats.
    pictures = frames.permute(0, 3, 1, 2)
    pictures = F.interpolate(pictures, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return pictures.permute(0, 2, 3, 1)


def resize_normalise(
    frames: Tensor,
    *,
    height: int,
    width: int,
    mean: Sequence[float] = KINETICS_MEAN,
    std: Sequence[float] = KINETICS_STD,
) -> Tensor:
    """Frames as models take them: resized to cover height × width, cropped at the centre, normalised.

    The resize is bilinear, antialiased where it shrinks, and keeps the aspect: for a square target the shorter side
    becomes the target's. As in torchvision's own transforms the resized frame is rounded to whole levels of 255 first.

    Args:
        frames: RGB, (N, T, H, W, 3), uint8, on the CPU.
        height: Rows of the result, pixels.
        width: Columns of the result, pixels.
        mean: Of each channel, of values in [0, 1].
        std: Of each channel, of values in [0, 1].

    Returns:
        (N, 3, T, height, width), float32: (frames / 255 − mean) / std.

    Raises:
        ValueError: `frames` has another shape or dtype.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 5 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {tuple(frames.shape)} {frames.dtype}; wanted (N, T, H, W, 3) torch.uint8")
    clips, clip_length, stored_height, stored_width, _ = frames.shape
    scale = max(height / stored_height, width / stored_width)
    size = (max(height, round(stored_height * scale)), max(width, round(stored_width * scale)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    # (x / 255 − mean) / std as one multiply-add per value.
    deviation = torch.tensor(std, dtype=torch.float64).view(3, 1, 1, 1)
    gain = (1 / (255 * deviation)).to(torch.float32)
    offset = (-torch.tensor(mean, dtype=torch.float64).view(3, 1, 1, 1) / deviation).to(torch.float32)
    out = torch.empty((clips, 3, clip_length, height, width), dtype=torch.float32)
    # One clip at a time stays in the caches.
    for clip in range(clips):
        pictures = resize(frames[clip], *size)
        cropped = pictures[:, top : top + height, left : left + width].permute(3, 0, 1, 2)
        torch.addcmul(offset, cropped.to(torch.float32), gain, out=out[clip])
    return out
