"""Tests run on the GPU where there is one, and through Triton's interpreter where there is none."""

import os
from importlib.util import find_spec

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton; it holds for the life of the process


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    if DEVICE == "cpu" and find_spec("triton"):
        from vix_kernels._triton.interpreter import patched_once_a_launch

        with patched_once_a_launch():
            yield
    else:
        yield


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN: an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
