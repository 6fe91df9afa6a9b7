"""Measure all providers (implementations) of one operator at one size: check their results, then time them.

A row is a dictionary. Its "status" is "ok", "failed" (this library raised an error or returned wrong results) or "skipped"
(the provider was not measured). Failed and skipped rows state the reason in "why". Only "ok" rows have times.

On a CPU, calls to the providers alternate and their CPU time is measured, so a change in the speed of the machine affects all
providers equally. On a GPU, the providers are timed one after another.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..commands import DTYPES, figure
from ..testing import SPECS, Case, Problem, draw, kept_for_backward
from .machine import device_name, peaks
from .providers import OURS, Contender, Unavailable, enter
from .roofline import Cost, predict
from .timing import DeviceTime, device_time, in_turns, wall_time

Row = dict[str, Any]
DIRECTIONS = ("forward", "full", "backward")  # full: forward and backward together; backward: full minus forward
# Default dtype and sizes. Most targets in bench/table.py apply to the CPU defaults, but with 4,096 tokens.
USUAL_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
USUAL = {
    "cpu": Case("usual", batch=2, heads=4, tokens=1024, width=64, features=256, taps=33),
    "cuda": Case("usual", batch=8, heads=8, tokens=4096, width=64, features=256, taps=33),
}
SIZES = ("batch", "heads", "tokens", "width", "features")
# GPU calls that take fewer milliseconds than this are also measured in wall-clock time, which includes the host overhead.
WALL_BELOW = 2.0


@dataclass(frozen=True)
class Effort:
    """How much to measure: the number of rounds (CPU), the duration in milliseconds (GPU), and whether to measure memory."""

    rounds: int = 5
    milliseconds: float = 40.0
    memory: bool = True


@dataclass(frozen=True)
class Result:
    """A row, and the times of the calls in milliseconds. `device_ms` in the row is the median of these times.

    For "backward", there are no call times, because `device_ms` is a difference of two medians.
    """

    row: Row
    samples: tuple[float, ...] = field(default=(), repr=False)


def ok(**row: Any) -> Row:
    return {**row, "status": "ok", "why": ""}


def failed(why: str | BaseException, **row: Any) -> Row:
    return {**row, "status": "failed", "why": brief(why)}


def skipped(why: str | BaseException, **row: Any) -> Row:
    return {**row, "status": "skipped", "why": brief(why)}


def outcome(row: Row, names: Iterable[str], digits: int = 3) -> list[str]:
    """Return the table cells of a row for the columns `names`. If the row is not "ok", the first cell contains the reason."""
    if row["status"] == "ok":
        return [figure(row.get(name), digits) for name in names]
    return [row["why"], *("" for _ in list(names)[1:])]


def brief(why: str | BaseException) -> str:
    if isinstance(why, BaseException):
        if out_of_memory(why):
            return "out of memory"
        lines = str(why).strip().splitlines() or [""]
        why = lines[0].strip() if isinstance(why, Unavailable) else f"{type(why).__name__}: {lines[0].strip()}"
    return why[:300]


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: " in str(error)


def alone(device: str, lost: Callable[[str], Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call function(*args, **kwargs) in a separate process, where earlier measurements do not affect it. Return the result.

    On a CPU, one operator can leave the memory allocator in a state that changes the times of the next operator by up to 50%.
    GPU times are not affected, so on a GPU the function is called in this process. It is also called in this process on systems
    that cannot fork. If the system kills the separate process, for example because memory runs out, the result is
    `lost(reason)`, where `reason` is a message.
    """
    if device == "cuda" or "fork" not in multiprocessing.get_all_start_methods():
        return function(*args, **kwargs)
    # The profiler imports torch._dynamo, which takes two seconds. Import it once here instead of in every separate process.
    importlib.import_module("torch._dynamo")
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            return lost("the process was killed, perhaps because memory ran out")


