"""Recorded launch plans: replay the launches of an earlier call without running its Python code again.

On small inputs, an eager call takes as long as its Python code: argument checks, autograd nodes, launch configurations. What
this code does depends on the signature of the call (sizes, strides, dtypes, alignment and options), but not on the values of
its tensors. `planned` therefore records one call with each signature. Later calls allocate the outputs and a workspace, and
launch the same kernels with the addresses of their tensors, so their results are bit-identical. If an input requires a
gradient, both passes of a call are recorded, and replays start when both are known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from . import backends, conditions
from .layout import unit_last_stride
from .primitives.autograd import once_differentiable
from .primitives.registry import DEFAULT_KEYS, PLAIN
from .recorder import Plan, Recorder, compiled_launches

MOST = 1024  # signatures; with more, all are forgotten
LAYOUTS = 4  # memory layouts of the incoming gradients for which a backward pass is recorded, per signature
OPTIONS = {type(None), bool, int, float, str, torch.dtype}  # types of arguments whose value is part of the signature

entries: dict[tuple, Entry] = {}  # by signature


def planned(function: Callable) -> Callable:
    """Decorate a function of tensors and options, so that calls on a GPU replay an earlier call with the same signature."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not on_gpu(*args, **kwargs) or not replays_allowed():
            return function(*args, **kwargs)
        grad_enabled, tensors = torch.is_grad_enabled(), []
        key = [function, grad_enabled, backends.tf32_allowed(), *kwargs]
        if torch._C._is_any_autocast_enabled():
            device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            key += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if not describe((*args, *kwargs.values()), key, tensors):
            return function(*args, **kwargs)
        needs_backward = grad_enabled and any([x.requires_grad for x in tensors])
        entry = entries.get(key := tuple(key))
        if entry is None:
            if len(entries) >= MOST:
                entries.clear()
            entries[key] = Entry()
        elif entry.wanted and entry.records(tensors):
            if needs_backward:
                return _Record.apply(entry, function, args, kwargs, *tensors)
            return record(entry, function, args, kwargs, tensors)
        elif (plans := entry.plans) is not None:
            return _Replay.apply(entry, plans, *tensors) if needs_backward else plans.run(tensors)[0]
        return function(*args, **kwargs)

    return call


def on_gpu(first: Any = None, *args: Any, **kwargs: Any) -> bool:
    """Return whether the first argument is an ordinary GPU tensor that kernels could read."""
    x = next(iter(kwargs.values()), None) if first is None else first
    return type(x) in PLAIN and x.is_cuda and backends.triton_installed()


def replays_allowed() -> bool:
    """Return whether calls may be replayed now: nothing traces, transforms, changes or observes operations or launches."""
    return (
        conditions.current is conditions.DEFAULT
        and torch._C._dispatch_tls_local_include_set().raw_repr() in DEFAULT_KEYS
        and forward_ad._current_level < 0
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and (not torch._C._len_torch_function_stack() or _only_default_device())
        and conditions.recording.recorder is None
        and not compiled_launches().needs_triton()
    )


def _only_default_device() -> bool:
    return all(isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack())


def describe(values: Iterable[Any], key: list[Any], tensors: list[Tensor]) -> bool:
    """Append the signature of the arguments to `key`, and their tensors to `tensors`. Return whether this is possible."""
    for x in values:
        kind = type(x)
        if kind in PLAIN and x.layout is torch.strided and not (x.is_nested or x.is_neg() or x._is_zerotensor()):
            key += x.dtype, x.shape, x.stride(), x.get_device(), x.requires_grad, x.data_ptr() % 16
            tensors.append(x)
        elif kind in OPTIONS or (kind is tuple and all(type(each) is int for each in x)):
            key += kind, x
        elif is_dataclass(kind):  # Rope
            key.append(kind)
            if not describe([getattr(x, each.name) for each in fields(x) if each.init], key, tensors):
                return False
        else:
            return False
    return True


