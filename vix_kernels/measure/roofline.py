"""Predict the time of operators on GPUs. No GPU is needed.

examples:
  vix dev roofline performer_attention --shape 128,4,1024,32,110 --gpu H100   each launch of one call, from its machine code
  vix dev roofline                                        every operator, bfloat16, all GPUs, from published peak rates
  vix dev roofline --op performer_attention --gpu H100    one line per shape
  vix dev roofline --csv roofline.csv --plot roofline.png

With OP and --shape, the prediction for each launch is the longest of these times: bytes divided by memory bandwidth,
instructions divided by the rate of the unit that executes them, and 2 microseconds, the assumed interval between kernels. The
instruction counts come from the committed table of `vix dev compile-report`. Kernels that are not in this table are compiled.
--calibrate compares such predictions with published times of FlashAttention on the H100.

Without OP, a table shows the minimum time of all operators, or of those in --op, computed from published peak rates. gflop,
mexp and mbyte are the minimum work of a call (10^9 FLOPs, 10^6 exponentials, 10^6 bytes). predicted_us is the longest of four
times: bytes divided by memory bandwidth, FLOPs divided by the rate of the matrix units, exponentials divided by the rate of the
special-function units, and 2 microseconds per launch. bound_by names the longest of these times. measured_us is the time in the
newest run of bench/on_gpu.sh that measured this shape, or empty if there is no such run. The runs are read from the folder
--results. The prediction is a lower bound, not the time that a call takes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, fields, replace
from itertools import product
from pathlib import Path

from ..commands import DTYPES, Parser, figure, markdown, print_table, write_atomically, write_csv
from ..testing import SPECS, Case

LAUNCH = 2e-6  # seconds between successive kernels in a stream; an assumption, because vendors do not publish it
RESULTS = Path("bench", "results")


@dataclass(frozen=True)
class Device:
    """Peak rates of a device. For GPUs, they are the published rates without sparsity.

    Attributes:
        name: short name.
        device: the result of `torch.cuda.get_device_name` for the variant of the GPU that has these rates.
        arch: architecture, such as "sm_90".
        matrix: FLOP/s of 16-bit matrix products with float32 accumulators.
        tf32: FLOP/s of TensorFloat32 matrix products.
        float32: FLOP/s of float32 matrix products.
        bandwidth: memory bandwidth in bytes/s.
        exps: exponentials/s, assuming 16 per clock cycle per multiprocessor (per compute unit on AMD).
    """

    name: str
    device: str
    arch: str
    matrix: float
    tf32: float
    float32: float
    bandwidth: float
    exps: float

    def flops(self, dtype: str) -> float:
        """Return the peak FLOP/s of matrix products in `dtype`.

        For "fp32", this is the larger of `float32` and `tf32` / 3, because three TF32 products can replace a float32 product.
        """
        return self.matrix if dtype != "fp32" else max(self.tf32 / 3, self.float32)


# Sources of the matrix rates and bandwidths: NVIDIA's data sheets for the A100 (80 GB SXM), H100 (SXM) and H200 (SXM), the Ada
# white paper (RTX 4090), and AMD's data sheet for the MI300X. Exponentials: 16 x multiprocessors x boost clock, from the
# throughput table in the CUDA programming guide. FlashAttention-3 (arXiv:2407.08608) also states 3.9e12 for the H100.
# A compute unit of CDNA 3 executes transcendental functions on a quarter of its 64 lanes per clock cycle.
GPUS = (
    Device("A100", "NVIDIA A100-SXM4-80GB", "sm_80", 312e12, 156e12, 19.5e12, 2.039e12, 16 * 108 * 1.41e9),
    Device("H100", "NVIDIA H100 80GB HBM3", "sm_90", 989.4e12, 494.7e12, 66.9e12, 3.35e12, 16 * 132 * 1.83e9),
    Device("H200", "NVIDIA H200", "sm_90", 989.4e12, 494.7e12, 66.9e12, 4.8e12, 16 * 132 * 1.83e9),
    Device("RTX 4090", "NVIDIA GeForce RTX 4090", "sm_89", 165.2e12, 82.6e12, 82.6e12, 1.008e12, 16 * 128 * 2.52e9),
    Device("MI300X", "AMD Instinct MI300X", "gfx942", 1307.4e12, 653.7e12, 163.4e12, 5.3e12, 16 * 304 * 2.1e9),
)


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are in microseconds. `measured_us` is None if no results file contains the shape."""

    op: str
    direction: str
    dtype: str
    batch: int
    heads: int
    tokens: int
    width: int
    features: int
    gpu: str
    gflop: float
    mexp: float
    mbyte: float
    launches: int
    predicted_us: float
    bound_by: str
    measured_us: float | None = None


COLUMNS = [each.name for each in fields(Row)]


@dataclass(frozen=True)
class Cost:
    """The minimum work that a call to an operator requires.

    Attributes:
        flops: floating-point operations of the matrix products, in the dtype of the tokens. A multiply-add counts as two.
        exps: number of exponentials.
        bytes: memory traffic, if each registered operator in the call reads its inputs and writes its outputs once.
        launches: number of kernels, including PyTorch's kernels, such as fills, casts and sums.
    """

    flops: int
    exps: int
    bytes: int
    launches: int


