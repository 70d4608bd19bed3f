"""Datasets of video files: which videos there are, and the class of each, in the forms in which they are published.

| format | what lies there |
|---|---|
| `folder` | class/video, or train/class/video beside val/ or test/ |
| `ucf101` | classInd.txt, trainlist01.txt and testlist01.txt to 03 |
| `hmdb51` | <class>_test_split1.txt to 3, with lines "name.avi 0", 1 (train) or 2 (test) |
| `kinetics` | CSV files with label, youtube_id, time_start, time_end and split |
| `list` | "path label" in lines: PySlowFast's train.csv, mmaction2's …_train_list_videos.txt |

Lists may lie in the folder of the videos, in one within it, or in one beside it.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from vidbench.sweep import RequestError, unknown

Split = Literal["train", "val", "test", "all"]
Format = Literal["folder", "ucf101", "hmdb51", "kinetics", "list"]

SPLIT_WORDS: dict[str, Split] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What folders, files and columns call the splits."""

SUFFIXES = tuple(
    f".{name}"
    for name in ("3gp", "avi", "flv", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "ogv", "ts", "webm", "wmv")
)
"""Of video files, in small letters."""

TEST_SHARE = 0.25
"""Of the groups of each class, where the data come without splits."""


class Video(NamedTuple):
    """A file and the number of its class."""

    path: str
    label: int


@dataclass(frozen=True, slots=True)
class VideoDataset:
    """The videos of one split."""

    path: Path
    format: Format
    split: Split
    splits: tuple[Split, ...]
    """Those that the data have, without `all`."""
    classes: tuple[str, ...]
    """Their names by label, the same in every split: in classInd.txt's order for UCF101, otherwise sorted; where lists
    name classes by numbers alone, those numbers."""
    videos: tuple[Video, ...]
    """Folders in sorted order, lists in their own."""
    missing: tuple[str, ...] = ()
    """Files that a list names and that are not there."""


def open_dataset(
    path: str | Path,
    *,
    split: Split,
    format: Format | None = None,
    fold: int = 1,
    videos: str | Path | None = None,
) -> VideoDataset:
    """The videos of one split of a dataset.

    Data without splits are divided here: of each class a quarter of the groups is for testing, chosen by a hash of
    the group's name. A group is what was cut from one recording, as far as the names tell it (UCF101, HMDB51,
    Kinetics); elsewhere every file is one of its own.

    Args:
        path: The folder, or one list; another split's list is then found by its name.
        split: `all` is the union of the splits that there are.
        format: By default recognised by what lies there.
        fold: Which of the three divisions of UCF101 or HMDB51.
        videos: Folder that the paths in lists start from; by default found around the lists.

    Raises:
        RequestError: There is no such dataset, split or fold, a list has a line that cannot be read, or none of the
            files that it names is there.
    """
    root = Path(path)
    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split))
    if format is not None and format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if not root.exists():
        raise RequestError(f"no such dataset: {root}; wanted a folder with videos or a list of them")
    if videos is not None and not Path(videos).is_dir():
        raise RequestError(f"videos={videos} is no folder; wanted the one that the paths in the lists start from")
    known = format or next((name for name, form in FORMATS.items() if form.found(root)), None)
    if known is None:
        raise RequestError(
            f"{root} is no dataset of a known form; wanted folders of videos by class, the split files of UCF101 or "
            "HMDB51, a CSV of Kinetics or lists of 'path label'"
        )
    if not FORMATS[known].found(root):
        raise RequestError(f"{root} has nothing of format {known!r}; wanted {FORMATS[known].wanted}")
    listing = FORMATS[known].read(root, fold)
    rows, splits = _of_split(root, listing, split)
    there, missing = _placed(rows, listing, Path(videos) if videos is not None else None)
    if not there:
        raise RequestError(f"{root} has no videos for split {split!r}")
    return VideoDataset(root, known, split, splits, listing.classes, there, missing)


Row = tuple[str, int]
"""A file's path and its label."""


@dataclass(frozen=True, slots=True)
class _Listing:
    """What a format's files say, before anybody looked whether the videos are there."""

    classes: tuple[str, ...]
    rows: Mapping[Split, Sequence[Row]]
    """By split; those that belong to none are under `all`."""
    listed_in: Path | None = None
    """Folder of the lists; None where the rows are files that were seen."""
    by_stem: bool = False
    """Names are without folder and suffix, to be found anywhere below."""


def _of_split(root: Path, listing: _Listing, split: Split) -> tuple[Sequence[Row], tuple[Split, ...]]:
    rows = listing.rows
    if set(rows) == {"all"}:
        if split == "all":
            return rows["all"], ("train", "test")
        rows = _divided(rows["all"])
    splits = tuple(name for name in get_args(Split) if name in rows and name != "all")
    if split == "all":
        return [row for part in rows.values() for row in part], splits
    if split not in rows:
        raise RequestError(f"{root} has no split {split!r}; it has {', '.join(splits)}")
    return rows[split], splits


