"""Check the kernels at realistic sizes: against float64, in repeated calls, in a CUDA graph, and on two concurrent streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from vix_kernels.commands import DTYPES
from vix_kernels.measure.operators import Row, failed, ok, skipped
from vix_kernels.measure.timing import Spoiled, capture
from vix_kernels.testing import SPECS, Case, OpSpec, Problem, draw

from .part import Job, Plan, by_job

LARGE = (
    Case("packed", batch=2, heads=4, tokens=4096, width=64, features=256, packed=True),
    Case("masked_odd", batch=2, heads=3, tokens=1001, width=80, features=110, masked=True),
    Case("long", batch=1, heads=1, tokens=65536, width=32, features=64),
    Case("large_logits", batch=2, heads=4, tokens=4096, width=64, features=128, spread=16.0),
)
TINY = (Case("packed", batch=1, heads=1, tokens=20, features=9, packed=True),)
RAN = "every operator ran"
Check = Callable[[Problem], tuple[str, float]]  # returns an error message ("" if the check passes) and a number to report


@by_job
def rows(plan: Plan) -> Iterator[Job]:
    for check, spec, dtype, case in order(plan):
        what = dict(check=check.__name__, op=spec.name, case=case.name, dtype=dtype)
        yield Job(what, partial(run, plan, check, spec, dtype, case))


def order(plan: Plan) -> Iterator[tuple[Check, OpSpec, str, Case]]:
    """Yield (check, spec, dtype, case), the most important checks first."""
    for dtype in ("bf16",) if plan.dry else ("bf16", "fp32", "fp16"):
        for check in (against_float64, repeats, graph, streams) if dtype == "bf16" else (against_float64,):
            cases = (TINY if plan.dry else LARGE)[: None if check is against_float64 else 2]
            yield from ((check, spec, dtype, case) for spec, case in product(SPECS.values(), cases))


def run(plan: Plan, check: Check, spec: OpSpec, dtype: str, case: Case) -> Iterator[Row]:
    if plan.dry and check in (graph, streams):
        yield skipped("needs CUDA")
        return
    torch.manual_seed(0)
    # The tensors are drawn on the device, because drawing this many float64 numbers on the CPU takes seconds.
    problem = draw(spec, replace(spec.fit(case), learned=True), DTYPES[dtype], plan.device)
    try:
        wrong, figure = check(problem)
    except Spoiled as error:
        yield failed(error)
        raise
    yield failed(wrong, figure=figure) if wrong else ok(figure=figure)


def results(problem: Problem, **how: object) -> list[Tensor]:
    """Return the outputs, then the gradients for fixed cotangents. A cotangent is 0 where its output is -inf."""
    leaves = {name: x.detach().requires_grad_(name in problem.spec.differentiable) for name, x in problem.tensors.items()}
    problem = replace(problem, tensors=leaves)
    outputs = problem(**how)
    cotangents = []
    for at, out in enumerate(outputs):
        # The cotangents are not random, because CUDA graph capture forbids copying a generator's state to the device.
        wave = torch.arange(out.numel(), device=out.device, dtype=torch.float32).mul_(0.7).add_(at).sin_().view(out.shape)
        cotangents.append(wave.masked_fill_(out.detach() == float("-inf"), 0).to(out.dtype))
    return [*(out.detach() for out in outputs), *problem.gradients(outputs, cotangents)]


def against_float64(problem: Problem) -> tuple[str, float]:
    """Check the Triton results against a float64 reference.

    The error limit is twice the sum of the error of plain PyTorch in the input dtype and the rounding error of this dtype.
    Return an error message or "", and the largest ratio of an error to its limit. If the check fails, return the first ratio
    above 1 instead.
    """
    exact = results(problem.double(), reference=True)
    plain = results(problem, reference=True)
    ours = results(problem, backend="triton")
    rounding = max(torch.finfo(x.dtype).eps for x in problem.tensors.values())
    worst = 0.0
    for x, reference, truth in zip(ours, plain, exact, strict=True):
        x, reference, truth = (torch.where(y == float("-inf"), -1e3, y.double()) for y in (x, reference, truth))
        budget = 2 * ((reference - truth).norm() + rounding * truth.norm())
        fraction = ((x - truth).norm() / budget.clamp_min(1e-300)).item()
        if not fraction <= 1:
            return f"{fraction:.3g} of the error budget", fraction
        worst = max(worst, fraction)
    return "", worst


def repeats(problem: Problem) -> tuple[str, float]:
    """Check that repeated calls return bit-identical results.

    Return an error message or "", and the number of repeated calls whose results differ from those of the first call.
    """
    first = results(problem, backend="triton")
    repetitions = 10 if first[0].is_cuda else 1
    different = sum(not _equal(first, results(problem, backend="triton")) for _ in range(repetitions))
    return f"{different} of {repetitions} repetitions differ" if different else "", different


def graph(problem: Problem) -> tuple[str, float]:
    """Check that a CUDA graph, replayed on new inputs, returns the same bits as an eager call.

    Return an error message and 1 if the results differ, otherwise "" and 0.
    """

    def run() -> list[Tensor]:
        return results(problem, backend="triton")

    captured, replayed = capture(run)
    for x in problem.tensors.values():
        x.detach().mul_(0.75)
    captured.replay()
    torch.cuda.synchronize()
    same = _equal(replayed, run())
    return "" if same else "a replay differs from eager", float(not same)


def streams(problem: Problem) -> tuple[str, float]:
    """Check ten times that two calls on concurrent streams return the same results as two calls one after the other.

    Return an error message or "", and the number of failed checks.
    """
    other = problem.map(lambda x: x.detach() * 0.75)
    alone = [results(each, backend="triton") for each in (problem, other)]
    torch.cuda.synchronize()
    both = [torch.cuda.Stream(), torch.cuda.Stream()]
    different = 0
    for _ in range(10):
        together = []
        for stream, each in zip(both, (problem, other), strict=True):
            with torch.cuda.stream(stream):
                together.append(results(each, backend="triton"))
        torch.cuda.synchronize()
        different += not all(map(_equal, alone, together))
    return f"{different} of 10 differ" if different else "", different


def _equal(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(xs, ys, strict=True))


def smallest() -> None:
    """Run each operator once on a small problem, forward and backward. sanitizer.py runs this under compute-sanitizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for spec in SPECS.values():
        case = spec.fit(Case("small", batch=1, heads=1, tokens=37, width=24, features=20))
        results(spec.problem(case, dtype=torch.bfloat16, device=device), backend="triton")
    print(RAN)


if __name__ == "__main__":
    smallest()
