"""Test the library on random cases for a given time: `make attack ARGS="--minutes 20 --backend triton"`.

    python -m tests.attack --minutes 60                     # test the tiled PyTorch backend, invalid calls and corrupted files
    python -m tests.attack --backend triton                 # test Triton, on the GPU if there is one, else in its interpreter
    python -m tests.attack --only nystrom_attention pack    # test only these ops and file readers
    python -m tests.attack --case "Case(op='linear_attention', magnitude=1e4)"

A violation is an error in the library, such as an inaccurate result or an undocumented exception. The command prints each
violation when it is found, together with the case that reproduces it. At the end, it prints the number of cases for each op,
dtype and backend. The exit code is 1 if there were any violations.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

EXAMPLES = 10  # number of examples drawn from one strategy before moving on to the next


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make attack", description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="duration (default: 10)")
    parser.add_argument("--backend", choices=("torch", "triton"), default="torch", help="backend to attack (default: torch)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device (default: cuda for triton if available, else cpu)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="ops, modules, readers, or 'calls' (default: all)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the first examples (default: the time)")
    parser.add_argument("--case", metavar="REPR", help="run only this Case or Damage")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.device is None:
        import torch

        options.device = "cuda" if options.backend == "triton" and torch.cuda.is_available() else "cpu"
    if options.backend == "triton" and options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is first imported
    warnings.simplefilter("ignore")
    with ExitStack() as stack:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from vix_kernels.measure.interpreter import fast_interpreter

            stack.enter_context(fast_interpreter())
        return attack(options)


def attack(options: argparse.Namespace) -> int:
    from . import calls, files, numerics

    if options.case:
        case = eval(options.case, vars(numerics) | {"Damage": files.Damage, "nan": float("nan"), "inf": float("inf")})
        found = (files if isinstance(case, files.Damage) else numerics).check(case)
        print("\n".join(found) or "no violation")
        return int(bool(found))
    strategies: dict[str, tuple[Any, Callable[[Any], list[str]]]] = {
        op: (numerics.cases(op, options.backend, options.device), numerics.check) for op in numerics.OPS
    }
    if sys.platform == "linux":
        strategies |= {reader: (files.damages(reader), files.check) for reader in files.READERS}
    # Nystrom attention has the most options and is numerically the least stable op, so it gets three times as many cases as
    # the others. File readers do not depend on the backend, so they are tested only with the default backend.
    names = options.only or [*numerics.OPS, "nystrom_attention", "nystrom_attention", "calls"]
    if not options.only and options.backend == "torch":
        names += [name for name in strategies if name not in numerics.OPS]
    if unknown := set(names) - {*strategies, "calls"}:
        print(f"--only: expected some of {', '.join(strategies)} or calls, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    counts: Counter[tuple[str, str, str]] = Counter()
    violated: Counter[str] = Counter()
    if "calls" in names:
        for label, target in calls.targets().items():
            for line in calls.check(label, target):
                violated[label] += 1
                print(line, flush=True)
            counts["calls", label, ""] += 1
        for line in calls.check_double_backward(options.backend):
            violated["double backward"] += 1
            print(line, flush=True)
    end = time.monotonic() + 60 * options.minutes
    seeds = itertools.count(int(time.time()) if options.seed is None else options.seed)
    while time.monotonic() < end and any(name in strategies for name in names):
        for name in names:
            if name not in strategies or time.monotonic() >= end:
                continue
            strategy, check = strategies[name]
            for case in examples(strategy, next(seeds), EXAMPLES // 5 if name in files.SLOW else EXAMPLES):
                found = check(case)
                if isinstance(case, numerics.Case):
                    counts[case.op, case.autocast or case.dtype, case.backend] += 1
                else:
                    counts[case.reader, case.kind, ""] += 1
                if found:
                    violated[name] += 1
                    print(f"{case!r}", *found, sep="\n    ", flush=True)
    for (name, kind, backend), count in sorted(counts.items()):
        print(f"{name:20} {kind:16} {backend:8} {count:6}")
    for name, count in sorted(violated.items()):
        print(f"violated: {name} {count}")
    print(f"{sum(counts.values())} cases, {sum(violated.values())} violations")
    return int(bool(violated))


def examples(strategy: Any, seed: int, number: int) -> Iterator[Any]:
    """Yield up to `number` distinct examples from a strategy. Shrinking is disabled, because it would run a case many times."""
    import hypothesis

    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    yield from dict.fromkeys(found)


if __name__ == "__main__":
    sys.exit(main())
