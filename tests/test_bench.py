"""Tests of the benchmarks.

The benchmarks do not time an implementation (provider) that gives wrong results, runs out of memory or is not installed. The
row of such an implementation states the reason.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import table
from vix_kernels.__main__ import main
from vix_kernels.measure import models, providers, sweep
from vix_kernels.measure import operators as measuring
from vix_kernels.measure.operators import Effort, alone, measure, peak_memory
from vix_kernels.testing import SPECS, Case

ROOT = Path(__file__).resolve().parents[1]
TINY = Case("tiny", batch=2, heads=2, tokens=40, width=16, features=8)
QUICK = Effort(rounds=2, memory=False)


def rows(op: str, names: tuple[str, ...], **how) -> dict[tuple[str, str], dict]:
    results = measure(op, how.pop("case", TINY), "fp32", names, "cpu", effort=how.pop("effort", QUICK), **how)
    return {(each.row["provider"], each.row["direction"]): each.row for each in results}


@pytest.mark.parametrize("op", providers.public())
def test_every_provider_of_an_operator_is_correct(op: str) -> None:
    names = tuple(name for name in providers.providers(op, "cpu") if name != "compiled")
    found = rows(op, names, effort=Effort(rounds=2))
    for (name, direction), row in found.items():
        if row["status"] == "skipped":  # the package is not installed or needs a GPU
            assert row["why"] in (f"{name} is not installed", f"{name} needs a GPU")
            continue
        assert row["status"] == "ok", row
        if direction != "backward":  # the time of the backward pass is a difference, which other load can make negative
            assert row["device_ms"] > 0
            assert row["gbps"] > 0 and row["tflops"] > 0 and row["roofline"] > 0 and row["peak_mib"] > 0
        else:
            full, forward = (found[name, other]["device_ms"] for other in ("full", "forward"))
            assert row["device_ms"] == pytest.approx(full - forward)
        if direction == "full":
            assert row["kept_mib"] >= 0
    assert found["torch", "forward"]["error"] < 1e-5 and found["torch", "full"]["error"] < 1e-5
    assert found["torch", "full"]["kept_mib"] <= found["reference", "full"]["kept_mib"]


def test_rates_match_hand_counts() -> None:
    (result,) = measure("apply_rope", TINY, "fp32", ["torch"], "cpu", directions=["forward"], effort=QUICK)
    row, elements = result.row, 2 * 2 * 40 * 16
    seconds = row["device_ms"] / 1e3
    assert row["gbps"] == pytest.approx(
        4 * 4 * elements / seconds / 1e9
    )  # q and k are read and written, with four bytes per element; angles are not counted
    assert row["tflops"] == pytest.approx(6 * elements / seconds / 1e12)
    assert result.samples and row["device_ms"] == pytest.approx(sum(result.samples) / 2)


@pytest.mark.parametrize("part", ["output", "gradient"])
def test_incorrect_results_are_not_timed(monkeypatch, part: str) -> None:
    spec = SPECS["apply_rope"]

    def broken(q, k, *, backend, **options):
        a, b = spec.function(q, k, **options, backend=backend)
        return (a * 1.001, b) if part == "output" else (a + 0.001 * (q - q.detach()), b)

    monkeypatch.setitem(SPECS, "apply_rope", replace(spec, function=broken))
    found = rows("apply_rope", ("torch", "reference"))
    wrong = found["torch", "forward" if part == "output" else "full"]
    assert wrong["status"] == "failed" and f"wrong: {part} 0" in wrong["why"] and "device_ms" not in wrong
    assert found["torch", "backward"]["status"] == "failed"
    assert found["reference", "full"]["status"] == "ok"


def test_an_incorrect_peer_is_skipped(monkeypatch) -> None:
    def enter(provider, problem, honest=providers.enter):
        contender = honest(provider, problem)
        return replace(contender, function=lambda *x: contender.function(*x) * 2) if provider == "plain" else contender

    monkeypatch.setattr(measuring, "enter", enter)
    found = rows("linear_attention", ("torch", "plain"))
    assert found["plain", "forward"]["status"] == "skipped" and "wrong: output" in found["plain", "forward"]["why"]
    assert found["torch", "forward"]["status"] == "ok"


def test_errors_of_one_provider_do_not_stop_the_others(monkeypatch) -> None:
    errors = {"torch": ValueError("bad"), "reference": torch.OutOfMemoryError("no"), "sdpa": RuntimeError("no kernel")}

    def enter(provider, problem, honest=providers.enter):
        if provider in errors:
            raise errors[provider]
        return honest(provider, problem)

    monkeypatch.setattr(measuring, "enter", enter)
    found = rows("linear_attention", ("torch", "reference", "sdpa", "plain"), directions=("forward",))
    outcomes = {name: (row["status"], row["why"]) for (name, _), row in found.items()}
    assert outcomes["torch"] == ("failed", "ValueError: bad")
    assert outcomes["reference"] == ("skipped", "out of memory")
    assert outcomes["sdpa"] == ("skipped", "RuntimeError: no kernel")
    assert outcomes["plain"][0] == "ok"
    real = rows("linear_attention", ("torch",), case=replace(TINY, tokens=2**44), directions=("forward",))
    assert real["torch", "forward"]["why"] == "out of memory"


def test_providers_are_skipped_after_the_time_limit() -> None:
    assert {row["why"] for row in rows("apply_rope", ("torch",), late=lambda: True).values()} == {"out of time"}


def test_a_killed_process_loses_only_its_rows() -> None:
    assert alone("cpu", lambda why: why, os.abort) == "the process was killed, perhaps because memory ran out"
    assert alone("cpu", lambda why: why, max, 1, 2) == 2


def test_peak_memory_covers_only_the_call() -> None:
    x = torch.ones(2**18)  # 1 MiB
    assert peak_memory(lambda: (x * 2 + 1).sum(), "cpu") == pytest.approx(2 * 2**20, rel=0.01)


class TestSuite:
    """Tests of `pytest --benchmark`. They run it in a subprocess, and only for `apply_rope`."""

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "--benchmark", "-p", "no:cacheprovider", "-k", "apply_rope-1024", *arguments]
        settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
        return subprocess.run(
            list(map(str, command)), cwd=ROOT, env=settings | environment, capture_output=True, text=True, timeout=300
        )

    def test_rows_record_the_environment_and_errors(self, tmp_path: Path) -> None:
        pytest.importorskip("pytest_benchmark")
        done = self.run("--benchmark-json", tmp_path / "run.json")
        assert done.returncode == 0, done.stdout
        run = json.loads((tmp_path / "run.json").read_text())
        assert run["machine_info"]["device"] and run["machine_info"]["torch"] == torch.__version__
        rows = {row["extra_info"]["direction"]: row for row in run["benchmarks"] if row["extra_info"]["provider"] == "torch"}
        assert set(rows) == {"forward", "full"}
        for row in rows.values():
            info = row["extra_info"]
            names = {"gbps", "tflops", "roofline", "peak_mib", "device", "torch", "triton", "python", "commit", "error"}
            assert names <= set(info) and info["ours_over_others"]["reference"] > 0
            assert row["stats"]["median"] == pytest.approx(info["device_ms"] / 1e3)  # pytest-benchmark records the device time
        assert rows["full"]["extra_info"]["kept_mib"] == 0.25
        assert "| `apply_rope` / rotary-embedding-torch | 1024 |" in done.stdout

        # Results from a different device are rejected. Results from the same device are compared.
        run["machine_info"]["device"] = "another"
        (tmp_path / "other.json").write_text(json.dumps(run))
        done = self.run("--benchmark-compare", tmp_path / "other.json")
        assert done.returncode and "the saved results are from another" in done.stdout + done.stderr
        done = self.run("--benchmark-compare", tmp_path / "run.json")
        assert done.returncode == 0, done.stdout + done.stderr

    def test_a_broken_op_fails_and_is_not_timed(self, tmp_path: Path) -> None:
        pytest.importorskip("pytest_benchmark")
        (tmp_path / "breaks_rope.py").write_text("""
