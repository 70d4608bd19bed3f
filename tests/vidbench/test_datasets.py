"""Datasets of video files: which videos belong to which split and class, and which frames to a clip."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from vidbench.data.datasets import TEST_SHARE, Video, VideoDataset, open_dataset
from vidbench.data.loading import ClipReader, Sampling, VideoBatches
from vidbench.sweep import RequestError


def touch(root: Path, *names: str) -> Path:
    """Files that an index is made of; none is opened."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def listed(dataset: VideoDataset) -> list[tuple[str, str]]:
    return [(Path(path).name, dataset.classes[label]) for path, label in dataset.videos]


# ---- folders ----


def test_folders_of_clips_are_classes_in_sorted_order(tmp_path: Path) -> None:
    touch(tmp_path, "run/b.mp4", "run/a.AVI", "jump/c.webm", "run/notes.txt", "run/.hidden.mp4", "empty/readme")
    dataset = open_dataset(tmp_path, split="all")
    assert (dataset.format, dataset.classes, dataset.splits) == ("folder", ("jump", "run"), ("train", "test"))
    assert dataset.videos == tuple(
        Video(str(tmp_path / name), label) for name, label in (("jump/c.webm", 0), ("run/a.AVI", 1), ("run/b.mp4", 1))
    )


def test_split_folders_share_the_classes_of_all(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/c/2.mp4", "validation/b/3.mp4", "validation/c/4.mp4")
    dataset = open_dataset(tmp_path, split="val")
    assert (dataset.classes, dataset.splits) == (("a", "b", "c"), ("train", "val"))
    assert listed(dataset) == [("3.mp4", "b"), ("4.mp4", "c")]
    assert len(open_dataset(tmp_path, split="all").videos) == 4
    with pytest.raises(RequestError, match=r"has no split 'test'; it has train, val$"):
        open_dataset(tmp_path, split="test")


def test_our_own_split_keeps_groups_together_and_every_class_on_both_sides(tmp_path: Path) -> None:
    for name in ("Archery", "Biking"):
        touch(tmp_path, *(f"{name}/v_{name}_g{g:02d}_c{c:02d}.avi" for g in range(1, 26) for c in range(1, 5)))
    touch(tmp_path, "pair/x.mp4", "pair/y.mp4", "alone/z.mp4")
    train, test = (open_dataset(tmp_path, split=split) for split in ("train", "test"))

    def groups(dataset: VideoDataset) -> set[tuple[str, str]]:
        return {(name.partition("_c")[0], label) for name, label in listed(dataset)}

    assert not groups(train) & groups(test)
    assert {*train.videos, *test.videos} == {*open_dataset(tmp_path, split="all").videos}
    assert len(test.videos) == 2 * 4 * round(25 * TEST_SHARE) + 1
    assert {label for _, label in listed(train)} == {"Archery", "Biking", "pair", "alone"}
    assert {label for _, label in listed(test)} == {"Archery", "Biking", "pair"}
    # A hash, and not the order of the file system or of Python's own hash: the same on every machine.
    assert sorted(name[10:13] for name, label in listed(test) if label == "Archery")[::4] == [
        "g05", "g07", "g11", "g15", "g16", "g22",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ("R6llTwEh07w_000010_000020.mp4", "R6llTwEh07w_000040_000050.mp4"),
        ("Film_wave_f_nm_np1_fr_goo_37.avi", "Film_wave_u_cm_np2_ba_med_2.avi"),
    ],
)
def test_clips_of_one_recording_are_one_group(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *(f"wave/{name}" for name in names), "wave/other.avi")
    for split in ("train", "test"):
        there = {name for name, _ in listed(open_dataset(tmp_path, split=split))}
        assert len(there & set(names)) in (0, 2)


