"""Dense 3D convolution: y[n,o,t,h,w] = b[o] + Σ w[o,c,i,j,k] · x[n,c, t·s+i·d−p, …].

Source: Tran et al. (2015), arXiv:1412.0767, §3.1.
"""

from vidkernels.conv3d import library, matmul, onednn, reference, triton_igemm, triton_stem
from vidkernels.conv3d.case import OP, Conv3dCase

__all__ = ["OP", "Conv3dCase", "library", "matmul", "onednn", "reference", "triton_igemm", "triton_stem"]
