"""The claims: what the textbooks and papers of video classification say, and how each is tested."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    patience: int
    """Factor on the steps of every training."""
    memory_lengths: tuple[int, ...]
    """Frames over which something is to be remembered."""
    timed_lengths: tuple[int, ...]
    """Frames of the clips that are timed: fields of a TCN of three taps, so that it is never deeper than it must "
    "be."""


SIZES = {
    size.name: size
    for size in (
        Size("small", 3, 1, (8, 16, 32, 64), (29, 61, 125, 253, 509, 1021)),
        Size("full", 5, 3, (8, 16, 32, 64, 128, 256), (29, 61, 125, 253, 509, 1021, 2045, 4093)),
    )
}

FIRST_SEED = 100
"""The recipes were found on the seeds below."""

OWN = "vidbench.claims.contenders"
POINTS = "points"
PERCENT = "%"
MATTERS = 5.0
"""Points of accuracy that would change anybody's choice."""
CLEARLY = 20.0
"""Points of accuracy between what can and what cannot."""
TIMES = 1.2
"""Ratio of costs that would change anybody's choice."""

_RNN, _LSTM, _BIASED = f"{OWN}:rnn", f"{OWN}:lstm", f"{OWN}:lstm_forget_bias"
_SPATIAL, _TEMPORAL, _BOTH = (f"{OWN}:{name}" for name in ("spatial_stream", "temporal_stream", "two_streams"))
_LONG_KERNEL = f"{OWN}:c3d_long_first_kernel"


def _recipe(width: float, rate: float, batch_size: int = 24, **more: Value) -> dict[str, Value]:
    return {"width_multiplier": width, "learning_rate": rate, "batch_size": batch_size, **more}


_RECIPES: dict[str, dict[str, Value]] = {
    **dict.fromkeys(("frame_pool_avg", "frame_pool_max", "cnn_lstm"), _recipe(0.0625, 5e-3)),
    "cnn_tcn": _recipe(0.0625, 3e-3),
    **dict.fromkeys(("c3d", _LONG_KERNEL), _recipe(0.0625, 2e-3, dropout=0.0)),
    **dict.fromkeys(("r3d_18", "r2plus1d_18"), _recipe(0.0625, 1e-2)),
    **dict.fromkeys(("early_fusion", "late_fusion", "slow_fusion"), _recipe(0.125, 2e-3, dropout=0.0)),
    **dict.fromkeys((_SPATIAL, _TEMPORAL, _BOTH), _recipe(0.125, 2e-3)),
    **dict.fromkeys((_RNN, _LSTM, _BIASED, "tcn"), _recipe(0.25, 2e-3, 32)),
}
"""How each network is trained on two cores; what is compared within a claim sees equally many clips."""

_TWO_RATES = (2e-3, 5e-3)
"""Recurrent networks and TCNs on features are trained at both, and taken at the better one."""


def claims(size_name: str) -> tuple[Claim, ...]:
    """The claims at a size, small or full.

    Raises:
        RequestError: No such size.
    """
    if size_name not in SIZES:
        raise unknown("size", size_name, SIZES)
    size = SIZES[size_name]
    return tuple(make(size) for make in _CLAIMS)


def _seeds(size: Size) -> range:
    return range(FIRST_SEED, FIRST_SEED + size.seeds)


def _experiments(
    kind: str,
    size: Size,
    model_names: Sequence[str],
    steps: int,
    *,
    rates: Sequence[float] = (),
    given: Mapping[str, Value] | None = None,
    **more: Value,
) -> tuple[Experiment, ...]:
    """One experiment for every model, seed and learning rate, the models side by side; `given` and `more` are one."""
    asked = {**(given or {}), **more}
    return tuple(
        Experiment(kind, {"model": name, **_RECIPES[name], "steps": steps * size.patience, **asked, **at}, seed)
        for seed in _seeds(size)
        for name in model_names
        for at in ([{"learning_rate": rate} for rate in rates] or [{}])
    )


Effect = Callable[["pd.DataFrame"], list[float]]


def _of(value: str, **where: Value) -> Effect:
    """A value of every seed."""
    return lambda table: list(per_seed(table, value, **where))


def _accuracy(**where: Value) -> Effect:
    """Top-1 accuracy of every seed, in per cent."""
    return lambda table: [100 * one for one in per_seed(table, "top1", **where)]


def _difference(
    one: dict[str, Value], other: dict[str, Value], value: str = "top1", scale: float = 100.0, **where: Value
) -> Effect:
    """Of every seed, a value of one less that of the other; accuracies become points."""

    def effect(table: pd.DataFrame) -> list[float]:
        gap = per_seed(table, value, **where, **one) - per_seed(table, value, **where, **other)
        return [scale * seed for seed in gap]

    return effect


