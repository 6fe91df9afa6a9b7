"""What the package does before anybody calls it."""

from __future__ import annotations

import pkgutil
import statistics
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import vix_kernels
from vix_kernels import models


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_loads_neither_triton_nor_cuda() -> None:
    loaded = python(
        "import sys, vix_kernels, vix_kernels.models, torch\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'triton'], torch.cuda.is_initialized())"
    )
    assert loaded.strip() == "[] False"


def test_import_costs_little_beside_torch() -> None:
    """At most a tenth of the CPU time of `import torch`."""
    code = (
        "import time; start = time.process_time(); import torch; middle = time.process_time()\n"
        "import vix_kernels; print((time.process_time() - middle) / (middle - start))"
    )
    assert statistics.median(float(python(code)) for _ in range(5)) < 0.1


def test_public_names() -> None:
    assert all(hasattr(vix_kernels, name) for name in vix_kernels.__all__)
    assert vix_kernels.__version__.count(".") == 2


def test_no_model_hides_a_module_of_its_name() -> None:
    for name in [info.name for info in pkgutil.iter_modules(models.__path__)]:
        if name != "hub" or find_spec("huggingface_hub"):
            module = import_module(f"vix_kernels.models.{name}")
            assert getattr(models, name) is module


def test_check_names_every_reason(capsys) -> None:
    from vix_kernels.__main__ import main

    assert main(["check"]) == 0
    out = capsys.readouterr().out
    assert "performer_attention" in out and "apply_rope" in out
    assert main(["check", "--width", "300"]) == 0
    assert "not triton: the kernels serve head widths 8 to 256, not 300" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "import sys; from vix_kernels.__main__ import main; sys.exit(main(['models']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
