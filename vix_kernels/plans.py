"""Replay the kernel launches of an earlier call without running its Python code again.

On small inputs, the Python code of an eager call (argument checks, autograd nodes, launch configurations) takes longer than its
kernels. The kernel launches of a call depend on its signature (sizes, strides, dtypes, alignment and options), but not on the
values of its tensors. Therefore, `planned` records a call for each signature. Later calls with this signature skip the Python
code. They allocate the outputs and workspaces, and launch the same kernels with new addresses, so their results are
bit-identical to those of the Python code. If an input requires a gradient, replays start after the forward and backward passes
of a call have been recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from . import backends, conditions
from .primitives.autograd import once_differentiable
from .primitives.registry import DEFAULT_KEYS, PLAIN
from .recorder import Recorder
from .replay import Location, PassPlan, launcher

MAX_SIGNATURES = 1024  # maximum number of entries; a full table is cleared before an entry is added
OPTIONS = {type(None), bool, int, float, str, torch.dtype}  # types of arguments whose value is part of the signature

entries: dict[tuple, Entry] = {}  # indexed by signature


def planned(function: Callable) -> Callable:
    """Decorate a function of tensors and options, so that calls on a GPU replay an earlier call with the same signature."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # While a compiler traces this call, is_compiling() is True, so the compiled program contains no replay.
        if torch.compiler.is_compiling() or not on_gpu(args, kwargs) or not replays_allowed():
            return function(*args, **kwargs)
        grad_enabled, tensors = torch.is_grad_enabled(), []
        key = [function, grad_enabled, backends.tf32_allowed(), *kwargs]
        if not describe((*args, *kwargs.values()), key, tensors):
            return function(*args, **kwargs)
        if torch._C._is_any_autocast_enabled():
            device = tensors[0].device.type
            key += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        entry = entries.get(key := tuple(key))
        if entry is None:
            if len(entries) >= MAX_SIGNATURES:
                entries.clear()
            entry = entries[key] = Entry()
        needs_backward = grad_enabled and any([x.requires_grad for x in tensors])  # a list, because a generator is slower
        if entry.should_record(tensors):
            return record(entry, function, args, kwargs, tensors, needs_backward)
        if entry.plan is None:
            return function(*args, **kwargs)
        # Each tensor is a separate argument, because autograd ignores tensors inside tuples and dataclasses.
        return _Replay.apply(entry.plan, *tensors) if needs_backward else entry.plan.run(tensors)[0]

    return call


