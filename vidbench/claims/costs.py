"""Claims about what is timed and counted: latency, memory, parameters, non-linearities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vidbench.claims import Claim, Experiment, Plot, Prediction, per_seed
from vidbench.claims.protocols import LSTM, OWN, TIMES, Size, named, ratio
from vidbench.sweep import Value

if TYPE_CHECKING:
    import pandas as pd

_HIDDEN = 256


def _slopes(table: pd.DataFrame, network: str, mode: str) -> pd.Series:
    """Of every round, the exponent p of latency ∝ clip_length^p over the longer half of the lengths."""
    import numpy as np
    import pandas as pd

    chosen = table[(table["network"] == network) & (table["mode"] == mode) & (table["cores"] == "all")]
    lengths = sorted(set(chosen["clip_length"]))
    chosen = chosen[chosen["clip_length"] >= lengths[len(lengths) // 2]]
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
    if size.device == "cpu":
        how = (
            "A few cores are busy with a single frame's work already, so latency over clip length shows nothing: what "
            "is parallel over time is what more cores make faster. The longest clip on all cores against one core."
        )
    else:
        how = (
            "What is parallel over time grows with a smaller power of the clip length, over the longer half of the "
            "lengths, as long as the device has units to spare."
        )

    def prediction(mode: str) -> Prediction:
        if size.device == "cpu":
            return Prediction(
                f"{modes[mode]}, more cores speed a TCN up by more than an LSTM",
                "times the speed-up",
                TIMES,
                lambda table: list(_speedup(table, "tcn", mode) / _speedup(table, "lstm", mode)),
            )
        return Prediction(
            f"{modes[mode]}, an LSTM's latency grows with a higher power of the clip length than a TCN's",
            "in the exponent",
            0.1,
            lambda table: list(_slopes(table, "lstm", mode) - _slopes(table, "tcn", mode)),
        )

    return Claim(
        name="lstm_is_serial_tcn_is_not",
        says="An LSTM cannot be parallelised over time; a TCN can.",
        source="Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.5",
        protocol="Latency of an LSTM layer and of a TCN whose receptive field covers the clip, both of width 256, "
        f"on one clip of {lengths[0]} to {lengths[-1]} frames of features, samples in turn. {how}",
        experiments=tuple(
            Experiment("scaling", {"mode": mode, "hidden_size": _HIDDEN, "lengths": lengths}, seed)
            for seed in range(1, size.seeds + 1)
            for mode in modes
        ),
        predictions=tuple(map(prediction, modes)),
        plot=Plot(
            "clip_length", "latency_s", "line", "clip length, frames", "seconds per clip", {"cores": "all"},
            log_x=True, log_y=True,
        ),
    )  # fmt: skip


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


def tcn_streams_in_less_memory(size: Size) -> Claim:
    lengths = size.timed_lengths
    return Claim(
        name="tcn_streams_in_less_memory",
        says="A TCN needs less memory in streaming than an LSTM.",
        source="lecture notes on video classification, of a TCN's memory as such; Bai, Kolter & Koltun (2018), "
        "arXiv:1803.01271, §3.5, have the opposite among a TCN's disadvantages",
        protocol="Bytes carried from frame to frame of a stream, both of width 256, by receptive field: counted. "
        "The TCN keeps the past inputs of each of its convolutions, so that a frame costs one step; the raw input "
        "alone would be smaller and cost the whole network again. The LSTM keeps its state.",
        experiments=tuple(
            Experiment("stream_state", {"model": name, "clip_length": length, "hidden_size": _HIDDEN}, 0)
            for length in lengths
            for name in (LSTM, "tcn")
        ),
        predictions=(
            Prediction(
                f"with a field of {lengths[0]} frames an LSTM carries more than a TCN",
                "times as much",
                TIMES,
                ratio("state_bytes", named(LSTM), named("tcn"), clip_length=lengths[0]),
                exact=True,
            ),
        ),
        plot=Plot(
            "clip_length", "state_bytes", "model", "frames that the receptive field covers", "bytes carried",
            log_x=True, log_y=True,
        ),
    )  # fmt: skip


def twice_the_nonlinearities(size: Size) -> Claim:
    factorised: dict[str, Value] = {"model": "r2plus1d_18", "mid_channels": "per_convolution"}
    whole: dict[str, Value] = {"model": "r3d_18"}
    params = ratio("params", named("r2plus1d_18"), whole)
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
                ratio("relus", named("r2plus1d_18"), whole), exact=True,
            ),
            Prediction(
                "their parameters agree", "% apart", 1.0,
                lambda table: [100 * abs(one - 1) for one in params(table)], less=True, exact=True,
            ),
        ),
        plot=Plot("model", "relus", "model", "", "rectifications in a forward pass"),
    )  # fmt: skip


def bottlenecks_pay(size: Size) -> Claim:
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
                ratio("macs", named(naive), named("i3d_rgb")), exact=True,
            ),
            Prediction(
                "without them it takes longer", "times as long", TIMES,
                ratio("latency_s", named(naive), named("i3d_rgb")),
            ),
        ),
        plot=Plot("model", "latency_s", "model", "", "seconds per clip"),
    )  # fmt: skip