def with_tensors(values: Iterable[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """Replace the tensors in the arguments, in the order of `describe`."""
    results = []
    for x in values:
        if isinstance(x, Tensor):
            x = next(tensors)
        elif is_dataclass(x):
            names = [each.name for each in fields(x) if each.init]
            x = replace(x, **dict(zip(names, with_tensors([getattr(x, name) for name in names], tensors), strict=True)))
        results.append(x)
    return results


@dataclass
class Plans:
    """The passes of a call.

    Attributes:
        forward: plan of the forward pass. Its sources are the tensors of the call.
        saved: indices of the forward bases that are saved for the backward pass.
        single: whether the function returns a tensor instead of a tuple.
        backward: plans of the backward pass by the memory layout of the incoming gradients (see `layout`). Their sources are
            the saved bases, then these gradients.
    """

    forward: Plan
    single: bool
    saved: list[int] = field(default_factory=list)
    backward: dict[tuple, Plan] = field(default_factory=dict)

    def run(self, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        outputs, bases = self.forward.run(tensors)
        return outputs[0] if self.single else tuple(outputs), [bases[i] for i in self.saved]


class Entry:
    """What is known about the calls with one signature.

    Attributes:
        plans: the plans of the passes, or None if they are not known.
        wanted: whether to record another call.
        calls: number of calls since then. Calls 1, 2, 4, 8, ... are recorded, because a call may have no backward pass.
        reason: why calls cannot be replayed, or None.
    """

    def __init__(self) -> None:
        self.plans: Plans | None = None
        self.wanted = True
        self.calls = 0
        self.reason: str | None = None

    def records(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether to record the next call. Arguments with equal addresses could not be told apart."""
        self.calls += 1
        return self.calls & (self.calls - 1) == 0 and len({x.data_ptr() for x in tensors} - {0}) == len(tensors)

    def learn(self, recorder: Recorder, plans: Plans | None) -> None:
        """Keep the plans of a recorded call, or the reason why it cannot be replayed."""
        self.wanted = False
        if plans is None:
            self.reason = recorder.reason
        elif self.plans is not None and (self.plans.forward, self.plans.saved) == (plans.forward, plans.saved):
            self.plans.backward |= plans.backward
        else:
            self.plans = plans

    def miss(self) -> None:
        """Record another call, because the gradients of a call had a new memory layout."""
        if not self.wanted and len(self.plans.backward) < LAYOUTS:
            self.wanted, self.calls = True, 0


def layout(gradients: Sequence[Tensor]) -> tuple[tuple[Any, int], ...]:
    return tuple([(x.stride(), x.data_ptr() % 16) for x in gradients])


def without_overlap(x: Tensor) -> Tensor:
    """Return a gradient with unit last stride, and no elements at the same address."""
    return x.contiguous() if 0 in x.stride() else unit_last_stride(x)


def record(entry: Entry, function: Callable, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
    """Run and record a call without a backward pass."""
    recorder = Recorder(tensors)
    results = recorder.run(function, *args, **kwargs)
    single = isinstance(results, Tensor)
    found = recorder.plan(0, {i: (i, 0) for i in range(len(tensors))}, [results] if single else results)
    entry.learn(recorder, found and Plans(found[0], single))
    return results


class _Record(torch.autograd.Function):
    """Run and record a call and its backward pass. The autograd graph of the call is kept in `ctx`."""

    @staticmethod
    def forward(ctx, entry, function, args, kwargs, *tensors):
        inputs = [x.detach().requires_grad_() if x.requires_grad else x for x in tensors]
        values = with_tensors((*args, *kwargs.values()), iter(inputs))
        recorder = Recorder(inputs)
        with torch.enable_grad():
            results = recorder.run(function, *values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))
        single = isinstance(results, Tensor)
        results = (results,) if single else results
        kept = recorder.saved(results)
        ctx.plans = None
        if found := recorder.plan(0, {i: (i, 0) for i in range(len(inputs))}, results, kept):
            places = {base: found[1][base] for base in kept if base in found[1]}
            saved = list(dict.fromkeys(index for index, _ in places.values()))
            ctx.plans = Plans(found[0], single, saved)
            ctx.places = {base: (saved.index(index), offset) for base, (index, offset) in places.items()}
        else:
            entry.learn(recorder, None)
        ctx.entry, ctx.recorder, ctx.inputs, ctx.results = entry, recorder, inputs, results
        ctx.save_for_backward(*(tensors[base] for base in kept if base < len(tensors)))
        outputs = [x.detach() for x in results]
        return outputs[0] if single else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, *gradients):
        recorder, plans, inputs = ctx.recorder, ctx.plans, ctx.inputs
        ctx.recorder = ctx.plans = None  # a second backward pass of the same call is not recorded
        gradients = [without_overlap(x) for x in gradients]
        if plans is not None and not recorder.can_add(gradients):
            gradients = [x.clone() for x in gradients]
        wanted = [x for x in inputs if x.requires_grad]
        call = functools.partial(torch.autograd.grad, ctx.results, wanted, gradients, retain_graph=True, allow_unused=True)
        if plans is None:
            found = iter(call())
            return *(None,) * 4, *(next(found) if x.requires_grad else None for x in inputs)
        first = len(recorder.steps)
        places = {recorder.add(x, "input"): (len(plans.saved) + i, 0) for i, x in enumerate(gradients)}
        found = iter(recorder.run(call))
        outputs = [next(found) if x.requires_grad else None for x in inputs]
        if planned := recorder.plan(first, ctx.places | places, outputs):
            plans.backward[layout(gradients)] = planned[0]
        ctx.entry.learn(recorder, planned and plans)
        return *(None,) * 4, *outputs


class _Replay(torch.autograd.Function):
    """Replay a recorded call and its backward pass."""

    @staticmethod
    def forward(ctx, entry, plans, *tensors):
        outputs, saved = plans.run(tensors)
        ctx.save_for_backward(*saved)
        ctx.entry, ctx.plans = entry, plans
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, *gradients):
        gradients = [without_overlap(x) for x in gradients]
        backward = ctx.plans.backward.get(layout(gradients))
        if backward is None:
            ctx.entry.miss()
            known, backward = next(iter(ctx.plans.backward.items()))
            copies = [x.new_empty_strided(x.shape, stride) for x, (stride, _) in zip(gradients, known, strict=True)]
            gradients = [copy.copy_(x) for copy, x in zip(copies, gradients, strict=True)]
        return None, None, *backward.run((*saved, *gradients))[0]
