"""`accelerate`: a model's layers replaced by faster ones, where they agree on an example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vidkernels.nn as layers
from vidkernels import OPS, Unavailable, choosing
from vidkernels.checking import relative_error
from vidkernels.op import Case, dtype_name


@dataclass(frozen=True)
class Row:
    """One layer, or the few that one op can stand for."""

    name: str
    """Of the layer in the model, empty for the model itself; of several, the first to the last: `stem.0-3`."""
    kind: str
    """The class of `vidkernels.nn` that would take its place."""
    op: str
    case: Case | None
    """Of the first call on the example; None where it was not called, or could not be taken over."""
    implementation: str | None
    swapped: bool
    reason: str
    """Why not; empty where it is swapped."""
    error: float | None
    """Relative Frobenius error of the outputs against the model's own layer, of the worst call."""


@dataclass(frozen=True)
class Report:
    """What was swapped and what was kept."""

    rows: tuple[Row, ...]
    error: float | None
    """Relative Frobenius error of the whole model's outputs on the example, before anything was undone."""

    @property
    def swapped(self) -> tuple[Row, ...]:
        """The layers that were swapped."""
        return tuple(row for row in self.rows if row.swapped)

    @property
    def kept(self) -> tuple[Row, ...]:
        """Those that were not, with the reason."""
        return tuple(row for row in self.rows if not row.swapped)

    def __str__(self) -> str:
        """A table for people."""
        head = ("layer", "kind", "case", "implementation", "error", "")
        body = [
            (
                row.name,
                row.kind,
                _case_text(row.case),
                row.implementation or "",
                "" if row.error is None else f"{row.error:.1e}",
                "swapped" if row.swapped else f"kept: {row.reason}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *body)
        )
        whole = "" if self.error is None else f"; the whole model's error is {self.error:.1e}"
        return f"{table}\n{len(self.swapped)} of {len(self.rows)} swapped{whole}"


def _case_text(case: Case | None) -> str:
    """The sizes, as `64→144 1×3×3 @16×56×56`."""
    if case is None:
        return ""
    sizes = vars(case)
    channels = "→".join(
        str(sizes[name])
        for name in ("in_channels", "mid_channels", "input_features", "out_channels", "hidden_size")
        if sizes.get(name) is not None
    )
    kernel = sizes.get("kernel_size", ())
    taps = "×".join(map(str, kernel if isinstance(kernel, tuple) else (kernel,)))
    place = "×".join(str(sizes[name]) for name in ("clip_length", "height", "width") if name in sizes)
    return " ".join(part for part in (channels, taps, f"@{place}") if part)


@dataclass
class _Candidate:
    """One or more layers that one module may take the place of."""

    paths: tuple[str, ...]
    """Of the layers, in the order in which they run."""
    kind: str
    make: Callable[[], Any] | None
    """The new module, sharing the parameters."""
    made: Any = None
    op: str = ""
    implementation: str | None = None
    case: Case | None = None
    error: float | None = None
    reason: str = "it was not called on the example"
    inputs: list[Tensor] = field(default_factory=list)

    def drop(self, reason: str) -> None:
        """Keeps the model's own; the first reason stands."""
        if self.made is not None:
            self.made, self.reason = None, reason

    @property
    def name(self) -> str:
        last = self.paths[-1].rpartition(".")[2]
        return self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]}-{last}"


