# mypy: ignore-errors
"""The arithmetic of one cell, in float32, for the kernels of the recurrence."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """2σ(2x) − 1, which knows no ∞/∞; near 0, where that cancels, a series."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    return tl.where(square < 0.04, series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def lstm_backward(i, f, g, o, c_before, grad_h, grad_c):
    """Gradients of the four gates before their activations, and of the cell before the frame."""
    c = tanh(f * c_before + i * g)
    grad_c += grad_h * o * (1 - c * c)
    grad_i = grad_c * g * i * (1 - i)
    grad_f = grad_c * c_before * f * (1 - f)
    grad_g = grad_c * i * (1 - g * g)
    grad_o = grad_h * c * o * (1 - o)
    return grad_i, grad_f, grad_g, grad_o, grad_c * f
