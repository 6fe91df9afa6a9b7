"""The environment of a measurement: the device and its peak rates, the package versions, and the commit of the checkout."""

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

ROOT = Path(__file__).resolve().parents[2]  # root of the checkout; an installed package has no checkout
PACKAGES = (
    "torch", "triton", "numpy", "performer-pytorch", "nystrom-attention", "linformer", "rotary-embedding-torch",
    "fla-core", "vision-xformer",
)  # fmt: skip


def device_name(device: str) -> str:
    """Return the name of the GPU, or the CPU model and the number of threads that torch uses."""
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
    """Return the platform, the versions of Python and of PACKAGES, and the number of CPU cores."""
    packages = {package: version_of(package) for package in PACKAGES}
    return dict(python=platform.python_version(), platform=platform.platform(), cores=os.cpu_count(), **packages)


def version_of(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def commit() -> str:
    """Return the commit of the checkout, with the suffix "-dirty" if files have changed, or "unknown" if git reports none."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):  # git is not installed or does not answer
        return "unknown"


def peaks(device: str) -> Device:
    """Return the published peak rates if the device is in GPUS, otherwise rates measured with copies and matrix products."""
    known = {gpu.device: gpu for gpu in GPUS}
    return known.get(device_name(device)) or _measured(device, torch.get_num_threads())


@functools.cache
def _measured(device: str, threads: int) -> Device:
    rates = {dtype: matrix_rate(device, dtype, 1024 if device == "cpu" else 8192) for dtype in ("bf16", "fp32")}
    bandwidth = copy_bandwidth(device, 2**26 if device == "cpu" else 2**30)
    name = device_name(device)
    # The TensorFloat32 rate is 0, so `Device.flops` uses the measured float32 rate.
    return Device(name, name, "", rates["bf16"], 0.0, rates["fp32"], bandwidth, math.inf)


def copy_bandwidth(device: str, elements: int) -> float:
    """Return the bandwidth in bytes/s of copying `elements` bfloat16 numbers, counting reads and writes."""
    source = torch.empty(elements, device=device, dtype=torch.bfloat16).normal_()
    return 2 * source.nbytes / (device_time(source.clone, device=device).median / 1e3)


def matrix_rate(device: str, dtype: str, size: int) -> float:
    """Return the FLOP/s of multiplying two random matrices of shape (size, size) with PyTorch."""
    a, b = (torch.empty(size, size, device=device, dtype=DTYPES[dtype]).normal_() for _ in range(2))
    return 2 * size**3 / (device_time(lambda: a @ b, device=device).median / 1e3)
