"""Depthwise 3D convolution, one filter per channel: y[n,c,t,h,w] = b[c] + Σ w[c,0,i,j,k] · x[n,c, t·s+i·d−p, …].

Source: Feichtenhofer (2020), arXiv:2004.04730 (X3D), §3.1; Tran et al. (2019), arXiv:1904.02811, §3.
"""

from vidkernels.depthwise_conv3d import cuda_rolling, library, reference, triton_direct
from vidkernels.depthwise_conv3d.case import OP, DepthwiseConv3dCase

__all__ = ["OP", "DepthwiseConv3dCase", "cuda_rolling", "library", "reference", "triton_direct"]
