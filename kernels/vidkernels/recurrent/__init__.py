"""Recurrent layers over the frames of a clip: the plain RNN and the LSTM.

Source: Elman (1990), Cognitive Science 14(2); Hochreiter & Schmidhuber (1997), Neural Computation 9(8), with the
forget gate of Gers et al. (2000); as used in Donahue et al. (2015), arXiv:1411.4389, §2.
"""

from vidkernels.recurrent import cuda_cluster, library, reference, triton_block, triton_gates
from vidkernels.recurrent.case import LSTM, RNN, RecurrentCase

__all__ = ["LSTM", "RNN", "RecurrentCase", "cuda_cluster", "library", "reference", "triton_block", "triton_gates"]
