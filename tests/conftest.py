"""Tests run on the GPU where there is one, and through Triton's interpreter where there is none."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton; it holds for the life of the process
    if find_spec("triton"):
        import triton.language as tl
        from triton.runtime import interpreter

        # The interpreter patches triton.language again in every call of a device function, 2 ms each, although the
        # launch of the kernel around it has done so. Patch all of it once a launch: the tests run several times faster.
        patch_language, everything = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        patched = []

        def patch_once(fn):
            if patched:
                return interpreter._LangPatchScope()
            scope = patch_language(everything)
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
            patched.append(scope)
            return scope

        interpreter._patch_lang = patch_once


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