def _ratio(value: str, one: dict[str, Value], other: dict[str, Value], **where: Value) -> Effect:
    """Of every seed, a value of one over that of the other."""
    return lambda table: list(per_seed(table, value, **where, **one) / per_seed(table, value, **where, **other))


def _model(name: str) -> dict[str, Value]:
    return {"model": name}


def _reaches(says: str, percent: float, **where: Value) -> Prediction:
    """A control: an accuracy of more than so many per cent."""
    return Prediction(says, PERCENT, percent, _accuracy(**where))


def _pooling_loses_order(size: Size) -> Claim:
    pools = {"frame_pool_avg": "average", "frame_pool_max": "max"}
    return Claim(
        name="pooling_loses_order",
        says="Pooling the features of frames over time loses temporal information.",
        source="Ng et al. (2015), arXiv:1503.08909, §3.2: pooled representations are order invariant",
        protocol="Average and max pooling against an LSTM over the same 2D CNN, on the order of three events. "
        "Every class shows the very same frames, so pools are at chance by construction; whether order can be read "
        "at all is what the LSTM shows, and appearance that the pools were trained well enough.",
        experiments=(
            *_experiments("trial", size, (*pools, "cnn_lstm"), 200, task="frame_order"),
            *_experiments("trial", size, tuple(pools), 200, task="appearance"),
        ),
        predictions=tuple(
            Prediction(
                f"an LSTM is more accurate than {words} pooling",
                POINTS,
                CLEARLY,
                _difference(_model("cnn_lstm"), _model(pool), task="frame_order"),
            )
            for pool, words in pools.items()
        ),
        controls=tuple(
            _reaches(f"{words} pooling reaches 85 % on appearance", 85, model=pool, task="appearance")
            for pool, words in pools.items()
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True),
    )


def _pooling_salient(size: Size) -> Claim:
    pools = {"frame_pool_avg": "average", "frame_pool_max": "max"}
    return Claim(
        name="pooling_favours_salient_frames",
        says="Pooling favours salient frames.",
        source="lecture notes on video classification",
        protocol="A clip shows one shape strongly in four of its sixteen frames and another one faintly in the other "
        "twelve. Salient frames are favoured where the four outvote the twelve. Both kinds of clip were trained on, "
        "each by itself, and both shapes by themselves must be recognised.",
        experiments=_experiments("salience", size, tuple(pools), 250, strong=256, faint=160),
        predictions=tuple(
            Prediction(
                f"{words} pooling answers the four salient frames rather than the twelve others",
                PERCENT,
                50.0 + MATTERS,
                lambda table, pool=pool: [  # type: ignore[misc]
                    100 * one for one in per_seed(table, "preference", model=pool, share=0.25)
                ],
            )
            for pool, words in pools.items()
        ),
        controls=tuple(
            Prediction(
                f"{words} pooling recognises {kind} shapes by themselves",
                PERCENT,
                80.0,
                lambda table, pool=pool, value=value, share=share: [  # type: ignore[misc]
                    100 * one for one in per_seed(table, value, model=pool, share=share)
                ],
            )
            for pool, words in pools.items()
            for kind, value, share in (("strong", "salient", 1.0), ("faint", "faint", 0.0))
        ),
        plot=Plot(
            "share", "preference", "model", "share of salient frames", "answers that are the salient shape",
            percent=True, level=0.5,
        ),
    )  # fmt: skip


def _conv3d_reads_order(size: Size) -> Claim:
    tasks = ("frame_order", "time_direction")
    return Claim(
        name="conv3d_beats_pooling_on_order",
        says="3D convolution models motion and order, which pooling over 2D features does not.",
        source="Tran et al. (2015), arXiv:1412.0767, §3.1",
        protocol="C3D against the average over a 2D CNN's frames, which is at chance by construction, on the order "
        "of three events and on the direction of time; that the pool was trained well enough is seen on appearance.",
        experiments=(
            *(one for task in tasks for one in _experiments("trial", size, ("frame_pool_avg", "c3d"), 200, task=task)),
            *_experiments("trial", size, ("frame_pool_avg",), 200, task="appearance"),
        ),
        predictions=tuple(
            Prediction(
                f"C3D is more accurate than average pooling on {task}",
                POINTS,
                CLEARLY,
                _difference(_model("c3d"), _model("frame_pool_avg"), task=task),
            )
            for task in tasks
        ),
        controls=(
            _reaches("average pooling reaches 85 % on appearance", 85, model="frame_pool_avg", task="appearance"),
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True),
    )


