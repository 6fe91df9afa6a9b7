"""Measure the speedup of the integrations: compare a module of a host library, such as timm, with its replacement.

    python -m bench.integrations --output DIR

Times are CPU times of one thread. Calls to the host library's module and to this library's module alternate. Each integration
is measured in several new processes. In a process that has already measured other integrations, the speedups would be
different, because memory that the allocator keeps from earlier calls changes the cost of large buffers. Before anything is
timed, the outputs of both modules are compared. They must match, except for timm, where Nystrom attention approximates softmax
attention.
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

SAME = 1e-4  # outputs match if their relative error is smaller than this
Pair = tuple[nn.Module, nn.Module, tuple[Tensor, ...]]  # this library's module, the host library's module, and their arguments


def timm_vit() -> Pair:
    import timm

    from vix_kernels.integrations.timm import replace_attention

    host = timm.create_model("vit_tiny_patch16_224", img_size=512)
    return *_with_ours(partial(replace_attention, op="nystrom"), host), (torch.randn(4, 3, 512, 512),)


def transformers_nystromformer() -> Pair:
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    from vix_kernels.integrations.transformers import patch

    host = NystromformerSelfAttention(NystromformerConfig(segment_means_seq_len=4096))
    return *_with_ours(patch, host), (torch.randn(1, 4096, 768),)


def transformers_fnet() -> Pair:
    from transformers import FNetConfig
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform

    from vix_kernels.integrations.transformers import patch

    return *_with_ours(patch, FNetBasicFourierTransform(FNetConfig())), (torch.randn(4, 512, 768),)


def performer_pytorch() -> Pair:
    from performer_pytorch import FastAttention as Host

    from vix_kernels.integrations.performer_pytorch import FastAttention

    return *_same(FastAttention, Host, 64, 256), tuple(torch.randn(3, 2, 4, 4096, 64).unbind())


def nystrom_attention() -> Pair:
    from nystrom_attention import NystromAttention as Host

    from vix_kernels.integrations.nystrom_attention import NystromAttention

    return *_same(NystromAttention, Host, 256, heads=4, num_landmarks=64), (torch.randn(2, 4096, 256),)


def linformer() -> Pair:
    from linformer import LinformerSelfAttention as Host

    from vix_kernels.integrations.linformer import LinformerSelfAttention

    return *_same(LinformerSelfAttention, Host, 256, seq_len=4096, heads=4), (torch.randn(2, 4096, 256),)


def _with_ours(replace: Callable[[nn.Module], object], host: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return a copy of `host` that `replace` has changed, and `host` itself."""
    ours = copy.deepcopy(host)
    replace(ours)
    return ours, host


def _same(ours: type[nn.Module], host: type[nn.Module], *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return an instance of each class, with the same weights."""
    our_module, host_module = ours(*args, **options), host(*args, **options)
    our_module.load_state_dict(host_module.state_dict())
    return our_module, host_module


INTEGRATIONS: dict[str, tuple[Callable[[], Pair], str]] = {
    "timm": (timm_vit, "vit_tiny_patch16_224, 512 pixels, batch 4, Nystrom"),
    "transformers": (transformers_nystromformer, "NystromformerSelfAttention, base size, 4,096 tokens"),
    "fnet": (transformers_fnet, "transformers' FNetBasicFourierTransform, base size, 512 tokens, batch 4"),
    "performer-pytorch": (performer_pytorch, "FastAttention, 256 features, 4,096 tokens"),
    "nystrom-attention": (nystrom_attention, "NystromAttention, 64 landmarks, 4,096 tokens"),
    "linformer": (linformer, "LinformerSelfAttention, k 256, 4,096 tokens"),
}


ROW = (
    "{integration} | {what} | {forward_ms:.0f} / {full_ms:.0f} | "
    "{forward_ratio:.2f} ({forward_low:.2f} to {forward_high:.2f}) | "
    "{full_ratio:.2f} ({full_low:.2f} to {full_high:.2f}) | {relative_error:.1e}"
)
Times = dict[str, tuple[float, ...]]


def measured(name: str, rounds: int) -> tuple[float, dict[str, Times]]:
    """Return the relative error of this library's output, and the time of every call in milliseconds.

    The times are indexed by "forward" or "full" (forward and backward passes), and then by the module ("ours" or "host").
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    build, _ = INTEGRATIONS[name]
    ours, host, args = build()
    with torch.no_grad():
        out, exact = (_first(module.eval(), args) for module in (ours, host))
    error = ((out - exact).norm() / exact.norm()).item()
    if name != "timm" and not error < SAME:
        raise RuntimeError(f"{name}: expected the outputs of the host library, got a relative error of {error:.1e}")
    times = {}
    for direction, call in (("forward", torch.no_grad()(_first)), ("full", _full)):
        calls = {owner: partial(call, module, args) for owner, module in (("ours", ours), ("host", host))}
        times[direction] = {owner: each.samples for owner, each in in_turns(calls, rounds=rounds).items()}
    return error, times


def summary(name: str, runs: list[tuple[float, dict[str, Times]]]) -> dict[str, Any]:
    """Return a row with the largest error, the median times of this library, and the median and range of the ratios.

    A ratio is the time of this library divided by the time of the host library in the same round. The medians and the range
    cover all rounds of all processes.
    """
    row: dict[str, Any] = dict(integration=name, what=INTEGRATIONS[name][1], relative_error=max(error for error, _ in runs))
    for direction in ("forward", "full"):
        ours, host = (
            [sample for _, times in runs for sample in times[direction][owner]] for owner in ("ours", "host")
        )  # fmt: skip
        ratios = [a / b for a, b in zip(ours, host, strict=True)]
        row |= {f"{direction}_ms": statistics.median(ours), f"{direction}_ratio": statistics.median(ratios)}
        row |= {f"{direction}_low": min(ratios), f"{direction}_high": max(ratios)}
    return row


def _lost(why: str) -> NoReturn:
    raise RuntimeError(why)


def _first(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    """Call `module` and return its first output."""
    out = module(*args)
    return out[0] if isinstance(out, tuple) else out


def _full(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    args = tuple(each.detach().requires_grad_() for each in args)
    _first(module, args).sum().backward()
    module.zero_grad()


def main(argv: list[str] | None = None) -> int:
    parser = Parser.of("python -m bench.integrations", __doc__)
    names = list(INTEGRATIONS)
    parser.add_argument("--integrations", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds per process (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=3, metavar="N", help="processes for each (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for integrations.csv (default: only print)")
    options = parser.parse_args(argv)
    rows = []
    for name in options.integrations:
        runs = [alone("cpu", _lost, measured, name, options.rounds) for _ in range(options.processes)]
        rows.append(summary(name, runs) | dict(device=device_name("cpu"), commit=commit()))
        print(f"{name}: {rows[-1]['forward_ratio']:.2f} / {rows[-1]['full_ratio']:.2f}", file=sys.stderr, flush=True)
    print_table(
        ("integration", "what", "ms", "forward vs host", "forward and backward vs host", "relative error"),
        (ROW.format_map(row).split(" | ") for row in rows),
    )
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        write_csv(options.output / "integrations.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