# ---- data without splits ----


def _group(path: str) -> str:
    """The recording that a file was cut from, as far as its name tells."""
    stem = Path(path).stem
    if match := re.fullmatch(r"(v_.+_g\d+)_c\d+", stem):
        return match[1]
    if match := re.fullmatch(r"(.+)_\d{6}_\d{6}", stem):
        return match[1]
    if match := re.fullmatch(r"(.+)_[fhlu]_[cn]m_np\d_[a-z]{2}_[a-z]{3}_\d+", stem):
        return match[1]
    return stem


def _divided(rows: Sequence[Row]) -> dict[Split, Sequence[Row]]:
    """Rows for training and for testing: every class with two groups or more is in both, and no group is."""
    groups: dict[int, set[str]] = {}
    for path, label in rows:
        groups.setdefault(label, set()).add(_group(path))
    tested: set[tuple[int, str]] = set()
    for label, names in groups.items():
        ranked = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        share = min(max(1, round(TEST_SHARE * len(ranked))), len(ranked) - 1)
        tested.update((label, name) for name in ranked[:share])
    divided: dict[Split, list[Row]] = {"train": [], "test": []}
    for path, label in rows:
        divided["test" if (label, _group(path)) in tested else "train"].append((path, label))
    return {name: part for name, part in divided.items() if part}


# ---- where the files are ----


