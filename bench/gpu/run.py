"""bench/on_gpu.sh: the parts one after the other, each in a process with a time limit, then the files of OUT."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vix_kernels.bench.machine import commit
from vix_kernels.bench.measure import Row, failed

from . import report
from .report import Outcome

ROOT = Path(__file__).resolve().parents[2]
# In the order they run, with their shares of the time. Their places are bits of the exit status.
PARTS = {"compile": 50, "correctness": 45, "timing": 135, "suite": 75, "models": 55, "training": 35, "sanitizer": 40}
TOTAL = 455
GRACE = 10  # to finish what a part has begun when its time is up
USAGE, UNAVAILABLE = 200, 201

HELP = f"""\
Takes everything that a GPU has to say about this checkout, in {TOTAL + GRACE} seconds at most, without installing it:
  compile      every kernel that the later parts launch, by all cores at once
  correctness  kernels at real sizes against float64, repeated, in CUDA graphs, on two streams
  timing       device and wall times of every operator beside plain and compiled PyTorch, FlashAttention and the
               installed peers; memory
  suite        the pytest suite, the kernels first
  models       a training step of every model: images/s, memory
  training     a short training run on each data set at hand
  sanitizer    compute-sanitizer over a small call of each operator

OUT receives summary.md, results.json, timing.csv, models.csv, correctness.csv, pictures.zip and logs.zip. What was left
out, for lack of time, memory or a package, is named there.

Exit status: 0, or the sum of the parts that failed: {", ".join(f"{2**i} {part}" for i, part in enumerate(PARTS))};
{USAGE}: wrong arguments; {UNAVAILABLE}: there is no GPU that the kernels run on, and one sentence says why.

To keep a run, copy OUT to bench/results/<gpu-slug>/<YYYY-MM-DD>-<commit>/, such as bench/results/h100-sxm/2026-01-31-1a2b3c4/,
and commit it: `vix roofline` then prints its times beside the predicted ones.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench/on_gpu.sh", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(USAGE, f"bench/on_gpu.sh: error: {message}\n")  # type: ignore[method-assign]
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results; made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="every part at tiny sizes in Triton's interpreter, on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="run these parts")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"of the whole run (default: {TOTAL})")
    parser.add_argument("--tune", action="store_true", help="spend what time is left on `vix tune`, into OUT/tune.json")
    parser.add_argument("--break", dest="broken", choices=PARTS, metavar="PART", help="crash this part, to see what is left")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "logs").mkdir()
        probe = run("machine", 60, work, args.dry_run)
        if probe.status != "ok":
            print(f"bench/on_gpu.sh: nothing to measure here: {probe.why}")
            return UNAVAILABLE
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"OUT: {error}")
        outcomes = []
        chosen = [part for part in PARTS if part in args.only]
        for at, part in enumerate(chosen):
            # Its share of what is left: what one part does not need is for those after it.
            seconds = (deadline - time.monotonic()) * PARTS[part] / sum(PARTS[each] for each in chosen[at:])
            outcomes.append(run(part, seconds, work, args.dry_run, broken=part == args.broken))
            last = outcomes[-1]
            print(f"{last.part:12} {last.status:8} {last.seconds:4.0f} s  {last.why}", flush=True)
        report.write(args.out, probe.rows[0] | dict(commit=commit(), date=time.strftime("%Y-%m-%d")), outcomes, work)
    if args.tune and deadline > time.monotonic():
        tune(args.out / "tune.json", deadline - time.monotonic(), args.dry_run)
    bad = [each.part for each in outcomes if each.status == "failed"]
    print(f"wrote {args.out}/summary.md" + (f"; FAILED: {', '.join(bad)}" if bad else ""))
    return sum(2**i for i, part in enumerate(PARTS) if part in bad)


def run(part: str, seconds: float, work: Path, dry: bool, broken: bool = False) -> Outcome:
    """One part in its own process; `seconds` are its to plan with, and GRACE later it is stopped."""
    if seconds < 5:
        return Outcome(part, "skipped", "out of time", 0.0, [])
    rows, log = work / f"{part}.jsonl", work / "logs" / f"{part}.txt"
    command = [sys.executable, "-m", "bench.gpu.part", part, "--seconds", str(seconds), "--rows", str(rows)]
    command += ["--dry-run"] * dry + ["--break"] * broken
    start, late = time.monotonic(), False
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=work, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)  # the processes it has started too
            process.wait()
    took = time.monotonic() - start
    found = read(rows)
    text = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    if late:
        return Outcome(part, "failed", f"stopped after {took:.0f} s; its last line: {text}", took, found)
    if process.returncode:
        code = process.returncode
        why = f"exit status {code}: {text}" if code > 0 else f"killed by {signal.Signals(-code).name}, see its log"
        return Outcome(part, "failed", why, took, found)
    wrong = [row for row in found if row["status"] == "failed"]
    if wrong:
        return Outcome(part, "failed", f"{len(wrong)} failed, first: {report.label(wrong[0])}: {wrong[0]['why']}", took, found)
    left = [row for row in found if row["status"] == "skipped"]
    if len(left) == len(found):
        return Outcome(part, "skipped", left[0]["why"] if left else "no rows", took, found)
    return Outcome(part, "ok", f"{len(left)} left out" if left else "", took, found)


def tune(path: Path, seconds: float, dry: bool) -> None:
    """Not a part: it proposes, and what it prints is for whoever asked."""
    command = [sys.executable, "-m", "vix_kernels", "tune", "--seconds", str(seconds), "--output", str(path)]
    try:
        subprocess.run(command + (["--dry-run"] if dry else ["--bits", "16", "--width", "64", "32"]), timeout=seconds + GRACE)
    except subprocess.TimeoutExpired:
        print(f"tune: stopped after {seconds + GRACE:.0f} s; {path} has what it found before")


def read(path: Path) -> list[Row]:
    """The rows that a part has written; a crash may leave half a line."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            found.append(failed(f"half a row: {line[:80]}"))
    return found


if __name__ == "__main__":
    sys.exit(main())
