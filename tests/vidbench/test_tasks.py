"""Generated tasks: the same on every machine, and nothing but the order of the frames tells the classes apart."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from vidbench.data.scenes import CUES, EVENT_LENGTH, MOVING_BYTES, TWINS, colour_binding, noise_bytes
from vidbench.data.tasks import CONDITIONS, TASKS, Condition, create, knobs
from vidbench.sweep import RequestError

TASK = TASKS["frame_order"]


def frames_of(clips: torch.Tensor) -> list[list[bytes]]:
    """Every frame of every clip as bytes."""
    return [[frame.contiguous().numpy().tobytes() for frame in clip.transpose(0, 1)] for clip in clips]


def test_shapes_and_range() -> None:
    clips, labels = TASK.make(range(12), seed=0)
    assert clips.shape == (12, 3, TASK.clip_length, TASK.size, TASK.size) == (12, 3, 16, 32, 32)
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


def contents_of(text: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Whole contents of a task, classes side by side, and their labels."""
    task = create(text)
    return task.make(range(count * task.num_classes), seed=seed)


@pytest.mark.parametrize(
    "text",
    [
        "time_direction",
        "frame_order:delay=2",
        "random_dots",
        "long_memory",
        "token_memory",
        "subtle_motion",
        "colour_binding",
        "motion_order:delay=2",
        "subtle_motion:pattern=disc",
    ],
)
def test_only_order_tells_the_classes_apart(text: str) -> None:
    task = create(text)
    clips, labels = contents_of(text, 5)
    assert labels.tolist() == 5 * list(range(task.num_classes))
    time = 2 if clips.dim() == 5 else 1
    for content in clips.split(task.num_classes):
        frames = [sorted(frame.numpy().tobytes() for frame in clip.unbind(time - 1)) for clip in content]
        assert all(clip == frames[0] for clip in frames)
        assert len({clip.numpy().tobytes() for clip in content}) == task.num_classes


@pytest.mark.parametrize(
    "text", ["time_direction", "random_dots", "subtle_motion", "shape_direction", "colour_binding"]
)
def test_every_second_class_is_the_one_before_it_backwards(text: str) -> None:
    clips, _ = contents_of(text, 4)
    assert torch.equal(clips[1::2], clips[::2].flip(2))


@pytest.mark.parametrize("text", ["appearance", "shape_direction"])
def test_shapes_differ_in_every_frame(text: str) -> None:
    clips, _ = contents_of(text, 3)
    stride = 1 if text == "appearance" else 2  # backwards is another class of the same shape
    for content in clips.split(create(text).num_classes):
        for one, other in zip(content[::stride], content[stride::stride], strict=False):
            assert (one != other).any(dim=(0, 2, 3)).all()


@pytest.mark.parametrize("domain", ["a", "b"])
@pytest.mark.parametrize("speed", [1, 2])
def test_what_moves_forwards_moves_to_the_right(domain: str, speed: int) -> None:
    """By the phase of the lowest frequency along W, which a shift by one pixel turns by 2π/32."""
    clips, labels = contents_of(f"time_direction:speed={speed}:domain={domain}", 20)
    columns = clips.double().mean(dim=(1, 3))
    phase = torch.fft.rfft(columns, dim=-1)[..., 1]  # [N, T]
    turned = torch.angle((phase[:, 1:] * phase[:, :-1].conj()).sum(dim=1)) * -32 / (2 * torch.pi)
    right = torch.where(labels == 0, turned, -turned)
    assert right.median() == pytest.approx(speed + 0.5, abs=0.3)
    assert (right > 0).double().mean() > 0.9


def _moved(weight: Tensor) -> Tensor:
    """By how much the mass of (N, T, H, W) moves to the right from frame to frame: by its phase along W, (N, T - 1)."""
    phase = torch.fft.rfft(weight.double().sum(dim=2), dim=-1)[..., 1]
    return torch.angle(phase[:, 1:] * phase[:, :-1].conj()) * -32 / (2 * torch.pi)


def test_red_and_blue_go_opposite_ways_and_grey_does_not_tell_them() -> None:
    clips, labels = contents_of("colour_binding", 60)
    red = (clips[:, 0] - clips[:, 2] - 0.8).clamp(min=0)
    blue = (clips[:, 2] - clips[:, 0] - 0.8).clamp(min=0)
    forwards = torch.where(labels == 0, 1.0, -1.0)
    for weight, way in ((red, 1), (blue, -1)):
        moved = _moved(weight).median(dim=1).values * forwards * way
        assert (moved > 0).double().mean() > 0.9
        assert moved.median() == pytest.approx(1.5, abs=0.4)
    luma = torch.tensor([0.299, 0.587, 0.114])  # of ITU-R BT.601, as OpenCV's grey
    assert abs(float((torch.from_numpy(TWINS).float() * luma).sum(dim=1).diff())) < 0.5


