"""Video files: what is read is what is in the file, upright and in order; what cannot be read is said in one line."""

from __future__ import annotations

import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vidbench.data import video
from vidbench.data.video import VideoWarning, clip_starts, decode, probe, read_clip, read_clips, resize_normalise
from vidbench.sweep import RequestError

av = pytest.importorskip("av")

CLIPS = Path(__file__).resolve().parents[2].parent / "shared" / "clips"


def picture(index: int, height: int, width: int) -> np.ndarray:
    """A smooth picture that tells its index (by its blue) and which way is up (red grows rightwards, green down)."""
    out = np.empty((height, width, 3), dtype=np.uint8)
    out[..., 0] = np.linspace(60, 200, width)
    out[..., 1] = np.linspace(40, 180, height)[:, None]
    out[..., 2] = 30 + 8 * index
    return out


def index_of(frames: torch.Tensor) -> list[int]:
    """Which picture each frame is, (…, H, W, 3) → a number for each."""
    return ((frames[..., 2].double().mean(dim=(-1, -2)) - 30) / 8).round().int().flatten().tolist()


def write(
    path: Path, frames: int = 20, height: int = 48, width: int = 64, codec: str = "mpeg4", keyframe_every: int = 100
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25), options={"g": str(keyframe_every), "qscale": "1"})
        # No chroma subsampling where the codec can: odd sizes are exact then.
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if codec in ("ffv1", "libx264") else "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, height, width), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("video") / "sound.avi")


@pytest.fixture
def real() -> Callable[[str], Path]:
    def path(name: str) -> Path:
        if not (CLIPS / name).is_file():
            pytest.skip(f"no {name}: {CLIPS} is not present")
        return CLIPS / name

    return path


