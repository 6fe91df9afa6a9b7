"""The pytest suite of tests/ on the GPU: the kernels first, then everything else that time allows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vix_kernels.measure.operators import Row, failed, ok, skipped

from .plan import Plan

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "triton or out_of_bounds"
NOT_HERE = "offsets_beyond"  # runs in the interpreter, whatever the device
OPERATORS = tuple(
    f"tests/test_{name}.py"
    for name in ("ops", "performer", "linear", "nystrom", "linformer", "fourier", "landmarks", "pinv", "token_conv")
)
SELECTIONS = {
    "kernels": (*OPERATORS, "-k", KERNELS),
    "everything else": (
        *OPERATORS, "tests/test_rope.py", "tests/test_bad_input.py",
        "-k", f"not ({KERNELS} or {NOT_HERE})",
    ),
}  # fmt: skip
TINY = {"kernels": ("tests/test_ops.py", "-k", "test_error_budget and triton and plain and bfloat16 and not performer")}


def rows(plan: Plan) -> Iterator[Row]:
    if not find_spec("pytest"):
        yield skipped("pytest is not installed")
        return
    for name, selection in plan.jobs((TINY if plan.dry else SELECTIONS).items(), lambda job: job[0]):
        seconds = plan.deadline - time.monotonic()
        if seconds < 10:
            yield skipped("out of time", check=name)
            continue
        yield from run(name, selection, seconds)


def run(name: str, selection: tuple[str, ...], seconds: float) -> Iterator[Row]:
    """One pytest run; the lines it has printed count even where the time ends it."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *selection]
    if find_spec("xdist"):  # compiling the kernels is most of the time, and the CPU's work
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            done = None
        log.seek(0)
        text = log.read()
    print(text)
    outcomes = dict(_outcomes(text))
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (tests/\S+) - (.*)", text, re.MULTILINE))
    counts = Counter(outcomes.values())
    what = dict(check=name, passed=counts["PASSED"], failed=counts["FAILED"] + counts["ERROR"], skipped=counts["SKIPPED"])
    for test, outcome in outcomes.items():
        if outcome in ("FAILED", "ERROR"):
            yield failed(reasons.get(test, outcome), check=test)
    if done is None:
        yield skipped(f"out of time after {len(outcomes)} tests", **what)
    elif done.returncode or not counts["PASSED"]:
        yield failed(f"pytest ended with {done.returncode}", **what)
    else:
        yield ok(**what)


def _outcomes(text: str) -> Iterator[tuple[str, str]]:
    """(test, outcome) of `pytest -v`, which puts the outcome after the test, or before it under xdist."""
    for line in text.splitlines():
        if "tests/" not in line:
            continue
        if match := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\s+(tests/\S+)", line):
            yield match[2], match[1]
        elif match := re.search(r"^(tests/\S+)\s+(PASSED|FAILED|ERROR|SKIPPED)\b", line):
            yield match[1], match[2]