def on_gpu(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether a call may run kernels: its first argument is a plain Tensor on a GPU, and its backend may use Triton."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    if type(x) not in PLAIN or not x.is_cuda:
        return False
    return kwargs.get("backend", "auto") in ("auto", "triton") and backends.triton_installed()


def replays_allowed() -> bool:
    """Return whether calls can be recorded and replayed now. See docs/kernels.md for the cases in which they cannot."""
    return (
        conditions.current is conditions.DEFAULT
        and torch._C._dispatch_tls_local_include_set().raw_repr() in DEFAULT_KEYS
        and forward_ad._current_level < 0
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and (not torch._C._len_torch_function_stack() or _only_default_device())
        and conditions.recording.recorder is None
        and not launcher().needs_triton()
    )


def _only_default_device() -> bool:
    return all(isinstance(mode, DeviceContext) for mode in torch.overrides._get_current_function_mode_stack())


@functools.cache
def initial_fields(kind: type) -> list[str]:
    """Return the names of the fields that are parameters of __init__.

    Other fields, such as Rope.remake, do not affect a call.
    """
    return [each.name for each in fields(kind) if each.init]


def describe(values: Iterable[Any], key: list[Any], tensors: list[Tensor]) -> bool:
    """Append the signature of `values` to `key`, and their tensors to `tensors`. Return False if a value is not supported."""
    for x in values:
        kind = type(x)
        if kind in PLAIN and x.layout is torch.strided and not (x.is_nested or x.is_neg() or x._is_zerotensor()):
            key += x.dtype, x.shape, x.stride(), x.get_device(), x.requires_grad, x.data_ptr() % 16
            tensors.append(x)
        elif kind in OPTIONS or (kind is tuple and all(type(each) is int for each in x)):
            key += kind, x
        elif is_dataclass(kind):  # such as Rope
            key.append(kind)
            if not describe([getattr(x, name) for name in initial_fields(kind)], key, tensors):
                return False
        else:
            return False
    return True


def replace_tensors(values: Iterable[Any], tensors: Iterator[Tensor]) -> list[Any]:
    """Return `values` with their tensors replaced by `tensors`, in the order in which `describe` lists them."""
    results = []
    for x in values:
        if isinstance(x, Tensor):
            x = next(tensors)
        elif is_dataclass(x):
            names = initial_fields(type(x))
            x = replace(x, **dict(zip(names, replace_tensors([getattr(x, name) for name in names], tensors), strict=True)))
        results.append(x)
    return results


@dataclass
class CallPlan:
    """The plan of a call, and of its backward pass if an input requires a gradient. See replay.py for sources and bases.

    Attributes:
        forward: plan of the forward pass. Its sources are the input tensors.
        single: whether the function returns a tensor instead of a tuple.
        saved: indices of the bases that the forward pass saves for the backward pass.
        backward: plan of the backward pass. Its sources are the saved bases, then the output gradients.
        strides: recorded strides of the output gradients.
    """

    forward: PassPlan
    single: bool
    saved: list[int]
    backward: PassPlan | None = None
    strides: list[tuple[int, ...]] | None = None

    def run(self, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """Replay the forward pass. Return the result of the call, and the tensors to save for the backward pass."""
        outputs, bases = self.forward.run(tensors)
        return outputs[0] if self.single else tuple(outputs), [bases[i] for i in self.saved]

    def run_backward(self, saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Replay the backward pass. Return the gradients of the input tensors."""
        gradients = [
            x
            if x.stride() == strides and x.data_ptr() % 16 == 0 and not (x.is_neg() or x._is_zerotensor())
            else x.new_empty_strided(x.shape, strides).copy_(x)
            for x, strides in zip(gradients, self.strides, strict=True)
        ]
        run = torch.compiler.disable(self.backward.run) if torch.compiler.is_compiling() else self.backward.run
        return run((*saved, *gradients))[0]


@dataclass
class Entry:
    """State of the calls with one signature.

    Attributes:
        plan: the plan of these calls, or None until it is complete.
        reason: why these calls cannot be replayed, or None. After it is set, no call with this signature is recorded.
        calls: number of earlier calls. Calls are not counted after `plan` or `reason` is set.
    """

    plan: CallPlan | None = None
    reason: str | None = None
    calls: int = 0

    def should_record(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether to record this call.

        Call 2 is recorded. While the plan is not complete, for example because no recorded call has run its backward pass,
        calls 3, 5, 9, ... are recorded, too. A call is not recorded if two of its tensors have the same address, because the
        recorder could not distinguish them. It is also not recorded if a tensor is empty, because empty tensors have no
        address.
        """
        if self.plan is not None or self.reason is not None:
            return False
        earlier, self.calls = self.calls, self.calls + 1
        recorded = earlier > 0 and earlier & (earlier - 1) == 0
        return recorded and len({x.data_ptr() for x in tensors} - {0}) == len(tensors)


def record(
    entry: Entry, function: Callable, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], needs_backward: bool
) -> Any:
    """Run and record a call, and return its result.

    If the call needs a backward pass, but its forward pass cannot be replayed, the function runs again under autograd.
    """

    def call(inputs: Iterable[Tensor]) -> Any:
        values = replace_tensors((*args, *kwargs.values()), iter(inputs))
        return function(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    if needs_backward:
        result = _Record.apply(entry, call, *tensors)
        return result if entry.reason is None else function(*args, **kwargs)
    recorder = Recorder(tensors)
    result = recorder.run(call, tensors)
    single = isinstance(result, Tensor)
    if found := recorder.plan(arguments(tensors), (result,) if single else result):
        entry.plan = CallPlan(found[0], single, [])
    entry.reason = recorder.reason
    return result


def arguments(tensors: Sequence[Tensor]) -> dict[int, Location]:
    """Return the location of each input tensor. Tensor i starts at offset 0 of source i (see replay.py)."""
    return {i: Location(i, 0) for i in range(len(tensors))}


def differentiate(results: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient of each input, or None for an input that does not require a gradient."""
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(results, wanted, gradients, retain_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def dense(x: Tensor) -> Tensor:
    """Return the gradient x as a dense, non-overlapping tensor whose last stride is 1 and whose negative bit is not set."""
    x = x.resolve_neg()
    is_dense = torch.empty_like(x).stride() == x.stride()  # empty_like keeps the strides of dense tensors
    return x if is_dense and x.stride()[-1:] in ((), (1,)) else x.contiguous()


class _Record(torch.autograd.Function):
    """Runs and records a call and its backward pass. `ctx` keeps the autograd graph of the call."""

    @staticmethod
    def forward(ctx, entry, call, *tensors):
        inputs = [x.detach().requires_grad_() if x.requires_grad else x for x in tensors]
        recorder = Recorder(inputs)
        with torch.enable_grad():
            result = recorder.run(call, inputs)
        single = isinstance(result, Tensor)
        results = (result,) if single else result
        outputs = [x.detach() for x in results]
        if not all(x.requires_grad for x in results):
            recorder.refuse("an output requires no gradient")
        kept = recorder.saved(results)
        found = recorder.plan(arguments(tensors), results, kept)
        if found is None:
            entry.reason = recorder.reason
            return outputs[0] if single else tuple(outputs)
        forward, locations = found
        kept = {base: locations[base] for base in kept if base in locations}
        saved = list(dict.fromkeys(location.base for location in kept.values()))
        ctx.save_for_backward(*(tensors[base] for base in kept if base < len(tensors)))  # to detect in-place changes
        ctx.plan, ctx.tf32 = CallPlan(forward, single, saved), backends.tf32_allowed()
        ctx.sources = {base: location._replace(base=saved.index(location.base)) for base, location in kept.items()}
        ctx.entry, ctx.recorder, ctx.inputs, ctx.results = entry, recorder, inputs, results
        return outputs[0] if single else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, *gradients):
        recorder, ctx.recorder, results, inputs = ctx.recorder, None, ctx.results, ctx.inputs
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.results = ctx.inputs = None  # free their memory
        # The recorder is None in a second backward pass through the same call.
        if recorder is None or not replays_allowed() or backends.tf32_allowed() != ctx.tf32:
            return None, None, *differentiate(results, inputs, gradients)
        gradients = [dense(x) for x in gradients]
        if not recorder.are_new(gradients):
            gradients = [x.clone() for x in gradients]
        plan = ctx.plan
        sources = {recorder.add(x, "input"): Location(len(plan.saved) + i, 0) for i, x in enumerate(gradients)}
        outputs = recorder.run(differentiate, results, inputs, gradients)
        if found := recorder.plan(ctx.sources | sources, outputs):
            plan.backward, plan.strides = found[0], [x.stride() for x in gradients]
            ctx.entry.plan = ctx.entry.plan or plan
        ctx.entry.reason = recorder.reason
        return None, None, *outputs


class _Replay(torch.autograd.Function):
    """Replays a recorded call and its backward pass."""

    @staticmethod
    def forward(ctx, plan, *tensors):
        result, saved = plan.run(tensors)
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, saved, *gradients):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        if level:  # torch.autograd.grad(..., is_grads_batched=True)
            return None, *for_each_gradient(functools.partial(ctx.plan.run_backward, saved), gradients, level)
        return None, *ctx.plan.run_backward(saved, gradients)


def for_each_gradient(backward: Callable, gradients: Sequence[Tensor], level: int) -> list[Tensor | None]:
    """Call `backward` for each element of a batch of gradients, and return the batched results.

    `level` is the vmap level of the batch dimension.
    """
    size = max(len(torch._remove_batch_dim(x, level, 1, 0)) for x in gradients)  # 1 if x has no batch dimension
    parts = [torch._remove_batch_dim(x, level, size, 0) for x in gradients]
    columns = zip(*[backward([x[i] for x in parts]) for i in range(size)], strict=True)
    return [None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level) for column in columns]
