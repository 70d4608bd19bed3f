"""The claims: what the textbooks and papers of video classification say, and how each is tested."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vidbench.claims import Claim, Experiment, Plot, Prediction, per_seed
from vidbench.sweep import Value, unknown
from vidkernels.shapes import tcn_receptive_field

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Size:
    """How much is done."""

    name: str
    seeds: int
    patience: float
    """Factor on the steps of every training."""
    memory_lengths: tuple[int, ...]
    """Frames over which something is to be remembered."""
    timed_lengths: tuple[int, ...]
    """Frames of the clips that are timed."""


SIZES = {
    size.name: size
    for size in (
        Size("small", 3, 1.0, (8, 16, 32, 64), (16, 32, 64, 128, 256, 512, 1024)),
        Size("full", 5, 3.0, (8, 16, 32, 64, 128, 256), (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)),
    )
}

OWN = "vidbench.claims.contenders"
POINTS = "points"
MATTERS = 5.0
"""Points of accuracy that would change anybody's choice."""

_RECIPES: dict[str, dict[str, Value]] = {
    "frame": {"width_multiplier": 0.0625, "learning_rate": 5e-3, "batch_size": 24},
    "frame_tcn": {"width_multiplier": 0.0625, "learning_rate": 3e-3, "batch_size": 24},
    "3d": {"width_multiplier": 0.0625, "learning_rate": 2e-3, "batch_size": 24, "dropout": 0.0},
    "residual": {"width_multiplier": 0.0625, "learning_rate": 1e-2, "batch_size": 24},
    "fusion": {"width_multiplier": 0.125, "learning_rate": 2e-3, "batch_size": 24, "dropout": 0.0},
    "stream": {"width_multiplier": 0.125, "learning_rate": 2e-3, "batch_size": 24},
    "features": {"width_multiplier": 0.25, "learning_rate": 2e-3, "batch_size": 32},
    "gates": {"width_multiplier": 0.25, "learning_rate": 5e-3, "batch_size": 32},
}
"""How each kind of network is trained on two cores; what is compared within a claim sees equally many clips."""

_KIND = {
    "frame_pool_avg": "frame",
    "frame_pool_max": "frame",
    "cnn_lstm": "frame",
    "cnn_tcn": "frame_tcn",
    "c3d": "3d",
    "r3d_18": "residual",
    "r2plus1d_18": "residual",
    "early_fusion": "fusion",
    "late_fusion": "fusion",
    "slow_fusion": "fusion",
    f"{OWN}:lstm": "gates",
    f"{OWN}:lstm_forget_bias": "gates",
    f"{OWN}:spatial_stream": "stream",
    f"{OWN}:temporal_stream": "stream",
    f"{OWN}:two_streams": "stream",
}


def claims(size_name: str) -> tuple[Claim, ...]:
    """The claims at a size, small or full.

    Raises:
        RequestError: No such size.
    """
    if size_name not in SIZES:
        raise unknown("size", size_name, SIZES)
    size = SIZES[size_name]
    return tuple(make(size) for make in _CLAIMS)


def _experiments(
    kind: str, size: Size, model_names: Sequence[str], steps: int, **given: Value
) -> tuple[Experiment, ...]:
    """One experiment for every model and seed, the models side by side."""
    return tuple(
        Experiment(
            kind,
            {
                "model": name,
                **_RECIPES[_KIND.get(name, "features")],
                "steps": round(steps * size.patience),
                **given,
            },
            seed,
        )
        for seed in range(size.seeds)
        for name in model_names
    )


Effect = Callable[["pd.DataFrame"], list[float]]


def _value(value: str, *, scale: float = 1.0, plus: float = 0.0, **where: Value) -> Effect:
    """Of every seed, a value times `scale` plus `plus`."""
    return lambda table: [plus + scale * one for one in per_seed(table, value, **where)]


def _difference(
    value: str, one: dict[str, Value], other: dict[str, Value], *, scale: float = 100.0, **where: Value
) -> Effect:
    """Of every seed, `scale` times a value of one less that of the other; accuracies become points."""

    def effect(table: pd.DataFrame) -> list[float]:
        gap = per_seed(table, value, **where, **one) - per_seed(table, value, **where, **other)
        return [scale * seed for seed in gap.dropna()]

    return effect


