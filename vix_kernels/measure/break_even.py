"""Break-even lengths: the number of tokens at and above which an attention method is faster than softmax attention.

The table break_even.csv contains lengths that were measured on a CPU or predicted for a GPU. docs/choosing.md explains the
table, and `python -m bench.break_even --write` updates it. The lengths differ for other devices, options and batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..commands import read_csv

PATH = Path(__file__).with_name("break_even.csv")
MORE, FEWER = "more than ", " or fewer"


@dataclass(frozen=True)
class BreakEven:
    """The break-even length of one attention method.

    Attributes:
        kind: "measured" or "predicted", the kind of times from which the length was computed.
        device: the CPU model and the number of threads, or the name of the GPU.
        commit: the commit of this library whose times were measured or predicted.
        op: short name of the attention method, such as "nystrom".
        direction: "forward", or "full" for forward and backward together.
        width: width of a head.
        tokens: the break-even length. "N or fewer": the method is faster at all tested lengths, of which N is the shortest.
            "more than N": the method is not faster at N, the longest tested length.
    """

    kind: str
    device: str
    commit: str
    op: str
    direction: str
    width: int
    tokens: str

    @property
    def rounded(self) -> str:
        """`tokens` rounded to two significant digits. "N or fewer" and "more than N" are returned unchanged."""
        return f"{int(float(f'{int(self.tokens):.1e}')):,}" if self.tokens.isdecimal() else self.tokens

    @property
    def least(self) -> float:
        """The number of tokens below which the method is expected to be slower, or 0 if it is faster at all tested lengths."""
        number = int(self.tokens.removeprefix(MORE).removesuffix(FEWER))
        return 0 if self.tokens.endswith(FEWER) else number + self.tokens.startswith(MORE)


@cache
def rows() -> tuple[BreakEven, ...]:
    """Return the rows of break_even.csv."""
    return tuple(read_csv(PATH, BreakEven))


def slower(op: str, tokens: int, width: int, device: str) -> BreakEven | None:
    """Return the row that shows that `op` is slower than softmax attention in the forward pass, or None if no row shows this.

    Args:
        op: short name of the attention method, such as "nystrom".
        tokens: the number of tokens.
        width: width of a head. The row with the closest width on a logarithmic scale is used.
        device: "cpu" or "cuda".
    """
    kind = {"cpu": "measured", "cuda": "predicted"}.get(device)
    found = [row for row in rows() if (row.kind, row.op, row.direction) == (kind, op, "forward")]
    row = min(found, key=lambda row: abs(math.log(row.width / width)), default=None)
    return row if row is not None and tokens < row.least else None


def crossing(ratios: Mapping[int, float]) -> str:
    """Return the break-even length as text, in the format of `BreakEven.tokens`.

    `ratios` maps each tested number of tokens to the time of the attention method divided by the time of softmax attention. The
    break-even length is interpolated between the largest number of tokens at which the method is not faster and the next larger
    number. The interpolation is linear in the logarithms of the ratio and the number of tokens.
    """
    lengths = sorted(ratios)
    slower = [at for at, tokens in enumerate(lengths) if ratios[tokens] >= 1]
    if not slower:
        return f"{lengths[0]}{FEWER}"
    if slower[-1] == len(lengths) - 1:
        return f"{MORE}{lengths[-1]}"
    low, high = lengths[slower[-1]], lengths[slower[-1] + 1]
    above, below = math.log(ratios[low]), math.log(ratios[high])
    return str(round(low * (high / low) ** (above / (above - below))))
