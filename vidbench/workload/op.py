"""One implementation of one op as a workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vidbench import counting
from vidbench.records import Cost, Error
from vidbench.sweep import Point
from vidbench.workload.base import CHECK_SEED, ORACLE, TIMED_SEED, CheckFailed, Unfit, Workload, streamer
from vidkernels import OPS, checking
from vidkernels.op import Case, Inputs, Op, tensors_of

LIBRARY_SLACK = 2.0


class OpWorkload(Workload):
    """One implementation of one op."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        self.op: Op = OPS[point.workload]
        training = point.mode == "train"
        try:
            self.case: Case = self.op.case(
                dict(point.case), dtype=point.dtype, memory_format=point.memory_format, training=training
            )
            self.implementation = self.op[point.implementation]
        except ValueError as error:
            raise Unfit(str(error)) from None
        if why := self.implementation.why_not(self.case, self.device):
            raise Unfit(why)
        if point.mode == "stream" and self.implementation.step is None:
            raise Unfit(f"{point.workload}/{point.implementation} has no streaming step")

    def cost(self) -> Cost:
        train, stream = self.point.mode == "train", self.point.mode == "stream"
        # One frame of a stream costs what a clip of one frame does.
        case = replace(self.case, clip_length=1) if stream else self.case  # type: ignore[call-arg]
        counts = counting.count_op(self.op, case, train=train)
        with torch.device("meta"):
            inputs = self.op.make_inputs(case, torch.Generator("cpu"))
        moved = self.op.bytes_moved(case)
        if train:
            # Backward reads x, w and the output's gradient, and writes the gradients of x and w.
            given = sum(tensor.numel() for tensor in inputs.tensors()) * self.dtype.itemsize
            moved += moved + given
        return Cost(counts, sum(map(_learnt, inputs.args[1:])), moved)

    def check(self) -> Error:
        training = self.case.training
        case = self.case.without_randomness()
        inputs = self.op.inputs(case, seed=CHECK_SEED, device=self.device)
        key = (self.op.name, self.point.device, replace(case, memory_format="contiguous"))
        want, library = ORACLE.get(key, lambda: self._oracle(inputs))
        if self.point.mode == "stream":
            got = self._stream_whole(inputs)
            want = checking.Results(want.outputs[:1])
        else:
            got = checking.run(self.implementation.fn, inputs, gradients=training)
        errors = checking.compare(self.op, got, want)
        # The library is the yardstick: in 16 bits torch itself may miss a gate that ours must pass.
        narrow = self.dtype.itemsize == 2
        slack = LIBRARY_SLACK if narrow and self.implementation.name == "library" else 1.0
        failures = errors.failures(self.op, case, library, slack=slack)
        if got.inputs_changed:
            failures.append("the inputs were changed")
        if failures:
            raise CheckFailed("; ".join(failures), _as_error(self.op, case, errors, library, slack))
        return _as_error(self.op, case, errors, library, slack)

    def _oracle(self, inputs: Inputs) -> tuple[checking.Results, checking.Errors | None]:
        training = self.case.training
        want = checking.oracle(self.op, self.case.without_randomness(), inputs, gradients=training)
        library = self.op["library"]
        if library.why_not(self.case, self.device):
            return want, None
        got = checking.run(library.fn, inputs.map(torch.clone), gradients=training)
        return want, checking.compare(self.op, got, want)

    def _stream_whole(self, inputs: Inputs) -> checking.Results:
        """The outputs of the step for every frame of a clip, joined along time."""
        given = inputs.map(torch.clone)
        step, state, outputs = self.implementation.step, None, []
        assert step is not None  # checked in __init__
        time_axis = 1 if self.op.name in ("rnn", "lstm") else 2
        frames, *weights = inputs.args
        with torch.no_grad():
            for frame in frames.split(1, time_axis):
                y, state = step(frame, *weights, state=state, **inputs.kwargs)
                outputs.append(y)
        changed = not all(map(torch.equal, given.tensors(), inputs.tensors()))
        return checking.Results((torch.cat(outputs, time_axis),), inputs_changed=changed)

    def prepare(self) -> Callable[[], Any]:
        inputs = self.op.inputs(self.case, seed=TIMED_SEED, device=self.device)
        fn, kwargs = self.implementation.fn, inputs.kwargs
        if self.point.mode == "train":
            return self._train_step(inputs)
        if self.point.mode == "stream":
            return self._stream_step(inputs)

        def forward() -> Any:
            with torch.inference_mode():
                return fn(*inputs.args, **kwargs)

        return forward

    def _train_step(self, inputs: Inputs) -> Callable[[], Any]:
        leaves = inputs.map(lambda tensor: tensor.requires_grad_(tensor.is_floating_point()))
        x, *weights = leaves.tensors()
        fn, kwargs = self.implementation.fn, leaves.kwargs
        # A rate of zero does all the work of a step and leaves the weights as they were checked.
        optimiser = torch.optim.SGD(weights, lr=0.0)
        noise: list[Tensor] = []

        def step() -> None:
            outputs = tensors_of(fn(*leaves.args, **kwargs))
            if not noise:
                noise.extend(torch.randn_like(output) for output in outputs)
            torch.autograd.backward(outputs, noise)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            x.grad = None

        return step

    def _stream_step(self, inputs: Inputs) -> Callable[[], Any]:
        step = self.implementation.step
        assert step is not None  # checked in __init__
        time_axis = 1 if self.op.name in ("rnn", "lstm") else 2
        (x, *weights), kwargs = inputs.args, inputs.kwargs  # not `inputs`: the call's closure would keep the clip
        return streamer(list(x.split(1, time_axis)), lambda frame, state: step(frame, *weights, state=state, **kwargs))


def _learnt(argument: object) -> int:
    """Numbers of an argument that training would change; running statistics are not among them."""
    if hasattr(argument, "_fields") and {"mean", "var"} <= set(argument._fields):
        argument = argument._replace(mean=None, var=None)  # type: ignore[attr-defined]
    return sum(tensor.numel() for tensor in tensors_of(argument))


def _as_error(op: Op, case: Case, errors: checking.Errors, library: checking.Errors | None, slack: float) -> Error:
    return Error(
        output=errors.output,
        gate=slack * op.tolerances[case.dtype].forward,
        border=errors.border,
        input_gradient=errors.input_gradient,
        weight_gradient=errors.weight_gradient,
        library=library.output if library else None,
    )