# ---- UCF101 and HMDB51 ----


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    touch(
        tmp_path,
        *(f"UCF-101/{n}/v_{n}_g{g:02d}_c01.avi" for n in ("YoYo", "Archery") for g in (1, 2, 8, 9)),
    )
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 YoYo\r\n2 Archery\r\n")
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g08_c01.avi 1\r\nArchery/v_Archery_g09_c01.avi 2\r\n")
    (lists / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi\nArchery/v_Archery_g02_c01.avi\n\n")
    (lists / "trainlist02.txt").write_text("YoYo/v_YoYo_g02_c01.avi 1\nYoYo/v_YoYo_g77_c01.avi 1\n")
    (lists / "testlist02.txt").write_text("YoYo/v_YoYo_g09_c01.avi\n")
    return tmp_path


def test_ucf101_has_the_classes_in_the_order_of_their_numbers(ucf101: Path) -> None:
    train = open_dataset(ucf101, split="train")
    assert (train.format, train.classes, train.splits, train.missing) == (
        "ucf101", ("YoYo", "Archery"), ("train", "test"), (),
    )  # fmt: skip
    assert train.videos[1] == Video(str(ucf101 / "UCF-101" / "Archery" / "v_Archery_g09_c01.avi"), 1)
    assert listed(open_dataset(ucf101, split="test")) == [
        ("v_YoYo_g01_c01.avi", "YoYo"), ("v_Archery_g02_c01.avi", "Archery"),
    ]  # fmt: skip


def test_ucf101_may_be_named_by_its_lists_or_with_the_videos_elsewhere(ucf101: Path, tmp_path: Path) -> None:
    whole = open_dataset(ucf101, split="train").videos
    assert open_dataset(ucf101 / "ucfTrainTestlist", split="train").videos == whole
    away = tmp_path / "a" / "b" / "c"
    shutil.copytree(ucf101 / "ucfTrainTestlist", away)
    assert open_dataset(away, split="train", videos=ucf101 / "UCF-101").videos == whole
    with pytest.raises(RequestError, match=r"none of the 2 videos listed is there, such as YoYo/.*give videos=FOLDER"):
        open_dataset(away, split="train")


def test_what_a_list_names_and_is_not_there_is_kept_apart(ucf101: Path) -> None:
    train = open_dataset(ucf101, split="train", fold=2)
    assert (len(train.videos), train.missing) == (1, ("YoYo/v_YoYo_g77_c01.avi",))
    reader = ClipReader(Sampling(2), 8)
    with pytest.raises(RequestError, match=r"1 of 2 listed videos are not there, such as YoYo/v_YoYo_g77.*'skip'"):
        VideoBatches(train, reader, batch_size=1)
    assert VideoBatches(train, reader, batch_size=1, on_error="skip").problems == {train.missing[0]: "not there"}


def test_ucf101_says_what_is_wrong_with_its_lists(ucf101: Path) -> None:
    with pytest.raises(RequestError, match=r"has no fold 3; it has 1, 2"):
        open_dataset(ucf101, split="train", fold=3)
    (ucf101 / "ucfTrainTestlist" / "trainlist01.txt").write_text("YoYo/v_YoYo_g08_c01.avi 2\n")
    with pytest.raises(RequestError, match=r"trainlist01.txt, line 1: 'YoYo/v_YoYo_g08_c01.avi 2'; wanted 'ClassName/"):
        open_dataset(ucf101, split="train")
    (ucf101 / "ucfTrainTestlist" / "classInd.txt").write_text("0 YoYo\n")
    with pytest.raises(RequestError, match=r"classInd.txt, line 1: '0 YoYo'; wanted '1 ClassName'"):
        open_dataset(ucf101, split="train")


def test_hmdb51_marks_training_testing_and_unused(tmp_path: Path) -> None:
    touch(tmp_path, *(f"videos/{name}/{n}.avi" for name in ("wave", "brush_hair") for n in "abc"))
    for name in ("wave", "brush_hair"):
        (tmp_path / "splits").mkdir(exist_ok=True)
        (tmp_path / "splits" / f"{name}_test_split1.txt").write_text("a.avi 1 \nb.avi 0 \nc.avi 2 \n")
    train = open_dataset(tmp_path, split="train")
    assert (train.format, train.classes) == ("hmdb51", ("brush_hair", "wave"))
    assert listed(train) == [("a.avi", "brush_hair"), ("a.avi", "wave")]
    assert listed(open_dataset(tmp_path, split="test")) == [("c.avi", "brush_hair"), ("c.avi", "wave")]
    with pytest.raises(RequestError, match=r"has no fold 2; it has 1"):
        open_dataset(tmp_path, split="test", fold=2)
    (tmp_path / "splits" / "wave_test_split1.txt").write_text("a.avi 3\n")
    with pytest.raises(
        RequestError, match=r"wave_test_split1.txt, line 1: 'a.avi 3'; wanted 'video.avi' and 0 \(unused"
    ):
        open_dataset(tmp_path, split="test")


# ---- Kinetics ----


@pytest.mark.parametrize("layout", ["{split}/{label}/", "{label}/", ""])
def test_kinetics_is_found_with_and_without_class_folders(tmp_path: Path, layout: str) -> None:
    rows = [
        ("train", "riding a bike", "-x_y", 7, "mp4"),
        ("train", "abseiling", "0347ZoDXyP0", 95, "webm"),
        ("val", "abseiling", "AAAA", 0, "mp4"),
    ]
    for split in ("train", "val"):
        lines = [f"{label},{name},{at},{at + 10},{split}" for part, label, name, at, _ in rows if part == split]
        text = "label,youtube_id,time_start,time_end,split\n" + "\n".join([*lines, f"abseiling,gone,1,11,{split}"])
        (tmp_path / f"{split}.csv").write_text(text)
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\nBBBB,1,11,test\n")
    for split, label, name, at, suffix in rows:
        touch(tmp_path, f"{layout.format(split=split, label=label)}{name}_{at:06d}_{at + 10:06d}.{suffix}")
    train = open_dataset(tmp_path, split="train")
    assert (train.format, train.classes, train.splits) == ("kinetics", ("abseiling", "riding a bike"), ("train", "val"))
    assert listed(train) == [
        ("-x_y_000007_000017.mp4", "riding a bike"), ("0347ZoDXyP0_000095_000105.webm", "abseiling"),
    ]  # fmt: skip
    assert train.missing == ("gone_000001_000011",)
    val = open_dataset(tmp_path / "train.csv", split="val")
    assert (val.classes, listed(val)) == (train.classes, [("AAAA_000000_000010.mp4", "abseiling")])


def test_a_line_of_kinetics_that_cannot_be_read_is_shown(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text("label,youtube_id,time_start,time_end,split\nrun,abc,soon,11,train\n")
    with pytest.raises(RequestError, match=r"all.csv, line 2: 'run,abc,soon,11,train'; wanted label,youtube_id"):
        open_dataset(tmp_path, split="train")
    (tmp_path / "all.csv").write_text("youtube_id,time_start,time_end,split\nabc,1,11,test\n")
    with pytest.raises(RequestError, match=r"all.csv has no labels; wanted label,youtube_id"):
        open_dataset(tmp_path, split="test")


# ---- lists ----


def test_lists_by_split_have_the_classes_of_all(tmp_path: Path) -> None:
    touch(tmp_path, "videos/a b.mp4", "videos/c.mp4", "videos/d.mp4")
    (tmp_path / "train.csv").write_text("a b.mp4 0\nc.mp4,2\n")
    (tmp_path / "val.csv").write_text(f"{tmp_path}/videos/d.mp4 3\n")
    train = open_dataset(tmp_path, split="train")
    assert (train.format, train.classes, train.splits) == ("list", ("0", "1", "2", "3"), ("train", "val"))
    assert listed(train) == [("a b.mp4", "0"), ("c.mp4", "2")]
    assert listed(open_dataset(tmp_path, split="val")) == [("d.mp4", "3")]


def test_one_list_finds_the_others_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "k/v/1.mp4", "k/v/2.mp4")
    (tmp_path / "k" / "k400_train_list_videos.txt").write_text("v/1.mp4 run\n")
    (tmp_path / "k" / "k400_val_list_videos.txt").write_text("v/2.mp4 jump\n")
    (tmp_path / "k" / "k600_val_list_videos.txt").write_text("v/2.mp4 other\n")
    train, val = (
        open_dataset(tmp_path / "k" / "k400_train_list_videos.txt", split=split) for split in ("train", "val")
    )
    assert train.classes == val.classes == ("jump", "run")
    assert (listed(train), listed(val)) == ([("1.mp4", "run")], [("2.mp4", "jump")])
    with pytest.raises(RequestError, match=r"two lists for split 'val': .*k400.* and .*k600.*; name one of them"):
        open_dataset(tmp_path / "k", split="val")


def test_a_list_without_a_split_is_divided(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n}.mp4" for n in range(8)))
    (tmp_path / "all.txt").write_text("path label\n" + "".join(f"{n}.mp4 {n % 2}\n" for n in range(8)))
    train, test = (open_dataset(tmp_path / "all.txt", split=split) for split in ("train", "test"))
    assert (len(train.videos), len(test.videos)) == (6, 2)
    assert {label for _, label in listed(test)} == {"0", "1"}


def test_a_line_without_a_video_is_shown(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4")
    (tmp_path / "train.txt").write_text("1.mp4 0\nframes/2 150 1\n")
    with pytest.raises(RequestError, match=r"train.txt, line 2: 'frames/2 150 1'; wanted 'path/of/video.mp4 label'"):
        open_dataset(tmp_path, split="train")


# ---- which format ----


def test_the_format_may_be_said(ucf101: Path) -> None:
    assert open_dataset(ucf101 / "UCF-101", split="all").format == "folder"
    touch(ucf101, "Archery/x.mp4")
    assert open_dataset(ucf101, split="all", format="folder").format == "folder"
    with pytest.raises(RequestError, match=r"has nothing of format 'kinetics'; wanted a CSV with label,youtube_id"):
        open_dataset(ucf101, split="all", format="kinetics")
    with pytest.raises(RequestError, match=r"unknown format 'ucf': did you mean 'ucf101'\?"):
        open_dataset(ucf101, split="all", format="ucf")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"unknown split 'tset': did you mean 'test'\?"):
        open_dataset(ucf101, split="tset")  # type: ignore[arg-type]


def test_what_is_no_dataset_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no such dataset: .*none; wanted a folder with videos or a list of them"):
        open_dataset(tmp_path / "none", split="train")
    touch(tmp_path, "a/readme.md", "film.mp4")
    for path in (tmp_path, tmp_path / "film.mp4"):
        with pytest.raises(RequestError, match=r"is no dataset of a known form; wanted folders of videos by class"):
            open_dataset(path, split="train")


# ---- frames ----


def test_dense_clips_begin_anywhere_and_go_round() -> None:
    sampling = Sampling(4, stride=3)
    assert sampling.testing(30, 3) == [0, 3, 6, 9, 10, 13, 16, 19, 20, 23, 26, 29]
    assert sampling.testing(31, 1) == [10, 13, 16, 19]
    assert sampling.training(30, [0.0] * 4)[0] == 0
    assert sampling.training(30, [0.999] * 4) == [20, 23, 26, 29]
    assert sampling.training(5, [0.999] * 4) == [0, 3, 1, 4]


def test_uniform_clips_span_the_video() -> None:
    assert Sampling(4, "uniform").testing(10, 1) == Sampling(4, "uniform").training(10, [0.5] * 4) == [0, 3, 6, 9]
    assert Sampling(1, "uniform").testing(10, 1) == [0]
    assert Sampling(5, "uniform").testing(2, 1) == [0, 0, 0, 0, 1]


def test_segments_give_one_frame_each() -> None:
    sampling = Sampling(3, "segment")
    assert sampling.training(30, [0.0, 0.5, 0.999]) == [0, 15, 29]
    assert sampling.testing(30, 1) == [5, 15, 25]
    assert sampling.testing(30, 2) == [2, 12, 22, 7, 17, 27]
    assert sampling.testing(2, 1) == sampling.training(2, [0.9] * 3) == [0, 0, 1]


@pytest.mark.parametrize("how", ["dense", "uniform", "segment"])
def test_every_frame_is_in_the_video(how: str) -> None:
    for clip_length, count, clips in itertools.product((1, 2, 7), (1, 2, 5, 50), (1, 3)):
        sampling = Sampling(clip_length, how)  # type: ignore[arg-type]
        frames = sampling.testing(count, clips)
        assert len(frames) == clips * clip_length
        frames += [f for draw in (0.0, 0.4, 1 - 2**-53) for f in sampling.training(count, [draw] * clip_length)]
        assert 0 <= min(frames) <= max(frames) < count


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="stride=2 is for dense sampling alone, and this is segment; leave it out"):
        Sampling(4, "segment", stride=2)
    with pytest.raises(RequestError, match="unknown sampling 'sparse'"):
        Sampling(4, "sparse")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="clip_length=0 is not a positive integer"):
        Sampling(0)
    with pytest.raises(RequestError, match="test_clips=2: uniform clips of one video are all the same; wanted 1"):
        ClipReader(Sampling(4, "uniform"), 8, test_clips=2)
    with pytest.raises(RequestError, match="test_crops=5; wanted 1, 3 or 10"):
        ClipReader(Sampling(4), 8, test_crops=5)
    with pytest.raises(RequestError, match="short_side=7 is less than size=8; give at least that"):
        ClipReader(Sampling(4), 8, short_side=7)
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="file cannot hold decoded videos"):
        ClipReader(Sampling(4), 8, cache=tmp_path / "file")
