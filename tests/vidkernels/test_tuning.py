"""Tables of tuned launches: what is taken for which key, and what happens to files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vidkernels import tuning
from vidkernels.launch import Gpu
from vidkernels.tuning import Key

GPU = Gpu("Some GPU", 90, 100, 200_000)
SMALL, LARGE = {"BLOCK_M": 64, "num_warps": 4}, {"BLOCK_M": 128, "num_warps": 8}
KEY = Key("bf16", (64, 128), (3, 3, 3), 1 << 14)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, so that the tables of this machine play no part."""
    monkeypatch.setenv("VIDKERNELS_CACHE", str(tmp_path))
    tuning.table.cache_clear()
    yield tmp_path / "tables"
    tuning.table.cache_clear()


def test_key_names_no_batch() -> None:
    assert KEY.text == "bf16 64x128 k3,3,3 p14"
    assert Key("bf16", (64,), (), 1000).text == Key("bf16", (64,), (), 1024).text


def test_first_candidate_without_a_table() -> None:
    chosen = tuning.explain("op/kernel", KEY, [SMALL, LARGE], GPU)
    assert chosen.config == SMALL
    assert chosen.source == "analytic"


def test_exact_then_nearest(folder: Path) -> None:
    path = folder / tuning.table_name(GPU.name)
    near = Key("bf16", (64, 128), (3, 3, 3), 1 << 16)
    far = Key("bf16", (64, 512), (3, 3, 3), 1 << 20)
    tuning.extend(path, "launches", "op/kernel", {near.text: LARGE, far.text: SMALL})
    assert tuning.pick("op/kernel", KEY, [SMALL, LARGE], GPU) == LARGE
    assert tuning.explain("op/kernel", KEY, [SMALL, LARGE], GPU).source == f"nearest: {near.text}"
    assert tuning.explain("op/kernel", far, [SMALL, LARGE], GPU).source == "exact"


@pytest.mark.parametrize(
    "other", [Key("fp16", (64, 128), (3, 3, 3), 1 << 14), Key("bf16", (64, 128), (1, 3, 3), 1 << 14)]
)
def test_another_dtype_or_kernel_size_is_not_near(folder: Path, other: Key) -> None:
    tuning.extend(folder / tuning.table_name(GPU.name), "launches", "op/kernel", {other.text: LARGE})
    assert tuning.explain("op/kernel", KEY, [SMALL, LARGE], GPU).source == "analytic"


def test_a_configuration_that_cannot_run_is_passed_over(folder: Path) -> None:
    tuning.extend(folder / tuning.table_name(GPU.name), "launches", "op/kernel", {KEY.text: {"BLOCK_M": 4096}})
    assert tuning.pick("op/kernel", KEY, [SMALL, LARGE], GPU) == SMALL


def test_forced_and_watched() -> None:
    with tuning.watching() as seen, tuning.forced("op/kernel", KEY, LARGE):
        assert tuning.pick("op/kernel", KEY, [SMALL, LARGE], GPU) == LARGE
        assert tuning.pick("op/other", KEY, [SMALL, LARGE], GPU) == SMALL
    assert [(chosen.kernel, chosen.source) for chosen in seen] == [("op/kernel", "forced"), ("op/other", "analytic")]
    assert seen[0].candidates == (SMALL, LARGE)
    assert tuning.pick("op/kernel", KEY, [SMALL, LARGE], GPU) == SMALL


def test_no_candidates_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"op/kernel has no configuration for bf16 64x128 k3,3,3 p14 on Some GPU"):
        tuning.pick("op/kernel", KEY, [], GPU)


def test_extending_keeps_what_is_there(folder: Path) -> None:
    path = folder / "t.json"
    tuning.extend(path, "launches", "a", {"k1": SMALL})
    tuning.extend(path, "launches", "a", {"k2": LARGE})
    tuning.extend(path, "implementations", "op/forward", {"k": {"library": 1.0}})
    assert json.loads(path.read_text()) == {
        "launches": {"a": {"k1": SMALL, "k2": LARGE}},
        "implementations": {"op/forward": {"k": {"library": 1.0}}},
    }
    assert [p.name for p in folder.iterdir()] == ["t.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"launches": 3}'])
def test_a_broken_table_is_named(folder: Path, text: str) -> None:
    folder.mkdir()
    path = folder / tuning.table_name(GPU.name)
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path} is not a table of tuned launches .*: remove it, or tune anew"):
        tuning.pick("op/kernel", KEY, [SMALL], GPU)
