"""bench/quality.py: at tiny sizes it leaves its files, and it refuses a bad output before the work."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench.quality import FIELDS, MEAN, METHODS, QUICK, main


def test_leaves_the_picture_and_its_numbers(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path / "quality.png"), "--quick"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"quality.png", "quality.csv"}
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "quality.csv").open(newline="") as file:
        rows = {(row["tokens"], row["method"], int(row["slots"])): row for row in csv.DictReader(file)}
    assert len(rows) == (1 + len(FIELDS)) * (1 + len(METHODS) * len(QUICK.slots))
    assert all(0 < float(row["low"]) <= float(row["median"]) <= float(row["high"]) for row in rows.values())
    # What the study is about, far beyond the noise of two heads: cells of the grid follow a smooth field, segments do not.
    grid, segments = (float(rows["smooth field", f"Nystrom, {kind} landmarks", 64]["median"]) for kind in ("grid", "segment"))
    assert grid < 0.1 < segments < float(rows["smooth field", MEAN, 0]["high"])


@pytest.mark.parametrize("output, message", [
    ("missing/quality.png", "cannot write to the folder"),
    ("quality.csv", "expected a path that ends in .png"),
])  # fmt: skip
def test_refuses_a_bad_output_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / output)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("bench.quality: error: --output: ") and message in error
