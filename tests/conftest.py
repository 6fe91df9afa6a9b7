"""Tests run on the GPU where there is one, and through Triton's interpreter where there is none."""

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torchvision_operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton; it holds for the life of the process
NO_TRITON = pytest.mark.skipif(not find_spec("triton"), reason="no triton")
BACKENDS = ["torch", pytest.param("triton", marks=NO_TRITON)]
MISMATCH = torchvision_operators.mismatch()
DECLARED = torchvision_operators.declare() if MISMATCH else None


def pytest_report_header() -> str | None:
    return MISMATCH and f"{MISMATCH}\nin the tests it can: torchvision's operators are declared without an implementation"


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    if DEVICE == "cpu" and find_spec("triton"):
        from vix_kernels.measure.interpreter import hastened

        with hastened():
            yield
    else:
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN: an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `vix train`, which must refuse in one line; returns that line."""
    from vix_kernels.__main__ import main

    def refused(*argv: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["train", *map(str, argv)])
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.out == ""
        assert captured.err.startswith("vix train: error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return refused
