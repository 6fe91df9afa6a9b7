"""Tests of the table of break-even lengths, and of the benchmark that measures them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import break_even as bench
from vix_kernels.integrations.drop_in import OPS
from vix_kernels.integrations.speed import expected
from vix_kernels.measure import break_even
from vix_kernels.measure.break_even import BreakEven, crossing, slower


def test_the_crossing_is_interpolated() -> None:
    assert crossing({64: 4.0, 128: 2.0, 256: 0.5, 512: 0.1}) == str(round(128 * 2**0.5))
    assert crossing({64: 0.9, 128: 1.1, 256: 0.5}) == "139"  # slower at 128 tokens, so the length is above 128
    assert crossing({64: 0.9, 128: 0.5}) == "64 or fewer"
    assert crossing({64: 4.0, 128: 1.0}) == "more than 128"


def test_lengths_below_the_crossing_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(kind: str, direction: str, width: int, tokens: str) -> BreakEven:
        return BreakEven(kind, "device", "commit", "nystrom", direction, width, tokens)

    rows = (
        row("measured", "full", 64, "5"), row("measured", "forward", 32, "100"), row("measured", "forward", 64, "more than 90"),
        row("measured", "forward", 128, "70 or fewer"), row("predicted", "forward", 64, "30"),
    )  # fmt: skip
    monkeypatch.setattr(break_even, "rows", lambda: rows)
    assert slower("nystrom", 99, 32, "cpu") is rows[1] and slower("nystrom", 100, 40, "cpu") is None
    assert slower("nystrom", 90, 64, "cpu") is rows[2] and slower("nystrom", 91, 64, "cpu") is None
    assert slower("nystrom", 69, 256, "cpu") is None  # for width 128, no length below 70 was measured
    assert slower("nystrom", 29, 64, "cuda") is rows[4] and slower("nystrom", 30, 64, "cuda") is None
    assert [each.rounded for each in rows[1:4]] == ["100", "more than 90", "70 or fewer"]
    assert [row("measured", "full", 64, tokens).rounded for tokens in ("5", "663", "1095")] == ["5", "660", "1,100"]
    assert slower("nystrom", 1, 64, "mps") is None and slower("other", 1, 64, "cpu") is None
    at = "at head width"
    assert expected("nystrom", {}, 90, 64, "cpu") == f"{at} 64, nystrom attention was not faster at up to 90 tokens (device)"
    assert expected("nystrom", {}, 90, 32, "cpu") == f"{at} 32, nystrom attention was faster from about 100 tokens (device)"


def test_every_attention_is_measured() -> None:
    torch.manual_seed(0)
    rows = list(bench.measure(16, 40, rounds=2))
    names = ["softmax", *OPS, "linformer", "fourier"]
    assert [(row["op"], row["direction"]) for row in rows] == [(name, way) for way in ("forward", "full") for name in names]
    for row in rows:
        assert row["ms"] > 0 and row["low"] <= row["ratio"] <= row["high"] and (row["op"] != "softmax" or row["ratio"] == 1)
    found = bench.table(rows)
    assert [row.op for row in found] == names[1:] * 2 and {row.kind for row in found} == {"measured"}


def test_the_command_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench, "PATH", tmp_path / "break_even.csv")
    monkeypatch.setattr(bench, "TOKENS", (16, 24))
    threads = torch.get_num_threads()
    try:
        assert bench.main(["--rounds", "1", "--output", str(tmp_path / "out"), "--write"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert len((tmp_path / "out" / "times.csv").read_text().splitlines()) == 1 + 2 * 2 * 2 * 8
    assert "nystrom" in capsys.readouterr().out
    written = bench.read_csv(tmp_path / "break_even.csv", BreakEven)
    assert len(written) == 2 * 2 * 7 and {row.width for row in written} == {32, 64}
