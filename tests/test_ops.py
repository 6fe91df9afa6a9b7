"""Tests of the requirements that every registered operator must meet on every backend, with one test per requirement."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vix_kernels  # noqa: F401  registers the operators
from conftest import DEVICE
from vix_kernels import conditions
from vix_kernels.primitives.registry import operators
from vix_kernels.testing import SPECS, Case, OpSpec, Problem

Cases = list[tuple[OpSpec, Case]]
EVERY_CASE: Cases = [(spec, case) for spec in SPECS.values() for case in spec.cases]


def few(*names: str) -> Cases:
    """For each operator, return the cases with these names, or the last case if the operator has none of them."""
    found: Cases = []
    for spec in SPECS.values():
        found += [(spec, case) for case in spec.cases if case.name in names] or [(spec, spec.cases[-1])]
    return found


VARIANTS = [name for name in SPECS if name.endswith(("_mixed", "_projected"))]  # they launch kernels of other operators
FEW = few("packed", "masked", "per_head", "rope_half", "rope_partial")
VARIED = few("masked", "rope_partial")


def params(cases: Cases, prefix: str = "", *before: str) -> list:
    return [pytest.param(*before, spec, case, id=f"{prefix}{spec.name}-{case.name}") for spec, case in cases]


EVERY = params(EVERY_CASE)


def on_each_backend(cases: Cases, interpreted: Cases) -> pytest.MarkDecorator:
    """Parametrize over `cases` on both backends. The interpreter is slow, so it runs only the cases in `interpreted`."""
    grid = params(cases, "torch-", "torch") + params(cases if DEVICE == "cuda" else interpreted, "triton-", "triton")
    return pytest.mark.parametrize("backend, spec, case", grid, indirect=["backend"])


def each_operator() -> pytest.MarkDecorator:
    """Parametrize over all operators on both backends. In the interpreter, skip the operators in VARIANTS."""
    grid = [
        pytest.param(backend, spec, id=f"{backend}-{name}")
        for backend in ("torch", "triton")
        for name, spec in SPECS.items()
        if backend == "torch" or DEVICE == "cuda" or name not in VARIANTS
    ]
    return pytest.mark.parametrize("backend, spec", grid, indirect=["backend"])


def run(problem: Problem, **how) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of a problem, and the gradients of its differentiable inputs for fixed gradients of the outputs."""
    leaves = [problem.tensors[name] for name in problem.spec.differentiable]
    leaves = [x.detach().requires_grad_() for x in leaves]
    problem = problem.map(lambda x: x)
    problem.tensors.update(zip(problem.spec.differentiable, leaves, strict=True))
    outputs = problem(**how)
    cotangents = []
    for i, out in enumerate(outputs):
        generator = torch.Generator().manual_seed(10 + i)
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
        # The log-sum-exp of a slot without valid tokens is -inf. A finite loss cannot depend on it, so its gradient is 0.
        cotangents.append(cotangent.masked_fill(out.detach() == float("-inf"), 0).to(out.dtype))
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    return [out.detach() for out in outputs], list(grads)


def finite(x: Tensor) -> Tensor:
    """Replace -inf, the log-sum-exp of a slot without valid tokens, with a finite number far from all other values."""
    return torch.where(x == float("-inf"), -1e3, x.double())


def distance(x: Tensor, y: Tensor) -> float:
    return (finite(x) - finite(y)).norm().item()


def error(x: Tensor, exact: Tensor) -> float:
    x, exact = finite(x), finite(exact)
    return ((x - exact).norm() / exact.norm().clamp_min(1e-30)).item() if exact.norm() > 0 else x.norm().item()


