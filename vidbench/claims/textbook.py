"""The claims: what the textbooks and papers of video classification say, and how each is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vidbench.claims import Claim, costs, sequences, video
from vidbench.claims.protocols import SIZES, Size
from vidbench.sweep import unknown

CLAIMS: tuple[Callable[[Size], Claim], ...] = (
    video.pooling_loses_order,
    video.average_pooling_salient,
    video.max_pooling_salient,
    video.conv3d_reads_order,
    sequences.rnn_forgets,
    sequences.orthogonal_rnn_forgets,
    sequences.default_lstm_remembers,
    costs.lstm_is_serial,
    sequences.tcn_field_is_flexible,
    sequences.tcn_gradients_are_stable,
    sequences.tcn_gradients_against_open_gates,
    costs.tcn_trains_in_less_memory,
    costs.tcn_streams_in_less_memory,
    sequences.tcn_transfers,
    sequences.lstm_needs_data,
    sequences.open_lstm_needs_data,
    sequences.lstm_misses_subtle,
    video.rigid_kernels,
    video.flow_is_short_term,
    video.streams_complement,
    video.streams_are_not_aligned,
    video.slow_fusion_is_best,
    costs.twice_the_nonlinearities,
    video.easier_to_optimise,
    costs.bottlenecks_pay,
)


def claims(size_name: str, device: str = "cpu") -> tuple[Claim, ...]:
    """The claims at a size, small or full, to be put to the test on a device.

    Raises:
        RequestError: No such size.
    """
    if size_name not in SIZES:
        raise unknown("size", size_name, SIZES)
    size = replace(SIZES[size_name], device=device.partition(":")[0])
    return tuple(make(size) for make in CLAIMS)
