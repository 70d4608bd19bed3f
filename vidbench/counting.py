"""Multiply-adds counted three ways and reconciled: closed forms, torch's counter on the meta device, fvcore.

Only the multiply-adds of convolutions, linear layers, matrix products and recurrent products count; pooling,
normalisation and activations do not. Nothing is computed: shapes alone travel through the model.

Training, by convention, is the forward pass, the gradient of every weight and the gradient of every input that needs
one, each with the forward pass's multiply-adds: 3 × forward, less the input gradient of the layers that see the clip.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, shape_wrapper

from vidbench.records import Counts
from vidkernels.op import Case, Op

Shapes = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]
"""Shapes of what a model's `forward` takes, in order; names, where there are any, are not used."""

_RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)
"""What a model may raise on the meta device, or when it is traced, that it would not raise on real data."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GATES = {"RNN": 1, "RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}

_NO_PRODUCTS = """
    Bool Float FloatImplicit Int IntImplicit ScalarImplicit _adaptive_avg_pool2d _adaptive_avg_pool3d _cat
    _fused_dropout _local_scalar_dense _log_softmax _log_softmax_backward_data _native_batch_norm_legit
    _native_batch_norm_legit_no_training _shape_as_tensor _softmax _softmax_backward_data
    _thnn_differentiable_lstm_cell_backward _thnn_fused_gru_cell _thnn_fused_lstm_cell _to_copy _unsafe_view
    _weight_norm _weight_norm_differentiable _weight_norm_interface adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d all alpha_dropout amax amin
    aminmax any arange argmax argmin argsort as_strided avg_pool1d avg_pool2d avg_pool3d batch_norm bernoulli
    broadcast_tensors bucketize cat cauchy channel_shuffle chunk clone concat concatenate constant_pad_nd contiguous
    copy count_nonzero cummax cummin cumprod cumsum detach dim dropout dropout2d dropout3d embedding empty
    empty_like empty_strided expand expand_as exponential eye feature_alpha_dropout feature_dropout fill flatten
    flip frobenius_norm full full_like gather geometric glu group_norm hstack im2col index index_add index_copy
    index_fill index_put index_select instance_norm is_floating_point is_same_size item layer_norm len lift_fresh
    linalg_vector_norm linspace log_normal log_softmax logcumsumexp logsumexp masked_fill masked_scale
    masked_scatter masked_select max max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
    max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d mean median min mode moveaxis movedim multinomial
    nan_to_num nanmean nansum narrow narrow_copy native_batch_norm native_dropout native_group_norm
    native_layer_norm new_empty new_empty_strided new_full new_ones new_zeros new_zeros_backward nll_loss nll_loss2d
    nll_loss_nd nonzero norm normal numel one_hot ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prod
    rand rand_like randint randn randn_like random randperm reflection_pad1d reflection_pad2d reflection_pad3d
    repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d requires_grad reshape reshape_as
    resize resolve_conj resolve_neg rms_norm roll rot90 rrelu scalar_tensor scatter scatter_add scatter_reduce
    searchsorted select select_scatter set size slice slice_scatter softmax sort split split_with_sizes squeeze
    stack std std_mean sum swapaxes swapdims sym_size t take take_along_dim tensor tile to topk trace transpose tril
    triu type_as unbind unflatten unfold unfold_backward uniform unique unsafe_chunk unsafe_split unsqueeze
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d value_selecting_reduction var var_mean view view_as vstack where zero
    zeros zeros_like
