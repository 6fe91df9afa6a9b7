"""Shared fixtures. Tests run on the GPU if there is one. Otherwise, kernels run in Triton's interpreter."""

import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
import torchvision_operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads this only once, when it is first imported
NO_TRITON = pytest.mark.skipif(not find_spec("triton"), reason="no triton")
BACKENDS = ["torch", pytest.param("triton", marks=NO_TRITON)]
MISMATCH = torchvision_operators.mismatch()
DECLARED = torchvision_operators.declare() if MISMATCH else None


def pytest_report_header() -> str | None:
    return MISMATCH and f"{MISMATCH}\ntests declare torchvision's operators without code, so that torchvision can be imported"


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    if DEVICE == "cpu" and find_spec("triton"):
        from vix_kernels.measure.interpreter import fast_interpreter

        with fast_interpreter():
            yield
    else:
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def poisoned():
    """Fill newly allocated memory with NaN, to reveal elements that a kernel does not write."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs `vix train` and returns the error. The function checks that the error is one line."""
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
