"""Plugin for `pytest --benchmark` that makes pytest-benchmark report device time.

The statistics, JSON files and comparisons of pytest-benchmark then contain device times, or CPU times if there is no GPU. For
each operator and sequence length, the first test checks and measures all providers (implementations of the operator), as
described in vix_kernels/measure/operators.py. Each test then passes the times of its provider to pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from bench import table
from vix_kernels import backends
from vix_kernels.measure.machine import commit, device_name, facts
from vix_kernels.measure.operators import USUAL, USUAL_DTYPE, Effort, Result, measure_alone
from vix_kernels.measure.pictures import NAMES
from vix_kernels.measure.providers import OURS, providers, public
from vix_kernels.testing import SPECS

DEVICE = "cpu" if backends.reason_against_gpu() else "cuda"
TOKENS = (1024, 4096)
DIRECTIONS = ("forward", "full")
Race = dict[tuple[str, str], Result]  # (provider, direction) -> result


class Recorded:
    """A clock that advances only when a function returned by `replay` is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, milliseconds: tuple[float, ...]) -> Callable[[], None]:
        """Return a function whose n-th call advances the clock by the n-th element of `milliseconds`."""
        remaining = iter(milliseconds)

        def call() -> None:
            self.now += next(remaining) / 1e3

        return call


CLOCK = Recorded()


def contenders(op: str, config: pytest.Config) -> list[str]:
    """Return the providers to measure. Compiled PyTorch is measured only with --compiled.

    SDPA takes the same time for all attention operators, so it is measured only for the first one.
    """
    skipped = {"compiled"} if not config.getoption("--compiled") else set()
    if op != next(name for name in public() if SPECS[name].attends):
        skipped.add("sdpa")
    return [provider for provider in providers(op, DEVICE) if provider not in skipped]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" not in metafunc.fixturenames:
        return
    grid = [
        (op, tokens, direction, provider)
        for op in public()
        for tokens in TOKENS
        for direction in DIRECTIONS
        for provider in contenders(op, metafunc.config)
    ]
    metafunc.parametrize("op, tokens, direction, provider", grid, ids=["-".join(map(str, each)) for each in grid])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def race(pytestconfig: pytest.Config) -> Callable[[str, int], Race]:
    """Return a cached function race(op, tokens), which measures all providers and returns their results."""
    if DEVICE == "cpu":
        torch.set_num_threads(1)  # with more threads, times on shared cores are noisy
    rounds = 1 if pytestconfig.getoption("--benchmark-disable") else int(pytestconfig.getoption("--benchmark-min-rounds"))

    @cache
    def race(op: str, tokens: int) -> Race:
        case, how = replace(USUAL[DEVICE], tokens=tokens), dict(directions=DIRECTIONS, effort=Effort(rounds=rounds))
        results = measure_alone(op, case, USUAL_DTYPE[DEVICE], contenders(op, pytestconfig), DEVICE, **how)
        return {(each.row["provider"], each.row["direction"]): each for each in results}

    return race


@pytest.fixture
def report(benchmark: Any, race: Callable[[str, int], Race]) -> Callable[[str, int, str, str], None]:
    """Return a function report(op, tokens, direction, provider) that adds the times of one provider to pytest-benchmark.

    If a backend of this library returns incorrect results or raises an error, the test fails. If another provider does
    so, or if memory runs out, the test is skipped. No times are added for failed or skipped tests.
    """

    def report(op: str, tokens: int, direction: str, provider: str) -> None:
        results = race(op, tokens)
        row = results[provider, direction].row
        if row["status"] == "skipped":
            pytest.skip(row["why"])
        assert row["status"] == "ok", row["why"]
        benchmark.group = f"{op}, {tokens} tokens, {NAMES[direction]}"
        benchmark.extra_info.update({name: value for name, value in row.items() if name not in ("status", "why")})
        benchmark.extra_info.update(commit=commit(), **{name: facts()[name] for name in ("torch", "triton", "python")})
        if provider in OURS:
            others = {name: each for (name, way), each in results.items() if way == direction and name != provider}
            benchmark.extra_info["ours_over_others"] = {
                name: table.ratio(results[provider, direction].samples, other.samples)
                for name, other in others.items()
                if other.row["status"] == "ok"
            }
            benchmark.extra_info["skipped"] = {
                name: other.row["why"] for name, other in others.items() if other.row["status"] != "ok"
            }
        samples = results[provider, direction].samples
        benchmark.pedantic(CLOCK.replay(samples), rounds=len(samples))

    return report


@pytest.hookimpl(optionalhook=True)  # pytest-benchmark may be missing
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    machine_info.update(device=device_name(DEVICE), **facts())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    here, there = machine_info["device"], compared_benchmark["machine_info"].get("device", "another suite's device")
    if here != there:
        raise pytest.UsageError(f"--benchmark-compare: the saved results are from {there}, this run uses {here}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [each.extra_info for each in getattr(session, "benchmarks", []) if "provider" in each.extra_info]
    if rows:
        terminalreporter.section(f"our time divided by the time of each peer, {rows[0]['device']}, in this run")
        for line in table.lines(rows):
            terminalreporter.line(line)