def _ratio(value: str, one: dict[str, Value], other: dict[str, Value], **where: Value) -> Effect:
    """Of every seed, a value of one over that of the other."""

    def effect(table: pd.DataFrame) -> list[float]:
        quotient = per_seed(table, value, **where, **one) / per_seed(table, value, **where, **other)
        return list(quotient.dropna())

    return effect


def _model(name: str) -> dict[str, Value]:
    return {"model": name}


def _above(says: str, share: float, **where: Value) -> Prediction:
    """A control: an accuracy of at least so much."""
    return Prediction(says, POINTS, 0.0, _value("top1", scale=100, plus=-100 * share, **where))


def _pooling_loses_order(size: Size) -> Claim:
    order = "frame_order"
    return Claim(
        name="pooling_loses_order",
        says="Pooling the features of frames over time loses temporal information.",
        source="Ng et al. (2015), arXiv:1503.08909, §3.1; Karpathy et al. (2014), §1",
        protocol="Average and max pooling against an LSTM over the same 2D CNN, on the order of three events, of "
        "which every class shows the very same frames. That the pools were trained well enough is seen on "
        "appearance.",
        experiments=(
            *_experiments("trial", size, ("frame_pool_avg", "frame_pool_max", "cnn_lstm"), 200, task=order),
            *_experiments("trial", size, ("frame_pool_avg",), 200, task="appearance"),
        ),
        predictions=tuple(
            Prediction(
                f"an LSTM is more accurate than {words} pooling",
                POINTS,
                20.0,
                _difference("top1", _model("cnn_lstm"), _model(pool), task=order),
            )
            for pool, words in (("frame_pool_avg", "average"), ("frame_pool_max", "max"))
        ),
        controls=(
            _above("average pooling reaches 85 % on appearance", 0.85, model="frame_pool_avg", task="appearance"),
        ),
        plot=Plot("model", "top1", "task", "", "top-1 accuracy", percent=True, level=1 / 6),
    )


def _pooling_salient(size: Size) -> Claim:
    pools = ("frame_pool_avg", "frame_pool_max")
    return Claim(
        name="pooling_favours_salient_frames",
        says="Pooling favours salient frames.",
        source="Ng et al. (2015), arXiv:1503.08909, §3.1",
        protocol="A clip shows one shape strongly in four of its sixteen frames and another one faintly in the other "
        "twelve. Salient frames are favoured where the four outvote the twelve. Both kinds of clip were trained on, "
        "each by itself, and the faint shape by itself must be recognised.",
        experiments=_experiments("salience", size, pools, 250, strong=256, faint=160),
        predictions=tuple(
            Prediction(
                f"{words} pooling answers the four salient frames of sixteen more often than not",
                POINTS,
                0.0,
                _value("salient", scale=100, plus=-50, model=pool, share=0.25),
            )
            for pool, words in zip(pools, ("average", "max"), strict=True)
        ),
        controls=tuple(
            Prediction(
                f"{words} pooling recognises 80 % of the faint shapes by themselves",
                POINTS,
                0.0,
                _value("faint_answers", scale=100, plus=-80, model=pool, share=0.0),
            )
            for pool, words in zip(pools, ("average", "max"), strict=True)
        ),
        plot=Plot(
            "share", "salient", "model", "share of salient frames", "answers that are the salient shape", percent=True
        ),
    )


_RNN, _LSTM, _BIASED = f"{OWN}:rnn", f"{OWN}:lstm", f"{OWN}:lstm_forget_bias"
_GRADIENT_LENGTH = 64


def _lag_decades(model: str) -> Callable[[pd.DataFrame], pd.Series]:
    """Of every seed, the decades by which the gradient shrinks from the last frame to the first but one."""

    def decades(table: pd.DataFrame) -> pd.Series:
        near = per_seed(table, "norm", kind="gradient", model=model, lag=0)
        far = per_seed(table, "norm", kind="gradient", model=model, lag=_GRADIENT_LENGTH - 1)
        return (near / far.clip(lower=1e-38)).map(math.log10)

    return decades