from dataclasses import replace
from vix_kernels.testing import SPECS
honest = SPECS["apply_rope"]

def broken(q, k, **options):
    q, k = honest.function(q, k, **options)
    return q * 1.001, k

SPECS["apply_rope"] = replace(honest, function=broken)
""")
        done = self.run("-p", "breaks_rope", "--benchmark-json", tmp_path / "run.json", PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert done.returncode == 1
        assert "FAILED bench/test_ops.py::test_speed[apply_rope-1024-forward-torch]" in done.stdout
        assert "AssertionError: wrong: output 0" in done.stdout
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("| `apply_rope`"))
        assert [cell.strip() for cell in line.split("|")][3:5] == ["no result / no result"] * 2
        run = json.loads((tmp_path / "run.json").read_text())
        assert {row["extra_info"]["provider"] for row in run["benchmarks"]} >= {"reference"}
        assert not any("ours_over_others" in row["extra_info"] for row in run["benchmarks"])


def benchmark_row(provider: str, direction: str, **more) -> dict:
    common = dict(op="apply_rope", tokens=4096, method="cpu", device_ms=2.0, kept_mib=1.0)
    return common | dict(provider=provider, direction=direction, skipped={}) | more


def test_table_marks_missed_budgets_and_missing_packages() -> None:
    name = "rotary-embedding-torch"
    rows = [
        benchmark_row("torch", "forward", ours_over_others={name: 0.2, "reference": 0.5}),
        benchmark_row("torch", "full", ours_over_others={name: 0.25}),
    ]
    line = table.lines([*rows, benchmark_row(name, "full", kept_mib=4.0)])[2]
    assert "| 2 / 2 | 0.20 (missed 0.15) / 0.25 | 0.50 /" in line and "| 1.00 | 0.25 |" in line
    absent = [row | dict(ours_over_others={}, skipped={name: f"{name} is not installed"}) for row in rows]
    assert "| not installed |" in table.lines(absent)[2]
    assert "(missed" not in table.lines([row | dict(method="graph") for row in rows])[2]  # budgets apply only to CPU times


def test_table_of_models(tmp_path: Path, capsys) -> None:
    def row(provider: str, dtype: str, direction: str, ms: float, kept: float) -> dict:
        figures = dict(ms=ms, images_per_second=16e3 / ms, peak_mib=2 * kept, kept_mib=kept, original="ViP", device="x")
        return dict(model="vip", provider=provider, dtype=dtype, direction=direction, status="ok", why="") | figures

    rows = [row("ours", "fp32", "training", 600, 30), row("original", "fp32", "training", 800, 100)]
    rows += [row("ours", "bf16", "training", 360, 20), row("ours", "fp32", "inference", 100, 0)]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(dict(commit="c", date="d", torch="t", rows=rows)))
    assert table.main([str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "| `vip` / ViP | 26.7 / 20 | 0.75 (missed 0.7) | 0.45 |  |  | 0.30 | 0.30 |"
    path.write_text("{}")
    with pytest.raises(SystemExit):
        table.main([str(path)])
    assert "expected a run of pytest --benchmark or of vix bench --models" in capsys.readouterr().err


def test_ratio_is_the_median_over_rounds() -> None:
    assert table.ratio([1.0, 2.0, 9.0], [2.0, 4.0, 3.0]) == 0.5
    assert table.ratio([1.0], [2.0, 4.0, 6.0]) == 0.25


def test_bench_writes_tables_and_plots(tmp_path: Path, capsys) -> None:
    arguments = (
        "bench --op linear_attention apply_rope --values 16 32 --mode fwd,bwd,full --rounds 1 --provider torch sdpa reference"
    )
    assert main([*arguments.split(), "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "linear_attention, forward" in captured.out and "SDPA" in captured.out
    assert "apply_rope, tokens 32" in captured.err  # progress is printed to stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"bench.csv", "bench.json"} | {
        f"{name}_fp32.{kind}" for name in ("linear_attention", "apply_rope", "all") for kind in ("png", "svg")
    }
    with (tmp_path / "out" / "bench.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["tokens"], line["direction"]) for line in lines} == {
        (tokens, direction) for tokens in ("16", "32") for direction in ("forward", "backward", "full")
    }
    assert len(json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]) == len(lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--provider unknown", "--provider: expected some of"),
        ("--mode fwd,both", "argument --mode: expected some of fwd,bwd,full, got 'both'"),
        ("--values 0", "argument --values: expected an integer from 1 to 1048576, got '0'"),
        ("--models nothing*", "--models: expected a pattern that matches a model, such as vit,"),
        ("--models vip --provider sdpa", "--provider: expected some of ours, compiled, plain, original, got sdpa"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(arguments: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_crossings_name_the_length_from_which_vix_is_faster() -> None:
    def row(provider: str, tokens: int, ms: float) -> dict:
        return dict(op="x", direction="forward", provider=provider, tokens=tokens, device_ms=ms, status="ok")

    sdpa = [row("sdpa", tokens, 2.0) for tokens in (16, 32, 64)]

    def crossing(*times: float) -> str:
        return next(sweep.crossings([*sdpa, *map(row, ["torch"] * 3, (16, 32, 64), times)], "tokens"))

    assert crossing(3, 1, 1) == "x, forward: faster than SDPA at 32 tokens and above, not at 16"
    assert crossing(1, 3, 1) == "x, forward: faster than SDPA at 64 tokens and above, not at 32"
    assert crossing(1, 1, 1) == "x, forward: faster than SDPA at all of 16, 32, 64 tokens"
    assert crossing(1, 1, 3) == "x, forward: not faster than SDPA at 64 tokens, the largest of 16, 32, 64"


def test_bench_measures_models(tmp_path: Path, capsys) -> None:
    what = "--models vip_tiny --provider ours original --batch 1 --rounds 1 --output"
    assert main(["bench", *what.split(), str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("vip_tiny  ours" in line for line in lines) == 4
    assert sum("this model has no original" in line for line in lines) == 4
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 8


def test_models_are_compared_with_their_originals() -> None:
    found = {
        (row["provider"], row["dtype"], row["direction"]): row
        for row in models.measure("hybrid_vip", models.FORMS["cpu"][:3], "cpu", batch=1, rounds=1)
    }
    for direction in ("inference", "training"):
        for form in models.FORMS["cpu"][:3]:
            row = found[(*form, direction)]
            assert row["status"] == "ok", row
            assert row["images_per_second"] > 0 and row["peak_mib"] > 0
    assert found["ours", "fp32", "training"]["kept_mib"] < found["original", "fp32", "training"]["kept_mib"]
    (skipped, _) = models.measure("levit", [("original", "fp32")], "cpu", batch=1, rounds=1)
    assert (skipped["status"], skipped["why"]) == ("skipped", "this model has no original")


@pytest.mark.parametrize("name", models.PAIRS)
def test_models_and_originals_have_similar_sizes(name: str) -> None:
    """Parameter counts differ where this library corrects mistakes in the original Vision Xformers models.

    For example, ViL has as many key and value heads as query heads. The original ViL has only one key head and one value head.
    """
    model, original = (models.make(name, provider, {}, "cpu").to("meta") for provider in ("ours", "original"))
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, original)]
    assert 0.99 < sizes[0] / sizes[1] < (1.15 if name in ("vil", "hybrid_vil") else 1.05)
    images = torch.empty(2, model.in_chans, *model.img_size, device="meta")
    assert original.eval()(images).shape == model.eval()(images).shape


def test_a_subset_of_a_sorted_dataset_has_all_classes() -> None:
    from bench.training import some_of
    from vix_kernels.training.data import HeldImages

    sorted_labels = torch.arange(10).repeat_interleave(100)
    part = some_of(HeldImages(sorted_labels[:, None], sorted_labels), 300)
    assert len(part) == 300 and torch.equal(part.images[:, 0], part.labels)
    assert part.labels.bincount(minlength=10).min() > 10
