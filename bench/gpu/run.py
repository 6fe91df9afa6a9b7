"""Test and measure this checkout on a GPU in at most {seconds} seconds, without installing the package. The parts are:
  compile      compile, in parallel, the kernels of the correctness and timing parts
  correctness  check the kernels at realistic sizes: against float64, repeatedly, in CUDA graphs, on two streams
  timing       measure device time, wall time and memory of every operator of this library, and of the same
               operations in plain and compiled PyTorch, FlashAttention and other installed packages
  tune         search for faster launch configurations
  suite        run the operators' tests with pytest, the tests of the kernels first
  models       measure inference and a training step of every model: images/s, memory
  training     train for a short time on each available dataset
  sanitizer    run compute-sanitizer on a small call to each operator

The parts run one after the other, each in a separate process with a time limit. Each part consists of jobs, such as checks or
measurements.

The folder OUT receives summary.md, results.json, timing.csv, models.csv, correctness.csv, tune.csv, logs.zip and pictures.zip.
All except pictures.zip are written after every part, and every {noted} seconds while a part runs. pictures.zip is written at
the end. The summary names everything that was skipped for lack of time, memory or a package. It also names every job whose
process died, for example in a crash. A new process then continues with the next job. If a failed CUDA graph capture makes a
process unusable before the job has a result, the new process first repeats the job without a graph. A part is abandoned if
three processes in a row die before any of their jobs succeeds.

Exit status: 0 on success; {failed} if a part failed or the run was stopped; {usage} for wrong arguments; {unavailable} if the
kernels cannot run on this machine or the GPU has too little memory. With status {unavailable}, the script prints
one line with the reason.

To keep a run, copy OUT to bench/results/<gpu-slug>/<YYYY-MM-DD>-<commit>/, such as bench/results/h100-sxm/2026-01-31-1a2b3c4/,
and commit it. `vix dev roofline` then prints the measured times next to the predicted times.
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

# The parts in the order in which they run, with the relative time that each may use.
PARTS = {
    "compile": 50, "correctness": 45, "timing": 130, "tune": 80, "suite": 70, "models": 55, "training": 35, "sanitizer": 40,
}  # fmt: skip
TOTAL = 520
GRACE = 10  # seconds that a part has after its deadline to finish its job
NOTED = 10  # seconds between reports while a part runs; if this process dies, only the results since the last report are lost
FEWEST = 5  # seconds that must remain to start a process
BARREN = 3  # a part is abandoned if this many processes in a row die without an ok row
INJECTED = ("crash", "kill", "capture", "hang", "error")
FAILED, USAGE, UNAVAILABLE = 1, 200, 201


class Stopped(BaseException):
    """Raised when Ctrl-C or SIGTERM stops the run."""


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
    parser.add_argument("--dry-run", action="store_true", help="run every part at tiny sizes in Triton's interpreter, on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="run only these parts")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"time limit of the run in seconds (default: {TOTAL})")
    parser.add_argument(
        "--inject", nargs="+", type=injection, default=[], metavar="PART=FAILURE",
        help=f"simulate a failure in the second job of a part ({', '.join(INJECTED)}) or in the probe (probe=compiler, "
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
    """Turn SIGTERM and Ctrl-C into Stopped, so that results are written before the run ends."""

    def stop(number: int, frame: Any) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)  # no second interruption while results are written
        raise Stopped(signal.Signals(number).name)

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def measure(args: argparse.Namespace, deadline: float, machine: Row, outcomes: list[Outcome], work: Path) -> None:
    """Run the parts. As results arrive, update `outcomes` and write the files in `args.out`."""
    chosen = [part for part in PARTS if part in args.only]
    for at, part in enumerate(chosen):
        # Each part gets a fraction of the remaining time, so later parts can use the time that earlier parts did not need.
        seconds = (deadline - time.monotonic()) * PARTS[part] / sum(PARTS[each] for each in chosen[at:])

        def note(so_far: Outcome, done: int = at) -> None:
            outcomes[done:] = [so_far]
            report.write(args.out, machine, outcomes, work)

        try:
            note(run(part, seconds, work, args.dry_run, args.inject.get(part, ""), note))
        except Exception as error:  # after an error in this process, the next part still runs
            rows = [row for outcome in outcomes[at:] for row in outcome.rows]
            note(Outcome(part, "failed", f"{type(error).__name__}: {error}", 0.0, rows))
        last = outcomes[-1]
        print(f"{last.part:12} {last.status:8} {last.seconds:4.0f} s  {last.why}", flush=True)


def run(
    part: str, seconds: float, work: Path, dry: bool, inject: str = "", note: Callable[[Outcome], None] = lambda so_far: None
) -> Outcome:
    """Run one part and return the outcome. If a job crashes its process, a new process continues with the next job.

    The deadline is `seconds` seconds after the start. No job starts after it, and a part that is still running GRACE seconds
    later is killed. While the part runs, `note` is called with the outcome so far.
    """
    if seconds < FEWEST:
        return Outcome(part, "skipped", "out of time", 0.0, [])
    start = time.monotonic()
    log, records = work / "logs" / f"{part}.txt", []
    plan, failures, ended = Plan(dry, start + seconds, inject=inject), 0, ""

    def rows(first: int = 0) -> list[Row]:
        return [each for each in records[first:] if isinstance(each, dict)]

    def look() -> None:
        note(Outcome(part, "failed", "still running", time.monotonic() - start, rows()))

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
        if code is None or not jobs:  # out of time, or a new process would also end before its first job
            break
        (number, name), bare = jobs[-1], records[-1] is jobs[-1]  # `bare` is True if the last job has no row
        if code == SPOILED and bare and not plan.eager:
            plan = replace(plan, first=number, eager=True)  # run the same job again, without a CUDA graph
        else:
            if bare or code != SPOILED:
                records.append(failed(ended, job=name))
            plan = replace(plan, first=number + 1, eager=False)
        failures = 0 if any(row["status"] == "ok" for row in rows(before)) else failures + 1
        if failures == BARREN or plan.deadline - time.monotonic() < FEWEST:
            break
        ended = ""
    return outcome_of(part, rows(), ended, time.monotonic() - start)


def process(part: str, plan: Plan, log: Path, receive: Callable[[Any], None], look: Callable[[], None]) -> int | None:
    """Run a part in a new process. Return the exit status, or None if the process is killed GRACE seconds after the deadline.

    `receive` is called with every record that the process sends: the number and name of each job, then the rows of the job.
    `look` is called every NOTED seconds while the process runs.
    """
    end, noted = plan.deadline + GRACE, time.monotonic()
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=serve, args=(part, plan, sender, log))
    child.start()
    sender.close()
    try:
        while (now := time.monotonic()) < end:
            if now - noted > NOTED:
                look()
                noted = now
            try:
                if receiver.poll(min(NOTED, end - now)):
                    receive(receiver.recv())
                elif not child.is_alive() and not receiver.poll():
                    break
            except (EOFError, OSError):  # the process ended, perhaps while it was sending a record
                break
        else:
            return None
        child.join(max(0.0, end - time.monotonic()))
        return child.exitcode
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # also kills the processes it started
        child.kill()  # in case it is not yet the leader of its process group
        child.join()


def how(code: int | None, log: Path) -> str:
    """Return a description of how a process ended."""
    # The process creates the log, so there is no log if the process ended too early.
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    text = (lines or ["no output"])[-1]
    if code is None:
        return f"stopped at the end of its time; last line: {text}"
    return f"exit status {code}: {text}" if code > 0 else f"killed by {signal.Signals(-code).name}, see its log"


def outcome_of(part: str, rows: list[Row], ended: str, seconds: float) -> Outcome:
    """Return the outcome of a part with these rows. `ended` says how the last process failed, or is "" if it succeeded."""
    wrong = [row for row in rows if row["status"] == "failed"]
    if ended or wrong:
        first = f"{len(wrong)} failed, first: {report.label(wrong[0])}: {wrong[0]['why']}" if wrong else ""
        return Outcome(part, "failed", "; ".join(filter(None, (ended, first))), seconds, rows)
    skipped = [row for row in rows if row["status"] == "skipped"]
    if len(skipped) == len(rows):
        return Outcome(part, "skipped", skipped[0]["why"] if skipped else "no rows", seconds, rows)
    return Outcome(part, "ok", f"{len(skipped)} skipped" if skipped else "", seconds, rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Stopped as signalled:  # stopped before the first part
        sys.exit(f"bench/on_gpu.sh: stopped by {signalled}")
