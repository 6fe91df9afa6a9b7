"""Predict how long a launch takes, from the machine code of its kernel.

The time is the largest of the times in which the memory moves the arguments once and in which each unit of the multiprocessors
executes its instructions, and at least LAUNCH. It assumes that all of these overlap perfectly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from .._triton.targets import TARGETS
from .counting import PIPES, Counts, Section
from .observed import Launch
from .roofline import LAUNCH, Device
from .ttgir import evaluate

SAMPLES = 64  # programs per launch for which the numbers of iterations are evaluated


def work(parts: Iterable[Section], launch: Launch) -> list[float]:
    """Return the counts of one warp (see counting.Counts), summed over all programs of a launch."""
    parts = tuple(parts)
    total = [0.0] * len(PIPES)
    step = max(1, launch.programs // SAMPLES)
    sampled = range(0, launch.programs, step)
    for program in sampled:
        values = launch.scalars | program_ids(program, launch.grid)
        for part in parts:
            times = 1 if "?" in part.trips else max(0, evaluate(part.trips, values))
            total = [have + times * count for have, count in zip(total, astuple(part.counts), strict=True)]
    return [each * launch.programs / max(1, len(sampled)) for each in total]


def program_ids(program: int, grid: tuple[int, ...]) -> dict[str, int]:
    values = {}
    for axis, size in zip("xyz", (*grid, 1, 1), strict=False):
        values |= {f"pid_{axis}": program % size, f"grid_{axis}": size}
        program //= size
    return values


@dataclass(frozen=True)
class Time:
    """Predicted time of a launch. `bound` is "memory", "launch" or the name of a unit."""

    kernel: str
    seconds: float
    bound: str


def predict(launch: Launch, parts: Iterable[Section], warps: int, gpu: Device) -> Time:
    counts = Counts(*work(parts, launch))
    clock = gpu.exps / (16 * TARGETS[gpu.arch].multiprocessors)
    units = counts.cycles(warps, gpu.arch)
    times = {name: cycles / TARGETS[gpu.arch].multiprocessors / clock for name, cycles in units.items()}
    times |= {"memory": launch.bytes / gpu.bandwidth, "launch": LAUNCH}
    bound = max(times, key=times.get)
    return Time(launch.kernel, times[bound], bound)
