"""The models: which there are, and how one is made. The table is pure data; torch comes with the first model.

A name may also be `package.module:factory`, so that people measure models of their own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from vidbench.sweep import RequestError, unknown

if TYPE_CHECKING:
    from torch import nn

    from vidbench.models.tcn import TemporalConvNet
    from vidbench.models.weights import load_weights

Input = Literal["rgb", "flow", "features"]
"""rgb: (N, 3, T, H, W); flow: (N, 2, T-1, H, W), x and y in pixels; features: (N, T, F)."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is known of a model before it is made."""

    name: str
    factory: str
    """`module:attribute`, imported when the model is made."""
    family: str
    paper: str
    clip_length: int
    """Frames of the published clip."""
    input_size: int
    """Pixels of the published square frame."""
    inputs: tuple[Input, ...] = ("rgb",)
    """What `forward` takes, in order."""
    streams: bool = False
    """Has `step(frame, state=None) -> (logits, state)`."""
    temporal: bool = True
    """Whether more than single frames is seen: motion, or the order of the frames."""


_KARPATHY = "Karpathy et al. (2014), Large-scale Video Classification with Convolutional Neural Networks, CVPR"
_SNIPPETS = "Ng et al. (2015), Beyond Short Snippets, arXiv:1503.08909"
_TSN = "Wang et al. (2016), Temporal Segment Networks, arXiv:1608.00859"
_TWO_STREAM = "Simonyan & Zisserman (2014), Two-Stream Convolutional Networks, arXiv:1406.2199"
_LRCN = "Donahue et al. (2015), Long-term Recurrent Convolutional Networks, arXiv:1411.4389"
_TCN = "Bai, Kolter & Koltun (2018), Generic Convolutional and Recurrent Networks, arXiv:1803.01271"
_ED_TCN = "Lea et al. (2017), Temporal Convolutional Networks for Action Segmentation and Detection, arXiv:1611.05267"
_C3D = "Tran et al. (2015), Learning Spatiotemporal Features with 3D Convolutional Networks, arXiv:1412.0767"
_I3D = "Carreira & Zisserman (2017), Quo Vadis, Action Recognition?, arXiv:1705.07750"
_R2PLUS1D = "Tran et al. (2018), A Closer Look at Spatiotemporal Convolutions, arXiv:1711.11248"
_X3D = "Feichtenhofer (2020), X3D, arXiv:2004.04730"
_MOBILE = "Köpüklü et al. (2019), Resource Efficient 3D Convolutional Neural Networks, arXiv:1904.02422"