def test_which_disc_is_in_front_says_nothing_of_the_class() -> None:
    """A byte of its own decides it, the same for both classes."""
    drawn = np.random.default_rng(0).integers(0, 256, (20, noise_bytes(16)), np.uint8)
    fronts = []
    for byte in (0, 255):
        drawn[:, 2 * MOVING_BYTES] = byte
        frames, order = colour_binding(drawn, clip_length=16)
        assert np.array_equal(order[:, 1], order[:, 0, ::-1])
        fronts.append(frames.astype(np.int64))
    meet = (fronts[0] != fronts[1]).any(axis=2)  # [C, T, H, W]
    assert meet.any(axis=(1, 2, 3)).mean() > 0.3
    redder = [(one[:, :, 0] - one[:, :, 2])[meet] for one in fronts]
    assert (redder[0] > redder[1]).all()


FAR = "motion_order:clip_length=48:delay=10:margin=10"


@pytest.mark.parametrize("text", ["motion_order", FAR])
def test_the_class_is_the_order_of_the_movements(text: str) -> None:
    clips, labels = contents_of(text, 60)
    chroma = (clips.amax(dim=1) - clips.amin(dim=1) - 1.6).clamp(min=0)  # noise has little
    shown = chroma.sum(dim=(2, 3)) > 20  # [N, T]
    moved = _moved(chroma)
    both = shown[:, 1:] & shown[:, :-1]
    right = both & (moved > 0.5) & (moved < 4)
    left = both & (moved < -0.5) & (moved > -4)
    time = torch.arange(moved.shape[1])
    sooner = (right * time).sum(1) / right.sum(1) < (left * time).sum(1) / left.sum(1)
    assert (sooner == (labels == 0)).double().mean() > 0.9


def test_with_a_margin_no_place_in_a_window_tells_which_movement_it_is() -> None:
    clips, _ = contents_of(FAR, 60)
    chroma = (clips.amax(dim=1) - clips.amin(dim=1) - 1.6).clamp(min=0)
    onsets = []
    for shown in (chroma.sum(dim=(2, 3)) > 20).tolist():  # [T]
        moving = [time for time, is_shown in enumerate(shown) if is_shown]
        if len(moving) < 10:
            continue  # a disc was near a border
        first, second = moving[:5], moving[5:]
        assert len(second) == 5
        assert second[0] - first[-1] > 10
        onsets.append(first[0])
        # Eleven frames, which are ten flow fields, at every fifth frame: each movement is seen at the same places.
        starts = range(0, 48 - 10, 5)
        seen = [{tuple(t - at for t in move if at <= t < at + 11) for at in starts} for move in (first, second)]
        assert seen[0] == seen[1]
        assert any(len(place) == 5 for place in seen[0])
    assert len(onsets) > 60
    assert len(set(onsets)) >= 6  # and the time of a frame does not tell, either


def _best_shift(clips: Tensor) -> Tensor:
    """By how many pixels to the right frames resemble the next frames the most, by correlation, (N,)."""
    grey = clips[:, 0].double()
    grey -= grey.mean(dim=(2, 3), keepdim=True)
    width, shifts = grey.shape[3], range(-4, 5)
    agreement = [
        (grey[:, :-1, :, max(0, -s) : width - max(0, s)] * grey[:, 1:, :, max(0, s) : width - max(0, -s)]).mean(
            dim=(1, 2, 3)
        )
        for s in shifts
    ]
    return torch.stack(agreement).argmax(dim=0) - 4


def test_dots_drift_as_far_as_they_are_coherent() -> None:
    clips, labels = contents_of("random_dots:coherence=0.5", 30)
    assert (_best_shift(clips) == torch.where(labels == 0, 2, -2)).double().mean() > 0.9
    incoherent, labels = contents_of("random_dots:coherence=0", 30)
    assert 0.3 < (_best_shift(incoherent) == torch.where(labels == 0, 2, -2)).double().mean() < 0.7


def test_dots_have_no_axis_in_a_frame() -> None:
    """A frame's spread along W is that along H: single frames do not show the axis."""
    clips, _ = contents_of("random_dots:coherence=1", 200)
    grey = (clips[::2, 0] > 0).double()
    along_w = float((grey[..., :-3] * grey[..., 3:]).mean())
    along_h = float((grey[..., :-3, :] * grey[..., 3:, :]).mean())
    assert along_w == pytest.approx(along_h, rel=0.05)


@pytest.mark.parametrize("amplitude", [0.5, 2.0, 6.0])
def test_a_texture_moves_by_its_amplitude(amplitude: float) -> None:
    """By least squares on the brightness constancy of the first and the last frame."""
    clips, labels = contents_of(f"subtle_motion:amplitude={amplitude}", 40)
    grey = clips[:, 0].double()
    if amplitude > 1:  # too far for a linearisation: by correlation
        grey -= grey.mean(dim=(2, 3), keepdim=True)
        first, last = grey[::2, 0], grey[::2, -1]
        score = [(first[..., 8:-8] * last[..., 8 + s : last.shape[2] - 8 + s]).mean() for s in range(-7, 8)]
        assert torch.stack(score).argmax() - 7 == amplitude
        return
    slope = (grey[:, 0, :, 2:] + grey[:, -1, :, 2:] - grey[:, 0, :, :-2] - grey[:, -1, :, :-2]) / 4
    change = (grey[:, -1] - grey[:, 0])[..., 1:-1]
    moved = -(slope * change).sum(dim=(1, 2)) / (slope**2).sum(dim=(1, 2))
    assert torch.where(labels == 0, moved, -moved).mean() == pytest.approx(amplitude, rel=0.25)


