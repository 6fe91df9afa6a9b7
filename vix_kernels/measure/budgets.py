"""Limits and budgets that the compile report checks, and the declared exceptions with their reasons.

The budgets are for sm_90, and for bf16 unless a dtype is given. If a kernel is known to exceed its budget, a looser limit
(`reached`) is checked instead. Change this file when a kernel becomes faster, or when there is a good reason for a slower
kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import inf

from .._triton.targets import TARGETS, TENSOR_MEMORY
from ..testing import Case
from .compile_table import Row, parse_counts

WIDE = 128  # bits; the widest access of a thread before sm_100


@dataclass(frozen=True)
class Declared:
    """An exception to a limit, for kernels whose names start with `kernel`.

    Attributes:
        limit: the largest allowed value, which replaces the usual limit.
        reason: why the exception is necessary.
        use: words such as "performer+mask backward 110". The exception applies only to rows in which a call in `Row.uses`
            contains all of these words.
        archs, dtypes, widths: values to which the exception is restricted. An empty tuple means no restriction.
    """

    kernel: str
    limit: float
    reason: str
    use: str = ""
    archs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()

    def matches(self, row: Row) -> bool:
        return (
            row.kernel.startswith(self.kernel)
            and any(words(self.use) <= words(use) for use in row.uses.split("; "))
            and row.arch in (self.archs or (row.arch,))
            and row.dtype in (self.dtypes or (row.dtype,))
            and row.width in (self.widths or (row.width,))
        )


@cache
def words(use: str) -> set[str]:
    """Return the words in `use` as a set, such as {"performer", "mask", "backward", "110"}."""
    return set(re.findall("[^ +,]+", use))


def allowed(row: Row, usual: float, exceptions: Iterable[Declared]) -> float:
    return max([usual, *(each.limit for each in exceptions if each.matches(row))])


AMPERE = ("sm_80", "sm_86", "sm_89", "sm_120")  # their matrix instructions read operands from registers only
WIDE_HEADS = (80, 96, 112, 128)  # head widths that are padded to 128

# Exceptions to the limit on bytes spilled per thread, which is 0.
SPILLS = (
    Declared("", 544, "the tiles of wide heads do not fit in registers", widths=(256,)),
    Declared("linear_broadcast_forward_kernel", 2832, "other tiles were not tried", dtypes=("fp16",), widths=(256,)),
    Declared("broadcast_tokens_kernel", 1912, "other tiles were not tried", dtypes=("fp32",), archs=("sm_86",), widths=(256,)),
    Declared("broadcast_tokens_kernel", 2000, "16 warps would spill more", dtypes=("fp32",), archs=("sm_90",), widths=(256,)),
    Declared("linear_broadcast_tokens_kernel", 584, "16 warps would spill more", dtypes=("fp32",), widths=(256,)),
    Declared("", 56, "only two to fourteen registers spill", dtypes=("fp32",)),
    Declared(
        "broadcast_slots_kernel", 264, "tiles that do not spill take three times as many instructions", dtypes=("fp32",),
        widths=(64,),
    ),
    Declared(
        "linear_broadcast_slots_kernel", 408, "no tile that was tried spills less", dtypes=("fp32",), widths=WIDE_HEADS
    ),
    Declared("linear_broadcast_slots_kernel", 80, "only 20 registers spill", dtypes=("fp32",), archs=("sm_86",), widths=(64,)),
    Declared("aggregate_slots_kernel", 232, "pooled slots with RoPE", dtypes=("fp32",), widths=WIDE_HEADS),
    Declared(
        "broadcast_slots_kernel", 56,
        "one tile holds all 110 slots; 24 bytes spill outside the loop, or 56 with Triton 3.6",
        use="performer backward 110", archs=("sm_90",), widths=(64,),
    ),
    Declared(
        "broadcast_slots_kernel", 48, "pooled slots with RoPE and Triton 3.6", use="nystrom", archs=("sm_90",), widths=(64,)
    ),
    Declared("broadcast_slots_kernel", 56, "pooled slots with RoPE", archs=("sm_90",), widths=WIDE_HEADS),
    Declared(
        "broadcast_slots_kernel", 408, "if there are at most 32 trained features, one kernel computes all gradients",
        use="feature+learned backward 32", dtypes=("fp32",), widths=(32, 64),
    ),
    Declared(
        "broadcast_slots_kernel", 40, "if there are at most 32 trained features, one kernel computes all gradients",
        use="feature+learned backward 32", archs=("sm_120",), widths=(32,),
    ),
    Declared(
        "aggregate_slots_kernel", 8, "two registers spill", use="feature+learned backward 32", archs=("sm_120",), widths=(64,)
    ),
    Declared(
        "broadcast_slots_kernel", 56, "tiles that do not spill compute each logit eight times", archs=AMPERE, widths=WIDE_HEADS
    ),
    Declared(
        "broadcast_tokens_kernel", 80, "two tiles stay in registers; loading them again takes 1.5 times as many instructions",
        archs=AMPERE, widths=(32,),
    ),
    Declared(
        "broadcast_tokens_kernel", 24, "pooled slots; tiles that do not spill are half as large", archs=("sm_120",),
        widths=WIDE_HEADS,
    ),
    Declared(
        "broadcast_tokens_kernel", 320, "with RoPE or a mask; at most 8 bytes with Triton 3.9", archs=("sm_90",),
        widths=WIDE_HEADS,
    ),
    Declared(
        "aggregate_tokens_kernel", 232, "with RoPE or a mask; at most 176 bytes with Triton 3.9, where bfloat16 does not spill",
        archs=("sm_90",), widths=WIDE_HEADS,
    ),
    Declared("broadcast_forward_kernel", 16, "only two to four registers spill", archs=AMPERE),
    Declared("", 16, "only two to four registers spill", archs=("sm_86",)),
    Declared("aggregate_tokens_kernel", 56, "only with random features", dtypes=("fp16",), archs=("sm_86",), widths=(64,)),
    Declared(
        "aggregate_tokens_kernel", 104, "tiles that do not spill compute each logit twice", dtypes=("fp32",),
        archs=("sm_86",), widths=(64, *WIDE_HEADS),
    ),
    Declared("broadcast_forward_kernel", 8, "only two registers spill", use="mask", archs=("sm_90",), widths=WIDE_HEADS),
    Declared("linear_", 16, "only two to four registers spill", archs=("sm_90", "sm_100"), widths=(64, *WIDE_HEADS)),
    Declared("pinv_backward_kernel", 16, "only two to four registers spill", archs=("sm_90",), dtypes=("bf16", "fp16")),
)  # fmt: skip
# Exceptions to the limit on waits for matrix products in the main loops. The limit is the number of products plus one. More
# waits mean that ptxas serialized the products.
SERIALIZED: tuple[Declared, ...] = ()
# Exceptions to the limit of 1.15 exponentials per logit. More exponentials mean that logits are computed twice.
# (For a running maximum, each of four lanes computes an exponential per slot and tile of 32 tokens: 0.125 per logit.)
DUPLICATED = (
    Declared("broadcast_tokens_kernel", 2, "out includes a convolution, so a separate loop computes delta", use="nystrom"),
    Declared("", 4, "16 rows of a wide head per warp do not fit in registers", widths=WIDE_HEADS),
    Declared("", 8, "16 rows of a wide head per warp do not fit in registers", widths=(256,)),
    Declared("broadcast_tokens_kernel", 2, "in float32, a separate loop over the slots computes delta", dtypes=("fp32",)),
)
# Kernels that are allowed to use single-warp matrix instructions, or none, on sm_90.
SINGLE_WARP = (Declared("broadcast_forward_kernel", 1, "the convolution multiplies by a 32-row band matrix", use="nystrom"),)
# Kernels that are allowed to lack 128-bit loads or stores.
NARROW = (
    Declared("dft_tables_kernel", 1, "it loads nothing"),
    Declared("sum_chunks_kernel", 1, "the results are only a few numbers"),
    Declared("aggregate_prepare_kernel", 1, "it reads and writes only a few vectors"),
    Declared("landmarks_kernel", 1, "the two halves of rotated rows are loaded separately", use="halves"),
    Declared("aggregate_slots_kernel", 1, "gradients of the two halves of rotated rows are stored separately", use="halves"),
    Declared("linear_", 1, "the two halves of rotated rows are loaded separately", use="halves"),
)


def violations(rows: Iterable[Row]) -> list[str]:
    """Return a message for each limit that a row violates. A kernel that violates a limit is slow or cannot be launched."""
    found = []
    for row in rows:
        limit = TARGETS[row.arch].shared_memory
        if row.shared > limit:
            found.append(f"{row}: {row.shared} bytes of shared memory, {row.arch} has {limit}")
        if row.tensor_memory > TENSOR_MEMORY:
            found.append(f"{row}: {row.tensor_memory} columns of tensor memory, {row.arch} has {TENSOR_MEMORY}")
        if row.arch.startswith("sm_"):  # spills and machine code are not checked on AMD
            found += [f"{row}: {text}" for text in nvidia_violations(row)]
    return found


def nvidia_violations(row: Row) -> list[str]:
    found = []
    most = allowed(row, 0, SPILLS)
    if row.spilled > most:
        found.append(f"spills {row.spilled} bytes per thread, {most:.0f} allowed")
    most = allowed(row, row.products + 1, SERIALIZED)
    if row.waits > most:
        found.append(f"waits {row.waits} times for {row.products} matrix products, {most:.0f} allowed")
    most = allowed(row, 1.15, DUPLICATED)
    if row.unit == "logit" and is_pass(row) and row.exps > most:
        found.append(f"computes {row.exps} exponentials per logit, {most} allowed")
    if row.dtype == "fp32":
        return found
    if row.arch == "sm_90" and is_pass(row) and row.width <= (128 if "forward" in row.kernel else 64):
        kinds = {name.partition(".")[0] for name in parse_counts(row.matrix)}
        if kinds != {"HGMMA"} and not allowed(row, 0, SINGLE_WARP):
            found.append(f"expected warp-group products (HGMMA) only, got {row.matrix or 'none'}")
    if row.width in (32, 64) and not allowed(row, 0, NARROW):
        if not (f"{WIDE}:" in row.loads and f"{WIDE}:" in row.stores):
            found.append(f"expected {WIDE}-bit loads and stores, got loads {row.loads} and stores {row.stores}")
    return found


def is_pass(row: Row) -> bool:
    """Return whether the kernel of `row` computes softmax attention between tokens and slots, or its gradients."""
    return row.kernel.startswith(("aggregate", "broadcast")) and "prepare" not in row.kernel


# Budgets


@dataclass(frozen=True)
class Budget:
    """A limit on a value in the compile report, such as instructions per logit, for the kernels that a call launches.

    Attributes:
        name: description of the value, for messages.
        kernels: prefixes of kernel names. The values of the matching kernels are added. For "warps", the minimum is used.
        use, width, slots: the call, such as "performer forward", its head width, and its number of slots (0 for any).
        most: the budget. For "warps", it is a minimum, otherwise a maximum.
        reached: a looser limit for kernels that are known to exceed the budget, otherwise None.
        reason: why the kernels exceed the budget.
        column: "loop" or "whole" (columns of the compile report), "whole over loop" (their ratio), "thousand" (instructions per
            1,000 multiply-adds), or "warps" (resident warps per multiprocessor).
        against: another call, or "". If set, the value is divided by the value of the same kernels in that call.
        dtype: the dtype. If it is not bf16, the value is divided by the value of the same kernels in bf16.
    """

    name: str
    kernels: tuple[str, ...]
    use: str
    width: int
    slots: int
    most: float
    reached: float | None = None
    reason: str = ""
    column: str = "loop"
    against: str = ""
    dtype: str = "bf16"

    def value(self, rows: Iterable[Row]) -> float | None:
        """Return the value to compare with `most`, or None if no rows match. `rows` must be from one Triton version."""
        rows = [row for row in rows if row.arch == "sm_90" and row.width == self.width]
        value = self.sum([row for row in rows if row.dtype == self.dtype], self.use)
        if value is None or (self.dtype == "bf16" and not self.against):
            return value
        other = self.sum([row for row in rows if row.dtype == "bf16"], self.against or self.use)
        return value / other if other else None

    def sum(self, rows: Iterable[Row], use: str) -> float | None:
        values: dict[str, float] = {}  # the worst specialization of each kernel
        worst = min if self.column == "warps" else max
        for row in rows:
            if row.kernel.startswith(self.kernels) and row.used_by(use, self.slots):
                values[row.kernel] = worst(values.get(row.kernel, self.column_of(row)), self.column_of(row))
        if not values:
            return None
        return min(values.values()) if self.column == "warps" else sum(values.values())

    def column_of(self, row: Row) -> float:
        if self.column == "whole over loop":
            return row.whole / row.loop if row.loop else 0.0
        if self.column == "thousand":
            return 1000 * row.loop / row.multiply_adds if row.multiply_adds else 0.0
        return row.resident_warps if self.column == "warps" else getattr(row, self.column)

    def exceeds(self, value: float, limit: float) -> bool:
        return value < limit if self.column == "warps" else value > limit


EXACT = "the backward pass recomputes exponentials exactly, so row_max and 1 / total are not folded into products"
PADDED = "a tile has 128 slots, but its 18 slots of padding do not count"
BACKWARD = ("broadcast_tokens_kernel", "broadcast_slots_kernel")
# Name, kernels, call, and the pair (most, reached) for case A (width 32, 110 slots) and case B (width 64, 256 slots)
PASSES = (
    ("broadcast forward", ("broadcast_forward_kernel",), "performer forward", (8, None), (8.5, None)),
    ("aggregate forward", ("aggregate_forward_kernel",), "performer forward", (9, None), (12.5, None)),
    ("broadcast backward", BACKWARD, "performer backward", (10, 12.4), (14.5, 21.5)),
    ("aggregate tokens", ("aggregate_tokens_kernel",), "performer backward", (9.5, None), (15, None)),
    ("aggregate slots, learned", ("aggregate_slots_kernel",), "performer+learned backward", (11, None), (15, None)),
    ("aggregate slots, pooled", ("aggregate_slots_kernel",), "nystrom backward", (11, None), (15, None)),
)
WHOLE = (
    ("broadcast forward", ("broadcast_forward_kernel",), "performer forward", 1.29),
    ("aggregate forward", ("aggregate_forward_kernel",), "performer forward", 1.67),
    ("aggregate tokens", ("aggregate_tokens_kernel",), "performer backward", 1.26),
)
WARPS = (
    ("broadcast forward", ("broadcast_forward_kernel",), "performer forward", 16),
    ("aggregate forward", ("aggregate_forward_kernel",), "performer forward", 16),
    ("broadcast backward", BACKWARD, "performer backward", 8),
    ("aggregate tokens", ("aggregate_tokens_kernel",), "performer backward", 8),
)
NARROW_TABLES = "with Triton 3.6, reading the tables of angles takes more instructions"
ROPE = (
    ("aggregate forward", ("aggregate_forward_kernel",), "performer forward", 1.2, 1.22),
    ("broadcast forward", ("broadcast_forward_kernel",), "performer forward", 1.25, None),
    ("aggregate tokens", ("aggregate_tokens_kernel",), "performer backward", 1.35, 1.42),
)
SERIAL = "the backward pass has a loop of unknown length, so its predicted time is infinite"
LINEAR = (  # with 128 random features: name, kernel, direction, and the budgets for elu and for relu
    ("aggregate forward", "linear_aggregate_forward", "forward", 6.5, 4.5),
    ("broadcast forward", "linear_broadcast_forward", "forward", 8, 6),
    ("aggregate tokens", "linear_aggregate_tokens", "backward", 9.5, 7.5),
    ("broadcast backward", "linear_broadcast", "backward", 21, 21),
)
CHANNEL = "the products are small, and each element is prepared for them several times"
# Instructions of whole programs per element of k, summed over all kernels of a direction. Without random features, each channel
# is a slot, so an element of k is a (token, slot) pair.
CHANNELS = (  # name, kernels, direction, and the pair (most, reached)
    ("forward", ("linear_",), "forward", (16, 21)),
    ("backward", ("linear_",), "backward", (40, 59)),
)


# For the first rows of PASSES: the limits `reached` on instructions per logit in float32, relative to bfloat16.
FLOAT32 = (4.9, 4.4, 13.5, 9.8)
TRIPLED = "a float32 product takes three TF32 products, and its operands leave few registers"


def budgets() -> Iterator[Budget]:
    for name, kernels, use, case_a, case_b in PASSES:
        sized = use.startswith("performer ")  # the numbers of slots of cases A and B apply only to these calls
        yield Budget(name, kernels, use, 32, 110 * sized, *case_a, reason=EXACT)
        yield Budget(name, kernels, use, 64, 256 * sized, *case_b, reason=EXACT)
    for name, kernels, use, reached in WHOLE:
        yield Budget(f"{name}, whole program over loop", kernels, use, 32, 110, 1.25, reached, PADDED, "whole over loop")
    for name, kernels, use, most in WARPS:
        for width, slots in ((32, 110), (64, 256)):
            least = most if width == 32 else 8
            yield Budget(f"{name}, resident warps", kernels, use, width, slots, least, column="warps")
    for name, kernels, use, most, reached in ROPE:
        call = use.replace(" ", "+rope ")
        yield Budget(f"{name}, RoPE over no RoPE", kernels, call, 32, 110, most, reached, NARROW_TABLES, against=use)
    for (name, kernels, use, *_), reached in zip(PASSES, FLOAT32, strict=False):
        yield Budget(f"{name}, fp32 over bf16", kernels, use, 64, 110, 4, reached, TRIPLED, dtype="fp32")
    yield Budget("dft_tokens per 1,000 multiply-adds", ("dft_tokens",), "fourier_mixing forward", 64, 0, 30, column="thousand")
    for name, kernels, direction, elu, relu in LINEAR:
        for variant, most in (("+elu", elu), ("", relu)):
            use = f"linear_attention_projected{variant} {direction}"
            yield Budget(f"linear {name}{variant}", (kernels,), use, 32, 128, most)
    for name, kernels, direction, limits in CHANNELS:
        use = f"linear {direction}"
        yield Budget(f"linear {name}, channels as features", kernels, use, 32, 0, *limits, CHANNEL, "whole")


BUDGETS = tuple(budgets())


@dataclass(frozen=True)
class Predicted:
    """A budget, in microseconds, for the predicted time of a call on the H100, summed over its launches (see launch_times.py).

    Attributes:
        directions: "forward", "backward" or both. Only launches in these directions count.
        kernels: prefixes of kernel names. Only launches of these kernels count.
        most, reached, reason: as in Budget.
    """

    name: str
    op: str
    case: Case
    dtype: str
    directions: tuple[str, ...]
    most: float
    reached: float | None = None
    reason: str = ""
    kernels: tuple[str, ...] = ("",)


CASE_A = Case("", batch=128, heads=4, tokens=1024, width=32, features=110)
HEADS_512 = Case("", batch=128, heads=4, tokens=1024, width=32, features=64, taps=33)
BOTH = ("forward", "backward")
PREDICTED = (
    Predicted("forward, case A", "performer_attention", CASE_A, "bf16", ("forward",), 80),
    Predicted("backward, case A", "performer_attention", CASE_A, "bf16", ("backward",), 200),
    Predicted("pinv, 512 heads, 16-bit", "nystrom_attention", HEADS_512, "bf16", BOTH, 100, kernels=("pinv_",)),
    Predicted("pinv, 512 heads, fp32", "nystrom_attention", HEADS_512, "fp32", BOTH, 200, inf, SERIAL, ("pinv_",)),
)


def late(times: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Return two lists of messages (see `missed`) for the predicted `times`, in seconds, that exceed their budgets."""
    declared, failed = [], []
    for budget in PREDICTED:
        value = 1e6 * times.get(budget.name, 0.0)
        text = f"{budget.name}: {value:.4g} us predicted, budget {budget.most:g}"
        if value > budget.most:
            unknown = budget.reached == inf  # then an infinite time is declared, but a finite time above the budget fails
            exceeded = budget.reached is None or (value < inf if unknown else value > budget.reached)
            (failed if exceeded else declared).append(text if exceeded else f"{text}: {budget.reason}")
    return declared, failed


def missed(rows: Iterable[Row], budgets: Iterable[Budget]) -> tuple[list[str], list[str]]:
    """Return two lists of messages for exceeded budgets: one for values within Budget.reached, and one for all others."""
    rows = list(rows)
    declared, failed = [], []
    for budget in budgets:
        for version in dict.fromkeys(row.triton for row in rows):
            value = budget.value(row for row in rows if row.triton == version)
            if value is None or not budget.exceeds(value, budget.most):
                continue
            text = f"{budget.name}, width {budget.width}, Triton {version}: {value:.4g}, budget {budget.most:g}"
            if budget.reached is None or budget.exceeds(value, budget.reached):
                failed.append(text + (f", at most {budget.reached:g} declared" if budget.reached is not None else ""))
            else:
                declared.append(f"{text}: {budget.reason}")
    return declared, failed
