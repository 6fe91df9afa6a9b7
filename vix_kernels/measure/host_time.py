"""Measure the host time of operators: the time in Python, PyTorch and Triton's launcher before a kernel starts.

examples:
  vix dev host-time                                every operator, in microseconds and relative to two small calls (see below)
  vix dev host-time performer_attention --profile  one operator, and the fraction of its time in each step, such as autograd

At small sizes, an eager call takes as long as its host time. The operators run on CPU tensors as they would on an H100, but no
kernel runs: Triton's launcher calls a stub instead of the CUDA driver. Building the launcher and the stub needs a C compiler.
No GPU is needed. The column "us without launches" and the ratios after it exclude the launcher.

Times of different runs cannot be compared, because they depend on the machine and its load. Ratios can be compared. They are
relative to PyTorch's scaled_dot_product_attention on tiny CPU tensors ("x attention"), and to an empty autograd.Function with
eight tensors ("x Function"). Measurements of the operator and of these two calls alternate.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from .. import backends, plans
from ..commands import Parser, print_table, progress, within, write_csv
from ..testing import SPECS, Case, OpSpec, draw
from ..testing.problem import REGISTERING
from .timing import in_turns

STUB = Path(__file__).with_name("stub_driver.c")
ARCH = "sm_90"
CASE = Case("host", batch=1, heads=2, tokens=128, width=64, features=64)
DIRECTIONS = ("forward", "both")
# Maps a part of a file name to a step of the profile. The first match is used. C functions are matched by their names.
STEPS = {
    "vix_kernels/ops": "checks",
    "vix_kernels/backends": "checks",
    "vix_kernels/primitives/registry": "dispatch",
    "vix_kernels/primitives": "autograd",
    "torch/autograd": "autograd",
    "vix_kernels/_triton/launch": "launch configuration",
    "vix_kernels/conditions": "launch configuration",
    "vix_kernels/_triton": "arguments of launches",
    "vix_kernels/layout": "arguments of launches",
    "triton/": "Triton's launcher",
    "empty": "allocation",
    "autograd": "autograd",
}


@dataclass(frozen=True)
class Row:
    """Host time of an operator in microseconds. The direction "both" means forward and backward.

    `sdpa` and `function` are the times of the two calls that `yardsticks` returns for this direction. The measurements
    of these calls and of the operator alternate.
    """

    op: str
    direction: str
    launcher: str  # "triton": the launcher calls a stub of the CUDA driver; "none": launches are skipped
    microseconds: float
    sdpa: float
    function: float

    @property
    def ratio(self) -> float:
        return self.microseconds / self.sdpa


# Measurement


class Empty(torch.autograd.Function):
    """A function that receives eight tensors and returns a view of the first one."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *(None,) * 7


def yardsticks() -> dict[tuple[str, str], Callable[[], Any]]:
    """Return the functions that operators are compared with, indexed by (name, direction).

    "sdpa" is scaled_dot_product_attention on tiny CPU tensors. "function" is an empty autograd.Function with eight tensors.
    """
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    tensors = [q, *(torch.randn(4) for _ in range(7))]
    calls = {
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "function": lambda: Empty.apply(*tensors),
    }
    wanted = {"sdpa": (q, k, v), "function": (q,)}
    return {
        (name, direction): both_of(call, wanted[name]) if direction == "both" else without_gradients(call)
        for name, call in calls.items()
        for direction in DIRECTIONS
    }


def without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def both_of(call: Callable[[], Any], wanted: tuple[Tensor, ...]) -> Callable[[], Any]:
    """Return a function that runs `call` and returns the gradients with respect to the tensors in `wanted`."""
    first = call()
    cotangents = [torch.empty_like(x) for x in (first if isinstance(first, tuple) else (first,))]

    def run() -> Any:
        outputs = call()
        return torch.autograd.grad(outputs, wanted, cotangents if isinstance(outputs, tuple) else cotangents[0])

    return run


