"""Checks, sanitizes, times and tunes every kernel on a GPU, within the minutes given; see bench/gpu/README.md."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Asking for a device must not open it: the workers are forked, and each opens its own.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

from bench.gpu.plan import SHARES
from bench.gpu.session import SUMMARY, Session

UNREACHED = 3
"""Exit code: time ran out before everything was reached."""

SHOWN_CHARACTERS = 9000


def main() -> int:
    """Carries out what is asked for; 0 when all was reached."""
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for what comes back")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop by oneself after so many; default 9")
    parser.add_argument("--parts", default=",".join(SHARES), help="of %(default)s; the environment comes first anyway")
    parser.add_argument("--resume", type=Path, nargs="*", default=[], help="folders or archives of earlier calls")
    parser.add_argument("--only", default="", metavar="REGEX", help="units in whose name this is found")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--smoke", action="store_true", help="two tiny layers: tries the whole of this out")
    given = parser.parse_args()
    parts = given.parts.split(",")
    for part in parts:
        if part not in SHARES:
            parser.error(f"unknown part {part!r}: known: {', '.join(SHARES)}")
    from bench.gpu.call import Call  # takes seconds: after what is asked for has been understood

    session = Session(given.out, 60 * given.minutes, given.resume)
    try:
        reached = Call(session, device=given.device, smoke=given.smoke, only=given.only).carry_out(parts)
    finally:
        session.close()
    print((given.out / SUMMARY).read_text()[:SHOWN_CHARACTERS])
    return 0 if reached else UNREACHED


if __name__ == "__main__":
    sys.exit(main())
