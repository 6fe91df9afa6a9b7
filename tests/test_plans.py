"""Tests of recorded launch plans (plans.py). Kernels run in Triton's interpreter."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import test_ops
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from conftest import DEVICE, NO_TRITON
from vix_kernels import agent_attention, apply_rope, backends, conditions, performer_attention, plans, replay, rope_1d
from vix_kernels.ops.performer import orthogonal_projection
from vix_kernels.primitives.autograd import once_differentiable
from vix_kernels.testing import SPECS, Case, OpSpec

pytestmark = NO_TRITON
PUBLIC = {name: spec for name, spec in SPECS.items() if spec.public}
FEW = [(spec, case) for spec, case in test_ops.few("masked", "rope_partial") if spec.public]


class Unobserved:
    """Replaces the module that launches compiled kernels, because these tests run kernels in Triton's interpreter."""

    needs_triton = staticmethod(lambda: False)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Record calls with CPU tensors, too. Every test starts without plans."""
    monkeypatch.setattr(plans, "on_gpu", lambda *args, **kwargs: True)
    monkeypatch.setattr(plans, "launcher", lambda: Unobserved)
    plans.entries.clear()
    yield
    plans.entries.clear()


class Product(torch.autograd.Function):
    """x exp(y) with a backward pass in plain PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        e = y.exp()
        ctx.save_for_backward(x, e)
        return x * e

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], dz: Tensor) -> tuple[Tensor, Tensor]:
        x, e = saved
        return dz * e, dz * x * e


@plans.planned
def product(x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
    return Product.apply(x, y) * scale


def leaves(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))