@pytest.fixture(autouse=True)
def _quiet_means_sound() -> Iterator[None]:
    """A warning that no test asks for is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", VideoWarning)
        yield


# ---- what is read ----


def test_a_probe_tells_what_is_in_the_file(sound: Path) -> None:
    info = probe(sound)
    assert (info.name, info.codec, info.frames, info.fps) == ("sound", "mpeg4", 20, 25.0)
    assert (info.height, info.width, info.rotation, info.keyframes, info.warning) == (48, 64, 0, 1, None)


@pytest.mark.parametrize("keyframe_every", [1, 7, 100])
@pytest.mark.parametrize("start", [0, 5, 13])
def test_a_clip_is_exactly_its_frames_wherever_the_keyframes_are(
    tmp_path: Path, keyframe_every: int, start: int
) -> None:
    path = write(tmp_path / "a.mp4", keyframe_every=keyframe_every)
    clip = read_clip(path, clip_length=6, start=start)
    assert clip.shape == (6, 48, 64, 3)
    assert clip.dtype == torch.uint8
    assert index_of(clip) == list(range(start, start + 6))


def test_stride_takes_every_second_frame(sound: Path) -> None:
    assert index_of(read_clip(sound, clip_length=5, start=1, stride=2)) == [1, 3, 5, 7, 9]


def test_a_clip_past_the_end_goes_on_from_the_first_frame(sound: Path) -> None:
    assert index_of(read_clip(sound, clip_length=6, start=17)) == [17, 18, 19, 0, 1, 2]
    assert index_of(read_clip(sound, clip_length=45)) == [i % 20 for i in range(45)]


def test_clips_are_spread_from_the_start_to_the_end(sound: Path) -> None:
    clips = read_clips(sound, batch_size=3, clip_length=4)
    assert clips.shape == (3, 4, 48, 64, 3)
    assert index_of(clips) == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert index_of(read_clips(sound, batch_size=1, clip_length=4)) == [8, 9, 10, 11]


def test_clips_longer_than_the_video_all_go_round(sound: Path) -> None:
    clips = read_clips(sound, batch_size=2, clip_length=32)
    assert index_of(clips) == 2 * [i % 20 for i in range(32)]


def test_starts_stay_inside_the_video() -> None:
    assert clip_starts(100, 3, 16) == [0, 42, 84]
    assert clip_starts(16, 4, 16) == [0, 0, 0, 0]
    assert clip_starts(3, 2, 16) == [0, 0]


@pytest.mark.parametrize(("codec", "suffix"), [("ffv1", ".avi"), ("libx264", ".mp4"), ("mpeg4", ".avi")])
def test_odd_sizes_keep_every_row_and_column(tmp_path: Path, codec: str, suffix: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg has no {codec}")
    path = write(tmp_path / f"odd{suffix}", frames=3, height=37, width=51, codec=codec)
    clip = read_clip(path, clip_length=3)
    assert clip.shape == (3, 37, 51, 3)
    for index in range(3):
        error = (clip[index].double() - torch.from_numpy(picture(index, 37, 51)).double()).abs()
        assert error.mean() < 2.5
        assert error.max() < 16


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)])
def test_a_rotation_matrix_turns_the_picture(tmp_path: Path, matrix: tuple[int, int, int, int], turns: int) -> None:
    """The matrix of an MP4 track, (a, b, c, d), shows (x, y) at (a x + c y, b x + d y); turns are counter-clockwise."""
    path = write(tmp_path / "turned.mp4", frames=4)
    content = path.read_bytes()
    upright, turned = (
        struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        for a, b, c, d in ((1, 0, 0, 1), matrix)
    )
    at = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:at] + turned + content[at + len(turned) :])
    shown = np.rot90(picture(2, 48, 64), turns)
    info, clip = probe(path), read_clip(path, clip_length=4)
    assert info.rotation == 90 * turns % 360
    assert (info.height, info.width) == shown.shape[:2] == clip.shape[1:3]
    assert np.abs(clip[2].numpy().astype(int) - shown).mean() < 3


def test_a_video_without_a_frame_count_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "stream.ts", frames=11)
    assert probe(path).frames is None
    frames, info = decode(path, lambda count: range(count))
    assert index_of(frames) == list(range(11))
    assert info.frames == 11


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("closed.mp4", "libx264", {"g": "12"}),
        ("open.mp4", "libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3"}),
        ("single.mp4", "libx264", {"g": "1"}),
        ("two.mp4", "mpeg2video", {"g": "12", "bf": "2"}),
        ("four.avi", "mpeg4", {"g": "12", "bf": "2"}),
        ("five.mp4", "libx265", {"g": "12", "x265-params": "log-level=none"}),
        ("no_index.mkv", "libx264", {"g": "12"}),
    ],
)
def test_entering_at_keyframes_gives_the_same_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, codec: str, options: dict[str, str]
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg has no {codec}")
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(90):
            pixels = np.full((48, 64, 3), 30 + 2 * index, dtype=np.uint8)
            pixels[10:30, index % 40 : index % 40 + 20] = 255, 0, index
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    whole, _ = decode(tmp_path / name, range)
    decoded = 0
    reads = video._frames

    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal decoded
        for frame in reads(*arguments):
            decoded += 1
            yield frame

    monkeypatch.setattr(video, "_frames", counted)
    for wanted in ([80], [89, 88, 89], [75, 40, 41, 76], list(range(60, 68)), [3, 70], [11, 12, 13], [0, 45, 85]):
        decoded = 0
        frames, info = decode(tmp_path / name, lambda count, wanted=wanted: wanted, threads=1)
        assert torch.equal(frames, whole[wanted])
        assert info.frames == 90
        if wanted == [80] and name != "no_index.mkv" and hasattr(av.stream.Stream, "index_entries"):
            assert decoded <= 16


def test_large_pictures_are_shrunk_as_they_come(sound: Path) -> None:
    frames, info = decode(sound, lambda count: [4, 2], short_side=24)
    assert frames.shape == (2, 24, 32, 3)
    assert (info.height, info.width) == (48, 64)
    assert index_of(frames) == [4, 2]
    assert decode(sound, lambda count: [4], short_side=50)[0].shape == (1, 48, 64, 3)


# ---- real files ----


@pytest.mark.parametrize(
    ("name", "codec", "frames", "height", "width"),
    [
        ("v_ApplyEyeMakeup_g01_c01.avi", "mpeg4", 164, 240, 320),
        ("v_BaseballPitch_g01_c01.avi", "mpeg4", 107, 240, 320),
        ("arm_wrestling.mp4", "h264", 280, 256, 340),
        ("nasa_13013.mp4", "h264", 325, 180, 320),
        ("nasa_13013_rotated.mp4", "h264", 17, 480, 270),
        ("testsrc2_odd_height_and_width_mpeg2.mp4", "mpeg2video", 10, 81, 121),
        ("h265_video.mp4", "hevc", 10, 128, 128),
    ],
)
def test_real_files_hold_what_their_list_says(
    real: Callable[[str], Path], name: str, codec: str, frames: int, height: int, width: int
) -> None:
    info = probe(real(name))
    assert (info.codec, info.frames, info.height, info.width) == (codec, frames, height, width)
    every, after = decode(real(name), lambda count: range(count))
    assert every.shape == (frames, height, width, 3)
    assert after.warning is None
    clips = read_clips(real(name), batch_size=3, clip_length=8)
    assert torch.equal(clips[2], every[[(max(frames - 8, 0) + t) % frames for t in range(8)]])


@pytest.mark.parametrize(
    "name", ["nasa_13013_rotated.mp4", "v_ApplyEyeMakeup_g01_c01.avi", "h265_video.mp4", "nasa_13013.mp4"]
)
def test_real_files_agree_with_opencvs_reader(real: Callable[[str], Path], name: str) -> None:
    cv2 = pytest.importorskip("cv2")
    capture = cv2.VideoCapture(str(real(name)))
    clip = read_clip(real(name), clip_length=5)
    for ours in clip:
        ok, theirs = capture.read()
        assert ok
        assert np.abs(theirs[..., ::-1].astype(int) - ours.numpy()).mean() < 1


def test_rotation_in_the_metadata_is_honoured(real: Callable[[str], Path]) -> None:
    info = probe(real("nasa_13013_rotated.mp4"))
    assert (info.rotation, info.height, info.width) == (90, 480, 270)


def test_the_keyframes_of_action_clips_are_few(real: Callable[[str], Path]) -> None:
    assert probe(real("v_ApplyEyeMakeup_g01_c01.avi")).keyframes == 1
    assert probe(real("v_BaseballPitch_g01_c01.avi")).keyframes == 9


# ---- damaged files ----


def cut(source: Path, target: Path, share: float) -> Path:
    """The beginning of a file: of an AVI file its headers, and a share of its frames; of any other a share."""
    content = source.read_bytes()
    headers = max(content.find(b"movi") + 4, 0) if source.suffix == ".avi" else 0
    target.write_bytes(content[: headers + int((len(content) - headers) * share)])
    return target


def test_a_truncated_file_gives_what_decodes_and_says_so(sound: Path, tmp_path: Path) -> None:
    path = cut(sound, tmp_path / "short.avi", 0.6)
    info = probe(path)
    assert info.warning is not None
    assert "is incomplete: it declares 20 frames and holds" in info.warning
    frames, info = decode(path, lambda count: range(count))
    count = info.frames
    assert count is not None
    assert 3 <= count < 20
    assert index_of(frames)[: count - 1] == list(range(count - 1))  # the last one may be torn
    assert info.warning == f"{path} is incomplete: it declares 20 frames and {count} decode"
    with pytest.warns(VideoWarning, match="is incomplete: it declares 20 frames"):
        clip = read_clip(path, clip_length=count + 3)
    assert index_of(clip[-3:]) == [0, 1, 2]
    with pytest.warns(VideoWarning, match="is incomplete"):
        clips = read_clips(path, batch_size=2, clip_length=3)
    assert index_of(clips)[:3] == [0, 1, 2]
    assert index_of(clips)[3] == count - 3


def test_a_truncated_file_is_quiet_where_nothing_is_missing(sound: Path, tmp_path: Path) -> None:
    path = cut(sound, tmp_path / "short.avi", 0.6)
    assert index_of(read_clip(path, clip_length=3)) == [0, 1, 2]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.5, 0.8, 0.95])
def test_a_file_cut_anywhere_is_read_or_refused_in_one_line(
    real: Callable[[str], Path], tmp_path: Path, share: float
) -> None:
    for name in ("v_BaseballPitch_g01_c01.avi", "h265_video.mp4", "nasa_13013.mp4"):
        path = cut(real(name), tmp_path / name, share)
        try:
            frames, info = decode(path, lambda count: range(count))
        except RequestError as error:
            refusal = str(error)
        else:
            assert len(frames) == info.frames
            assert info.warning is not None
            continue
        assert str(path) in refusal
        assert "\n" not in refusal


def test_damage_in_the_middle_is_passed_over(real: Callable[[str], Path], tmp_path: Path) -> None:
    source = real("v_BaseballPitch_g01_c01.avi")
    content = bytearray(source.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 3000] = os.urandom(3000)
    path = tmp_path / "scratched.avi"
    path.write_bytes(content)
    frames, _ = decode(path, lambda count: range(min(count, 100)))
    assert frames.shape[1:] == (240, 320, 3)


# ---- what is refused ----


def refused(path: Path) -> str:
    texts = []
    for read in (probe, lambda p: read_clip(p, clip_length=2), lambda p: read_clips(p, batch_size=1, clip_length=2)):
        with pytest.raises(RequestError) as caught:
            read(path)
        texts.append(str(caught.value))
    assert len(set(texts)) == 1
    assert "\n" not in texts[0]
    return texts[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.mp4") == f"no such video file: {tmp_path / 'none.mp4'}"


def test_a_directory_is_no_video(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path} is a directory; wanted a video file"


def test_an_empty_file_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    assert refused(tmp_path / "empty.mp4") == f"{tmp_path / 'empty.mp4'} is empty (0 bytes)"


@pytest.mark.parametrize("name", ["notes.txt", "notes.mp4", "notes.avi", "notes"])
def test_text_is_no_video(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("what was said, and by whom\n" * 100)
    assert refused(tmp_path / name).startswith(f"{tmp_path / name} is not a video that FFmpeg can open")


def test_a_file_cut_before_its_index_is_refused(sound: Path, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mp4")
    assert "or it is cut short" in refused(cut(whole, tmp_path / "cut.mp4", 0.5))
    # The headers of an AVI file come first: it opens, and holds nothing.
    assert "no frame decodes" in refused(cut(sound, tmp_path / "head.avi", 0.01))


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert refused(path) == f"{path} has no video stream, only audio"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="every file can be read by root")
def test_a_forbidden_file_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.avi")
    path.chmod(0)
    assert refused(path) == f"{path} cannot be read: permission denied"


def test_a_start_outside_the_video_is_refused(sound: Path) -> None:
    with pytest.raises(RequestError, match=r"start=20 is outside .*sound\.avi, which has 20 frames"):
        read_clip(sound, clip_length=2, start=20)
    with pytest.raises(RequestError, match=r"start=-1 is outside"):
        read_clip(sound, clip_length=2, start=-1)


def test_sizes_below_one_are_refused(sound: Path) -> None:
    with pytest.raises(RequestError, match="clip_length=0 is not a positive integer"):
        read_clip(sound, clip_length=0)
    with pytest.raises(RequestError, match="batch_size=0 is not a positive integer"):
        read_clips(sound, batch_size=0, clip_length=2)
    with pytest.raises(RequestError, match="stride=0 is not a positive integer"):
        read_clip(sound, clip_length=2, stride=0)


def test_indices_outside_the_video_are_refused(sound: Path) -> None:
    with pytest.raises(RequestError, match="has 20 frames; wanted frames 3 to 20"):
        decode(sound, lambda count: [3, 20])
    with pytest.raises(RequestError, match="wanted at least one frame"):
        decode(sound, lambda count: [])


def test_without_pyav_the_extra_is_named(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RequestError, match=r'pip install "vidbench\[video\]"'):
        read_clip(sound, clip_length=1)


# ---- frames as models take them ----


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [((48, 64), (24, 24)), ((64, 48), (24, 24)), ((37, 51), (16, 16)), ((40, 40), (24, 32)), ((20, 30), (40, 40)),
     ((24, 24), (24, 24)), ((24, 40), (24, 24))],
)  # fmt: skip
def test_resize_crop_and_normalise_agree_with_float64(stored: tuple[int, int], wanted: tuple[int, int]) -> None:
    frames = torch.randint(256, (2, 3, *stored, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    out = resize_normalise(frames, height=wanted[0], width=wanted[1], mean=mean, std=std)
    assert out.shape == (2, 3, 3, *wanted)
    assert out.dtype == torch.float32
    assert out.is_contiguous()

    scale = max(wanted[0] / stored[0], wanted[1] / stored[1])
    size = (max(wanted[0], round(stored[0] * scale)), max(wanted[1], round(stored[1] * scale)))
    exact = frames.double().flatten(0, 1).permute(0, 3, 1, 2)
    if size != stored:
        exact = F.interpolate(exact, size, mode="bilinear", antialias=True)
    top, left = (size[0] - wanted[0]) // 2, (size[1] - wanted[1]) // 2
    exact = exact[..., top : top + wanted[0], left : left + wanted[1]].unflatten(0, (2, 3)).transpose(1, 2)
    per_channel = (1, 3, 1, 1, 1)
    levels = 255 * (
        out.double() * torch.tensor(std).double().view(per_channel) + torch.tensor(mean).double().view(per_channel)
    )
    error = (levels - exact).abs()
    if size == stored:
        assert error.max() < 1e-4
    else:
        assert error.max() <= 1.01  # rounded to whole levels, once in each direction
        assert error.mean() < 0.4


def test_the_crop_is_at_the_centre() -> None:
    frames = torch.zeros(1, 1, 8, 16, 3, dtype=torch.uint8)
    frames[:, :, :, 4:12] = 255
    out = resize_normalise(frames, height=8, width=8, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(out, torch.ones(1, 3, 1, 8, 8))


def test_frames_that_are_no_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frames are \(1, 2, 3, 8, 8\) torch.float32; wanted \(N, T, H, W, 3\)"):
        resize_normalise(torch.zeros(1, 2, 3, 8, 8), height=8, width=8)


def test_a_file_becomes_a_batch_for_a_model(sound: Path) -> None:
    batch = resize_normalise(read_clips(sound, batch_size=2, clip_length=4), height=32, width=32)
    assert batch.shape == (2, 3, 4, 32, 32)
    assert torch.isfinite(batch).all()
