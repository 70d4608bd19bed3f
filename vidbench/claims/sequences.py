"""Claims about what goes over the frames: RNN, LSTM, TCN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vidbench.claims import Claim, Experiment, Plot, Prediction, per_seed
from vidbench.claims.protocols import (
    AMPLITUDE_PLOT,
    AMPLITUDE_STEPS,
    BIASED,
    CLEARLY,
    LSTM,
    MATTERS,
    ORTHOGONAL,
    PERCENT,
    POINTS,
    RNN,
    TWO_RATES,
    Effect,
    Size,
    accuracy,
    coarser,
    difference,
    experiments,
    named,
    reaches,
    seeds,
)
from vidbench.sweep import Value
from vidkernels.shapes import tcn_receptive_field

if TYPE_CHECKING:
    import pandas as pd


_LAG = 63
_GRADIENT_TASK = f"token_memory:clip_length={_LAG + 1}"


def _decades(table: pd.DataFrame, model: str) -> pd.Series:
    """Of every seed, the decades by which the gradient is smaller at the first frame than at the last."""
    near, far = (per_seed(table, "norm", kind="gradient", model=model, lag=lag) for lag in (0, _LAG))
    return (near / far.clip(lower=1e-38)).map(math.log10)


def _gradients(size: Size, *names: str) -> tuple[Experiment, ...]:
    return tuple(
        Experiment("gradient", {"model": name, "task": _GRADIENT_TASK, "width_multiplier": 0.25}, seed)
        for seed in seeds(size)
        for name in names
    )


def _remembering(size: Size, names: Sequence[str]) -> tuple[Experiment, ...]:
    """Which cue came first, at every length and both learning rates."""
    return tuple(
        one
        for length in size.memory_lengths
        for one in experiments(
            "trial", size, names, 1000, rates=TWO_RATES, task=f"token_memory:clip_length={length}", length=length
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


def _longer(size: Size, one: str, other: str) -> Effect:
    """Of every seed, by how many points one is more accurate than the other over all lengths."""
    return lambda table: list(_lengths_mean(one, size)(table) - _lengths_mean(other, size)(table))


_MEMORY_PLOT = Plot(
    "length", "top1", "model", "clip length, frames", "top-1 accuracy", {"kind": "trial"}, log_x=True, percent=True,
    level=0.25,
)  # fmt: skip


def rnn_forgets(size: Size) -> Claim:
    longest = size.memory_lengths[-1]

    return Claim(
        name="rnn_forgets_lstm_remembers",
        says="An RNN is not able to learn long-term dependencies; an LSTM is better at it.",
        source="Bengio, Simard & Frasconi (1994); Hochreiter & Schmidhuber (1997)",
        protocol=f"{_memory_protocol(size)} And by how much ∂loss/∂input is smaller {_LAG} frames before the last "
        "than at it, before training. The RNN begins as torch makes it. The LSTM begins with open forget gates (bias "
        "5), since that of 1997 had none to close. An RNN that begins by remembering, and the LSTM that torch makes, "
        "have claims of their own, below.",
        experiments=(
            *_remembering(size, (RNN, BIASED, LSTM, ORTHOGONAL)),
            *_gradients(size, RNN, BIASED, LSTM, ORTHOGONAL),
        ),
        predictions=(
            Prediction(
                f"over {longest} frames an RNN stays below the middle between chance and perfect",
                PERCENT,
                62.5,
                accuracy(kind="trial", model=RNN, length=longest),
                less=True,
            ),
            Prediction(
                "over all lengths an LSTM is more accurate than an RNN", POINTS, MATTERS, _longer(size, BIASED, RNN)
            ),
            Prediction(
                "an RNN's gradient shrinks more over the lag than an LSTM's",
                "decades",
                0.5,
                lambda table: list(_decades(table, RNN) - _decades(table, BIASED)),
            ),
        ),
        controls=(_steps_suffice(size),),
        plot=_MEMORY_PLOT,
    )


def _steps_suffice(size: Size) -> Prediction:
    longest = size.memory_lengths[-1]
    says = f"an LSTM reaches 90 % over {longest} frames, so that the steps suffice"
    return reaches(says, 90, kind="trial", model=BIASED, length=longest)


def orthogonal_rnn_forgets(size: Size) -> Claim:
    longest = size.memory_lengths[-1]
    return Claim(
        name="orthogonal_rnn_forgets",
        says="However it begins, an RNN is not able to learn long-term dependencies.",
        source="Bengio, Simard & Frasconi (1994), of any vanilla RNN; Le, Jaitly & Hinton (2015), arXiv:1504.00941, "
        "hold against it",
        protocol=f"{_memory_protocol(size)} The RNN begins with an orthogonal recurrent matrix, which keeps the length "
        "of its state, as an LSTM with open forget gates begins by keeping its cell.",
        experiments=_remembering(size, (ORTHOGONAL, BIASED)),
        predictions=(
            Prediction(
                f"over {longest} frames such an RNN stays below the middle between chance and perfect",
                PERCENT,
                62.5,
                accuracy(kind="trial", model=ORTHOGONAL, length=longest),
                less=True,
            ),
            Prediction("over all lengths an LSTM is more accurate", POINTS, MATTERS, _longer(size, BIASED, ORTHOGONAL)),
        ),
        controls=(_steps_suffice(size),),
        plot=_MEMORY_PLOT,
    )


def default_lstm_remembers(size: Size) -> Claim:
    return Claim(
        name="default_lstm_remembers",
        says="An LSTM as torch initialises it remembers longer than an RNN.",
        source="what people expect of `torch.nn.LSTM`; Józefowicz et al. (2015) warn of it",
        protocol=f"{_memory_protocol(size)} torch's forget gates begin half closed: every frame halves what the "
        "cell holds.",
        experiments=(*_remembering(size, (RNN, LSTM, BIASED)), *_gradients(size, RNN, LSTM)),
        predictions=(
            Prediction(
                "over all lengths torch's LSTM is more accurate than an RNN", POINTS, MATTERS, _longer(size, LSTM, RNN)
            ),
            Prediction(
                "an RNN's gradient shrinks more over the lag than torch's LSTM's",
                "decades",
                0.5,
                lambda table: list(_decades(table, RNN) - _decades(table, LSTM)),
            ),
        ),
        controls=(_steps_suffice(size),),
        plot=_MEMORY_PLOT,
    )


def tcn_field_is_flexible(size: Size) -> Claim:
    task = "token_memory:clip_length=40"
    networks: list[dict[str, Value]] = [
        {"levels": levels, "kernel_size": taps, "field": tcn_receptive_field(taps, (2**i for i in range(levels)))}
        for levels, taps in ((3, 3), (4, 3), (3, 5))
    ]
    short, deep, wide = networks
    changes = {"one level more makes": deep, "longer filters make": wide}
    return Claim(
        name="tcn_field_is_flexible",
        says="A TCN's receptive field is flexible: more levels or longer filters change it at will.",
        source="Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.5",
        protocol="A cue in the first of 40 frames, distractors after it. A TCN whose field is 29 frames cannot see "
        "it; one level more (61 frames), which doubles the largest dilation, or filters of five taps (57 frames) can.",
        experiments=tuple(
            one for network in networks for one in experiments("trial", size, ("tcn",), 400, given=network, task=task)
        ),
        predictions=tuple(
            Prediction(
                f"{words} the task soluble",
                POINTS,
                CLEARLY,
                difference({"field": network["field"]}, {"field": short["field"]}, task=task),
            )
            for words, network in changes.items()
        ),
        controls=tuple(
            reaches(f"a TCN of {field} frames learns the task", 90, field=field, task=task)
            for field in (deep["field"], wide["field"])
        ),
        plot=Plot("field", "top1", "model", "receptive field, frames", "top-1 accuracy", percent=True, level=0.25),
    )


def _more_stable(size: Size, name: str, says: str, recurrent: dict[str, str]) -> Claim:
    return Claim(
        name=name,
        says=says,
        source="Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.5",
        protocol=f"How far ∂loss/∂input is from constant, up or down, over {_LAG} frames, before training; 64 "
        "units on features, the TCN's receptive field covers the clip.",
        experiments=_gradients(size, *recurrent, "tcn"),
        predictions=tuple(
            Prediction(
                f"{words} gradient changes more over the lag than a TCN's",
                "decades",
                0.5,
                lambda table, model=model: list(  # type: ignore[misc]
                    _decades(table, model).abs() - _decades(table, "tcn").abs()
                ),
            )
            for model, words in recurrent.items()
        ),
        plot=Plot("lag", "norm", "model", "frames before the last", "‖∂loss/∂input‖", {"kind": "gradient"}, log_y=True),
    )


def tcn_gradients_are_stable(size: Size) -> Claim:
    return _more_stable(
        size,
        "tcn_gradients_are_stable",
        "A TCN's gradients are more stable than a recurrent network's: its paths through time are short.",
        {RNN: "an RNN's", LSTM: "torch's LSTM's"},
    )


def tcn_gradients_against_open_gates(size: Size) -> Claim:
    return _more_stable(
        size,
        "tcn_gradients_against_open_gates",
        "A TCN's gradients are more stable even than those of networks that begin by remembering.",
        {BIASED: "an LSTM's with open forget gates", ORTHOGONAL: "an orthogonal RNN's"},
    )


def tcn_transfers(size: Size) -> Claim:
    names = {"cnn_lstm": "an LSTM", "cnn_tcn": "a TCN"}

    def gain(model: str) -> Effect:
        return difference({"begun": "pre-trained"}, {"begun": "scratch"}, model=model)

    return Claim(
        name="pre_training_transfers_for_tcn_not_lstm",
        says="Pre-training transfers for a TCN and not for an LSTM.",
        source="lecture notes on video classification; Bai et al. (2018), §3.5, count transfer among a TCN's "
        "weaknesses",
        protocol="The order of three events in another look (squares on stripes), 48 clips to train on: from "
        "scratch, and from weights learnt on discs on grey noise. All of the network is carried over, the 2D CNN and "
        "the classifier too, as the classes mean the same.",
        experiments=experiments(
            "transfer", size, tuple(names), 200, source="frame_order", target="frame_order:domain=b", examples=48,
            tuning_steps=80 * size.patience,
        ),
        predictions=(
            Prediction("pre-training helps a TCN", POINTS, MATTERS, gain("cnn_tcn")),
            Prediction("pre-training does not help an LSTM", POINTS, MATTERS, gain("cnn_lstm"), less=True),
        ),
        plot=Plot("model", "top1", "begun", "", "top-1 accuracy", percent=True, level=1 / 6),
        controls=tuple(
            reaches(f"{words} learns the first look", 90, model=name, begun="source")
            for name, words in names.items()
        ),
    )  # fmt: skip


_FEW = (32, 64, 128, 256)


def _needs_data(size: Size, name: str, says: str, model: str, words: str) -> Claim:
    task, steps = "token_memory:clip_length=16", 1000
    unlimited = steps * size.patience * 32  # clips in a batch

    def over_all(table: pd.DataFrame) -> list[float]:
        gaps = [difference(named("tcn"), named(model), task=task, count=count)(table) for count in _FEW]
        return [sum(seed) / len(_FEW) for seed in zip(*gaps, strict=True)]

    return Claim(
        name=name,
        says=says,
        source="lecture notes on video classification",
        protocol=f"Learning curves on 16 frames of features: {', '.join(map(str, _FEW))} examples, over and over for "
        "the same number of steps, and no limit. The effect is the mean over the small sets, as one alone may be too "
        "small or too large to tell anything. Both networks must learn the task where data are plenty; each is taken "
        "at the better of two learning rates.",
        experiments=tuple(
            one
            for count in (*_FEW, unlimited)
            for one in experiments(
                "trial", size, (model, "tcn"), steps, rates=TWO_RATES, task=task, count=count,
                given={"examples": count} if count in _FEW else {},
            )
        ),
        predictions=(
            Prediction(f"of few examples a TCN learns more than {words}", POINTS, MATTERS, over_all),
        ),
        controls=tuple(
            reaches(f"{who} learns the task without a limit", 90, model=one, task=task, count=unlimited)
            for one, who in ((model, words), ("tcn", "a TCN"))
        ),
        plot=Plot(
            "count", "top1", "model", "different examples seen", "top-1 accuracy", log_x=True, percent=True, level=0.25
        ),
    )  # fmt: skip


def lstm_needs_data(size: Size) -> Claim:
    return _needs_data(
        size, "lstm_is_poor_on_small_data", "An LSTM does poorly on small data, against a TCN.", LSTM, "torch's LSTM"
    )


def open_lstm_needs_data(size: Size) -> Claim:
    return _needs_data(
        size,
        "open_lstm_is_poor_on_small_data",
        "An LSTM that begins by remembering does poorly on small data, too.",
        BIASED,
        "an LSTM with open forget gates",
    )


def lstm_misses_subtle(size: Size) -> Claim:
    names = {"cnn_lstm": "an LSTM", "cnn_tcn": "a TCN"}
    return Claim(
        name="lstm_misses_subtle_change",
        says="An LSTM keeps strong temporal change and misses subtle change, which a TCN sees.",
        source="lecture notes on video classification",
        protocol="Which way a disc moves, by three sixteenths of a pixel to 48 in all: the amplitude at which accuracy "
        "passes 75 %, of an LSTM and of a TCN over the same 2D CNN. The first half of the training shows the "
        "largest motion alone. Each is taken at the better of two learning rates.",
        experiments=experiments("amplitude", size, tuple(names), AMPLITUDE_STEPS, rates=TWO_RATES, pattern="disc"),
        predictions=(coarser("an LSTM needs larger motions than a TCN", *names),),
        plot=AMPLITUDE_PLOT,
        controls=tuple(
            reaches(f"{words} tells the largest motion", 80, model=name, amplitude=48.0)
            for name, words in names.items()
        ),
    )
