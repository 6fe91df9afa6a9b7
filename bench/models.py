"""A training step of each ViX model against the original's arithmetic, on one CPU thread: a table and its numbers.

Both are built with the published configuration, dropout included, and run in turn, each pair in a process of its own. Theirs
is the model of the vision_xformer 0.2.0 wheel where it has one, else the plain form of `from_original`, which does the
published work.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import multiprocessing
import statistics
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix_kernels.commands import Parser, print_table, write_atomically
from vix_kernels.models import create_model
from vix_kernels.models.originals import build
from vix_kernels.testing import kept_for_backward

VIX = dict(image_size=32, patch_size=1, num_classes=10, dim=128, depth=4, heads=4, mlp_dim=256)
CCT = dict(
    img_size=64, embedding_dim=128, n_conv_layers=3, kernel_size=3, stride=(2, 1, 1), padding=1, pooling_kernel_size=3,
    pooling_stride=1, pooling_padding=1, num_layers=4, num_heads=4, num_classes=200, positional_embedding="learnable",
)  # fmt: skip
LEVIT = dict(image_size=32, stages=1, num_classes=200, dim=128, depth=4, heads=4, mlp_mult=2)
CVT = dict(num_classes=200)
for stage, (stride, depth) in enumerate(((2, 1), (1, 1), (1, 2)), start=1):
    sizes = dict(
        emb_dim=128, emb_kernel=3, emb_stride=stride, proj_kernel=3, kv_proj_stride=1, heads=4, depth=depth, mlp_mult=2
    )
    CVT |= {f"s{stage}_{key}": value for key, value in sizes.items()}


class Pair(NamedTuple):
    """Ours by name and arguments; theirs by label and arguments, from the wheel or from `originals`."""

    ours: dict[str, Any]
    label: str
    theirs: dict[str, Any]
    wheel: bool = False
    slow: bool = False  # three quarters of its time are matrix products: its budget is higher


HEADS = dict(dim_head=32)
DROP, DROPOUT = dict(proj_drop_rate=0.25), dict(dropout=0.25)
# So that both do the same work: the original CCN and CCP have MLPs of ratio 4, whatever they are asked for, and LeViN
# and LeViP know nothing of positions.
PAIRS = {
    "vip": Pair(DROP, "ViP", VIX | HEADS | DROPOUT, wheel=True),
    "vin": Pair({}, "ViN", VIX | HEADS | dict(num_landmarks=64), wheel=True),
    "vil": Pair(DROP, "ViL", VIX | HEADS | DROPOUT, wheel=True, slow=True),
    "fnet": Pair({}, "FNet", {key: value for key, value in VIX.items() if key != "heads"}, wheel=True),
    "hybrid_vip": Pair({}, "HybridViP", VIX | HEADS),
    "hybrid_vin": Pair(DROP, "HybridViN", VIX | HEADS | DROPOUT),
    "hybrid_vil": Pair({}, "HybridViL", VIX | HEADS, slow=True),
    "hybrid_fnet": Pair({}, "HybridFNet", VIX),
    "levin": Pair(dict(position="none"), "LeViN", LEVIT),
    "levip": Pair(dict(position="none"), "LeViP", LEVIT),
    "cvn": Pair({}, "CvN", CVT),
    "cvp": Pair({}, "CvP", CVT),
    "ccn": Pair(dict(mlp_ratio=4.0), "CCN", CCT),
    "ccp": Pair(dict(mlp_ratio=4.0), "CCP", CCT),
}


class Row(NamedTuple):
    """Medians in seconds of CPU time, ratios ours over theirs, memory kept for backward in MiB an image."""

    model: str
    theirs: str
    seconds: float
    theirs_seconds: float
    bf16_seconds: float
    ratio: float
    bf16_ratio: float
    kept: float
    theirs_kept: float
    budget: float


def measure(name: str, rounds: int, batch: int) -> Row:
    """Time both in turn, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pair = PAIRS[name]
    ours = create_model(name, **pair.ours).train()
    theirs = _original(pair).train()
    images = torch.randn(batch, ours.in_chans, *ours.img_size)
    labels = torch.randint(0, ours.num_classes, (batch,))
    times: list[tuple[float, ...]] = []
    for _ in range(rounds + 1):  # the first warms up
        forms = ((ours, False), (theirs, False), (ours, True))
        times.append(tuple(_step(model, images, labels, bf16) for model, bf16 in forms))
    times = times[1:]
    plain, original, bf16 = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = (statistics.median(row[i] / row[1] for row in times) for i in (0, 2))
    kept = (kept_for_backward(model, (images,)) / batch / 2**20 for model in (ours, theirs))
    source = "vision_xformer 0.2.0" if pair.wheel else "plain form"
    return Row(name, f"{pair.label}, {source}", plain, original, bf16, *ratios, *kept, 0.85 if pair.slow else 0.7)


def _original(pair: Pair) -> nn.Module:
    if pair.wheel:
        return getattr(importlib.import_module("vision_xformer"), pair.label)(**pair.theirs)
    return build(pair.label, pair.theirs, backend="reference")


def _step(model: nn.Module, images: Tensor, labels: Tensor, bf16: bool) -> float:
    """Seconds of forward, loss and backward."""
    start = time.process_time()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    seconds = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return seconds


def write_csv(path: Path, rows: list[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows([f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row] for row in rows)


def print_rows(rows: list[Row]) -> None:
    def against(value: float, budget: float) -> str:
        return f"{value:.2f}{'' if value <= budget else f' (missed {budget})'}"

    print_table(
        ("model", "theirs", "seconds", "time", "time in bf16", "kept MiB", "kept"),
        (
            (
                row.model, row.theirs, f"{row.seconds:.2f} / {row.theirs_seconds:.2f}", against(row.ratio, row.budget),
                against(row.bf16_ratio, 0.45), f"{row.kept:.1f} / {row.theirs_kept:.1f}",
                against(row.kept / row.theirs_kept, 0.4),
            )
            for row in rows
        ),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="bench.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*", help='only models like this, such as "hybrid_*"')
    parser.add_argument("--output", type=Path, metavar="PATH.csv", help="where to write the numbers (default: nowhere)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each that count (default: 5)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images a step (default: 16)")
    args = parser.parse_args(argv)
    names = [name for name in PAIRS if fnmatch(name, args.pattern)]
    if not names:
        parser.error(f"no model is called like {args.pattern!r}; there are {', '.join(PAIRS)}")
    rows = []
    for name in names:
        # A process each: what an allocator has learned from one model would change the time of the next.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (name, args.rounds, args.batch_size)))
        row = rows[-1]
        print(f"{name}: {row.seconds:.2f} s, theirs {row.theirs_seconds:.2f} s", file=sys.stderr, flush=True)
    print_rows(rows)
    if args.output:
        write_atomically(args.output, lambda path: write_csv(path, rows))
        print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