def passes(function: Callable, tensors: tuple[Tensor, ...], change: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
    """Return the output and the gradients. `change` changes the memory layout of the incoming gradient."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, change(torch.linspace(-1, 1, out.numel()).view(out.shape)))]


def make_ready(function: Callable, tensors: tuple[Tensor, ...]) -> plans.Entry:
    """Call a function twice, so that the next call is replayed. Return the last entry in `plans.entries`."""
    for _ in range(2):
        passes(function, tensors)
    entry = list(plans.entries.values())[-1]
    assert entry.plan is not None
    return entry


def replays(function: Callable, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Call a function, and return whether it replayed a plan."""
    replayed = []
    run = replay.PassPlan.run
    with monkeypatch.context() as patch:
        patch.setattr(replay.PassPlan, "run", lambda *args: replayed.append(1) or run(*args))
        function()
    return bool(replayed)


# Results


@pytest.mark.parametrize("spec, case", test_ops.params(FEW))
def test_replayed_calls_are_bit_identical(spec: OpSpec, case: Case, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call 1 runs the function, call 2 is recorded, and calls 3 and 4 are replayed, each with new values."""

    def results(seed: int) -> list[Tensor]:
        problem = spec.problem(case, dtype=torch.bfloat16, device=DEVICE, seed=seed)
        return sum(test_ops.run(problem, backend="triton"), [])

    found = [results(seed) for seed in range(4)]
    (entry,) = plans.entries.values()
    assert entry.reason is None and entry.plan is not None
    monkeypatch.setattr(plans, "on_gpu", lambda *args, **kwargs: False)
    for seed, actual in enumerate(found):
        for x, y in zip(actual, results(seed), strict=True):
            assert torch.equal(x.nan_to_num(7), y.nan_to_num(7)) and x.stride() == y.stride()


@pytest.mark.parametrize("spec", PUBLIC.values(), ids=PUBLIC)
def test_replays_without_gradients(spec: OpSpec, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [spec.problem(spec.cases[-1], dtype=torch.bfloat16, device=DEVICE, seed=seed) for seed in range(3)]
    found = [problem(backend="triton") for problem in problems]
    assert replays(lambda: problems[0](backend="triton"), monkeypatch)
    monkeypatch.setattr(plans, "on_gpu", lambda *args, **kwargs: False)
    for problem, actual in zip(problems, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(actual, problem(backend="triton"), strict=True))


def test_operations_between_launches() -> None:
    """A replay also runs the PyTorch operations between the kernel launches.

    `agent_attention` masks the agents with a PyTorch operation. Both of its softmax attention steps use the agents, so autograd
    adds the two gradients of the agents.
    """
    q, agents = torch.randn(2, 2, 37, 16).requires_grad_(), torch.randn(2, 2, 8, 16).requires_grad_()
    mask = torch.rand(2, 8) > 0.3
    call = partial(agent_attention, backend="triton", agent_mask=mask)
    results = [passes(lambda q, agents: call(q, q * 1, q * 1, agents), (q, agents)) for _ in range(3)]
    assert any(isinstance(step, replay.Operation) for step in next(iter(plans.entries.values())).plan.forward.steps)
    assert all(torch.equal(x, y) for other in results for x, y in zip(results[0], other, strict=True))


def test_rope_with_learned_angles() -> None:
    """Plans find the tensors inside a dataclass argument such as Rope. Replays compute the gradient of the angles."""
    from vix_kernels import Rope

    q, k = leaves(1, 2, 37, 16)
    angles = torch.randn(1, 37, 8).requires_grad_()

    def call(q: Tensor, k: Tensor, angles: Tensor) -> Tensor:
        return sum(apply_rope(q, k, Rope.of(angles), backend="triton"))

    results = [passes(call, (q, k, angles)) for _ in range(3)]
    assert next(iter(plans.entries.values())).plan is not None
    assert all(torch.equal(x, y) for other in results for x, y in zip(results[0], other, strict=True))


# Signatures


def test_the_signature() -> None:
    """Sizes, strides, dtypes, alignment, requires_grad, options and the grad mode are in the signature. Values are not."""
    x, y = leaves(4, 8)
    product(x, y)
    product(x + 1, y + 1)
    unaligned = torch.randn(33)[1:].view(4, 8).requires_grad_()
    different: list[Callable[[], Any]] = [
        lambda: product(x.detach(), y),
        lambda: product(*leaves(4, 9)),
        lambda: product(x.T, y.T),
        lambda: product(x.double(), y.double()),
        lambda: product(x, y, scale=2.0),
        lambda: product(x, y, scale=2),
        lambda: product(x, y, scale=True),
        lambda: product(unaligned, y),
        torch.no_grad()(lambda: product(x, y)),
    ]
    for expected, call in enumerate(different, 2):
        call()
        call()
        assert len(plans.entries) == expected


def test_tf32_is_in_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    product(*leaves(4, 8))
    monkeypatch.setattr(backends, "tf32_allowed", lambda: not torch.backends.cuda.matmul.allow_tf32)
    product(*leaves(4, 8))
    assert len(plans.entries) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["same dtype", "cast"])
def test_autocast_is_in_the_signature(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, calls are replayed unless their arguments are cast.

    If they are cast, the cast tensors are saved for the backward pass instead of the arguments. Such calls are not
    replayed: in a replay, the cast tensors would not require gradients, so double backward would not raise the error "cannot
    be differentiated again".
    """
    q = torch.randn(1, 2, 37, 16, dtype=dtype).requires_grad_()
    projection = orthogonal_projection(8, 16, seed=0)
    call = partial(passes, lambda q: performer_attention(q, q * 1, q * 1, projection, backend="triton"), (q,))
    call()
    with torch.autocast("cpu", torch.bfloat16):
        results = [call() for _ in range(3)]
        assert replays(call, monkeypatch) == (dtype == torch.bfloat16)
    assert results[0][0].dtype == torch.bfloat16
    assert all(torch.equal(x, y) for other in results for x, y in zip(results[0], other, strict=True))
    assert not replays(call, monkeypatch)  # call 2 without autocast


@pytest.mark.parametrize(
    "arguments",
    [
        lambda x: (x.to_sparse(), x),
        lambda x: (torch.nested.nested_tensor([x, x]), x),
        lambda x: (torch._neg_view(x), x),
        lambda x: (torch._efficientzerotensor(x.shape), x),
        lambda x: (x.as_subclass(type("Subclass", (Tensor,), {})), x),
        lambda x: (x, 1 + 2j),
    ],
    ids=["sparse", "nested", "negative", "zero", "subclass", "complex"],
)
def test_arguments_without_a_signature(arguments: Callable) -> None:
    assert not plans.describe(arguments(torch.randn(4, 8)), [], [])


def test_equal_addresses() -> None:
    """A call whose arguments have equal addresses is not recorded, because a plan identifies arguments by address.

    A plan recorded from a call with distinct addresses can be replayed for a call with equal addresses.
    """
    x, y = leaves(4, 8)
    for _ in range(3):
        product(x, x)
    assert next(iter(plans.entries.values())).plan is None
    make_ready(product, (x, y))
    out = product(x, x)
    assert torch.equal(out, x * x.exp())
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], x.exp() + x * x.exp())


# When calls are not replayed


def test_cpu_and_meta_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for device in ("cpu", "meta"):
        assert not plans.on_gpu((torch.empty(1, device=device),), {})
        assert not plans.on_gpu((), dict(x=torch.empty(1, device=device)))
    assert not plans.on_gpu((), {}) and not plans.on_gpu(("x",), {})
    product(*leaves(4, 8))
    assert not plans.entries


class NoFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class NoDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "function mode": NoFunctions,
    "dispatch mode": NoDispatch,
    "fake tensors": FakeTensorMode,
    "forward AD": forward_ad.dual_level,
    "saved-tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "observer": lambda: conditions.under(observer=lambda *launch: None),
    "conditions": lambda: conditions.under(split=False),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_contexts_without_replays(context: Callable[[], AbstractContextManager]) -> None:
    assert plans.replays_allowed()
    with context():
        assert not plans.replays_allowed()
    assert plans.replays_allowed()


@pytest.mark.parametrize(
    "context", [nullcontext, partial(torch.device, "cpu"), torch.no_grad, torch.inference_mode], ids=lambda x: str(x)[:30]
)
def test_contexts_with_replays(context: Callable[[], AbstractContextManager], monkeypatch: pytest.MonkeyPatch) -> None:
    """A default device (which installs a function mode), no_grad and inference_mode do not prevent replays."""
    tensors = leaves(4, 8)
    with context():
        grad = torch.is_grad_enabled()
        call = partial(passes, product, tensors) if grad else partial(product, *tensors)
        results = [call() for _ in range(3)]
        assert replays(call, monkeypatch)
        assert not isinstance(results[-1], Tensor) or results[-1].is_inference() == results[0].is_inference()


