"""Batches of video files: the frames and crops are those of the protocols, and the same however they were read."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vidbench.data import cache
from vidbench.data.cache import FrameCache
from vidbench.data.datasets import VideoDataset, open_dataset
from vidbench.data.loading import ClipReader, Sampling, VideoBatches, average_views
from vidbench.data.video import KINETICS_MEAN, KINETICS_STD, VideoWarning, decode
from vidbench.sweep import RequestError

av = pytest.importorskip("av")

CLIPS = Path(__file__).resolve().parents[2].parent / "shared" / "clips"


def write(path: Path, frames: int = 12, height: int = 24, width: int = 32, shade: int = 0) -> Path:
    """A video whose red tells the frame, green the row and blue the column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if path.suffix == ".mkv" else "mpeg4", rate=Fraction(25))
        stream.width, stream.height = width, height
        # FFV1 keeps every value of RGB.
        stream.pix_fmt = "bgr0" if path.suffix == ".mkv" else "yuv420p"
        for index in range(frames):
            picture = np.empty((height, width, 3), dtype=np.uint8)
            picture[..., 0] = shade + 10 * index
            picture[..., 1] = 8 * np.arange(height)[:, None]
            picture[..., 2] = 4 * np.arange(width)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(autouse=True)
def _quiet_means_sound() -> Iterator[None]:
    """A warning that no test asks for is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", VideoWarning)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven lossless videos of two classes."""
    root = tmp_path_factory.mktemp("made")
    for number in range(7):
        write(root / "ab"[number % 2] / f"{number}.mkv", frames=6 + number, shade=15 * number)
    return root


# ---- parts of the picture ----


