"""Reading weights from a file into a model: its own, and the published ones as they are.

| file | wrapped in | names that differ from ours |
|---|---|---|
| torchvision r3d_18, mc3_18, r2plus1d_18 | | |
| pytorch-i3d (piergiaj), RGB and flow | | |
| C3D, Sports-1M (DavideA) | | |
| C3D (jfzhang95) | | `features.0` … `classifier.3`; there is no fc8 |
| TCN (locuslab) | | old weight norm, `linear`, every filter twice |
| X3D (pytorchvideo) | `model_state` | |
| Efficient-3DCNNs (okankop) | `state_dict` | `module.` before every name |
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from vidbench.sweep import RequestError

_WRAPPERS = ("model_state", "state_dict", "model_state_dict", "model")
"""Under which key of a training checkpoint the weights are."""

_C3D_LAYERS = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3a",
    "features.8": "conv3b",
    "features.11": "conv4a",
    "features.13": "conv4b",
    "features.16": "conv5a",
    "features.18": "conv5b",
    "classifier.0": "fc6",
    "classifier.3": "fc7",
    "classifier.6": "fc8",
}
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^module\.", ""),
    *((rf"^{re.escape(old)}\.", f"{new}.") for old, new in _C3D_LAYERS.items()),
    # The authors' TCN registers each filter of a block a second time, in `net`.
    (r"^((?:tcn\.)?network\.\d+)\.net\.0\.", r"\1.conv1."),
    (r"^((?:tcn\.)?network\.\d+)\.net\.4\.", r"\1.conv2."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
    (r"^linear\.", "fc."),
    (r"^tcn\.", ""),
)
"""Applied in this order to a name that the module does not have, until it has it."""


def _state_dict(path: str | PathLike[str]) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RequestError(f"weights {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (
        pickle.UnpicklingError,
        AttributeError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"weights {str(path)!r} are no file of torch.save with tensors alone: {reason}") from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RequestError(f"weights {str(path)!r} hold no state_dict: wanted a mapping from names to tensors")
    return {str(name): value for name, value in content.items()}


def _our_name(name: str, own: Mapping[str, Tensor]) -> str:
    """The module's name for a published one; the name itself where none is known."""
    ours = name
    for pattern, replacement in _RENAMES:
        if ours in own:
            return ours
        ours = re.sub(pattern, replacement, ours)
    return ours if ours in own else name


def _translate(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under the module's names.

    Raises:
        RequestError: Two names of one tensor hold different values.
    """
    translated: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for name, tensor in given.items():
        ours = _our_name(name, own)
        if ours in translated and not torch.equal(translated[ours], tensor):
            raise RequestError(f"weights hold {source[ours]} and {name}, which are both {ours} and differ")
        translated[ours], source[ours] = tensor, name
    return translated


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return [f"{what} {', '.join(names[:4])}{more}"] if names else []


def _under(name: str, layers: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"{layer}." for layer in layers))


def load_weights(module: nn.Module, path: str | PathLike[str], *, replace_head: bool = False) -> None:
    """Loads a file of weights into a module, in place: its own `state_dict`, or a published file as it is.

    Args:
        module: The model, or a part of it, such as a `TemporalConvNet`.
        path: A file of `torch.save`; read with `weights_only=True`, so that it can run no code.
        replace_head: Leave the classifier (the layers that the model names in `heads`) as it was initialised, whatever
            the file holds for it: for training on other classes, and for files that hold none.

    Raises:
        RequestError: The file cannot be read, or its tensors do not fit: missing, unexpected and wrongly shaped ones
            are named, and the module is left as it was.
    """
    own = module.state_dict()
    given = _translate(_state_dict(path), own)
    heads: tuple[str, ...] = tuple(getattr(module, "heads", ()))
    if replace_head:
        if not heads:
            raise RequestError(
                f"replace_head: {type(module).__name__} names no classifier; give it heads = ('fc',) or the like"
            )
        given = {name: tensor for name, tensor in given.items() if not _under(name, heads)}
        given.update({name: tensor for name, tensor in own.items() if _under(name, heads)})
    # A trunk by itself has no place for the classifier of the file that it comes from.
    unused = tuple(getattr(module, "unused", ()))
    given = {name: tensor for name, tensor in given.items() if name in own or not _under(name, unused)}
    # Batch counters are of no use to evaluation, and files from before they existed lack them.
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in own]
    wrong = [name for name, tensor in given.items() if name in own and tensor.shape != own[name].shape]
    shaped = [f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}" for name in wrong]
    if problems := _listed("missing", missing) + _listed("unexpected", unexpected) + _listed("wrongly shaped", shaped):
        fits = not replace_head and all(_under(name, heads) for name in (*missing, *unexpected, *wrong))
        hint = "; all but the classifier fits: replace_head=True leaves that one as it is" if fits else ""
        raise RequestError(f"weights {str(path)!r} do not fit {type(module).__name__}: {'; '.join(problems)}{hint}")
    module.load_state_dict(given, strict=False)
