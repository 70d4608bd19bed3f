"""(2+1)D convolution: a 1×k×k convolution in space, batch norm, ReLU, and a k×1×1 convolution in time.

Source: Tran et al. (2018), arXiv:1711.11248, §3.5.
"""

from vidkernels.conv2plus1d import library, reference, triton_fused
from vidkernels.conv2plus1d.case import OP, BatchNorm, Conv2plus1dCase

__all__ = ["OP", "BatchNorm", "Conv2plus1dCase", "library", "reference", "triton_fused"]
