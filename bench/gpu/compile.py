"""Fill Triton's cache with the kernels that correctness.py and timing.py launch.

The kernels are compiled in parallel, because one CPU core would take minutes.
"""

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

WORKERS = 12  # maximum number of processes; each creates a CUDA context, which uses GPU memory


def rows(plan: Plan) -> Iterator[Row]:
    # The processes are spawned, because CUDA cannot be used after a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1 if plan.dry else min(WORKERS, os.cpu_count() or 1), context) as pool:
        # Primitives are compiled last. The other operators launch most of the same kernels, which are then already cached.
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
    """Yield (op, dtype, case) for calls that together compile the kernels of the correctness and timing parts.

    Kernels are not specialized for the number of tokens. The calls for the timing part therefore have small inputs.
    """
    for check, spec, dtype, case in correctness.order(plan):
        if check is correctness.against_float64:
            yield spec.name, dtype, case
    narrow_and_wide = {shape.width: replace(shape, name="timing", batch=2, tokens=256) for shape in shapes()}
    for dtype, case, op in product(() if plan.dry else TIMED, narrow_and_wide.values(), SPECS):
        yield op, dtype, case


def run(op: str, dtype: str, case: Case, device: str) -> float:
    """Run the forward and backward passes once, and return the time in seconds.

    Random features require gradients, unless the case is named "timing".
    """
    start = time.perf_counter()
    case = replace(SPECS[op].fit(case), learned=case.name != "timing")
    problem = draw(SPECS[op], case, DTYPES[dtype], device)
    problem.gradients(problem(backend="triton"))
    return time.perf_counter() - start
