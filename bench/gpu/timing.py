"""Measure the device and wall times of every operator, and the machine's peak memory bandwidth and FLOP/s.

Primitives (vix_kernels.primitives) are measured only with Triton. All other operators are measured with all providers (see
vix_kernels/measure/providers.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from vix_kernels import primitives
from vix_kernels.measure import providers
from vix_kernels.measure.machine import copy_bandwidth, matrix_rate
from vix_kernels.measure.operators import Effort, Row, measure, ok, sizes
from vix_kernels.measure.roofline import shapes
from vix_kernels.testing import SPECS, Case

from .part import Job, Plan, by_job

PRIMITIVES = tuple(op for op in SPECS if op in primitives.__all__)
TIMED = ("bf16", "fp32")
COMPILED_TOKENS = 4096  # compiled PyTorch is timed only at this length, because torch.compile takes many seconds per shape
TINY = Case("tiny", batch=1, heads=1, tokens=20, width=16, features=9)


@by_job
def rows(plan: Plan) -> Iterator[Job]:
    effort = Effort(rounds=1, memory=False) if plan.dry else Effort(milliseconds=25)
    if plan.dry:
        providers.COMPILER = "aot_eager"  # a machine without a GPU may have no C++ compiler
    yield Job(dict(op="ceilings"), partial(ceilings, plan))
    for op, dtype, case, names in order(plan):
        what = sizes(op, SPECS[op].fit(case), dtype, plan.device) | dict(provider=" ".join(names))
        how = dict(effort=effort, late=lambda: plan.late)
        yield Job(what, partial(rows_of, op, case, dtype, names, plan.device, **how))


def rows_of(*args: Any, **how: Any) -> list[Row]:
    return [result.row for result in measure(*args, **how)]


def order(plan: Plan) -> Iterator[tuple[str, str, Case, tuple[str, ...]]]:
    """Yield (operator, dtype, case, providers), the most important measurements first, because time may run out."""
    whole = [op for op in SPECS if op not in PRIMITIVES]
    if plan.dry:
        yield from ((op, "fp32", TINY, everyone(op)) for op in whole)
        yield whole[0], "fp32", TINY, ("compiled",)  # only one operator, because compilation is slow
        yield from ((op, "fp32", TINY, ("triton",)) for op in PRIMITIVES)
        return
    for dtype in TIMED:
        for case in shapes():
            if dtype == "bf16" or case.tokens in (1024, 16384):
                yield from ((op, dtype, case, everyone(op)) for op in whole)
        for case in shapes():
            if dtype == "bf16":
                yield from ((op, dtype, case, ("triton",)) for op in PRIMITIVES)
                if case.tokens == COMPILED_TOKENS and case.batch > 1:
                    yield from ((op, dtype, case, ("compiled",)) for op in whole)


def everyone(op: str) -> tuple[str, ...]:
    return tuple(name for name in providers.providers(op, "cuda") if name != "compiled")


def ceilings(plan: Plan) -> Iterator[Row]:
    """Yield rows with the peak memory bandwidth, measured with copies, and the peak FLOP/s, measured with matmuls."""
    bandwidth = copy_bandwidth(plan.device, 2**10 if plan.dry else 2**30)
    yield ok(op="copy", provider="torch", figure=bandwidth / 1e9, unit="GB/s, read and written")
    for dtype in ("bf16", "fp32"):
        rate = matrix_rate(plan.device, dtype, 64 if plan.dry else 8192)
        yield ok(op="matmul", dtype=dtype, provider="torch", figure=rate / 1e12, unit="TFLOP/s")
