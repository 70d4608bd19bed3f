"""Any 2D network as the encoder of a clip's frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidbench.models import accepted_by, load_factory
from vidbench.models.resnet2d import resnet18, resnet50
from vidbench.models.sizes import FrameSize, height_width

_OWN = {"resnet18": resnet18, "resnet50": resnet50}


def make_backbone(
    backbone: str, *, input_size: FrameSize = 224, width_multiplier: float = 1.0
) -> tuple[nn.Module, int]:
    """A 2D network and how many features it makes of a frame.

    Args:
        backbone: resnet18, resnet50, or `package.module:factory`. The factory is called with those of input_size and
            width_multiplier that it takes; what it makes maps frames (M, 3, H, W) to features (M, F).
        input_size: Pixels of a frame, or (H, W).
        width_multiplier: Factor on every channel count.

    Raises:
        ValueError: The name is unknown, or the network does not make one row of features of a frame.
    """
    if backbone in _OWN:
        own = _OWN[backbone](input_size=input_size, width_multiplier=width_multiplier)
        return own, own.features
    if ":" not in backbone:
        raise ValueError(f"backbone={backbone!r} is none of {', '.join(_OWN)} and not package.module:factory")
    factory = load_factory(backbone)
    accepts = accepted_by(factory)
    given = {"input_size": input_size, "width_multiplier": width_multiplier}
    network = factory(**{key: value for key, value in given.items() if accepts(key)})
    if not isinstance(network, nn.Module):
        raise ValueError(f"backbone={backbone!r} made a {type(network).__name__}, wanted a torch.nn.Module")
    training = network.training
    with torch.no_grad():
        features = network.eval()(torch.zeros(1, 3, *height_width(input_size)))
    network.train(training)
    if not isinstance(features, Tensor) or features.dim() != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"backbone={backbone!r} made {shape} of frames (1, 3, H, W), wanted features (1, F)")
    return network, features.shape[1]


def encode_frames(backbone: nn.Module, rgb: Tensor) -> Tensor:
    """A clip (N, 3, T, H, W) → a sequence (N, T, F): the frames of all clips as one batch."""
    n, c, t, h, w = rgb.shape
    features: Tensor = backbone(rgb.transpose(1, 2).reshape(n * t, c, h, w))
    return features.reshape(n, t, -1)
