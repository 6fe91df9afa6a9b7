"""The time of a call: on the device, and by the wall clock, which the host's work bounds where sizes are small."""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

use_graphs = True  # False: device_time captures nothing


@dataclass(frozen=True)
class DeviceTime:
    """Milliseconds of one call, repeated.

    method: "graph", events around the replay of a CUDA graph, free of the gaps between launches; "events", events around
    the call, where it cannot be captured; "cpu", the process's CPU time, where there is no GPU.
    """

    samples: tuple[float, ...]
    method: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """A fifth of the calls took less."""
        return sorted(self.samples)[len(self.samples) // 5]

    @property
    def high(self) -> float:
        """A fifth of the calls took more."""
        return sorted(self.samples)[-1 - len(self.samples) // 5]


def device_time(function: Callable[[], Any], *, device: str | None = None, milliseconds: float = 50.0) -> DeviceTime:
    """The time of function() on "cuda" or "cpu", by default the GPU if there is one.

    On a GPU with a cold L2 cache, over about `milliseconds` of repetitions; on a CPU of 3.
    """
    if device == "cpu" or not torch.cuda.is_available():
        return in_turns({"": function}, rounds=3)[""]
    from triton.testing import do_bench

    replay = captured(function) if use_graphs else None
    samples = do_bench(replay or function, warmup=milliseconds / 4, rep=milliseconds, return_mode="all")
    return DeviceTime(tuple(samples), "graph" if replay else "events")


def in_turns(functions: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, DeviceTime]:
    """CPU times, each function once a round, so that a drift of the machine hits all; one round before them warms up."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            samples[name].append(1e3 * (time.process_time() - start))
    return {name: DeviceTime(tuple(each[1:]), "cpu") for name, each in samples.items()}


def captured(function: Callable[[], Any]) -> Callable[[], None] | None:
    """The replay of function() as a CUDA graph, or None where it cannot be captured."""
    try:
        graph, _ = capture(function)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a wait for the device, say
        return None
    return graph.replay


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """function() as a CUDA graph, and what it returned.

    Raises:
        RuntimeError: it cannot be captured; the process can go on.
        Spoiled: the capture failed and left the process unusable.
    """
    here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels compile and libraries make their workspaces before the capture, which forbids both
            function()
    here.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # The outer context restores the stream: torch.cuda.graph does not where the capture cannot be ended.
        with torch.cuda.stream(here), torch.cuda.graph(graph, pool=pool):
            result = function()
    except BaseException:
        _failed.append(graph)
        clean_up(pool)
        raise
    return graph, result


_failed: list[torch.cuda.CUDAGraph] = []  # kept: torch's allocator of pinned memory may still ask them about streams


def clean_up(pool: tuple[int, int]) -> None:
    """After a failed capture into `pool`, let the process go on.

    Where cudaStreamEndCapture fails, torch's capture_end raises before it ends the pool's allocations, and the next
    empty_cache asserts that no capture is under way. The generator of random numbers stays in its state of a capture, too.

    Raises:
        Spoiled: the process is still unusable.
    """
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    except RuntimeError:  # capture_end has ended them, or the capture has not begun
        pass
    try:
        torch.cuda.default_generators[device].graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.rand(1, device="cuda").item()
    except Exception as error:
        raise Spoiled(f"the process is unusable after a failed capture: {error}") from error


class Spoiled(BaseException):
    """This process can measure no more. Not an Exception: whoever notes errors and goes on must not catch it."""


def wall_time(function: Callable[[], Any], *, calls: int = 20, rounds: int = 3) -> float:
    """Milliseconds a call of function(), one call after the other: the host's overhead, or the device's time if longer."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def run() -> None:
        for _ in range(calls):
            function()
        wait()

    function()
    wait()
    return 1e3 * statistics.median(timeit.repeat(run, number=1, repeat=rounds)) / calls