def measure_alone(op: str, case: Case, dtype: str, providers: Iterable[str], device: str, **how: Any) -> list[Result]:
    """Run `measure` in a separate process if `device` is "cpu", or in this process if it is "cuda" (see `alone`)."""
    providers = tuple(providers)

    def lost(why: str) -> list[Result]:
        what, directions = sizes(op, SPECS[op].fit(case), dtype, device), how.get("directions", DIRECTIONS)
        return [Result(skipped(why, **what, provider=name, direction=x)) for name in providers for x in directions]

    return alone(device, lost, measure, op, case, dtype, providers, device, **how)


def measure(
    op: str, case: Case, dtype: str, providers: Iterable[str], device: str, *, directions: Sequence[str] = DIRECTIONS,
    effort: Effort = Effort(), late: Callable[[], bool] = lambda: False,
) -> list[Result]:  # fmt: skip
    """Measure every provider and return one result per provider and direction.

    Args:
        op: a name in `testing.SPECS`.
        case: the sizes, which are adapted to the operator (see OpSpec.fit).
        dtype: "fp16", "bf16" or "fp32".
        providers: names from `providers.providers`.
        device: "cpu" or "cuda".
        directions: a selection of DIRECTIONS.
        effort: how much to measure.
        late: function that is called before each provider. Once it returns True, the remaining providers are skipped.
    """
    spec = SPECS[op]
    case = spec.fit(case)
    what = sizes(op, case, dtype, device)
    providers = tuple(providers)
    try:
        race = Race(draw_problem(op, case, dtype, device), case, dtype, device, effort, late)
    except Exception as error:  # the inputs are too large or cannot be drawn, so no provider can run
        free(device)
        outcome = skipped if out_of_memory(error) else failed
        return [Result(outcome(error, **what, provider=name, direction=x)) for name in providers for x in directions]
    timed = ["forward"] * ("forward" in directions or "backward" in directions) + ["full"] * (set(directions) != {"forward"})
    found: dict[tuple[str, str], Result] = {}
    for direction in timed:
        for name, result in race.run(direction, providers, what).items():
            found[name, direction] = result
    for name in providers if "backward" in directions else ():
        found[name, "backward"] = _difference(found[name, "full"], found[name, "forward"])
    return [found[name, direction] for name in providers for direction in directions]


def sizes(op: str, case: Case, dtype: str, device: str) -> Row:
    return dict(op=op, dtype=dtype, **{name: getattr(case, name) for name in SIZES}, device=device_name(device))


def draw_problem(op: str, case: Case, dtype: str, device: str) -> Problem:
    """Return a problem with normally distributed inputs, random features without gradients, scale=width**-0.5 and eps=1e-6."""
    torch.manual_seed(0)
    problem = draw(SPECS[op], case, DTYPES[dtype], device)
    usual = {"scale": case.width**-0.5, "eps": 1e-6}
    return replace(problem, options={name: usual.get(name, value) for name, value in problem.options.items()})


