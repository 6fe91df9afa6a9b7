"""Find the loops, matrix products and logits of a kernel in TTGIR, Triton's intermediate representation for GPUs.

The machine code shows how many instructions a loop has, but not how many logits one iteration computes. TTGIR contains the
shapes of all tiles, and the operations that compute the bounds of the loops from the arguments. Shapes and bounds are read from
the compiled kernel, so this file does not need to change when a kernel is restructured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod

RESULT = re.compile(r"^(%[\w$.-]+)(?::\d+)? = ")
NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")  # "%x#1" is the second result of an operation
ATTRIBUTES = re.compile(r'"[^"]*"|\{[^{}]*\}')  # strings, such as inline PTX, and the attributes of an operation
FOR = re.compile(r"scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+)(?: iter_args\((.*?)\) ->)?")
SHAPE = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)")
PRODUCTS = {"tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma"}
LOADS = {"tt.load", "ttg.local_load"}
# A product whose accumulator is in tensor memory has no result. A separate operation loads the accumulator later.
ROOTS = PRODUCTS | {"ttng.tmem_load"}
INFIX = {"arith.addi": "+", "arith.subi": "-", "arith.muli": "*", "arith.divsi": "//", "arith.remsi": "%", "arith.andi": "&"}
COMPARE = {"slt": "<", "sle": "<=", "sgt": ">", "sge": ">=", "eq": "==", "ne": "!="}
WORDS = {"cdiv", "min", "max", "if", "else", "not"}
CASTS = {"arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"}
SCALAR = INFIX.keys() | CASTS | {"arith.minsi", "arith.maxsi", "arith.cmpi", "arith.select"}


@dataclass(frozen=True)
class Op:
    """A TTGIR operation. `loop` is the index in Reader.loops of the innermost loop around it, or 0 outside all loops."""

    name: str
    text: str
    operands: tuple[str, ...]
    loop: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The tensor shapes in the types of the operation: first those of the operands, then that of the result."""
        return [tuple(map(int, each.split("x")[:-1])) for each in SHAPE.findall(self.text)]

    @property
    def elements(self) -> int:
        """Number of elements of the result."""
        if self.name in PRODUCTS:
            a, b = self.shapes[:2]
            return prod(a[:-1]) * b[-1]
        return prod(self.shapes[-1]) if self.shapes else 1

    @property
    def multiply_adds(self) -> int:
        """Number of multiply-adds of a matrix product (m, k) x (k, n), possibly with a batch dimension."""
        a, b = self.shapes[:2]
        return prod(a) * b[-1]

    @property
    def is_exponential(self) -> bool:
        """Whether this is the exponential of a tile. Exponentials of vectors do not count."""
        named = self.name in ("math.exp2", "math.exp") or ("asm" in self.name and "ex2" in self.text) or "exp2" in self.name
        return named and bool(self.shapes) and len(self.shapes[-1]) > 1

    @property
    def is_maximum(self) -> bool:
        return self.name in ("arith.maxnumf", "arith.maximumf") and bool(self.shapes) and len(self.shapes[-1]) > 1


@dataclass(eq=False)
class Loop:
    """A loop, or the kernel itself, which counts as a loop with one iteration.

    Attributes:
        trips: number of iterations per iteration of the parent, as a Python expression of the kernel's arguments, the
            program ids pid_x, pid_y and pid_z, and the grid sizes grid_x, grid_y and grid_z. It is "?" if it depends on
            anything else, such as data.
        children: loops directly inside this one.
        products: number of matrix products per iteration, excluding those of the children.
        multiply_adds: number of multiply-adds of these products.
        logits: number of elements, per iteration, of the products from which exponentials are computed. If there are no such
            products, the number of elements of the exponentials.
        values: for loops without logits, the number of elements per iteration of the products to which max(product, 0) is
            applied. If there are none, the number of elements of the largest product that is not accumulated over iterations.
            If all products are accumulated, the number of elements of the largest operand of a product.
    """

    trips: str
    children: list[Loop] = field(default_factory=list)
    products: int = 0
    multiply_adds: int = 0
    logits: int = 0
    values: int = 0

    @property
    def constant(self) -> bool:
        return self.trips.isdigit()

    @property
    def multiplies(self) -> bool:
        """Whether this loop or a loop inside it computes matrix products."""
        return bool(self.products) or any(each.multiplies for each in self.children)

    def unrolled(self, kept: list[Loop]) -> Loop:
        """Return this loop after unrolling the inner loops that have a constant number of iterations and are not in `kept`."""
        found = replace(self, children=[])
        for each in self.children:
            if not each.constant or each in kept:
                found.children.append(each)
                continue
            inner, times = each.unrolled(kept), int(each.trips)
            found.children += inner.children
            for name in ("products", "multiply_adds", "logits", "values"):
                setattr(found, name, getattr(found, name) + times * getattr(inner, name))
        return found


