"""vidkernels: kernels for video classification, each as a readable reference, the library's own, and custom ones."""

from __future__ import annotations

from vidkernels import conv3d as _conv3d
from vidkernels.op import Case, Implementation, Inputs, Op, Tolerance, Unavailable

OPS: dict[str, Op] = {op.name: op for op in (_conv3d.OP,)}
"""Every op by name."""

__all__ = ["OPS", "Case", "Implementation", "Inputs", "Op", "Tolerance", "Unavailable"]