_LAG = 63
_GRADIENT_TASK = f"token_memory:clip_length={_LAG + 1}"


def _decades(table: pd.DataFrame, model: str) -> pd.Series:
    """Of every seed, the decades by which the gradient is smaller at the first frame than at the last."""
    near, far = (per_seed(table, "norm", kind="gradient", model=model, lag=lag) for lag in (0, _LAG))
    return (near / far.clip(lower=1e-38)).map(math.log10)


def _gradients(size: Size, *names: str) -> tuple[Experiment, ...]:
    return tuple(
        Experiment("gradient", {"model": name, "task": _GRADIENT_TASK, "width_multiplier": 0.25}, seed)
        for seed in _seeds(size)
        for name in names
    )


def _remembering(size: Size, names: Sequence[str]) -> tuple[Experiment, ...]:
    """Which cue came first, at every length and both learning rates."""
    return tuple(
        one
        for length in size.memory_lengths
        for one in _experiments(
            "trial", size, names, 1000, rates=_TWO_RATES, task=f"token_memory:clip_length={length}", length=length
        )
    )


def _memory_protocol(size: Size) -> str:
    return (
        f"Which of four cues comes first, followed by distractors to the end of clips of "
        f"{', '.join(map(str, size.memory_lengths))} frames of features; 64 units, a thousand steps, each network "
        "at the better of two learning rates."
    )


def _lengths_mean(model: str, size: Size) -> Callable[[pd.DataFrame], pd.Series]:
    """Of every seed, the mean accuracy over all lengths, in per cent."""

    def mean(table: pd.DataFrame) -> pd.Series:
        curves = [per_seed(table, "top1", kind="trial", model=model, length=length) for length in size.memory_lengths]
        return 100 * sum(curves[1:], start=curves[0]) / len(curves)

    return mean


_MEMORY_PLOT = Plot(
    "length", "top1", "model", "clip length, frames", "top-1 accuracy", {"kind": "trial"}, log_x=True, percent=True,
    level=0.25,
)  # fmt: skip


def _rnn_forgets(size: Size) -> Claim:
    longest = size.memory_lengths[-1]

    def better(table: pd.DataFrame) -> list[float]:
        return list(_lengths_mean(_BIASED, size)(table) - _lengths_mean(_RNN, size)(table))

    return Claim(
        name="rnn_forgets_lstm_remembers",
        says="An RNN is not able to learn long-term dependencies; an LSTM is better at it.",
        source="Bengio, Simard & Frasconi (1994); Hochreiter & Schmidhuber (1997)",
        protocol=f"{_memory_protocol(size)} And by how much ∂loss/∂input is smaller {_LAG} frames before the last "
        "than at it, before training. The LSTM begins with open forget gates (bias 5), since that of 1997 had none "
        "to close; the one that torch makes has a claim of its own, below.",
        experiments=(*_remembering(size, (_RNN, _BIASED, _LSTM)), *_gradients(size, _RNN, _BIASED, _LSTM)),
        predictions=(
            Prediction(
                f"over {longest} frames an RNN stays below the middle between chance and perfect",
                PERCENT,
                62.5,
                _accuracy(kind="trial", model=_RNN, length=longest),
                less=True,
            ),
            Prediction("over all lengths an LSTM is more accurate than an RNN", POINTS, MATTERS, better),
            Prediction(
                "an RNN's gradient shrinks more over the lag than an LSTM's",
                "decades",
                0.5,
                lambda table: list(_decades(table, _RNN) - _decades(table, _BIASED)),
            ),
        ),
        controls=(
            _reaches(
                f"an LSTM reaches 90 % over {longest} frames, so that the steps suffice",
                90,
                kind="trial",
                model=_BIASED,
                length=longest,
            ),
        ),
        plot=_MEMORY_PLOT,
    )


def _default_lstm_remembers(size: Size) -> Claim:
    def better(table: pd.DataFrame) -> list[float]:
        return list(_lengths_mean(_LSTM, size)(table) - _lengths_mean(_RNN, size)(table))

    return Claim(
        name="default_lstm_remembers",
        says="An LSTM as torch initialises it remembers longer than an RNN.",
        source="what people expect of `torch.nn.LSTM`; Józefowicz et al. (2015) warn of it",
        protocol=f"{_memory_protocol(size)} torch's forget gates begin half closed: every frame halves what the "
        "cell holds.",
        experiments=(*_remembering(size, (_RNN, _LSTM)), *_gradients(size, _RNN, _LSTM)),
        predictions=(
            Prediction("over all lengths torch's LSTM is more accurate than an RNN", POINTS, MATTERS, better),
            Prediction(
                "an RNN's gradient shrinks more over the lag than torch's LSTM's",
                "decades",
                0.5,
                lambda table: list(_decades(table, _RNN) - _decades(table, _LSTM)),
            ),
        ),
        plot=_MEMORY_PLOT,
    )