"""
"""Operators of aten that make no sum of products, beside those that torch itself marks as pointwise or as views."""


@cache
def multiplies_nothing(name: str) -> bool:
    """Whether an operator (`aten::relu_`) is known to hold no multiply-adds that count."""
    namespace, _, operator = name.partition("::")
    if namespace in ("prim", "profiler"):
        return True
    if namespace != "aten":
        return False
    base = operator.rstrip("_").removesuffix("_backward")
    if base in _NO_PRODUCTS.split():
        return True
    for spelled in (operator, base):
        packet = getattr(torch.ops.aten, spelled, None)
        overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
        if any(torch.Tag.pointwise in overload.tags or overload.is_view for overload in overloads):
            return True
    return False


# Closed forms


def recurrent_macs(
    frames: int,
    input_size: int,
    hidden_size: int,
    *,
    gates: int,
    layers: int = 1,
    directions: int = 1,
    proj_size: int = 0,
) -> int:
    """Multiply-adds of a stack of recurrent layers: G·H·(F + H) for every frame, layer and direction.

    Args:
        frames: Frames of all sequences together.
        gates: 1 of a vanilla RNN, 3 of a GRU, 4 of an LSTM.
        proj_size: Width that an LSTM's output is projected to; 0 for none.
    """
    carried = proj_size or hidden_size
    total = 0
    for layer in range(layers):
        into = input_size if layer == 0 else directions * carried
        total += directions * (gates * hidden_size * (into + carried) + hidden_size * proj_size)
    return frames * total


def _needs_gradient(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _recurrent(module: nn.RNNBase, x: Tensor | PackedSequence, state: Any) -> tuple[int, int]:
    """(forward, backward) of one call."""
    if isinstance(x, PackedSequence):
        data, sequences = x.data, int(x.batch_sizes[0])
    else:
        data, sequences = x, 1 if x.dim() == 2 else x.shape[0 if module.batch_first else 1]
    frames = data.numel() // max(1, data.shape[-1])
    directions = 2 if module.bidirectional else 1
    gates, hidden = _GATES[module.mode], module.hidden_size
    sizes = {"layers": module.num_layers, "directions": directions, "proj_size": module.proj_size, "gates": gates}
    forward = recurrent_macs(frames, module.input_size, hidden, **sizes)
    # The first layer's input may need no gradient, and neither does a state of zeros before the first frame.
    unwanted = 0
    if not data.requires_grad:
        unwanted += directions * frames * gates * hidden * module.input_size
    if not _needs_gradient(tree_leaves(state)):
        carried = module.proj_size or hidden
        unwanted += directions * module.num_layers * sequences * gates * hidden * carried
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return forward, (forward if trains else 0) + forward - unwanted


def layer_macs(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> tuple[int, int] | None:
    """(forward, backward) multiply-adds of one call of a layer; None where it is no layer with a closed form."""
    x = inputs[0]
    if isinstance(module, nn.RNNBase):
        return _recurrent(module, x, inputs[1:])
    if isinstance(module, _CONVOLUTIONS):
        forward = output.numel() * (module.in_channels // module.groups) * prod(module.kernel_size)
    elif isinstance(module, _TRANSPOSED):
        forward = x.numel() * (module.out_channels // module.groups) * prod(module.kernel_size)
    elif isinstance(module, nn.Linear):
        forward = output.numel() * module.in_features
    elif isinstance(module, nn.RNNCellBase):
        gates = module.weight_hh.shape[0] // module.hidden_size
        rows = x.numel() // max(1, module.input_size)
        into = rows * gates * module.hidden_size * module.input_size
        across = rows * gates * module.hidden_size**2
        trains = into + across if module.weight_ih.requires_grad else 0
        state_gradient = across if _needs_gradient(tree_leaves(inputs[1:])) else 0
        return into + across, trains + (into if x.requires_grad else 0) + state_gradient
    else:
        return None
    gradients = bool(x.requires_grad) + any(parameter.requires_grad for parameter in module.parameters())
    return forward, gradients * forward


class _ClosedForm:
    """Sums the closed forms of the layers that run."""

    def __init__(self, model: nn.Module, *, train: bool) -> None:
        self.total, self.train = 0, train
        self.handles = [
            module.register_forward_hook(self._hook, with_kwargs=True)
            for module in model.modules()
            if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, nn.RNNBase, nn.RNNCellBase))
        ]

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        counted = layer_macs(module, (*args, *kwargs.values()), output)
        if counted is not None:
            learns = self.train and _needs_gradient(tree_leaves(output))
            self.total += sum(counted) if learns else counted[0]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


# torch's counter


def _conv_backward(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """torch's formula, with the weight gradient of a grouped convolution, counted × groups there, divided again."""
    formula = flop_registry[torch.ops.aten.convolution_backward]
    before, groups, (of_input, of_weight, _), after = shapes[:9], shapes[9], shapes[10], shapes[11:]

    def counted(*mask: bool) -> int:
        return int(formula(*before, groups, mask, *after, out_val=out_shape, **kwargs))

    return counted(of_input, False, False) + counted(False, of_weight, False) // int(groups)


def formulas() -> dict[Any, Callable[..., int]]:
    """torch's table, with what people have registered for operators of their own, and our correction."""
    return {**flop_registry, torch.ops.aten.convolution_backward: shape_wrapper(_conv_backward)}


