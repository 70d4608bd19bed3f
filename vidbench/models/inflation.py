"""Starting a video network from an image network's weights: inflation in time, and RGB filters for other channels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vidbench.sweep import RequestError


def inflate_filter(weight: Tensor, frames: int) -> Tensor:
    """A 2D filter (C_out, C_in, H, W) repeated `frames` times over time and divided by it: (C_out, C_in, T, H, W).

    On a video that repeats one image it answers as the 2D filter does.

    Source: Carreira & Zisserman (2017), arXiv:1705.07750, §2.4, bootstrapping 3D filters from 2D filters.
    """
    return weight.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames


def cross_modality(weight: Tensor, in_channels: int) -> Tensor:
    """RGB filters (C_out, 3, …) averaged over their channels and repeated over `in_channels`: (C_out, in_channels, …).

    Source: Wang et al. (2016), "Temporal Segment Networks", arXiv:1608.00859, §3.2, cross modality pre-training.
    """
    mean = weight.mean(dim=1, keepdim=True)
    return mean.expand(-1, in_channels, *mean.shape[2:]).clone()


_GOOGLENET: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^conv1\.", "Conv3d_1a_7x7."),
    (r"^conv2\.", "Conv3d_2b_1x1."),
    (r"^conv3\.", "Conv3d_2c_3x3."),
    (r"^inception3a\.", "Mixed_3b."),
    (r"^inception3b\.", "Mixed_3c."),
    *((rf"^inception4{old}\.", f"Mixed_4{new}.") for old, new in zip("abcde", "bcdef", strict=True)),
    (r"^inception5a\.", "Mixed_5b."),
    (r"^inception5b\.", "Mixed_5c."),
    (r"\.branch1\.", ".b0."),
    (r"\.branch([23])\.0\.", lambda found: f".b{int(found[1]) - 1}a."),
    (r"\.branch([23])\.1\.", lambda found: f".b{int(found[1]) - 1}b."),
    (r"\.branch4\.1\.", ".b3b."),
    (r"\.conv\.weight$", ".conv3d.weight"),
)
"""From torchvision's GoogLeNet, an Inception-v1 with batch norm and 3×3 filters in its third branch, to I3D's names."""


def _renamed(name: str) -> str:
    for pattern, replacement in _GOOGLENET:
        name = re.sub(pattern, replacement, name)
    return name


def inflate(module: nn.Module, image_weights: Mapping[str, Tensor]) -> list[str]:
    """Starts a 3D network from the weights of its 2D original, in place.

    Args:
        module: The 3D network, such as I3D; where its first layer takes other channels than RGB, the filters are
            those of `cross_modality`.
        image_weights: Of the 2D network, under the 3D network's names or those of torchvision's GoogLeNet. What the
            3D network has not (the image classifier, auxiliary heads) is passed over.

    Returns:
        Names of the module's tensors that stay as they were: the classifier and counters.

    Raises:
        RequestError: A tensor does not fit, or nothing but the classifier is found.
    """
    own, started = module.state_dict(), {}
    for given, tensor in image_weights.items():
        name = given if given in own else _renamed(given)
        if name not in own or name.startswith(tuple(f"{head}." for head in getattr(module, "heads", ()))):
            continue
        wanted = own[name]
        if tensor.dim() == 4 and wanted.dim() == 5:
            if tensor.shape[1] == 3 != wanted.shape[1]:
                tensor = cross_modality(tensor, wanted.shape[1])
            tensor = inflate_filter(tensor, wanted.shape[2])
        if tensor.shape != wanted.shape:
            raise RequestError(f"{given} {tuple(tensor.shape)} does not inflate to {name} {tuple(wanted.shape)}")
        started[name] = tensor
    left = [name for name in own if name not in started]
    heads = tuple(f"{head}." for head in getattr(module, "heads", ()))
    missing = [name for name in left if not name.startswith(heads) and not name.endswith("num_batches_tracked")]
    if missing:
        raise RequestError(f"the image network lacks {', '.join(missing[:4])} of {type(module).__name__}")
    with torch.no_grad():
        module.load_state_dict(started, strict=False)
    return left
