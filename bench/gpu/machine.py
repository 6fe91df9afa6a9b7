"""What the numbers were taken on; stops a run where there is no GPU for the kernels."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vix_kernels.backends import gpu_architecture, reason_against_gpu

from .plan import Plan, Row, ok, skipped

LEAST_MEMORY = 8 * 2**30
PACKAGES = ("torch", "triton", "numpy", "performer-pytorch", "nystrom-attention", "linformer", "rotary-embedding-torch")


def rows(plan: Plan) -> Iterator[Row]:
    facts: dict[str, Any] = dict(python=platform.python_version(), platform=platform.platform(), cores=os.cpu_count())
    facts |= {package: _version(package) for package in PACKAGES}
    if plan.dry:
        yield ok(gpu="none (dry run)", arch="interpreter", **facts)
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
        **facts,
    )


def _driver() -> str:
    """Driver, and clocks at the time."""
    if not shutil.which("nvidia-smi"):
        return "unknown"
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    result = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    return result.stdout.strip().partition("\n")[0] or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
