"""Record the launches of a call, and replay them with other tensors (see plans.py).

A Recorder sees every allocation, launch and other operation of a call. Each tensor that a step reads or writes is a part of a
base: an input, an allocation, a result of an earlier operation, or a constant. A Plan replays the steps with new bases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from . import backends, conditions
from .primitives.registry import operators

ALIGNMENT = 256  # bytes; of the tensors in a workspace
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


@functools.cache
def compiled_launches() -> Any:
    """Return the module that launches compiled kernels. It is imported late, because Triton may not be installed."""
    from ._triton import compiled

    return compiled


@dataclass(frozen=True)
class Place:
    """Where a recorded tensor is found: in which base, and how many bytes after its start.

    `base` is the index of a tensor of a Recorder or, in the steps of a Plan, of a tensor of `Plan.run`.
    """

    base: int
    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def moved(self, places: dict[int, tuple[int, int]]) -> Place:
        base, offset = places[self.base]
        return replace(self, base=base, offset=self.offset + offset)

    def tensor(self, bases: Sequence[Tensor]) -> Tensor:
        base, storage = bases[self.base], bases[self.base].untyped_storage()
        start = (base.data_ptr() - storage.data_ptr() + self.offset) // self.dtype.itemsize
        return torch.empty(0, dtype=self.dtype, device=base.device).set_(storage, start, self.size, self.stride)


@dataclass
class Step:
    """One step of a plan. `args` has a Place for each tensor."""

    args: list[Any]

    @property
    def places(self) -> list[Place]:
        return [x for x in self.args if isinstance(x, Place)]

    def moved(self, places: dict[int, tuple[int, int]]) -> Step:
        return replace(self, args=[x.moved(places) if isinstance(x, Place) else x for x in self.args])


@dataclass
class Launch(Step):
    """A launch of a kernel. `compiled` is None in the interpreter."""

    kernel: Any
    grid: tuple[int, ...]
    meta: dict[str, Any]
    compiled: Any

    def __post_init__(self) -> None:
        self.pointers = [(i, x.base, x.offset) for i, x in enumerate(self.args) if isinstance(x, Place)]

    def replay(self, bases: list[Tensor], pointers: list[int], stream: int | None) -> None:
        args = self.args.copy()
        if self.compiled is None or self.kernel.pre_run_hooks:
            for i, *_ in self.pointers:
                args[i] = args[i].tensor(bases)
            self.kernel[self.grid](*args, **self.meta)
            return
        for i, base, offset in self.pointers:
            args[i] = pointers[base] + offset
        self.compiled.start(self.grid, stream, args)


@dataclass
class Operation(Step):
    """An operation of PyTorch that returns new tensors. `args` are the leaves of its positional and keyword arguments."""

    structure: TreeSpec  # of the arguments
    function: Callable
    results: Sequence[int]  # bases

    def replay(self, bases: list[Tensor], pointers: list[int], stream: int | None) -> None:
        leaves = [x.tensor(bases) if type(x) is Place else x for x in self.args]
        args, kwargs = tree_unflatten(leaves, self.structure)
        with torch._C._DisableAutocast():  # the recorder sees operations after their arguments are cast
            results = self.function(*args, **kwargs)
        for x in results if isinstance(results, tuple | list) else (results,):
            bases.append(x)
            pointers.append(x.data_ptr())


@dataclass
class Plan:
    """A pass that can be replayed.

    Attributes:
        allocations: size, stride and dtype of the outputs and workspaces.
        constants: tensors that existed before the call, but are not arguments, such as cached tables.
        steps: the launches and operations.
        outputs: for each output, the index of a base or a Place in it. None for a gradient that is not needed.
    """

    allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    constants: list[Tensor] = field(compare=False)
    steps: list[Step]
    outputs: list[int | Place | None]

    def run(self, sources: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Return the outputs and the bases: sources, allocations, constants, and the results of operations."""
        device = sources[0].device
        bases = [*sources]
        for size, stride, dtype in self.allocations:
            bases.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
        bases += self.constants
        current = device.index is None or device.index == torch.cuda.current_device()
        with nullcontext() if current else torch.cuda.device(device):
            pointers = [x.data_ptr() for x in bases]
            stream = None if backends.interpreted() else compiled_launches().current_stream()
            for step in self.steps:
                step.replay(bases, pointers, stream)
        return [x if x is None else bases[x] if type(x) is int else x.tensor(bases) for x in self.outputs], bases


