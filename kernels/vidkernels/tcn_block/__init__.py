"""TCN residual block: [weight-normed causal convolution, ReLU, dropout] twice, plus the input, and a ReLU.

Source: Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.4, figure 1(b).
"""

from vidkernels.tcn_block import library, reference, triton_fused
from vidkernels.tcn_block.case import OP, TcnBlockCase, WeightNorm

__all__ = ["OP", "TcnBlockCase", "WeightNorm", "library", "reference", "triton_fused"]
