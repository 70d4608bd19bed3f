"""Optical flow: a known displacement comes out as it went in."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from vidbench.data.flow import BOUND, METHODS, Method, optical_flow
from vidbench.sweep import RequestError

cv2 = pytest.importorskip("cv2")


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random texture with detail of a few pixels."""
    noise = np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), 2.5)
    low, high = blurred.min(), blurred.max()
    return ((blurred - low) / (high - low) * 255).astype(np.uint8)


def moving(right: float, down: float, frames: int = 3, height: int = 96, width: int = 128) -> torch.Tensor:
    """A clip, (1, T, H, W, 3), of a texture that moves by so many pixels a frame."""
    margin = 48
    canvas = textured(height + 2 * margin, width + 2 * margin)
    clip = [
        cv2.warpAffine(
            canvas, np.array([[1, 0, right * t], [0, 1, down * t]], dtype=np.float64), canvas.shape[1::-1],
            flags=cv2.INTER_CUBIC,
        )[margin:-margin, margin:-margin]
        for t in range(frames)
    ]  # fmt: skip
    return torch.from_numpy(np.stack(clip))[None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (2.5, 1.5), (-4, 3)])
def test_a_translation_is_found(method: Method, right: float, down: float) -> None:
    flow = optical_flow(moving(right, down), method=method)
    assert flow.shape == (1, 2, 2, 96, 128)
    assert flow.dtype == torch.float32
    inside = flow[..., 12:-12, 12:-12] * BOUND
    for step in range(2):
        assert inside[0, 0, step].median().item() == pytest.approx(right, abs=0.2)
        assert inside[0, 1, step].median().item() == pytest.approx(down, abs=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_a_still_clip_has_no_flow(method: Method) -> None:
    still = torch.from_numpy(textured(40, 56)).expand(2, 4, 40, 56, 3)
    flow = optical_flow(still, method=method)
    assert flow.shape == (2, 2, 3, 40, 56)
    assert (flow * BOUND).abs().max() < 0.2
    assert (flow * BOUND).abs().median() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_each_clip_and_step_is_on_its_own(method: Method) -> None:
    one, other = moving(3, 0, frames=4), moving(-1, 2, frames=4)
    both = optical_flow(torch.cat([one, other]), method=method)
    assert torch.allclose(both[:1], optical_flow(one, method=method), atol=1e-6)
    assert torch.allclose(both[1:, :, 2:], optical_flow(other[:, 2:], method=method), atol=1e-6)


def test_displacements_are_clipped_to_twenty_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    far = np.full((16, 16, 2), (30, -10), dtype=np.float32)
    monkeypatch.setattr(cv2, "calcOpticalFlowFarneback", lambda *_: far)
    flow = optical_flow(torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8), method="farneback")
    assert torch.equal(flow[0, 0], torch.ones(1, 16, 16))
    assert torch.equal(flow[0, 1], torch.full((1, 16, 16), -0.5))


def test_what_has_no_flow_is_refused() -> None:
    with pytest.raises(RequestError, match="clip_length=1 has no flow; wanted at least 2 frames"):
        optical_flow(torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(RequestError, match="frames of 8x32 pixels are too small for flow"):
        optical_flow(torch.zeros(1, 2, 8, 32, 3, dtype=torch.uint8))
    with pytest.raises(RequestError, match="unknown flow method 'tvl1'"):
        optical_flow(torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8), method="tvl1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"wanted \(N, T, H, W, 3\) torch.uint8"):
        optical_flow(torch.zeros(1, 3, 2, 32, 32))


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RequestError, match=r'pip install "vidbench\[flow\]"'):
        optical_flow(torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8))
