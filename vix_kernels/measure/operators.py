"""One operator at one size, by everyone who can do it: what comes out is checked, then timed.

A row is a dictionary, with a "status": "ok", "failed" (something of ours is wrong, or gave wrong numbers) or "skipped", and a
"why" for the last two. Only an "ok" row has times.

On a CPU the providers take turns, in CPU time, so that a drift of the machine hits all; on a GPU each has it for itself.
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
from .providers import OURS, Contender, LeftOut, enter
from .roofline import Cost, predict
from .timing import DeviceTime, device_time, in_turns, wall_time

Row = dict[str, Any]
DIRECTIONS = ("forward", "full", "backward")  # full: forward and backward; backward: the difference
# What is measured where nothing else is asked for; the CPU's are the dtype and the sizes of its budgets.
USUAL_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
USUAL = {
    "cpu": Case("usual", batch=2, heads=4, tokens=1024, width=64, features=256, taps=33),
    "cuda": Case("usual", batch=8, heads=8, tokens=4096, width=64, features=256, taps=33),
}
SIZES = ("batch", "heads", "tokens", "width", "features")
WALL_BELOW = 2.0  # milliseconds on a GPU: the host's overhead shows in short calls


@dataclass(frozen=True)
class Effort:
    """How long to measure: calls of each provider in turns on a CPU, milliseconds of each on a GPU; whether memory, too."""

    rounds: int = 5
    milliseconds: float = 40.0
    memory: bool = True


@dataclass(frozen=True)
class Result:
    """A row, and the times of the single calls behind its median."""

    row: Row
    samples: tuple[float, ...] = field(default=(), repr=False)


def ok(**row: Any) -> Row:
    return {**row, "status": "ok", "why": ""}


def failed(why: str | BaseException, **row: Any) -> Row:
    return {**row, "status": "failed", "why": brief(why)}


def skipped(why: str | BaseException, **row: Any) -> Row:
    return {**row, "status": "skipped", "why": brief(why)}


def outcome(row: Row, names: Iterable[str], digits: int = 3) -> list[str]:
    """The cells of these figures, or why there are none."""
    if row["status"] == "ok":
        return [figure(row.get(name), digits) for name in names]
    return [row["why"], *("" for _ in list(names)[1:])]


def brief(why: str | BaseException) -> str:
    if isinstance(why, BaseException):
        if out_of_memory(why):
            return "out of memory"
        lines = str(why).strip().splitlines() or [""]
        why = lines[0].strip() if isinstance(why, LeftOut) else f"{type(why).__name__}: {lines[0].strip()}"
    return why[:300]


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: " in str(error)


def alone(device: str, lost: Callable[[str], Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) in a process of its own, so that no result depends on what was measured before it.

    What an allocator has learned from one operator changes the times of the next, by up to a half. A process that the system
    kills, for lack of memory say, gives lost(why). On a GPU, which knows nothing of that, and where processes cannot fork, it
    is a plain call.
    """
    if device == "cuda" or "fork" not in multiprocessing.get_all_start_methods():
        return function(*args, **kwargs)
    importlib.import_module("torch._dynamo")  # here once, not in every process: the profiler takes two seconds to import it
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            return lost("the process was killed, for lack of memory perhaps")


def measure_alone(op: str, case: Case, dtype: str, providers: Iterable[str], device: str, **how: Any) -> list[Result]:
    """`measure`, in a process of its own."""
    providers = tuple(providers)

    def lost(why: str) -> list[Result]:
        what, directions = sizes(op, SPECS[op].fit(case), dtype, device), how.get("directions", DIRECTIONS)
        return [Result(skipped(why, **what, provider=name, direction=x)) for name in providers for x in directions]

    return alone(device, lost, measure, op, case, dtype, providers, device, **how)


def measure(
    op: str, case: Case, dtype: str, providers: Iterable[str], device: str, *, directions: Sequence[str] = DIRECTIONS,
    effort: Effort = Effort(), late: Callable[[], bool] = lambda: False,
) -> list[Result]:  # fmt: skip
    """Every provider's rows, one a direction.

    Args:
        op: a name in `testing.SPECS`.
        case: its sizes.
        dtype: "fp16", "bf16" or "fp32".
        providers: see `providers.providers`.
        device: "cpu" or "cuda".
        directions: some of DIRECTIONS.
        effort: how long.
        late: asked before each provider; once it is true the rest is skipped.
    """
    spec = SPECS[op]
    case = spec.fit(case)
    what = sizes(op, case, dtype, device)
    providers = tuple(providers)
    try:
        race = Race(draw_problem(op, case, dtype, device), case, dtype, device, effort, late)
    except Exception as error:  # before any provider has its turn: too large, or no inputs of these sizes
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
    """Normal numbers. Random features are fixed, since nobody trains them; scale and eps are those that people use."""
    torch.manual_seed(0)
    problem = draw(SPECS[op], case, DTYPES[dtype], device)
    usual = {"scale": case.width**-0.5, "eps": 1e-6}
    return replace(problem, options={name: usual.get(name, value) for name, value in problem.options.items()})


