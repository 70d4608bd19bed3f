"""One implementation of one op as a workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vidbench import counting
from vidbench.records import Error
from vidbench.sweep import Point
from vidbench.workload.base import CHECK_SEED, ORACLE, TIMED_SEED, CheckFailed, Cost, Unfit, Workload, streamer
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
        moved = self.op.bytes_moved(case)
        inputs = self.op.make_inputs(case, torch.Generator())
        weights = sum(tensor.numel() for tensor in inputs.tensors()[1:])
        # Training reads x, w and dy again and writes dx and dw: each byte of the forward pass twice more.
        return Cost(counts, weights, 3 * moved if train else moved)

    def check(self) -> Error:
        training = self.case.training
        case = self.case.without_randomness()
        inputs = self.op.inputs(case, seed=CHECK_SEED, device=self.device)
        key = (self.op.name, self.point.device, replace(case, memory_format="contiguous"))
        want, library = ORACLE.get(key, lambda: self._oracle(inputs))
        before = inputs.map(torch.clone)
        if self.point.mode == "stream":
            got = checking.Results((self._stream_whole(inputs),))
            want = checking.Results(want.outputs[:1])
        else:
            got = checking.run(self.implementation.fn, inputs, gradients=training)
        errors = checking.compare(self.op, got, want)
        # The library is the yardstick: in 16 bits torch itself may miss a gate that ours must pass.
        slack = LIBRARY_SLACK if self.implementation.name == "library" else 1.0
        failures = errors.failures(self.op, self.case, library, slack=slack)
        if not training and not all(map(torch.equal, before.tensors(), inputs.tensors())):
            failures.append("the inputs were changed")
        if failures:
            raise CheckFailed("; ".join(failures), _as_error(self.op, self.case, errors, library))
        return _as_error(self.op, self.case, errors, library)

    def _oracle(self, inputs: Inputs) -> tuple[checking.Results, checking.Errors | None]:
        training = self.case.training
        want = checking.oracle(self.op, self.case.without_randomness(), inputs, gradients=training)
        library = self.op["library"]
        if library.why_not(self.case, self.device):
            return want, None
        got = checking.run(library.fn, inputs.map(torch.clone), gradients=training)
        return want, checking.compare(self.op, got, want)

    def _stream_whole(self, inputs: Inputs) -> Tensor:
        """The outputs of the step for every frame of a clip, joined along time."""
        step, state, outputs = self.implementation.step, None, []
        assert step is not None  # checked in __init__
        time_axis = 1 if self.op.name in ("rnn", "lstm") else 2
        frames, *weights = inputs.args
        with torch.no_grad():
            for frame in frames.split(1, time_axis):
                y, state = step(frame, *weights, state=state, **inputs.kwargs)
                outputs.append(y)
        return torch.cat(outputs, time_axis)

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
        x, *weights = inputs.args
        frames = [frame.contiguous() for frame in x.split(1, time_axis)]
        return streamer(frames, lambda frame, state: step(frame, *weights, state=state, **inputs.kwargs))


def _as_error(op: Op, case: Case, errors: checking.Errors, library: checking.Errors | None) -> Error:
    return Error(
        output=errors.output,
        gate=op.tolerances[case.dtype].forward,
        border=errors.border,
        input_gradient=errors.input_gradient,
        weight_gradient=errors.weight_gradient,
        library=library.output if library else None,
    )
