"""What the numbers were taken on; stops a run where there is no GPU for the kernels."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import torch

from vix_kernels.backends import gpu_architecture, reason_against_gpu
from vix_kernels.bench.machine import facts
from vix_kernels.bench.measure import Row, ok, skipped

from .plan import Plan

LEAST_MEMORY = 8 * 2**30


def rows(plan: Plan) -> Iterator[Row]:
    if plan.dry:
        yield ok(gpu="none (dry run)", arch="interpreter", **facts())
        return
    if reason := reason_against_gpu():
        yield skipped(reason)
        return
    properties = torch.cuda.get_device_properties(0)
    if properties.total_memory < LEAST_MEMORY:
        yield skipped(f"the GPU has {properties.total_memory / 2**30:.1f} GiB, the benchmarks need {LEAST_MEMORY / 2**30:.0f}")
        return
    yield ok(
        gpu=properties.name,
        arch=gpu_architecture(0),
        memory_gib=round(properties.total_memory / 2**30, 1),
        multiprocessors=properties.multi_processor_count,
        cuda=torch.version.cuda or f"hip {torch.version.hip}",
        driver=_driver(),
        **facts(),
    )


def _driver() -> str:
    """Driver, and clocks at the time."""
    if not shutil.which("nvidia-smi"):
        return "unknown"
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    result = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    return result.stdout.strip().partition("\n")[0] or "unknown"
