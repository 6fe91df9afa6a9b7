"""Print the results of `pytest --benchmark` or `vix bench --models` as a table of ratios to other implementations.

The peer of an operator is another package, or plain PyTorch if no package implements the operator. A ratio is the time or
memory of this library divided by that of the other implementation. A target is an upper limit for a ratio. If a ratio is
above its target, the table shows "missed" and the target.

examples:
  pytest --benchmark --benchmark-json run.json
  python -m bench.table run.json
  vix bench --models --output results
  python -m bench.table results/bench.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vix_kernels.commands import Parser, markdown
from vix_kernels.measure.providers import OURS, PEERS, public
from vix_kernels.testing import SPECS

Row = dict[str, Any]


class Budget(NamedTuple):
    """Upper limits for time and memory, relative to the operator's peer or to the original model. None means no limit.

    `forward` applies to the time of the forward pass, `full` to the time of the forward and backward passes together, and
    `kept` to the memory saved for the backward pass.
    """

    forward: float | None
    full: float | None
    kept: float | None = None


# The targets apply to one CPU thread, float32, batch 2, 4 heads, width 64, 256 features or slots, 64 landmarks and 33 taps.
BUDGETS = {
    ("performer_attention", 1024): Budget(0.4, 0.6, 0.1),
    ("performer_attention", 4096): Budget(0.22, 0.33, 0.1),
    ("linear_attention", 4096): Budget(1.0, None, 0.3),
    ("apply_rope", 4096): Budget(0.15, 0.25),
    ("nystrom_attention", 4096): Budget(0.42, 0.6, 0.1),
    ("linformer_attention", 4096): Budget(0.45, 0.55, 0.1),
    ("fourier_mixing", 4096): Budget(0.6, 0.6),
}
COLUMNS = (
    "operator / peer", "tokens", "ms", "vs peer", "vs plain PyTorch", "vs torch.compile", "vs SDPA",
    "saved, MiB", "saved, vs peer",
)  # fmt: skip


def ratio(ours: Sequence[float], peers: Sequence[float]) -> float:
    """Return the median of the per-round ratios. If the numbers of rounds differ, return the ratio of the medians."""
    if len(ours) == len(peers):
        return statistics.median(a / b for a, b in zip(ours, peers, strict=True))
    return statistics.median(ours) / statistics.median(peers)


def peer(op: str) -> str:
    """Return the name of the peer of `op`: the first in PEERS, or "reference" (plain PyTorch) if PEERS has none for `op`."""
    return next(iter(PEERS.get(op, ())), "reference")


def lines(rows: Iterable[Row]) -> list[str]:
    """Return a Markdown table with one line per operator and number of tokens.

    A cell with two values has the form "forward / forward and backward".
    """
    found = {(row["op"], row["tokens"], row["direction"], row["provider"]): row for row in rows}
    cpu = any(row["method"] == "cpu" for row in found.values())
    body = []
    for op in public():
        for tokens in sorted({tokens for name, tokens, *_ in found if name == op}):
            budget = BUDGETS.get((op, tokens), Budget(None, None)) if cpu else Budget(None, None)
            ours = [_first(found, op, tokens, direction, OURS) for direction in ("forward", "full")]
            cells = {}
            for name in dict.fromkeys((peer(op), "reference", "compiled", "sdpa")):
                limits = (budget.forward, budget.full) if name == peer(op) else (None, None)
                both = [_against(row, name, found, limit) for row, limit in zip(ours, limits, strict=True)]
                cells[name] = " / ".join(both) if any(both) and both != ["not installed"] * 2 else both[0]
            other = found.get((op, tokens, "full", peer(op)))
            kept = ours[1].get("kept_mib") if ours[1] else None
            kept_ratio = kept / other["kept_mib"] if kept is not None and other and other["kept_mib"] else None
            body.append((
                f"`{op}` / {'torch.fft' if op == 'fourier_mixing' else peer(op)}", str(tokens),
                " / ".join(f"{row['device_ms']:.3g}" if row else "no result" for row in ours), cells[peer(op)],
                cells["reference"], cells["compiled"], cells["sdpa"],
                "" if kept is None else f"{kept:.2f}" if kept else "nothing",
                "" if kept_ratio is None else _with_budget(kept_ratio, budget.kept),
            ))  # fmt: skip
    return markdown(COLUMNS, body)


def _first(found: dict[tuple, Row], op: str, tokens: int, direction: str, providers: Iterable[str]) -> Row | None:
    return next((found[key] for name in providers if (key := (op, tokens, direction, name)) in found), None)


def _against(ours: Row | None, name: str, found: dict[tuple, Row], budget: float | None) -> str:
    if ours is None:
        return "no result"
    value = ours["ours_over_others"].get(name)
    if value is None and name == "sdpa" and SPECS[ours["op"]].attends:  # SDPA is only measured for one operator
        key = ours["tokens"], ours["direction"], "sdpa"
        other = next((row for (_, *rest), row in found.items() if tuple(rest) == key), None)
        value = ours["device_ms"] / other["device_ms"] if other else None
    if value is None:
        return "not installed" if "not installed" in ours["skipped"].get(name, "") else ""
    return _with_budget(value, budget)


def _with_budget(value: float, budget: float | None) -> str:
    text = f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
    return text if budget is None or value <= budget else f"{text} (missed {budget:g})"


# The models

MODEL_COLUMNS = (
    "model / original", "training, images/s: ours / original", "training time vs original", "bf16 vs original in fp32",
    "bf16 vs original in bf16", "inference time vs original", "saved memory vs original", "peak memory vs original",
)  # fmt: skip


def model_budget(name: str) -> Budget:
    """Return the targets for a training step in float32: `full` for the time, `kept` for the memory."""
    return Budget(None, 0.85 if name in ("vil", "hybrid_vil") else 0.7, 0.4)


BF16_BUDGET = 0.45  # this library's bf16 time divided by the original's float32 time, on a CPU with AMX


def model_lines(rows: Iterable[Row]) -> list[str]:
    """Return a Markdown table with one line per model: images/s of both implementations, then ratios of time and memory."""
    found = {(row["model"], row["provider"], row["dtype"], row["direction"]): row for row in rows if row["status"] == "ok"}

    def ratio(name: str, figure: str, ours: str, original: str, direction: str = "training") -> float | None:
        pair = (found.get((name, "ours", ours, direction)), found.get((name, "original", original, direction)))
        return pair[0][figure] / pair[1][figure] if all(pair) else None

    body = []
    for name in dict.fromkeys(model for model, *_ in found):
        ours, original = (found.get((name, provider, "fp32", "training")) for provider in ("ours", "original"))
        budget = model_budget(name)
        speeds = [f"{row['images_per_second']:.3g}" for row in (ours, original) if row]
        cells = (
            (ratio(name, "ms", "fp32", "fp32"), budget.full),
            (ratio(name, "ms", "bf16", "fp32"), BF16_BUDGET),
            (ratio(name, "ms", "bf16", "bf16"), None),
            (ratio(name, "ms", "fp32", "fp32", "inference"), None),
            (ratio(name, "kept_mib", "fp32", "fp32"), budget.kept),
            (ratio(name, "peak_mib", "fp32", "fp32"), None),
        )
        body.append((
            f"`{name}` / {original['original'] if original else 'no original'}", " / ".join(speeds),
            *("" if value is None else _with_budget(value, limit) for value, limit in cells),
        ))  # fmt: skip
    return markdown(MODEL_COLUMNS, body)


def main(argv: list[str] | None = None) -> int:
    parser = Parser.of("bench.table", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN.json", help="output of --benchmark-json or of vix bench --models")
    args = parser.parse_args(argv)
    try:
        run = json.loads(args.run.read_text())
        models = "rows" in run
        rows = run["rows"] if models else [each["extra_info"] for each in run["benchmarks"] if "provider" in each["extra_info"]]
        made = model_lines(rows) if models else lines(rows)
        machine, date = (run, run["date"]) if models else (run["machine_info"], run["datetime"][:10])
        first, commit = rows[0], (run if models else rows[0])["commit"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        parser.error(
            f"{args.run}: expected a run of pytest --benchmark or of vix bench --models ({type(error).__name__}: {error})"
        )
    print(f"{first['device']}, torch {machine['torch']}, {'' if models else first['dtype'] + ', '}{date}, commit {commit}\n")
    print("\n".join(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