def read(text: str) -> Loop:
    """Return the kernel as a `Loop`, whose children are the outermost loops of the kernel."""
    return Reader(text).loops[0]


class Reader:
    def __init__(self, text: str) -> None:
        self.ops: dict[str, Op] = {}  # name of the result -> operation
        self.listed: list[Op] = []
        self.carried: dict[str, list[str]] = {}  # loop-carried value -> initial value and yielded value
        self.results: dict[str, list[str]] = {}  # loop -> the loop-carried values that it returns
        self.arguments = set(re.findall(r"(%\w+):", next((x for x in text.splitlines() if "tt.func public" in x), "")))
        self.loops = [Loop("1")]
        self.parse(text)
        for at, loop in enumerate(self.loops):
            self.measure(loop, [op for op in self.listed if op.loop == at])

    def parse(self, text: str) -> None:
        open_blocks: list[tuple[int, int, str, list[str]]] = []  # indentation, loop, condition, loop-carried values
        for raw in text.splitlines():
            line = re.sub(r" loc\(.*$", "", raw.strip())
            indent = len(raw) - len(raw.lstrip())
            if open_blocks and line.startswith("}") and indent == open_blocks[-1][0]:
                _, loop, condition, variables = open_blocks.pop()
                if line.startswith("} else"):
                    open_blocks.append((indent, loop, f"not {condition}", variables))
                continue
            found = RESULT.match(line)
            body = line[found.end() :] if found else line
            loop = open_blocks[-1][1] if open_blocks else 0
            if " scf.for " in f" {body}":
                conditions = [each[2] for each in open_blocks if each[1] == loop and each[2]]
                open_blocks.append((indent, *self.open_loop(body, loop, conditions)))
                if found:
                    self.results[found[1]] = open_blocks[-1][3]
            elif body.startswith("scf.if "):
                open_blocks.append((indent, loop, self.expression(NAME.findall(body)[0]), []))
            elif body.startswith("scf.yield") and open_blocks:
                for variable, value in zip(open_blocks[-1][3], NAME.findall(body), strict=False):
                    self.carried[variable].append(value)
            name = body.split(" ")[0].strip('"').split("(")[0].strip('"')
            operands = NAME.findall(ATTRIBUTES.sub("", body).partition(" : ")[0])
            op = Op(name, body, tuple(operands), loop)
            self.listed.append(op)
            if found:
                self.ops[found[1]] = op

    def open_loop(self, body: str, loop: int, conditions: list[str]) -> tuple[int, str, list[str]]:
        _, first, last, step, arguments = FOR.search(body).groups()
        first, last, step = map(self.expression, (first, last, step))
        length = last if first == "0" else simplified(f"({last}-{first})")
        trips = simplified(length if step == "1" else f"cdiv({length},{step})")
        for condition in conditions:
            trips = f"({trips} if {condition} else 0)"
        self.loops.append(Loop("?" if "?" in trips else trips))
        self.loops[loop].children.append(self.loops[-1])
        pairs = re.findall(r"(%\S+) = (%[\w$.#-]+)", arguments or "")
        self.carried.update((variable, [value]) for variable, value in pairs)
        return len(self.loops) - 1, "", [variable for variable, _ in pairs]

    def expression(self, name: str) -> str:
        """Return the scalar `name` as an expression of arguments, program ids and grid sizes, with "?" for anything else."""
        op = self.ops.get(name)
        if op is None:
            return name[1:] if name in self.arguments else "?"  # other names are induction variables or loop-carried values
        if op.name == "arith.constant":
            value = op.text.split(" ")[1]
            return {"true": "1", "false": "0"}.get(value, value)
        if op.name in ("tt.get_program_id", "tt.get_num_programs"):
            return ("pid_" if op.name.endswith("id") else "grid_") + op.text.split(" ")[1]
        if op.name not in SCALAR:
            return "?"
        inner = [self.expression(each) for each in op.operands]
        if op.name in INFIX:
            return simplified(f"({inner[0]}{INFIX[op.name]}{inner[1]})")
        if op.name in ("arith.minsi", "arith.maxsi"):
            return simplified(f"{op.name[6:9]}({inner[0]},{inner[1]})")
        if op.name == "arith.cmpi":
            sign = COMPARE.get(op.text.split(" ")[1].strip(","))
            return simplified(f"({inner[0]}{sign}{inner[1]})") if sign else "?"
        if op.name == "arith.select":
            return simplified(f"({inner[1]} if {inner[0]} else {inner[2]})")
        return inner[0]  # a conversion to another integer type

    def measure(self, loop: Loop, ops: list[Op]) -> None:
        products = [op for op in ops if op.name in PRODUCTS]
        loop.products, loop.multiply_adds = len(products), sum(op.multiply_adds for op in products)
        exponentials = {self.roots(op.operands): op for op in ops if op.is_exponential}
        logits = {
            root
            for roots, op in exponentials.items()
            for root in roots
            if root.name in ROOTS and root.elements == op.elements  # other products affect the tile only through vectors
        }
        loop.logits = sum(root.elements for root in logits)
        if not loop.logits:  # exponentials of loaded tiles, as in linear attention
            loop.logits = sum(op.elements for op in exponentials.values())
        features = {root for op in ops if op.is_maximum for root in self.roots(op.operands) if root.name in ROOTS}
        loop.values = sum(root.elements for root in features)
        if not loop.values:
            fresh = [op.elements for op in products if len(op.operands) > 2 and not self.accumulates(op)]
            operands = [prod(shape) for op in products for shape in op.shapes[:2]]
            loop.values = max(fresh or operands, default=0)

    def roots(self, names: Iterable[str]) -> frozenset[Op]:
        """Return the products and loads that the values `names` depend on, including those of earlier iterations."""
        found, seen, waiting = set(), set(), list(names)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            op = self.ops.get(name.partition("#")[0])
            if op is not None and op.name in ROOTS | LOADS:
                found.add(op)
            else:
                waiting += self.before(name)
        return frozenset(found)

    def before(self, name: str) -> Iterable[str]:
        """Return the values from which `name` is computed. For a loop-carried value, this is the value that the loop yields."""
        name, _, at = name.partition("#")
        if name in self.carried:
            return self.carried[name][-1:]
        if name in self.results:
            return self.carried[self.results[name][int(at or 0)]]
        op = self.ops.get(name)
        if op is None:
            return ()
        return op.operands[int(at or 0) :][:1] if op.name == "ttng.warp_group_dot_wait" else op.operands

    def accumulates(self, product: Op) -> bool:
        """Return whether the accumulator of a product is carried from one iteration to the next."""
        waiting, seen = [product.operands[2]], set()
        while waiting:
            name = waiting.pop()
            if name in self.carried:
                return True
            op = self.ops.get(name.partition("#")[0])
            if name not in seen:
                seen.add(name)
                waiting += op.operands[2:3] if op is not None and op.name in PRODUCTS else self.before(name)
        return False


def simplified(text: str) -> str:
    """Return the value of an expression as text, or the expression itself if it contains variables."""
    variables = set(re.findall(r"[A-Za-z_]\w*|\?", text)) - WORDS
    return text if variables else str(evaluate(text, {}))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def evaluate(expression: str, values: dict[str, int]) -> int:
    """Return the value of an expression, given the values of its variables."""
    return int(eval(expression, {"__builtins__": {}}, {"cdiv": cdiv, "min": min, "max": max, **values}))