def dtypes(*chosen: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", chosen, ids=lambda dtype: str(dtype)[6:])


def check_budget(problem: Problem, backend: str, during: AbstractContextManager | None = None) -> None:
    """Check that every error is at most twice the sum of plain PyTorch's error and a rounding error.

    Errors are measured against a float64 reference. Plain PyTorch runs in the same precision as the operator. The rounding
    error is the eps of the dtype (1e-13 for float64), multiplied by the norm of the result. If the caller fills new
    memory with NaN (`poisoned`), the check also fails for elements that a kernel does not write.
    """
    spec = problem.spec
    exact = run(problem.double(), reference=True)
    plain = run(problem, reference=True)
    with during or nullcontext():
        actual = run(problem, backend=backend)
    dtype = problem.tensors[spec.batched[0]].dtype
    names = [f"output {i}" for i in range(len(exact[0]))] + [f"d{name}" for name in spec.differentiable]
    for name, x, reference, truth in zip(names, sum(actual, []), sum(plain, []), sum(exact, []), strict=True):
        assert x.dtype == reference.dtype and x.shape == truth.shape, name
        # With one token or one feature, some gradients are exactly 0. Their errors are relative to the norm of the output.
        size = finite(truth).norm().item()
        if size < 1e-9 * finite(exact[0][0]).norm().item():
            size = finite(exact[0][0]).norm().item()
        rounding = (1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps) * size
        budget = 2 * (distance(reference, truth) + rounding)
        assert distance(x, truth) <= budget, f"{name}: {distance(x, truth) / size:.2e} > {budget / size:.2e}"


@pytest.mark.parametrize("spec, case", EVERY)
def test_error_budget(spec: OpSpec, case: Case, backend: str, poisoned: None) -> None:
    check_budget(spec.problem(case, dtype=torch.bfloat16, device=DEVICE), backend)


@pytest.mark.parametrize("spec, case", EVERY)
def test_error_budget_in_float64(spec: OpSpec, case: Case, poisoned: None) -> None:
    """Check the PyTorch backend in float64. `test_kernels_write_their_outputs_and_nothing_else` checks the kernels."""
    check_budget(spec.problem(case, dtype=torch.float64, device=DEVICE), "torch")


# The interpreter does not emulate tensor cores, so kernels take the same path for float32 as for float64, and for float16 as
# for bfloat16.
@dtypes(torch.float16, torch.float32)
@on_each_backend(EVERY_CASE, interpreted=VARIED)
def test_error_budget_of_other_dtypes(spec: OpSpec, case: Case, dtype: torch.dtype, backend: str, poisoned: None) -> None:
    check_budget(spec.problem(case, dtype=dtype, device=DEVICE), backend)


class Canaries(TorchDispatchMode):
    """A dispatch mode that fills every newly allocated tensor with NaN and surrounds it with a border of known numbers."""

    BORDER, VALUE = 512, 123.0

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vix_kernels":
            with self:  # the mode must also see the tensors that the implementation allocates
                return operators[function._schema.name.split("::")[1]].implementation(*args)
        out = function(*args, **(kwargs or {}))
        if function._schema.name.split("::")[1] in ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"):
            buffer = torch.full((out.numel() + 2 * self.BORDER,), self.VALUE, dtype=out.dtype, device=out.device)
            self.buffers.append((buffer, out.numel()))
            inside = buffer[self.BORDER : self.BORDER + out.numel()]
            if out.is_floating_point():
                inside.fill_(torch.nan)
            return inside.as_strided(out.shape, out.stride(), self.BORDER)
        return out


@pytest.mark.parametrize("spec, case", EVERY)
def test_kernels_write_their_outputs_and_nothing_else(spec: OpSpec, case: Case) -> None:
    """Check the memory around each output, and compare the results with the float64 reference.

    The dtype is float64, or float32 on a GPU, where kernels do not support float64.
    """
    dtype = torch.float32 if DEVICE == "cuda" else torch.float64
    with Canaries() as canaries:
        check_budget(spec.problem(case, dtype=dtype, device=DEVICE), "triton", canaries)
    assert canaries.buffers
    for buffer, size in canaries.buffers:
        border = torch.cat([buffer[: Canaries.BORDER], buffer[Canaries.BORDER + size :]])
        assert (border == torch.full_like(border, Canaries.VALUE)).all()


@on_each_backend(FEW, interpreted=VARIED)
def test_gradcheck(spec: OpSpec, case: Case, backend: str) -> None:
    """Compare the gradients with numerical derivatives in float64."""
    if backend == "triton" and DEVICE == "cuda":
        pytest.skip("the kernels support float64 only in the interpreter")
    heads = case.heads if case.per_head else 1
    small = replace(case, tokens=9, heads=heads, features=5, width=max(8, case.rotary or 0))
    problem = spec.problem(small, dtype=torch.float64)
    # Masked entries and biases of slots without valid tokens are not finite and have no derivative, so they are kept fixed.
    fixed = {name: ~problem.tensors[name].isfinite() for name in spec.differentiable}
    leaves = [torch.nan_to_num(problem.tensors[name], 0.0, 0.0, 0.0).requires_grad_() for name in spec.differentiable]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        copy = problem.map(lambda x: x)
        for name, leaf in zip(spec.differentiable, leaves, strict=True):
            copy.tensors[name] = torch.where(fixed[name], problem.tensors[name], leaf)
        return tuple(torch.nan_to_num(out, neginf=0.0) for out in copy(backend=backend))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["performer_attention", "feature_attention", "agent_attention"])
