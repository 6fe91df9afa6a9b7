"""Time a call on the device or with the wall clock. Wall-clock times include host overhead, which dominates at small sizes."""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

use_graphs = True  # whether device_time captures CUDA graphs


@dataclass(frozen=True)
class DeviceTime:
    """The times of repeated calls, in milliseconds.

    `method` states how the times were measured. "graph": with CUDA events around the replay of a CUDA graph, which has almost
    no gaps between launches. "events": with CUDA events around an eager call. "cpu": as the CPU time of the process. "wall":
    as wall-clock time.
    """

    samples: tuple[float, ...]
    method: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The 20th percentile of the times."""
        return sorted(self.samples)[len(self.samples) // 5]

    @property
    def high(self) -> float:
        """The 80th percentile of the times."""
        return sorted(self.samples)[-1 - len(self.samples) // 5]


def device_time(function: Callable[[], Any], *, device: str | None = None, milliseconds: float = 50.0) -> DeviceTime:
    """Time function() on "cuda" or "cpu", by default on the GPU if there is one.

    On a GPU, the call is repeated for about `milliseconds` ms, each time with a cold L2 cache. It is captured in a CUDA graph
    if possible. On a CPU, three calls are timed.
    """
    if device == "cpu" or not torch.cuda.is_available():
        return in_turns({"": function}, rounds=3)[""]
    from triton.testing import do_bench

    replay = captured(function) if use_graphs else None
    samples = do_bench(replay or function, warmup=milliseconds / 4, rep=milliseconds, return_mode="all")
    return DeviceTime(tuple(samples), "graph" if replay else "events")


def in_turns(
    functions: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float = 0.0,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, DeviceTime]:
    """Time each function, by default in CPU time, and return the times by name.

    Each round repeats every function for about `seconds`, but calls it at least once. A warm-up round at the start, which calls
    each function once, is not counted. Because calls to the functions alternate, a change in the speed of the machine affects
    all of them equally.
    """

    def timed(function: Callable[[], Any], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    calls = {name: max(1, round(seconds / max(timed(function, 1), 1e-9))) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name].append(1e3 * timed(function, calls[name]))
    method = "cpu" if clock is time.process_time else "wall"
    return {name: DeviceTime(tuple(each), method) for name, each in samples.items()}


def captured(function: Callable[[], Any]) -> Callable[[], None] | None:
    """Capture function() in a CUDA graph and return the graph's replay method, or None if function() cannot be captured."""
    try:
        graph, _ = capture(function)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # for example, because the function synchronizes
        return None
    return graph.replay


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture function() in a CUDA graph and return the graph and the result of function().

    Raises:
        RuntimeError: the function cannot be captured; the process can continue.
        Spoiled: the capture failed and left the process unusable.
    """
    here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(2):  # compile kernels and allocate library workspaces, which is not possible during a capture
            function()
    here.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # The outer context restores the stream. torch.cuda.graph does not restore it if ending the capture fails.
        with torch.cuda.stream(here), torch.cuda.graph(graph, pool=pool):
            result = function()
    except BaseException:
        _failed.append(graph)
        clean_up(pool)
        raise
    return graph, result


_failed: list[torch.cuda.CUDAGraph] = []  # kept alive, because torch's pinned-memory allocator may still query their streams


def clean_up(pool: tuple[int, int]) -> None:
    """Restore the process after a failed CUDA graph capture into `pool`.

    If cudaStreamEndCapture fails, torch's capture_end raises before it calls endAllocateToPool. The next empty_cache would
    then raise, because it asserts that no capture is under way. The random-number generator also stays in its capture state.

    Raises:
        Spoiled: the process is still unusable.
    """
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    except RuntimeError:  # capture_end has already called endAllocateToPool, or the capture did not begin
        pass
    try:
        torch.cuda.default_generators[device].graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.rand(1, device="cuda").item()
    except Exception as error:
        raise Spoiled(f"the process is unusable after a failed capture: {error}") from error


class Spoiled(BaseException):
    """Raised if a failed CUDA graph capture has left the process unusable for measurements.

    The class is not a subclass of Exception, so handlers that record errors and continue do not catch it.
    """


def wall_time(function: Callable[[], Any], *, calls: int = 20, rounds: int = 3) -> float:
    """Return the wall-clock time per call to function() in milliseconds, as the median over rounds of `calls` calls.

    This is approximately the longer of the host time and the device time.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def run() -> None:
        for _ in range(calls):
            function()
        wait()

    function()
    wait()
    return 1e3 * statistics.median(timeit.repeat(run, number=1, repeat=rounds)) / calls