@pytest.mark.parametrize("amplitude", [1.0, 4.0, 16.0])
def test_a_disc_moves_by_its_amplitude(amplitude: float) -> None:
    """By the phase of the lowest frequency along W, of first and last frames."""
    clips, labels = contents_of(f"subtle_motion:pattern=disc:amplitude={amplitude}", 100)
    grey = clips.double() - clips.double().mean(dim=1, keepdim=True)
    phase = torch.fft.rfft((grey**2).sum(dim=(1, 3)), dim=-1)[..., 1]  # [N, T]: where the colour is
    turned = torch.angle(phase[:, -1] * phase[:, 0].conj()) * -32 / (2 * torch.pi)
    right = torch.where(labels == 0, turned, -turned) % 32
    right = torch.where(right > 24, right - 32, right)
    assert right.median() == pytest.approx(amplitude, abs=0.3)


def test_sharpness_does_not_tell_first_from_last() -> None:
    """Between two pixels a frame is interpolated, and so less sharp: at either end of a clip alike."""
    clips, _ = contents_of("subtle_motion:amplitude=0.5", 300)
    grey = clips[::2, 0].double()
    sharp = (grey[..., 1:] - grey[..., :-1]).abs().mean(dim=(2, 3))
    assert (sharp[:, 0] > sharp[:, -1]).double().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("length", [8, 64])
def test_the_class_of_a_memory_is_its_first_flash(length: int) -> None:
    tokens, labels = contents_of(f"token_memory:clip_length={length}", 6)
    assert tokens.shape == (24, length, 8)
    assert torch.equal(tokens[:, 0].argmax(dim=1), labels)
    clips, labels = contents_of(f"long_memory:clip_length={length}", 6)
    levels = clips[:, :, 0].mean(dim=(2, 3))
    high, middle, low = levels.sort(dim=1, descending=True).values.unbind(dim=1)
    yellow = middle - low > high - middle  # red and green
    assert torch.equal(torch.where(yellow, 3, levels.argmax(dim=1)), labels)


@pytest.mark.parametrize("name", ["long_memory", "token_memory"])
def test_nothing_after_the_cues_tells_the_class(name: str) -> None:
    """What a model of a short receptive field sees at the end is the same for every class."""
    clips, _ = contents_of(f"{name}:clip_length=24", 5)
    clips = clips if name == "token_memory" else clips.transpose(1, 2)
    for content in clips.split(CUES):
        assert all(torch.equal(clip[CUES:], content[0, CUES:]) for clip in content)


def test_flashes_lie_apart_by_the_delay() -> None:
    clips, _ = contents_of("frame_order:clip_length=40:delay=9", 30)
    levels = clips.mean(dim=(3, 4))
    shown = (levels.max(dim=1).values - levels.min(dim=1).values) > 0.1  # [N, T]: something coloured
    for clip in shown:
        times = clip.nonzero().flatten().tolist()
        gaps = [b - a for a, b in itertools.pairwise(times) if b - a > 1]
        assert len(gaps) == 2
        assert min(gaps) > 9


def test_a_domain_is_another_look_of_the_same_task() -> None:
    a, labels = contents_of("frame_order", 10)
    b, same = contents_of("frame_order:domain=b", 10)
    assert torch.equal(labels, same)
    assert abs(float(a.mean() - b.mean())) > 0.5


def test_one_task_has_one_name() -> None:
    assert create("frame_order").name == "frame_order"
    assert create("frame_order:domain=a:delay=0").name == "frame_order"
    assert create("frame_order:delay=1:clip_length=32").name == create("frame_order:clip_length=32:delay=1").name
    assert create(create("random_dots:coherence=0.25").name) is not None
    assert knobs("random_dots") == {"clip_length": 16, "coherence": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frame_oder", "unknown task 'frame_oder': did you mean 'frame_order'"),
        ("frame_order:dely=3", "unknown knob of task frame_order 'dely': did you mean 'delay'"),
        ("frame_order:delay", "task 'frame_order:delay': 'delay' is not knob=value"),
        ("frame_order:delay=x", "task 'frame_order:delay=x': delay=x: wanted a whole number"),
        ("frame_order:delay=5", "task 'frame_order:delay=5': clip_length=16: wanted 22 to 1024"),
        ("frame_order:domain=c", "task 'frame_order:domain=c': domain=c: wanted one of a, b"),
        ("random_dots:coherence=2", "task 'random_dots:coherence=2': coherence=2: wanted 0 to 1"),
    ],
)
def test_a_task_that_is_not_there_is_one_line(text: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        create(text)
    assert str(error.value).startswith(message)
