"""Count the global memory traffic of the ops, and compare it with the minimum.

    q, k, v = torch.randn(3, 4, 4, 1024, 32, dtype=torch.bfloat16, requires_grad=True).unbind()
    traffic = measure(performer_attention, q, k, v, orthogonal_projection(110, 32, seed=0), backend="triton")
    print(traffic.forward.ratio, traffic.backward.ratio)
    print(traffic.forward)  # launch by launch

The traffic of a launch is the number of bytes it loads plus the number of bytes it stores. A byte that is loaded several times
counts once, and so does a byte that is stored several times. This models a GPU whose cache keeps everything during a launch and
nothing between launches. The kernels run in Triton's interpreter, and the addresses of their loads and stores are recorded.
Masked lanes, shared projections and views of one packed tensor are therefore counted correctly. A PyTorch operator counts as a
launch that reads its operands and writes its result.

The minimum traffic of a forward or backward pass is the number of bytes that it reads from its arguments, plus the number of
bytes of its results. Each byte counts once. The arguments of the forward pass are the tensors that the caller passes. The
arguments of the backward pass are the same tensors, the outputs, and the gradients of the outputs. All other traffic, such as
statistics saved for the backward pass, is overhead of the implementation.

Each line of the output is one launch: its total KiB, then the KiB loaded | stored per argument of the kernel. Traffic above
the minimum comes from arguments of the op that appear in several lines, and from intermediate tensors. Nothing is timed, and no
GPU is needed. If other processes use the same CPU cores, the command runs fastest with OMP_NUM_THREADS=1.

examples:
  vix dev traffic
  vix dev traffic --op performer_attention --tokens 4096 --all-gradients --arch sm_80
  vix dev traffic --op apply_rope --batch 4 --heads 8 --width 64 --dtype fp32
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import backends, conditions
from ..commands import DTYPES, Parser, within
from ..primitives.registry import operators
from ..testing import SPECS, Case
from .interpreter import fast_interpreter, watched
from .offline import TARGETS

OVERWRITING = ("aten::copy_", "aten::fill_", "aten::zero_")  # operators that change a tensor without reading it


@dataclass(frozen=True)
class Launch:
    """The bytes that a kernel or PyTorch operator loads and stores, by argument.

    A byte that is loaded (or stored) several times counts once. Arguments in the same storage have one common key, such as
    "q+k+v".
    """

    kernel: str
    loaded: dict[str, int]
    stored: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass: its launches in order, and the minimum number of bytes that it must load and store."""

    launches: list[Launch]
    least: int

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.launches)

    @property
    def ratio(self) -> float:
        return self.bytes / self.least

    def __str__(self) -> str:
        lines = [f"{'KiB':>10}  launch"]
        for each in self.launches:
            moved = " | ".join(
                ", ".join(f"{name} {kib(size)}" for name, size in part.items()) for part in (each.loaded, each.stored)
            )
            lines.append(f"{kib(each.bytes):>10}  {each.kernel}: {moved}")
        lines.append(f"{kib(self.bytes):>10}  in total, {self.ratio:.3f} times the minimum, {kib(self.least)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Traffic:
    forward: Pass
    backward: Pass | None  # None if no tensor requires a gradient


def kib(size: int) -> str:
    return f"{size / 1024:.1f}"


def measure(function: Callable[..., Any], *args: Any, arch: str = "sm_90", split: bool = True, **kwargs: Any) -> Traffic:
    """Return the traffic of function(*args, **kwargs) and of its backward pass.

    Args:
        function: an op of this library.
        args, kwargs: the arguments of `function`, with tensors on the CPU and backend="triton". The backward pass computes the
            gradients of all tensors that require gradients. If no tensor requires gradients, only the forward pass is measured.
        arch: the GPU whose launch configurations are used, such as "sm_90".
        split: whether to split tokens into chunks as on that GPU. False keeps all tokens of a head in one chunk.

    Raises:
        ValueError: `arch` is unknown, a tensor is not on the CPU, or the call launched no kernel of this library.
        RuntimeError: kernels are not interpreted in this process, or the interpreter of the installed Triton is not supported.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch: expected one of {', '.join(TARGETS)}, got {arch!r}")
    if not backends.interpreted():
        raise RuntimeError("traffic is measured in Triton's interpreter: set TRITON_INTERPRET=1 before importing triton")
    inputs = list(tensors([args, kwargs]))
    for x in inputs:
        if x.device.type != "cpu":
            raise ValueError(f"args: expected tensors on the CPU, where the interpreter runs, got one on {x.device}")

    with metered(inputs, arch, split) as meter:
        result = function(*args, **kwargs)
    if all(each.kernel.startswith("aten::") for each in meter.launches):
        raise ValueError("function: expected an op that launches kernels, got a call that launched none (backend='triton'?)")
    outputs = list(tensors([result]))
    forward = meter.total(outputs)

    leaves = [x for x in inputs if x.requires_grad]
    if not leaves:
        return Traffic(forward, None)
    outputs = [x for x in outputs if x.requires_grad]
    cotangents = [torch.randn_like(x) for x in outputs]
    with metered([*inputs, *outputs, *cotangents], arch, split) as meter:
        gradients = torch.autograd.grad(outputs, leaves, cotangents)
    return Traffic(forward, meter.total(gradients))


def tensors(x: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested arguments, including those in dataclasses such as Rope."""
    for leaf in tree_leaves(x):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf):
            yield from tensors([getattr(leaf, each.name) for each in fields(leaf)])


