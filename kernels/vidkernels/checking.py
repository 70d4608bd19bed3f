"""Numerical agreement with float64: forward, border, and gradients of every input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidkernels.op import DTYPES, Case, Inputs, Op, tensors_of


@dataclass(frozen=True)
class Results:
    """What one call yields: outputs, and gradients of a fixed random projection of them."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...] = ()
    """In the order of `Inputs.tensors()`: the activation first, then the weights; None where none flows."""
    inputs_changed: bool = False
    """The call wrote to the activation or to a weight; running statistics may be updated."""


@dataclass(frozen=True)
class Errors:
    """Relative Frobenius errors against float64; None where the case has no such part."""

    output: float
    border: float | None = None
    input_gradient: float | None = None
    weight_gradient: float | None = None

    def failures(self, op: Op, case: Case, library: Errors | None = None, *, slack: float = 1.0) -> list[str]:
        """Every gate that is not passed, as text; empty when all are. NaN passes none.

        Args:
            library: The library's own errors on the case: twice that of its weight gradients passes as well, and of
                its input gradient in 16 bits.
            slack: A factor on the gates.
        """
        gate = op.tolerances[case.dtype]
        gates = {
            "output": gate.forward,
            "border": gate.forward,
            "input_gradient": gate.forward if gate.input_gradient is None else gate.input_gradient,
            "weight_gradient": gate.weight_gradient,
        }
        if library is not None:
            # Some of torch's own backward passes accumulate in 16 bits.
            narrow = ("input_gradient",) if DTYPES[case.dtype].itemsize == 2 else ()
            for name in ("weight_gradient", *narrow):
                gates[name] = max(gates[name], 2 * (getattr(library, name) or 0.0))
        found = {name: getattr(self, name) for name in gates}
        return [
            f"{name.replace('_', ' ')} error {error:.2e} exceeds {slack * gates[name]:.1e}"
            for name, error in found.items()
            if error is not None and not error <= slack * gates[name]
        ]


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64; inf where the shapes differ, NaN where `got` holds one."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    want = want.double()
    difference: float = torch.linalg.vector_norm(got.to(want.device).double() - want).item()
    scale: float = torch.linalg.vector_norm(want).item()
    if scale == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / scale


def border(tensor: Tensor) -> Tensor:
    """The outermost positions of (N, C, positions…), flat; all of them where nothing lies inside."""
    edge = torch.zeros(tensor.shape[2:], dtype=torch.bool, device=tensor.device)
    for dim in range(edge.dim()):
        edge.select(dim, 0).fill_(True)
        edge.select(dim, -1).fill_(True)
    return tensor[:, :, edge]


def run(
    fn: Callable[..., Any], inputs: Inputs, *, gradients: bool = False, noise_dtype: torch.dtype | None = None
) -> Results:
    """Calls `fn`; with `gradients`, also differentiates Σ outputs · noise by every floating tensor.

    The noise is seeded, drawn on the CPU and rounded to `noise_dtype` (None: the outputs'), so that every
    implementation of a case, and its float64 reference, gets the same. The inputs are copied, strides and all:
    batch norm updates its running statistics in place.
    """
    if not gradients:
        with torch.no_grad():
            copies = inputs.map(_copy)
            return Results(tensors_of(fn(*copies.args, **copies.kwargs)), inputs_changed=_differ(inputs, copies))
    leaves = inputs.map(lambda tensor: _copy(tensor).requires_grad_(tensor.is_floating_point()))
    outputs = tensors_of(fn(*leaves.args, **leaves.kwargs))
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(out.shape, generator=generator).to(noise_dtype or out.dtype).to(out) for out in outputs]
    wanted = [tensor for tensor in leaves.tensors() if tensor.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, noise, allow_unused=True)
    return Results(tuple(output.detach() for output in outputs), tuple(grads), _differ(inputs, leaves))


def _differ(before: Inputs, after: Inputs) -> bool:
    """Whether a tensor that is an argument of its own, not part of a batch norm, has other values."""
    pairs = zip(before.args, after.args, strict=True)
    return any(isinstance(was, Tensor) and not torch.equal(was, now) for was, now in pairs)


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the same strides, gaps included; where elements overlap, the tensor itself."""
    tensor = tensor.detach()
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return tensor
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def oracle(op: Op, case: Case, inputs: Inputs, *, gradients: bool = False) -> Results:
    """The reference in float64 on the CPU, of the same, already rounded, inputs."""
    exact = inputs.map(lambda tensor: tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.cpu())
    return run(op["reference"].fn, exact, gradients=gradients, noise_dtype=DTYPES[case.dtype])


def compare(op: Op, got: Results, want: Results) -> Errors:
    """The errors of results against the oracle's; several outputs or weights count by their worst."""
    if len(got.outputs) != len(want.outputs) or len(got.gradients) != len(want.gradients):
        return Errors(output=float("inf"))
    outputs = [(g.cpu(), w) for g, w in zip(got.outputs, want.outputs, strict=True)]
    edges = None
    if op.has_border and all(g.shape == w.shape and w.numel() for g, w in outputs):
        edges = _worst(relative_error(border(g), border(w)) for g, w in outputs)
    gradients = [
        (float("inf") if g is None else relative_error(g.cpu(), w))
        for g, w in zip(got.gradients, want.gradients, strict=True)
        if w is not None
    ]
    return Errors(
        output=_worst(relative_error(g, w) for g, w in outputs),
        border=edges,
        input_gradient=gradients[0] if gradients else None,
        weight_gradient=_worst(gradients[1:]) if len(gradients) > 1 else None,
    )


def _worst(errors: Iterable[float]) -> float:
    """The largest; NaN where there is one."""
    found = list(errors)
    return float("nan") if any(math.isnan(error) for error in found) else max(found, default=0.0)


def check(op: Op, name: str, case: Case, *, device: torch.device | str = "cpu", seed: int = 0) -> Errors:
    """The errors of one implementation on fresh inputs of a case, gradients included where the case trains.

    Dropout is left out: no two implementations draw the same.
    """
    case = case.without_randomness()
    inputs = op.inputs(case, seed=seed, device=device)
    want = oracle(op, case, inputs, gradients=case.training)
    return compare(op, run(op[name].fn, inputs, gradients=case.training), want)
