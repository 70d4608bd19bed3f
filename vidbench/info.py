"""What a model costs and sees: parameters, multiply-adds, activations and receptive field, by layer and in total.

Costs are counted on shapes alone. The receptive field is found by asking the network: a frame that is not a number
spoils all that depends on it, whatever the weights; layer by layer, the most frames that any one output depends on are
counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from vidbench import models
from vidbench.counting import count_model, layer_macs, on_meta
from vidbench.models import Input
from vidbench.sweep import RequestError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One layer, or what is in no layer."""

    name: str
    type: str
    output_shape: Shape | None
    """Of the last call; None where the layer was not called."""
    params: int
    """Its own; a parameter that several layers share counts at the first."""
    macs: int
    activations: int
    """Elements of its outputs where it multiplies, as a convolution, a linear or a recurrent layer: Radosavovic et al.
    (2020), "Designing Network Design Spaces", arXiv:2003.13678, §3.1."""
    receptive_field: int | None = None
    """The most frames of the clip that any one of its outputs depends on; None where that was not found."""

    @property
    def flops(self) -> int:
        """2 × macs."""
        return 2 * self.macs


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model on one clip."""

    model: str
    num_classes: int
    inputs: Mapping[str, Shape]
    modules: tuple[ModuleInfo, ...]
    """In the order of the model; nothing is counted twice, so that columns add up to the total."""
    macs: int | None
    """None of a model that needs values, and not shapes alone."""
    receptive_field: int | None
    """Frames of the clip that the logits depend on."""
    uncounted: tuple[str, ...]
    """Operators that a counter does not know, and counters that disagree."""
    called: Mapping[str, tuple[str, Shape]]
    """Of every module that was called, those that hold the layers too: its type and the shape of its last output."""

    @property
    def params(self) -> int:
        """Of all modules."""
        return sum(module.params for module in self.modules)

    @property
    def activations(self) -> int:
        """Of all modules."""
        return sum(module.activations for module in self.modules)

    def as_json(self) -> dict[str, Any]:
        """Plain data: `total`, and `modules` by name."""
        total = {
            "params": self.params,
            "macs": self.macs,
            "flops": None if self.macs is None else 2 * self.macs,
            "activations": self.activations,
            "receptive_field": self.receptive_field,
        }
        rows = [
            {
                "name": module.name,
                "type": module.type,
                "output_shape": module.output_shape,
                "params": module.params,
                "macs": module.macs,
                "flops": module.flops,
                "activations": module.activations,
                "receptive_field": module.receptive_field,
            }
            for module in self.modules
        ]
        head = {"model": self.model, "num_classes": self.num_classes, "inputs": dict(self.inputs)}
        return {**head, "total": total, "modules": rows, "uncounted": list(self.uncounted)}


class _Uninitialised(TorchFunctionMode):
    """Leaves random values out: on the meta device there are none, and torch imports its compiler to make them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Models that are made in this context have shapes and no values."""
    with torch.device("meta"), _Uninitialised():
        yield


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold parameters or no modules; what makes a weight (weight norm) belongs to its layer."""
    for name, module in model.named_modules():
        parts = name.split(".")
        if "parametrizations" in parts:
            continue
        children = [child for child, _ in module.named_children() if child != "parametrizations"]
        if not children or next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    yield from module.parameters(recurse=False)
    made = getattr(module, "parametrizations", None)
    if isinstance(made, nn.Module):
        yield from made.parameters()