class Race:
    """Checks and times the providers on one problem."""

    def __init__(self, problem: Problem, case: Case, dtype: str, device: str, effort: Effort, late: Callable[[], bool]) -> None:
        self.problem, self.case, self.dtype, self.device, self.effort, self.late = problem, case, dtype, device, effort, late
        self.contenders: dict[str, Contender] = {}
        self.truth = Truth(problem)

    def run(self, direction: str, providers: Sequence[str], what: Row) -> dict[str, Result]:
        """Check and time the providers. Return the results by provider. The columns in `what` are added to each row."""
        results, calls = {}, {}
        for name in providers:
            label = what | dict(provider=name, direction=direction)
            if self.late():
                results[name] = Result(skipped("out of time", **label))
                continue
            with self.noting(results, label):
                call = self.prepare(name, direction)
                error, why = self.check(call)
                if why:
                    results[name] = Result((failed if name in OURS else skipped)(why, **label, error=error))
                elif self.device == "cpu":
                    calls[name] = call, label | dict(error=error)
                else:
                    time = device_time(call.run, milliseconds=self.effort.milliseconds)
                    results[name] = self.result(call, time, label | dict(error=error))
            if self.device == "cuda":
                self.contenders.pop(name, None)  # frees its memory for the next provider
                free(self.device)
        times = in_turns({name: call.run for name, (call, _) in calls.items()}, rounds=self.effort.rounds)
        for name, (call, label) in calls.items():
            with self.noting(results, label):
                results[name] = self.result(call, times[name], label)
        return results

    @contextmanager
    def noting(self, results: dict[str, Result], label: Row) -> Iterator[None]:
        """Record an error inside the `with` block as the result of the provider in `label`."""
        try:
            yield
        except Exception as problem:
            ours = label["provider"] in OURS and not out_of_memory(problem)
            results[label["provider"]] = Result((failed if ours else skipped)(problem, **label))
            if self.device == "cuda":
                torch.cuda.synchronize()  # raises if a kernel made an illegal memory access

    def prepare(self, name: str, direction: str) -> Call:
        if name not in self.contenders:
            self.contenders[name] = enter(name, self.problem)
        contender = self.contenders[name]
        function, leaves = contender.function, contender.leaves
        wanted = [x for x in leaves if x.requires_grad]

        def forward() -> Any:
            with torch.no_grad():
                return function(*leaves)

        if direction == "forward":
            return Call(contender, forward)
        cotangents = _cotangents(_tuple(forward()))

        def full() -> Any:
            return torch.autograd.grad(function(*leaves), wanted, cotangents)

        return Call(contender, full, cotangents)

    def check(self, call: Call) -> tuple[float | None, str]:
        """Return the relative error against float64 on the first sample of the batch, and a message.

        The error is None if it was not measured. The message is "" unless the error is too large.
        """
        contender, truth = call.contender, self.truth
        got = _tuple(call.run())
        if call.cotangents is None:
            got = [x[:1] for x in contender.shown(got)]
            if contender.tolerance is None:
                exact, plain = truth.exact[0], truth.plain[0]
            else:
                exact, plain = contender.exact(truth.first.double()), ()
        elif contender.tolerance is None:  # the leaves are the tensors of the problem
            names = [each for each, x in self.problem.tensors.items() if x.requires_grad]
            got = [x[:1] for each, x in zip(names, got, strict=True) if each in truth.trained]
            exact, plain = truth.exact[1], truth.plain[1]
        else:  # gradients of peers may have different layouts, so only their outputs are checked
            return None, ""
        eps = torch.finfo(DTYPES[self.dtype]).eps
        worst = 0.0
        for at, (x, y) in enumerate(zip(got, exact, strict=True)):
            size = y.norm().item() or 1.0
            error = (x.double() - y).norm().item() / size
            if contender.tolerance is not None:
                allowed = contender.tolerance + 16 * (eps if self.dtype != "fp32" else 0.0)
            else:
                # The tests are stricter: their factor is 2.
                allowed = 4 * ((plain[at].double() - y).norm().item() / size + eps)
            if not error <= allowed:
                part = "gradient" if call.cotangents is not None else "output"
                return error, f"wrong: {part} {at} has a relative error of {error:.2g}, allowed {allowed:.2g}"
            worst = max(worst, error)
        return worst, ""

    def result(self, call: Call, time: DeviceTime, label: Row) -> Result:
        seconds, direction = time.median / 1e3, label["direction"]
        work = self.work(direction)
        short = self.device == "cuda" and time.median < WALL_BELOW
        figures = dict(
            device_ms=time.median, low_ms=time.low, high_ms=time.high, method=time.method,
            wall_ms=wall_time(call.run) if short else None,
            gbps=work.bytes / seconds / 1e9, tflops=work.flops / seconds / 1e12,
            roofline=predict(work, peaks(self.device), self.dtype)[0] / seconds,
        )  # fmt: skip
        if self.effort.memory:
            figures["peak_mib"] = peak_memory(call.run, self.device) / 2**20
            if direction == "full":
                contender = call.contender
                figures["kept_mib"] = kept_for_backward(contender.function, tuple(contender.leaves)) / 2**20
        return Result(ok(**label, **figures), time.samples)

    def work(self, direction: str) -> Cost:
        """Return the minimum work, assuming that each pass reads every input once and writes every result once."""
        spec, inputs = self.problem.spec, list(self.problem.tensors.values())
        outputs = self.truth.batch * sum(x.nbytes for x in self.truth.plain[0])
        moved, flops, exps = sum(map(_bytes, inputs)) + outputs, spec.flops(self.case), spec.exps(self.case)
        if direction == "full":  # the backward pass computes the same exponentials again
            moved = 2 * moved + sum(_bytes(x) for x in inputs if x.requires_grad)
            flops, exps = round((1 + spec.backward) * flops), 2 * exps
        return Cost(flops, exps, moved, 0)