def corners(view: Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what a clip shows, in rows and columns of the video."""
    frame = view[0].int()
    return int(frame[0, 0, 1]) // 8, int(frame[-1, 0, 1]) // 8, int(frame[0, 0, 2]) // 4, int(frame[0, -1, 2]) // 4


def test_views_lie_where_the_protocols_say(tmp_path: Path) -> None:
    wide, tall = write(tmp_path / "wide.mkv"), write(tmp_path / "tall.mkv", height=31, width=24)
    along = {1: [(2, 21, 6, 25)], 3: [(2, 21, 0, 19), (2, 21, 6, 25), (2, 21, 12, 31)]}
    five = [(0, 19, 0, 19), (0, 19, 12, 31), (4, 23, 0, 19), (4, 23, 12, 31), (2, 21, 6, 25)]
    along[10] = five + [(top, bottom, right, left) for top, bottom, left, right in five]
    for crops, wanted in along.items():
        reader = ClipReader(Sampling(2), 20, short_side=24, test_clips=2, test_crops=crops)
        views, _ = reader.test_views(str(wide))
        assert views.shape == (2 * crops, 2, 20, 20, 3) == (reader.views, 2, 20, 20, 3)
        assert [corners(view) for view in views] == 2 * wanted
        assert [int(view[0, 0, 0, 0]) for view in views] == crops * [0] + crops * [100]
    views, _ = ClipReader(Sampling(2), 20, short_side=24, test_crops=3).test_views(str(tall))
    assert [corners(view) for view in views] == [(0, 19, 2, 21), (5, 24, 2, 21), (11, 30, 2, 21)]


def test_training_clips_are_jittered_cropped_and_mirrored(tmp_path: Path) -> None:
    path = str(write(tmp_path / "wide.mkv"))
    reader = ClipReader(Sampling(2), 20, short_side=24)
    clip, notes = reader.training_clip(path, [0, 0, 0, 0.9, 0, 0])
    assert (clip.shape, clip.dtype, notes) == ((1, 2, 20, 20, 3), torch.uint8, [])
    assert corners(clip[0]) == (0, 19, 0, 19)
    assert corners(reader.training_clip(path, [0, 0.99, 0.99, 0.9, 0, 0])[0][0]) == (4, 23, 12, 31)
    assert corners(reader.training_clip(path, [0, 0, 0, 0.1, 0, 0])[0][0]) == (0, 19, 19, 0)
    still = ClipReader(Sampling(2), 20, short_side=24, flip=False)
    assert corners(still.training_clip(path, [0, 0, 0, 0.1, 0, 0])[0][0]) == (0, 19, 0, 19)
    # Shown with 30 pixels, 20 of them are 16 of the file's 24.
    top, bottom, left, right = corners(reader.training_clip(path, [1, 0, 0, 0.9, 0, 0])[0][0])
    assert (top, left) == (0, 0)
    assert bottom in (14, 15)
    assert right in (14, 15)


def test_small_pictures_are_enlarged_and_large_ones_shrunk(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.mkv", height=37, width=51)
    # 12 × 9 pixels, of which 8 columns from the third on; and 32 of the file's 51, from the tenth on.
    for size, columns in ((8, (torch.arange(8) + 2.5) * 51 / 12), (60, (torch.arange(60) + 0.5) * 32 / 60 + 9)):
        clip, _ = ClipReader(Sampling(3), size).test_views(str(path))
        assert clip.shape == (1, 3, size, size, 3)
        assert torch.allclose(clip[0, 0, 0, :, 2] / 4, columns - 0.5, atol=0.6)


# ---- batches ----


def take(batches: Iterator[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    return list(itertools.islice(batches, count))


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True)
    )


@pytest.fixture(scope="module")
def videos(made: Path) -> VideoDataset:
    return open_dataset(made, split="all")


@pytest.mark.parametrize("how", ["dense", "segment"])
def test_training_batches_do_not_depend_on_the_number_of_workers(videos: VideoDataset, how: str) -> None:
    reader = ClipReader(Sampling(3, how), 16)  # type: ignore[arg-type]

    def batches(workers: int, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
        return take(VideoBatches(videos, reader, batch_size=3, seed=seed, num_workers=workers).training(), 8)

    alone = batches(0)
    assert all(clips.shape == (3, 3, 3, 16, 16) and clips.dtype == torch.float32 for clips, _ in alone)
    assert all(labels.dtype == torch.int64 for _, labels in alone)
    assert same(alone, batches(1))
    assert same(alone, batches(2))
    assert not same(alone, batches(0, seed=6))
    assert not same(alone[:3], alone[3:6])  # another epoch


def test_training_goes_on_at_any_batch(videos: VideoDataset) -> None:
    batches = VideoBatches(videos, ClipReader(Sampling(2), 8), batch_size=3, seed=1)
    assert len(batches) == 3
    whole = take(batches.training(), 9)
    for step in (1, 3, 5):
        epoch, batch = divmod(step, len(batches))
        assert same(whole[step:], take(batches.training(epoch=epoch, batch=batch), 9 - step))
    with pytest.raises(RequestError, match="epoch=0, batch=3: wanted an epoch from 0 and a batch from 0 to 2"):
        batches.training(batch=3)


def test_reading_leaves_the_random_state_alone(videos: VideoDataset) -> None:
    before = torch.random.get_rng_state()
    take(VideoBatches(videos, ClipReader(Sampling(2), 8), batch_size=3, num_workers=1).training(), 2)
    assert torch.equal(before, torch.random.get_rng_state())


def brightness(batches: list[tuple[Tensor, Tensor]]) -> set[int]:
    """Which of the made videos a batch shows: by the red of the first frame of a clip from its start."""
    reds = torch.cat([clips[:, 0, 0].mean(dim=(1, 2)) for clips, _ in batches]) * KINETICS_STD[0] + KINETICS_MEAN[0]
    return {round(float(red) * 255 / 15) for red in reds}


def test_an_epoch_shows_every_video_to_one_of_the_ranks(videos: VideoDataset) -> None:
    reader = ClipReader(Sampling(6, "uniform"), 8)
    parts = [VideoBatches(videos, reader, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    alone = VideoBatches(videos, reader, batch_size=4)
    assert brightness(take(alone.training(epoch=3), 2)) == set(range(7))
    shared = [take(part.training(epoch=3), 2) for part in parts]
    assert set.union(*map(brightness, shared)) == set(range(7))
    for number, (clips, labels) in enumerate(take(alone.training(epoch=3), 2)):
        assert torch.equal(clips, torch.cat([shared[0][number][0], shared[1][number][0]]))
        assert torch.equal(labels, torch.cat([shared[0][number][1], shared[1][number][1]]))
    tested = [brightness(list(part.testing())) for part in parts]
    assert set.union(*tested) == set(range(7))
    assert not tested[0] & tested[1]


def test_testing_takes_every_video_once_in_order(videos: VideoDataset) -> None:
    batches = VideoBatches(videos, ClipReader(Sampling(2), 8, test_clips=2, test_crops=3), batch_size=3)
    tested = list(batches.testing())
    assert [clips.shape for clips, _ in tested] == [(18, 3, 2, 8, 8), (18, 3, 2, 8, 8), (6, 3, 2, 8, 8)]
    assert torch.cat([labels for _, labels in tested]).tolist() == [0, 0, 0, 0, 1, 1, 1]
    again = VideoBatches(videos, batches.reader, batch_size=3, num_workers=2, seed=9)
    assert same(tested, list(again.testing()))


def test_views_are_averaged_as_by_hand(videos: VideoDataset) -> None:
    reader = ClipReader(Sampling(2), 8, test_clips=2, test_crops=3)
    clips, labels = next(VideoBatches(videos, reader, batch_size=4).testing())
    weight = torch.randn(clips[0].numel(), 5, generator=torch.Generator().manual_seed(0)) / 20
    averaged = average_views(clips.flatten(1) @ weight, len(labels))
    assert averaged.shape == (4, 5)
    for number, (path, _) in enumerate(videos.videos[:4]):
        total = np.zeros(5)
        for view in reader.test_views(path)[0]:
            levels = view.numpy().astype(np.float64) / 255
            normalised = ((levels - KINETICS_MEAN) / KINETICS_STD).transpose(3, 0, 1, 2).ravel()
            scores = np.exp(normalised @ weight.double().numpy())
            total += scores / scores.sum()
        assert np.abs(averaged[number].numpy() - total / 6).max() < 1e-4


def test_arguments_out_of_range_are_refused(videos: VideoDataset) -> None:
    reader = ClipReader(Sampling(2), 8)
    with pytest.raises(RequestError, match="batch_size=0 is not a positive integer"):
        VideoBatches(videos, reader, batch_size=0)
    with pytest.raises(RequestError, match="rank=2 of 2; wanted"):
        VideoBatches(videos, reader, batch_size=1, rank=2, world_size=2)
    with pytest.raises(RequestError, match="unknown on_error 'ignore'"):
        VideoBatches(videos, reader, batch_size=1, on_error="ignore")  # type: ignore[arg-type]


# ---- files that cannot be read ----


@pytest.fixture
def holed(made: Path, tmp_path: Path) -> VideoDataset:
    """The made videos, two of them broken: 2 (class a) and 3 (class b)."""
    root = tmp_path / "holed"
    shutil.copytree(made, root)
    (root / "a" / "2.mkv").write_bytes(b"")
    (root / "b" / "3.mkv").write_bytes(os.urandom(2000))
    return open_dataset(root, split="all")


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_skipped_and_said_once(holed: VideoDataset, workers: int) -> None:
    batches = VideoBatches(
        holed, ClipReader(Sampling(6, "uniform"), 8), batch_size=2, num_workers=workers, on_error="skip"
    )
    with pytest.warns(VideoWarning) as caught:
        tested = list(batches.testing())
    assert [str(warning.message) for warning in caught] == [batches.report()]
    lines = str(batches.report()).splitlines()
    assert lines[0] == f"2 of 7 videos of {holed.path} were skipped:"
    assert lines[1] == f"  {holed.path}/a/2.mkv is empty (0 bytes)"
    assert lines[2].startswith(f"  {holed.path}/b/3.mkv is not a video that FFmpeg can open")
    assert brightness(tested) == {0, 1, 4, 5, 6}
    assert torch.cat([labels for _, labels in tested]).tolist() == [0, 0, 0, 1, 1]
    list(batches.testing())  # nothing new: nothing said

    # In training the next of the epoch takes the place.
    trained = take(batches.training(), 2 * len(batches))
    assert all(len(labels) == 2 for _, labels in trained)
    assert brightness(trained) == {0, 1, 4, 5, 6}
    fresh = VideoBatches(holed, batches.reader, batch_size=2, on_error="skip")
    iterator = fresh.training()
    assert same(trained, [next(iterator) for _ in trained])
    with pytest.warns(VideoWarning, match="2 of 7 videos"):
        iterator.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_end_it_where_that_is_asked(holed: VideoDataset, workers: int) -> None:
    batches = VideoBatches(holed, ClipReader(Sampling(2), 8), batch_size=2, num_workers=workers)
    for iterator in (batches.testing(), batches.training()):
        with pytest.raises(RequestError) as caught:
            take(iterator, 8)
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("; repair or remove it, or skip it: on_error='skip', --on-error skip")


def test_a_dataset_of_broken_files_alone_is_said(tmp_path: Path) -> None:
    for name in ("1.mp4", "2.mp4"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).touch()
    batches = VideoBatches(
        open_dataset(tmp_path, split="all"), ClipReader(Sampling(2), 8), batch_size=2, on_error="skip"
    )
    for iterator in (batches.testing(), batches.training()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VideoWarning)
            with pytest.raises(
                RequestError, match=r"no video of .* can be read; the first: .*1.mp4 is empty \(0 bytes\)"
            ):
                list(iterator)


# ---- the cache ----


def choose(count: int) -> list[int]:
    return [count - 1, 0, 2, 2]


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.frames"))


def no_decoding(*_: object, **__: object) -> None:
    raise AssertionError("decoded again")


def test_a_cache_gives_the_same_frames_without_decoding(
    videos: VideoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ClipReader(Sampling(3), 12, short_side=16)
    cached = ClipReader(Sampling(3), 12, short_side=16, cache=tmp_path)
    wanted = take(VideoBatches(videos, plain, batch_size=3).training(), 4)
    assert same(wanted, take(VideoBatches(videos, cached, batch_size=3, num_workers=2).training(), 4))
    assert len(entries(tmp_path)) == 7
    monkeypatch.setattr(cache, "decode", no_decoding)
    again = ClipReader(Sampling(3), 12, short_side=16, cache=tmp_path)
    assert same(wanted, take(VideoBatches(videos, again, batch_size=3).training(), 4))


def test_another_file_or_setting_is_another_entry(made: Path, tmp_path: Path) -> None:
    path = shutil.copy(made / "a" / "0.mkv", tmp_path / "0.mkv")
    kept = FrameCache(tmp_path / "cache", short_side=16)
    before, _ = kept.read(path, choose)
    write(path, frames=5, shade=100)
    after, _ = kept.read(path, choose)
    assert int(after[0, 0, 0, 0]) == 140
    assert not torch.equal(before, after)
    FrameCache(tmp_path / "cache", short_side=12).read(path, choose)
    os.utime(path, (1, 1))
    kept.read(path, choose)
    assert len(entries(tmp_path / "cache")) == 4


@pytest.mark.parametrize(
    "damage", ["a bit of a frame", "a bit of the header", "cut", "longer", "empty", "foreign", "another's"]
)
def test_a_damaged_entry_is_made_again(made: Path, tmp_path: Path, damage: str) -> None:
    path = made / "a" / "0.mkv"
    kept = FrameCache(tmp_path, short_side=16)
    wanted, _ = kept.read(path, choose)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    altered = bytearray(whole)
    if damage == "a bit of a frame":
        altered[-5] ^= 1
    elif damage == "a bit of the header":
        altered[60] ^= 1
    elif damage == "cut":
        altered = altered[: len(altered) // 2]
    elif damage == "longer":
        altered += b"\0"
    elif damage == "empty":
        altered = bytearray()
    elif damage == "foreign":
        altered = bytearray(os.urandom(5000))
    else:
        kept.read(made / "a" / "2.mkv", choose)
        (other,) = set(entries(tmp_path)) - {entry}
        altered = bytearray(other.read_bytes())
    entry.write_bytes(altered)
    frames, notes = kept.read(path, choose)
    assert torch.equal(frames, wanted)
    assert notes == []
    assert entry.read_bytes() == whole


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_kill_while_an_entry_is_written_leaves_no_entry(made: Path, tmp_path: Path) -> None:
    path = made / "a" / "0.mkv"
    kept = FrameCache(tmp_path, short_side=16)

    def read_and_die() -> None:
        cache.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined]
        kept.read(path, choose)

    child = multiprocessing.get_context("fork").Process(target=read_and_die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (torn,) = (tmp_path / "unfinished").iterdir()
    assert entries(tmp_path) == []
    assert torch.equal(kept.read(path, choose)[0], decode(path, choose, short_side=16)[0])
    assert len(entries(tmp_path)) == 1
    # Another process may be writing it still; after an hour none is.
    FrameCache(tmp_path, short_side=16)
    assert torn.exists()
    os.utime(torn, (time.time() - 4000, time.time() - 4000))
    FrameCache(tmp_path, short_side=16)
    assert not torn.exists()


def test_a_full_disk_is_said_and_reading_goes_on(
    videos: VideoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    batches = VideoBatches(videos, ClipReader(Sampling(2), 8, cache=tmp_path), batch_size=2)
    with pytest.warns(VideoWarning) as caught:
        assert len(list(batches.testing())) == 4
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path} cannot hold more decoded videos: No space left on device"
    ]
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_file_that_is_not_there_is_refused_as_without_a_cache(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such video file"):
        FrameCache(tmp_path, short_side=16).read(tmp_path / "none.mp4", choose)


# ---- real files ----


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """The real files as a dataset: a rotated, an odd-sized, an HEVC and a truncated one among them."""
    places = {
        "sport/v_BaseballPitch_g01_c01.avi": "v_BaseballPitch_g01_c01.avi",
        "sport/arm_wrestling.mp4": "arm_wrestling.mp4",
        "space/rotated.mp4": "nasa_13013_rotated.mp4",
        "pattern/odd.mp4": "testsrc2_odd_height_and_width_mpeg2.mp4",
        "pattern/hevc.mp4": "h265_video.mp4",
    }
    for place, name in places.items():
        if not (CLIPS / name).is_file():
            pytest.skip(f"no {name}: {CLIPS} is not present")
        (tmp_path / "real" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CLIPS / name, tmp_path / "real" / place)
    content = (CLIPS / "v_ApplyEyeMakeup_g01_c01.avi").read_bytes()
    (tmp_path / "real" / "sport" / "truncated.avi").write_bytes(content[: len(content) // 3])
    return tmp_path / "real"


@pytest.mark.parametrize("kept", [False, True])
def test_real_files_become_batches(real: Path, tmp_path: Path, kept: bool) -> None:
    dataset = open_dataset(real, split="all")
    assert dataset.classes == ("pattern", "space", "sport")
    reader = ClipReader(
        Sampling(8, stride=2), 56, test_clips=2, test_crops=3, cache=tmp_path / "cache" if kept else None
    )
    batches = VideoBatches(dataset, reader, batch_size=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VideoWarning)
        trained = take(batches.training(), 2)
        tested = list(batches.testing())
    (warning,) = [str(each.message) for each in caught if issubclass(each.category, VideoWarning)]
    assert re.search(r"truncated.avi is incomplete: it declares 164 frames and \d+ decode", warning)
    assert batches.problems == {}
    assert [clips.shape for clips, _ in trained] == 2 * [(4, 3, 8, 56, 56)]
    assert [clips.shape for clips, _ in tested] == [(24, 3, 8, 56, 56), (12, 3, 8, 56, 56)]
    assert torch.cat([labels for _, labels in tested]).tolist() == [0, 0, 1, 2, 2, 2]
    for clips, _ in [*trained, *tested]:
        assert torch.isfinite(clips).all()
        assert clips.flatten(1).std(dim=1).min() > 0.05  # pictures, not one colour


def test_the_rotated_file_is_upright_in_a_clip(real: Path) -> None:
    path = str(real / "space" / "rotated.mp4")
    whole = decode(path, lambda count: [0])[0].float()
    clip, _ = ClipReader(Sampling(1, "uniform"), 54, short_side=54).test_views(path)
    middle = whole[:, 105:375].permute(0, 3, 1, 2)
    shrunk = torch.nn.functional.interpolate(middle, (54, 54), mode="bilinear", antialias=True)
    assert (clip[0].permute(0, 3, 1, 2).float() - shrunk).abs().mean() < 4


def test_training_on_real_files_does_not_depend_on_the_number_of_workers(real: Path) -> None:
    dataset = open_dataset(real, split="train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)  # where the truncated one ends is not the subject
        one, two = (
            take(VideoBatches(dataset, ClipReader(Sampling(4), 32), batch_size=2, num_workers=workers).training(), 3)
            for workers in (0, 2)
        )
    assert same(one, two)