def operator_calls(spec: OpSpec) -> dict[str, Callable[[], Any]]:
    """Return two functions that call an operator on small bfloat16 CPU tensors: "forward", and "both" for both passes."""
    problem = draw(spec, spec.fit(CASE), torch.bfloat16, "cpu")

    def call() -> Any:
        return spec.function(*problem.tensors.values(), **problem.options, backend="triton")

    wanted = tuple(x for x in problem.tensors.values() if isinstance(x, Tensor) and x.requires_grad)
    return {"forward": without_gradients(call), "both": both_of(call, wanted)}


@contextmanager
def launches(launcher: str) -> Iterator[None]:
    """Let the Triton backend accept CPU tensors in the `with` block. If `launcher` is "none", kernel launches are skipped."""
    from .._triton import compiled

    nothing = compiled.Compiled(None, lambda *args: None, None, None, ())
    with (
        patch.object(compiled, "run", lambda *args: nothing) if launcher == "none" else nullcontext(),
        patch.object(plans, "entries", {}),  # plans recorded outside this block may contain a different launcher
        patch.object(plans, "on_gpu", lambda *args, **kwargs: True),
        patch.object(backends, "reasons_against_triton", lambda *arguments: []),
    ):
        yield


def set_driver(stub: bool) -> None:
    """Make Triton's driver report an H100. If `stub` is True, Triton's launcher calls the functions of the stub driver."""
    from triton.runtime.driver import driver

    from .._triton.targets import TARGETS

    gpu = TARGETS[ARCH].gpu
    answers = dict(
        get_current_target=lambda: gpu, get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_device_capability=lambda device: (9, 0), set_current_device=lambda device: None,
    )  # fmt: skip
    if not stub:
        driver.set_active(SimpleNamespace(**answers))
        return
    from triton.backends.nvidia.driver import CudaDriver

    with patch.multiple(torch.cuda, current_device=answers["get_current_device"]):
        active = CudaDriver()
    vars(active).update(answers)
    driver.set_active(active)


def measure(ops: list[str], launchers: list[str], rounds: int, seconds: float) -> Iterator[Row]:
    sticks = yardsticks()
    for op in ops:
        for launcher in launchers:
            with launches(launcher):
                calls = operator_calls(SPECS[op])
                for direction, call in calls.items():
                    functions = {"op": call, "sdpa": sticks["sdpa", direction], "function": sticks["function", direction]}
                    for function in functions.values():
                        for _ in range(20):  # compiles kernels and fills caches
                            function()
                    times = in_turns(functions, rounds=rounds, seconds=seconds, clock=time.perf_counter)
                    yield Row(op, direction, launcher, *(1e3 * each.median for each in times.values()))


def profile(op: str, launcher: str, calls: int = 300) -> dict[str, float]:
    """Return the fraction of host time that the forward and backward passes spend in each step, such as "autograd" (see STEPS).

    The overhead of the profiler makes short functions appear slower.
    """
    with launches(launcher):
        call = operator_calls(SPECS[op])["both"]
        for _ in range(20):
            call()
        profiler = cProfile.Profile()
        with profiler:
            for _ in range(calls):
                call()
    found: dict[str, float] = defaultdict(float)
    for (file, _, function), (*_, own, _, _) in pstats.Stats(profiler).stats.items():
        where = file.replace(os.sep, "/") if file != "~" else function
        found[next((step for part, step in STEPS.items() if part in where), "PyTorch and Python")] += own
    total = sum(found.values())
    return {step: own / total for step, own in sorted(found.items(), key=lambda item: -item[1])}


# The process that measures


def work(request: dict[str, Any]) -> None:
    """Run the measurements that `request` describes. Print one JSON object per line: a Row, or an operator with its profile."""
    for name in request["modules"]:
        import_module(name)
    torch.set_num_threads(1)
    stub = "triton" in request["launchers"]
    set_driver(stub)
    for row in measure(request["ops"], request["launchers"], request["rounds"], request["seconds"]):
        print(json.dumps(asdict(row)), flush=True)
    for op in request["ops"] if request["profile"] else ():
        print(json.dumps({"op": op, "steps": profile(op, request["launchers"][-1])}), flush=True)


