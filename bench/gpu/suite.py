"""Run the operators' tests in tests/ on the GPU. The tests of the kernels run first. The others run if time remains."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from vix_kernels.measure.operators import Row, failed, ok, skipped

from .part import Job, Plan, by_job

ROOT = Path(__file__).resolve().parents[2]
KERNELS = "triton"
NOT_HERE = "offsets_may_exceed"  # this test always runs in the interpreter, so the GPU suite skips it
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
TINY = {"kernels": ("tests/test_ops.py", "-k", "test_error_budget and triton and plain and not performer")}


@by_job
def rows(plan: Plan) -> Iterator[Job]:
    for name, selection in (TINY if plan.dry else SELECTIONS).items():
        yield Job(dict(check=name), partial(run, selection, plan))


def run(selection: tuple[str, ...], plan: Plan) -> Iterator[Row]:
    """Run pytest once. Yield a row for each failed test, and a row with the numbers of passed, failed and skipped tests.

    If time runs out, unfinished tests are omitted.
    """
    if not find_spec("pytest"):
        yield skipped("pytest is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *selection]
    if find_spec("xdist"):  # most of the time is spent on compilation, which runs on the CPU
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    code, text = plan.finish(command, cwd=ROOT)
    outcomes = outcomes_of(text)
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (tests/\S+) - (.*)", text, re.MULTILINE))
    counts = Counter(outcomes.values())
    what = dict(passed=counts["PASSED"], failed=counts["FAILED"] + counts["ERROR"], skipped=counts["SKIPPED"])
    for test, outcome in outcomes.items():
        if outcome in ("FAILED", "ERROR"):
            yield failed(reasons.get(test, outcome), check=test)
    if code is None:
        yield skipped(f"out of time after {len(outcomes)} tests", **what)
    elif code or not counts["PASSED"]:
        yield failed(f"pytest ended with {code}", **what)
    else:
        yield ok(**what)


def outcomes_of(text: str) -> dict[str, str]:
    """Parse the output of `pytest -v`. Return a dict that maps the name of each test to its outcome.

    The outcome is printed after the name of the test, or before it under xdist.
    """
    outcome = "PASSED|FAILED|ERROR|SKIPPED"
    after = re.findall(rf"^(tests/\S+) +({outcome})\b", text, re.MULTILINE)
    before = re.findall(rf"\b({outcome}) +(tests/\S+)", text)
    return dict(after) | {test: result for result, test in before}