class Recorder(TorchDispatchMode):
    """Records the steps of a call and of its backward pass.

    Attributes:
        bases: all tensors that are not views of others. They stay alive, so that their addresses remain unique.
        kinds: for each base: "input", "allocation", "result" (of an operation) or "constant".
        reason: why the call cannot be replayed, or None.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.bases: list[Tensor] = []
        self.kinds: list[str] = []
        self.starts: list[int] = []  # addresses of the bases
        self.storages: dict[int, list[int]] = {}  # the bases in each storage
        self.steps: list[Step] = []
        self.reason: str | None = None
        for x in inputs:
            self.add(x, "input")

    def add(self, x: Tensor, kind: str) -> int:
        self.bases.append(x)
        self.kinds.append(kind)
        self.starts.append(x.untyped_storage().data_ptr() if kind == "allocation" else x.data_ptr())
        self.storages.setdefault(x.untyped_storage()._cdata, []).append(len(self.bases) - 1)
        return len(self.bases) - 1

    def can_add(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether the addresses of `inputs` differ from each other and from those of all bases."""
        return len({x.data_ptr() for x in inputs} - {0, *self.starts}) == len(inputs)

    def place(self, x: Tensor) -> Place:
        bases = self.storages.get(x.untyped_storage()._cdata, [])
        exact = [base for base in bases if self.starts[base] == x.data_ptr()]
        if len(bases) > 1 and not exact:
            self.reason = "two arguments share memory"
        base = exact[0] if exact else bases[0] if bases else self.add(x, "constant")
        return Place(base, x.data_ptr() - self.starts[base], x.dtype, tuple(x.shape), x.stride())

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        conditions.recording.recorder = self
        try:
            with self:
                return function(*args, **kwargs)
        finally:
            conditions.recording.recorder = None

    def launch(self, start: Callable, kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        """Launch a kernel with the function `start`, and record the launch."""
        with _disable_current_modes():  # the interpreter runs operations of PyTorch
            compiled = start(kernel, grid, args, meta)
        if compiled is None and not backends.interpreted():
            self.reason = "only Triton can launch the kernels"
        self.steps.append(Launch(self.with_places(args), kernel, grid, meta, compiled))

    def with_places(self, args: Iterable[Any]) -> list[Any]:
        return [self.place(x) if isinstance(x, Tensor) else x for x in args]

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function.namespace == "vix_kernels":
            with self:
                return operators[function._opname].implementation(*args)
        results = function(*args, **(kwargs or {}))
        new = results if isinstance(results, tuple | list) else (results,)
        leaves, structure = tree_flatten((args, kwargs or {}))
        leaves = self.with_places(leaves)
        if function._opname in ALLOCATIONS:
            self.add(results, "allocation")
        elif all(isinstance(x, Tensor) and x.device == self.bases[0].device for x in new) and not function._schema.is_mutable:
            if any(x.untyped_storage()._cdata not in self.storages for x in new):  # not a view
                self.steps.append(Operation(leaves, structure, function, [self.add(x, "result") for x in new]))
        elif any(isinstance(x, Place) for x in leaves):
            self.reason = f"{function} has other effects than new tensors"
        return results

    def saved(self, results: Iterable[Tensor]) -> list[int]:
        """Return the bases that the autograd graph of `results` keeps for the backward pass."""
        nodes, seen, found = [x.grad_fn for x in results], {None}, {}
        while nodes:
            if (node := nodes.pop()) not in seen:
                seen.add(node)
                names = [name for name in dir(node) if name.startswith("_saved_")]  # of PyTorch's nodes
                saved = (*getattr(node, "saved_tensors", ()), *(getattr(node, name) for name in names))
                found |= {self.place(x).base: None for x in saved if isinstance(x, Tensor)}
                nodes += [each for each, _ in node.next_functions]
        return list(found)

    def plan(
        self, first: int, sources: dict[int, tuple[int, int]], outputs: Sequence[Tensor | None], kept: Sequence[int] = ()
    ) -> tuple[Plan, dict[int, tuple[int, int]]] | None:
        """Return a plan of the steps from `first` on, and the place of each base in it (index and offset in bytes).

        Return None if the steps cannot be replayed.

        Args:
            first: index of the first step.
            sources: places of the bases that exist before the first step.
            outputs: the outputs, or None for each gradient that is not needed.
            kept: bases that the backward pass reads.
        """
        steps, at, new = self.steps[first:], dict(sources), set()
        allocations, count = [], 1 + max(index for index, _ in sources.values())
        places = [None if x is None else self.place(x) for x in outputs]
        for x, place in zip(outputs, places, strict=True):
            if place is None or self.kinds[place.base] == "result":
                continue
            if self.kinds[place.base] != "allocation" or place.base in at:
                self.reason = "an output is not a new tensor"
            elif place.offset or x.untyped_storage().nbytes() != x.numel() * x.element_size():
                self.reason = "an output is a part of a tensor"
            new.add(place.base)
            at[place.base] = count + len(allocations), 0
            allocations.append((place.size, place.stride, place.dtype))
        for offsets in self.workspaces(steps, at, kept):
            if offsets:
                at |= {base: (count + len(allocations), start) for base, start in offsets.items()}
                allocations.append(((max(start + self.size(base) for base, start in offsets.items()),), (1,), torch.uint8))
        read = [place.base for step in steps for place in step.places]
        constants = [base for base in dict.fromkeys(read) if self.kinds[base] == "constant" and base not in at]
        results = [base for step in steps if isinstance(step, Operation) for base in step.results]
        at |= {base: (count + len(allocations) + i, 0) for i, base in enumerate((*constants, *results))}
        if any(base not in at for base in read):
            self.reason = "the backward pass reads a tensor that is not saved"
        if self.reason is not None:
            return None
        found: list[int | Place | None] = []
        for x, place in zip(outputs, places, strict=True):
            base = None if place is None else self.bases[place.base]
            whole = place is not None and (place.base in new or (x.shape, x.stride()) == (base.shape, base.stride()))
            found.append(at[place.base][0] if whole else place and place.moved(at))
        return Plan(allocations, [self.bases[base] for base in constants], [step.moved(at) for step in steps], found), at

    def size(self, base: int) -> int:
        return self.bases[base].untyped_storage().nbytes()

    def workspaces(self, steps: Sequence[Step], at: Iterable[int], kept: Iterable[int]) -> Iterable[dict[int, int]]:
        """Return the offsets of allocations in two workspaces: one for the bases in `kept`, and one for all others.

        Tensors in the second workspace may share memory if they are not used at the same time.
        """
        lifetimes = {base: (0, len(steps)) for base in kept}
        for i, step in enumerate(steps):
            for place in step.places:
                lifetimes[place.base] = lifetimes.get(place.base, (i, i))[0], max(i, lifetimes.get(place.base, (i, i))[1])
        offsets: tuple[dict[int, int], dict[int, int]] = {}, {}
        for base, (first, last) in lifetimes.items():
            if self.kinds[base] != "allocation" or base in at:
                continue
            start, others = 0, offsets[base not in kept]
            for other, begin in sorted(others.items(), key=lambda item: item[1]):
                used = lifetimes[other][0] <= last and first <= lifetimes[other][1]
                if used and begin < start + self.size(base):
                    start = max(start, -(-(begin + self.size(other)) // ALIGNMENT) * ALIGNMENT)
            others[base] = start
        return offsets
