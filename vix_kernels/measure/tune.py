"""Search for faster launch configurations on this GPU.

examples:
  vix dev tune --width 64 --bits 16                16-bit kernels at width 64, for at most ten minutes
  vix dev tune --kernel broadcast_tokens --seconds 60
  vix dev tune --dry-run                           smoke test: one key in Triton's interpreter, with meaningless times

A key is a kernel, an element size in bits and a head width. The search starts from the current configuration of a key and
changes one field at a time. It keeps a change if the new configuration is faster, and ends when no single change gives a faster
configuration. A configuration is rejected ("refused" in the output) if the kernel does not launch, if the results differ from
those of the current configuration, or if a launch spills more registers than any launch with the current configuration.

The command prints one line per key, then the entries for OVERRIDES in vix_kernels/_triton/launch_table.py. Review the entries,
add them to that file by hand, and run `vix dev compile-report` before you commit. The JSON file (--output) is rewritten after
every key. It contains all proposals and all rejected configurations.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .. import conditions
from .._triton import launch
from .._triton.launch_table import INTERPRETER, TABLE, Key, Tile, entries
from ..backends import interpreted, reason_against_gpu
from ..commands import Parser
from ..testing import SPECS, Case, OpSpec, draw
from .costs import DIRECTIONS
from .timing import device_time

DTYPES = {16: torch.bfloat16, 32: torch.float32}
LIMITS = {"slots": (16, 128), "tokens": (8, 256), "num_warps": (1, 8), "num_stages": (1, 4)}
GAIN = 0.98  # a configuration is faster if its time is below this fraction of the best time; smaller gains are noise


@dataclass
class Proposal:
    """The result for one key.

    `use` names the operator and direction of the timed call, which launches the kernel. `present` is the current configuration,
    and `tried` is the number of other configurations that were tried. Times are in milliseconds.
    """

    key: Key
    use: str
    present: Tile
    present_ms: float
    best: Tile
    best_ms: float
    tried: int = 0
    refused: list[str] = field(default_factory=list)  # rejected configurations, each with the reason

    @property
    def better(self) -> bool:
        return self.best != self.present

    def __str__(self) -> str:
        kernel, bits, width = self.key
        found = f"{self.best_ms:.4f} ms with {self.best}" if self.better else "nothing faster"
        return (
            f"{kernel} {bits} bits width {width} ({self.use}): {self.present_ms:.4f} ms, {found}, "
            f"ratio {self.best_ms / self.present_ms:.3f}, {self.tried} tried, {len(self.refused)} refused"
        )


def trial(key: Key, tile: Tile) -> AbstractContextManager[None]:
    """Inside the `with` block, use `tile` for launches that look up `key`."""
    return conditions.under(tiles={**conditions.current.tiles, key: tile})


@contextmanager
def lookups() -> Iterator[dict[Key, None]]:
    """Yield a dict that collects the launch-table keys looked up inside the `with` block. The latest key comes last."""
    asked: dict[Key, None] = {}

    def note(key: Key) -> None:
        asked.pop(key, None)
        asked[key] = None

    with conditions.under(asked=note):
        yield asked


@contextmanager
def spills() -> Iterator[list[int]]:
    """Yield a list that collects the number of spilled registers of each launch in the `with` block.

    In the interpreter, the list stays empty.
    """
    counts: list[int] = []
    if interpreted():
        yield counts
        return

    def observe(kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        with torch.get_device_module(args[0].device).device(args[0].device):
            compiled = kernel[grid](*args, **meta)
        counts.append(compiled.n_spills)

    with conditions.under(observer=observe):
        yield counts


def present_tile(arch: str, key: Key) -> Tile:
    tried = conditions.current.tiles.get(key)
    return tried or (INTERPRETER if arch == "interpreter" else entries(arch)[key])


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Yield tiles that differ from `tile` in one field.

    A number is halved or doubled (num_stages changes by one), or a bool is flipped. A field that is 0 does not change,
    because 0 means that the kernel does not use the field, or keeps no slots or matrices in registers. The precision, which
    is a string, does not change, because the results would differ.
    """
    for name, value in tile._asdict().items():
        if isinstance(value, bool):
            choices: tuple = (not value,)
        elif isinstance(value, int) and value:
            choices = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
            low, high = LIMITS.get(name, (1, 1024))
            choices = tuple(choice for choice in choices if low <= choice <= high)
        else:
            choices = ()
        yield from (tile._replace(**{name: choice}) for choice in choices)