def _gradients(size: Size, *names: str) -> tuple[Experiment, ...]:
    task = f"token_memory:clip_length={_GRADIENT_LENGTH}"
    return tuple(
        Experiment("gradient", {"model": name, "task": task, "steps": 0, "width_multiplier": 0.25}, seed)
        for seed in range(size.seeds)
        for name in names
    )


def _rnn_forgets(size: Size) -> Claim:
    lengths, names = size.memory_lengths, (_RNN, _LSTM, _BIASED)

    def shrinks_more(table: pd.DataFrame) -> list[float]:
        return list((_lag_decades(_RNN)(table) - _lag_decades(_LSTM)(table)).dropna())

    return Claim(
        name="rnn_forgets_lstm_remembers",
        says="An RNN is not able to learn long-term dependencies; an LSTM is better at it.",
        source="Bengio et al. (1994); Hochreiter & Schmidhuber (1997)",
        protocol=f"Which of four cues comes first, followed by distractors to the end of clips of "
        f"{', '.join(map(str, lengths))} frames of features, 64 units; and how much smaller ∂loss/∂input is "
        f"{_GRADIENT_LENGTH - 1} frames before the last than at it, before training. The LSTM is as torch makes it; "
        "one with a forget bias of 5 stands beside it.",
        experiments=(
            *(
                one
                for length in lengths
                for one in _experiments(
                    "trial", size, names, 1000, task=_memory(length), length=length
                )
            ),
            *_gradients(size, _RNN, _LSTM, _BIASED),
        ),
        predictions=(
            Prediction(
                f"over {lengths[-1]} frames an RNN stays below the middle between chance and perfect",
                POINTS,
                0.0,
                _value("top1", scale=-100, plus=62.5, model=_RNN, task=_memory(lengths[-1])),
            ),
            Prediction(
                "over all lengths an LSTM is more accurate than an RNN",
                POINTS,
                MATTERS,
                _difference("top1", _model(_LSTM), _model(_RNN)),
            ),
            Prediction("an RNN's gradient shrinks more over the lag than an LSTM's", "decades", 0.5, shrinks_more),
        ),
        plot=Plot(
            "length", "top1", "model", "clip length, frames", "top-1 accuracy", {"kind": "trial"}, log_x=True,
            percent=True, level=0.25,
        ),
        controls=(
            _above("an LSTM reaches 90 % over the shortest clips", 0.9, model=_LSTM, task=_memory(lengths[0])),
        ),
    )  # fmt: skip


def _memory(length: int) -> str:
    """The task's one name; 32 is its default."""
    return "token_memory" if length == 32 else f"token_memory:clip_length={length}"


def _timings(size: Size, points: Sequence[dict[str, Value]]) -> tuple[Experiment, ...]:
    """Every round is a fresh process and plays the part of a seed."""
    return tuple(Experiment("timing", point, number) for number in range(1, size.seeds + 1) for point in points)


_HIDDEN = 256


def _sequence_points(size: Size, modes: Sequence[str]) -> tuple[Experiment, ...]:
    common: dict[str, Value] = {"input_features": _HIDDEN, "hidden_size": _HIDDEN, "batch_size": 1}
    networks: tuple[dict[str, Value], ...] = (
        {"workload": "lstm", "workload_kind": "op", "implementation": "library"},
        {"workload": "tcn", "workload_kind": "model", "implementation": "eager", "num_classes": 400},
    )
    return _timings(
        size,
        [
            {**common, **network, "mode": mode, "clip_length": length}
            for mode, length in itertools.product(modes, size.timed_lengths)
            for network in networks
        ],
    )


def _slope(table: pd.DataFrame, workload: str, mode: str) -> dict[int, float]:
    """Of every round, the exponent p of latency ∝ clip_length^p, by least squares in logarithms."""
    chosen = table[(table["workload"] == workload) & (table["mode"] == mode)]
    slopes: dict[int, float] = {}
    for seed, part in chosen.groupby("seed"):
        x, y = part["clip_length"].map(math.log), part["latency_s"].map(math.log)
        slopes[int(str(seed))] = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return slopes


