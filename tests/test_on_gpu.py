"""bench/on_gpu.sh, as far as it goes without a GPU."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from bench.gpu import sanitizer, suite, timing
from bench.gpu.plan import Plan
from conftest import NO_TRITON
from vix_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
pytestmark = NO_TRITON


def on_gpu(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "on_gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def test_a_part_that_crashes_is_named_and_the_rest_completes(tmp_path: Path) -> None:
    done = on_gpu(tmp_path / "out", "--dry-run", "--break", "models", "--seconds", "1200")
    assert done.returncode == 16, done.stdout + done.stderr  # what --help says of models
    assert "FAILED: models" in done.stdout.splitlines()[-1]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "summary.md", "results.json", "timing.csv", "models.csv", "correctness.csv", "pictures.zip", "logs.zip",
    }  # fmt: skip

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    parts = {part["part"]: part for part in results["parts"]}
    assert list(parts) == ["compile", "correctness", "timing", "suite", "models", "training", "sanitizer"]
    assert parts["models"]["status"] == "failed" and "killed by SIGABRT" in parts["models"]["why"]
    assert len(parts["models"]["rows"]) == 1  # what it had before the crash
    for name in ("compile", "correctness", "timing", "suite", "training"):
        assert parts[name]["status"] == "ok", parts[name]
        assert any(row["status"] == "ok" for row in parts[name]["rows"])
    left_out = [row for part in parts.values() for row in part["rows"] if row["status"] == "skipped"]
    assert left_out and all(row["why"] for row in left_out)

    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| models | FAILED |" in summary and "graph performer_attention" in summary
    with (tmp_path / "out" / "timing.csv").open(newline="") as file:
        # Peers that are not installed have a row too: skipped, without a time.
        timed = [row for row in csv.DictReader(file) if row["op"] == "performer_attention" and row["status"] == "ok"]
    assert {row["direction"] for row in timed} == {"forward", "full", "backward"}
    assert {"triton", "torch", "reference", "compiled", "sdpa"} <= {row["provider"] for row in timed}
    ours = [row for row in timed if row["provider"] == "triton"]
    assert all(float(row["error"]) < 1e-4 for row in ours if row["direction"] != "backward")
    with zipfile.ZipFile(tmp_path / "out" / "pictures.zip") as pictures:
        assert {"performer_attention_fp32.png", "training_digits.png"} <= set(pictures.namelist())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(tmp_path: Path) -> None:
    done = on_gpu(tmp_path / "out")
    assert done.returncode == 201 and not (tmp_path / "out").exists()
    assert done.stdout.count("\n") == 1 and "nothing to measure here: torch sees no GPU" in done.stdout and not done.stderr


def test_an_unsupported_gpu_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for architecture, sentence in (
        ("sm_75", "the GPU is sm_75, the kernels need sm_80 (compute capability 8.0) or newer"),
        ("gfx1100", "the GPU is gfx1100, of AMD's the kernels serve gfx90a, gfx942, gfx950"),
    ):
        monkeypatch.setattr(backends, "gpu_architecture", lambda index, name=architecture: name)
        assert backends.reason_against_gpu() == sentence


def test_wrong_arguments_have_a_status_of_their_own(tmp_path: Path) -> None:
    done = on_gpu(tmp_path, "--only", "nothing")
    assert done.returncode == 200 and "invalid choice: 'nothing'" in done.stderr


def test_models_import_from_a_checkout_that_is_not_installed() -> None:
    code = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in repr(each).lower()]
from vix_kernels.models import create_model
print(type(create_model("vit", depth=1)).__module__)
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'bench' / 'gpu' / 'checkout'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert done.stdout.startswith("vix_kernels.models."), done.stderr


@pytest.mark.parametrize(
    "tool, status, why",
    [
        ('"$@"; echo "========= ERROR SUMMARY: 0 errors"', "ok", ""),
        ('"$@"; echo "========= ERROR SUMMARY: 2 errors"', "failed", "ERROR SUMMARY: 2 errors"),
        (
            '"$@"; echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"',
            "failed",
            "RACECHECK SUMMARY: 1",
        ),
        ('echo "========= Error: Device not supported"; exit 1', "skipped", "does not support this device"),
        ('echo "Segmentation fault"; exit 139', "failed", "Segmentation fault"),
    ],
)
def test_what_the_sanitizer_says(tmp_path: Path, monkeypatch, tool: str, status: str, why: str) -> None:
    """By stand-ins for it, one of which refuses the option that leaves torch's kernels out, as some releases do."""
    program = tmp_path / "compute-sanitizer"
    until_program = f'while [ "$1" != {sys.executable} ]; do [ "$1" != --kernel-name ] || exit 2; shift; done'
    program.write_text(f"#!/bin/bash\n{until_program}\n{tool}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sanitizer, "SMALL", (sys.executable, "-c", f"print('{sanitizer.RAN}')"))
    rows = list(sanitizer.rows(Plan(dry=False, deadline=time.monotonic() + 60)))
    assert [row["check"] for row in rows] == ["memcheck", "racecheck"]
    assert all(row["status"] == status and why in row["why"] for row in rows), rows


def test_outcomes_of_pytest_with_and_without_workers() -> None:
    text = """
tests/test_ops.py::test_a[triton-x] PASSED                    [ 10%]
[gw3] [ 20%] FAILED tests/test_ops.py::test_b[triton-y]
tests/test_ops.py::test_c SKIPPED (no triton)                 [ 30%]
tests/test_ops.py::test_d
FAILED tests/test_ops.py::test_b[triton-y] - AssertionError: dk: 2.0 > 1.0
"""
    expected = {"test_a[triton-x]": "PASSED", "test_b[triton-y]": "FAILED", "test_c": "SKIPPED"}
    assert dict(suite._outcomes(text)) == {f"tests/test_ops.py::{name}": outcome for name, outcome in expected.items()}


def test_what_comes_too_late_is_named() -> None:
    late = [row for row in timing.rows(Plan(dry=True, deadline=0.0)) if "figure" not in row]
    assert late and {(row["status"], row["why"]) for row in late} == {("skipped", "out of time")}