class Bench:
    """Runs one operator in one direction at one size, with the current launch configurations."""

    def __init__(self, spec: OpSpec, direction: str, case: Case, bits: int, device: str) -> None:
        self.use = f"{spec.name}, {'forward' if direction == 'forward' else 'forward and backward'}"
        self.dtype, self.direction, self.device = DTYPES[bits], direction, device
        self.problem = draw(spec, case, self.dtype, device)
        # The cotangents are random, because errors could cancel if all cotangents were equal.
        self.cotangents = [torch.randn_like(x) for x in self.problem(backend="triton")]

    def run(self) -> tuple[Tensor, ...]:
        if self.direction == "forward":
            with torch.no_grad():
                return self.problem(backend="triton")
        return self.problem.gradients(self.problem(backend="triton"), self.cotangents)

    def keys(self) -> set[Key]:
        with lookups() as asked:
            self.run()
        return set(asked)

    def agrees(self, expected: Iterable[Tensor]) -> bool:
        """Return whether the results equal `expected` up to the rounding errors of a different order of summation.

        The relative tolerance is the larger of 1e-5 and twice the machine epsilon of the dtype.
        """
        tolerance = max(2 * torch.finfo(self.dtype).eps, 1e-5)
        return all(
            (x.double() - y.double()).norm() <= tolerance * y.double().norm() for x, y in zip(self.run(), expected, strict=True)
        )