def _lstm_is_serial(size: Size) -> Claim:
    def flatter(mode: str) -> Effect:
        def effect(table: pd.DataFrame) -> list[float]:
            recurrent, convolutional = _slope(table, "lstm", mode), _slope(table, "tcn", mode)
            return [recurrent[seed] - convolutional[seed] for seed in recurrent if seed in convolutional]

        return effect

    return Claim(
        name="lstm_is_serial_tcn_is_not",
        says="An LSTM cannot be parallelised over time; a TCN can.",
        source="Bai et al. (2018), arXiv:1803.01271, §3.5",
        protocol="Latency of an LSTM layer and of a TCN whose receptive field covers the clip, both of width 256, "
        f"one clip of {size.timed_lengths[0]} to {size.timed_lengths[-1]} frames of features, forward and in "
        "training. What is parallel over time grows with a smaller power of the clip length, as long as the machine "
        "has units to spare.",
        experiments=_sequence_points(size, ("forward", "train")),
        predictions=tuple(
            Prediction(
                f"{words}, an LSTM's latency grows with a higher power of the clip length than a TCN's",
                "in the exponent",
                0.1,
                flatter(mode),
            )
            for mode, words in (("forward", "forward"), ("train", "in training"))
        ),
        plot=Plot(
            "clip_length", "latency_s", "workload", "clip length, frames", "seconds per clip, forward",
            {"mode": "forward"}, log_x=True, log_y=True,
        ),
    )  # fmt: skip


def _tcn_field_is_flexible(size: Size) -> Claim:
    task = "token_memory:clip_length=40"
    networks: tuple[dict[str, Value], ...] = (
        {"levels": 3, "kernel_size": 3},
        {"levels": 4, "kernel_size": 3},
        {"levels": 3, "kernel_size": 5},
    )
    short, deep, wide = (
        {**network, "field": _field(int(str(network["levels"])), int(str(network["kernel_size"])))}
        for network in networks
    )
    changes = {"one level more makes": deep, "longer filters make": wide}
    return Claim(
        name="tcn_field_is_flexible",
        says="A TCN's receptive field is flexible: more levels, larger dilations or longer filters change it at will.",
        source="Bai et al. (2018), arXiv:1803.01271, §3.5",
        protocol="A cue in the first of 40 frames, distractors after it. A TCN whose field is 29 frames cannot see "
        "it; one level more (61 frames) or filters of five taps (57 frames) can.",
        experiments=tuple(
            one
            for network in (short, deep, wide)
            for one in _experiments("trial", size, ("tcn",), 400, task=task, **network)
        ),
        predictions=tuple(
            Prediction(
                f"{words} the task soluble",
                POINTS,
                20.0,
                _difference("top1", {"field": network["field"]}, {"field": short["field"]}, task=task),
            )
            for words, network in changes.items()
        ),
        plot=Plot("field", "top1", "model", "receptive field, frames", "top-1 accuracy", percent=True, level=0.25),
    )


def _field(levels: int, kernel_size: int) -> int:
    return tcn_receptive_field(kernel_size, (2**i for i in range(levels)))


def _tcn_gradients_are_stable(size: Size) -> Claim:
    def steadier(table: pd.DataFrame) -> list[float]:
        return list((_lag_decades(_LSTM)(table) - _lag_decades("tcn")(table)).dropna())

    return Claim(
        name="tcn_gradients_are_stable",
        says="A TCN's gradients are more stable than a recurrent network's: its paths through time are short.",
        source="Bai et al. (2018), arXiv:1803.01271, §3.5",
        protocol=f"∂loss/∂input {_GRADIENT_LENGTH - 1} frames before the last against that at the last, before "
        "training, of 64 units on features; the TCN's receptive field covers the clip.",
        experiments=_gradients(size, _RNN, _LSTM, _BIASED, "tcn"),
        predictions=(
            Prediction("an LSTM's gradient shrinks more over the lag than a TCN's", "decades", 1.0, steadier),
        ),
        plot=Plot("lag", "norm", "model", "frames before the last", "‖∂loss/∂input‖", {"kind": "gradient"}, log_y=True),
    )


