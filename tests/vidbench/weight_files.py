"""Weight files with the names and shapes of published ones, and networks computed from their tensors alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]
Layout = dict[str, tuple[int, ...]]


def norm_layout(name: str, channels: int) -> Layout:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


def filled(layout: Layout, *, counters: bool = True, seed: int = 0) -> State:
    """Random values at which signals neither die nor explode; with the batch counters that newer files have."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in layout.items():
        part = name.rpartition(".")[2]
        if part == "running_var" or (part == "weight" and len(shape) == 1):
            value = torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
        elif part in ("bias", "running_mean"):
            value = torch.empty(shape).uniform_(-0.1, 0.1, generator=generator)
        else:
            bound = (6 / max(1, math.prod(shape[1:]))) ** 0.5
            value = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        state[name] = value
        if counters and part == "running_var":
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return state


def batch_norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def agree(model: nn.Module, inputs: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        given = model.eval()(inputs)
    assert given.shape == expected.shape
    assert expected.std() > 1e-3
    error = (given - expected).abs().max() / expected.abs().max()
    assert error < 2e-4
