"""What the generated tasks show: frames drawn in whole numbers from random bytes, so that every machine draws the same.

A scene takes random bytes (C, n) and returns the frames of C contents (C, F, 3, H, W) and the order in which each
class shows them (C, classes, T), indices into F. Where the classes of a content are orders of the very same frames,
whatever is blind to order is at chance.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
Scene = tuple[Bytes, Integers]
Domain = Literal["a", "b"]
"""a: discs on grey noise; b: squares of other tints on dark, striped noise."""

Pattern = Literal["texture", "disc"]
"""What moves: a texture that fills the frame, or a disc on noise."""

SIZE = 32
"""Pixels of a frame's side."""
SHAPES = ("disc", "bars", "cross", "ring")
HEAD = 16
"""Random bytes of a content that are not noise."""

COLOURS = np.array([[224, 64, 64], [64, 224, 64], [64, 64, 224], [224, 224, 64]])
TINTS = np.array([[240, 140, 80], [120, 230, 190], [150, 110, 240], [240, 230, 160]])
"""The colours of domain a and of domain b."""
COLOUR_NAMES = ("red", "green", "blue", "yellow")
TINT_NAMES = ("orange", "mint", "violet", "sand")
_STRIPES = 24 * (np.arange(SIZE) // 4 % 2)


def noise_bytes(clip_length: int) -> int:
    """Random bytes that a clip with a noisy background takes, `HEAD` included."""
    return HEAD + clip_length * 3 * SIZE * SIZE


def _noise(entropy: Bytes, clip_length: int, domain: Domain = "a") -> Bytes:
    """Frames (C, T, 3, H, W) of noise: levels 96 to 159 in domain a."""
    frames: Bytes = np.right_shift(entropy[:, HEAD:].reshape(len(entropy), clip_length, 3, SIZE, SIZE), 2)
    frames += np.uint8(96) if domain == "a" else (32 + _STRIPES).astype(np.uint8)
    return frames


def _mask(
    shape: str, row: Integers, column: Integers, radius: Integers, *, wrap: bool = False
) -> npt.NDArray[np.bool_]:
    """Pixels of shapes, (..., H, W); centres and radii (...) in sixteenths of a pixel.

    Args:
        wrap: What leaves at one edge comes in at the other.
    """
    grid, half = 16 * np.arange(SIZE), 8 * SIZE
    y, x = grid - row[..., None], grid - column[..., None]
    if wrap:
        y, x = (y + half) % (2 * half) - half, (x + half) % (2 * half) - half
    y, x = np.abs(y)[..., :, None], np.abs(x)[..., None, :]
    r = radius[..., None, None]
    square = y**2 + x**2
    inside: npt.NDArray[np.bool_]
    if shape == "disc":
        inside = square <= r**2
    elif shape == "square":
        inside = np.maximum(y, x) <= r * 7 // 8
    elif shape == "cross":
        inside = (np.minimum(y, x) <= r // 3) & (np.maximum(y, x) <= r)
    elif shape == "bars":  # two, one above the other
        inside = (y >= r * 3 // 8) & (np.maximum(y, x) <= r)
    else:  # a ring
        inside = (square <= r**2) & (square >= (r * 9 // 16) ** 2)
    return inside


def _paint(frames: Bytes, mask: npt.NDArray[np.bool_], colour: Integers, strength: Integers) -> Bytes:
    """Frames (..., 3, H, W) blended with colours (..., 3) where the mask (..., H, W) is; strengths (...) of 256."""
    shown = frames.astype(np.int32)  # the largest product is 255 · 256
    amount = (mask * strength.astype(np.int32)[..., None, None])[..., None, :, :]
    return (shown + ((colour.astype(np.int32)[..., None, None] - shown) * amount >> 8)).astype(np.uint8)


def _forwards_and_back(contents: int, clip_length: int) -> Integers:
    """Two classes: the frames as made, and reversed."""
    forwards = np.arange(clip_length, dtype=np.int64)
    return np.tile(np.stack([forwards, forwards[::-1]]), (contents, 1, 1))


def appearance(entropy: Bytes, *, clip_length: int, contrast: int) -> Scene:
    """A shape that keeps its place; the class is which of `SHAPES`. One frame suffices.

    Args:
        contrast: Strength of the shape, of 256.
    """
    contents = len(entropy)
    head = entropy[:, :HEAD].astype(np.int64)
    noise = _noise(entropy, clip_length)
    row, column, radius = 128 + head[:, :1], 128 + head[:, 1:2], 96 + (head[:, 2:3] >> 2)
    colour = COLOURS[head[:, 3] % len(COLOURS)][:, None]
    strength = np.full((contents, 1), contrast)
    shown = [_paint(noise, _mask(shape, row, column, radius), colour, strength) for shape in SHAPES]
    order = np.arange(len(SHAPES) * clip_length, dtype=np.int64).reshape(len(SHAPES), clip_length)
    return np.concatenate(shown, axis=1), np.tile(order, (contents, 1, 1))


MOVING_BYTES = 7


def _moving(
    frames: Bytes,
    drawn: Integers,
    shape: str,
    *,
    domain: Domain = "a",
    way: int = 1,
    speed: int = 1,
    colour: Integers | None = None,
) -> Bytes:
    """A shape that moves on frames (C, T, 3, H, W), from anywhere and round the edges.

    Args:
        drawn: Random numbers below 256, (C, `MOVING_BYTES`).
        way: 1 to the right, -1 to the left.
        speed: Pixels a frame; up to one more is drawn.
        colour: (3,); by default drawn from the domain's.
    """
    time = np.arange(frames.shape[1])
    row = 2 * drawn[:, :1] + ((drawn[:, 1:2] - 128) * time >> 4)
    column = 2 * drawn[:, 2:3] + way * (16 * speed + (drawn[:, 3:4] >> 4)) * time
    radius = np.broadcast_to(64 + (drawn[:, 4:5] >> 3), row.shape)
    palette = COLOURS if domain == "a" else TINTS
    shown = palette[drawn[:, 5] % len(palette)] if colour is None else np.broadcast_to(colour, (len(drawn), 3))
    strength = 192 + (drawn[:, 6:7] >> 2)
    return _paint(frames, _mask(shape, row, column, radius, wrap=True), shown[:, None], strength)


def time_direction(entropy: Bytes, *, clip_length: int, speed: int, domain: Domain) -> Scene:
    """A shape moves to the right; the other class is the clip backwards.

    Args:
        speed: Pixels a frame; up to one more is drawn.
    """
    shape = "disc" if domain == "a" else "square"
    drawn = entropy[:, :MOVING_BYTES].astype(np.int64)
    frames = _moving(_noise(entropy, clip_length, domain), drawn, shape, domain=domain, speed=speed)
    return frames, _forwards_and_back(len(entropy), clip_length)


def shape_direction(entropy: Bytes, *, clip_length: int) -> Scene:
    """A disc, two bars or a cross moves to the right or, backwards, to the left: six classes, shape by shape."""
    drawn = entropy[:, :MOVING_BYTES].astype(np.int64)
    shown = [_moving(_noise(entropy, clip_length), drawn, shape) for shape in SHAPES[:3]]
    ways = _forwards_and_back(len(entropy), clip_length)
    return np.concatenate(shown, axis=1), np.concatenate([i * clip_length + ways for i in range(3)], axis=1)


TWINS = np.array([[255, 160, 160], [160, 190, 255]])
"""A red and a blue of one luminance: grey frames, from which optical flow is computed, do not tell them apart."""


def colour_binding(entropy: Bytes, *, clip_length: int) -> Scene:
    """A red disc moves to the right while a blue one moves to the left; the other class is the clip backwards.

    Both classes show both colours and both motions: what tells them apart is which colour has which. Where the discs
    meet, either may be in front, lest the class be read from which way the one in front moves.
    """
    drawn = entropy[:, : 2 * MOVING_BYTES].astype(np.int64)

    def with_red(frames: Bytes) -> Bytes:
        return _moving(frames, drawn[:, :MOVING_BYTES], "disc", colour=TWINS[0])

    def with_blue(frames: Bytes) -> Bytes:
        return _moving(frames, drawn[:, MOVING_BYTES:], "disc", way=-1, colour=TWINS[1])

    noise = _noise(entropy, clip_length)
    red_in_front = entropy[:, 2 * MOVING_BYTES, None, None, None, None] < 128
    frames = np.where(red_in_front, with_red(with_blue(noise)), with_blue(with_red(noise)))
    return frames, _forwards_and_back(len(entropy), clip_length)


MOVE_LENGTH = 5


def motion_order(entropy: Bytes, *, clip_length: int, delay: int, margin: int) -> Scene:
    """A disc moves to the right for five frames, another one to the left; a class is which comes first.

    Both classes show the same frames, and each movement is shown as it was made.

    Args:
        delay: Frames of noise between the two.
        margin: Frames of noise before and after both, at least. With as many as a network sees at a time, the first
            movement is seen at every place that the second is seen at, and no place tells which it is.
    """
    contents = len(entropy)
    frames = _noise(entropy, clip_length)
    head = entropy[:, :HEAD].astype(np.int64)
    onset = margin + (head[:, 14] * (clip_length - 2 * (MOVE_LENGTH + margin) - delay + 1) >> 8)
    first = onset[:, None] + np.arange(MOVE_LENGTH)  # [C, L]
    slots = first, first + MOVE_LENGTH + delay
    which = np.arange(contents)[:, None]
    for event, way in enumerate((1, -1)):
        drawn = head[:, event * MOVING_BYTES : (event + 1) * MOVING_BYTES]
        frames[which, slots[event]] = _moving(frames[which, slots[event]], drawn, "disc", way=way, speed=2)
    order = np.tile(np.arange(clip_length, dtype=np.int64), (contents, 2, 1))
    order[which, 1, slots[0]], order[which, 1, slots[1]] = slots[1], slots[0]
    return frames, order


EVENT_LENGTH = 4
ORDERS = np.array(list(itertools.permutations(range(3))))
"""By class, which event fills the first, second and third slot."""


def frame_order(entropy: Bytes, *, clip_length: int, delay: int, domain: Domain) -> Scene:
    """Three flashes on noise, red, green and blue; a class is their order. Every class shows the same frames.

    Args:
        delay: Frames of noise between one flash and the next, at least.
    """
    contents = len(entropy)
    head = entropy[:, :HEAD].astype(np.int64)
    frames = _noise(entropy, clip_length, domain)

    # The slots begin at a random onset and with random gaps, so the time of a frame does not tell its slot.
    slack = clip_length - 3 * EVENT_LENGTH - 2 * delay
    waits = np.sort(head[:, :3] * (slack + 1) >> 8, axis=1)
    starts = waits + (EVENT_LENGTH + delay) * np.arange(3)  # [C, 3]
    slots = starts[:, :, None] + np.arange(EVENT_LENGTH)  # [C, 3, L]: the frames of each slot

    # In the frames as made, event e is in slot e: a disc with a centre, a radius and a strength of its own.
    centre = 8 + (head[:, 3:9].reshape(contents, 3, 2) * (SIZE - 16) >> 8)
    radius = 7 + (head[:, 9:12] * 4 >> 8)
    strength = 192 + (head[:, 12:15] >> 2)  # of 256
    shape, palette = ("disc", COLOURS) if domain == "a" else ("square", TINTS)
    mask = _mask(shape, 16 * centre[:, :, :1], 16 * centre[:, :, 1:], 16 * radius[:, :, None])  # [C, 3, 1, H, W]
    which = np.arange(contents)[:, None, None]
    frames[which, slots] = _paint(frames[which, slots], mask, palette[None, :3, None], strength[:, :, None])

    order = np.tile(np.arange(clip_length, dtype=np.int64), (contents, len(ORDERS), 1))
    classes = np.arange(len(ORDERS))[None, :, None]
    order[which, classes, slots.reshape(contents, 1, -1)] = slots[:, ORDERS].reshape(contents, len(ORDERS), -1)
    return frames, order


CUES = 4


def memory_bytes(clip_length: int, noise: int) -> int:
    """Random bytes that a content of a memory task takes, with so many of noise for each frame."""
    return CUES + clip_length * (4 + noise)


def _cue_first(shuffle: Bytes, clip_length: int) -> Integers:
    """Class by class, frame c comes first, the other cues after it in a random order, and then the rest."""
    others = np.argsort(shuffle, axis=1, kind="stable")  # [C, CUES]
    order = np.tile(np.arange(clip_length, dtype=np.int64), (len(shuffle), CUES, 1))
    for c in range(CUES):
        # Stable: the cue itself to the front, the others as they were drawn.
        moved = np.argsort(others != c, axis=1, kind="stable")
        order[:, c, :CUES] = np.take_along_axis(others, moved, axis=1)
    return order


def long_memory(entropy: Bytes, *, clip_length: int) -> Scene:
    """Four flashes of different colours; the class is which is first. Then nothing but distractors.

    Every class shows the same frames, and what follows the fourth frame is the same for every class: it tells nothing.
    """
    contents = len(entropy)
    drawn = entropy[:, CUES : CUES + 4 * clip_length].astype(np.int64).reshape(contents, clip_length, 4)
    noise = np.concatenate([np.zeros((contents, HEAD), np.uint8), entropy[:, CUES + 4 * clip_length :]], axis=1)
    row, column, radius = 128 + drawn[:, :, 0], 128 + drawn[:, :, 1], 96 + (drawn[:, :, 2] >> 2)
    kind = drawn[:, :, 3] >> 5  # the frame shows one of four colours or, as often, none
    kind[:, :CUES] = np.arange(CUES)
    colour = COLOURS[kind % len(COLOURS)]  # [C, T, 3]
    strength = np.where(kind < len(COLOURS), 224, 0)
    frames = _paint(_noise(noise, clip_length), _mask("disc", row, column, radius), colour, strength)
    return frames, _cue_first(entropy[:, :CUES], clip_length)


TOKEN = 8


def token_memory(entropy: Bytes, *, clip_length: int) -> Scene:
    """`long_memory` without pictures: features (C, T, 8); a flash raises one of the first four."""
    contents = len(entropy)
    drawn = entropy[:, CUES : CUES + 4 * clip_length].astype(np.int64).reshape(contents, clip_length, 4)
    noise = entropy[:, CUES + 4 * clip_length :].reshape(contents, clip_length, TOKEN)
    kind = drawn[:, :, 3] >> 5
    kind[:, :CUES] = np.arange(CUES)
    raised = (kind[:, :, None] == np.arange(TOKEN)) & (kind < CUES)[:, :, None]
    return np.where(raised, 224, 96 + (noise >> 2)).astype(np.uint8), _cue_first(entropy[:, :CUES], clip_length)


DOTS = 32
LIFETIME = 4
_CIRCLE = np.array([256, 237, 181, 98, 0, -98, -181, -237, -256, -237, -181, -98, 0, 98, 181, 237])
"""256 times the cosine of sixteen headings."""


def dot_bytes(clip_length: int) -> int:
    """Random bytes that a content of random dots takes: a phase, and what each life of a dot draws."""
    return DOTS * (1 + 4 * (clip_length // LIFETIME + 2))


def random_dots(entropy: Bytes, *, clip_length: int, coherence: float) -> Scene:
    """Dots of which a share moves to the right, the others anywhere; the other class is the clip backwards.

    A dot lives for four frames and is then born elsewhere; one that leaves the frame is gone. None can be followed
    for long, and no single frame or path tells the classes apart: local motion alone does.

    Source: Newsome & Paré (1988), J. Neurosci. 8(6):2201, on dots of limited lifetime.
    """
    contents = len(entropy)
    drawn = entropy.astype(np.int64).reshape(contents, DOTS, -1)
    clock = np.arange(clip_length) + drawn[:, :, :1] % LIFETIME  # [C, D, T]
    life, age = clock // LIFETIME, clock % LIFETIME
    y, x, share, heading = (np.take_along_axis(drawn[:, :, 1 + i :: 4], life, axis=2) for i in range(4))
    heading = np.where(share < round(256 * coherence), 0, heading % 16)
    # Two pixels a frame, in sixteenths, about the middle of a life: backwards as forwards.
    way = 32 * (2 * age - (LIFETIME - 1))
    column = 2 * x + (_CIRCLE[heading] * way >> 9) >> 4
    row = 2 * y + (_CIRCLE[(heading + 12) % 16] * way >> 9) >> 4
    seen = (column >= 0) & (column < SIZE) & (row >= 0) & (row < SIZE)
    content, _, frame = np.nonzero(seen)
    shown = np.full((contents, clip_length, SIZE + 1, SIZE + 1), 64, dtype=np.uint8)
    for dy, dx in itertools.product(range(2), repeat=2):
        shown[content, frame, row[seen] + dy, column[seen] + dx] = 224
    return np.repeat(shown[:, :, None, :SIZE, :SIZE], 3, axis=2), _forwards_and_back(contents, clip_length)


REACH = 24
"""Pixels by which a texture is wider than a frame."""


def texture_bytes(clip_length: int) -> int:
    """Random bytes that a content of subtle motion takes."""
    return (SIZE + 4) * (SIZE + REACH + 4) + 1 + clip_length * SIZE * SIZE


def subtle_motion(entropy: Bytes, *, clip_length: int, amplitude: float) -> Scene:
    """A texture under noise moves steadily to the right; the other class is the clip backwards.

    Args:
        amplitude: Pixels from the first frame to the last, by linear interpolation.
    """
    contents, rows, columns = len(entropy), SIZE + 4, SIZE + REACH + 4
    texture = entropy[:, : rows * columns].astype(np.int64).reshape(contents, rows, columns)
    for axis in (1, 2, 1, 2):  # twice the sum of three neighbours along both axes: nothing finer than a few pixels
        lines = np.moveaxis(texture, axis, 0)
        texture = np.moveaxis(lines[:-2] + lines[1:-1] + lines[2:], 0, axis)
    texture = texture * 2 // 81 - 128  # the mean of all, with a little of the spread that it cost
    # It begins anywhere between two pixels, or the sharpness of the first frame would tell it from the last.
    start = 256 * entropy[:, rows * columns, None].astype(np.int64)
    moved = np.arange(clip_length) * round(65536 * amplitude) // (clip_length - 1)
    place = 65536 * (REACH - 3) + start - moved  # [C, T], in 65536ths of a pixel
    whole, part = place >> 16, place & 65535
    at = (whole[:, :, None] + np.arange(SIZE))[:, :, None]  # [C, T, 1, W]
    left, right = (np.take_along_axis(texture[:, None], at + i, axis=3) for i in range(2))  # [C, T, H, W]
    part = part[:, :, None, None]
    grain = entropy[:, 1 + rows * columns :].astype(np.int64).reshape(contents, clip_length, SIZE, SIZE) - 128
    level = (left * (65536 - part) + right * part + (grain << 12)) >> 16  # noise of ± 8 levels
    shown = np.repeat(np.clip(level, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    return shown, _forwards_and_back(contents, clip_length)


def subtle_disc(entropy: Bytes, *, clip_length: int, amplitude: float) -> Scene:
    """A disc on noise moves steadily to the right, from anywhere and round the edges; or backwards.

    Args:
        amplitude: Pixels from the first frame to the last, in steps of a sixteenth.
    """
    drawn = entropy[:, :4].astype(np.int64)
    moved = (np.arange(clip_length) - (clip_length - 1) / 2) * 16 * amplitude / (clip_length - 1)
    column = 2 * drawn[:, :1] + np.rint(moved).astype(np.int64)  # [C, T]
    row = np.broadcast_to(2 * drawn[:, 1:2], column.shape)
    radius = np.broadcast_to(80 + (drawn[:, 2:3] >> 2), column.shape)
    colour = COLOURS[drawn[:, 3] % len(COLOURS)][:, None]
    mask = _mask("disc", row, column, radius, wrap=True)
    frames = _paint(_noise(entropy, clip_length), mask, colour, np.full((len(entropy), 1), 224))
    return frames, _forwards_and_back(len(entropy), clip_length)