def _tcn_trains_in_less_memory(size: Size) -> Claim:
    length = size.timed_lengths[-2]
    return Claim(
        name="tcn_trains_in_less_memory",
        says="A TCN needs less memory in training than an LSTM.",
        source="Bai et al. (2018), arXiv:1803.01271, §3.5",
        protocol="The most bytes of tensors alive at once in a training step, weights and inputs apart, of the "
        f"layers timed above, over a clip of {length} frames.",
        experiments=_sequence_points(size, ("train",)),
        predictions=(
            Prediction(
                "an LSTM's training step holds more than a TCN's",
                "times as much",
                1.0,
                _ratio("peak_bytes", {"workload": "lstm"}, {"workload": "tcn"}, mode="train", clip_length=length),
            ),
        ),
        plot=Plot(
            "clip_length", "peak_bytes", "workload", "clip length, frames", "bytes in a training step",
            {"mode": "train"}, log_x=True, log_y=True,
        ),
    )  # fmt: skip


def _tcn_streams_in_more_memory(size: Size) -> Claim:
    lengths = size.timed_lengths
    return Claim(
        name="tcn_streams_in_more_memory",
        says="In evaluation a TCN has to keep the raw history up to its receptive field; an LSTM keeps a state.",
        source="Bai et al. (2018), arXiv:1803.01271, §3.5, among the disadvantages",
        protocol="Bytes carried from frame to frame of a stream, of width 256, by receptive field: counted.",
        experiments=tuple(
            Experiment("stream_state", {"model": name, "clip_length": length, "hidden_size": _HIDDEN}, 0)
            for length in lengths
            for name in (_LSTM, "tcn")
        ),
        predictions=(
            Prediction(
                f"with a field of {lengths[0]} frames a TCN already carries more than an LSTM",
                "times as much",
                1.0,
                _ratio("state_bytes", _model("tcn"), _model(_LSTM), clip_length=lengths[0]),
                exact=True,
            ),
        ),
        plot=Plot(
            "clip_length", "state_bytes", "model", "frames that the receptive field covers", "bytes carried",
            log_x=True, log_y=True,
        ),
    )  # fmt: skip


def _tcn_transfers(size: Size) -> Claim:
    names = ("cnn_lstm", "cnn_tcn")

    def gain(model: str) -> Effect:
        return _difference("top1", {"begun": "pre-trained"}, {"begun": "scratch"}, model=model)

    return Claim(
        name="pre_training_transfers_for_tcn_not_lstm",
        says="Pre-training transfers for a TCN and not for an LSTM.",
        source="lecture notes on video classification; Bai et al. (2018), §3.5, list transfer among a TCN's "
        "weaknesses",
        protocol="The order of three events in another look (squares on stripes), 48 clips to train on: from "
        "scratch, and from weights learnt on discs on grey noise.",
        experiments=_experiments(
            "transfer", size, names, 200, source="frame_order", target="frame_order:domain=b", examples=48,
            tuning_steps=round(80 * size.patience),
        ),
        predictions=(
            Prediction("pre-training helps a TCN", POINTS, MATTERS, gain("cnn_tcn")),
            Prediction(
                "pre-training does not help an LSTM",
                POINTS,
                -MATTERS,
                _difference("top1", {"begun": "scratch"}, {"begun": "pre-trained"}, model="cnn_lstm"),
            ),
        ),
        plot=Plot("model", "top1", "begun", "", "top-1 accuracy", percent=True, level=1 / 6),
        controls=tuple(
            Prediction(
                f"{name} learns the first look to 90 %",
                POINTS,
                0.0,
                _value("top1", scale=100, plus=-90, model=name, begun="source"),
            )
            for name in names
        ),
    )  # fmt: skip


def _lstm_needs_data(size: Size) -> Claim:
    task, counts = "token_memory:clip_length=16", (64, 256, 1024)
    names = (_LSTM, "tcn")
    return Claim(
        name="lstm_is_poor_on_small_data",
        says="An LSTM does poorly on small data, against a TCN.",
        source="lecture notes on video classification",
        protocol=f"Learning curves on 16 frames of features: {', '.join(map(str, counts))} examples, over and over "
        "for the same number of steps, and no limit. Both must learn the task where data are plenty.",
        experiments=tuple(
            one
            for count in (*counts, 0)
            for one in _experiments(
                "trial", size, names, 600, task=task, count=count or 19200, **({"examples": count} if count else {})
            )
        ),
        predictions=tuple(
            Prediction(
                f"of {count} examples a TCN learns more than an LSTM",
                POINTS,
                MATTERS,
                _difference("top1", _model("tcn"), _model(_LSTM), task=task, count=count),
            )
            for count in counts[1:2]
        ),
        controls=tuple(
            _above(f"{words} reaches 90 % without a limit", 0.9, model=name, task=task, count=19200)
            for name, words in ((_LSTM, "an LSTM"), ("tcn", "a TCN"))
        ),
        plot=Plot(
            "count", "top1", "model", "different examples seen", "top-1 accuracy", log_x=True, percent=True, level=0.25
        ),
    )