class Call(NamedTuple):
    """A timed call: the forward pass of a contender and, if `cotangents` is not None, the backward pass."""

    contender: Contender
    run: Callable[[], Any]
    cotangents: list[Tensor] | None = None


class Truth:
    """Reference results for the first sample of the batch: `exact` in float64, `plain` in the precision of the problem.

    Each is a pair of lists: the outputs, and the gradients with respect to the tensors named in `trained`. These tensors have a
    batch dimension and require gradients.
    """

    def __init__(self, problem: Problem) -> None:
        spec, tensors = problem.spec, problem.tensors
        self.batch = tensors[spec.batched[0]].shape[0]
        self.trained = [
            name for name, x in tensors.items() if x.requires_grad and name in spec.batched and len(x) == self.batch
        ]
        self.first = problem.sample(0).map(Tensor.detach)

    @cached_property
    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._solve(self.first.double())

    @cached_property
    def plain(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._solve(self.first)

    def _solve(self, problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
        tensors = {name: x.detach().requires_grad_(name in self.trained) for name, x in problem.tensors.items()}
        outputs = replace(problem, tensors=tensors)(reference=True)
        cotangents = [x.to(y.dtype) for x, y in zip(_cotangents(outputs), outputs, strict=True)]
        grads = torch.autograd.grad(outputs, [tensors[name] for name in self.trained], cotangents)
        return [x.detach() for x in outputs], list(grads)


def _cotangents(outputs: Iterable[Tensor]) -> list[Tensor]:
    """Draw cotangents for one sample and repeat them for all samples, because `Truth` has results for only the first sample."""

    def one(x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(1)
        numbers = torch.randn(x[:1].shape, generator=generator, device=x.device, dtype=torch.float32)
        return numbers.to(x.dtype).expand_as(x).contiguous()

    return [one(x) for x in outputs]


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _bytes(x: Tensor) -> int:
    """Return the number of bytes that a tensor occupies in memory. Repeated elements of an expanded tensor count once."""
    return min(x.nbytes, x.untyped_storage().nbytes())


def _difference(full: Result, forward: Result) -> Result:
    """Return the result for the backward pass. Its time is the time of the full call minus the time of the forward pass."""
    row = full.row | dict(direction="backward")
    if row["status"] != "ok" or forward.row["status"] != "ok":
        return Result(row if row["status"] != "ok" else forward.row | dict(direction="backward"))
    kept = ("op", "dtype", *SIZES, "device", "provider", "method", "error")
    milliseconds = full.row["device_ms"] - forward.row["device_ms"]
    return Result(ok(**{name: row[name] for name in kept}, direction="backward", device_ms=milliseconds))


def peak_memory(function: Callable[[], Any], device: str) -> int:
    """Return the peak memory of a call in bytes, excluding memory that was already allocated before the call."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler writes to the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as log:
        function()
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def free(device: str) -> None:
    """Free the memory of the last measurement."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    else:
        gc.collect(1)  # collecting all generations takes half a second in a large process