def tune_key(bench: Bench, arch: str, key: Key, deadline: float) -> Proposal:
    """Search for a faster configuration for `key`, and return the result.

    The search moves from the current configuration to faster neighbors, until no neighbor is faster or the deadline has passed.
    """
    present = present_tile(arch, key)
    with spills() as spilled:
        expected = bench.run()
    allowed = max(spilled, default=0)
    time_now = device_time(bench.run).median
    found = Proposal(key, bench.use, present, time_now, present, time_now)
    seen, moved = {present}, True
    while moved:
        moved = False
        for tile in neighbours(found.best):
            if tile in seen or time.monotonic() > deadline:
                continue
            seen.add(tile)
            found.tried += 1
            try:
                with trial(key, tile):
                    with spills() as spilled:
                        if not bench.agrees(expected):
                            raise ValueError("different results")
                    if max(spilled, default=0) > allowed:
                        raise ValueError(f"spills {max(spilled)} registers, the current configuration {allowed}")
                    milliseconds = device_time(bench.run).median
            except Exception as error:  # Triton, the assembler and the driver raise many types of errors
                found.refused.append(f"{tile}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
                if bench.device == "cuda":
                    torch.cuda.synchronize()  # raises after an illegal memory access, from which the process cannot recover
                continue
            if milliseconds < GAIN * found.best_ms:
                found.best, found.best_ms, moved = tile, milliseconds, True
    if found.better:  # time both tiles again, one right after the other, so that drifts of the clock rate affect both
        found.present_ms = device_time(bench.run).median
        with trial(key, found.best):
            found.best_ms = device_time(bench.run).median
        if found.best_ms >= GAIN * found.present_ms:
            found.best, found.best_ms = present, found.present_ms
    return found


@lru_cache(maxsize=1)  # keep only one result, because its tensors need a lot of memory
def users(arch: str, width: int, bits: int, device: str) -> list[tuple[set[Key], Bench]]:
    """Return (keys, bench) for each operator, direction and case. `keys` are the keys that `bench` looks up.

    Pairs with the fewest keys come first. If `device` is "cuda", the inputs are large enough to fill a GPU. Otherwise, they are
    tiny. Operators that raise an error are reported and skipped.
    """
    size = dict(batch=8, heads=8, tokens=4096) if device == "cuda" else dict(batch=1, heads=1, tokens=20)
    # With trained random features, all kernels run. The launch table has separate entries for more than 128 slots.
    cases = Case("tune", **size, features=256, learned=True), Case("tune", **size, features=128)
    found = []
    for spec, direction, case in product(SPECS.values(), DIRECTIONS, cases):
        try:
            case = spec.fit(replace(case, width=width))
            bench = Bench(spec, direction, case, bits, device)
            found.append((bench.keys(), bench))
        except Exception as error:
            print(f"vix dev tune: {spec.name} {direction} does not run: {type(error).__name__}: {error}", file=sys.stderr)
            if device == "cuda":
                torch.cuda.synchronize()  # raises after an illegal memory access, from which the process cannot recover
    return sorted(found, key=lambda user: len(user[0]))


def tune(keys: Iterable[Key], arch: str, device: str, deadline: float) -> Iterator[Proposal]:
    """Yield a proposal for each key until the deadline.

    Each key is tuned with the Bench that looks up this key and the fewest other keys. Keys without a Bench are skipped.
    """
    for key in keys:
        _, bits, width = key
        if time.monotonic() > deadline:
            return
        bench = next((bench for asked, bench in users(arch, width, bits, device) if key in asked), None)
        if bench is not None:
            yield tune_key(bench, arch, key, deadline)


DRY = [("aggregate_forward", 32, 16)]  # the keys that a dry run tunes


def snippet(arch: str, proposals: Iterable[Proposal]) -> str:
    """Return Python code that adds the proposed tiles to OVERRIDES[arch]."""
    lines = (f"    {p.key!r}: {p.best!r},  # {p.best_ms / p.present_ms:.2f} of {p.present!r}" for p in proposals if p.better)
    return "\n".join([f'OVERRIDES["{arch}"] |= {{', *lines, "}"])


def row(proposal: Proposal) -> dict[str, Any]:
    kernel, bits, width = proposal.key
    return dict(
        kernel=kernel, bits=bits, width=width, use=proposal.use,
        present=proposal.present._asdict(), present_ms=proposal.present_ms,
        best=proposal.best._asdict(), best_ms=proposal.best_ms, tried=proposal.tried, refused=proposal.refused,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    kernels, widths = sorted({launch.kernel_name(key[0]) for key in TABLE}), sorted({key[2] for key in TABLE})
    parser = Parser.of("vix dev tune", __doc__)
    parser.add_argument("--kernel", nargs="+", choices=kernels, default=kernels, metavar="KERNEL", help=", ".join(kernels))
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 32), default=[16, 32], help="element sizes (default: both)")
    parser.add_argument("--width", nargs="+", type=int, choices=widths, default=widths, help="head widths (default: all)")
    parser.add_argument("--seconds", type=float, default=600, help="time limit in seconds (default: 600)")
    parser.add_argument("--output", type=Path, default=Path("tune.json"), metavar="PATH", help="JSON file (default: tune.json)")
    parser.add_argument("--dry-run", action="store_true", help="tune one key in Triton's interpreter, on a CPU")
    args = parser.parse_args(argv)
    if args.dry_run:
        arch, gpu, device = "interpreter", "Triton's interpreter", "cpu"
        keys = DRY
    else:
        if reason := reason_against_gpu():
            print(f"vix dev tune: nothing to measure here: {reason}")
            return 0
        arch, gpu, device = launch.architecture(torch.device("cuda", 0)), torch.cuda.get_device_name(), "cuda"
        sizes = product(args.width, args.bits)  # in the requested order, because time may run out
        keys = [
            key for size in sizes for key in entries(arch) if launch.kernel_name(key[0]) in args.kernel and key[:0:-1] == size
        ]

    proposals = []
    for proposal in tune(keys, arch, device, time.monotonic() + args.seconds):
        proposals.append(proposal)
        print(proposal, flush=True)
        found = dict(
            arch=arch, gpu=gpu, torch=torch.__version__, triton=triton.__version__, proposals=list(map(row, proposals))
        )
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(proposals)} of {len(keys)} keys on {gpu}\n\n{snippet(arch, proposals)}")
    return 0
