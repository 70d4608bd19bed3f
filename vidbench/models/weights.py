"""Reading weights from a file into a model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from vidbench.sweep import RequestError


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
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise RequestError(f"weights {str(path)!r} hold no state_dict: wanted a mapping from names to tensors")
    return {str(name): value for name, value in content.items()}


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return [f"{what} {', '.join(names[:4])}{more}"] if names else []


def load_weights(module: nn.Module, path: str | PathLike[str], *, replace_head: bool = False) -> None:
    """Loads a file that holds the module's own `state_dict` into it, in place.

    Args:
        module: The model.
        path: A file of `torch.save`; read with `weights_only=True`, so that it can run no code.
        replace_head: Leave the classifier (the layers that the model names in `heads`) as it was initialised, whatever
            the file holds for it: for training on other classes.

    Raises:
        RequestError: The file cannot be read, or its tensors do not fit: missing, unexpected and wrongly shaped ones
            are named, and the module is left as it was.
    """
    given, own = _state_dict(path), module.state_dict()
    if replace_head:
        heads = tuple(f"{head}." for head in getattr(module, "heads", ()))
        if not heads:
            raise RequestError(
                f"replace_head: {type(module).__name__} names no classifier; give it heads = ('fc',) or the like"
            )
        given = {name: tensor for name, tensor in given.items() if not name.startswith(heads)}
        given.update({name: tensor for name, tensor in own.items() if name.startswith(heads)})
    # Batch counters are of no use to evaluation, and files from before they existed lack them.
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in own]
    shaped = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in given.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if problems := _listed("missing", missing) + _listed("unexpected", unexpected) + _listed("wrongly shaped", shaped):
        raise RequestError(f"weights {str(path)!r} do not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(given, strict=False)
