"""Run NVIDIA's compute-sanitizer on one small call to each operator, forward and backward."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial

from vix_kernels.measure.operators import Row, failed, ok, skipped

from .correctness import RAN
from .part import Job, Plan, by_job

TOOLS = {
    # Finds misaligned and out-of-bounds accesses. API errors are not reported, because torch causes some when it probes the
    # driver for optional features.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),  # finds races in shared memory
}
MISSING = "compute-sanitizer is not installed"
SMALL = (sys.executable, "-m", "bench.gpu.correctness")  # prints RAN at the end


@by_job
def rows(plan: Plan) -> Iterator[Job]:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if plan.dry or not program:
        yield Job(dict(check="small call of each operator"), partial(run_small, plan, "needs CUDA" if program else MISSING))
        return
    for tool in TOOLS:
        yield Job(dict(check=tool), partial(watch, program, tool, plan))


def watch(program: str, tool: str, plan: Plan) -> Iterator[Row]:
    # Without the caching allocator, each tensor is a separate allocation, so the tool knows the bounds of each tensor.
    # The option --kernel-name skips torch's kernels, which saves time. Some releases of the tool
    # reject the option. If the first run fails, the second run omits the option.
    for only_ours in (("--kernel-name", "kns=_kernel"), ()):
        command = (program, "--tool", tool, *TOOLS[tool], *only_ours, *SMALL)
        code, text = plan.finish(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if code is None or RAN in text:
            break
    errors = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if code is None:
        yield skipped("out of time")
    elif errors and RAN in text:
        yield ok() if errors[2] == "0" else failed(errors.string[errors.start() :])
    elif "not supported" in text:
        yield skipped("compute-sanitizer does not support this device")
    else:
        yield failed(_last_line(text))


def run_small(plan: Plan, why: str) -> Iterator[Row]:
    """Run the small calls without compute-sanitizer. Yield a skipped row with `why`, or a failed row if a call fails."""
    code, text = plan.finish(SMALL)
    yield skipped(why) if code == 0 else failed(_last_line(text))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]
