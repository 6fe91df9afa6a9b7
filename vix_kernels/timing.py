"""The time of a call: on the device, and by the wall clock, which the host's work bounds where sizes are small."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceTime:
    """Milliseconds of one call: the median, and the fifths below and above it.

    method: "graph", events around the replay of a CUDA graph, free of the gaps between launches; "events", events around
    the call, where it cannot be captured; "host", the CPU's clock, where there is no GPU.
    """

    median: float
    low: float
    high: float
    method: str


def device_time(function: Callable[[], Any], *, milliseconds: float = 50.0) -> DeviceTime:
    """The device time of function(), with a cold L2 cache, over about `milliseconds` of repetitions."""
    if not torch.cuda.is_available():
        function()
        times = sorted(_seconds(function, 1) for _ in range(3))
        return DeviceTime(*(1e3 * times[at] for at in (1, 0, 2)), "host")
    from triton.testing import do_bench

    replay = captured(function)
    timed = replay or function
    median, low, high = do_bench(timed, warmup=milliseconds / 4, rep=milliseconds, quantiles=(0.5, 0.2, 0.8))
    return DeviceTime(median, low, high, "graph" if replay else "events")


def captured(function: Callable[[], Any]) -> Callable[[], None] | None:
    """The replay of function() as a CUDA graph, or None where it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels compile and libraries make their workspaces before the capture, which forbids both
            function()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a wait for the device, say; the error belongs to the capture alone and does not stick
        torch.cuda.synchronize()
        return None
    return graph.replay


def wall_time(function: Callable[[], Any], *, calls: int = 20, rounds: int = 3) -> float:
    """Milliseconds a call of function(), one call after the other: the host's overhead, or the device's time if longer."""
    function()
    return 1e3 * statistics.median(_seconds(function, calls) for _ in range(rounds))


def _seconds(function: Callable[[], Any], calls: int) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter() - start) / calls
