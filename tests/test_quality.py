"""Tests that bench/quality.py writes a plot and a CSV file, and that it rejects invalid arguments."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench.quality import FIELDS, MEAN, METHODS, QUICK, main


def test_writes_the_plot_and_its_data(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path / "quality.png"), "--quick"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"quality.png", "quality.csv"}
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "quality.csv").open(newline="") as file:
        rows = {(row["tokens"], row["method"], int(row["slots"])): row for row in csv.DictReader(file)}
    assert len(rows) == (1 + len(FIELDS)) * (1 + len(METHODS) * len(QUICK.slots))
    assert all(0 < float(row["low"]) <= float(row["median"]) <= float(row["high"]) for row in rows.values())
    # On a smooth field, landmarks from grid cells have small errors, and landmarks from segments have large errors. The
    # difference is much larger than the noise, even though only two heads are measured.
    grid, segments = (float(rows["smooth field", f"Nystrom, {kind}", 64]["median"]) for kind in ("grid", "segments"))
    assert grid < 0.1 < segments < float(rows["smooth field", MEAN, 0]["high"])


@pytest.mark.parametrize("words, message", [
    (("--output", "missing/quality.png"), "--output: cannot write to the folder missing"),
    (("--output", "quality.csv"), "--output: expected a path that ends in .png, got quality.csv"),
    (("--output", "quality.png", "--seed", "-1"), "--seed: expected a finite number of 0 or more, got -1"),
])  # fmt: skip
def test_bad_arguments_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"bench.quality: error: {message}\n"
    assert not list(tmp_path.iterdir())
