"""One model, eager, compiled or with layers of vidkernels, as a workload."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vidbench import counting, models
from vidbench.models.sizes import CHANNELS_LAST, channels_last_filters
from vidbench.records import Cost, Error
from vidbench.sweep import Point, RequestError
from vidbench.workload.base import CHECK_SEED, ORACLE, TIMED_SEED, CheckFailed, Unfit, Workload, streamer
from vidbench.workload.stage import model_inputs
from vidkernels import accelerate, checking
from vidkernels.op import REQUIREMENTS

MODEL_GATES = {"fp64": 1e-10, "fp32": 2e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
"""Largest relative error of a model's logits; twice the eager model's own passes as well."""

BATCH_STATISTICS_FACTOR = 10
"""In training, normalising by the statistics of a few values multiplies rounding errors."""

MODEL_CASE = ("clip_length", "batch_size", "height", "width", "width_multiplier", "num_classes", "input_features",
              "hidden_size", "video")  # fmt: skip
MODEL_IMPLEMENTATIONS = ("eager", "compiled", "accelerated")


class ModelWorkload(Workload):
    """One model, run as it is (`eager`), through torch.compile (`compiled`), or by `vidkernels.accelerate`."""

    def __init__(self, point: Point, video: str | None = None) -> None:
        super().__init__(point)
        if point.implementation not in MODEL_IMPLEMENTATIONS:
            raise Unfit(f"a model has no implementation {point.implementation!r}: {', '.join(MODEL_IMPLEMENTATIONS)}")
        for name in point.case:
            if name not in MODEL_CASE:
                raise Unfit(f"a model has no {name!r}: it has {', '.join(MODEL_CASE)}")
        if point.implementation == "compiled" and (why := REQUIREMENTS["compiler"](self.device)):
            raise Unfit(why)
        self.video = video
        torch.manual_seed(0)
        try:
            self.shapes = models.input_shapes(point.workload, **self._sizes())
            model = models.create(point.workload, **self._options())
        except RequestError as error:
            raise Unfit(str(error)) from None
        if point.mode == "stream" and not hasattr(model, "step"):
            raise Unfit(f"{point.workload} has no streaming step")
        self.model = model.to(self.device, self.dtype).train(point.mode == "train")
        if point.memory_format == "channels_last":
            channels_last_filters(self.model)
        self.running = self._accelerated() if point.implementation == "accelerated" else self.model
        self.eager = self._entry(self.model)
        self.call = self._entry(self.running)
        if point.implementation == "compiled":
            self.call = torch.compile(self.eager, dynamic=False)

    def _entry(self, model: nn.Module) -> Callable[..., Any]:
        return cast(Callable[..., Any], model.step if self.point.mode == "stream" else model)

    def _accelerated(self) -> nn.Module:
        """The model with faster layers.

        Raises:
            Unfit: There is none to swap: the numbers would be the eager model's.
        """
        example = tuple(self._inputs(TIMED_SEED))
        model, report = accelerate(self.model, example, show=None)
        if not report.swapped:
            reasons = sorted({row.reason for row in report.kept})
            raise Unfit(f"no layer has a faster kernel here: {'; '.join(reasons) or 'none is of a kind that has one'}")
        return model.train(self.model.training)

    def _options(self) -> dict[str, Any]:
        """What the model is made with."""
        options: dict[str, Any] = {
            k: v for k, v in self.point.case.items() if k not in ("batch_size", "height", "width", "video")
        }
        if "height" in self.point.case:
            options["input_size"] = (self.point.case["height"], self.point.case["width"])
        return options

    def _sizes(self) -> dict[str, Any]:
        """What its inputs' shapes follow from."""
        names = ("batch_size", "clip_length", "height", "width", "input_features")
        return {name: self.point.case[name] for name in names if name in self.point.case}

    def _inputs(self, seed: int) -> list[Tensor]:
        """Noise, or clips of the video, in dtype, layout and place; another seed is other noise, or mirrored clips."""
        if self.video is None:
            generator = torch.Generator().manual_seed(seed)
            made = [torch.randn(shape, generator=generator) for shape in self.shapes.values()]
        else:
            made = model_inputs(self.video, self.shapes)
            if seed == CHECK_SEED:
                made = [tensor.flip(-1) for tensor in made]
        placed = [tensor.to(self.device, self.dtype) for tensor in made]
        if self.point.memory_format == "channels_last":
            return [
                t.contiguous(memory_format=CHANNELS_LAST[t.dim()]) if t.dim() in CHANNELS_LAST else t for t in placed
            ]
        return placed

    def _frames(self, inputs: list[Tensor]) -> list[Tensor]:
        """The clip's frames in turn: of features (N, T, F) and of clips (N, C, T, H, W)."""
        (clip,) = inputs
        return list(clip.unbind(1 if clip.dim() == 3 else 2))

    def cost(self) -> Cost:
        params = sum(parameter.numel() for parameter in self.model.parameters())
        model = copy.deepcopy(self.model).to("meta")
        shapes = list(self.shapes.values())
        if self.point.mode == "stream":
            frames = self._frames([torch.empty(shapes[0], device="meta")])
            model, shapes = _Step(model), [tuple(frames[0].shape)]
        return Cost(counting.count_model(model.float(), shapes, train=self.point.mode == "train"), params)

    def check(self) -> Error:
        inputs = self._inputs(CHECK_SEED)
        key = (
            self.point.workload,
            self.point.mode,
            self.point.dtype,
            self.point.device,
            tuple(self.point.case.items()),
        )
        want, eager = ORACLE.get(key, lambda: self._oracle(inputs))
        given = [tensor.clone() for tensor in inputs]
        got = self._outputs(self.running, self.call, given)
        error = self._compare(got, want, eager)
        gate = error.gate
        failures = []
        if not all(map(torch.equal, given, inputs)):
            failures.append("the inputs were changed")
        if not error.output <= gate:
            failures.append(f"output error {error.output:.2e} exceeds {gate:.1e}")
        # An error e before a ReLU or a maximum flips about e of its elements, so a gradient errs by some √e.
        gradient_gate = min(0.5, 3 * gate**0.5)
        if error.weight_gradient is not None and not error.weight_gradient <= gradient_gate:
            failures.append(f"gradient error {error.weight_gradient:.2e} exceeds {gradient_gate:.1e}")
        if failures:
            raise CheckFailed("; ".join(failures), error)
        return error

    def _oracle(self, inputs: list[Tensor]) -> tuple[list[Tensor], Error]:
        """The model in float64 on the CPU, and the error of the eager one."""
        exact = copy.deepcopy(self.model).to("cpu", torch.float64)
        want = self._outputs(exact, exact, [tensor.cpu().double() for tensor in inputs], whole_clip=True)
        given = [tensor.clone() for tensor in inputs]
        return want, self._compare(self._outputs(self.model, self.eager, given), want, None)

    def _compare(self, got: list[Tensor], want: list[Tensor], eager: Error | None) -> Error:
        errors = [checking.relative_error(g.cpu(), w) for g, w in zip(got, want, strict=True)]
        gate = MODEL_GATES[self.point.dtype] * (BATCH_STATISTICS_FACTOR if self.point.mode == "train" else 1)
        if eager is not None and eager.output <= gate:
            gate = max(gate, 2 * eager.output)
        return Error(
            output=errors[0],
            gate=gate,
            weight_gradient=errors[1] if len(errors) > 1 else None,
            library=eager.output if eager else None,
        )

    def _outputs(
        self, model: nn.Module, call: Callable[..., Any], inputs: list[Tensor], *, whole_clip: bool = False
    ) -> list[Tensor]:
        """[logits], in training also all gradients in one vector; dropout is off, its noise being no error."""
        if self.point.mode == "stream" and not whole_clip:
            state, logits = None, torch.empty(0)
            with torch.no_grad():
                for frame in self._frames(inputs):
                    logits, state = call(frame, state)
            return [logits]
        if self.point.mode != "train":
            with torch.no_grad():
                return [call(*inputs)]
        dropouts = {module: module.p for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)}
        for module in dropouts:
            module.p = 0.0
        logits = call(*inputs)
        gradients = torch.autograd.grad(_loss(logits), list(model.parameters()), allow_unused=True)
        for module, p in dropouts.items():
            module.p = p
        return [logits.detach(), torch.cat([g.flatten() for g in gradients if g is not None])]

    def prepare(self) -> Callable[[], Any]:
        inputs = self._inputs(TIMED_SEED)
        call = self.call
        if self.point.mode == "stream":
            return streamer(self._frames(inputs), call)
        if self.point.mode == "train":
            # A rate of zero does all the work of a step and leaves the weights as they were checked.
            optimiser = torch.optim.SGD(self.running.parameters(), lr=0.0, momentum=0.9)

            def step() -> None:
                torch.autograd.backward(_loss(call(*inputs)))
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)

            return step

        def forward() -> Any:
            with torch.inference_mode():
                return call(*inputs)

        return forward


class _Step(nn.Module):
    """A streaming model's step from the start of a clip, as a module that can be counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frame: Tensor) -> Tensor:
        logits: Tensor = self.model.step(frame)[0]  # type: ignore[operator]
        return logits


def _loss(logits: Tensor) -> Tensor:
    """Cross-entropy against classes 0, 1, 2, … in turn."""
    targets = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    return nn.functional.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, targets)
