"""Claims about what goes over the frames: RNN, LSTM, TCN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vidbench.claims import Claim, Experiment, Plot, Prediction, per_seed
from vidbench.claims.protocols import (
    AMPLITUDE_STEPS,
    BIASED,
    CLEARLY,
    LSTM,
    MATTERS,
    PERCENT,
    POINTS,
    RNN,
    TIMES,
    TWO_RATES,
    Effect,
    Size,
    accuracy,
    coarser,
    difference,
    experiments,
    named,
    ratio,
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


_MEMORY_PLOT = Plot(
    "length", "top1", "model", "clip length, frames", "top-1 accuracy", {"kind": "trial"}, log_x=True, percent=True,
    level=0.25,
)  # fmt: skip


def rnn_forgets(size: Size) -> Claim:
    longest = size.memory_lengths[-1]

    def better(table: pd.DataFrame) -> list[float]:
        return list(_lengths_mean(BIASED, size)(table) - _lengths_mean(RNN, size)(table))

    return Claim(
        name="rnn_forgets_lstm_remembers",
        says="An RNN is not able to learn long-term dependencies; an LSTM is better at it.",
        source="Bengio, Simard & Frasconi (1994); Hochreiter & Schmidhuber (1997)",
        protocol=f"{_memory_protocol(size)} And by how much ∂loss/∂input is smaller {_LAG} frames before the last "
        "than at it, before training. The LSTM begins with open forget gates (bias 5), since that of 1997 had none "
        "to close; the one that torch makes has a claim of its own, below.",
        experiments=(*_remembering(size, (RNN, BIASED, LSTM)), *_gradients(size, RNN, BIASED, LSTM)),
        predictions=(
            Prediction(
                f"over {longest} frames an RNN stays below the middle between chance and perfect",
                PERCENT,
                62.5,
                accuracy(kind="trial", model=RNN, length=longest),
                less=True,
            ),
            Prediction("over all lengths an LSTM is more accurate than an RNN", POINTS, MATTERS, better),
            Prediction(
                "an RNN's gradient shrinks more over the lag than an LSTM's",
                "decades",
                0.5,
                lambda table: list(_decades(table, RNN) - _decades(table, BIASED)),
            ),
        ),
        controls=(
            reaches(
                f"an LSTM reaches 90 % over {longest} frames, so that the steps suffice",
                90,
                kind="trial",
                model=BIASED,
                length=longest,
            ),
        ),
        plot=_MEMORY_PLOT,
    )


def default_lstm_remembers(size: Size) -> Claim:
    def better(table: pd.DataFrame) -> list[float]:
        return list(_lengths_mean(LSTM, size)(table) - _lengths_mean(RNN, size)(table))

    return Claim(
        name="default_lstm_remembers",
        says="An LSTM as torch initialises it remembers longer than an RNN.",
        source="what people expect of `torch.nn.LSTM`; Józefowicz et al. (2015) warn of it",
        protocol=f"{_memory_protocol(size)} torch's forget gates begin half closed: every frame halves what the "
        "cell holds.",
        experiments=(*_remembering(size, (RNN, LSTM)), *_gradients(size, RNN, LSTM)),
        predictions=(
            Prediction("over all lengths torch's LSTM is more accurate than an RNN", POINTS, MATTERS, better),
            Prediction(
                "an RNN's gradient shrinks more over the lag than torch's LSTM's",
                "decades",
                0.5,
                lambda table: list(_decades(table, RNN) - _decades(table, LSTM)),
            ),
        ),
        plot=_MEMORY_PLOT,
    )


_HIDDEN = 256


def _slopes(table: pd.DataFrame, network: str, mode: str) -> pd.Series:
    """Of every round, the exponent p of latency ∝ clip_length^p over the longer half of the lengths."""
    import numpy as np
    import pandas as pd

    chosen = table[(table["network"] == network) & (table["mode"] == mode) & (table["cores"] == "all")]
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
    """Of every round, how many times faster the longest clip is on all cores than on one."""
    longest = {"network": network, "mode": mode, "clip_length": table["clip_length"].max()}
    alone, together = (per_seed(table, "latency_s", cores=which, **longest) for which in ("one", "all"))
    faster: pd.Series = alone / together
    return faster


def lstm_is_serial(size: Size) -> Claim:
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
            {"mode": "train", "cores": "all"}, log_x=True, log_y=True,
        ),
    )  # fmt: skip


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
        says="A TCN's receptive field is flexible: more levels, larger dilations or longer filters change it at will.",
        source="Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.5",
        protocol="A cue in the first of 40 frames, distractors after it. A TCN whose field is 29 frames cannot see "
        "it; one level more (61 frames) or filters of five taps (57 frames) can.",
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
        plot=Plot("field", "top1", "model", "receptive field, frames", "top-1 accuracy", percent=True, level=0.25),
    )


def tcn_gradients_are_stable(size: Size) -> Claim:
    recurrent = {RNN: "an RNN's", LSTM: "torch's LSTM's", BIASED: "an LSTM's with open forget gates"}
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


def tcn_trains_in_less_memory(size: Size) -> Claim:
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
                {"model": name, "like": LSTM, "hidden_size": _HIDDEN, "batch_size": 16, "clip_length": length},
                0,
            )
            for length in lengths
            for name in (LSTM, "tcn")
        ),
        predictions=tuple(
            Prediction(
                f"over {length} frames an LSTM's training step holds more than a TCN's",
                "times as much",
                TIMES,
                ratio("peak_bytes", named(LSTM), named("tcn"), clip_length=length),
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


def tcn_streams_in_more_memory(size: Size) -> Claim:
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
            for name in (LSTM, "tcn")
        ),
        predictions=(
            Prediction(
                f"with a field of {lengths[0]} frames a TCN already carries more than an LSTM",
                "times as much",
                TIMES,
                ratio("state_bytes", named("tcn"), named(LSTM), clip_length=lengths[0]),
                exact=True,
            ),
        ),
        plot=Plot(
            "clip_length", "state_bytes", "model", "frames that the receptive field covers", "bytes carried",
            log_x=True, log_y=True,
        ),
    )  # fmt: skip


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
        "scratch, and from weights learnt on discs on grey noise.",
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


def lstm_needs_data(size: Size) -> Claim:
    task, few, steps = "token_memory:clip_length=16", (64, 256, 1024), 1000
    names = {LSTM: "an LSTM", "tcn": "a TCN"}
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
            for one in experiments(
                "trial", size, tuple(names), steps, rates=TWO_RATES, task=task, count=count,
                given={"examples": count} if count in few else {},
            )
        ),
        predictions=tuple(
            Prediction(
                f"of {count} examples a TCN learns more than an LSTM",
                POINTS,
                MATTERS,
                difference(named("tcn"), named(LSTM), task=task, count=count),
            )
            for count in few[:2]
        ),
        controls=tuple(
            reaches(f"{words} learns the task without a limit", 90, model=name, task=task, count=unlimited)
            for name, words in names.items()
        ),
        plot=Plot(
            "count", "top1", "model", "different examples seen", "top-1 accuracy", log_x=True, percent=True, level=0.25
        ),
    )  # fmt: skip


def lstm_misses_subtle(size: Size) -> Claim:
    names = {"cnn_lstm": "an LSTM", "cnn_tcn": "a TCN"}
    return Claim(
        name="lstm_misses_subtle_change",
        says="An LSTM keeps strong temporal change and misses subtle change, which a TCN sees.",
        source="lecture notes on video classification",
        protocol="Which way a disc moves, by three sixteenths of a pixel to 48 in all: the amplitude at which accuracy "
        "passes 75 %, of an LSTM and of a TCN over the same 2D CNN. The first half of the training shows the "
        "largest motion alone.",
        experiments=experiments("amplitude", size, tuple(names), AMPLITUDE_STEPS, pattern="disc"),
        predictions=(coarser("an LSTM needs larger motions than a TCN", *names),),
        plot=Plot(
            "amplitude", "top1", "model", "motion in all, pixels", "top-1 accuracy", log_x=True, percent=True, level=0.5
        ),
        controls=tuple(
            reaches(f"{words} tells the largest motion", 80, model=name, amplitude=48.0)
            for name, words in names.items()
        ),
    )