_FRAME_POOL = "vidbench.models.frame_pool"
_RECURRENT = "vidbench.models.cnn_recurrent"
_FUSION = "vidbench.models.fusion"
_VIDEO_RESNET = "vidbench.models.video_resnet"
_AT = "vidbench.models"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("single_frame", f"{_FUSION}:SingleFrame", "frame_level", _KARPATHY, 1, 170, temporal=False),
        ModelSpec("frame_pool_avg", f"{_FRAME_POOL}:frame_pool_avg", "frame_level", _TSN, 16, 224, temporal=False),
        ModelSpec("frame_pool_max", f"{_FRAME_POOL}:frame_pool_max", "frame_level", _SNIPPETS, 16, 224, temporal=False),
        ModelSpec("frame_pool_svm", f"{_FRAME_POOL}:frame_pool_svm", "frame_level", _C3D, 16, 224, temporal=False),
        ModelSpec("early_fusion", f"{_FUSION}:EarlyFusion", "fusion", _KARPATHY, 10, 170),
        ModelSpec("late_fusion", f"{_FUSION}:LateFusion", "fusion", _KARPATHY, 16, 170),
        ModelSpec("slow_fusion", f"{_FUSION}:SlowFusion", "fusion", _KARPATHY, 10, 170),
        ModelSpec("two_stream", f"{_AT}.two_stream:TwoStream", "two_stream", _TWO_STREAM, 11, 224, ("rgb", "flow")),
        ModelSpec("cnn_rnn", f"{_RECURRENT}:CnnRnn", "recurrent", _LRCN, 16, 224, streams=True),
        ModelSpec("cnn_lstm", f"{_RECURRENT}:CnnLstm", "recurrent", _LRCN, 16, 224, streams=True),
        ModelSpec("cnn_tcn", f"{_AT}.tcn:CnnTcn", "tcn", _TCN, 16, 224, streams=True),
        ModelSpec("tcn", f"{_AT}.tcn:Tcn", "tcn", _TCN, 64, 224, ("features",), streams=True),
        ModelSpec("ed_tcn", f"{_AT}.ed_tcn:EdTcn", "tcn", _ED_TCN, 64, 224, ("features",)),
        ModelSpec("c3d", f"{_AT}.c3d:C3D", "3d", _C3D, 16, 112),
        ModelSpec("i3d_rgb", f"{_AT}.i3d:i3d_rgb", "3d", _I3D, 64, 224),
        ModelSpec("i3d_flow", f"{_AT}.i3d:i3d_flow", "3d", _I3D, 65, 224, ("flow",)),
        ModelSpec("i3d_two_stream", f"{_AT}.i3d:I3DTwoStream", "3d", _I3D, 65, 224, ("rgb", "flow")),
        ModelSpec("r3d_18", f"{_VIDEO_RESNET}:r3d_18", "3d", _R2PLUS1D, 16, 112),
        ModelSpec("r3d_34", f"{_VIDEO_RESNET}:r3d_34", "3d", _R2PLUS1D, 16, 112),
        ModelSpec("mc3_18", f"{_VIDEO_RESNET}:mc3_18", "3d", _R2PLUS1D, 16, 112),
        ModelSpec("r2plus1d_18", f"{_VIDEO_RESNET}:r2plus1d_18", "(2+1)d", _R2PLUS1D, 16, 112),
        ModelSpec("r2plus1d_34", f"{_VIDEO_RESNET}:r2plus1d_34", "(2+1)d", _R2PLUS1D, 32, 112),
        ModelSpec("x3d_s", f"{_AT}.x3d:x3d_s", "depthwise_3d", _X3D, 13, 160),
        ModelSpec("x3d_m", f"{_AT}.x3d:x3d_m", "depthwise_3d", _X3D, 16, 224),
        ModelSpec("mobilenet_v2_3d", f"{_AT}.mobile:MobileNetV2", "depthwise_3d", _MOBILE, 16, 112),
        ModelSpec("shufflenet_v2_3d", f"{_AT}.mobile:ShuffleNetV2", "depthwise_3d", _MOBILE, 16, 112),
    )
}
"""Every model by name."""

INPUT_FEATURES = 256
"""Features per frame that a model on features takes where nothing else is asked for."""

_RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What building a model may raise for reasons of its arguments or of its own code."""


def _line(error: BaseException) -> str:
    """The first line of an error, with its type."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def load_factory(path: str) -> Callable[..., Any]:
    """What `package.module:attribute` names.

    Raises:
        RequestError: No such module or attribute, or the module cannot be imported.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise RequestError(f"model {path!r} is not package.module:factory")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise RequestError(f"model {path!r}: no module {error.name!r}; is its folder on PYTHONPATH?") from error
        raise RequestError(f"model {path!r}: importing {module_name} raised {_line(error)}") from error
    except (*_RAISED, SyntaxError) as error:
        raise RequestError(f"model {path!r}: importing {module_name} raised {_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise RequestError(f"model {path!r}: {module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise RequestError(f"model {path!r}: {attribute} is no factory but a {type(found).__name__}")
    factory: Callable[..., Any] = found
    return factory


def accepted_by(factory: Callable[..., Any]) -> Callable[[str], bool]:
    """Tells which keywords a factory takes."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # Some callables written in C have no signature.
        return lambda name: False
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return lambda name: True
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return names.__contains__


