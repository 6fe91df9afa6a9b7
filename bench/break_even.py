"""Measure the number of tokens at and above which each attention method is faster than softmax attention.

    python -m bench.break_even --output DIR              times on one CPU thread
    python -m bench.break_even --predict --output DIR    predictions for the H100, from machine code

Each method uses the default options of the integrations. Linformer and Fourier mixing cannot replace softmax attention in
models of other libraries, so they use the default options of this library's modules. The baseline is PyTorch's
scaled_dot_product_attention on the same q, k and v. Only the attention function is measured, without linear layers. On a CPU,
each round times all methods in turn, and divides their CPU times by the CPU time of softmax attention. The ratio of a method is
the median over the rounds.

--predict needs no GPU. As in `vix dev roofline OP --shape`, the time of each launch is computed from the machine code and
published peak rates. Each PyTorch kernel counts as a fixed launch overhead. Softmax attention is predicted in the same way,
from the kernel in vix_kernels/measure/flash.py. This kernel has no backward pass, so only forward passes are predicted.
--write updates the table in vix_kernels/measure/break_even.csv.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vix_kernels import fourier_mixing, linformer_attention
from vix_kernels.commands import Parser, print_table, read_csv, write_csv
from vix_kernels.integrations.drop_in import OPS, DropIn
from vix_kernels.measure.break_even import PATH, BreakEven, crossing
from vix_kernels.measure.machine import commit, device_name
from vix_kernels.measure.roofline import GPUS, LAUNCH, Device
from vix_kernels.measure.timing import in_turns
from vix_kernels.nn.core import CORES, Site

HEADS = 3
WIDTHS = (32, 64)
TOKENS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
PREDICTED_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PREDICTED_HEADS, TOTAL_TOKENS = 8, 131072  # batches that fill a GPU, as in `vix dev roofline`
Row = dict[str, Any]


def calls(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Yield the name, the function and the input tensors of each attention method."""
    heads, tokens, width = q.shape[1:]
    yield "softmax", scaled_dot_product_attention, [q, k, v]
    for op in OPS:
        attention = DropIn(op, retrain=True, backend=backend).mounted(Site(width, heads))
        yield op, attention.to(q.device, q.dtype), [q, k, v]
    slots = CORES["linformer"].made("module").num_landmarks
    projections = [(torch.randn(tokens, slots) * slots**-0.5).to(q).requires_grad_() for _ in "kv"]
    yield "linformer", partial(linformer_attention, backend=backend), [q, k, v, *projections]
    x = q.detach().transpose(1, 2).flatten(2).requires_grad_()
    yield "fourier", partial(fourier_mixing, backend=backend), [x]


def measure(width: int, tokens: int, rounds: int) -> Iterator[Row]:
    """Yield a row for each method and direction, with the time per call."""
    repeats = max(1, 1024 // tokens)

    def forward(function: Callable[..., Tensor], leaves: list[Tensor]) -> None:
        with torch.no_grad():
            for _ in range(repeats):
                function(*leaves)

    def full(function: Callable[..., Tensor], leaves: list[Tensor]) -> None:
        for _ in range(repeats):
            out = function(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    q, k, v = (torch.randn(1, HEADS, tokens, width, requires_grad=True) for _ in range(3))
    for direction, run in (("forward", forward), ("full", full)):
        functions = {name: partial(run, function, leaves) for name, function, leaves in calls(q, k, v)}
        times = {name: each.samples for name, each in in_turns(functions, rounds=rounds).items()}
        for name, samples in times.items():
            ratios = sorted(a / b for a, b in zip(samples, times["softmax"], strict=True))
            yield dict(
                op=name, direction=direction, width=width, tokens=tokens, ms=statistics.median(samples) / repeats,
                ratio=statistics.median(ratios), low=ratios[len(ratios) // 5], high=ratios[-1 - len(ratios) // 5],
                device=device_name("cpu"), commit=commit(),
            )  # fmt: skip


def predict(width: int, tokens: int, gpu: Device) -> Iterator[Row]:
    """Yield a row for each method, with the predicted time of its forward pass in bfloat16.

    A method that launches no kernel of this library has no row.
    """
    from vix_kernels.measure.flash import flash_forward
    from vix_kernels.measure.launch_times import committed, predict, row_of
    from vix_kernels.measure.observed import OnMeta, observed

    known, times = committed(), {}
    shape = TOTAL_TOKENS // tokens, PREDICTED_HEADS, tokens, width
    tensors = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(3))
    for name, function, leaves in calls(*tensors, backend="triton"):
        with torch.no_grad(), observed(gpu.arch) as launches, OnMeta() as torch_kernels:
            flash_forward(*leaves, False) if name == "softmax" else function(*leaves)
        if not launches:
            continue
        rows = [row_of(each, gpu.arch, known) for each in launches]
        ours = [predict(each, row.parts, row.warps, gpu).seconds for each, row in zip(launches, rows, strict=True)]
        times[name] = sum(ours) + torch_kernels.launches * LAUNCH
        yield dict(
            op=name, direction="forward", width=width, tokens=tokens, ms=1e3 * times[name],
            ratio=times[name] / times["softmax"], device=gpu.name, commit=commit(),
        )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser.of("python -m bench.break_even", __doc__)
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds per size (default: %(default)s)")
    parser.add_argument("--predict", action="store_true", help="predict the times on an H100 instead of measuring on a CPU")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for times.csv or predicted.csv (default: only print)"
    )
    parser.add_argument("--write", action="store_true", help=f"replace measured or predicted rows in {PATH.name}")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gpu = next(gpu for gpu in GPUS if gpu.name == "H100")
    rows: list[Row] = []
    for width in WIDTHS:
        for tokens in PREDICTED_TOKENS if options.predict else TOKENS:
            rows += predict(width, tokens, gpu) if options.predict else measure(width, tokens, options.rounds)
            print(f"width {width}, {tokens} tokens", file=sys.stderr, flush=True)
            if options.output:
                options.output.mkdir(parents=True, exist_ok=True)
                write_csv(options.output / ("predicted.csv" if options.predict else "times.csv"), rows)
    found = table(rows)
    print_table(("op", "direction", "width", "tokens"), ([e.op, e.direction, str(e.width), e.tokens] for e in found))
    if options.write:
        kept = [each for each in read_csv(PATH, BreakEven) if each.kind != found[0].kind] if PATH.exists() else []
        write_csv(PATH, map(vars, sorted([*kept, *found], key=lambda each: each.kind)))
    return 0


def table(rows: list[Row]) -> list[BreakEven]:
    """Return the break-even length of each method, direction and width."""
    found = []
    for op, direction, width in dict.fromkeys((row["op"], row["direction"], int(row["width"])) for row in rows):
        if op == "softmax":
            continue
        chosen = [row for row in rows if (row["op"], row["direction"], int(row["width"])) == (op, direction, width)]
        ratios = {int(row["tokens"]): float(row["ratio"]) for row in chosen}
        kind = "predicted" if chosen[0]["device"] in {gpu.name for gpu in GPUS} else "measured"
        found.append(
            BreakEven(kind, chosen[0]["device"], chosen[0]["commit"], op, direction, width, crossing(ratios))
        )  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
