"""The kernels at sizes worth timing: against float64, repeated, captured in a CUDA graph, on two streams at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vix_kernels.roofline import case_for
from vix_kernels.testing import SPECS, Case, OpSpec, Problem

from .plan import Plan, Row, failed, ok, skipped

LARGE = (
    Case("packed", batch=2, heads=4, tokens=4096, width=64, features=256, packed=True),
    Case("masked_odd", batch=2, heads=3, tokens=1001, width=80, features=110, masked=True),
    Case("long", batch=1, heads=1, tokens=65536, width=32, features=64),
)
TINY = (Case("packed", batch=1, heads=1, tokens=20, features=9, packed=True),)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rows(plan: Plan) -> Iterator[Row]:
    for check in (against_float64, repeats, graph, streams):
        for spec in SPECS.values():
            for dtype in DTYPES if check is against_float64 and not plan.dry else ("bf16",):
                for case in TINY if plan.dry else LARGE if check is against_float64 else LARGE[:2]:
                    what = dict(check=check.__name__, op=spec.name, case=case.name, dtype=dtype)
                    if check in (graph, streams) and plan.dry:
                        yield skipped("needs CUDA", **what)
                        continue
                    if plan.late:
                        yield skipped("out of time", **what)
                        continue
                    if case.masked and spec.name == "apply_rope":  # it has no mask
                        continue
                    try:
                        problem = spec.problem(case_for(spec.name, case), dtype=DTYPES[dtype], device=plan.device)
                        wrong, figure = check(spec, problem)
                    except Exception as error:
                        yield failed(error, **what)
                        _stop_if_broken(plan)
                    else:
                        yield failed(wrong, **what, figure=figure) if wrong else ok(**what, figure=figure)


def results(problem: Problem, **how: object) -> list[Tensor]:
    """Outputs, then gradients for cotangents that depend on nothing but their shape."""
    leaves = {name: x.detach().requires_grad_(name in problem.spec.differentiable) for name, x in problem.tensors.items()}
    outputs = Problem(problem.spec, leaves, problem.options)(**how)
    wanted = [x for x in leaves.values() if x.requires_grad]
    cotangents = []
    for at, out in enumerate(outputs):
        # Not drawn: a capture forbids a generator's copy to the device.
        wave = torch.arange(out.numel(), device=out.device, dtype=torch.float32).mul_(0.7).add_(at).sin_().view(out.shape)
        cotangents.append(torch.where(out.detach() == float("-inf"), 0.0, wave).to(out.dtype))
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, wanted, cotangents)]


def against_float64(spec: OpSpec, problem: Problem) -> tuple[str, float]:
    """At most twice the error of plain PyTorch in the same precision; the figure is the largest share of that budget."""
    exact = results(problem.double(), reference=True)
    plain = results(problem, reference=True)
    ours = results(problem, backend="triton")
    dtype = next(iter(problem.tensors[name] for name in ("q", "k") if name in problem.tensors)).dtype
    worst = 0.0
    for x, reference, truth in zip(ours, plain, exact, strict=True):
        x, reference, truth = (torch.where(y == float("-inf"), -1e3, y.double()) for y in (x, reference, truth))
        budget = 2 * ((reference - truth).norm() + torch.finfo(dtype).eps * truth.norm())
        share = ((x - truth).norm() / budget.clamp_min(1e-300)).item()
        if not share <= 1:
            return f"{share:.3g} of the error budget", share
        worst = max(worst, share)
    return "", worst


def repeats(spec: OpSpec, problem: Problem) -> tuple[str, float]:
    """The same bits ten times; the figure counts runs that differ."""
    first = results(problem, backend="triton")
    different = sum(not _equal(first, results(problem, backend="triton")) for _ in range(9))
    return f"{different} of 9 repetitions differ" if different else "", different


def graph(spec: OpSpec, problem: Problem) -> tuple[str, float]:
    """Forward and backward captured on some inputs and replayed on others equal eager, to the bit."""

    def run() -> list[Tensor]:
        return results(problem, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        replayed = run()
    for x in problem.tensors.values():
        x.mul_(0.75)
    captured.replay()
    torch.cuda.synchronize()
    same = _equal(replayed, run())
    return "" if same else "a replay differs from eager", float(not same)


def streams(spec: OpSpec, problem: Problem) -> tuple[str, float]:
    """Two streams at once give what each gives alone, ten times."""
    other = problem.map(lambda x: x * 0.75)
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


def _stop_if_broken(plan: Plan) -> None:
    """After an illegal access every later call fails too: end the part with the reason."""
    wait: Callable[[], None] = (lambda: None) if plan.dry else torch.cuda.synchronize
    wait()


def smallest() -> None:
    """Each operator once, forward and backward, on a small problem: for a memory checker, which is slow."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for spec in SPECS.values():
        case = case_for(spec.name, Case("small", batch=1, heads=1, tokens=37, width=24, features=20))
        results(spec.problem(case, dtype=torch.bfloat16, device=device), backend="triton")
    print("every operator ran")


if __name__ == "__main__":
    smallest()