class _MetaCounter(TorchDispatchMode):
    """torch's formulas, as its FlopCounterMode applies them; that one tells neither what it left out nor corrections.

    An operator without a formula that may hold products is taken apart, and named if that is not possible.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.formulas = 0, formulas()
        self.unknown: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(getattr(func, "overloadpacket", func))
        name = func.name().partition(".")[0]
        if formula is None and not multiplies_nothing(name):
            with self:
                out = func.decompose(*args, **kwargs) if isinstance(func, torch._ops.OpOverload) else NotImplemented
            if out is not NotImplemented:
                return out
            self.unknown[name] = None
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _run_meta(call: Callable[[], Any], *, train: bool) -> tuple[int, tuple[str, ...]]:
    """Multiply-adds of a call by torch's formulas, and the operators that they leave out."""
    with warnings.catch_warnings(), torch.set_grad_enabled(True), _MetaCounter() as counter:
        warnings.simplefilter("ignore")
        outputs = call()
        if train:
            wanted = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
            torch.autograd.backward(wanted, [torch.empty_like(output) for output in wanted])
    return counter.flops // 2, tuple(counter.unknown)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model whose weights have shapes and no memory."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


# fvcore


class _Traceable(TorchFunctionMode):
    """What the tracer needs: convolutions by the one name that it records and fvcore knows, and sizes as integers.

    Otherwise it records every sum of sizes in a model, and hands out tensors for them.
    """

    RANKS: ClassVar[dict[Any, int]] = {
        torch.conv1d: 1,
        torch.conv2d: 2,
        torch.conv3d: 3,
        torch.conv_transpose1d: 1,
        torch.conv_transpose2d: 2,
        torch.conv_transpose3d: 3,
    }

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        super().__init__()
        self.thread = thread
        """A thread that is not traced."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rank, kwargs = self.RANKS.get(func), kwargs or {}
        if func in (Tensor.size, Tensor.shape.__get__):  # type: ignore[attr-defined]
            return self.thread.submit(func, *args, **kwargs).result()
        if rank is None:
            return func(*args, **kwargs)
        transposed = func in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
        names = ["input", "weight", "bias", "stride", "padding"]
        names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if isinstance(given.get("padding"), str):  # "same" and "valid": fvcore will differ, and that is named.
            return func(*args, **kwargs)

        def sizes(name: str, default: int) -> list[int]:
            value = given.get(name, default)
            return [value] * rank if isinstance(value, int) else list(value) * (rank if len(value) == 1 else 1)

        return torch._convolution(
            given["input"], given["weight"], given.get("bias"),
            sizes("stride", 1), sizes("padding", 0), sizes("dilation", 1), transposed, sizes("output_padding", 0),
            given.get("groups", 1), False, False, True, True,
        )  # fmt: skip


class _OutsideTheTrace(TorchDispatchMode):
    """Works out shapes in another thread, which is not being traced.

    The tracer turns every size that Python reads into a tensor, which torch's own shape functions for the meta device
    refuse; its state belongs to the thread.
    """

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.thread = thread

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            return func(*args, **(kwargs or {}))  # arithmetic on sizes
        if func is torch.ops.aten._convolution.default:
            func, args = torch.ops.aten.convolution.default, args[:9]
        return self.thread.submit(self._shapes, func, args, kwargs or {}).result()

    @staticmethod
    def _shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.no_grad():
            out = func(*args, **kwargs)
            if func._schema.is_mutable:
                return out

            def fresh(tensor: Tensor) -> Tensor:
                if tensor.device.type != "meta":
                    return tensor
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

            # A view that has been seen by autograd may not leave a dispatch mode.
            return tree_map_only(Tensor, fresh, out)


def _sizes(value: Any) -> list[int]:
    """The shape of a tensor in a traced graph."""
    return list(value.type().sizes())


def _fvcore_recurrent(inputs: list[Any], outputs: list[Any]) -> int:
    """aten::lstm and its like: the weights are the last list among the inputs; biases have one dimension."""
    weights = [value for value in inputs if value.node().kind() == "prim::ListConstruct"][-1]
    shapes = [_sizes(weight) for weight in weights.node().inputs()]
    return prod(_sizes(inputs[0])[:-1]) * sum(prod(shape) for shape in shapes if len(shape) == 2)


def _fvcore_cell(inputs: list[Any], outputs: list[Any]) -> int:
    """aten::lstm_cell and its like: (x, state, w_ih, w_hh, b_ih, b_hh)."""
    return prod(_sizes(inputs[0])[:-1]) * sum(prod(_sizes(weight)) for weight in inputs[2:4])


def _fvcore_attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (_sizes(tensor) for tensor in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_FVCORE_COUNTS_TOO = (
    "adaptive_avg_pool2d",
    "batch_norm",
    "grid_sampler",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "upsample_bilinear2d",
    "upsample_nearest2d",
)
_FVCORE_HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    # What it does not know …
    **{f"aten::{name}": _fvcore_recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{f"aten::{name}_cell": _fvcore_cell for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    "aten::scaled_dot_product_attention": _fvcore_attention,
    "aten::baddbmm": lambda inputs, outputs: prod(_sizes(inputs[1])) * _sizes(inputs[2])[-1],
    "aten::mv": lambda inputs, outputs: prod(_sizes(inputs[0])),
    "aten::dot": lambda inputs, outputs: prod(_sizes(inputs[0])),
    # … and what it counts and we do not.
    **{f"aten::{name}": lambda inputs, outputs: 0 for name in _FVCORE_COUNTS_TOO},
}


def _run_fvcore(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, tuple[str, ...]]:
    """Multiply-adds of a model on the meta device by fvcore, and the operators that it does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    analysis.set_op_handle(**_FVCORE_HANDLES)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(1) as thread,
        torch.no_grad(),
        _Traceable(thread),
        _OutsideTheTrace(thread),
    ):
        warnings.simplefilter("ignore")
        total, unsupported = analysis.total(), analysis.unsupported_ops()
    return int(total), tuple(name for name in unsupported if not multiplies_nothing(name))