def test_gradients_in_separate_launches(name: str) -> None:
    """With apart=True in the launch table, gradients are computed in two launches instead of one, even with few slots."""
    launch_table = pytest.importorskip("vix_kernels._triton.launch_table", reason="Triton is not installed here")
    tile = launch_table.INTERPRETER._replace(apart=True)
    kernels = "broadcast_slots", "broadcast_slots_heavy", "aggregate_tokens", "aggregate_tokens_heavy"
    tiles = {(kernel, 32, 16): tile for kernel in kernels}
    spec = SPECS[name]
    for case in spec.cases:
        if case.name in ("masked", "rope_partial", "per_head"):
            check_budget(spec.problem(replace(case, width=16), device=DEVICE), "triton", conditions.under(tiles=tiles))


@each_operator()
def test_a_single_gradient_equals_that_of_a_full_backward(spec: OpSpec, backend: str) -> None:
    """If only one input requires a gradient, the backward pass may skip work, but the gradient must stay bit-identical."""
    problem = spec.problem(spec.fit(Case("alone", batch=1)), device=DEVICE)
    together = dict(zip(spec.differentiable, run(problem, backend=backend)[1], strict=True))
    for name, expected in together.items():
        alone = replace(spec, differentiable=(name,))
        _, (grad,) = run(replace(problem, spec=alone), backend=backend)
        assert torch.equal(grad, expected), name


