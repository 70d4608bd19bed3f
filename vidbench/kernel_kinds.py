"""What a kernel or an operator does, as far as its name tells. Needs no torch."""

from __future__ import annotations

import re

_LAYS_OUT = re.compile(
    r"^Memcpy\b|(?<!conv_)transpose|nchwTo|nhwcTo|nchwAddPadding|nhwcAddPadding|convertTensor|reorder"
    r"|copy_|copy_kernel|_copy|contiguous",
    re.IGNORECASE,
)
"""Parts of names of what does nothing but copy, or lay tensors out anew. A transposed convolution computes."""

_ELEMENTWISE_COPY = "direct_copy_kernel"
"""torch's copies on a GPU are elementwise kernels that say so only in their template's arguments."""

_FUSED = re.compile(r"triton_[a-z]+_fused_")
_FUSED_COPY = re.compile(
    r"triton_[a-z]+_fused(_+(to_copy|copy|clone|contiguous|permute|transpose|unsafe_view|view|reshape|expand))+_+\d+\w*"
)
"""Inductor names a kernel after all that is fused in it: one that computes may copy besides."""

_OPERATOR = re.compile(r"[a-zA-Z_]\w*::[\w.]+")


def lays_out(name: str, full: str = "") -> bool:
    """Whether a kernel, a primitive or an operator only copies, most often into another layout.

    Args:
        name: Its short name.
        full: With template arguments, where it has them.
    """
    if _FUSED.match(name):
        return _FUSED_COPY.fullmatch(name) is not None
    return _LAYS_OUT.search(name) is not None or _ELEMENTWISE_COPY in full


def is_operator(name: str) -> bool:
    """Whether a thread's event is an operator of torch's, rather than a scope or the driver's."""
    return _OPERATOR.fullmatch(name) is not None
