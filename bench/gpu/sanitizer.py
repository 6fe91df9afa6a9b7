"""NVIDIA's compute-sanitizer over one small call of each operator, forward and backward."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from vix_kernels.measure.operators import Row, failed, ok, skipped

from .correctness import RAN
from .plan import Plan

TOOLS = {
    # Accesses out of bounds and misaligned; that torch probes the driver for what it may lack is no error.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),  # races in shared memory
}
SMALL = (sys.executable, "-m", "bench.gpu.correctness")  # prints RAN last


def rows(plan: Plan) -> Iterator[Row]:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if plan.dry or not program:
        # Without the tool the program that it would watch still has to run.
        code, text = _run(SMALL, plan)
        if code == 0:
            yield skipped("compute-sanitizer is not installed" if not program else "needs CUDA", check="memcheck")
        else:
            yield failed(_last_line(text), check="small call of each operator")
        return
    for tool, options in plan.jobs(TOOLS.items(), lambda job: job[0]):
        # Instrumenting torch's kernels too takes longer; releases of the tool differ in how they are told to leave them out.
        for only_ours in (("--kernel-name", "kns=_kernel"), ()):
            code, text = _run((program, "--tool", tool, *options, *only_ours, *SMALL), plan)
            if code is None or RAN in text:
                break
        errors = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+)", text)
        if code is None:
            yield skipped("out of time", check=tool)
        elif errors and RAN in text:
            yield ok(check=tool) if errors[2] == "0" else failed(errors.string[errors.start() :], check=tool)
        elif "not supported" in text:
            yield skipped("compute-sanitizer does not support this device", check=tool)
        else:
            yield failed(_last_line(text), check=tool)


def _run(command: tuple[str, ...], plan: Plan) -> tuple[int | None, str]:
    """Exit status and output; None where the time is up."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation with bounds of its own
    seconds = plan.deadline - time.monotonic()
    if seconds < 5:
        return None, ""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, ""
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout + done.stderr


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]
