"""Tests of bench/on_gpu.sh that run without a GPU.

The script is divided into parts, such as timing. Each part consists of measurements or checks, called jobs.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench.gpu import correctness, part, probe, report, run, sanitizer, suite, timing
from bench.gpu.part import Plan
from conftest import NO_TRITON
from vix_kernels import backends
from vix_kernels.measure import timing as times
from vix_kernels.testing import OpSpec

ROOT = Path(__file__).resolve().parents[1]
pytestmark = NO_TRITON


def on_gpu(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=1200)


def command(*arguments: str | Path) -> list[str]:
    return ["bash", str(ROOT / "bench" / "on_gpu.sh"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHON": sys.executable}


def parts(out: Path) -> dict[str, dict]:
    return {part["part"]: part for part in json.loads((out / "results.json").read_text())["parts"]}


def test_a_crashed_job_loses_no_other_results(tmp_path: Path) -> None:
    """If CUDA graph capture fails, the times are measured without a graph. A crash is reported, and the other jobs complete."""
    out = tmp_path / "out"
    done = on_gpu(out, "--dry-run", "--only", "timing", "tune", "models", "--inject", "timing=capture", "models=crash")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"wrote {out}/summary.md; FAILED: models"
    assert {path.name for path in out.iterdir()} == {
        "summary.md", "results.json", "timing.csv", "models.csv", "tune.csv", "pictures.zip", "logs.zip",
    }  # fmt: skip

    found = parts(out)
    assert list(found) == ["timing", "tune", "models"]
    assert found["timing"]["status"] == found["tune"]["status"] == "ok", found
    (crashed,) = (row for row in found["models"]["rows"] if row["status"] == "failed")
    assert "killed by SIGABRT" in crashed["why"] and crashed["job"].startswith("vil ours bf16 2")
    survived = {row["model"] for row in found["models"]["rows"] if row["status"] == "ok"}
    assert {"vit", "vip", "hybrid_fnet", "fnet_2d"} <= survived and "vil" not in survived  # jobs before and after the crash
    (tuned,) = found["tune"]["rows"]
    assert tuned["kernel"] == "aggregate_forward" and tuned["tried"] > 0

    summary = (out / "summary.md").read_text()
    assert summary in done.stdout and "| models | FAILED |" in summary and "## Tuning" in summary
    with (out / "timing.csv").open(newline="") as file:
        # Packages that are not installed also have a row, with the status "skipped" and without a time.
        timed = [row for row in csv.DictReader(file) if row["op"] == "performer_attention" and row["status"] == "ok"]
    assert {row["direction"] for row in timed} == {"forward", "full", "backward"}
    assert {"triton", "torch", "reference", "compiled", "sdpa"} <= {row["provider"] for row in timed}
    triton_rows = [row for row in timed if row["provider"] == "triton"]
    assert all(float(row["error"]) < 1e-4 for row in triton_rows if row["direction"] != "backward")
    with zipfile.ZipFile(out / "pictures.zip") as pictures:
        assert "performer_attention_fp32.png" in pictures.namelist()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_keeps_its_results(tmp_path: Path, number: int) -> None:
    """Kill the run while the second job of a part hangs. The output folder already contains the rows of the first job."""
    out = tmp_path / "out"
    arguments = ("--dry-run", "--only", "models", "training", "--inject", "models=hang")
    with subprocess.Popen(command(out, *arguments), env=environment(), stdout=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not ((out / "results.json").exists() and parts(out)["models"]["rows"]):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        process.send_signal(number)
        text = process.stdout.read()
        assert process.wait() == (1 if number == signal.SIGTERM else -number)
    assert list(parts(out)) == ["models"]  # the next part does not start
    assert {row["model"] for row in parts(out)["models"]["rows"]} == {"vit"}
    assert "| models | FAILED |" in (out / "summary.md").read_text()
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM" in text and text.splitlines()[-1].endswith("FAILED: models")


def test_a_part_that_hangs_is_stopped_and_the_next_one_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "GRACE", 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(run, "PARTS", {"models": 25, "tune": 200})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run.main([str(tmp_path), "--dry-run", "--seconds", "225", "--inject", "models=hang"]) == 1
    found = parts(tmp_path)
    assert found["models"]["status"] == "failed" and found["models"]["why"].startswith("stopped at the end of its time")
    assert [row["model"] for row in found["models"]["rows"]][:1] == ["vit"]
    assert found["tune"]["status"] == "ok", found["tune"]
    assert capsys.readouterr().out.endswith("FAILED: models\n")


def test_without_time_all_parts_are_reported_as_skipped(tmp_path: Path) -> None:
    done = on_gpu(tmp_path, "--dry-run", "--seconds", "1")
    assert done.returncode == 0, done.stderr
    assert {(each["status"], each["why"]) for each in parts(tmp_path).values()} == {("skipped", "out of time")}
    assert list(parts(tmp_path)) == list(run.PARTS) and "| timing | skipped |" in done.stdout


def test_tuning_has_its_time_reserved() -> None:
    """Tuning gets at least 60 seconds, even if all earlier parts reach their time limits."""
    parts = list(run.PARTS)
    before, deadline = parts[: parts.index("tune")], float(run.TOTAL)
    for at, name in enumerate(before):  # each part uses its full share and its full grace period
        deadline -= deadline * run.PARTS[name] / sum(run.PARTS[each] for each in parts[at:]) + run.GRACE
    assert deadline * run.PARTS["tune"] / sum(run.PARTS[each] for each in parts[parts.index("tune") :]) >= 60
    assert run.TOTAL + len(parts) * run.GRACE <= 600  # some hosts limit a run to ten minutes


class TestRestart:
    """Tests that `run` restarts the process of a part after a failure. The processes are simulated."""

    @staticmethod
    def play(tmp_path: Path, monkeypatch, script: list[tuple[list, int | None]]) -> tuple[run.Outcome, list[tuple[int, bool]]]:
        """Run a part whose simulated processes write the given records and exit with the given codes.

        Returns:
            The outcome of the part, and the values of (plan.first, plan.eager) for each process that was started.
        """
        started = []

        def process(part: str, plan: Plan, log: Path, receive: Callable, look: Callable) -> int | None:
            started.append((plan.first, plan.eager))
            records, code = script[len(started) - 1]
            for each in records:
                receive(each)
            log.write_text("its last words\n")
            return code

        monkeypatch.setattr(run, "process", process)
        (tmp_path / "logs").mkdir()
        return run.run("timing", 100, tmp_path, dry=True), started

    ROW = dict(status="ok", why="")

    def test_a_spoiled_process_repeats_its_job_without_a_graph(self, tmp_path: Path, monkeypatch) -> None:
        script = [
            ([(0, "a"), self.ROW, (1, "b")], part.SPOILED),
            ([(1, "b"), self.ROW, (2, "c"), self.ROW], 0),
        ]
        outcome, started = self.play(tmp_path, monkeypatch, script)
        assert started == [(0, False), (1, True)]
        assert outcome.status == "ok" and outcome.count("ok") == 3

    def test_a_job_that_spoils_two_processes_fails(self, tmp_path: Path, monkeypatch) -> None:
        script = [([(0, "a")], part.SPOILED), ([(0, "a")], part.SPOILED), ([(1, "b"), self.ROW], 0)]
        outcome, started = self.play(tmp_path, monkeypatch, script)
        assert started == [(0, False), (0, True), (1, False)]
        assert outcome.status == "failed" and [(row["status"], row.get("job")) for row in outcome.rows] == [
            ("failed", "a"), ("ok", None),
        ]  # fmt: skip

    def test_a_crash_after_a_row_keeps_the_row(self, tmp_path: Path, monkeypatch) -> None:
        script = [([(0, "a"), self.ROW], -11), ([(1, "b"), self.ROW], 0)]
        outcome, started = self.play(tmp_path, monkeypatch, script)
        assert started == [(0, False), (1, False)]
        assert [row["status"] for row in outcome.rows] == ["ok", "failed", "ok"]
        assert "killed by SIGSEGV" in outcome.rows[1]["why"]

    def test_repeated_failures_end_a_part_early(self, tmp_path: Path, monkeypatch) -> None:
        script = [([(number, str(number))], 1) for number in range(9)]
        outcome, started = self.play(tmp_path, monkeypatch, script)
        assert len(started) == run.BARREN and outcome.status == "failed" and "its last words" in outcome.why

    def test_a_process_that_fails_before_its_first_job_is_not_restarted(self, tmp_path: Path, monkeypatch) -> None:
        outcome, started = self.play(tmp_path, monkeypatch, [([], 1)])
        assert len(started) == 1 and outcome.why == "exit status 1: its last words"


class FakeCapture:
    """Simulates a failed graph capture in torch 2.11. Later allocations still use the memory pool of this capture."""

    def __init__(self, monkeypatch, recovers: bool = True) -> None:
        self.calls: list[str] = []
        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        no_op = contextmanager(lambda *args, **kwargs: (yield))

        def empty_cache(*args: object) -> None:
            if "end" not in self.calls or not recovers:
                raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

        @contextmanager
        def graph(*args: object, **kwargs: object):
            yield
            raise RuntimeError("operation failed due to a previous error during capture")

        replacements = dict(
            current_stream=stream, Stream=stream, stream=no_op, CUDAGraph=object, graph=graph, synchronize=lambda: None,
            graph_pool_handle=lambda: (0, 1), current_device=lambda: 0, empty_cache=empty_cache,
            default_generators=[type("Generator", (), {"graphsafe_set_state": lambda self, state: self})()],
        )  # fmt: skip
        for name, value in replacements.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *args: self.calls.append("end"), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *args: self.calls.append("release"), raising=False)
        monkeypatch.setattr(torch, "Generator", lambda device: type("G", (), {"graphsafe_get_state": lambda self: 0})())
        monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: type("X", (), {"item": lambda self: 0.5})())


def test_a_failed_capture_ends_its_allocations(monkeypatch) -> None:
    fake = FakeCapture(monkeypatch)
    assert times.captured(lambda: None) is None
    assert fake.calls == ["end", "release"]


def test_a_capture_that_spoils_its_process_raises_spoiled(monkeypatch) -> None:
    FakeCapture(monkeypatch, recovers=False)
    with pytest.raises(times.Spoiled, match="unusable after a failed capture: captures_underway"):
        times.captured(lambda: None)


def test_correctness_draws_inputs_on_the_device(monkeypatch) -> None:
    """The correctness checks must not call `spec.problem`, which draws float64 numbers on the CPU."""
    monkeypatch.setattr(OpSpec, "problem", lambda *args, **kwargs: pytest.fail("drawn on the CPU"))
    first = next(correctness.rows(Plan(dry=True, deadline=time.monotonic() + 60)))
    assert first["check"] == "against_float64" and first["status"] == "ok", first


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_sentence_is_printed(tmp_path: Path) -> None:
    done = on_gpu(tmp_path / "out")
    assert done.returncode == 201 and not (tmp_path / "out").exists()
    assert done.stdout.count("\n") == 1 and "nothing to measure here: torch sees no GPU" in done.stdout and not done.stderr


def test_a_failed_probe_gives_its_reason_in_one_line(tmp_path: Path, monkeypatch) -> None:
    def probed(inject: str) -> dict:
        (row,) = probe.rows(Plan(dry=True, deadline=0.0, inject=inject))
        return row

    assert probed("")["status"] == "ok"
    assert probed("compiler")["why"] == "Triton needs a C compiler for its launcher: install gcc or clang, or set CC"
    assert probed("kernel")["why"].endswith("RuntimeError: a kernel that doubles its input gave wrong numbers")
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(probe.sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"Triton needs Python.h for its launcher, and {tmp_path}/Python.h does not exist" in probed("kernel")["why"]
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    assert probed("")["lacking"].startswith("the test suite (pytest is not installed), training on digits (sklearn is not")
    done = on_gpu(tmp_path / "out", "--dry-run", "--inject", "probe=compiler")
    assert done.returncode == 201 and done.stdout.count("\n") == 1 and "install gcc or clang" in done.stdout


def test_missing_packages_are_named_in_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # this Python cannot import from site-packages
    python.chmod(0o755)
    done = subprocess.run(command(tmp_path / "out"), env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == 201 and not done.stderr
    assert f"{python} lacks torch, triton, numpy, einops (set PYTHON to use a different interpreter)" in done.stdout


def test_results_do_not_need_a_plotting_library(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    row = dict(op="x", dtype="bf16", batch=1, tokens=4, width=16, direction="forward", provider="triton", device_ms=1.0)
    outcomes = [report.Outcome("timing", "ok", "", 1.0, [row | dict(status="ok", why="")])]
    (tmp_path / "logs").mkdir()
    for name in ("long.txt", "long.png"):
        (tmp_path / "logs" / name).write_bytes(b"x" * (3 * report.KEPT))
    out = tmp_path / "out"
    out.mkdir()
    assert "| x | bf16 |" in report.write(out, dict(gpu="none"), outcomes, tmp_path)
    assert "pictures.zip: ModuleNotFoundError" in report.write_pictures(out, outcomes, tmp_path)
    assert {path.name for path in out.iterdir()} == {"summary.md", "results.json", "timing.csv", "logs.zip"}
    with zipfile.ZipFile(out / "logs.zip") as logs:
        assert logs.getinfo("long.txt").file_size < 2.1 * report.KEPT
        assert logs.getinfo("long.png").file_size == 3 * report.KEPT


def test_an_unsupported_gpu_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for architecture, sentence in (
        ("sm_75", "the GPU is sm_75, but the kernels need sm_80 (compute capability 8.0) or newer"),
        ("gfx1100", "the GPU is gfx1100, but the kernels support only gfx90a, gfx942, gfx950"),
    ):
        monkeypatch.setattr(backends, "gpu_architecture", lambda index, name=architecture: name)
        assert backends.reason_against_gpu() == sentence


def test_wrong_arguments_exit_with_status_200(tmp_path: Path) -> None:
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
def test_sanitizer_output_is_classified(tmp_path: Path, monkeypatch, tool: str, status: str, why: str) -> None:
    """Scripts replace compute-sanitizer. Like some of its releases, they reject the option that excludes torch's kernels."""
    program = tmp_path / "compute-sanitizer"
    until_program = f'while [ "$1" != {sys.executable} ]; do [ "$1" != --kernel-name ] || exit 2; shift; done'
    program.write_text(f"#!/bin/bash\n{until_program}\n{tool}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sanitizer, "SMALL", (sys.executable, "-c", f"print('{sanitizer.RAN}')"))
    rows = list(sanitizer.rows(Plan(dry=False, deadline=time.monotonic() + 60)))
    assert [row["check"] for row in rows] == ["memcheck", "racecheck"]
    assert all(row["status"] == status and why in row["why"] for row in rows), rows


def test_pytest_output_is_parsed_with_and_without_workers() -> None:
    text = """
tests/test_ops.py::test_a[triton-x] PASSED                    [ 10%]
[gw3] [ 20%] FAILED tests/test_ops.py::test_b[triton-y]
tests/test_ops.py::test_c SKIPPED (no triton)                 [ 30%]
tests/test_ops.py::test_d
FAILED tests/test_ops.py::test_b[triton-y] - AssertionError: dk: 2.0 > 1.0
"""
    expected = {"test_a[triton-x]": "PASSED", "test_b[triton-y]": "FAILED", "test_c": "SKIPPED"}
    assert suite.outcomes_of(text) == {f"tests/test_ops.py::{name}": outcome for name, outcome in expected.items()}


def test_jobs_after_the_deadline_are_reported_as_skipped() -> None:
    late = [row for row in timing.rows(Plan(dry=True, deadline=0.0)) if "figure" not in row]
    assert late and {(row["status"], row["why"]) for row in late} == {("skipped", "out of time")}


def test_the_suite_skips_tests_that_exist() -> None:
    names = "\n".join((suite.ROOT / path).read_text() for path in suite.OPERATORS)
    assert suite.KERNELS in names and suite.NOT_HERE in names
