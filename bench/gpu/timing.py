"""Device and wall times of every operator, ours and others', and the ceilings of the machine they ran on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vix_kernels import primitives
from vix_kernels._triton.costs import draw
from vix_kernels.commands import DTYPES
from vix_kernels.roofline import shapes
from vix_kernels.testing import SPECS, Case, Problem
from vix_kernels.timing import device_time, wall_time

from . import peers
from .plan import Plan, Row, failed, ok, skipped

MOVES = tuple(op for op in SPECS if op in primitives.__all__)  # what the attentions are made of
OURS = ("triton", "torch")
TIMED = ("bf16", "fp32")
COMPILED_TOKENS = 4096  # torch.compile takes many seconds a shape
WALL_BELOW = 2.0  # milliseconds on the device: the host's overhead shows in short calls
TINY = Case("tiny", batch=1, heads=1, tokens=20, width=16, features=9)


def rows(plan: Plan) -> Iterator[Row]:
    yield from ceilings(plan)
    for name, (module, op, _) in peers.PEERS.items():
        if not peers.installed(module):
            yield skipped(f"{name} is not installed", op=op, provider=name)
    for op, dtype, case, provider in order(plan):
        what = dict(
            op=op, dtype=dtype, batch=case.batch, heads=case.heads, tokens=case.tokens, width=case.width,
            features=case.features, provider=provider, gpu="" if plan.dry else torch.cuda.get_device_name(),
        )  # fmt: skip
        if plan.late:
            yield skipped("out of time", **what)
            continue
        try:
            yield from (ok(**what, **figures) for figures in measure(op, case, dtype, provider, plan))
        except torch.OutOfMemoryError as error:
            yield skipped(error, **what)
        except Exception as error:
            yield failed(error, **what) if provider == "triton" else skipped(error, **what)
            plan.wait()  # an illegal access ends the part here, with its reason
        plan.free()


def order(plan: Plan) -> Iterator[tuple[str, str, Case, str]]:
    """(operator, dtype, case, provider), what matters most first: the time may not do for all of it."""
    whole = [op for op in SPECS if op not in MOVES]
    if plan.dry:
        for op in whole:
            yield from ((op, "fp32", SPECS[op].fit(TINY), provider) for provider in providers(op))
        yield whole[0], "fp32", SPECS[whole[0]].fit(TINY), "compiled"  # compiling is what takes long
        yield from ((op, "fp32", TINY, "triton") for op in MOVES)
        return
    for dtype in TIMED:
        for case in shapes():
            if dtype == "bf16" or case.tokens in (1024, 16384):
                for op in whole:
                    yield from ((op, dtype, SPECS[op].fit(case), provider) for provider in providers(op))
        for case in shapes():
            if dtype == "bf16":
                yield from ((op, dtype, case, "triton") for op in MOVES)
                if case.tokens == COMPILED_TOKENS and case.batch > 1:
                    yield from ((op, dtype, SPECS[op].fit(case), "compiled") for op in whole)


def providers(op: str) -> Iterator[str]:
    yield from (*OURS, "reference")
    yield from (name for name, (module, of, _) in peers.PEERS.items() if of == op and peers.installed(module))


def measure(op: str, case: Case, dtype: str, provider: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """Forward alone, forward and backward, and the difference: the backward."""
    problem = draw(SPECS[op], case, DTYPES[dtype], plan.device)
    function, leaves = call(problem, case, provider, plan)

    def forward() -> Any:
        with torch.no_grad():
            return function(*leaves)

    wanted = [x for x in leaves if x.requires_grad]
    outputs = forward()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [torch.randn_like(x) for x in outputs]

    def full() -> Any:
        return torch.autograd.grad(function(*leaves), wanted, cotangents)

    extra = {"against_reference": distance(outputs, problem)} if provider in OURS else {}
    del outputs
    times = {}
    for direction, timed in (("forward", forward), ("full", full)):
        times[direction] = time = device_time(timed, milliseconds=1 if plan.dry else 40)
        wall = wall_time(timed, calls=1 if plan.dry else 20) if time.median < WALL_BELOW or plan.dry else None
        yield dict(
            direction=direction, device_ms=time.median, low_ms=time.low, high_ms=time.high, method=time.method,
            wall_ms=wall, peak_mib=peak_mib(timed, plan), **extra,
        )  # fmt: skip
    yield dict(
        direction="backward", device_ms=times["full"].median - times["forward"].median, method=times["full"].method, **extra
    )


def call(problem: Problem, case: Case, provider: str, plan: Plan) -> peers.Call:
    """The function of `provider` and the tensors it takes."""
    if provider in peers.PEERS:
        return peers.PEERS[provider][2](problem, case)
    spec, leaves = problem.spec, list(problem.tensors.values())
    if provider in OURS:
        return lambda *tensors: spec.function(*tensors, **problem.options, backend=provider), leaves

    def reference(*tensors: Tensor) -> Any:
        return spec.reference(*tensors, **problem.options)

    if provider == "compiled":
        torch._dynamo.reset()
        # The dry run has no compiler to generate code with.
        return torch.compile(reference, dynamic=False, backend="aot_eager" if plan.dry else "inductor"), leaves
    return reference, leaves


def distance(outputs: tuple[Tensor, ...], problem: Problem) -> float | None:
    """Of the outputs from plain PyTorch's in the same precision, relative; None where those do not fit into memory."""
    try:
        with torch.no_grad():
            expected = problem(reference=True)
    except torch.OutOfMemoryError:
        return None
    pairs = zip(outputs, expected, strict=True)
    return max(((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in pairs)


def peak_mib(function: Callable[[], Any], plan: Plan) -> float | None:
    """Memory of the call beyond what was there before it."""
    if plan.dry:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(plan: Plan) -> Iterator[Row]:
    """What this machine reaches: copying memory, and a matrix product by torch's library, on random numbers."""
    size = 2**10 if plan.dry else 2**30
    source = torch.empty(size, device=plan.device, dtype=torch.bfloat16).normal_()
    seconds = device_time(source.clone).median / 1e3
    yield ok(op="copy", provider="torch", figure=2 * source.nbytes / seconds / 1e9, unit="GB/s, read and written")
    del source
    size = 64 if plan.dry else 8192
    for dtype, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.empty(size, size, device=plan.device, dtype=kind).normal_() for _ in range(2))
        seconds = device_time(lambda a=a, b=b: a @ b).median / 1e3
        yield ok(op="matmul", dtype=dtype, provider="torch", figure=2 * size**3 / seconds / 1e12, unit="TFLOP/s")
