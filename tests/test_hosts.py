"""Tests of `make hosts`: run a few of timm's tests, and check that unexpected results are reported."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hosts import __main__ as hosts
from hosts.suites import SUITES, Expected, Suite

pytest.importorskip("timm", reason="timm is not installed")


def test_the_models_pass_tests_of_timm() -> None:
    try:
        folder = hosts.source("timm")
    except subprocess.CalledProcessError:
        pytest.skip("the source distribution of timm cannot be downloaded")
    selection = "(vix_vip_tiny or vix_levin_tiny) and not torchscript and not fx"
    failed, passed = hosts.outcomes("ci", SUITES["timm-models"], folder, SUITES["timm-models"].settings, ["-k", selection])
    assert not failed and len(passed) >= 10  # 14 in timm 1.0.31


@pytest.mark.parametrize(
    ("ours", "before", "problems", "printed"),
    [
        ({"a"}, set(), 1, "FAILED a"),
        ({"a"}, {"a"}, 0, "1 also fail without this library"),
        ({"causal[x]"}, set(), 0, "1 are expected"),
        (set(), set(), 1, "passes, although suites.py expects it to fail: causal[*"),
    ],
)
def test_unexpected_failures_and_outdated_expectations_are_reported(
    ours: set[str], before: set[str], problems: int, printed: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    tests = {"a", "b", "causal[x]"}
    allowed = () if "causal[x]" not in ours and "a" in ours else (Expected("causal[*", "causal", "not supported"),)
    suite = Suite("timm", "plugin", (), {"ours": "1"}, before={}, expected=allowed)
    outcomes = {"suite": ours, "suite-before": before}
    monkeypatch.setattr(hosts, "outcomes", lambda name, *_: (outcomes[name], tests - outcomes[name]))
    assert hosts.run("suite", suite, tmp_path, []) == problems
    assert printed in capsys.readouterr().out


def test_tests_that_cannot_be_collected_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import a_module_that_does_not_exist")
    (tmp_path / "plugin_for_nothing.py").write_text("")
    monkeypatch.setattr(hosts, "BUILD", tmp_path / "build")
    suite = Suite("timm", "plugin_for_nothing", ("test_broken.py",), {})
    with pytest.raises(SystemExit, match="suite: pytest could not run the tests"):
        hosts.outcomes("suite", suite, tmp_path, {}, [])
