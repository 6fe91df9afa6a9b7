"""Benchmark operators against plain and compiled PyTorch, SDPA and other packages, or models against their original code.

examples:
  vix bench                                                      every operator at several numbers of tokens, fwd and full
  vix bench --op nystrom_attention --sweep tokens --mode fwd,bwd,full --dtype bf16 --output results
  vix bench --op performer_attention --sweep features --values 16 32 64 128 --tokens 4096
  vix bench --models                                             images/s of every model, inference and training
  vix bench --models "hybrid_*" --batch 32

A provider is one implementation of an operator. Its results are checked against float64 results before it is timed. If a
provider returns wrong results, runs out of memory or is not installed, its row contains the reason instead of a time. bench.csv
and bench.json are written to the output folder after every size or model, so an interrupted run keeps its results. At the end,
the time and memory of each operator are plotted in one figure (PNG and SVG). If several operators were measured, one more
figure compares them. On a CPU, times are CPU times of the process. On a GPU, times of operators are device times, and times of
models are wall-clock times. "full" is forward and backward together; backward is full minus forward.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from .. import backends
from ..commands import DTYPES, Parser, print_table, within, write_atomically, write_csv
from . import models
from .machine import commit, facts
from .operators import SIZES, USUAL, USUAL_DTYPE, Effort, Row, measure_alone, outcome
from .pictures import NAMES, draw
from .providers import OURS, providers, public

MODES = {"fwd": "forward", "bwd": "backward", "full": "full"}
SWEEPS = {
    "tokens": {"cpu": (256, 512, 1024, 2048, 4096, 8192), "cuda": (256, 1024, 4096, 16384, 65536)},
    "width": {"cpu": (16, 32, 64, 128), "cuda": (16, 32, 64, 128, 256)},
    "features": {"cpu": (16, 64, 256), "cuda": (16, 32, 64, 128, 256, 512)},
    "batch": {"cpu": (1, 2, 4), "cuda": (1, 2, 4, 8, 16, 32)},
}
FIGURES = {
    "device_ms": "ms", "gbps": "GB/s", "tflops": "TFLOP/s", "roofline": "of the roofline", "peak_mib": "peak MiB",
    "kept_mib": "kept MiB", "error": "error",
}  # fmt: skip
POSITIVE = within(1, 1 << 20)


def main(argv: list[str]) -> int:
    parser = Parser.of("vix bench", __doc__)
    ops = public()
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, metavar="OP", help=", ".join(ops))
    parser.add_argument("--models", nargs="?", const="*", metavar="PATTERN", help="measure models that match PATTERN instead")
    parser.add_argument("--sweep", choices=SWEEPS, default="tokens", help="size to sweep (default: tokens)")
    parser.add_argument("--values", nargs="+", type=POSITIVE, metavar="N", help="swept values (default: depends on the device)")
    parser.add_argument(
        "--mode", type=_modes, default="fwd,full", metavar="LIST", help=f"one or more of {','.join(MODES)} (default: fwd,full)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--provider", nargs="+", metavar="NAME", help="measure only these, such as torch sdpa (default: all)")
    for name in SIZES:
        of = ", ".join(f"{getattr(case, name)} on {device}" for device, case in USUAL.items())
        parser.add_argument(f"--{name}", type=POSITIVE, metavar="N", help=f"{name} unless swept (default: {of})")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if the kernels run on it")
    parser.add_argument("--threads", type=POSITIVE, default=1, metavar="N", help="CPU threads (default: 1, the least noisy)")
    parser.add_argument(
        "--rounds", type=POSITIVE, default=5, metavar="N", help="calls of a provider; ops: only on a CPU (default: 5)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the tables and plots (default: only print)")
    args = parser.parse_args(argv)
    reason = backends.reason_against_gpu()
    if args.device == "cuda" and reason:
        parser.error(f"--device cuda: {reason}")
    device = args.device or ("cpu" if reason else "cuda")
    args.dtype = args.dtype or USUAL_DTYPE[device]
    if device == "cpu":
        torch.set_num_threads(args.threads)
    known = models.PROVIDERS if args.models else sorted({name for op in args.op for name in providers(op, device)})
    if unknown := sorted(set(args.provider or ()) - set(known)):
        parser.error(f"--provider: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    try:
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
        run = models.run(args, device, parser) if args.models else sweep(args, device)
        rows: list[Row] = []
        for measured in run:
            rows += measured
            if args.output:
                save(args.output, rows)
        report(rows, args)
        if args.output:
            if not args.models:
                draw(args.output, rows, args.sweep)
            print(f"wrote {args.output}")
    except OSError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("vix bench: interrupted" + (f"; {args.output} has the results so far" if args.output else ""), file=sys.stderr)
        return 130
    return int(any(row["status"] == "failed" for row in rows))


def _modes(text: str) -> tuple[str, ...]:
    words = text.split(",")
    if unknown := [word for word in words if word not in MODES]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(MODES)}, got {','.join(unknown)!r}")
    return tuple(MODES[word] for word in MODES if word in words)


def sweep(args: argparse.Namespace, device: str) -> Iterator[list[Row]]:
    """Yield one list of rows for each combination of operator and swept value."""
    base = replace(USUAL[device], **{name: value for name in SIZES if (value := getattr(args, name))})
    values = args.values or SWEEPS[args.sweep][device]
    for op in args.op:
        chosen = [name for name in providers(op, device) if not args.provider or name in args.provider]
        for value in values:
            start = time.perf_counter()
            case = replace(base, **{args.sweep: value})
            results = measure_alone(
                op, case, args.dtype, chosen, device, directions=args.mode, effort=Effort(rounds=args.rounds)
            )
            print(f"{op}, {args.sweep} {value:,}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            yield [result.row for result in results]


def save(folder: Path, rows: list[Row]) -> None:
    """Write the rows and the commit to bench.csv and bench.json in `folder`. bench.json also describes the machine."""
    everything = dict(commit=commit(), date=time.strftime("%Y-%m-%d"), **facts(), rows=rows)
    write_csv(folder / "bench.csv", [row | {"commit": commit()} for row in rows])
    write_atomically(folder / "bench.json", lambda path: path.write_text(json.dumps(everything, indent=1) + "\n"))


def report(rows: list[Row], args: argparse.Namespace) -> None:
    """Print the results as a table, then the swept values at which this library is faster than SDPA."""
    if args.models:
        models.report(rows)
        return
    print(f"{rows[0]['device']}, {args.dtype}, commit {commit()}\n")
    print_table(
        ("operator", args.sweep, "mode", "provider", *FIGURES.values()),
        ([row["op"], f"{row[args.sweep]:,}", row["direction"], row["provider"], *outcome(row, FIGURES)] for row in rows),
    )
    print("", *crossings(rows, args.sweep), sep="\n")


def crossings(rows: Iterable[Row], sweep: str) -> Iterator[str]:
    """Yield one line per operator and direction, with the swept values at which this library is faster than SDPA."""
    timed: dict[tuple[str, str], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["status"] == "ok":
            timed[row["op"], row["direction"]][row[sweep]][row["provider"]] = row["device_ms"]
    for (op, direction), by_value in timed.items():
        ours = {
            value: min(times[name] for name in OURS if name in times) < times["sdpa"]
            for value, times in sorted(by_value.items())
            if "sdpa" in times and times.keys() & set(OURS)
        }
        if not ours:
            continue
        losing = [value for value, faster in ours.items() if not faster]
        winning = [value for value in ours if not losing or value > max(losing)]
        where = f"{op}, {NAMES[direction]}: "
        measured = ", ".join(f"{value:,}" for value in ours)
        if not winning:
            yield where + f"not faster than SDPA at {losing[-1]:,} {sweep}, the largest of {measured}"
        elif not losing:
            yield where + f"faster than SDPA at all of {measured} {sweep}"
        else:
            yield where + f"faster than SDPA at {winning[0]:,} {sweep} and above, not at {', '.join(f'{v:,}' for v in losing)}"
