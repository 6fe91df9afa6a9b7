"""What the doors to other libraries gain: the host's own attention, or model, beside the same one with ours put in.

    python -m bench.doors --output DIR

CPU time of one thread, in turns, in processes of their own: what a large buffer costs depends on what the allocator has kept
from calls before, so that a process that has run other doors gives other ratios. Before that the answers are compared:
all but timm's, where landmarks approximate softmax attention, have to be those of the host.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vix_kernels.commands import Parser, print_table, write_csv
from vix_kernels.measure.machine import commit, device_name
from vix_kernels.measure.operators import alone
from vix_kernels.measure.timing import in_turns

SAME = 1e-4  # relative error of answers that are the same in float32
Pair = tuple[nn.Module, nn.Module, tuple[Tensor, ...]]  # ours, theirs, and their arguments


def timm_vit() -> Pair:
    import timm

    from vix_kernels.integrations.timm import replace_attention

    theirs = timm.create_model("vit_tiny_patch16_224", img_size=512)
    return *_with_ours(partial(replace_attention, op="nystrom"), theirs), (torch.randn(4, 3, 512, 512),)


def transformers_nystromformer() -> Pair:
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    from vix_kernels.integrations.transformers import patch

    theirs = NystromformerSelfAttention(NystromformerConfig(segment_means_seq_len=4096))
    return *_with_ours(patch, theirs), (torch.randn(1, 4096, 768),)


def transformers_fnet() -> Pair:
    from transformers import FNetConfig
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

    from vix_kernels.integrations.transformers import patch

    return *_with_ours(patch, FNetBasicFourierTransform(FNetConfig())), (torch.randn(4, 512, 768),)


def performer_pytorch() -> Pair:
    from performer_pytorch import FastAttention as Theirs

    from vix_kernels.integrations.performer_pytorch import FastAttention

    return *_same(FastAttention, Theirs, 64, 256), tuple(torch.randn(3, 2, 4, 4096, 64).unbind())


def nystrom_attention() -> Pair:
    from nystrom_attention import NystromAttention as Theirs

    from vix_kernels.integrations.nystrom_attention import NystromAttention

    return *_same(NystromAttention, Theirs, 256, heads=4, num_landmarks=64), (torch.randn(2, 4096, 256),)


def linformer() -> Pair:
    from linformer import LinformerSelfAttention as Theirs

    from vix_kernels.integrations.linformer import LinformerSelfAttention

    return *_same(LinformerSelfAttention, Theirs, 256, seq_len=4096, heads=4), (torch.randn(2, 4096, 256),)


def _with_ours(put: Callable[[nn.Module], object], theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A copy into which ours is put, and the host's own."""
    ours = copy.deepcopy(theirs)
    put(ours)
    return ours, theirs


def _same(ours: type[nn.Module], theirs: type[nn.Module], *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Both classes with the same weights."""
    mine, other = ours(*args, **options), theirs(*args, **options)
    mine.load_state_dict(other.state_dict())
    return mine, other


DOORS: dict[str, tuple[Callable[[], Pair], str]] = {
    "timm": (timm_vit, "vit_tiny_patch16_224, 512 pixels, batch 4, Nystrom"),
    "transformers": (transformers_nystromformer, "NystromformerSelfAttention, base size, 4,096 tokens"),
    "fnet": (transformers_fnet, "transformers' FNetBasicFourierTransform, base size, 512 tokens, batch 4"),
    "performer-pytorch": (performer_pytorch, "FastAttention, 256 features, 4,096 tokens"),
    "nystrom-attention": (nystrom_attention, "NystromAttention, 64 landmarks, 4,096 tokens"),
    "linformer": (linformer, "LinformerSelfAttention, k 256, 4,096 tokens"),
}


ROW = (
    "{door} | {what} | {forward_ms:.0f} / {full_ms:.0f} | {forward_ratio:.2f} ({forward_low:.2f} to {forward_high:.2f}) | "
    "{full_ratio:.2f} ({full_low:.2f} to {full_high:.2f}) | {relative_error:.1e}"
)
Times = dict[str, tuple[float, ...]]


def measured(door: str, rounds: int) -> tuple[float, dict[str, Times]]:
    """The relative error of our answers, and the milliseconds of each direction, "forward" and "full", for ours and theirs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    build, _ = DOORS[door]
    ours, theirs, args = build()
    with torch.no_grad():
        out, exact = (_first(module.eval(), args) for module in (ours, theirs))
    error = ((out - exact).norm() / exact.norm()).item()
    if door != "timm" and not error < SAME:
        raise RuntimeError(f"{door}: expected the host's answers, got a relative error of {error:.1e}")
    times = {}
    for direction, call in (("forward", torch.no_grad()(_first)), ("full", _full)):
        calls = {name: partial(call, module, args) for name, module in (("ours", ours), ("theirs", theirs))}
        times[direction] = {name: each.samples for name, each in in_turns(calls, rounds=rounds).items()}
    return error, times


def summary(door: str, runs: list[tuple[float, dict[str, Times]]]) -> dict[str, Any]:
    """Medians over the rounds of all processes; a ratio is that of one round."""
    row: dict[str, Any] = dict(door=door, what=DOORS[door][1], relative_error=max(error for error, _ in runs))
    for direction in ("forward", "full"):
        ours, theirs = (
            [sample for _, times in runs for sample in times[direction][name]] for name in ("ours", "theirs")
        )  # fmt: skip
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        row |= {f"{direction}_ms": statistics.median(ours), f"{direction}_ratio": statistics.median(ratios)}
        row |= {f"{direction}_low": min(ratios), f"{direction}_high": max(ratios)}
    return row


def _lost(why: str) -> NoReturn:
    raise RuntimeError(why)


def _first(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    """The first output."""
    out = module(*args)
    return out[0] if isinstance(out, tuple) else out


def _full(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    args = tuple(each.detach().requires_grad_() for each in args)
    _first(module, args).sum().backward()
    module.zero_grad()


def main(argv: list[str] | None = None) -> int:
    parser = Parser.of("python -m bench.doors", __doc__)
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS), metavar="NAME", help=", ".join(DOORS))
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns in a process; default: %(default)s")
    parser.add_argument("--processes", type=int, default=3, metavar="N", help="one after the other; default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write doors.csv there (default: nothing)")
    options = parser.parse_args(argv)
    rows = []
    for door in options.doors:
        runs = [alone("cpu", _lost, measured, door, options.rounds) for _ in range(options.processes)]
        rows.append(summary(door, runs) | dict(device=device_name("cpu"), commit=commit()))
        print(f"{door}: {rows[-1]['forward_ratio']:.2f} / {rows[-1]['full_ratio']:.2f}", file=sys.stderr, flush=True)
    print_table(
        ("door", "what", "ms", "forward, of theirs", "with backward", "relative error"),
        (ROW.format_map(row).split(" | ") for row in rows),
    )
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        write_csv(options.output / "doors.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