@on_each_backend(EVERY_CASE, interpreted=VARIED)
def test_inputs_are_unchanged_and_repeats_are_bit_identical(spec: OpSpec, case: Case, backend: str) -> None:
    problem = spec.problem(case, device=DEVICE)
    before = {name: x.clone() for name, x in problem.tensors.items()}
    first, second = run(problem, backend=backend), run(problem, backend=backend)
    for a, b in zip(sum(first, []), sum(second, []), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    for name, x in problem.tensors.items():
        assert torch.equal(x.nan_to_num(), before[name].nan_to_num()), f"{name} was written to"


@on_each_backend(*([(spec, case) for spec, case in cases if case.batch > 1] for cases in (FEW, VARIED)))
def test_batch_independence(spec: OpSpec, case: Case, backend: str) -> None:
    """The outputs and gradients of a sample do not depend on the other samples in the batch."""
    problem = spec.problem(case, device=DEVICE)
    together, alone = run(problem, backend=backend), run(problem.sample(0), backend=backend)
    names = {name for name in spec.batched if name in problem.tensors and problem.tensors[name].shape[0] == case.batch}
    batched = [i for i, name in enumerate(spec.differentiable) if name in names]
    together = [*together[0], *(together[1][i] for i in batched)]
    alone = [*alone[0], *(alone[1][i] for i in batched)]
    for a, b in zip(together, alone, strict=True):
        if backend == "triton":
            assert torch.equal(a[:1], b[:1])
        else:  # PyTorch's matrix product may sum in a different order if it has more rows
            assert error(a[:1], b[:1]) < 1e-6


@on_each_backend(FEW, interpreted=few("packed", "rope_partial"))
def test_memory_layout_does_not_matter(spec: OpSpec, case: Case, backend: str) -> None:
    """The results do not depend on the strides of the inputs. Gradients of the outputs may be expanded views."""
    problem = spec.problem(case, device=DEVICE)

    def spread_out(x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[0] == 1:  # features, biases, masks and packed tokens get strides of at least 2
            return x.new_ones([2 * size + 1 for size in x.shape])[(slice(1, None, 2),) * x.dim()].copy_(x)
        buffer = x.new_full((x.shape[2] + 1, x.shape[0], x.shape[1] + 2, x.shape[3] + 3), float("nan"))
        view = buffer[1:, :, 1:-1, 2:-1].permute(1, 2, 0, 3)
        return view.copy_(x)

    options = {name: spread_out(x) if isinstance(x, Tensor) else x for name, x in problem.options.items()}
    dense = run(problem.map(Tensor.contiguous), backend=backend)
    spread = run(replace(problem.map(spread_out), options=options), backend=backend)
    for a, b in zip(sum(dense, []), sum(spread, []), strict=True):
        assert error(a, b) < 1e-6

    def total(x: Problem, **how) -> list[Tensor]:
        leaves = [x.tensors[name].detach().requires_grad_() for name in spec.differentiable]
        x = x.map(lambda y: y)
        x.tensors.update(zip(spec.differentiable, leaves, strict=True))
        outputs = x(**how)
        ones = [torch.ones((), device=DEVICE, dtype=out.dtype).expand_as(out) for out in outputs]
        return list(torch.autograd.grad(outputs, leaves, ones))

    for a, b in zip(total(problem, backend=backend), total(problem.double(), reference=True), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_empty_batch(spec: OpSpec, backend: str) -> None:
    problem = spec.problem(spec.fit(Case("empty", batch=0)), device=DEVICE)
    outputs, grads = run(problem, backend=backend)
    assert all(out.shape[0] == 0 for out in outputs)
    assert all(grad.abs().sum() == 0 for grad in grads)


class Record(TorchDispatchMode):
    """A dispatch mode that records the calls to registered operators, with their arguments.

    `with Record() as calls` binds `calls` to the list of recorded calls.
    """

    def __enter__(self) -> list:
        self.calls: list = []
        super().__enter__()
        return self.calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "vix_kernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


SCHEMA_AND_FAKE = "test_schema", "test_autograd_registration", "test_faketensor"
DYNAMIC_TOO = *SCHEMA_AND_FAKE, "test_aot_dispatch_dynamic"


# In the interpreter, one case per operator is enough. Variants are skipped, because they launch kernels of other operators.
@on_each_backend(EVERY_CASE, interpreted=[(spec, spec.cases[-1]) for spec in SPECS.values() if spec.name not in VARIANTS])
def test_opcheck(spec: OpSpec, case: Case, backend: str) -> None:
    """Check the schemas and fake kernels of registered operators and, for the last case of each op, dynamic shapes."""
    with Record() as calls:
        run(spec.problem(case, device=DEVICE), backend=backend)
    assert len(calls) >= 2  # a forward operator and a backward operator
    for function, args in calls:
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        torch.library.opcheck(function, args, test_utils=DYNAMIC_TOO if case is spec.cases[-1] else SCHEMA_AND_FAKE)


@each_operator()
def test_compiles_without_graph_breaks(spec: OpSpec, backend: str) -> None:
    """Compile the forward and backward passes once, and run them with two sequence lengths."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda problem, *leaves: spec.function(*leaves, **problem.options, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for tokens, stance in ((37, "default"), (45, "fail_on_recompile")):
        case = spec.fit(Case("compiled", heads=1, tokens=tokens, packed=True))
        problem = spec.problem(case, device=DEVICE)
        leaves = [x.detach().requires_grad_(name in spec.differentiable) for name, x in problem.tensors.items()]
        with torch.compiler.set_stance(stance):
            out = compiled(problem, *leaves)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in leaves if x.requires_grad]
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(x.shape, generator=generator).to(DEVICE) for x in out]
        grads = torch.autograd.grad(out, wanted, cotangents)
        eager = problem.spec.function(*leaves, **problem.options, backend=backend)
        eager = eager if isinstance(eager, tuple) else (eager,)
        expected = torch.autograd.grad(eager, wanted, cotangents)
        for a, b in zip((*out, *grads), (*eager, *expected), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_exports(spec: OpSpec, backend: str) -> None:
    problem = spec.problem(spec.fit(Case("exported", heads=1)), device=DEVICE)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor):
            return spec.function(*tensors, **problem.options, backend=backend)

    args = tuple(problem.tensors.values())
    exported = torch.export.export(Module(), args).module()(*args)
    for a, b in zip(exported if isinstance(exported, tuple) else (exported,), problem(backend=backend), strict=True):
        torch.testing.assert_close(a, b)


@each_operator()
def test_checkpointing(spec: OpSpec, backend: str) -> None:
    """Gradients with activation checkpointing equal gradients without it."""
    problem = spec.problem(spec.fit(Case("checkpointed", heads=1)), device=DEVICE)
    leaves = [x.detach().requires_grad_(name in spec.differentiable) for name, x in problem.tensors.items()]

    def loss(*tensors: Tensor) -> Tensor:
        out = spec.function(*tensors, **problem.options, backend=backend)
        return sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))

    wanted = [x for x in leaves if x.requires_grad]
    direct = torch.autograd.grad(loss(*leaves), wanted)
    recomputed = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False), wanted)
    for a, b in zip(direct, recomputed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_unsupported_derivatives_raise(spec: OpSpec, backend: str) -> None:
    """Second derivatives, function transforms and gradients of direct operator calls raise an error."""
    problem = spec.problem(spec.fit(Case("refused", heads=1)), device=DEVICE)
    leaves = [x.detach().requires_grad_(name in spec.differentiable) for name, x in problem.tensors.items()]

    def first(*tensors: Tensor) -> Tensor:
        out = spec.function(*tensors, **problem.options, backend=backend)
        return out[0] if isinstance(out, tuple) else out

    (grad,) = torch.autograd.grad(first(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference' supports second derivatives"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.grad(lambda x: first(x, *leaves[1:]).sum())(leaves[0].detach())

    with Record() as calls:
        first(*leaves)
    function, args = calls[0]
    args = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in args]
    with pytest.raises(RuntimeError, match="has no gradient"):
        function(*args)
    with torch.no_grad():
        function(*args)
