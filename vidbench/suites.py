"""The named suites: tuples of Sweeps, and how a request changes them. Pure data, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from vidbench.models import MODELS, spec_of
from vidbench.sweep import AXES, POINT_AXES, Kind, Point, RequestError, Sweep, Value, unknown

Axes = Mapping[str, tuple[Value, ...]]


@dataclass(frozen=True)
class Suite:
    """A question that people ask, as sweeps."""

    name: str
    meaning: str
    sweeps: tuple[Sweep, ...]
    rounds: int = 1
    """Fresh processes that each take every point once; one of them cannot know its own noise."""
    seconds: float = 0.5
    """Budget for sampling one point in one round."""


IMPLEMENTATIONS = ("library", "compiled")
LAYOUTS = ("contiguous", "channels_last")
MODEL_AXES = ("clip_length", "batch_size", "input_size", "height", "width", "width_multiplier", "num_classes")
"""Axes that every model takes, whether its sweep names them or not."""

_CONV_AXES = ("in_channels", "clip_length", "batch_size", "height", "width", "input_size", "kernel_size", "stride",
              "padding")  # fmt: skip
_SEQUENCE_AXES = ("clip_length", "batch_size", "bias")
OP_AXES: dict[str, tuple[str, ...]] = {
    "conv3d": (*_CONV_AXES, "channels", "out_channels", "dilation", "bias"),
    "depthwise_conv3d": (*_CONV_AXES, "dilation", "bias"),
    "conv2plus1d": (*_CONV_AXES, "channels", "out_channels", "mid_channels"),
    "causal_conv1d": (*_SEQUENCE_AXES, "channels", "in_channels", "out_channels", "kernel_size", "dilation"),
    "tcn_block": (*_SEQUENCE_AXES, "channels", "in_channels", "out_channels", "kernel_size", "dilation", "dropout_p"),
    "rnn": (*_SEQUENCE_AXES, "input_features", "hidden_size", "return_sequence"),
    "lstm": (*_SEQUENCE_AXES, "input_features", "hidden_size", "return_sequence"),
}
"""Axes that an op takes, whether a sweep names them or not."""

_STATE_WIDTH = ("cnn_rnn", "cnn_lstm", "cnn_tcn", "tcn")


def _conv_sweeps(workload: str, layers: Iterable[Mapping[str, Value]], **axes: tuple[Value, ...]) -> tuple[Sweep, ...]:
    """One sweep per layer of the published networks."""
    default = {
        "clip_length": (8, 16, 32),
        "batch_size": (1, 4),
        "memory_format": LAYOUTS,
        "implementation": IMPLEMENTATIONS,
    }
    return tuple(Sweep(workload, axes={**default, **axes}, fixed=layer) for layer in layers)


CONV3D_LAYERS: tuple[dict[str, Value], ...] = (
    {"in_channels": 3, "out_channels": 64, "kernel_size": (3, 3, 3), "input_size": 112},  # C3D conv1a
    {"in_channels": 3, "out_channels": 64, "kernel_size": (7, 7, 7), "stride": (2, 2, 2), "input_size": 224},  # I3D
    {"in_channels": 192, "out_channels": 64, "kernel_size": (1, 1, 1), "input_size": 28},  # I3D Mixed_3b
    {"in_channels": 64, "out_channels": 64, "kernel_size": (3, 3, 3), "input_size": 56},  # R3D layer1
    {"in_channels": 128, "out_channels": 128, "kernel_size": (3, 3, 3), "input_size": 28},  # R3D layer2
    {"in_channels": 256, "out_channels": 256, "kernel_size": (3, 3, 3), "input_size": 14},  # R3D layer3
    {"in_channels": 512, "out_channels": 512, "kernel_size": (3, 3, 3), "input_size": 7},  # R3D layer4
)
CONV2PLUS1D_LAYERS: tuple[dict[str, Value], ...] = tuple(
    {"in_channels": channels, "out_channels": channels, "kernel_size": (3, 3, 3), "input_size": size}
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7))  # R(2+1)D layer1 to layer4
)
DEPTHWISE_LAYERS: tuple[dict[str, Value], ...] = tuple(
    {"in_channels": channels, "kernel_size": (3, 3, 3), "input_size": size}
    for channels, size in ((54, 56), (108, 28), (216, 14), (432, 7))  # X3D-M stages 2 to 5
)


def _temporal_sweeps(
    hidden_size: int, lengths: tuple[int, ...], implementations: tuple[str, ...], modes: tuple[str, ...] = ("forward",)
) -> tuple[Sweep, ...]:
    """RNN, LSTM, one TCN block, and a TCN whose receptive field covers the clip, all of one width."""
    axes: Axes = {"mode": modes, "clip_length": lengths, "batch_size": (1,), "implementation": implementations}
    recurrent: dict[str, Value] = {"input_features": hidden_size, "hidden_size": hidden_size}
    block: dict[str, Value] = {"channels": hidden_size, "kernel_size": 3, "dilation": 1}
    eager = tuple("eager" if name == "library" else name for name in implementations if name != "reference")
    return (
        Sweep("rnn", axes=axes, fixed=recurrent),
        Sweep("lstm", axes=axes, fixed=recurrent),
        Sweep("tcn_block", axes=axes, fixed=block),
        Sweep("tcn", "model", axes={**axes, "implementation": eager}, fixed={**recurrent, "num_classes": 400}),
    )


def model_sweep(name: str, axes: Axes | None = None, **fixed: Value) -> Sweep:
    """A model at its published frame size, unless told otherwise."""
    spec = spec_of(name)
    default: Axes = {"clip_length": (8, 16), "batch_size": (1,), "implementation": ("eager",)}
    size = {"input_size": spec.input_size} if "features" not in spec.inputs else {}
    return Sweep(name, "model", axes={**default, **(axes or {})}, fixed={**size, **fixed})


def _video_models() -> tuple[str, ...]:
    """The models that take clips, rather than features of their frames."""
    return tuple(name for name, spec in MODELS.items() if "features" not in spec.inputs)


SMALL: dict[str, float] = dict.fromkeys(("frame_pool_avg", "cnn_lstm", "cnn_tcn", "c3d"), 0.125)
"""Width multipliers at which these models train within seconds on a CPU."""


def _quick() -> tuple[Sweep, ...]:
    """Small cases of everything, and one task, for a first report within minutes on two cores."""
    conv: Axes = {"clip_length": (4, 8, 16), "batch_size": (1, 2), "implementation": ("library",)}
    layer: dict[str, Value] = {"in_channels": 32, "out_channels": 32, "kernel_size": (3, 3, 3), "input_size": 28}
    narrow: dict[str, Value] = {"in_channels": 54, "kernel_size": (3, 3, 3), "input_size": 28}
    small: Axes = {"clip_length": (8, 16, 32), "batch_size": (1, 2)}
    layouts: Axes = {**conv, "memory_format": LAYOUTS}
    train: dict[str, Value] = {"mode": "train", "implementation": "library"}
    return (
        Sweep("conv3d", axes=layouts, fixed=layer),
        Sweep("conv2plus1d", axes=conv, fixed=layer),
        Sweep("depthwise_conv3d", axes=layouts, fixed=narrow),
        Sweep("conv3d", axes={"clip_length": (4, 8, 16)}, fixed={**layer, **train, "batch_size": 1}),
        Sweep("conv2plus1d", axes={"clip_length": (4, 8, 16)}, fixed={**layer, **train, "batch_size": 1}),
        *_temporal_sweeps(128, (8, 32, 128, 512), ("library",)),
        *_temporal_sweeps(128, (64,), ("library",), ("stream",)),
        *(
            model_sweep(name, small, input_size=32, width_multiplier=width, num_classes=6)
            for name, width in SMALL.items()
        ),
        *(
            Sweep(
                name,
                "task",
                axes={"seed": (0,)},
                fixed={
                    "mode": "evaluate",
                    "implementation": "eager",
                    "task": "frame_order",
                    "clip_length": 16,
                    "input_size": 32,
                    "width_multiplier": width,
                },
            )
            for name, width in SMALL.items()
        ),
    )


def _full() -> tuple[Sweep, ...]:
    """Everything, compiled and in training too: hours on a CPU."""
    both: Axes = {"mode": ("forward", "train")}
    compiled: Axes = {"clip_length": (8, 16, 32), "implementation": ("eager", "compiled"), **both}
    return (
        *_conv_sweeps("conv3d", CONV3D_LAYERS, **both),
        *_conv_sweeps("conv2plus1d", CONV2PLUS1D_LAYERS, **both),
        *_conv_sweeps("depthwise_conv3d", DEPTHWISE_LAYERS, **both),
        *SUITES["temporal"].sweeps,
        *(model_sweep(name, compiled) for name in _video_models()),
    )


_LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("quick", "small cases of everything and one task: a first report in minutes", _quick(), 3, 0.15),
        Suite("conv3d", "dense 3D convolutions of C3D, I3D and R3D-18", _conv_sweeps("conv3d", CONV3D_LAYERS)),
        Suite(
            "conv2plus1d",
            "the (2+1)D pairs of R(2+1)D-18",
            _conv_sweeps("conv2plus1d", CONV2PLUS1D_LAYERS),
        ),
        Suite(
            "depthwise",
            "the depthwise 3D convolutions of X3D-M",
            _conv_sweeps("depthwise_conv3d", DEPTHWISE_LAYERS),
        ),
        Suite(
            "temporal",
            "RNN, LSTM and TCN over clip lengths 8 to 1024 at equal hidden size",
            (
                *_temporal_sweeps(256, _LENGTHS, IMPLEMENTATIONS),
                *_temporal_sweeps(256, (8, 64, 512), ("library",), ("train",)),
                *_temporal_sweeps(256, (16, 256), ("library",), ("stream",)),
            ),
        ),
        Suite("models", "every model at its published size", tuple(model_sweep(name) for name in _video_models())),
    )
}
SUITES["full"] = Suite("full", "all of the above but quick's, compiled and in training too: hours on a CPU", _full())


def plan(suite: str, *, axes: Axes | None = None, model_names: Iterable[str] = (), video: str | None = None) -> Suite:
    """A suite as a request changes it.

    Args:
        suite: Its name.
        axes: Values that replace the suite's own.
        model_names: Models measured instead of the suite's own, `package.module:factory` among them.
        video: Name of the video file that clips are taken from; adds the stages before the model.

    Raises:
        RequestError: An unknown suite or model, or an axis that nothing in the suite has.
    """
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    chosen = SUITES[suite]
    sweeps = chosen.sweeps
    if names := tuple(model_names):
        others = tuple(sweep for sweep in sweeps if sweep.kind == "op")
        sweeps = (*(others if suite == "full" else ()), *(model_sweep(name) for name in names))
    sweeps = _with_axes(suite, sweeps, axes or {})
    if video is not None:
        sweeps = _with_video(suite, sweeps, video)
    return replace(chosen, sweeps=sweeps)


def _with_axes(suite: str, sweeps: tuple[Sweep, ...], axes: Axes) -> tuple[Sweep, ...]:
    """The axes given, on every sweep that takes them."""
    taken: set[str] = set()
    changed = []
    for sweep in sweeps:
        taken |= _takes(sweep) & set(axes)
        changed.append(sweep.override(_mine(sweep, axes)))
    for name in axes:
        if name not in taken:
            has = sorted({axis for sweep in sweeps for axis in _takes(sweep) if axis in AXES})
            raise RequestError(f"suite {suite!r} has no axis {name!r}: it has {', '.join(has)}")
    return tuple(changed)


def _mine(sweep: Sweep, axes: Axes) -> dict[str, tuple[Value, ...]]:
    """Of some axes those that a sweep takes; what is called otherwise there, but compared at equal width, too."""
    mine = {name: values for name, values in axes.items() if name in _takes(sweep)}
    if sweep.workload == "tcn_block" and "hidden_size" in axes:
        mine.setdefault("channels", axes["hidden_size"])
    return mine


def _takes(sweep: Sweep) -> set[str]:
    """The axes that may be set on a sweep. A task's clips are its own: only its seed may change."""
    if sweep.kind == "task":
        return {"seed"}
    takes = {*sweep.names(), *POINT_AXES}
    if sweep.kind == "op":
        return takes | set(OP_AXES[sweep.workload])
    takes |= {"clip_length", "batch_size", "num_classes", "width_multiplier"}
    if "features" not in spec_of(sweep.workload).inputs:
        takes |= set(MODEL_AXES)
    if sweep.workload in _STATE_WIDTH:
        takes.add("hidden_size")
    return takes