def _flow_is_short_term(size: Size) -> Claim:
    stream = f"{OWN}:temporal_stream"
    far = "frame_order:clip_length=40:delay=12"
    return Claim(
        name="flow_is_short_term",
        says="Optical flow captures short-term motion only.",
        source="Simonyan & Zisserman (2014), arXiv:1406.2199, §2; Wang et al. (2016), arXiv:1608.00859, §1",
        protocol="The temporal stream (ten flow fields from the middle of the clip, DIS) on the direction of a "
        "motion that every two frames show, and on the order of three events 12 frames apart, of which ten fields "
        "hold one; an LSTM over frames on the latter.",
        experiments=(
            *_experiments("trial", size, (stream,), 150, task="time_direction"),
            *_experiments("trial", size, (stream,), 150, task=far),
            *_experiments("trial", size, ("cnn_lstm",), 150, task=far),
        ),
        predictions=(
            Prediction(
                "flow tells the direction of a motion",
                "points above chance",
                20.0,
                _value("top1", scale=100, plus=-50, model=stream, task="time_direction"),
            ),
            Prediction(
                "an LSTM over frames tells the order of distant events better than flow",
                POINTS,
                20.0,
                _difference("top1", _model("cnn_lstm"), _model(stream), task=far),
            ),
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True),
    )


def _conv3d_reads_order(size: Size) -> Claim:
    tasks = ("frame_order", "time_direction")
    return Claim(
        name="conv3d_beats_pooling_on_order",
        says="3D convolution models motion and order, which pooling over 2D features does not.",
        source="Tran et al. (2015), arXiv:1412.0767, §1",
        protocol="C3D against the average over a 2D CNN's frames, on the order of three events and on the direction "
        "of time.",
        experiments=tuple(
            one for task in tasks for one in _experiments("trial", size, ("frame_pool_avg", "c3d"), 200, task=task)
        ),
        predictions=tuple(
            Prediction(
                f"C3D is more accurate than average pooling on {task}",
                POINTS,
                20.0,
                _difference("top1", _model("c3d"), _model("frame_pool_avg"), task=task),
            )
            for task in tasks
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True),
    )


def _threshold(table: pd.DataFrame, model: str) -> dict[int, float]:
    """Of every seed, log2 of the amplitude at which accuracy passes 75 %, between neighbours on a logarithmic scale.

    Where even the largest amplitude does not reach it, twice that; where the smallest does, half of that.
    """
    found: dict[int, float] = {}
    chosen = table[(table["kind"] == "amplitude") & (table["model"] == model)]
    for seed, part in chosen.groupby("seed"):
        curve = part.sort_values("amplitude")
        x, y = curve["amplitude"].map(math.log2).tolist(), curve["top1"].tolist()
        place = x[-1] + 1
        for i in range(len(x) - 1, -1, -1):  # from the largest amplitude down, as long as it is told
            if y[i] < 0.75:
                break
            below = y[i - 1] if i else 0.5
            step = x[i] - x[i - 1] if i else 1.0
            place = x[i] - step * (y[i] - 0.75) / (y[i] - below) if below < 0.75 else x[i]
        found[int(str(seed))] = place
    return found


def _finer(one: str, other: str) -> Effect:
    """Of every seed, by how many times the threshold of `one` is that of `other`, as a power of two."""

    def effect(table: pd.DataFrame) -> list[float]:
        first, second = _threshold(table, one), _threshold(table, other)
        return [first[seed] - second[seed] for seed in first if seed in second]

    return effect


_AMPLITUDE_STEPS = 400


