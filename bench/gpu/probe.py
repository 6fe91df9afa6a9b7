"""Probe the machine: hardware, software versions, missing packages, and whether a kernel runs at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import triton
import triton.language as tl

from vix_kernels.backends import gpu_architecture, reason_against_gpu
from vix_kernels.measure.machine import facts
from vix_kernels.measure.operators import Row, brief, ok, skipped

from .part import Plan

LEAST_MEMORY = 8 * 2**30
# Optional packages, and what is skipped if they are missing.
WANTED = {"pytest": "the test suite", "sklearn": "training on digits", "matplotlib": "the pictures"}


def rows(plan: Plan) -> Iterator[Row]:
    if reason := None if plan.dry else reason_against_gpu():
        yield skipped(reason)
        return
    try:
        launch(plan)
    except Exception as error:  # Triton, the C compiler and the driver raise many types of exceptions
        yield skipped(why_not_compiled(error))
        return
    lacking = ", ".join(f"{what} ({name} is not installed)" for name, what in WANTED.items() if not find_spec(name))
    if plan.dry:
        yield ok(gpu="none (dry run)", arch="interpreter", lacking=lacking, **facts())
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
        lacking=lacking,
        **facts(),
    )


@triton.jit
def double_kernel(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + at) * 2)


def launch(plan: Plan) -> None:
    """Run a tiny kernel and check the result. To build its launcher, Triton needs a C compiler and Python.h."""
    if plan.inject == "compiler":
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    x = torch.ones(32, device=plan.device)
    double_kernel[(1,)](x, SIZE=32)
    if plan.inject == "kernel" or x.tolist() != [2.0] * 32:
        raise RuntimeError("a kernel that doubles its input gave wrong numbers")


def why_not_compiled(error: Exception) -> str:
    """Return one sentence that says why the tiny kernel did not run."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if "C compiler" in str(error) or not compiler:
        return "Triton needs a C compiler for its launcher: install gcc or clang, or set CC"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"Triton needs Python.h for its launcher, and {header} does not exist: install Python's development files"
    return f"a tiny Triton kernel does not run: {brief(error)}"


def _driver() -> str:
    """Return the driver version, current and maximum SM clock, memory clock, power limit and temperature, or "unknown"."""
    if not shutil.which("nvidia-smi"):
        return "unknown"
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    result = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    return result.stdout.strip().partition("\n")[0] or "unknown"