def _with_video(suite: str, sweeps: tuple[Sweep, ...], video: str) -> tuple[Sweep, ...]:
    """The models fed from a video, preceded by the stages that feed them."""
    fed = [s for s in sweeps if s.kind == "model" and "features" not in spec_of(s.workload).inputs]
    if not fed:
        raise RequestError(f"--input feeds clips to models, and suite {suite!r} has none: use `models` or --model")
    stages: dict[str, dict[str, Value]] = {}
    for sweep in fed:
        with_flow = "flow" in spec_of(sweep.workload).inputs
        for point in sweep.points():
            case = {name: point.case[name] for name in ("batch_size", "clip_length") if name in point.case}
            frames = {**case, "height": point.case["height"], "width": point.case["width"]}
            stages.setdefault(f"decode {case}", {"workload": "decode", "implementation": "pyav", **case})
            stages.setdefault(f"resize {frames}", {"workload": "resize_normalise", "implementation": "torch", **frames})
            if with_flow:
                stages.setdefault(
                    f"flow {frames}", {"workload": "optical_flow", "implementation": "opencv_dis", **frames}
                )
    before = []
    for values in stages.values():
        workload = str(values.pop("workload"))
        before.append(Sweep(workload, "stage", fixed={**values, "video": video}))
    models = [replace(sweep, fixed={**sweep.fixed, "video": video}) for sweep in fed]
    rest = [sweep for sweep in sweeps if sweep not in fed]
    return (*before, *models, *rest)