class Race:
    """The providers of one problem."""

    def __init__(self, problem: Problem, case: Case, dtype: str, device: str, effort: Effort, late: Callable[[], bool]) -> None:
        self.problem, self.case, self.dtype, self.device, self.effort, self.late = problem, case, dtype, device, effort, late
        self.contenders: dict[str, Contender] = {}
        self.truth = Truth(problem)

    def run(self, direction: str, providers: Sequence[str], what: Row) -> dict[str, Result]:
        """A result of each provider."""
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
                self.contenders.pop(name, None)  # what it holds is in the next one's way
                free(self.device)
        times = in_turns({name: call.run for name, (call, _) in calls.items()}, rounds=self.effort.rounds)
        for name, (call, label) in calls.items():
            with self.noting(results, label):
                results[name] = self.result(call, times[name], label)
        return results

    @contextmanager
    def noting(self, results: dict[str, Result], label: Row) -> Iterator[None]:
        """What goes wrong inside becomes the provider's result."""
        try:
            yield
        except Exception as problem:
            ours = label["provider"] in OURS and not out_of_memory(problem)
            results[label["provider"]] = Result((failed if ours else skipped)(problem, **label))
            if self.device == "cuda":
                torch.cuda.synchronize()  # an illegal access ends it all here, with its reason

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
        """How far its results are from float64's, relative, on the first sample of the batch; and what is wrong with that."""
        contender, truth = call.contender, self.truth
        got = _tuple(call.run())
        if call.cotangents is None:
            got = [x[:1] for x in contender.shown(got)]
            if contender.tolerance is None:
                exact, plain = truth.exact[0], truth.plain[0]
            else:
                exact, plain = contender.exact(truth.first.double()), ()
        elif contender.tolerance is None:  # its leaves are the problem's
            names = [each for each, x in self.problem.tensors.items() if x.requires_grad]
            got = [x[:1] for each, x in zip(names, got, strict=True) if each in truth.trained]
            exact, plain = truth.exact[1], truth.plain[1]
        else:  # a peer's gradients are not compared, in whatever layout they are: its outputs have been
            return None, ""
        eps = torch.finfo(DTYPES[self.dtype]).eps
        worst = 0.0
        for at, (x, y) in enumerate(zip(got, exact, strict=True)):
            size = y.norm().item() or 1.0
            error = (x.double() - y).norm().item() / size
            if contender.tolerance is not None:
                allowed = contender.tolerance + 16 * (eps if self.dtype != "fp32" else 0.0)
            else:
                allowed = 4 * ((plain[at].double() - y).norm().item() / size + eps)  # the tests have the exact budget, 2
            if not error <= allowed:
                part = "gradient" if call.cotangents is not None else "output"
                return error, f"wrong: {part} {at} is {error:.2g} off, allowed {allowed:.2g}"
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
        """What the operator must do at least, whoever does it: every input and every result moves once in a pass."""
        spec, inputs = self.problem.spec, list(self.problem.tensors.values())
        outputs = self.truth.batch * sum(x.nbytes for x in self.truth.plain[0])
        moved, passes = sum(map(_bytes, inputs)) + outputs, 1.0
        if direction == "full":
            moved = 2 * moved + sum(_bytes(x) for x in inputs if x.requires_grad)
            passes += spec.backward
        return Cost(round(passes * spec.flops(self.case)), round(passes * spec.exps(self.case)), moved, 0)


class Call(NamedTuple):
    """What is timed: a contender's forward, or with cotangents its forward and backward, which gives gradients."""

    contender: Contender
    run: Callable[[], Any]
    cotangents: list[Tensor] | None = None


class Truth:
    """The operator's reference on the first sample: in float64, and in the problem's precision, which has its error.

    Each is (outputs, gradients of `trained`), the tensors that have a batch.
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
    """One sample's for all samples, so that the first sample's are those of a batch of one."""

    def one(x: Tensor) -> Tensor:
        generator = torch.Generator(x.device).manual_seed(1)
        numbers = torch.randn(x[:1].shape, generator=generator, device=x.device, dtype=torch.float32)
        return numbers.to(x.dtype).expand_as(x).contiguous()

    return [one(x) for x in outputs]


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _bytes(x: Tensor) -> int:
    """What is expanded lies in memory once."""
    return min(x.nbytes, x.untyped_storage().nbytes())


def _difference(full: Result, forward: Result) -> Result:
    """The backward's row."""
    row = full.row | dict(direction="backward")
    if row["status"] != "ok" or forward.row["status"] != "ok":
        return Result(row if row["status"] != "ok" else forward.row | dict(direction="backward"))
    left = ("op", "dtype", *SIZES, "device", "provider", "method", "error")
    milliseconds = full.row["device_ms"] - forward.row["device_ms"]
    return Result(ok(**{name: row[name] for name in left}, direction="backward", device_ms=milliseconds))


def peak_memory(function: Callable[[], Any], device: str) -> int:
    """Bytes that a call allocates at its highest, beyond what is there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as log:
        function()
    events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def free(device: str) -> None:
    """What the last measurement held."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    else:
        gc.collect(1)  # all generations take half a second in a large process