def shapes() -> Iterator[Case]:
    """Yield the shapes for predictions and measurements: batches with 131,072 tokens in total, and batches of one sample."""
    for tokens in (256, 1024, 4096, 16384, 65536):
        yield Case(f"{tokens}", batch=131072 // tokens, heads=8, tokens=tokens, width=64, features=256)
    for tokens in (1024, 16384):
        yield Case(f"{tokens}_narrow", batch=131072 // tokens, heads=4, tokens=tokens, width=32, features=110)
    for tokens in (256, 4096, 65536):
        yield Case(f"{tokens}_single", batch=1, heads=8, tokens=tokens, width=64, features=256)


def predict(cost: Cost, gpu: Device, dtype: str) -> tuple[float, str]:
    """Return the predicted time in seconds and the resource that limits it: "memory", "matrix", "exp" or "launch"."""
    return max(
        (cost.bytes / gpu.bandwidth, "memory"),
        (cost.flops / gpu.flops(dtype), "matrix"),
        (cost.exps / gpu.exps, "exp"),
        (cost.launches * LAUNCH, "launch"),
    )


def rows(ops: Iterable[str], gpus: Iterable[Device], dtypes: Iterable[str]) -> Iterator[Row]:
    from .costs import DIRECTIONS, cost

    gpus = tuple(gpus)
    for op, dtype, shape, direction in product(ops, dtypes, shapes(), DIRECTIONS):
        case = SPECS[op].fit(shape)
        costs = {arch: cost(SPECS[op], case, DTYPES[dtype], direction, arch) for arch in {gpu.arch for gpu in gpus}}
        for gpu in gpus:
            each = costs[gpu.arch]
            seconds, bound = predict(each, gpu, dtype)
            yield Row(
                op, direction, dtype, case.batch, case.heads, case.tokens, case.width, case.features, gpu.name,
                each.flops / 1e9, each.exps / 1e6, each.bytes / 1e6, each.launches, 1e6 * seconds, bound,
            )  # fmt: skip


KEY = COLUMNS[:9]  # the columns up to `gpu`


def measured(folder: Path) -> dict[tuple[str, ...], float]:
    """Return the newest measured times of operators with the Triton backend, in microseconds, indexed by the KEY columns."""
    names = {gpu.device: gpu.name for gpu in GPUS}
    found: dict[tuple[str, ...], float] = {}
    for path in sorted(folder.glob("*/*/timing.csv"), key=lambda path: path.parent.name):  # <gpu>/<date>-<commit>
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                if line["provider"] == "triton" and line["device_ms"] and line["device"] in names:
                    line["gpu"] = names[line["device"]]
                    found[tuple(line[name] for name in KEY)] = 1e3 * float(line["device_ms"])
    return found


def with_measured(table: Iterable[Row], folder: Path) -> Iterator[Row]:
    times = measured(folder)
    for row in table:
        yield replace(row, measured_us=times.get(tuple(str(getattr(row, name)) for name in KEY)))


# The command


NOTE = "Predicted times come from published peak rates, not from measurements."


def plot(path: Path, table: list[Row], format: str) -> None:
    """Plot time against the number of tokens, with a panel per operator and direction and a color per GPU.

    Dashed lines show predicted times, and dots show measured times.
    """
    from matplotlib.figure import Figure

    chosen = [row for row in table if row.width == 64 and row.batch * row.tokens == 131072]
    dtypes = list(dict.fromkeys(row.dtype for row in chosen))
    panels = list(dict.fromkeys((row.op, row.direction) for row in chosen))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(7, 3.5 * columns), 3.2 * lines + 1), dpi=120, layout="constrained")
    figure.suptitle(f"131,072 tokens, 8 heads, width 64, 256 features, {dtypes[0]}\npredicted (dashed), measured (dots)")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    for panel, (op, direction) in zip(axes, panels, strict=False):
        for at, gpu in enumerate(dict.fromkeys(row.gpu for row in chosen)):
            line = [r for r in chosen if (r.op, r.direction, r.gpu, r.dtype) == (op, direction, gpu, dtypes[0])]
            panel.plot([r.tokens for r in line], [r.predicted_us for r in line], "--", color=f"C{at}", label=gpu)
            dots = [(r.tokens, r.measured_us) for r in line if r.measured_us is not None]
            if dots:
                panel.plot(*zip(*dots, strict=True), "o", color=f"C{at}")
        panel.set(title=f"{op} {direction}", xlabel="tokens per sample", ylabel="µs", xscale="log", yscale="log")
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, high / 30), high * 2)  # otherwise tiny differences between times would fill the panel
        panel.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, format=format)


def shape(text: str) -> Case:
    """Parse "B,H,N,D" or "B,H,N,D,M", the argument of --shape, and return a Case."""
    sizes = [int(each) if each.isdecimal() else 0 for each in text.split(",")]
    if len(sizes) not in (4, 5) or 0 in sizes:
        raise argparse.ArgumentTypeError(f"expected B,H,N,D or B,H,N,D,M, got {text!r}")
    batch, heads, tokens, width, *features = sizes
    return Case("", batch=batch, heads=heads, tokens=tokens, width=width, features=features[0] if features else 64)