STAGES = ("decode", "resize_normalise", "optical_flow")


def point_named(text: str, axes: Axes) -> Point:
    """One point, by its key (as a report has it), or by a workload's name and one value for each axis that matters.

    Args:
        text: conv3d/library/forward/hot/cpu/fp32/contiguous/clip_length=8,…; or conv3d, or package.module:factory.
        axes: Values in place of the key's or the default ones.

    Raises:
        RequestError: No such workload, a key that is none, or several values of an axis.
    """
    for name, values in axes.items():
        if len(values) != 1:
            raise RequestError(f"{name}={','.join(map(str, values))}: one point has one value of each axis; give one")
    workload, *fields = text.split("/")
    if not fields:
        return next(_sweep_of(workload).override(axes).points())
    if len(fields) != len(POINT_AXES) + 1:
        raise RequestError(
            f"{text!r} is no point's key: wanted workload/{'/'.join(POINT_AXES)}/name=value,…, as a report has it"
        )
    fixed: dict[str, Value] = {name: AXES[name].parse(value) for name, value in zip(POINT_AXES, fields, strict=False)}
    for pair in filter(None, fields[-1].split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"{pair!r} in the key {text!r} is not name=value")
        fixed[name] = AXES[name].parse(value) if name in AXES else value
    return next(Sweep(workload, _kind_of(workload), fixed=fixed).override(axes).points())


def point_like(workload: str, axes: Axes) -> Point:
    """A workload at the sizes of another, as far as it has them.

    Raises:
        RequestError: No such workload.
    """
    sweep = _sweep_of(workload)
    return next(sweep.override(_mine(sweep, axes)).points())


def _kind_of(workload: str) -> Kind:
    if workload in OP_AXES:
        return "op"
    if workload in STAGES:
        return "stage"
    spec_of(workload)
    return "model"


def _sweep_of(workload: str) -> Sweep:
    """A workload at its default sizes."""
    kind = _kind_of(workload)
    if kind == "op":
        return Sweep(workload, fixed={"implementation": "library"})
    if kind == "stage":
        raise RequestError(f"{workload!r} is a stage of the pipeline: give its whole key, as a report has it")
    return model_sweep(workload)
