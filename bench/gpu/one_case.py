"""One small call of one implementation, forward and backward: what compute-sanitizer looks at.

python -m bench.gpu.one_case OP IMPLEMENTATION CASE DTYPE DEVICE
"""

from __future__ import annotations

import sys

from bench.gpu.plan import SMALL
from vidbench.environment import precision
from vidbench.tune import bind, case_of
from vidkernels import OPS

UNFIT = 75
"""Exit code: the implementation cannot run the case."""


def main(op_name: str, implementation: str, case_name: str, dtype: str, device: str) -> int:
    """Runs it; the sanitizer judges."""
    op, values = OPS[op_name], SMALL[op_name][case_name]
    ran = False
    with precision(dtype):
        for direction in ("forward", "train"):
            case = case_of(op, values, dtype, direction)
            if why := op[implementation].why_not(case, device):
                print(why)
                continue
            bind(op[implementation].fn, op.inputs(case, device=device), direction)()
            ran = True
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return 0 if ran else UNFIT


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
