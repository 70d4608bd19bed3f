"""The claims: what the textbooks and papers of video classification say, and how each is tested."""

from __future__ import annotations

from collections.abc import Callable

from vidbench.claims import Claim, sequences, video
from vidbench.claims.protocols import SIZES, Size
from vidbench.sweep import unknown

CLAIMS: tuple[Callable[[Size], Claim], ...] = (
    video.pooling_loses_order,
    video.pooling_salient,
    video.conv3d_reads_order,
    sequences.rnn_forgets,
    sequences.default_lstm_remembers,
    sequences.lstm_is_serial,
    sequences.tcn_field_is_flexible,
    sequences.tcn_gradients_are_stable,
    sequences.tcn_trains_in_less_memory,
    sequences.tcn_streams_in_more_memory,
    sequences.tcn_transfers,
    sequences.lstm_needs_data,
    sequences.lstm_misses_subtle,
    video.rigid_kernels,
    video.flow_is_short_term,
    video.streams_complement,
    video.streams_are_not_aligned,
    video.slow_fusion_is_best,
    video.twice_the_nonlinearities,
    video.easier_to_optimise,
    video.bottlenecks_pay,
)


def claims(size_name: str) -> tuple[Claim, ...]:
    """The claims at a size, small or full.

    Raises:
        RequestError: No such size.
    """
    if size_name not in SIZES:
        raise unknown("size", size_name, SIZES)
    size = SIZES[size_name]
    return tuple(make(size) for make in CLAIMS)
