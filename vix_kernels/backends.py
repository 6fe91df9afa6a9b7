"""Backend selection, and the reasons why a backend cannot run."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import conditions

BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_WIDTHS = (8, 256)
AMD_ARCHITECTURES = ("gfx90a", "gfx942", "gfx950")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def triton_installed() -> bool:
    return find_spec("triton") is not None


@cache  # Triton also reads TRITON_INTERPRET only once, when the kernels are defined
def interpreted() -> bool:
    """Return whether Triton's interpreter is enabled. It runs the kernels in NumPy, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def reasons_against_triton(device: torch.device, dtype: torch.dtype, width: int) -> list[str]:
    """Return the reasons why the Triton kernels do not support tensors on `device` with `dtype` and head width `width`.

    The list is empty if the kernels support them. If q and v have different widths, `width` is the larger of the two.
    """
    reasons = []
    if not triton_installed():
        reasons.append("triton is not installed")
    if device.type == "cpu" and not interpreted() and conditions.current.observer is None:
        reasons.append("the tensors are on the CPU (TRITON_INTERPRET=1 runs the kernels there, slowly, for tests)")
    elif device.type not in ("cpu", "cuda", "meta"):
        reasons.append(f"the kernels run on CUDA devices, not on {device.type!r}")
    elif device.type == "cuda":
        architecture = gpu_architecture(device.index or 0)
        if architecture.startswith("sm_") and int(architecture[3:]) < 80:
            reasons.append(f"the GPU is {architecture}, but the kernels need sm_80 (compute capability 8.0) or newer")
        elif architecture.startswith("gfx") and architecture not in AMD_ARCHITECTURES:
            reasons.append(f"the GPU is {architecture}, but the kernels support only {', '.join(AMD_ARCHITECTURES)}")
    if dtype not in TRITON_DTYPES and not (dtype == torch.float64 and interpreted()):
        names = ", ".join(str(each).removeprefix("torch.") for each in TRITON_DTYPES)
        reasons.append(f"the kernels support {names}, not {str(dtype).removeprefix('torch.')}")
    low, high = TRITON_WIDTHS
    if not low <= width <= high:
        reasons.append(f"the kernels support head widths {low} to {high}, not {width}")
    return reasons


def reason_against_gpu() -> str | None:
    """Return why the kernels cannot run on this machine's GPU, in one sentence, or None if they can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch sees no GPU" + ("" if built else f": torch {torch.__version__} is built without CUDA or ROCm")
    if reasons := reasons_against_triton(torch.device("cuda"), torch.bfloat16, 64):
        return "; ".join(reasons)
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:  # torch has no code for this GPU, the driver is outdated, or the memory is full
        return f"torch cannot use the GPU: {str(error).partition(chr(10))[0]}"
    return None


@cache
def gpu_architecture(index: int) -> str:
    """Return the architecture of a GPU, such as "sm_90" or "gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def is_current(device: torch.device) -> bool:
    """Return whether kernels for `device` can be launched without changing the current device. Always True for the CPU."""
    return device.index is None or device.index == torch.cuda.current_device()


def tf32_allowed() -> bool:
    """Return whether PyTorch allows TF32 in float32 matrix products.

    `torch.backends.cuda.matmul.allow_tf32` and `torch.set_float32_matmul_precision` change this setting.
    """
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


def check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def resolve(backend: str, x: Tensor, width: int) -> str:
    """Return the implementation to run for `x`: "triton", "torch" or "reference".

    "auto" selects Triton for GPU tensors that the kernels support, and PyTorch otherwise. Inside torch.jit.trace, it selects
    the reference, so that the trace runs without this library. An explicit choice is returned unchanged. Even with "triton", an
    operator that has no kernel for its inputs runs in PyTorch; see `has_kernel` in primitives/registry.py.

    Raises:
        ValueError: `backend` is unknown.
        RuntimeError: `backend` is "triton", but the kernels cannot run. The message lists every reason.
    """
    check(backend)
    if backend == "auto":
        if torch.jit.is_tracing():
            return "reference"
        return "triton" if x.device.type == "cuda" and not reasons_against_triton(x.device, x.dtype, width) else "torch"
    if backend == "triton" and (reasons := reasons_against_triton(x.device, x.dtype, width)):
        raise RuntimeError("backend='triton' cannot run here: " + "; ".join(reasons))
    return backend