# How bytes are counted


class Touched:
    """A set of bytes in the storages of the given tensors.

    `maps` maps the address of each storage to an array that is nonzero at the bytes in the set.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = [x.untyped_storage() for x in tensors]
        # Lengths are multiples of 16 bytes, so the arrays can be viewed as elements of any size.
        self.maps = {each.data_ptr(): np.zeros(-(-each.nbytes() // 16) * 16, np.int8) for each in storages}

    @classmethod
    def all_of(cls, tensors: Iterable[Tensor]) -> Touched:
        """Return the set of bytes that the elements of `tensors` occupy."""
        tensors = [x for x in tensors if x.numel()]
        touched = cls(tensors)
        for x in tensors:
            elements = torch.from_numpy(touched.maps[x.untyped_storage().data_ptr()].view(f"i{x.itemsize}"))
            shape = [size if stride else 1 for size, stride in zip(x.shape, x.stride(), strict=True)]
            elements.as_strided(shape, x.stride(), x.storage_offset()).fill_(-1)
        return touched

    def add(self, addresses: np.ndarray, size: int) -> None:
        """Add the bytes of the elements at `addresses`, which must all be in one storage. An element has `size` bytes."""
        if not addresses.size:
            return
        first, last = int(addresses.min()), int(addresses.max())
        starts = sorted(self.maps)
        at = bisect_right(starts, first) - 1
        if at < 0 or last + size > starts[at] + len(self.maps[starts[at]]):
            raise IndexError(f"an access to addresses {first:#x} to {last:#x} is not within one argument's storage")
        self.maps[starts[at]].view(f"i{size}")[(addresses - starts[at]) // size] = -1

    def add_common(self, one: Touched, other: Touched) -> None:
        """Add the bytes that are in both `one` and `other`."""
        for start in self.maps.keys() & one.maps.keys() & other.maps.keys():
            self.maps[start] |= one.maps[start] & other.maps[start]

    def count(self) -> int:
        return sum(int(np.count_nonzero(each)) for each in self.maps.values())

    def by_name(self, named: list[tuple[str, Tensor]]) -> dict[str, int]:
        """Return how many bytes of each storage are in the set.

        Each key consists of the names of all tensors that share a storage, joined by "+". If a tensor is passed under several
        names, only the first is used.
        """
        names: dict[int, dict[int, str]] = defaultdict(dict)
        for name, x in named:
            names[x.untyped_storage().data_ptr()].setdefault(id(x), name)
        counts: Counter[str] = Counter()
        for start, each in self.maps.items():
            counts["+".join(names[start].values())] += int(np.count_nonzero(each))
        return {name: count for name, count in counts.items() if count}


class Meter(TorchDispatchMode):
    """Records the traffic of kernel launches and PyTorch operators inside a `with` block.

    `given` is the set of bytes in the arguments of a forward or backward pass. `read` is the set of those bytes that the pass
    has read.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.given, self.read = Touched.all_of(given), Touched(given)
        self.launching = False

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        if 0 in grid:
            return
        named = [(name, x) for name, x in zip(kernel.arg_names, args, strict=False) if isinstance(x, Tensor)]
        loaded, stored = Touched(x for _, x in named), Touched(x for _, x in named)
        self.launching = True  # PyTorch operators that the interpreter calls do not count
        try:
            with watched(loaded.add, stored.add):
                kernel[grid](*args, **meta)
        finally:
            self.launching = False
        self.add(kernel.__name__, named, loaded, stored)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "vix_kernels":
            with self:  # counts the launches of the operator
                return operators[op._schema.name.split("::")[1]].implementation(*args)
        with self:  # counts the operators that `op` consists of, if any
            result = op.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = op(*args, **kwargs)
        if not self.launching:
            self.operator(op._schema, args, kwargs, result)
        return result

    def operator(self, schema: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Record a PyTorch operator as one kernel that reads its operands and writes its result. Skip allocations and views.

        Operands that are only overwritten do not count as read.
        """
        values = {each.name: value for each, value in zip(schema.arguments, args, strict=False)} | kwargs
        operands = [(name, x) for name, value in values.items() for x in tensors([value])]
        changed = {each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write}
        unread = changed if schema.name in OVERWRITING else changed & {"out"}
        results = [(name, x) for name, x in operands if name in changed]
        if not changed:
            results = [("result", x) for x in tensors([result])]
            homes = {x.untyped_storage().data_ptr() for _, x in operands}
            if "empty" in schema.name or all(x.untyped_storage().data_ptr() in homes for _, x in results):
                return
        loaded = Touched.all_of(x for name, x in operands if name not in unread)
        self.add(schema.name, operands if changed else operands + results, loaded, Touched.all_of(x for _, x in results))

    def add(self, kernel: str, named: list[tuple[str, Tensor]], loaded: Touched, stored: Touched) -> None:
        self.launches.append(Launch(kernel, loaded.by_name(named), stored.by_name(named)))
        self.read.add_common(loaded, self.given)

    def total(self, results: Iterable[Tensor]) -> Pass:
        return Pass(self.launches, self.read.count() + Touched.all_of(results).count())


@contextmanager
def metered(given: list[Tensor], arch: str, split: bool) -> Iterator[Meter]:
    """Yield a Meter that records the traffic of the forward or backward pass in the `with` block.

    `given` contains the arguments of the pass. `arch` and `split` are as in `measure`.
    """
    meter = Meter(given)
    with conditions.under(observer=meter.launch, arch=arch, split=split), fast_interpreter(), meter:
        yield meter


# The command


SIZES = {
    "batch": (4, "samples"),
    "heads": (4, "heads per sample"),
    "tokens": (1024, "tokens per sample"),
    "width": (32, "head width"),
    "features": (110, "random features, agents, projected keys or landmarks (at most 64 landmarks)"),
}


def main(argv: list[str]) -> int:
    ops = [spec.name for spec in SPECS.values() if spec.public]
    parser = Parser.of("vix dev traffic", __doc__)
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, metavar="OP", help=f"{', '.join(ops)} (default: all)")
    for name, (default, what) in SIZES.items():
        about = f"{what} (default: {default})"
        parser.add_argument(f"--{name}", type=within(1, 1 << 20), default=default, metavar="N", help=about)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the tokens (default: bf16)")
    parser.add_argument("--rope", action="store_true", help="also apply RoPE in the attention operators")
    parser.add_argument(
        "--all-gradients", action="store_true", help="also compute gradients of parameters, such as random features"
    )
    parser.add_argument("--unsplit", action="store_true", help="keep all tokens of a head in one chunk (default: split)")
    parser.add_argument(
        "--arch", choices=TARGETS, default="sm_90", help="GPU whose launch configurations are used (default: sm_90)"
    )
    args = parser.parse_args(argv)
    shape = {name: getattr(args, name) for name in SIZES}
    print(f"{args.dtype}, {', '.join(f'{name} {size}' for name, size in shape.items())}, launched as on {args.arch}")
    for name in args.op:
        spec = SPECS[name]
        case = Case(name, **shape, rope="interleaved" if args.rope else None)
        problem = spec.problem(spec.fit(case), dtype=DTYPES[args.dtype])
        for each in spec.differentiable:
            problem.tensors[each].requires_grad_(args.all_gradients or each in spec.batched)
        try:
            traffic = measure(
                spec.function, *problem.tensors.values(), **problem.options, backend="triton",
                arch=args.arch, split=not args.unsplit,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            parser.error(f"{name}: {error}")
        print(f"\n{name} forward\n{traffic.forward}\n\n{name} backward\n{traffic.backward}", flush=True)
    return 0
