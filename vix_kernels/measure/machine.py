"""What a figure was taken on: device, versions, commit; and what the device can reach."""

from __future__ import annotations

import functools
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..commands import DTYPES
from .roofline import GPUS, Device
from .timing import device_time

ROOT = Path(__file__).resolve().parents[2]  # of a checkout; an installed package has no commit
PACKAGES = (
    "torch", "triton", "numpy", "performer-pytorch", "nystrom-attention", "linformer", "rotary-embedding-torch",
    "fla-core", "vision-xformer",
)  # fmt: skip


def device_name(device: str) -> str:
    """The GPU, or the CPU's model and the threads that torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@functools.cache
def facts() -> dict[str, str | int | None]:
    """Versions and the machine around the device."""
    packages = {package: version_of(package) for package in PACKAGES}
    return dict(python=platform.python_version(), platform=platform.platform(), cores=os.cpu_count(), **packages)


def version_of(package: str) -> str:
    """Of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def commit() -> str:
    """Of the checkout, "-dirty" where files differ from it; "unknown" outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):  # no git, or a copy of the tree without its history
        return "unknown"


def peaks(device: str) -> Device:
    """Published peaks of a known GPU; of anything else what copies and matrix products reach here."""
    known = {gpu.device: gpu for gpu in GPUS}
    return known.get(device_name(device)) or _measured(device, torch.get_num_threads())


@functools.cache
def _measured(device: str, threads: int) -> Device:
    rates = {dtype: matrix_rate(device, dtype, 1024 if device == "cpu" else 8192) for dtype in ("bf16", "fp32")}
    bandwidth = copy_bandwidth(device, 2**26 if device == "cpu" else 2**30)
    name = device_name(device)
    # float32 as it is: no machine without published peaks is asked for its TensorFloat32 rate.
    return Device(name, name, "", rates["bf16"], 0.0, rates["fp32"], bandwidth, math.inf)


def copy_bandwidth(device: str, elements: int) -> float:
    """Bytes/s, read and written."""
    source = torch.empty(elements, device=device, dtype=torch.bfloat16).normal_()
    return 2 * source.nbytes / (device_time(source.clone, device=device).median / 1e3)


def matrix_rate(device: str, dtype: str, size: int) -> float:
    """FLOP/s of torch's matrix product, on random numbers."""
    a, b = (torch.empty(size, size, device=device, dtype=DTYPES[dtype]).normal_() for _ in range(2))
    return 2 * size**3 / (device_time(lambda: a @ b, device=device).median / 1e3)
