"""Predict the time of each kernel launch in a call, based on the machine code of the kernel.

The prediction is the longest of these times: the time to transfer each argument to or from memory once; for each pipe
(execution unit) of the multiprocessors, the time to execute its instructions; and LAUNCH, the assumed interval between kernels.
The prediction assumes that these times overlap perfectly, that latencies are hidden, and that all programs take equally long.
flash.py compares such predictions with published times of FlashAttention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .._triton.targets import TARGETS
from ..commands import DTYPES, read_csv
from ..testing import Case, OpSpec
from .compile_cell import compile_launches, work
from .compile_table import Row
from .counting import Counts, Section
from .observed import Launch, observe_call
from .roofline import LAUNCH, Device

TABLE = Path(__file__).with_name("compile_report.csv")


@dataclass(frozen=True)
class Time:
    """Predicted time of a launch.

    `bound` names the longest of the compared times: "memory", "launch" or a pipe in counting.PIPES. `complete` is False if the
    trip count of a loop is unknown. Such a loop counts as one iteration.
    """

    kernel: str
    seconds: float
    bound: str
    complete: bool = True


def predict(launch: Launch, parts: Iterable[Section], warps: int, gpu: Device) -> Time:
    parts, multiprocessors = tuple(parts), TARGETS[gpu.arch].multiprocessors
    clock = gpu.exps / (16 * multiprocessors)
    cycles = Counts(*work(parts, launch)).cycles(warps, gpu.arch)
    rounds = -(-launch.programs // multiprocessors)  # the largest number of programs on one multiprocessor
    times = {name: value / max(1, launch.programs) * rounds / clock for name, value in cycles.items()}
    times |= {"memory": launch.bytes / gpu.bandwidth, "launch": LAUNCH}
    bound = max(times, key=times.get)
    return Time(launch.kernel, times[bound], bound, not any("?" in part.trips for part in parts))


def call_times(spec: OpSpec, case: Case, dtype: str, gpu: Device, known: Mapping[str, Row]) -> Iterator[tuple[str, Time]]:
    """Yield the direction and the predicted time of each launch of a call.

    All PyTorch kernels of a direction are combined into one Time. `known` maps keys to rows of the compile report. Kernels
    whose keys are not in `known` are compiled.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    for direction, launches, others in observe_call(spec, case, DTYPES[dtype], gpu.arch):
        for launch in launches:
            row = row_of(launch, gpu.arch, known)
            yield direction, predict(launch, row.parts, row.warps, gpu)
        if others:  # PyTorch's kernels, whose traffic is not known here
            yield direction, Time(f"{others} of PyTorch", others * LAUNCH, "launch")


def committed() -> dict[str, Row]:
    """Return the rows of the committed compile report (compile_report.csv), indexed by key."""
    return {row.key: row for row in read_csv(TABLE, Row)}


def row_of(launch: Launch, arch: str, known: Mapping[str, Row]) -> Row:
    if launch.key in known:
        return known[launch.key]
    errors: list[str] = []
    rows = list(compile_launches(arch, [launch], errors))
    if errors:
        raise RuntimeError(errors[0])
    return rows[0]