INCOMPLETE = ", a lower bound: some loops count as if they ran once"


def show_launches(op: str, case: Case, dtype: str, gpu: Device) -> None:
    """Print the predicted time of each launch of a call, and their sum."""
    from .flash import FACTOR
    from .launch_times import call_times, committed

    times = list(call_times(SPECS[op], case, dtype, gpu, committed()))
    lines = []
    for direction, each in times:
        lines.append([direction, each.kernel, figure(1e6 * each.seconds, 3), each.bound + INCOMPLETE * (not each.complete)])
    for name in dict.fromkeys(direction for direction, _ in times):
        total = 1e6 * sum(each.seconds for direction, each in times if direction == name)
        low, high = (total * factor for factor in FACTOR)
        lines.append([name, "sum", figure(total, 3), f"{low:.3g} to {high:.3g} with the factors below"])
    slots = f", {case.features} slots" * bool(case.features)
    print(f"{op} {dtype} on {gpu.name}: {case.batch} x {case.heads} x {case.tokens} x {case.width}{slots}")
    print_table(["direction", "launch", "predicted_us", "bound_by"], lines)
    print("\nPredicted from machine code and published rates, not measured. Published times of a FlashAttention kernel are")
    print(f"{FACTOR[0]} to {FACTOR[1]} times as long as their predictions (--calibrate).")


def show_calibration() -> None:
    from .flash import calibrate

    found = list(calibrate())
    cells = [
        [str(each.width), str(each.causal), str(each.tokens)]
        + [figure(1e6 * seconds, 3) for seconds in (each.measured, each.predicted)]
        + [each.bound, figure(each.factor, 3)]
        for each in found
    ]
    print_table(["width", "causal", "tokens", "published_us", "predicted_us", "bound_by", "factor"], cells)


def gpu_name(text: str) -> str:
    """Return the name in GPUS that matches `text` regardless of case, or `text` if no name matches."""
    return next((gpu.name for gpu in GPUS if gpu.name.lower() == text.lower()), text)


def from_machine_code(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    try:
        if args.calibrate:
            show_calibration()
        else:
            case = replace(args.shape, masked=args.masked, learned=args.learned, rope=args.rope, taps=33)
            case = SPECS[args.call].fit(case)
            for gpu in [gpu for gpu in GPUS if gpu.name in (args.gpu or ("H100",))]:
                if gpu.arch.startswith("gfx"):
                    parser.error(f"argument --gpu: expected NVIDIA GPUs, whose machine code can be counted, got {gpu.name}")
                for dtype in args.dtype:
                    show_launches(args.call, case, dtype, gpu)
    except RuntimeError as error:
        parser.error(str(error))
    return 0


def main(argv: list[str]) -> int:
    names = [gpu.name for gpu in GPUS]
    parser = Parser.of("vix dev roofline", __doc__)
    parser.add_argument("call", nargs="?", choices=list(SPECS), metavar="OP", help="operator whose launches are predicted")
    parser.add_argument("--shape", type=shape, metavar="B,H,N,D[,M]", help="batch, heads, tokens, head width and slots for OP")
    parser.add_argument("--rope", choices=("interleaved", "half"), help="apply RoPE in this layout in OP")
    parser.add_argument("--masked", action="store_true", help="mask keys in OP")
    parser.add_argument("--learned", action="store_true", help="compute gradients of the random features in OP")
    parser.add_argument("--calibrate", action="store_true", help="compare predictions with published times on the H100")
    parser.add_argument("--op", nargs="+", choices=list(SPECS), default=list(SPECS), metavar="OP", help=", ".join(SPECS))
    parser.add_argument("--gpu", nargs="+", choices=names, type=gpu_name, metavar="GPU", help=", ".join(names))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16"], help="default: bf16")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=f"folder of runs (default: {RESULTS})")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the table as CSV instead of printing it")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="plot time against tokens, as PNG or SVG")
    args = parser.parse_args(argv)
    if (args.call is None) != (args.shape is None):
        parser.error("expected both OP and --shape, or neither")
    if args.calibrate or args.call:
        return from_machine_code(parser, args)
    gpus = [gpu for gpu in GPUS if gpu.name in (args.gpu or names)]
    try:
        table = list(with_measured(rows(args.op, gpus, args.dtype), args.results))
        cells = [[figure(value, 4) for value in astuple(row)] for row in table]
        if args.csv:
            write_csv(args.csv, map(asdict, table), digits=4)
            print(f"wrote {args.csv}")
        elif args.markdown:
            print(NOTE, "", *markdown(COLUMNS, cells), sep="\n")
        else:
            print_table(COLUMNS, cells)
            print(f"\n{NOTE}")
        if args.plot:
            write_atomically(args.plot, lambda path: plot(path, table, args.plot.suffix[1:] or "png"))
            print(f"wrote {args.plot}", file=sys.stderr)
    except OSError as error:
        parser.error(str(error))
    return 0
