"""Compile the kernels of the later parts into Triton's cache on all cores. Compiling them one by one would take minutes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product

from vix_kernels.commands import DTYPES
from vix_kernels.measure.operators import Row, failed, ok, skipped
from vix_kernels.measure.roofline import shapes
from vix_kernels.testing import SPECS, Case, draw

from . import correctness
from .part import Plan
from .timing import PRIMITIVES, TIMED

WORKERS = 12  # each has a separate context on the GPU


def rows(plan: Plan) -> Iterator[Row]:
    # Spawned, because CUDA cannot be used after a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1 if plan.dry else min(WORKERS, os.cpu_count() or 1), context) as pool:
        # Whole attentions start first, so most kernels of the primitives are already in the cache.
        running = {
            pool.submit(run, *each, plan.device): each for each in sorted(tasks(plan), key=lambda task: task[0] in PRIMITIVES)
        }
        for done in as_completed(running):
            op, dtype, case = running[done]
            what = dict(op=op, dtype=dtype, case=case.name, width=case.width)
            if plan.late:
                pool.shutdown(cancel_futures=True)
                yield skipped("out of time", **what)
                return
            error = done.exception()
            yield failed(error, **what) if error else ok(**what, seconds=done.result())


def tasks(plan: Plan) -> Iterator[tuple[str, str, Case]]:
    """Yield a call for each kernel specialization.

    Kernels are not specialized for the number of tokens, so one small batch is enough.
    """
    for check, spec, dtype, case in correctness.order(plan):
        if check is correctness.against_float64:
            yield spec.name, dtype, case
    narrow_and_wide = {shape.width: replace(shape, name="timing", batch=2, tokens=256) for shape in shapes()}
    for dtype, case, op in product(() if plan.dry else TIMED, narrow_and_wide.values(), SPECS):
        yield op, dtype, case


def run(op: str, dtype: str, case: Case, device: str) -> float:
    """Return the seconds of the first forward and backward. In timing cases, random features require no gradients."""
    start = time.perf_counter()
    case = replace(SPECS[op].fit(case), learned=case.name != "timing")
    problem = draw(SPECS[op], case, DTYPES[dtype], device)
    problem.gradients(problem(backend="triton"))
    return time.perf_counter() - start