def accelerate(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    implementation: str | Mapping[str, str] = "auto",
    tolerance: float | None = None,
    show: Callable[[str], object] | None = print,
) -> tuple[nn.Module, Report]:
    """A copy of a model in evaluation mode, with layers replaced by faster ones; and what was done.

    Considered are Conv3d (dense and depthwise) with the BatchNorm3d and the ReLU or SiLU that follow it in a
    Sequential, (2+1)D pairs in one Sequential, TCN blocks, causal Conv1d, LSTM and RNN. Every new layer is run on what
    the old one meets in the example; where the outputs differ by more than the tolerance, the old one stays. So it
    does where torch's own implementation would be chosen and nothing is fused. In the end both models are
    compared; where they differ, nothing is swapped at all.

    Args:
        model: Left as it is.
        example: What the model is called with: a tensor, or a tuple of arguments, on the model's device.
        implementation: `auto`; or a name for all ops; or a name for each op, and the layers of other ops stay.
        tolerance: The largest relative Frobenius error of a layer's outputs, and of the model's. None: twice the
            op's tolerance, as both sides are rounded, and for the model that of every swapped layer together.
        show: What is done with the report's text; None: nothing.

    Returns:
        The model, and a report that prints as a table. Of a group, the first place holds the new layer and the others
        `Identity`, so names of parameters change: load weights into the original, and accelerate again.
    """
    args = example if isinstance(example, tuple) else (example,)
    new = copy.deepcopy(model).eval()
    slot = nn.ModuleDict({"model": new})
    candidates = [*_candidates(new)]
    with torch.no_grad():
        for candidate in candidates:
            _make(candidate, implementation)
        handles = [handle for candidate in candidates for handle in _watch(new, candidate, tolerance)]
        try:
            want = new(*args)
        finally:
            for handle in handles:
                handle.remove()
        rows, undo, gates = _swap(slot, candidates)
        got = slot["model"](*args)
    error = max(
        (relative_error(one, other) for one, other in zip(_tensors(got), _tensors(want), strict=True)), default=0.0
    )
    gate = sum(gates) if tolerance is None else tolerance
    if gates and not error <= gate:
        for put_back in reversed(undo):
            put_back()
        why = f"all was undone: the whole model's error {error:.1e} exceeds {gate:.1e}"
        rows = [replace(row, swapped=False, reason=why) if row.swapped else row for row in rows]
    report = Report(tuple(rows), error)
    if show is not None:
        show(str(report))
    return slot["model"], report


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """What could be swapped: pairs first, then the larger of the groups."""
    groups: list[_Candidate] = []
    singles: list[_Candidate] = []
    done = [path for path, module in model.named_modules() if isinstance(module, layers.Layer)]
    for path, module in model.named_modules():
        if any(_within(path, other) for other in done):
            continue
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            groups += _of_sequence(path, module)
        singles += _of_module(path, module)
    yield from sorted(groups, key=lambda group: (group.kind != "Conv2plus1d", -len(group.paths)))
    yield from singles


def _of_sequence(path: str, sequence: nn.Sequential) -> Iterator[_Candidate]:
    names = [f"{path}.{name}" if path else name for name in sequence._modules]
    parts: list[Any] = list(sequence)
    for i, first in enumerate(parts):
        rest = parts[i + 1 : i + 4]
        if type(first) is not nn.Conv3d or not rest:
            continue
        kinds = [type(part) for part in rest]
        if kinds == [nn.BatchNorm3d, nn.ReLU, nn.Conv3d] and first.kernel_size[0] == 1 != rest[2].kernel_size[0]:
            pair = sequence if len(parts) == 4 else nn.Sequential(first, *rest)
            paths = (path,) if len(parts) == 4 else tuple(names[i : i + 4])
            yield _Candidate(paths, "Conv2plus1d", lambda pair=pair: layers.Conv2plus1d.of(pair))  # type: ignore[misc]
        if kinds[0] is nn.BatchNorm3d:
            known = len(kinds) > 1 and kinds[1] in layers.ACTIVATION_NAMES
            group = (first, *rest[: 2 if known else 1])
            yield _Candidate(
                tuple(names[i : i + len(group)]),
                "ConvBnAct3d",
                lambda group=group: layers.ConvBnAct3d.of(*group),  # type: ignore[misc]
            )
        elif kinds[0] in layers.ACTIVATION_NAMES:
            activation = layers.ACTIVATION_NAMES[kinds[0]]
            yield _Candidate(
                tuple(names[i : i + 2]),
                "Conv3d",
                lambda conv=first, activation=activation: layers.Conv3d.of(conv, activation=activation),  # type: ignore[misc]
            )


def _of_module(path: str, module: nn.Module) -> Iterator[_Candidate]:
    if type(module) is nn.Conv3d:
        yield _Candidate((path,), "Conv3d", lambda: layers.Conv3d.of(module))
    elif type(module) is nn.LSTM:
        yield _Candidate((path,), "LSTM", lambda: layers.LSTM.of(module))
    elif type(module) is nn.RNN:
        yield _Candidate((path,), "RNN", lambda: layers.RNN.of(module))
    elif all(isinstance(getattr(module, name, None), nn.Conv1d) for name in ("conv1", "conv2")):
        yield _Candidate((path,), "TcnBlock", lambda: layers.TcnBlock.of(module))
    elif isinstance(module, nn.Conv1d) and type(module).forward is not nn.Conv1d.forward:
        # A layer that pads by itself; whether it is causal, its outputs tell.
        yield _Candidate((path,), "CausalConv1d", lambda: layers.CausalConv1d.of(module))


