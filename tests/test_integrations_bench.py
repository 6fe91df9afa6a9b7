"""Tests of bench/integrations.py, which measures the speedup of the integrations over the host libraries."""

import pytest
import torch

from bench import integrations


def test_both_modules_are_timed_and_give_the_same_outputs():
    pytest.importorskip("linformer", reason="the package linformer is not installed")
    error, times = integrations.measured("linformer", rounds=1)
    row = integrations.summary("linformer", [(error, times)] * 2)
    assert error < integrations.SAME and row["what"].startswith("Linformer")
    for direction in ("forward", "full"):
        assert row[f"{direction}_ms"] == times[direction]["ours"][0] > 0
        assert row[f"{direction}_ratio"] == times[direction]["ours"][0] / times[direction]["host"][0]


def test_different_outputs_are_an_error(monkeypatch: pytest.MonkeyPatch):
    pair = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), (torch.randn(2, 4),)
    monkeypatch.setitem(integrations.INTEGRATIONS, "linformer", (lambda: pair, "two layers with different weights"))
    with pytest.raises(RuntimeError, match="linformer: expected the outputs of the host library, got a relative error"):
        integrations.measured("linformer", rounds=1)


def test_the_help_explains_the_processes(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        integrations.main(["--help"])
    assert "measured in several new processes" in capsys.readouterr().out