def _listed(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder; nothing of one that cannot be listed."""
    _, folders, files = next(os.walk(folder), ("", [], []))
    return sorted(folders), files


def _placed(rows: Sequence[Row], listing: _Listing, videos: Path | None) -> tuple[tuple[Video, ...], tuple[str, ...]]:
    """The rows as files, and those that are not there."""
    folder = listing.listed_in
    if folder is None:
        return tuple(Video(name, label) for name, label in rows), ()
    around = [folder, folder.parent, *(at / name for at in (folder, folder.parent) for name in _listed(at)[0])]
    bases = list(dict.fromkeys(around)) if videos is None else [videos]
    find = _by_stem(bases) if listing.by_stem else _by_path(rows, bases)
    there: list[Video] = []
    missing: list[str] = []
    for name, label in rows:
        path = find(name)
        if path is None:
            missing.append(name)
        else:
            there.append(Video(path, label))
    if rows and not there:
        raise RequestError(
            f"{listing.listed_in}: none of the {len(rows)} videos listed is there, such as {rows[0][0]}; "
            f"looked in {videos or 'that folder and those around it'}; give videos=FOLDER"
        )
    return tuple(there), tuple(missing)


def _by_path(rows: Sequence[Row], bases: Sequence[Path]) -> Callable[[str], str | None]:
    """From a path in a list to the file below the one base where most files are, if it is there."""
    # A folder is listed once: to ask for every file takes long on network file systems.
    names = functools.cache(lambda folder: frozenset(_listed(folder)[1]))
    base = str(bases[0])

    def there(path: str) -> bool:
        folder, name = os.path.split(path)
        return name in names(folder)

    # The first few tell the base nearly always.
    for some in (rows[:20], rows):
        counts = [sum(there(os.path.join(base, name)) for name, _ in some) for base in bases]
        if max(counts) > 0:
            base = str(bases[counts.index(max(counts))])
            break

    def find(name: str) -> str | None:
        path = os.path.join(base, name)
        return path if there(path) else None

    return find


def _by_stem(bases: Sequence[Path]) -> Callable[[str], str | None]:
    """From a file's name without suffix to the file, in whichever folder below the first base that has such files."""
    files: dict[str, str] = {}
    for base in bases:
        for folder, folders, names in os.walk(base):
            folders.sort()
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES:
                    files.setdefault(stem, os.path.join(folder, name))
        if files:
            break
    return lambda name: files.get(name)


def _names(folder: Path) -> list[str]:
    """What is in a folder and not hidden, sorted."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise RequestError(f"{folder} cannot be listed: {error.strerror}") from None


def _subfolders(folder: Path) -> list[Path]:
    return [entry for name in _names(folder) if (entry := folder / name).is_dir()]


def _near(root: Path, pattern: str) -> list[Path]:
    """Files in a folder or in the folders within it, whose names match."""
    folders = [root, *_subfolders(root)] if root.is_dir() else []
    named = re.compile(rf"(?!\.){pattern}")
    return [at / name for at in folders for name in sorted(filter(named.fullmatch, _listed(at)[1]))]


def _lines(file: Path) -> list[tuple[int, str]]:
    """Numbered lines that are not empty."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RequestError(f"{file} cannot be read: {reason}") from None
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _wrong(file: Path, number: int, line: str, wanted: str) -> RequestError:
    return RequestError(f"{file}, line {number}: {line[:80]!r}; wanted {wanted}")


# ---- formats ----


def _split_folders(root: Path) -> dict[Split, Path]:
    return {SPLIT_WORDS[at.name.lower()]: at for at in _subfolders(root) if at.name.lower() in SPLIT_WORDS}


def _read_folders(root: Path, fold: int = 1) -> _Listing:
    parts: Mapping[Split, Path] = _split_folders(root) or {"all": root}
    found = {
        split: {
            at.name: [os.path.join(at, name) for name in _names(at) if name.lower().endswith(SUFFIXES)]
            for at in _subfolders(part)
        }
        for split, part in parts.items()
    }
    classes = tuple(sorted({name for part in found.values() for name, files in part.items() if files}))
    rows = {
        split: [(file, label) for label, name in enumerate(classes) for file in part.get(name, ())]
        for split, part in found.items()
    }
    return _Listing(classes, rows)


UCF101_INDEX = r"classInd\.txt"


def _read_ucf101(root: Path, fold: int) -> _Listing:
    index = _near(root, UCF101_INDEX)[0]
    names: dict[int, str] = {}
    for number, line in _lines(index):
        match = re.fullmatch(r"(\d+)\s+(\S+)", line)
        if match is None or int(match[1]) != len(names) + 1:
            raise _wrong(index, number, line, f"'{len(names) + 1} ClassName'")
        names[int(match[1])] = match[2]
    labels = {name: number - 1 for number, name in names.items()}
    rows: dict[Split, Sequence[Row]] = {}
    parts: tuple[Split, ...] = ("train", "test")
    for split in parts:
        file = index.parent / f"{split}list{fold:02d}.txt"
        if not file.is_file():
            raise _no_fold(index.parent, fold, rf"{split}list(\d+)\.txt")
        part: list[Row] = []
        for number, line in _lines(file):
            path, _, label = line.partition(" ")
            name = path.partition("/")[0]
            if name not in labels or (label.strip() and label.strip() != str(labels[name] + 1)):
                raise _wrong(file, number, line, f"'ClassName/video.avi' with a class of {index.name} and its number")
            part.append((path, labels[name]))
        rows[split] = part
    return _Listing(tuple(names.values()), rows, index.parent)


def _no_fold(folder: Path, fold: int, pattern: str) -> RequestError:
    there = sorted({int(match[1]) for name in _names(folder) if (match := re.fullmatch(pattern, name))})
    return RequestError(f"{folder} has no fold {fold}; it has {', '.join(map(str, there)) or 'none'}")


HMDB51_LIST = r".+_test_split\d+\.txt"


def _read_hmdb51(root: Path, fold: int) -> _Listing:
    parts = [(re.split(r"_test_split|\.txt", file.name), file) for file in _near(root, HMDB51_LIST)]
    lists = {(name, int(number)): file for (name, number, _), file in parts}
    folder = next(iter(lists.values())).parent
    classes = tuple(sorted({name for name, _ in lists}))
    use: dict[str, Split] = {"1": "train", "2": "test"}
    rows: dict[Split, list[Row]] = {"train": [], "test": []}
    for label, name in enumerate(classes):
        if (name, fold) not in lists:
            raise _no_fold(folder, fold, re.escape(name) + r"_test_split(\d+)\.txt")
        for number, line in _lines(lists[name, fold]):
            video, _, mark = line.rpartition(" ")
            if mark not in ("0", "1", "2") or not video:
                raise _wrong(lists[name, fold], number, line, "'video.avi' and 0 (unused), 1 (train) or 2 (test)")
            if mark in use:
                rows[use[mark]].append((f"{name}/{video.strip()}", label))
    return _Listing(classes, rows, folder)


def _head(file: Path) -> list[str]:
    """The first two lines of a text, none of anything else."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            return [stream.readline(4000).strip() for _ in range(2)]
    except (OSError, UnicodeDecodeError):
        return []


def _is_kinetics(file: Path) -> bool:
    return any("youtube_id" in line.split(",") for line in _head(file)[:1])


def _kinetics_files(root: Path) -> list[Path]:
    files = _near(root, r".+\.csv") if root.is_dir() else sorted(root.parent.glob("*.csv"))
    if root.is_file() and not _is_kinetics(root):
        return []
    files = [file for file in files if _is_kinetics(file)]
    return [file for file in files if file.parent == files[0].parent]


KINETICS_COLUMNS = "label,youtube_id,time_start,time_end,split"


def _read_kinetics(root: Path, fold: int) -> _Listing:
    files = _kinetics_files(root)
    found: list[tuple[Split, str, str]] = []
    for file in files:
        by_name = _split_of(file)
        table = csv.DictReader(line for _, line in _lines(file))
        # The published list of the test videos has no labels.
        for row in table if "label" in (table.fieldnames or ()) else ():
            split = SPLIT_WORDS.get((row.get("split") or "").strip().lower(), by_name)
            try:
                start, end = (round(float(row[key])) for key in ("time_start", "time_end"))
                stem = f"{row['youtube_id'].strip()}_{start:06d}_{end:06d}"
            except (KeyError, TypeError, ValueError, AttributeError):
                raise _wrong(file, table.line_num, ",".join(map(str, row.values())), KINETICS_COLUMNS) from None
            found.append((split or "all", (row["label"] or "").strip(), stem))
    if not found:
        raise RequestError(f"{files[0]} has no labels; wanted {KINETICS_COLUMNS}")
    classes = tuple(sorted({name for _, name, _ in found}))
    labels = {name: label for label, name in enumerate(classes)}
    rows: dict[Split, list[Row]] = {}
    for split, name, stem in dict.fromkeys(found):
        rows.setdefault(split, []).append((stem, labels[name]))
    return _Listing(classes, rows, files[0].parent, by_stem=True)


def _split_of(file: Path) -> Split | None:
    """The split that a list's name speaks of."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _is_list(file: Path) -> bool:
    return any(_path_and_label(line) for line in _head(file))


def _path_and_label(line: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"(.+?)\s*[\s,]\s*([^\s,]+)", line)
    return (match[1], match[2]) if match and Path(match[1]).suffix.lower() in SUFFIXES else None


def _lists(root: Path) -> dict[Split, Path]:
    """The lists by split; one without a split in its name is under `all`."""
    if root.is_dir():
        found = [file for file in _near(root, r".+\.(txt|csv)") if _is_list(file)]
    elif (own := _split_of(root)) is None:
        return {"all": root} if _is_list(root) else {}
    else:
        # Files that are named alike but for the split.
        alike = re.compile("|".join(sorted(SPLIT_WORDS, key=len, reverse=True)))
        plain, others = alike.sub("", root.name.lower()), [root.parent / name for name in _names(root.parent)]
        others = [at for at in others if alike.sub("", at.name.lower()) == plain and _split_of(at) not in (None, own)]
        found = [file for file in (root, *others) if _is_list(file)]
    lists: dict[Split, Path] = {}
    for file in found:
        split = _split_of(file) or "all"
        if split in lists:
            raise RequestError(f"{root} has two lists for split {split!r}: {lists[split]} and {file}; name one of them")
        lists[split] = file
    if len(lists) > 1:
        lists.pop("all", None)
    return lists


def _read_lists(root: Path, fold: int) -> _Listing:
    lists = _lists(root)
    named: dict[Split, list[tuple[str, str]]] = {}
    for split, file in lists.items():
        named[split] = []
        for number, line in _lines(file):
            pair = _path_and_label(line)
            if pair is None and number == 1 and "label" in line.lower():
                continue
            if pair is None:
                raise _wrong(file, number, line, "'path/of/video.mp4 label'")
            named[split].append(pair)
    words = {label for pairs in named.values() for _, label in pairs}
    if all(word.isdecimal() for word in words):
        classes = tuple(str(label) for label in range(max(map(int, words)) + 1))
        labels = {word: int(word) for word in words}
    else:
        classes = tuple(sorted(words))
        labels = {word: label for label, word in enumerate(classes)}
    rows = {split: [(path, labels[label]) for path, label in pairs] for split, pairs in named.items()}
    return _Listing(classes, rows, next(iter(lists.values())).parent)


class _Form(NamedTuple):
    wanted: str
    found: Callable[[Path], object]
    """True of a path where it lies."""
    read: Callable[[Path, int], _Listing]


FORMATS: dict[Format, _Form] = {
    "ucf101": _Form("classInd.txt", lambda root: _near(root, UCF101_INDEX), _read_ucf101),
    "hmdb51": _Form("<class>_test_split1.txt", lambda root: _near(root, HMDB51_LIST), _read_hmdb51),
    "kinetics": _Form(f"a CSV with {KINETICS_COLUMNS}", _kinetics_files, _read_kinetics),
    "list": _Form("a .txt or .csv file with lines 'path label'", _lists, _read_lists),
    "folder": _Form(
        "folders of videos, named after their classes",
        lambda root: root.is_dir() and _read_folders(root).classes,
        _read_folders,
    ),
}
"""In the order in which they are looked for."""
