"""bench/doors.py: times of integrations, compared with their hosts."""

import pytest
import torch

from bench import doors


def test_both_are_timed_and_agree():
    pytest.importorskip("linformer", reason="the package linformer is not installed")
    error, times = doors.measured("linformer", rounds=1)
    row = doors.summary("linformer", [(error, times)] * 2)
    assert error < doors.SAME and row["what"].startswith("Linformer")
    for direction in ("forward", "full"):
        assert row[f"{direction}_ms"] == times[direction]["ours"][0] > 0
        assert row[f"{direction}_ratio"] == times[direction]["ours"][0] / times[direction]["theirs"][0]


def test_different_outputs_are_an_error(monkeypatch: pytest.MonkeyPatch):
    pair = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), (torch.randn(2, 4),)
    monkeypatch.setitem(doors.DOORS, "linformer", (lambda: pair, "two layers with other weights"))
    with pytest.raises(RuntimeError, match="linformer: expected the host's answers, got a relative error"):
        doors.measured("linformer", rounds=1)


def test_help_describes_the_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        doors.main(["--help"])
    assert "processes of their own" in capsys.readouterr().out
