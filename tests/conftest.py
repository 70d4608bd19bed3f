"""Settings of all tests."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: threads of several workers would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Before Triton is imported by anybody: its own functions are decorated then, and read it.
    os.environ.setdefault("TRITON_INTERPRET", "1")