TRANSFORMS: dict[str, Callable[[Callable, Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "make_fx": lambda f, x: make_fx(f)(x),
    "jit.trace": lambda f, x: torch.jit.trace(f, (x,), check_trace=False),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform: Callable[[Callable, Tensor], Any]) -> None:
    allowed = []
    transform(lambda x: allowed.append(plans.replays_allowed()) or x * 2, torch.randn(4, 8))
    assert allowed and not any(allowed)


def test_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces the function itself, not a replay."""
    x, y = leaves(4, 8)
    make_ready(product, (x, y))
    compiled = torch.compile(product, backend="eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x, y), product(x, y))
    assert not replays(lambda: compiled(x, y), monkeypatch)


def test_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointed calls are not replayed, because a replay and a normal call save different tensors for the backward pass."""
    x, y = leaves(4, 8)
    expected = passes(product, (x, y))
    make_ready(product, (x, y))
    assert not replays(lambda: passes(lambda x, y: checkpoint(product, x, y, use_reentrant=False), (x, y)), monkeypatch)
    actual = passes(lambda x, y: checkpoint(product, x, y, use_reentrant=False), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_hooks_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unobserved, "needs_triton", staticmethod(lambda: True))
    assert not plans.replays_allowed()


@pytest.mark.parametrize(
    "operation",
    [lambda x: x.sum().item(), lambda x: x.add_(1), lambda x: bool(x.any()), lambda x: torch.equal(x, x)],
    ids=["item", "in place", "bool", "equal"],
)
def test_functions_that_depend_on_values(operation: Callable[[Tensor], Any]) -> None:
    """Calls are not replayed if the function reads tensor values in Python, as `item()` does, or modifies a tensor in place.

    The entry in `plans.entries` gives the reason.
    """
    calls = []

    @plans.planned
    def function(x: Tensor) -> Tensor:
        calls.append(operation(x))
        return x * 2

    for i in range(4):
        assert torch.equal(function(x := torch.full((4,), float(i))), 2 * x)
    assert len(calls) == 4
    (entry,) = plans.entries.values()
    assert "reads values" in entry.reason or "changes a tensor" in entry.reason


def test_outputs_that_are_not_new_tensors() -> None:
    for function in (lambda x: x, lambda x: x[:2]):
        planned = plans.planned(function)
        for _ in range(3):
            x = torch.randn(4)
            assert planned(x).data_ptr() == x.data_ptr()


def test_errors_are_those_of_the_function() -> None:
    q = torch.randn(1, 2, 37, 16)
    for _ in range(3):
        with pytest.raises(ValueError, match="rope: expected angles for q's 37 tokens, got 5"):
            apply_rope(q, q + 1, rope_1d(5, 16), backend="triton")
        with pytest.raises(TypeError, match="q: expected a dense Tensor"):
            apply_rope(q.to_sparse(), q, rope_1d(37, 16))


# Autograd


@pytest.mark.parametrize("calls", [2, 3], ids=["recorded", "replayed"])
class TestAutograd:
    def output(self, calls: int) -> tuple[Tensor, Tensor, Tensor]:
        """Call `product` a total of `calls` times. Return x, y and the output of the last call, before its backward pass."""
        x, y = leaves(4, 8)
        for _ in range(calls - 1):
            passes(product, (x, y))
        x, y = leaves(4, 8, seed=1)
        return x, y, product(x, y)

    def test_double_backward_raises(self, calls: int) -> None:
        x, y, out = self.output(calls)
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            dx.sum().backward()

    def test_changes_in_place_are_detected(self, calls: int) -> None:
        x, y, out = self.output(calls)
        with torch.no_grad():
            x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_changes_of_tensors_that_are_not_saved(self, calls: int) -> None:
        """The backward pass reads exp(y), but neither y nor the output. Both may change before the backward pass."""
        x, y, out = self.output(calls)
        with torch.no_grad():
            y.add_(1)
            out.add_(1)
        out.sum().backward()
        assert torch.allclose(x.grad, (y.detach() - 1).exp())

    def test_backward_twice(self, calls: int) -> None:
        x, y, out = self.output(calls)
        first, second = (torch.autograd.grad(out.sum(), (x, y), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        out.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.sum().backward()

    def test_a_single_gradient(self, calls: int) -> None:
        x, y, out = self.output(calls)
        (dy,) = torch.autograd.grad(out.sum(), y)
        assert torch.equal(dy, x.detach() * y.detach().exp())

    def test_a_batch_of_gradients(self, calls: int) -> None:
        x, y, out = self.output(calls)
        (dx,) = torch.autograd.grad(out, x, torch.stack([torch.ones(4, 8), torch.full((4, 8), 2.0)]), is_grads_batched=True)
        assert torch.equal(dx, torch.stack([y.exp(), 2 * y.exp()]))

    def test_storages_that_are_allocated_again(self, calls: int) -> None:
        """FSDP frees the storages of parameters after the forward pass, and allocates them again before the backward pass."""
        x, y, out = self.output(calls)
        storage, values = x.untyped_storage(), x.detach().clone()
        size = storage.nbytes()
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(x):
            storage.resize_(0)
            blocks = [torch.empty(size // 4) for _ in range(8)]  # so that the storage gets a new address
            storage.resize_(size)
            x.copy_(values)
        del blocks
        for _ in range(3):
            assert torch.equal(torch.autograd.grad(out.sum(), y, retain_graph=True)[0], values * y.detach().exp())
            out = product(x, y)

    def test_an_observer_during_backward(self, calls: int) -> None:
        """Launches that an observer receives are not executed, so they are not recorded."""
        q, k = leaves(1, 2, 37, 16)
        rope = rope_1d(37, 16)

        def call(q: Tensor, k: Tensor) -> Tensor:
            return sum(apply_rope(q, k, rope, backend="triton"))

        for _ in range(calls - 1):
            passes(call, (q, k))
        out = call(q, k)
        with conditions.under(observer=lambda *launch: None):
            out.sum().backward()
        results = [passes(call, (q, k)) for _ in range(4)]
        assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))

    def test_memory_is_freed_after_backward(self, calls: int) -> None:
        x, y = leaves(4, 8)
        for _ in range(calls - 1):
            passes(product, (x, y))
        x = x * 1
        storage = StorageWeakRef(x.untyped_storage())
        out = product(x, y)
        out.sum().backward()
        del x
        gc.collect()
        assert storage.expired()
        assert out.grad_fn is not None


def test_layouts_of_gradients() -> None:
    """A gradient is copied if its strides differ from the recorded strides, it is not aligned, or its negative bit is set."""
    tensors = leaves(4, 8)
    make_ready(product, tensors)
    expected = passes(product.__wrapped__, tensors)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        lambda x: torch.cat([x, x], 1)[:, :8],
        lambda x: torch._neg_view(-x),
    ]
    for change in layouts:
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(passes(product, tensors, change), expected, strict=True))
    out = product(*tensors)
    assert torch.equal(torch.autograd.grad(out.sum(), tensors[0])[0], tensors[1].exp())  # an expanded gradient


@pytest.mark.parametrize(
    "change",
    [lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x], 1)[:, :8], lambda x: torch._neg_view(-x)],
    ids=["transposed", "sliced", "negative"],
)
def test_recorded_layouts_of_gradients(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = leaves(4, 8)
    expected = passes(product.__wrapped__, tensors)
    for _ in range(2):
        passes(product, tensors, change)
    assert replays(lambda: passes(product, tensors, change), monkeypatch)
    for each in (change, lambda x: x):
        assert all(torch.equal(a, b) for a, b in zip(passes(product, tensors, each), expected, strict=True))


def test_the_reference_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with backend="reference" are not recorded, because replays do not support second derivatives."""
    monkeypatch.undo()
    monkeypatch.setattr(backends, "triton_installed", lambda: True)

    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr(plans, "PLAIN", (OnGpu,))
    x = torch.randn(4).as_subclass(OnGpu)
    assert plans.on_gpu((x,), {}) and plans.on_gpu((), dict(x=x, backend="triton"))
    assert not plans.on_gpu((x,), dict(backend="reference")) and not plans.on_gpu((x,), dict(backend="torch"))


def test_outputs_without_gradients() -> None:
    """Calls to a function are not replayed if one of the outputs requires no gradient."""

    @plans.planned
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, y * 2

    for _ in range(3):
        a, b = function(torch.ones(3, requires_grad=True), torch.zeros(3))
        assert a.requires_grad and not b.requires_grad
        a.sum().backward()
    assert "an output requires no gradient" in next(iter(plans.entries.values())).reason


def test_overlapping_gradients() -> None:
    """A gradient whose elements overlap is copied before the backward pass is recorded."""
    tensors = leaves(4, 8)
    for _ in range(2):
        passes(product, tensors, lambda x: torch.arange(11.0).unfold(0, 8, 1))
    for a, b in zip(passes(product, tensors), passes(product.__wrapped__, tensors), strict=True):
        assert torch.equal(a, b)


def test_sizes_that_depend_on_values() -> None:
    @plans.planned
    def function(x: Tensor) -> Tensor:
        return x[x > 0] * 2

    for count in (1, 2, 3, 4):
        assert len(function(torch.where(torch.arange(4) < count, 1.0, -1.0))) == count


def test_outputs_with_another_dtype() -> None:
    @plans.planned
    def function(x: Tensor) -> Tensor:
        return (x * 2).view(torch.int32)

    results = [function(torch.arange(4.0)) for _ in range(3)]
    assert all(torch.equal(x, results[0]) and x.dtype == torch.int32 for x in results)


def test_calls_without_backward_passes() -> None:
    """If the backward pass of a recorded call never runs, a later call is recorded instead."""
    tensors = leaves(4, 8)
    for _ in range(20):
        product(*tensors)
    (entry,) = plans.entries.values()
    assert entry.plan is None
    while entry.plan is None:
        passes(product, tensors)
    assert entry.calls == 33  # call 33 is the next one that is recorded


def test_many_calls_before_the_first_backward_pass() -> None:
    """No call is replayed before a backward pass has been recorded, even if many calls have the same signature."""
    x, y = leaves(4, 8)
    out = x
    for _ in range(12):
        out = product(out, y)
    out.sum().backward()
    expected, x.grad, y.grad = (x.grad, y.grad), None, None
    out = x
    for _ in range(12):
        out = product(out, y)
    out.sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(y.grad, expected[1])


# Bounds, threads, memory


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_SIGNATURES", 3)
    for size in range(1, 8):
        make_ready(product, leaves(1, size))
        assert len(plans.entries) <= 3


def test_threads() -> None:
    """Threads that concurrently record and replay calls with two signatures compute the same results as without replays."""
    problems = [leaves(4, 8), leaves(5, 7, seed=1)]
    expected = [passes(product.__wrapped__, tensors) for tensors in problems]
    errors, rounds = [], 200

    def work(index: int) -> None:
        for i in range(rounds):
            which = (index + i) % 2
            tensors = tuple(x.detach().clone().requires_grad_() for x in problems[which])
            if not all(torch.equal(a, b) for a, b in zip(passes(product, tensors), expected[which], strict=True)):
                errors.append((index, i))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(entry.plan is not None for entry in plans.entries.values())


def test_memory() -> None:
    """Memory stays bounded for many signatures, and plans keep no references to the tensors of a call."""
    import weakref

    tensors = leaves(4, 8)
    references = [weakref.ref(x) for x in tensors]
    make_ready(product, tensors)
    del tensors
    gc.collect()
    assert not any(reference() is not None for reference in references)

    def many(first: int, count: int) -> None:
        for size in range(first, first + count):
            with torch.no_grad():
                for _ in range(3):
                    product(torch.ones(1, size), torch.ones(1, size))

    many(1, 1000)
    gc.collect()
    tracemalloc.start()
    many(1001, 5 * plans.MAX_SIGNATURES)
    before = tracemalloc.get_traced_memory()[0]
    many(1001 + 5 * plans.MAX_SIGNATURES, 5 * plans.MAX_SIGNATURES)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(plans.entries) <= plans.MAX_SIGNATURES
    assert grown < 2**20
