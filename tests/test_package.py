"""Tests of the package as a whole: imports, requirements and setup."""

from __future__ import annotations

import os
import pkgutil
import shutil
import statistics
import subprocess
import sys
from importlib import import_module
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torchvision_operators
from packaging.requirements import Requirement

import vix_kernels
from vix_kernels import models

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_neither_triton_nor_cuda() -> None:
    loaded = python(
        "import sys, vix_kernels, vix_kernels.models, torch\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'triton'], torch.cuda.is_initialized())"
    )
    assert loaded.strip() == "[] False"


def test_import_is_fast_compared_with_torch() -> None:
    """Importing the package takes less than a tenth of the CPU time of `import torch`."""
    code = (
        "import time; start = time.process_time(); import torch; middle = time.process_time()\n"
        "import vix_kernels; print((time.process_time() - middle) / (middle - start))"
    )
    assert statistics.median(float(python(code)) for _ in range(5)) < 0.1


def test_public_names() -> None:
    assert all(hasattr(vix_kernels, name) for name in vix_kernels.__all__)
    assert vix_kernels.__version__.count(".") == 2


def test_no_model_function_hides_a_module_of_the_same_name() -> None:
    for name in [info.name for info in pkgutil.iter_modules(models.__path__)]:
        if name != "hub" or find_spec("huggingface_hub"):
            module = import_module(f"vix_kernels.models.{name}")
            assert getattr(models, name) is module


def test_check_prints_every_reason(capsys) -> None:
    from vix_kernels.__main__ import main

    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "performer_attention" in out and "apply_rope" in out
    assert main(["check", "--width", "300"]) == 0
    assert "not triton: the kernels support head widths 8 to 256, not 300" in capsys.readouterr().out


def test_the_trainer_requires_neither_timm_nor_torchvision() -> None:
    """timm imports torchvision, and a matching torchvision is hard to find if PyTorch was not installed from PyPI."""
    found, open_requirements = set(), [Requirement("vix_kernels[train]")]
    while open_requirements:
        requirement = open_requirements.pop()
        for line in requires(requirement.name) or ():
            each = Requirement(line)
            wanted = each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in {"", *requirement.extras})
            if wanted and each.name not in found:
                found.add(each.name)
                open_requirements.append(each)
    assert {"torch", "scikit-learn", "scipy"} <= found and not {"timm", "torchvision"} & found


@pytest.mark.skipif(sys.platform != "linux" or not find_spec("torchvision"), reason="needs Linux and torchvision")
@pytest.mark.parametrize("matches", [True, False])
def test_a_torchvision_that_does_not_match_is_reported(matches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> None:
        assert path.name.startswith("_C") and path.is_file()
        if not matches:
            raise OSError("libtorch_cuda.so: cannot open shared object file")

    monkeypatch.setattr("torch.ops.load_library", load)
    line = torchvision_operators.mismatch()
    if matches:
        assert line is None
    else:
        assert line.startswith(f"torchvision {version('torchvision')} does not match torch") and "\n" not in line


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_reports_a_torchvision_that_does_not_match(tmp_path: Path) -> None:
    """Check that the setup ends with the torchvision check. The commands are printed but not run."""
    command = ["make", "--dry-run", "--no-print-directory", f"VENV={tmp_path}", f"{tmp_path}/.ready"]
    # Without the variables that `make test` sets, the nested `make` does not print the folders that it enters and leaves.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()
    assert lines[-2:] == [f"{tmp_path}/bin/python tests/torchvision_operators.py", f"touch {tmp_path}/.ready"]


def test_a_closed_pipe_prints_no_error() -> None:
    code = "import sys; from vix_kernels.__main__ import main; sys.exit(main(['models']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_words_after_two_hyphens_are_positional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vix_kernels.__main__ import main

    monkeypatch.chdir(tmp_path)
    for argv, message in (
        (["train", "--", "--epochs", "1"], "vix train: error: unrecognized arguments: "),
        (["predict", "--", "--checkpoint", "run"], "vix predict: error: the following arguments are required: --checkpoint"),
        (["dev", "host-time", "--", "--rounds"], "vix dev host-time: error: argument OP: expected one of "),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and capsys.readouterr().err.startswith(message)