def spec_of(name: str) -> ModelSpec:
    """The spec of a model; that of a user's `package.module:factory` takes RGB clips of 16 frames, 112×112.

    Raises:
        RequestError: Neither a known name nor `package.module:factory`; the nearest name is given.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" in name:
        return ModelSpec(name, name, "user", "", 16, 112)
    raise unknown("model", name, MODELS)


def create(
    name: str,
    *,
    num_classes: int = 400,
    clip_length: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    width_multiplier: float = 1.0,
    weights: str | PathLike[str] | None = None,
    replace_head: bool = False,
    **options: Any,
) -> nn.Module:
    """A model with fresh or given weights; in eval mode it returns logits (N, num_classes).

    Args:
        name: A name from `MODELS`, or `package.module:factory`; the latter is called with those of num_classes,
            clip_length, input_size and width_multiplier that its signature takes and that are not None.
        num_classes: Classes told apart.
        clip_length: Frames; the published clip's where not given. Layers that depend on it are sized by it.
        input_size: Pixels of a frame, or (H, W); the published one where not given.
        width_multiplier: Factor on the channel counts.
        weights: A file that `load_weights` reads: the model's own, or a published one as it is.
        replace_head: Leave the classifier as it was initialised, for a file with other classes.
        options: What the model takes besides, and is not None: `backbone` (resnet18, resnet50 or
            package.module:factory), `hidden_size`, `input_features`, `mid_channels` and others; the model's own page
            tells.

    Raises:
        RequestError: The name is unknown, the arguments or the weights do not fit the model, or a user's factory
            cannot be imported, raises, or makes no `torch.nn.Module`.
    """
    spec = spec_of(name)
    factory = load_factory(spec.factory)
    accepts = accepted_by(factory)
    own = name in MODELS
    arguments: dict[str, Any] = {
        "num_classes": num_classes,
        "clip_length": spec.clip_length if own and clip_length is None else clip_length,
        "input_size": spec.input_size if own and input_size is None else input_size,
        "width_multiplier": width_multiplier,
    }
    chosen = {key: value for key, value in arguments.items() if value is not None and accepts(key)}
    for key, value in options.items():
        if value is not None:
            if not accepts(key):
                raise RequestError(f"model {name!r} has no {key}, given {value}")
            chosen[key] = value
    try:
        model = factory(**chosen)
    except RequestError:
        raise
    except _RAISED as error:
        given = ", ".join(f"{key}={value}" for key, value in chosen.items())
        raise RequestError(f"model {name!r} cannot be built with {given}: {_line(error)}") from error

    from torch import nn

    if not isinstance(model, nn.Module):
        raise RequestError(f"model {name!r}: the factory made a {type(model).__name__}, wanted a torch.nn.Module")
    if weights is not None:
        from vidbench.models.weights import load_weights

        load_weights(model, weights, replace_head=replace_head)
    return model


def input_shapes(
    name: str,
    *,
    batch_size: int = 1,
    clip_length: int | None = None,
    height: int | None = None,
    width: int | None = None,
    input_features: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Shapes of what a model's `forward` takes, in order, by the names of `Input`.

    Args:
        name: As for `create`; a user's model takes rgb.
        batch_size: Clips.
        clip_length: Frames; the published clip's where not given.
        height: Rows; the published frame's where not given.
        width: Columns; the published frame's where not given.
        input_features: Features per frame.

    Raises:
        RequestError: The name is unknown, or flow is wanted of a clip of a single frame.
    """
    spec = spec_of(name)
    t = spec.clip_length if clip_length is None else clip_length
    h = spec.input_size if height is None else height
    w = spec.input_size if width is None else width
    if "flow" in spec.inputs and t < 2:
        raise RequestError(f"model {name!r} takes optical flow, of which clip_length={t} has none: give at least 2")
    shapes: dict[Input, tuple[int, ...]] = {
        "rgb": (batch_size, 3, t, h, w),
        "flow": (batch_size, 2, t - 1, h, w),
        "features": (batch_size, t, INPUT_FEATURES if input_features is None else input_features),
    }
    return {kind: shapes[kind] for kind in spec.inputs}


_LAZY = {"TemporalConvNet": "vidbench.models.tcn", "load_weights": "vidbench.models.weights"}


def __getattr__(name: str) -> Any:
    """`TemporalConvNet` and `load_weights`, imported with torch when first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "INPUT_FEATURES",
    "MODELS",
    "Input",
    "ModelSpec",
    "TemporalConvNet",
    "create",
    "input_shapes",
    "load_weights",
    "spec_of",
]
