"""Generated tasks: the same on every machine, and nothing but the order of the frames tells the classes apart."""

from __future__ import annotations

import hashlib

import pytest
import torch

from vidbench.data.tasks import CONDITIONS, EVENT_LENGTH, TASKS, Condition
from vidbench.sweep import RequestError

TASK = TASKS["frame_order"]


def frames_of(clips: torch.Tensor) -> list[list[bytes]]:
    """Every frame of every clip as bytes."""
    return [[frame.contiguous().numpy().tobytes() for frame in clip.transpose(0, 1)] for clip in clips]


def test_shapes_and_range() -> None:
    clips, labels = TASK.make(range(12), seed=0)
    assert clips.shape == (12, 3, TASK.clip_length, TASK.height, TASK.width) == (12, 3, 16, 32, 32)
    assert clips.dtype == torch.float32
    assert clips.is_contiguous()
    assert -2 <= clips.min() < clips.max() <= 2
    assert labels.tolist() == 2 * list(range(6))
    assert TASK.chance == pytest.approx(1 / 6)


def test_every_class_of_a_content_has_the_same_frames_in_another_order() -> None:
    clips, _ = TASK.make(range(20 * 6), seed=1)
    for content in clips.split(6):
        frames = frames_of(content)
        assert all(sorted(clip) == sorted(frames[0]) for clip in frames)
        assert len({tuple(clip) for clip in frames}) == 6
        assert len(set(frames[0])) == TASK.clip_length  # noise makes every frame one of a kind


def test_averages_over_time_do_not_tell_the_classes_apart() -> None:
    clips, _ = TASK.make(range(60), seed=2)
    pooled = clips.double().mean(dim=2).unflatten(0, (10, 6))
    assert torch.allclose(pooled, pooled[:, :1].expand_as(pooled), rtol=0, atol=1e-12)


def test_the_class_is_the_order_of_the_colours() -> None:
    """Red, green, blue; red, blue, green; …: read back from the pixels without the generator's help."""
    clips, labels = TASK.make(range(60), seed=3)
    permutations = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    levels = clips.mean(dim=(3, 4))  # [N, 3, T]
    strongest = (levels - levels.mean(dim=1, keepdim=True)).argsort(dim=2, descending=True)[..., :EVENT_LENGTH]
    for clip, label in zip(strongest, labels.tolist(), strict=True):
        times = clip.double().mean(dim=1)  # when each colour flashes
        assert tuple(times.argsort().tolist()) == permutations[label]


def test_the_onset_varies() -> None:
    clips, _ = TASK.make(range(0, 600, 6), seed=4)
    red = clips[:, 0].mean(dim=(2, 3)) - clips[:, 1:].mean(dim=(1, 3, 4))
    assert len(set(red.argmax(dim=1).tolist())) >= 4


def test_an_example_is_the_same_in_any_batch() -> None:
    clips, labels = TASK.make(range(30), seed=5)
    for picked in ([7], [29, 3, 3, 11], list(range(13, 19))):
        some, some_labels = TASK.make(picked, seed=5)
        assert torch.equal(some, clips[picked])
        assert torch.equal(some_labels, labels[picked])


def test_examples_are_the_same_on_every_machine() -> None:
    clips, _ = TASK.make([0, 1, 2, 6, 1_000_003], seed=7, split="test", condition="shuffled")
    levels = ((clips + 2) * 63.75).round().to(torch.uint8)
    assert hashlib.sha256(levels.numpy().tobytes()).hexdigest()[:16] == "516711c665e4cc7c"


def test_seed_split_and_index_make_other_examples() -> None:
    base = TASK.make([0], seed=0)[0]
    assert not torch.equal(base, TASK.make([0], seed=1)[0])
    assert not torch.equal(base, TASK.make([0], seed=0, split="test")[0])
    assert not torch.equal(base, TASK.make([6], seed=0)[0])


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = TASK.make(range(6), seed=0)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(TASK.make(range(6), seed=0)[0], first)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions_only_move_frames(condition: Condition) -> None:
    normal, labels = TASK.make(range(24), seed=6, split="test")
    altered, same_labels = TASK.make(range(24), seed=6, split="test", condition=condition)
    assert torch.equal(labels, same_labels)
    for before, after in zip(frames_of(normal), frames_of(altered), strict=True):
        if condition == "normal":
            assert after == before
        elif condition == "reversed":
            assert after == before[::-1]
        elif condition == "shuffled":
            assert sorted(after) == sorted(before)
            assert after != before
        else:
            assert len(set(after)) == 1
            assert after[0] in before


def test_frozen_frames_are_from_all_over_the_clip() -> None:
    normal, _ = TASK.make(range(120), seed=8, split="test")
    frozen, _ = TASK.make(range(120), seed=8, split="test", condition="frozen")
    at = [b.index(a[0]) for b, a in zip(frames_of(normal), frames_of(frozen), strict=True)]
    assert len(set(at)) > 12


def test_batches_follow_each_other() -> None:
    batches = list(TASK.batches(batch_size=8, seed=0, split="test", examples=20))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([clips for clips, _ in batches]), TASK.make(range(20), seed=0, split="test")[0])
    endless = TASK.batches(batch_size=6, seed=0)
    assert [len(next(endless)[1]) for _ in range(5)] == [6] * 5


def test_a_step_of_one_more_than_the_classes_gives_every_example_its_own_content() -> None:
    clips, labels = next(TASK.batches(batch_size=24, seed=0, step=TASK.num_classes + 1))
    assert labels.tolist() == 4 * list(range(6))
    assert len({frame for clip in frames_of(clips) for frame in clip}) == 24 * TASK.clip_length


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown split 'trian': did you mean 'train'"):
        TASK.make([0], seed=0, split="trian")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="unknown condition 'blurred'"):
        TASK.make([0], seed=0, condition="blurred")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"seed=-1 .*wanted at least 0"):
        TASK.make([0], seed=-1)
    with pytest.raises(RequestError, match=r"indices from -2: wanted at least 0"):
        TASK.make([4, -2], seed=0)
