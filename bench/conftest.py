"""Benchmarks against installed peers. Ours and theirs take turns, so that a drift of the machine hits both."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vix_kernels.testing import kept_for_backward


@pytest.fixture(autouse=True)
def one_thread():
    """Ratios on one CPU thread: shared cores make more threads a lottery."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def against(benchmark: Any) -> Callable[..., None]:
    """against(ours, theirs, budget=...) times both in turn and records the median ratio of CPU time, ours over theirs."""

    def run(ours: Callable[[], Any], theirs: Callable[[], Any], *, budget: float, rounds: int = 15) -> None:
        our_times: list[float] = []
        their_times: list[float] = []

        def timed(function: Callable[[], Any], times: list[float]) -> None:
            start = time.process_time()
            function()
            times.append(time.process_time() - start)

        # The peer runs in the set-up of each round, which pytest-benchmark does not time.
        benchmark.pedantic(
            lambda: timed(ours, our_times), setup=lambda: timed(theirs, their_times), rounds=rounds, warmup_rounds=2
        )
        if len(our_times) < 3:  # --benchmark-disable calls each once
            return
        ratio = statistics.median(a / b for a, b in zip(our_times[2:], their_times[2:], strict=True))
        benchmark.extra_info.update(
            ratio=round(ratio, 3), budget=budget, met=ratio <= budget, peer_median=statistics.median(their_times[2:])
        )

    return run


@pytest.fixture
def kept(benchmark: Any) -> Callable[..., None]:
    """kept(ours, theirs, inputs, budget=...) records the memory kept for backward, ours over theirs."""

    def run(ours: Callable, theirs: Callable, inputs: tuple[torch.Tensor, ...], *, budget: float) -> None:
        our_bytes, their_bytes = (kept_for_backward(function, inputs) for function in (ours, theirs))
        benchmark.pedantic(lambda: None, rounds=1)
        ratio = our_bytes / their_bytes
        benchmark.extra_info.update(
            ratio=round(ratio, 4), budget=budget, met=ratio <= budget, ours_mib=our_bytes / 2**20, peer_mib=their_bytes / 2**20
        )

    return run


@pytest.hookimpl(optionalhook=True)  # of a plugin that may be missing
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(torch=torch.__version__, python=platform.python_version(), threads=1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = [each for each in getattr(session, "benchmarks", []) if "ratio" in each.extra_info]
    if not rows:
        return
    terminalreporter.section("ours over theirs, one CPU thread, in this run")
    for row in rows:
        info = row.extra_info
        verdict = "met" if info["met"] else "MISSED"
        terminalreporter.line(f"{row.name:58} {info['ratio']:8.4f}   budget {info['budget']:<5}  {verdict}")