def _outputs(output: Any) -> list[Tensor]:
    """The tensors that a module returns, without the state of a recurrent one."""
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return [output[0]]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _watch(
    modules: Iterable[tuple[str, nn.Module]], note: Callable[[str, nn.Module, tuple[Any, ...], Any], None]
) -> None:
    """Has every call of these modules noted: name, module, inputs, output."""

    def hook(name: str) -> Callable[..., None]:
        def inner(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            note(name, module, (*args, *kwargs.values()), output)

        return inner

    for name, module in modules:
        module.register_forward_hook(hook(name), with_kwargs=True)


def count_modules(
    model: nn.Module, inputs: Mapping[str, Shape]
) -> tuple[tuple[ModuleInfo, ...], dict[str, tuple[str, Shape]]]:
    """Parameters, multiply-adds and activations of every layer in one forward pass, on shapes alone.

    Args:
        model: Any module; it is neither run nor changed, a copy without memory is.
        inputs: Shapes of what `forward` takes, in order.

    Returns:
        The layers; and of every module that was called, its type and the shape of its last output.
    """
    bare = on_meta(model).eval()
    rows: dict[str, ModuleInfo] = {}
    called: dict[str, tuple[str, Shape]] = {}
    counted: set[int] = set()
    for name, module in _layers(bare):
        mine = {id(parameter): parameter for parameter in _own_parameters(module) if id(parameter) not in counted}
        counted |= mine.keys()
        kind = type(module).__name__.removeprefix("Parametrized")
        rows[name] = ModuleInfo(name or "(model)", kind, None, sum(p.numel() for p in mine.values()), 0, 0)

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs = _outputs(output)
        if not outputs:
            return
        shape = tuple(outputs[0].shape)
        called[name] = type(module).__name__, shape
        if name in rows:
            macs = layer_macs(module, args, outputs[0]) if args else None
            row = rows[name]
            rows[name] = replace(
                row,
                output_shape=shape,
                macs=row.macs + (macs[0] if macs else 0),
                activations=row.activations + (outputs[0].numel() if macs else 0),
            )

    _watch(bare.named_modules(), note)
    with torch.no_grad():
        bare(*(torch.empty(shape, device="meta") for shape in inputs.values()))
    return tuple(rows.values()), called


def _without_frame(kind: str, clip: Tensor, frame: int) -> Tensor:
    """An input with one frame of the video that is not a number, and with it the flow fields on both its sides."""
    spoilt = clip.clone()
    if kind == "features":
        spoilt[:, frame] = torch.nan
    elif kind == "flow":
        spoilt[:, :, max(0, frame - 1) : frame + 1] = torch.nan
    else:
        spoilt[:, :, frame] = torch.nan
    return spoilt


def receptive_fields(model: nn.Module, inputs: Mapping[str, Shape], clip_length: int) -> dict[str, int | None]:
    """The most frames that any one output of each layer depends on, and of the whole model under the name "".

    The model runs once for every frame, and once more. An output depends on a frame if it is not a number when the
    frame is not: a weight of zero does not hide it. A model that puts numbers in the place of NaN escapes this.

    Args:
        model: Any module; a copy of it runs, in eval mode.
        inputs: Shapes of what `forward` takes, in order, by the names of `vidbench.models.Input`; one clip.
        clip_length: Frames of the video.

    Returns:
        By name; None of a layer whose outputs are not numbers even when all frames are, or that is not called.
    """
    model = copy.deepcopy(model).eval()
    dependent: dict[str, list[Tensor]] = {}
    """Of each call of each layer, by element of its output: frames that it depends on."""
    calls: dict[str, int] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for tensor in _outputs(output):
            call = calls.get(name, 0)
            calls[name] = call + 1
            missing = tensor.isnan().to(torch.int32)
            seen = dependent.setdefault(name, [])
            if call < len(seen):
                seen[call] += missing
            else:
                seen.append(missing)

    _watch([("", model), *((name, module) for name, module in _layers(model) if name)], note)
    generator = torch.Generator().manual_seed(0)
    clips = {kind: torch.rand(shape, generator=generator) for kind, shape in inputs.items()}
    names = ["", *(name for name, _ in _layers(model))]
    with torch.no_grad():
        model(*clips.values())
        broken = {name for name, seen in dependent.items() if any(bool(tensor.any()) for tensor in seen)}
        for frame in range(clip_length):
            calls.clear()
            model(*(_without_frame(kind, clip, frame) for kind, clip in clips.items()))
    return {
        name: None
        if name in broken or name not in dependent
        else max((int(tensor.max()) for tensor in dependent[name] if tensor.numel()), default=0)
        for name in names
    }


SMALL: dict[str, Any] = {"num_classes": 2, "input_size": 32, "width_multiplier": 1 / 16}
"""What a model of ours is shrunk to while its receptive field is found: neither changes what it sees of time."""


def describe(
    name: str,
    *,
    num_classes: int = 400,
    clip_length: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    width_multiplier: float = 1.0,
    fields: bool = True,
    **options: Any,
) -> ModelInfo:
    """Counts a model on one clip.

    Args:
        name: A name from `vidbench.models.MODELS`, or `package.module:factory`.
        num_classes: Classes told apart.
        clip_length: Frames; the published clip's where not given.
        input_size: Pixels of a frame, or (H, W); the published one where not given.
        width_multiplier: Factor on the channel counts.
        fields: Find the receptive fields, for which a model of the user's own runs once for every frame.
        options: As for `vidbench.models.create`.

    Raises:
        RequestError: As `vidbench.models.create`.
    """
    spec = models.spec_of(name)
    frames = spec.clip_length if clip_length is None else clip_length
    size = spec.input_size if input_size is None else input_size
    height, width = (size, size) if isinstance(size, int) else size
    features = options.get("input_features")
    inputs = models.input_shapes(name, clip_length=frames, height=height, width=width, input_features=features)
    own = name in models.MODELS
    sizes: dict[str, Any] = {"num_classes": num_classes, "input_size": size, "width_multiplier": width_multiplier}
    # A user's network may need memory while it is built.
    shapes_alone = own and not any(":" in value for value in options.values() if isinstance(value, str))
    with without_memory() if shapes_alone else nullcontext():
        model = models.create(name, clip_length=frames, **sizes, **options)
    counts = count_model(model, inputs)
    modules, called = count_modules(model, inputs) if counts.macs is not None else ((), {})
    elsewhere = 0 if counts.macs is None else counts.macs - sum(module.macs for module in modules)
    found: Mapping[str, int | None] = {}
    if fields and own:
        small = models.create(name, clip_length=frames, **SMALL, **options)
        shapes = models.input_shapes(name, clip_length=frames, height=32, width=32, input_features=features)
        found = receptive_fields(small, shapes, frames)
    elif fields:
        found = receptive_fields(model, inputs, frames)
    rows = [
        replace(module, receptive_field=found.get("" if module.name == "(model)" else module.name))
        for module in modules
    ]
    if elsewhere:
        rows.append(ModuleInfo("(in no layer)", "", None, 0, elsewhere, 0))
    if counts.macs is None:
        rows = [ModuleInfo("(model)", type(model).__name__, None, sum(p.numel() for p in model.parameters()), 0, 0)]
    return ModelInfo(name, num_classes, inputs, tuple(rows), counts.macs, found.get(""), counts.uncounted, called)


def parse_clip(name: str, text: str) -> tuple[int, tuple[int, int]]:
    """(T, (H, W)) of a clip written `CxTxHxW` or `TxHxW`, such as 3x16x112x112.

    Raises:
        RequestError: It is not of that form, or C is not what the model takes.
    """
    inputs = models.spec_of(name).inputs
    parts = text.lower().replace("×", "x").split("x")
    if "features" in inputs:
        raise RequestError(f"model {name!r} takes features of frames, not a clip: give --clip-length")
    if len(parts) not in (3, 4) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(f"clip {text!r} is not channels, frames, rows and columns, such as 3x16x112x112")
    channels: dict[Input, int] = {"rgb": 3, "flow": 2}
    if len(parts) == 4 and int(parts[0]) not in [channels[kind] for kind in inputs]:
        raise RequestError(f"clip {text!r} has {parts[0]} channels; model {name!r} takes {channels[inputs[0]]}")
    t, h, w = (int(part) for part in parts[-3:])
    return t, (h, w)


# As a table


def _grouped(info: ModelInfo, depth: int) -> list[ModuleInfo]:
    """Layers that share the first `depth` parts of their names as one row."""
    groups: dict[str, ModuleInfo] = {}
    for module in info.modules:
        name = ".".join(module.name.split(".")[:depth])
        if name not in groups:
            groups[name] = replace(module, name=name)
            continue
        group = groups[name]
        fields = [field for field in (group.receptive_field, module.receptive_field) if field is not None]
        kind, shape = info.called.get(name, ("", None))
        groups[name] = ModuleInfo(
            name,
            kind,
            shape,
            group.params + module.params,
            group.macs + module.macs,
            group.activations + module.activations,
            max(fields) if fields else None,
        )
    return list(groups.values())


def _amount(value: int | None) -> str:
    """Three to five digits and k, M or G."""
    if value is None:
        return "?"
    for factor, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= factor:
            return f"{value / factor:.3f} {letter}"
    return str(value)


def table(info: ModelInfo, *, depth: int = 2) -> str:
    """The model as aligned text.

    Args:
        info: The model.
        depth: Parts of a layer's name that are told apart: layer1.0.conv1 at 2 is part of layer1.0.
    """
    inputs = ", ".join(f"{kind} {'×'.join(map(str, shape))}" for kind, shape in info.inputs.items())
    rows = [("module", "type", "output", "params", "MACs", "FLOPs", "activations", "frames seen")]
    for module in _grouped(info, depth):
        rows.append(
            (
                module.name,
                module.type,
                "×".join(map(str, module.output_shape or ())),
                _amount(module.params),
                _amount(module.macs),
                _amount(module.flops),
                _amount(module.activations),
                "" if module.receptive_field is None else str(module.receptive_field),
            )
        )
    flops = None if info.macs is None else 2 * info.macs
    totals = (_amount(info.params), _amount(info.macs), _amount(flops), _amount(info.activations))
    seen = "" if info.receptive_field is None else str(info.receptive_field)
    rows.append(("total", "", "", *totals, seen))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{info.model}: {inputs} → {info.num_classes} classes"]
    for row in rows:
        cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines += [f"not counted: {what}" for what in info.uncounted]
    return "\n".join(lines)