def c_compiler() -> str | None:
    """Return the path of a C compiler, or None if none is installed."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)


def build_stub(folder: str) -> dict[str, str]:
    """Compile the stub driver into `folder`, and return environment variables that make Triton find only this driver.

    If there is no C compiler, return an empty dict.
    """
    compiler = c_compiler()
    if compiler is None:
        return {}
    target = Path(folder, "libcuda.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1", str(STUB), "-o", target], check=True)
    target.with_name("libcuda.so").symlink_to(target.name)
    paths = filter(None, (folder, os.environ.get("LD_LIBRARY_PATH")))
    return dict(TRITON_LIBCUDA_PATH=folder, LD_LIBRARY_PATH=os.pathsep.join(paths))


@contextmanager
def stub_environment() -> Iterator[tuple[dict[str, str], bool]]:
    """Yield environment variables for a process that compiles kernels but cannot run them, and whether the stub was built."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        stub = build_stub(folder)
        cache = environment.get("TRITON_CACHE_DIR") or str(Path(folder, "cache"))
        yield environment | stub | dict(OMP_NUM_THREADS="1", KINETO_LOG_LEVEL="99", TRITON_CACHE_DIR=cache), bool(stub)


def results(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run `work` in a new process, with the environment variables of stub_environment. Yield the results."""
    with stub_environment() as (environment, stub):
        request = request | dict(launchers=["none", "triton"] if stub else ["none"])
        command = [sys.executable, "-c", f"import json; from {__name__} import work; work(json.loads(input()))"]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.close()
            yield from map(json.loads, process.stdout)
        if process.returncode:
            raise RuntimeError(f"the measuring process ended with status {process.returncode}")


# The command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser.of("vix dev host-time", __doc__)
    ops = [name for name, spec in SPECS.items() if spec.public]
    parser.add_argument("op", nargs="*", metavar="OP", help=f"{', '.join(ops)} (default: all)")
    parser.add_argument("--profile", action="store_true", help="also print the fraction of the time that each step takes")
    parser.add_argument("--rounds", type=within(1, 1000), default=9, help="number of measurements per call (default: 9)")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="also write the rows to this file")
    args = parser.parse_args(argv)
    args.op = args.op or ops
    if unknown := [op for op in args.op if op not in ops]:
        parser.error(f"argument OP: expected one of {', '.join(ops)}, got {unknown[0]!r}")
    return args


def show(rows: list[Row]) -> None:
    """Print a table with a line per operator and direction."""
    launchers = list(dict.fromkeys(row.launcher for row in rows))
    headings = {"triton": ("us", "x attention", "x Function"), "none": ("us without launches", "x attention", "x Function")}
    lines: dict[tuple[str, str], list[str]] = defaultdict(list)
    for launcher in sorted(launchers, reverse=True):
        for row in (row for row in rows if row.launcher == launcher):
            name = row.op, "forward and backward" if row.direction == "both" else row.direction
            lines[name] += f"{row.microseconds:.1f}", f"{row.ratio:.1f}", f"{row.microseconds / row.function:.1f}"
    titles = [title for launcher in sorted(launchers, reverse=True) for title in headings[launcher]]
    print_table(("operator", "pass", *titles), ((*name, *cells) for name, cells in lines.items()))
    if "triton" not in launchers:
        print("There is no C compiler, which Triton's launcher and the stub driver need, so launches were not measured.")


def main(argv: list[str]) -> int:
    args = parse(argv)
    request = dict(ops=args.op, rounds=args.rounds, seconds=0.02, profile=args.profile, modules=sorted(REGISTERING))
    rows, profiles = [], {}
    for each in results(request):
        if "steps" in each:
            profiles[each["op"]] = each["steps"]
        else:
            rows.append(Row(**each))
            progress(f"{rows[-1].op} {rows[-1].direction}")
    progress("")
    show(rows)
    for op, steps in profiles.items():
        print(f"\n{op}, forward and backward")
        print_table(("step", "of the host time"), ((step, f"{fraction:.1%}") for step, fraction in steps.items()))
    if args.csv is not None:
        write_csv(args.csv, map(asdict, rows))
        print(f"wrote {args.csv}")
    return 0