def _rigid_kernels(size: Size) -> Claim:
    names = ("c3d", "early_fusion")
    return Claim(
        name="rigid_kernels_miss_subtle_motion",
        says="The rigid 3×3×3 kernel of 3D networks misses subtle motion.",
        source="lecture notes on video classification",
        protocol="Which way a texture moves, by a sixteenth of a pixel to eight in all: the amplitude at which "
        "accuracy passes 75 %, of C3D, whose kernels see three frames, and of early fusion, whose first sees them "
        "all. The first half of the training shows the largest alone.",
        experiments=_experiments("amplitude", size, names, _AMPLITUDE_STEPS, pattern="texture"),
        predictions=(
            Prediction(
                "C3D needs larger motions than early fusion", "doublings of the amplitude", 0.25, _finer(*names)
            ),
        ),
        plot=Plot(
            "amplitude", "top1", "model", "motion in all, pixels", "top-1 accuracy", log_x=True, percent=True, level=0.5
        ),
        controls=(_above("early fusion tells the largest motion in 85 %", 0.85, model="early_fusion", amplitude=8.0),),
    )


def _lstm_misses_subtle(size: Size) -> Claim:
    names = ("cnn_lstm", "cnn_tcn")
    return Claim(
        name="lstm_misses_subtle_change",
        says="An LSTM keeps strong temporal change and misses subtle change, which a TCN sees.",
        source="lecture notes on video classification",
        protocol="Which way a disc moves, by three quarters of a pixel to 48 in all: the amplitude at which accuracy "
        "passes 75 %, of an LSTM and of a TCN over the same 2D CNN. The first half of the training shows the largest "
        "alone.",
        experiments=_experiments("amplitude", size, names, _AMPLITUDE_STEPS, pattern="disc"),
        predictions=(
            Prediction("an LSTM needs larger motions than a TCN", "doublings of the amplitude", 0.25, _finer(*names)),
        ),
        plot=Plot(
            "amplitude", "top1", "model", "motion in all, pixels", "top-1 accuracy", log_x=True, percent=True, level=0.5
        ),
        controls=(_above("an LSTM tells the largest motion in 85 %", 0.85, model="cnn_lstm", amplitude=48.0),),
    )


_FACTORISED: dict[str, Value] = {"model": "r2plus1d_18"}
_WHOLE: dict[str, Value] = {"model": "r3d_18"}


def _twice_the_nonlinearities(size: Size) -> Claim:
    def closeness(table: pd.DataFrame) -> list[float]:
        return [0.1 - abs(ratio - 1) for ratio in _ratio("params", _FACTORISED, _WHOLE)(table)]

    return Claim(
        name="r2plus1d_doubles_nonlinearities",
        says="R(2+1)D has nearly twice the non-linearities of R3D at equal parameters.",
        source="Tran et al. (2018), arXiv:1711.11248, §3.5",
        protocol="Rectifications in one forward pass and parameters of the 18-layer networks as published: counted.",
        experiments=tuple(
            Experiment("relus", model, 0) for model in (_FACTORISED, _WHOLE)
        ),
        predictions=(
            Prediction(
                "R(2+1)D rectifies nearly twice as often", "times as often", 1.8,
                _ratio("relus", _FACTORISED, _WHOLE), exact=True,
            ),
            Prediction("parameters agree within a tenth", "of them to spare", 0.0, closeness, exact=True),
        ),
        plot=Plot("model", "relus", "model", "", "rectifications in a forward pass"),
    )  # fmt: skip


def _easier_to_optimise(size: Size) -> Claim:
    return Claim(
        name="r2plus1d_is_easier_to_optimise",
        says="R(2+1)D is easier to optimise than R3D.",
        source="Tran et al. (2018), arXiv:1711.11248, §3.5 and figure 3",
        protocol="Training loss, the mean over equally many steps, the networks at a sixteenth of their width, on "
        "the direction of time.",
        experiments=_experiments("trial", size, ("r2plus1d_18", "r3d_18"), 150, task="time_direction"),
        predictions=(
            Prediction(
                "R3D's training loss is higher",
                "nats",
                0.02,
                _difference("loss", _WHOLE, _FACTORISED, scale=1.0, task="time_direction"),
            ),
        ),
        plot=Plot("model", "loss", "model", "", "mean training loss, nats"),
    )


