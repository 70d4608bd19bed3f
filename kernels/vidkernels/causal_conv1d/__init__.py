"""Causal dilated 1-D convolution: y[n,o,t] = b[o] + Σ w[o,c,k] · x[n,c, t − (K−1−k)·d], with x = 0 before the clip.

Source: Bai, Kolter & Koltun (2018), arXiv:1803.01271, §3.2-3.3.
"""

from vidkernels.causal_conv1d import library, reference, triton_phased
from vidkernels.causal_conv1d.case import OP, CausalConv1dCase

__all__ = ["OP", "CausalConv1dCase", "library", "reference", "triton_phased"]
