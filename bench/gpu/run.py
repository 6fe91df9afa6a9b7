"""Collects all GPU measurements of this checkout, in {seconds} seconds at most, without installing it:
  compile      every kernel that the later parts launch, by all cores at once
  correctness  kernels at real sizes against float64, repeated, in CUDA graphs, on two streams
  timing       device and wall times of every operator, plain and compiled PyTorch, FlashAttention and the
               installed peers; memory
  tune         faster launch configurations
  suite        the pytest suite, the kernels first
  models       a training step of every model: images/s, memory
  training     a short training run on each available data set
  sanitizer    compute-sanitizer over a small call of each operator

OUT receives summary.md, results.json, timing.csv, models.csv, correctness.csv, tune.csv, logs.zip and pictures.zip. They are
written after every part, and every {noted} seconds while one runs; the pictures come last. What was skipped, for lack of time,
memory or a package, is named there. A job that ends its process (a crash, a CUDA graph that cannot be captured) is named, and
its part continues with the next one.

Exit status: 0; {failed}: a part failed or the run was stopped; {usage}: wrong arguments; {unavailable}: the kernels cannot run
here, and one sentence says why.

To keep a run, copy OUT to bench/results/<gpu-slug>/<YYYY-MM-DD>-<commit>/, such as bench/results/h100-sxm/2026-01-31-1a2b3c4/,
and commit it: `vix dev roofline` then prints its times next to the predicted ones.

The parts run one after the other, each in a process with a time limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from vix_kernels.commands import Parser
from vix_kernels.measure.machine import commit
from vix_kernels.measure.operators import Row, failed

from . import report
from .part import SPOILED, Plan, serve
from .report import Outcome

# In the order they run, each with its fraction of the time.
PARTS = {
    "compile": 50, "correctness": 45, "timing": 130, "tune": 80, "suite": 70, "models": 55, "training": 35, "sanitizer": 40,
}  # fmt: skip
TOTAL = 520
GRACE = 10  # to finish what a part has begun when its time is up
NOTED = 10  # seconds between two looks at the rows of a part that runs: at most these are lost with this process
FEWEST = 5  # seconds; with less left nothing is started
BARREN = 3  # processes of a part that end early without one good row: it is given up
INJECTED = ("crash", "kill", "capture", "hang", "error")
FAILED, USAGE, UNAVAILABLE = 1, 200, 201


class Stopped(BaseException):
    """The run was told to end: by Ctrl-C or SIGTERM."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder, stopping():
        work = Path(folder)
        (work / "logs").mkdir()
        probe = run("probe", 60, work, args.dry_run, args.inject.get("probe", ""))
        if probe.status != "ok":
            print(f"bench/on_gpu.sh: nothing to measure here: {probe.why}")
            return UNAVAILABLE
        if lacking := probe.rows[0]["lacking"]:
            print(f"bench/on_gpu.sh: skipped: {lacking}", flush=True)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "summary.md").write_text("nothing yet\n")
        except OSError as error:
            print(f"bench/on_gpu.sh: error: OUT: {error}", file=sys.stderr)
            return USAGE
        machine = probe.rows[0] | dict(commit=commit(), date=time.strftime("%Y-%m-%d"))
        outcomes: list[Outcome] = []
        stopped = False
        try:
            measure(args, deadline, machine, outcomes, work)
        except Stopped as signalled:
            stopped = True
            print(f"stopped by {signalled}", flush=True)
        finally:
            print(report.write(args.out, machine, outcomes, work))
            bad = [each.part for each in outcomes if each.status == "failed"]
            for each in outcomes:
                print(f"{each.part:12} {each.status:8} {each.seconds:4.0f} s  {each.why}")
            print(f"wrote {args.out}/summary.md" + (f"; FAILED: {', '.join(bad)}" if bad else ""), flush=True)
        if why := report.write_pictures(args.out, outcomes, work):
            print(f"not written: {why}")
    return FAILED if bad or stopped else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    numbers = dict(seconds=TOTAL + GRACE, noted=NOTED, failed=FAILED, usage=USAGE, unavailable=UNAVAILABLE)
    parser = Parser.of("bench/on_gpu.sh", (__doc__ or "").format(**numbers))
    parser.error = lambda message: parser.exit(USAGE, f"bench/on_gpu.sh: error: {message}\n")  # type: ignore[method-assign]
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results; created if missing")
    parser.add_argument("--dry-run", action="store_true", help="every part at tiny sizes in Triton's interpreter, on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="run these parts")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"of the whole run (default: {TOTAL})")
    parser.add_argument(
        "--inject", nargs="+", type=injection, default=[], metavar="PART=FAILURE",
        help=f"let the second job of a part meet a failure ({', '.join(INJECTED)}), or the probe (probe=compiler, "
        "probe=kernel), to see which results survive",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.inject = dict(args.inject)
    return args


def injection(text: str) -> tuple[str, str]:
    part, _, failure = text.partition("=")
    if part == "probe" and failure in ("compiler", "kernel") or part in PARTS and failure in INJECTED:
        return part, failure
    raise argparse.ArgumentTypeError(f"expected PART=FAILURE, got {text!r}")


@contextmanager
def stopping() -> Iterator[None]:
    """Turns SIGTERM and Ctrl-C into Stopped, so that what was measured is written."""

    def stop(number: int, frame: Any) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)  # what is written now is not interrupted again
        raise Stopped(signal.Signals(number).name)

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def measure(args: argparse.Namespace, deadline: float, machine: Row, outcomes: list[Outcome], work: Path) -> None:
    """Run the parts; outcomes grow, and OUT with them."""
    chosen = [part for part in PARTS if part in args.only]
    for at, part in enumerate(chosen):
        # Its fraction of the remaining time: later parts get what one part does not need.
        seconds = (deadline - time.monotonic()) * PARTS[part] / sum(PARTS[each] for each in chosen[at:])

        def note(so_far: Outcome, done: int = at) -> None:
            outcomes[done:] = [so_far]
            report.write(args.out, machine, outcomes, work)

        try:
            note(run(part, seconds, work, args.dry_run, args.inject.get(part, ""), note))
        except Exception as error:  # of this process: the part is lost, the others are not
            rows = [row for outcome in outcomes[at:] for row in outcome.rows]
            note(Outcome(part, "failed", f"{type(error).__name__}: {error}", 0.0, rows))
        last = outcomes[-1]
        print(f"{last.part:12} {last.status:8} {last.seconds:4.0f} s  {last.why}", flush=True)


def run(
    part: str, seconds: float, work: Path, dry: bool, inject: str = "", note: Callable[[Outcome], None] = lambda so_far: None
) -> Outcome:
    """One part; after a job that ends its process, a new process continues with the next job.

    `seconds` are the part's to plan with; GRACE later it is stopped. `note` receives what there is while it runs.
    """
    if seconds < FEWEST:
        return Outcome(part, "skipped", "out of time", 0.0, [])
    start = time.monotonic()
    log, records = work / "logs" / f"{part}.txt", []
    plan, barren, ended = Plan(dry, start + seconds, inject=inject), 0, ""

    def rows(first: int = 0) -> list[Row]:
        return [each for each in records[first:] if isinstance(each, dict)]

    def look() -> None:
        note(Outcome(part, "failed", "it was still running", time.monotonic() - start, rows()))

    while True:
        before = len(records)
        try:
            code = process(part, plan, log, records.append, look)
        except Stopped:
            look()
            raise
        if code == 0:
            break
        ended = how(code, log)
        jobs = [each for each in records[before:] if not isinstance(each, dict)]
        if code is None or not jobs:  # out of time, or before its first job: a new process would do the same
            break
        (number, name), bare = jobs[-1], records[-1] is jobs[-1]  # bare: without a row
        if code == SPOILED and bare and not plan.eager:
            plan = replace(plan, first=number, eager=True)  # the same job once more, without a CUDA graph
        else:
            if bare or code != SPOILED:
                records.append(failed(ended, job=name))
            plan = replace(plan, first=number + 1, eager=False)
        barren = 0 if any(row["status"] == "ok" for row in rows(before)) else barren + 1
        if barren == BARREN or plan.deadline - time.monotonic() < FEWEST:
            break
        ended = ""
    return judged(part, rows(), ended, time.monotonic() - start)


def process(part: str, plan: Plan, log: Path, receive: Callable[[Any], None], look: Callable[[], None]) -> int | None:
    """The exit status of a process for a part, None where it was killed GRACE after its deadline.

    `receive` gets what it sends: rows, and before those of a job its number and name. `look` is called every NOTED seconds
    while it runs.
    """
    end, noted = plan.deadline + GRACE, time.monotonic()
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=serve, args=(part, plan, theirs, log))
    child.start()
    theirs.close()
    try:
        while (now := time.monotonic()) < end:
            if now - noted > NOTED:
                look()
                noted = now
            try:
                if ours.poll(min(NOTED, end - now)):
                    receive(ours.recv())
                elif not child.is_alive() and not ours.poll():
                    break
            except EOFError:
                break
        else:
            return None
        child.join(max(0.0, end - time.monotonic()))
        return child.exitcode
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # the processes it has started too
        child.kill()  # also before it leads a group of its own
        child.join()


def how(code: int | None, log: Path) -> str:
    """How a process ended."""
    text = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    if code is None:
        return f"stopped at the end of its time; its last line: {text}"
    return f"exit status {code}: {text}" if code > 0 else f"killed by {signal.Signals(-code).name}, see its log"


def judged(part: str, rows: list[Row], ended: str, seconds: float) -> Outcome:
    """The outcome of a part with these rows; ended: how its last process ended, if not as it should."""
    wrong = [row for row in rows if row["status"] == "failed"]
    if ended or wrong:
        first = f"{len(wrong)} failed, first: {report.label(wrong[0])}: {wrong[0]['why']}" if wrong else ""
        return Outcome(part, "failed", "; ".join(filter(None, (ended, first))), seconds, rows)
    left = [row for row in rows if row["status"] == "skipped"]
    if len(left) == len(rows):
        return Outcome(part, "skipped", left[0]["why"] if left else "no rows", seconds, rows)
    return Outcome(part, "ok", f"{len(left)} skipped" if left else "", seconds, rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Stopped as signalled:  # before the first part
        sys.exit(f"bench/on_gpu.sh: stopped by {signalled}")