def _slow_fusion_is_best(size: Size) -> Claim:
    names = ("early_fusion", "late_fusion", "slow_fusion")
    return Claim(
        name="slow_fusion_is_best",
        says="Slow fusion does better than early and late fusion.",
        source="Karpathy et al. (2014), §4.1 and table 1",
        protocol="The three at an eighth of their width on the motion of short-lived dots, on equally many clips.",
        experiments=_experiments("trial", size, names, 300, task="random_dots"),
        predictions=tuple(
            Prediction(
                f"slow fusion is more accurate than {words} fusion",
                POINTS,
                0.0,
                _difference("top1", _model("slow_fusion"), _model(name), task="random_dots"),
            )
            for name, words in zip(names[:2], ("early", "late"), strict=True)
        ),
        plot=Plot("model", "top1", "model", "", "top-1 accuracy", percent=True, level=0.5),
    )


def _streams_are_not_aligned(size: Size) -> Claim:
    together = f"{OWN}:two_streams"
    apart = (f"{OWN}:spatial_stream", f"{OWN}:temporal_stream")
    return Claim(
        name="two_streams_are_not_aligned",
        says="The two streams complement each other, but nothing aligns them: what moved is not known to be what "
        "was seen.",
        source="Simonyan & Zisserman (2014), arXiv:1406.2199, §6; Feichtenhofer et al. (2016), arXiv:1604.06573, §1",
        protocol="Shape × direction of one object, for which the streams complement each other; and two objects "
        "that move in opposite ways, where what counts is which goes where, against a 3D network.",
        experiments=(
            *_experiments("trial", size, (*apart, together), 300, task="shape_direction"),
            *_experiments("trial", size, (together, "c3d"), 350, task="shape_binding"),
        ),
        predictions=(
            *(
                Prediction(
                    f"together they tell shape and direction better than the {words} stream",
                    POINTS,
                    MATTERS,
                    _difference("top1", _model(together), _model(name), task="shape_direction"),
                )
                for name, words in zip(apart, ("spatial", "temporal"), strict=True)
            ),
            Prediction(
                "a 3D network tells which of two shapes moves which way better than two streams",
                POINTS,
                20.0,
                _difference("top1", _model("c3d"), _model(together), task="shape_binding"),
            ),
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True),
    )


def _bottlenecks_pay(size: Size) -> Claim:
    common: dict[str, Value] = {
        "workload_kind": "model", "implementation": "eager", "mode": "forward", "batch_size": 1, "clip_length": 16,
        "height": 112, "width": 112, "width_multiplier": 0.5, "num_classes": 400,
    }  # fmt: skip
    naive = f"{OWN}:i3d_without_bottlenecks"
    return Claim(
        name="inception_bottlenecks_pay",
        says="The 1×1×1 bottlenecks make an Inception block cheap.",
        source="Szegedy et al. (2015), arXiv:1409.4842, §4",
        protocol="I3D at half its width with and without the bottlenecks before its 3×3×3 convolutions, one clip of "
        "16 frames of 112×112 pixels: MACs, counted, and latency.",
        experiments=_timings(size, [{**common, "workload": name} for name in ("i3d_rgb", naive)]),
        predictions=(
            Prediction(
                "without them there are more multiply-adds", "times as many", 1.0,
                _ratio("macs", {"workload": naive}, {"workload": "i3d_rgb"}), exact=True,
            ),
            Prediction(
                "without them it takes longer", "times as long", 1.0,
                _ratio("latency_s", {"workload": naive}, {"workload": "i3d_rgb"}),
            ),
        ),
        plot=Plot("workload", "latency_s", "workload", "", "seconds per clip"),
    )  # fmt: skip


_CLAIMS: tuple[Callable[[Size], Claim], ...] = (
    _pooling_loses_order,
    _pooling_salient,
    _conv3d_reads_order,
    _rnn_forgets,
    _lstm_is_serial,
    _tcn_field_is_flexible,
    _tcn_gradients_are_stable,
    _tcn_trains_in_less_memory,
    _tcn_streams_in_more_memory,
    _tcn_transfers,
    _lstm_needs_data,
    _lstm_misses_subtle,
    _rigid_kernels,
    _flow_is_short_term,
    _streams_are_not_aligned,
    _slow_fusion_is_best,
    _twice_the_nonlinearities,
    _easier_to_optimise,
    _bottlenecks_pay,
)