_HIDDEN = 256


def _slopes(table: pd.DataFrame, network: str, mode: str) -> pd.Series:
    """Of every round, the exponent p of latency ∝ clip_length^p over the longer half of the lengths."""
    import numpy as np
    import pandas as pd

    chosen = table[(table["network"] == network) & (table["mode"] == mode)]
    chosen = chosen[chosen["threads"] == chosen["threads"].max()]
    lengths = sorted(set(chosen["clip_length"]))
    chosen = chosen[chosen["clip_length"] >= lengths[len(lengths) // 2 - 1]]
    return pd.Series(
        {
            seed: float(np.polyfit(np.log(part["clip_length"]), np.log(part["latency_s"]), 1)[0])
            for seed, part in chosen.groupby("seed")
        },
        dtype=float,
    )


def _speedup(table: pd.DataFrame, network: str, mode: str) -> pd.Series:
    """Of every round, how many times faster the longest clip is on all threads than on one."""
    chosen = table[(table["network"] == network) & (table["mode"] == mode)]
    chosen = chosen[chosen["clip_length"] == chosen["clip_length"].max()]
    alone, together = (chosen[chosen["threads"] == pick] for pick in (chosen["threads"].min(), chosen["threads"].max()))
    faster: pd.Series = alone.groupby("seed")["latency_s"].mean() / together.groupby("seed")["latency_s"].mean()
    return faster


def _lstm_is_serial(size: Size) -> Claim:
    modes = {"forward": "forward", "train": "in training"}
    lengths = size.timed_lengths
    return Claim(
        name="lstm_is_serial_tcn_is_not",
        says="An LSTM cannot be parallelised over time; a TCN can.",
        source="Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.5",
        protocol="Latency of an LSTM layer and of a TCN whose receptive field covers the clip, both of width 256, "
        f"on one clip of {lengths[0]} to {lengths[-1]} frames of features, in turn. What is parallel over time "
        "grows with a smaller power of the clip length (over the longer half of the lengths) as long as the "
        "machine has units to spare. On a CPU, whose few cores are soon busy, what counts besides is how much "
        "faster the longest clip is on all cores than on one.",
        experiments=tuple(
            Experiment("scaling", {"mode": mode, "hidden_size": _HIDDEN, "lengths": lengths}, seed)
            for seed in range(1, size.seeds + 1)
            for mode in modes
        ),
        predictions=(
            *(
                Prediction(
                    f"{words}, an LSTM's latency grows with a higher power of the clip length than a TCN's",
                    "in the exponent",
                    0.1,
                    lambda table, mode=mode: list(  # type: ignore[misc]
                        _slopes(table, "lstm", mode) - _slopes(table, "tcn", mode)
                    ),
                )
                for mode, words in modes.items()
            ),
            *(
                Prediction(
                    f"{words}, more cores speed a TCN up by more than an LSTM",
                    "times the speed-up",
                    TIMES,
                    lambda table, mode=mode: list(  # type: ignore[misc]
                        _speedup(table, "tcn", mode) / _speedup(table, "lstm", mode)
                    ),
                )
                for mode, words in modes.items()
            ),
        ),
        plot=Plot(
            "clip_length", "latency_s", "network", "clip length, frames", "seconds per clip, in training",
            {"mode": "train"}, log_x=True, log_y=True,
        ),
    )  # fmt: skip


def _tcn_field_is_flexible(size: Size) -> Claim:
    task = "token_memory:clip_length=40"
    networks: list[dict[str, Value]] = [
        {"levels": levels, "kernel_size": taps, "field": tcn_receptive_field(taps, (2**i for i in range(levels)))}
        for levels, taps in ((3, 3), (4, 3), (3, 5))
    ]
    short, deep, wide = networks
    changes = {"one level more makes": deep, "longer filters make": wide}
    return Claim(
        name="tcn_field_is_flexible",
        says="A TCN's receptive field is flexible: more levels, larger dilations or longer filters change it at will.",
        source="Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.5",
        protocol="A cue in the first of 40 frames, distractors after it. A TCN whose field is 29 frames cannot see "
        "it; one level more (61 frames) or filters of five taps (57 frames) can.",
        experiments=tuple(
            one for network in networks for one in _experiments("trial", size, ("tcn",), 400, given=network, task=task)
        ),
        predictions=tuple(
            Prediction(
                f"{words} the task soluble",
                POINTS,
                CLEARLY,
                _difference({"field": network["field"]}, {"field": short["field"]}, task=task),
            )
            for words, network in changes.items()
        ),
        plot=Plot("field", "top1", "model", "receptive field, frames", "top-1 accuracy", percent=True, level=0.25),
    )


def _tcn_gradients_are_stable(size: Size) -> Claim:
    recurrent = {_RNN: "an RNN's", _LSTM: "torch's LSTM's", _BIASED: "an LSTM's with open forget gates"}
    return Claim(
        name="tcn_gradients_are_stable",
        says="A TCN's gradients are more stable than a recurrent network's: its paths through time are short.",
        source="Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.5",
        protocol=f"How far ∂loss/∂input is from constant, up or down, over {_LAG} frames, before training; 64 "
        "units on features, the TCN's receptive field covers the clip.",
        experiments=_gradients(size, *recurrent, "tcn"),
        predictions=tuple(
            Prediction(
                f"{words} gradient changes more over the lag than a TCN's",
                "decades",
                0.5,
                lambda table, name=name: list(  # type: ignore[misc]
                    _decades(table, name).abs() - _decades(table, "tcn").abs()
                ),
            )
            for name, words in recurrent.items()
        ),
        plot=Plot("lag", "norm", "model", "frames before the last", "‖∂loss/∂input‖", {"kind": "gradient"}, log_y=True),
    )


def _tcn_trains_in_less_memory(size: Size) -> Claim:
    lengths = tuple(length for length in size.timed_lengths if length <= 1021)
    return Claim(
        name="tcn_trains_in_less_memory",
        says="A TCN needs less memory in training than an LSTM.",
        source="Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.5",
        protocol="The most bytes alive in a training step beyond weights and inputs, of an LSTM layer of 256 units "
        "and of a TCN of as many parameters whose field covers the clip; sixteen clips of features.",
        experiments=tuple(
            Experiment(
                "training_memory",
                {"model": name, "like": _LSTM, "hidden_size": _HIDDEN, "batch_size": 16, "clip_length": length},
                0,
            )
            for length in lengths
            for name in (_LSTM, "tcn")
        ),
        predictions=tuple(
            Prediction(
                f"over {length} frames an LSTM's training step holds more than a TCN's",
                "times as much",
                TIMES,
                _ratio("peak_bytes", _model(_LSTM), _model("tcn"), clip_length=length),
                exact=True,
            )
            for length in (lengths[0], lengths[-1])
        ),
        plot=Plot(
            "clip_length",
            "peak_bytes",
            "model",
            "clip length, frames",
            "bytes in a training step",
            log_x=True,
            log_y=True,
        ),
    )


def _tcn_streams_in_more_memory(size: Size) -> Claim:
    lengths = size.timed_lengths
    return Claim(
        name="tcn_streams_in_more_memory",
        says="In evaluation a TCN has to keep the history up to its receptive field; an LSTM keeps a state.",
        source="Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.5, among the disadvantages",
        protocol="Bytes carried from frame to frame of a stream, both of width 256, by receptive field: counted. "
        "The TCN keeps the past inputs of each of its convolutions, so that a frame costs one step; the raw input "
        "alone would be smaller and cost the whole network again.",
        experiments=tuple(
            Experiment("stream_state", {"model": name, "clip_length": length, "hidden_size": _HIDDEN}, 0)
            for length in lengths
            for name in (_LSTM, "tcn")
        ),
        predictions=(
            Prediction(
                f"with a field of {lengths[0]} frames a TCN already carries more than an LSTM",
                "times as much",
                TIMES,
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
    names = {"cnn_lstm": "an LSTM", "cnn_tcn": "a TCN"}

    def gain(model: str) -> Effect:
        return _difference({"begun": "pre-trained"}, {"begun": "scratch"}, model=model)

    return Claim(
        name="pre_training_transfers_for_tcn_not_lstm",
        says="Pre-training transfers for a TCN and not for an LSTM.",
        source="lecture notes on video classification; Bai et al. (2018), §3.5, count transfer among a TCN's "
        "weaknesses",
        protocol="The order of three events in another look (squares on stripes), 48 clips to train on: from "
        "scratch, and from weights learnt on discs on grey noise.",
        experiments=_experiments(
            "transfer", size, tuple(names), 200, source="frame_order", target="frame_order:domain=b", examples=48,
            tuning_steps=80 * size.patience,
        ),
        predictions=(
            Prediction("pre-training helps a TCN", POINTS, MATTERS, gain("cnn_tcn")),
            Prediction("pre-training does not help an LSTM", POINTS, MATTERS, gain("cnn_lstm"), less=True),
        ),
        plot=Plot("model", "top1", "begun", "", "top-1 accuracy", percent=True, level=1 / 6),
        controls=tuple(
            _reaches(f"{words} learns the first look", 90, model=name, begun="source")
            for name, words in names.items()
        ),
    )  # fmt: skip


def _lstm_needs_data(size: Size) -> Claim:
    task, few, steps = "token_memory:clip_length=16", (64, 256, 1024), 1000
    names = {_LSTM: "an LSTM", "tcn": "a TCN"}
    unlimited = steps * size.patience * 32  # clips in a batch
    return Claim(
        name="lstm_is_poor_on_small_data",
        says="An LSTM does poorly on small data, against a TCN.",
        source="lecture notes on video classification",
        protocol=f"Learning curves on 16 frames of features: {', '.join(map(str, few))} examples, over and over "
        "for the same number of steps, and no limit; the LSTM as torch makes it. The two smaller sets are small "
        "data. Both networks must learn the task where data are plenty; each is taken at the better of two "
        "learning rates.",
        experiments=tuple(
            one
            for count in (*few, unlimited)
            for one in _experiments(
                "trial", size, tuple(names), steps, rates=_TWO_RATES, task=task, count=count,
                given={"examples": count} if count in few else {},
            )
        ),
        predictions=tuple(
            Prediction(
                f"of {count} examples a TCN learns more than an LSTM",
                POINTS,
                MATTERS,
                _difference(_model("tcn"), _model(_LSTM), task=task, count=count),
            )
            for count in few[:2]
        ),
        controls=tuple(
            _reaches(f"{words} learns the task without a limit", 90, model=name, task=task, count=unlimited)
            for name, words in names.items()
        ),
        plot=Plot(
            "count", "top1", "model", "different examples seen", "top-1 accuracy", log_x=True, percent=True, level=0.25
        ),
    )  # fmt: skip


def _threshold(table: pd.DataFrame, model: str) -> pd.Series:
    """Of every seed, log2 of the amplitude at which accuracy passes 75 %, between neighbours on a logarithmic scale.

    NaN where the largest amplitude does not reach it, or the smallest does.
    """
    import pandas as pd

    found: dict[object, float] = {}
    chosen = table[(table["kind"] == "amplitude") & (table["model"] == model)]
    for seed, part in chosen.groupby("seed"):
        curve = part.sort_values("amplitude")
        x, y = curve["amplitude"].map(math.log2).tolist(), curve["top1"].tolist()
        found[seed] = math.nan
        for i in range(len(x) - 1, -1, -1):  # from the largest amplitude down, as long as it is told
            if y[i] < 0.75:
                if i + 1 < len(x):
                    found[seed] = x[i] + (x[i + 1] - x[i]) * (0.75 - y[i]) / (y[i + 1] - y[i])
                break
    return pd.Series(found, dtype=float)


_AMPLITUDE_STEPS = 480


def _coarser(says: str, one: str, other: str) -> Prediction:
    """That the threshold of one is larger than that of the other, in octaves."""
    return Prediction(says, "octaves", 0.25, lambda table: list(_threshold(table, one) - _threshold(table, other)))


def _rigid_kernels(size: Size) -> Claim:
    names = {"c3d": "C3D", _LONG_KERNEL: "C3D with a long first kernel"}
    return Claim(
        name="rigid_kernels_miss_subtle_motion",
        says="The rigid 3×3×3 kernel of 3D networks misses subtle motion.",
        source="lecture notes on video classification",
        protocol="Which way a texture moves, by a sixteenth of a pixel to eight in all: the amplitude at which "
        "accuracy passes 75 %, of C3D, and of C3D whose first kernel extends over eleven frames instead of three. "
        "The first half of the training shows the largest motion alone.",
        experiments=_experiments("amplitude", size, tuple(names), _AMPLITUDE_STEPS, pattern="texture"),
        predictions=(_coarser("C3D needs larger motions with the 3×3×3 kernel", "c3d", _LONG_KERNEL),),
        plot=Plot(
            "amplitude", "top1", "model", "motion in all, pixels", "top-1 accuracy", log_x=True, percent=True, level=0.5
        ),
        controls=tuple(
            _reaches(f"{words} tells the largest motion", 85, model=name, amplitude=8.0)
            for name, words in names.items()
        ),
    )


def _lstm_misses_subtle(size: Size) -> Claim:
    names = {"cnn_lstm": "an LSTM", "cnn_tcn": "a TCN"}
    return Claim(
        name="lstm_misses_subtle_change",
        says="An LSTM keeps strong temporal change and misses subtle change, which a TCN sees.",
        source="lecture notes on video classification",
        protocol="Which way a disc moves, by three quarters of a pixel to 48 in all: the amplitude at which accuracy "
        "passes 75 %, of an LSTM and of a TCN over the same 2D CNN. The first half of the training shows the "
        "largest motion alone.",
        experiments=_experiments("amplitude", size, tuple(names), _AMPLITUDE_STEPS, pattern="disc"),
        predictions=(_coarser("an LSTM needs larger motions than a TCN", *names),),
        plot=Plot(
            "amplitude", "top1", "model", "motion in all, pixels", "top-1 accuracy", log_x=True, percent=True, level=0.5
        ),
        controls=tuple(
            _reaches(f"{words} tells the largest motion", 80, model=name, amplitude=48.0)
            for name, words in names.items()
        ),
    )


def _flow_is_short_term(size: Size) -> Claim:
    near, far = "motion_order", "motion_order:clip_length=26:delay=12"
    return Claim(
        name="flow_is_short_term",
        says="Optical flow captures short-term motion only.",
        source="Wang et al. (2016), arXiv:1608.00859, §1",
        protocol="Which of two movements comes first. The temporal stream sees ten flow fields (DIS) at a time, at "
        "every fifth frame, and averages: one after the other, both movements fit into ten fields; 16 frames apart "
        "they do not, and an average does not know what came first. C3D, which sees the whole clip, shows that the "
        "distant order can be read.",
        experiments=(
            *_experiments("trial", size, (_TEMPORAL,), 250, task=near),
            *_experiments("trial", size, (_TEMPORAL, "c3d"), 250, task=far),
        ),
        predictions=(
            Prediction(
                "flow tells the order of movements far better when they are near",
                POINTS,
                CLEARLY,
                _difference({"task": near}, {"task": far}, model=_TEMPORAL),
            ),
            Prediction(
                "a network over the whole clip tells the distant order better than flow",
                POINTS,
                CLEARLY,
                _difference(_model("c3d"), _model(_TEMPORAL), task=far),
            ),
        ),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True, level=0.5),
    )


def _streams_complement(size: Size) -> Claim:
    task, apart = "shape_direction", {_SPATIAL: "spatial", _TEMPORAL: "temporal"}
    return Claim(
        name="two_streams_complement_each_other",
        says="The spatial and the temporal stream complement each other.",
        source="Simonyan & Zisserman (2014), arXiv:1406.2199, §5",
        protocol="Which of three shapes moves, and which way: of six classes a single frame tells three apart and "
        "motion two. Each stream by itself and both together, their scores averaged.",
        experiments=_experiments("trial", size, (*apart, _BOTH), 350, task=task),
        predictions=tuple(
            Prediction(
                f"together they are more accurate than the {words} stream",
                POINTS,
                MATTERS,
                _difference(_model(_BOTH), _model(name), task=task),
            )
            for name, words in apart.items()
        ),
        plot=Plot("model", "top1", "model", "", "top-1 accuracy", percent=True, level=1 / 6),
    )


def _streams_are_not_aligned(size: Size) -> Claim:
    task = "colour_binding"
    return Claim(
        name="two_streams_are_not_aligned",
        says="Nothing aligns the two streams: what was seen to move is not known to be what was seen.",
        source="Feichtenhofer, Pinz & Zisserman (2016), arXiv:1604.06573, §1",
        protocol="A red and a blue disc move in opposite ways: which goes where? Both colours and both motions are "
        "in every clip, and the discs have one luminance, so that flow cannot tell them apart. Two streams, their "
        "scores averaged, against C3D; that the temporal stream reads such motion is seen on the direction of time.",
        experiments=(
            *_experiments("trial", size, (_BOTH, "c3d"), 350, task=task),
            *_experiments("trial", size, (_TEMPORAL,), 150, task="time_direction"),
        ),
        predictions=(
            Prediction(
                "a 3D network is more accurate than two streams",
                POINTS,
                CLEARLY,
                _difference(_model("c3d"), _model(_BOTH), task=task),
            ),
        ),
        controls=(_reaches("the temporal stream reads motion", 85, model=_TEMPORAL, task="time_direction"),),
        plot=Plot("task", "top1", "model", "", "top-1 accuracy", percent=True, level=0.5),
    )


def _slow_fusion_is_best(size: Size) -> Claim:
    task, others = "random_dots:clip_length=10", {"early_fusion": "early", "late_fusion": "late"}
    return Claim(
        name="slow_fusion_is_best",
        says="Slow fusion does better than early and late fusion.",
        source="Karpathy et al. (2014), §4.1 and table 1",
        protocol="The three at an eighth of their width on the motion of short-lived dots over ten frames, on "
        "equally many clips. Late fusion sees the first and the last frame, between which every dot was born anew: "
        "it is at chance by construction.",
        experiments=_experiments("trial", size, (*others, "slow_fusion"), 250, task=task),
        predictions=tuple(
            Prediction(
                f"slow fusion is more accurate than {words} fusion",
                POINTS,
                1.0,
                _difference(_model("slow_fusion"), _model(name), task=task),
            )
            for name, words in others.items()
        ),
        controls=(_reaches("slow fusion reads the motion", 60, model="slow_fusion", task=task),),
        plot=Plot("model", "top1", "model", "", "top-1 accuracy", percent=True, level=0.5),
    )


def _twice_the_nonlinearities(size: Size) -> Claim:
    factorised: dict[str, Value] = {"model": "r2plus1d_18", "mid_channels": "per_convolution"}
    whole: dict[str, Value] = {"model": "r3d_18"}
    ratio = _ratio("params", _model("r2plus1d_18"), whole)
    return Claim(
        name="r2plus1d_doubles_nonlinearities",
        says="R(2+1)D has nearly twice the non-linearities of R3D at equal parameters.",
        source="Tran et al. (2018), arXiv:1711.11248, §3.5",
        protocol="Rectifications in one forward pass, and parameters, of the 18-layer networks at full width, with "
        "the paper's rule for the channels between the two convolutions: counted.",
        experiments=(Experiment("relus", factorised, 0), Experiment("relus", whole, 0)),
        predictions=(
            Prediction(
                "R(2+1)D rectifies nearly twice as often", "times as often", 1.8,
                _ratio("relus", _model("r2plus1d_18"), whole), exact=True,
            ),
            Prediction(
                "their parameters agree", "% apart", 1.0,
                lambda table: [100 * abs(one - 1) for one in ratio(table)], less=True, exact=True,
            ),
        ),
        plot=Plot("model", "relus", "model", "", "rectifications in a forward pass"),
    )  # fmt: skip


def _easier_to_optimise(size: Size) -> Claim:
    task = "time_direction"
    return Claim(
        name="r2plus1d_is_easier_to_optimise",
        says="R(2+1)D is easier to optimise than R3D.",
        source="Tran et al. (2018), arXiv:1711.11248, §3.5 and figure 3",
        protocol="Training loss, the mean over equally many steps, the networks at a sixteenth of their width, on the "
        "direction of time; each at the better of two learning rates.",
        experiments=_experiments("trial", size, ("r2plus1d_18", "r3d_18"), 150, rates=(5e-3, 1e-2), task=task),
        predictions=(
            Prediction(
                "R3D's training loss is higher",
                "nats",
                0.02,
                _difference(_model("r3d_18"), _model("r2plus1d_18"), "loss", 1.0, task=task),
            ),
        ),
        plot=Plot("model", "loss", "model", "", "mean training loss, nats"),
    )


def _bottlenecks_pay(size: Size) -> Claim:
    naive = f"{OWN}:i3d_without_bottlenecks"
    return Claim(
        name="inception_bottlenecks_pay",
        says="The 1×1×1 bottlenecks make an Inception block cheap.",
        source="Szegedy et al. (2015), arXiv:1409.4842, §4",
        protocol="I3D at half its width with and without the bottlenecks before its 3×3×3 convolutions, one clip "
        "of 16 frames of 112×112 pixels, in turn: MACs, counted, and latency.",
        experiments=tuple(
            Experiment("cost", {"clip_length": 16, "input_size": 112, "width_multiplier": 0.5}, seed)
            for seed in range(1, size.seeds + 1)
        ),
        predictions=(
            Prediction(
                "without them there are more multiply-adds", "times as many", TIMES,
                _ratio("macs", _model(naive), _model("i3d_rgb")), exact=True,
            ),
            Prediction(
                "without them it takes longer", "times as long", TIMES,
                _ratio("latency_s", _model(naive), _model("i3d_rgb")),
            ),
        ),
        plot=Plot("model", "latency_s", "model", "", "seconds per clip"),
    )  # fmt: skip


_CLAIMS: tuple[Callable[[Size], Claim], ...] = (
    _pooling_loses_order,
    _pooling_salient,
    _conv3d_reads_order,
    _rnn_forgets,
    _default_lstm_remembers,
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
    _streams_complement,
    _streams_are_not_aligned,
    _slow_fusion_is_best,
    _twice_the_nonlinearities,
    _easier_to_optimise,
    _bottlenecks_pay,
)