# All together


def _differences(by: Mapping[str, int], standard: str) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {macs} != {standard.replace('_', ' ')} {by[standard]}"
        for name, macs in by.items()
        if macs != by[standard]
    ]


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def count_model(model: nn.Module, input_shapes: Shapes, *, train: bool = False) -> Counts:
    """Multiply-adds of one forward pass of a model, or of one forward and backward pass.

    Args:
        model: Any module; it is neither run nor changed, a copy without memory is.
        input_shapes: Shapes of what `forward` takes, in order.
        train: Count the backward pass as well, as the module's page defines it; fvcore, which cannot, is left out.

    Returns:
        The largest of the closed form and torch's count (each misses what it does not know, and adds nothing).
        In `uncounted`: operators that a counter does not know, and counts that differ. `macs` is None for a model that
        cannot run on the meta device.
    """
    shapes = list(input_shapes.values() if isinstance(input_shapes, Mapping) else input_shapes)
    by: dict[str, int] = {}
    uncounted: list[str] = []
    try:
        bare = on_meta(model).train(train)
        inputs = tuple(torch.empty(tuple(shape), device="meta") for shape in shapes)
        closed = _ClosedForm(bare, train=train)
        try:
            meta, unknown = _run_meta(lambda: bare(*inputs), train=train)
        finally:
            closed.remove()
    except _RAISED as error:
        return Counts(None, {}, (f"the model does not run on the meta device: {_line(error)}",))
    by["closed_form"], by["meta"] = closed.total, meta
    uncounted += [f"meta: {name}" for name in unknown]
    if not train and importlib.util.find_spec("fvcore") is not None:
        try:
            by["fvcore"], unknown = _run_fvcore(bare, inputs)
        except _RAISED as error:
            uncounted.append(f"fvcore: cannot trace the model: {_line(error)}")
        else:
            uncounted += [f"fvcore: {name}" for name in unknown]
    return Counts(max(by["closed_form"], by["meta"]), by, (*uncounted, *_differences(by, "closed_form")))


def count_op(op: Op, case: Case, *, train: bool | None = None) -> Counts:
    """Multiply-adds of one call of an op; in training 3 × forward, since every input of an op gets a gradient.

    Args:
        op: The op.
        case: Its sizes.
        train: Count the gradients as well; what the case says where not given.

    Returns:
        The closed form; in `uncounted`, how torch's count of the op's library implementation (its reference, where it
        has no other) differs from it, and the operators that torch's counter does not know.
    """
    times = 3 if (case.training if train is None else train) else 1
    by = {"closed_form": times * op.macs(case)}
    uncounted: tuple[str, ...] = ()
    fn = op["library" if "library" in op.implementations else "reference"].fn
    try:
        with torch.device("meta"):
            inputs = op.make_inputs(case, torch.Generator("cpu")).map(lambda tensor: tensor.to("meta"))
        meta, unknown = _run_meta(lambda: fn(*inputs.args, **inputs.kwargs), train=False)
    except _RAISED as error:
        uncounted = (f"meta: {_line(error)}",)
    else:
        by["meta"] = times * meta
        uncounted = tuple(f"meta: {name}" for name in unknown)
    return Counts(by["closed_form"], by, (*uncounted, *_differences(by, "closed_form")))