def _make(candidate: _Candidate, implementation: str | Mapping[str, str]) -> None:
    assert candidate.make is not None
    try:
        made = candidate.make()
    except ValueError as error:
        candidate.reason = str(error)
        return
    candidate.op = made.op
    name = implementation if isinstance(implementation, str) else implementation.get(made.op)
    if name is None:
        candidate.reason = f"no implementation of {made.op} is named"
    elif name != "auto" and name not in OPS[made.op].implementations:
        candidate.reason = f"{made.op} has no implementation {name!r}"
    else:
        made.implementation = candidate.implementation = name
        candidate.made = made.eval()


def _watch(model: nn.Module, candidate: _Candidate, tolerance: float | None) -> Iterator[Any]:
    """Hooks that compare the candidate with what it stands for, in every call."""
    if candidate.made is None:
        return
    modules = [model.get_submodule(path) for path in candidate.paths]
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        candidate.drop("it has hooks")
        return

    def before(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        values = (*args, *keywords.values())
        if len(values) != 1 or not isinstance(values[0], Tensor):
            candidate.drop("it was called with more than features, or with something else")
            return
        # An activation in place may write to it before the group has ended.
        candidate.inputs.append(values[0].detach().clone())

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not candidate.inputs:
            candidate.drop("its layers are called apart as well")
        elif candidate.made is not None:
            try:
                _compare(candidate, candidate.inputs[-1], output, tolerance)
            except (Unavailable, ValueError) as error:
                candidate.drop(str(error))
        candidate.inputs = candidate.inputs[:-1]

    yield modules[0].register_forward_pre_hook(before, with_kwargs=True)
    yield modules[-1].register_forward_hook(after)


def _compare(candidate: _Candidate, x: Tensor, want: Any, tolerance: float | None) -> None:
    """Runs the candidate on x; drops it where its output differs, or where nothing is won.

    Raises:
        ValueError: Features that the op does not take.
        Unavailable: The implementation cannot run this.
    """
    made, op = candidate.made, OPS[candidate.op]
    arguments, parameters = made.call(x)
    case = op.case_of(*arguments, **parameters)
    candidate.case = candidate.case or case
    if made.implementation == "auto":
        chosen = choosing.choose(op, case, x.device).implementation
        candidate.implementation = chosen
        if chosen == "library" and candidate.kind != "ConvBnAct3d":
            candidate.drop("torch's own is the fastest known")
            return
    got = made(x)
    pairs = zip(_tensors(got), _tensors(want), strict=True)
    error = max(relative_error(one, other) for one, other in pairs)
    candidate.error = max(error, candidate.error or 0.0)
    gate = _gate(candidate, x, tolerance)
    if not error <= gate:
        candidate.drop(f"its outputs differ: error {error:.1e} exceeds {gate:.1e}")
    else:
        candidate.reason = ""


def _gate(candidate: _Candidate, x: Tensor, tolerance: float | None) -> float:
    return 2 * OPS[candidate.op].tolerances[dtype_name(x)].forward if tolerance is None else tolerance


def _swap(slot: nn.ModuleDict, candidates: list[_Candidate]) -> tuple[list[Row], list[Callable[[], None]], list[float]]:
    """Puts the accepted ones in place, larger groups first; returns how to undo it, and what error each may add."""
    rows: list[Row] = []
    undo: list[Callable[[], None]] = []
    gates: list[float] = []
    taken: set[str] = set()
    order = {path: i for i, (path, _) in enumerate(slot["model"].named_modules())}
    for candidate in candidates:
        if any(_within(path, other) for path in candidate.paths for other in taken):
            continue
        if candidate.inputs:
            candidate.drop("its layers are called apart as well")
        swapped = candidate.made is not None and candidate.reason == ""
        rows.append(
            Row(
                candidate.name,
                candidate.kind,
                candidate.op,
                candidate.case,
                candidate.implementation,
                swapped,
                candidate.reason,
                candidate.error,
            )
        )
        if not swapped:
            continue
        assert candidate.case is not None
        gates.append(2 * OPS[candidate.op].tolerances[candidate.case.dtype].forward)
        taken.update(candidate.paths)
        first, *others = candidate.paths
        undo += [_put(slot, first, candidate.made), *(_put(slot, path, nn.Identity()) for path in others)]
    rows.sort(key=lambda row: order[row.name.partition("-")[0]])
    return rows, undo, gates


def _within(path: str, other: str) -> bool:
    return not other or path == other or path.startswith(f"{other}.")


def _put(slot: nn.ModuleDict, path: str, module: nn.Module) -> Callable[[], None]:
    parent, _, name = f"model.{path}".rstrip(".").rpartition(".")
    holder = slot.get_submodule(parent)
    before = holder._modules[name]
    holder._modules[name] = module

    def put_back() -> None:
        holder._modules[name] = before

    return put_back
