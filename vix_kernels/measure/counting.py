"""Count the instructions in a kernel's machine code, per logit and by pipe (an execution unit of a multiprocessor).

The loops in the machine code (SASS) are matched with the loops in TTGIR (see ttgir.py). The TTGIR loops show the number of
logits per iteration and the number of iterations. Main loops are the innermost loops with matrix instructions. If any main
loops compute logits, only these are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cache

from .machine_code import MATRIX, Instruction, access_bits
from .ttgir import Loop

LANES = 32
# Instructions by pipe. Every instruction also uses an issue slot. Matrix instructions use the `tensor` pipe. Instructions that
# are not listed use only an issue slot.
FMA = {"FADD", "FMUL", "FFMA", "IMAD", "HFMA2", "HADD2", "HMUL2", "FADD2", "FMUL2", "FFMA2"}
ALU = {
    "F2FP", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "HSETP2", "I2FP", "IABS", "IADD", "IADD3", "IMNMX", "ISETP", "LEA",
    "LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3",
}  # fmt: skip
EXP = {"MUFU", "F2F", "F2I", "I2F", "FRND"}  # conversions use the same pipe as exponentials
SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
GLOBAL = {"LDG", "STG", "LDGSTS", "LDL", "STL"}
ENDS = {"EXIT", "RET", "BRX", "JMX"}
PIPES = ("issue", "fma", "alu", "exp", "tensor", "shared", "global")


@dataclass(frozen=True)
class Rates:
    """Throughput of a multiprocessor per clock cycle, in thread instructions.

    `tensor` is in multiply-adds. `shared` and `global_` are in bytes.
    """

    fma: int
    tensor: int
    issue: int = 128
    alu: int = 64
    exp: int = 16
    shared: int = 128
    global_: int = 64


# Sources: the throughput table for arithmetic instructions in the CUDA C++ Programming Guide, and the published peak rates of
# 16-bit matrix products with float32 accumulators. A multiprocessor exchanges up to 64 bytes per cycle with the L2 cache.
RATES = {
    "sm_80": Rates(fma=64, tensor=1024),
    "sm_86": Rates(fma=128, tensor=256),
    "sm_89": Rates(fma=128, tensor=256),
    "sm_90": Rates(fma=128, tensor=2048),
    "sm_100": Rates(fma=128, tensor=4096),
    "sm_120": Rates(fma=128, tensor=256),
}


@dataclass(frozen=True)
class Counts:
    """Work of one warp by pipe: 16-bit multiply-adds for `tensor` (TF32 multiply-adds count twice), bytes per lane for `shared`
    and `global_`, and instructions for the other pipes.
    """

    issue: int = 0
    fma: int = 0
    alu: int = 0
    exp: int = 0
    tensor: int = 0
    shared: int = 0
    global_: int = 0

    def cycles(self, warps: int, arch: str) -> dict[str, float]:
        """Return the number of cycles for which `warps` warps occupy each pipe of a multiprocessor, indexed by pipe."""
        lanes = {name: 1 if name == "tensor" else LANES for name in PIPES}
        return {
            name: getattr(self, each.name) * lanes[name] * warps / getattr(RATES[arch], each.name)
            for name, each in zip(PIPES, fields(self), strict=True)
        }


@dataclass(frozen=True)
class Section:
    """The body of a loop, or of the whole program, without inner loops.

    `counts` is the work of one warp per execution. `trips` is an expression for the number of executions.
    """

    trips: str
    counts: Counts

    def __str__(self) -> str:
        return " ".join([*map(str, astuple(self.counts)), self.trips])

    @classmethod
    def parse(cls, text: str) -> Section:
        *counts, trips = text.split(" ", len(PIPES))
        return cls(trips, Counts(*map(int, counts)))


@dataclass(eq=False)
class MachineLoop:
    """A loop in the machine code. `code` excludes inner loops. `matched` is the corresponding TTGIR loop, or None."""

    code: list[Instruction]
    children: list[MachineLoop] = field(default_factory=list)
    matched: Loop | None = None

    @property
    def own_products(self) -> int:
        return sum(map(is_product, self.code))

    @property
    def multiplies(self) -> bool:
        return bool(self.own_products) or any(each.multiplies for each in self.children)

    def innermost(self) -> list[MachineLoop]:
        """Return the innermost loops with matrix instructions."""
        inside = [loop for each in self.children for loop in each.innermost()]
        return inside or [self] * bool(self.own_products)


def is_product(instruction: Instruction) -> bool:
    return bool(MATRIX.fullmatch(instruction.kind))


# Loops


def loops(code: Sequence[Instruction]) -> MachineLoop:
    """Return the whole program as a MachineLoop, whose children are the outermost loops of the program.

    Only natural loops count. In a natural loop, a branch goes back to a block that dominates the branch. Code that the compiler
    moved to the end of the program, and that jumps back from there, is not a loop. Code that is never reached, such as padding,
    is ignored.
    """
    starts, successors = blocks(code)
    reached = dominators(successors)
    bodies: dict[int, set[int]] = {}
    predecessors: dict[int, list[int]] = {at: [] for at in reached}
    for at in reached:
        for to in successors[at]:
            predecessors[to].append(at)
    for at in reached:
        for to in successors[at]:
            if reached[at] >> to & 1:  # the target dominates the branch
                body, waiting = bodies.setdefault(to, {to}), [at]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting += predecessors[block]
    parts = [code[start:end] for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    found = {head: body for head, body in bodies.items() if not waits_for_barrier([i for at in body for i in parts[at]])}
    made = {head: MachineLoop([]) for head in found}
    program = MachineLoop([])
    order = sorted(found, key=lambda head: len(found[head]))
    for head in sorted(found):
        outer = next((each for each in order if each != head and head in found[each] and found[head] < found[each]), None)
        (program if outer is None else made[outer]).children.append(made[head])
    for at in sorted(reached):
        owner = next((made[head] for head in order if at in found[head]), program)
        owner.code += parts[at]
    return program


def blocks(code: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """Return the index of the first instruction of each basic block, and the indices of the successors of each block."""
    at = {each.address: index for index, each in enumerate(code)}
    heads = {0}
    for index, each in enumerate(code):
        if each.target is not None or each.kind in ENDS:
            heads |= {index + 1, at.get(each.target, index + 1)}
    starts = sorted(head for head in heads if head < len(code))
    number = {start: block for block, start in enumerate(starts)}
    successors = []
    for block, end in enumerate([*starts[1:], len(code)]):
        last = code[end - 1]
        always = not last.guard and last.opcode == "BRA" and last.target is not None
        following = [number[at[last.target]]] if last.target in at else []
        if not always and not (last.kind in ENDS and not last.guard) and block + 1 < len(starts):
            following.append(block + 1)
        successors.append(following)
    return starts, successors


def dominators(successors: list[list[int]]) -> dict[int, int]:
    """Return a dict that maps each reachable block to a bit mask of its dominators. The keys are in reverse postorder."""
    order, seen, waiting = [], {0}, [(0, iter(successors[0]))]
    while waiting:  # a depth-first search, which appends the blocks in postorder
        block, rest = waiting[-1]
        following = next((each for each in rest if each not in seen), None)
        if following is None:
            order.append(block)
            waiting.pop()
        else:
            seen.add(following)
            waiting.append((following, iter(successors[following])))
    order.reverse()
    every = (1 << len(successors)) - 1
    found = dict.fromkeys(order, every) | {0: 1}
    changed = True
    while changed:
        changed = False
        before = {block: every for block in order}
        for block in order:
            for to in successors[block]:
                before[to] &= found[block]
        for block in order[1:]:
            new = before[block] | 1 << block
            changed |= new != found[block]
            found[block] = new
    return found


def waits_for_barrier(code: list[Instruction]) -> bool:
    """Return whether a loop only waits for a barrier in shared memory, or for free tensor memory.

    Such a loop counts as straight-line code.
    """
    return len(code) < 16 and any(each.kind in ("SYNCS", "UTCATOMSWS") for each in code)


def match(machine: MachineLoop, loop: Loop) -> None:
    """Set `machine.matched` to `loop`, with inner loops unrolled as in `machine`. Then match the inner loops in order."""
    pairs = align(machine.children, loop.children)
    if pairs is None:  # align only the loops with products, because ptxas may split the other loops
        ours, sources = ([each for each in inner if each.multiplies] for inner in (machine.children, loop.children))
        pairs = align(ours, sources) or []
    machine.matched = loop.unrolled([sources for _, sources in pairs])
    for ours, sources in pairs:
        match(ours, sources)


def align(ours: list[MachineLoop], sources: list[Loop]) -> list[tuple[MachineLoop, Loop]] | None:
    """Return the pairs of corresponding loops in order, or None if a loop has no match.

    TTGIR loops with constant trip counts do not need a match, because ptxas may have unrolled them.
    """
    if not sources:
        return None if ours else []
    if ours and ours[0].multiplies == sources[0].multiplies:
        rest = align(ours[1:], sources[1:])
        if rest is not None:
            return [(ours[0], sources[0]), *rest]
    return align(ours, sources[1:]) if sources[0].constant else None


# Counts


@dataclass(frozen=True)
class Analysis:
    """Results of the analysis of a kernel's machine code.

    Values for the main loops are per `unit`, except `waits` and `products`. If `unit` is "", all values for the main loops are
    0 or empty.

    Attributes:
        unit: "logit", or "value" if no main loop computes logits (see ttgir.Loop). "" if there is no main loop, or if no main
            loop computes logits and at least one has no match in TTGIR.
        instructions: instructions of all lanes in the main loops.
        exponentials: exponentials of all lanes in the main loops.
        waits: number of instructions in the main loops that wait for matrix products.
        products: number of matrix products in the main loops, counted in TTGIR.
        multiply_adds: multiply-adds in the main loops.
        cycles: maps each name in PIPES to the cycles for which the main loops occupy this pipe of a multiprocessor.
        sections: the sections of the whole program (see Section).
    """

    unit: str
    instructions: float
    exponentials: float
    waits: int
    products: int
    multiply_adds: float
    cycles: dict[str, float]
    sections: tuple[Section, ...]


def analyze(code: Sequence[Instruction], loop: Loop, warps: int, arch: str) -> Analysis:
    program = loops(code)
    match(program, loop)
    main = program.innermost()
    with_logits = [each for each in main if each.matched is not None and each.matched.logits]
    unit = "logit" if with_logits else "value" if main else ""
    main = with_logits or main
    if any(each.matched is None for each in main):
        main, unit = [], ""
    instructions = exponentials = multiply_adds = 0.0
    cycles = Counter()
    for each in main:
        elements = each.matched.logits or each.matched.values or 1
        counts = counted_loop(each, warps)
        instructions += counts.issue * LANES * warps / elements
        exponentials += sum(i.opcode.startswith("MUFU.EX2") for i in each.code) * LANES * warps / elements
        multiply_adds += each.matched.multiply_adds / elements
        cycles.update({name: value / elements for name, value in counts.cycles(warps, arch).items()})
    waits = sum(i.opcode.startswith("WARPGROUP.DEPBAR") for each in main for i in each.code)
    products = sum(each.matched.products for each in main)
    return Analysis(unit, instructions, exponentials, waits, products, multiply_adds, dict(cycles), sections(program, warps))


def sections(machine: MachineLoop, warps: int, trips: str = "1") -> tuple[Section, ...]:
    """Return the sections of a program. The trip count of a loop without a match in TTGIR is "?"."""
    found = [Section(trips, counted_loop(machine, warps))]
    for each in machine.children:
        inner = each.matched.trips if each.matched is not None else "?"
        found += sections(each, warps, inner if trips == "1" else trips if inner == "1" else f"{trips}*{inner}")
    return tuple(found)


def counted_loop(machine: MachineLoop, warps: int) -> Counts:
    """Return the work of one warp in one iteration, without inner loops."""
    counts = counted(machine.code)
    if counts.tensor or not machine.own_products or machine.matched is None:
        return counts
    return replace(counts, tensor=machine.matched.multiply_adds // warps)  # on sm_100, opcodes do not show shapes


def counted(code: Iterable[Instruction]) -> Counts:
    kinds = Counter((each.opcode, each.guard == "@!PT") for each in code)
    work = [[times * count for count in astuple(work_of(*kind))] for kind, times in kinds.items()]
    return Counts(*map(sum, zip(*work, strict=True)))


@cache
def work_of(opcode: str, disabled: bool) -> Counts:
    """Return the work of one instruction. An instruction whose guard is never true uses only an issue slot."""
    if disabled:
        return Counts(issue=1)
    kind, *modifiers = opcode.split(".")
    size = 0
    if kind in SHARED | GLOBAL:
        matrices = next((int(m) for m in modifiers if m in ("1", "2", "4")), 1) if kind in ("LDSM", "STSM") else 0
        size = 4 * matrices or access_bits(kind, modifiers) // 8
    return Counts(
        issue=1,
        fma=int(kind in FMA),
        alu=int(kind in ALU),
        exp=int(kind in EXP),
        tensor=multiply_adds(kind, modifiers),
        shared=size if kind in SHARED or kind == "LDGSTS" else 0,
        global_=size if kind in GLOBAL else 0,
    )


def multiply_adds(kind: str, modifiers: list[str]) -> int:
    """Return the number of multiply-adds that one warp executes per instruction. TF32 multiply-adds count twice.

    Four warps execute one HGMMA together.
    """
    factor = 2 if "TF32" in modifiers else 1
    if kind == "HGMMA":
        rows, columns, depth = map(int, next(each for each in modifiers if "x" in each).split("x"))
        return factor * rows * columns * depth // 4
    if kind == "HMMA":
        return factor * 16 * 8 * int(modifiers[0].removeprefix("168"))
    return 0
