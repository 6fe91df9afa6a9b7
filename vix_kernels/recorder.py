"""Record the kernel launches and PyTorch operations of a call and its backward pass, so that plans.py can replay them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from . import backends, conditions
from .primitives.registry import operators
from .replay import Launch, Location, Operation, PassPlan, Place, Step

ALIGNMENT = 256  # bytes; alignment of the tensors in a workspace
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
WRITES = {"copy_", "zero_"}  # operations that change only their first argument


@dataclass
class Base:
    """An input, or another recorded tensor that is not a view of an earlier base.

    It is kept alive, so that no other tensor reuses its storage.
    """

    tensor: Tensor
    kind: Literal["input", "allocation", "result", "constant"]

    def __post_init__(self) -> None:
        # The distance from the start of the storage to the first element, in bytes. Addresses are not stored, because FSDP may
        # free a storage and allocate it again. If an argument is a view, the rest of its storage is not part of the call.
        self.start = 0 if self.kind == "allocation" else start_in_storage(self.tensor)
        self.nbytes = self.tensor.untyped_storage().nbytes()


def start_in_storage(x: Tensor) -> int:
    return x.storage_offset() * x.element_size()


class Recorder(TorchDispatchMode):
    """Records the kernel launches and PyTorch operations of the functions that `run` calls.

    Attributes:
        bases: inputs, allocations, results of operations, and constants, in the order in which the recorder finds them.
        steps: the recorded launches and operations.
        reason: why the call cannot be replayed, or None.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.bases: list[Base] = []
        self.storages: dict[int, list[int]] = {}  # indices of the bases in each storage
        self.steps: list[Step] = []
        self.reason: str | None = None
        for x in inputs:
            self.add(x, "input")

    def refuse(self, reason: str) -> None:
        self.reason = self.reason or reason

    def add(self, x: Tensor, kind: Literal["input", "allocation", "result", "constant"]) -> int:
        self.bases.append(Base(x, kind))
        self.storages.setdefault(x.untyped_storage()._cdata, []).append(len(self.bases) - 1)
        return len(self.bases) - 1

    def are_new(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether the addresses of `inputs` differ from each other and from those of all bases."""
        return len({x.data_ptr() for x in inputs} - {base.tensor.data_ptr() for base in self.bases}) == len(inputs)

    def find_or_add(self, x: Tensor) -> Place:
        """Return the Place of x (see replay.py).

        If the storage of x is not known, x existed before the call, and is added as a constant.
        """
        found = self.storages.get(x.untyped_storage()._cdata, [])
        exact = [base for base in found if self.bases[base].start == start_in_storage(x)]
        if len(found) > 1 and not exact:
            self.refuse("arguments share memory")
        if not found and x.requires_grad:
            self.refuse("a tensor that is not an argument requires a gradient")
        base = exact[0] if exact else found[0] if found else self.add(x, "constant")
        location = Location(base, start_in_storage(x) - self.bases[base].start)
        return Place(location, x.dtype, tuple(x.shape), x.stride())

    def is_new(self, place: Place) -> bool:
        """Return whether the pass that is being recorded has created the tensor at `place`."""
        base = place.location.base
        return base >= self.old and self.bases[base].kind in ("allocation", "result")

    def with_places(self, args: Iterable[Any]) -> list[Any]:
        return [self.find_or_add(x) if isinstance(x, Tensor) else x for x in args]

    # Recording

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call `function`, record its steps as one forward or backward pass, and return its result."""
        self.first, self.old = len(self.steps), len(self.bases)
        self.thread = threading.get_ident()
        conditions.recording.recorder = self
        try:
            with self:
                return function(*args, **kwargs)
        finally:
            conditions.recording.recorder = None

    def launch(self, start: Callable, kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        """Launch a kernel with the function `start` of _triton/launch.py, and record the launch."""
        with _disable_current_modes():  # Triton's interpreter calls PyTorch operations, which must not be recorded
            compiled = start(kernel, grid, args, meta)
        if compiled is None and not backends.interpreted():
            self.refuse("only Triton can launch the kernels")
        self.steps.append(Launch(self.with_places(args), kernel, grid, meta, compiled))

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function.namespace == "vix_kernels":
            with self:  # PyTorch disables a mode while it handles an operation
                return operators[function._opname].implementation(*args)
        results = function(*args, **(kwargs or {}))
        new = results if isinstance(results, tuple | list) else (results,)
        leaves, structure = tree_flatten((args, kwargs or {}))
        places = self.with_places(leaves)
        device = self.bases[0].tensor.device
        if self.thread != threading.get_ident():
            self.refuse("autograd uses another thread, whose launches are not recorded")
        elif {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}.intersection(function.tags):
            self.refuse(f"{function} reads values")
        elif function._schema.is_mutable:
            if function._opname in WRITES and self.is_new(places[0]):
                self.steps.append(Operation(places, structure, function, []))
            else:
                self.refuse(f"{function} changes a tensor")
        elif function._opname in ALLOCATIONS and results.device == device:
            self.add(results, "allocation")
        elif all(isinstance(x, Tensor) and x.device == device for x in new):
            if any(x.untyped_storage()._cdata not in self.storages for x in new):  # not a view
                self.steps.append(Operation(places, structure, function, [self.add(x, "result") for x in new]))
        elif any(isinstance(x, Place) for x in places):
            self.refuse(f"{function} reads values")
        return results

    # Plans

    def saved(self, results: Iterable[Tensor]) -> list[int]:
        """Return the indices of the bases that the autograd graph of `results` saves for the backward pass.

        If saved tensors require gradients, but none of them is an argument, set `reason`, so that the call is not replayed. In
        a replay, only saved arguments keep their autograd graph. If no saved argument requires a gradient, double backward
        would raise no error, although it is not supported.
        """
        nodes, seen, found, requires_grad = [x.grad_fn for x in results], {None}, {}, False
        while nodes:
            if (node := nodes.pop()) not in seen:
                seen.add(node)
                names = [name for name in dir(node) if name.startswith("_saved_")]  # of PyTorch's built-in nodes
                tensors = (*getattr(node, "saved_tensors", ()), *(getattr(node, name) for name in names))
                tensors = [x for x in tensors if isinstance(x, Tensor)]
                found |= {self.find_or_add(x).location.base: None for x in tensors}
                requires_grad |= any(x.requires_grad for x in tensors)
                nodes += [each for each, _ in node.next_functions]
        inputs = [self.bases[base].tensor for base in found if self.bases[base].kind == "input"]
        if requires_grad and not any(x.requires_grad for x in inputs):
            self.refuse("no argument that requires a gradient is saved")
        return list(found)

    def plan(
        self, sources: dict[int, Location], outputs: Sequence[Tensor | None], saved: Sequence[int] = ()
    ) -> tuple[PassPlan, dict[int, Location]] | None:
        """Return a plan of the last recorded pass, and the location of each base in the plan.

        Return None if the pass cannot be replayed. In this case, `reason` is set.

        Args:
            sources: locations of the bases that exist before the pass.
            outputs: the outputs of the pass. None for a gradient that is not needed.
            saved: indices of the bases that the backward pass reads, if this is the forward pass.
        """
        steps, locations = self.steps[self.first :], dict(sources)
        indices = count(1 + max(base for base, _ in sources.values()))

        def put(offsets: dict[int, int]) -> None:
            """Map all recorded bases in `offsets` to one new base of the replayed pass, each at its offset in bytes."""
            index = next(indices)
            locations.update({base: Location(index, offset) for base, offset in offsets.items()})

        allocations, places = [], self.with_places(outputs)
        new = [place for place in places if place is not None and self.bases[place.location.base].kind != "result"]
        for place in new:
            base, offset = place.location
            if self.bases[base].kind != "allocation" or base in locations:
                self.refuse("an output is not a new tensor")
            elif offset or math.prod(place.size) * place.dtype.itemsize != self.bases[base].nbytes:
                self.refuse("an output is only a part of a tensor")
            put({base: 0})
            allocations.append((place.size, place.stride, place.dtype))
        for offsets in self.workspaces(steps, locations, saved):
            if offsets:
                put(offsets)
                size = max(offset + self.bases[base].nbytes for base, offset in offsets.items())
                allocations.append(((size,), (1,), torch.uint8))
        read = dict.fromkeys(place.location.base for step in steps for place in step.places)
        constants = [base for base in read if self.bases[base].kind == "constant" and base not in locations]
        for base in (*constants, *(base for step in steps if isinstance(step, Operation) for base in step.results)):
            put({base: 0})
        if any(base not in locations for base in read):
            self.refuse("the backward pass reads a tensor that is not saved")
        if self.reason is not None:
            return None

        def output(place: Place | None) -> int | Place | None:
            if place is None:
                return None
            base = place.location.base
            whole = place in new or place == self.find_or_add(self.bases[base].tensor)
            return locations[base].base if whole else place.rebased(locations)

        plan = PassPlan(
            allocations, [self.bases[base].tensor for base in constants], [step.rebased(locations) for step in steps],
            [output(place) for place in places],
        )  # fmt: skip
        return plan, locations

    def workspaces(
        self, steps: Sequence[Step], locations: dict[int, Location], saved: Sequence[int]
    ) -> tuple[dict[int, int], dict[int, int]]:
        """Return the offsets of new allocations in two workspaces: one for the saved bases, and one for the others.

        Outputs are not included.
        """
        first, last = {}, {}
        for i, step in enumerate(steps):
            for place in step.places:
                first.setdefault(place.location.base, i)
                last[place.location.base] = i
        bases = [base for base in {**first, **dict.fromkeys(saved)} if self.bases[base].kind == "allocation"]
        bases = [base for base in bases if base not in locations and base >= self.old]
        kept = {base: (0, len(steps)) for base in bases if base in saved}
        others = {base: (first[base], last[base]) for base in bases if base not in saved}
        return self.pack(kept), self.pack(others)

    def pack(self, lifetimes: dict[int, tuple[int, int]]) -> dict[int, int]:
        """Return the offset of each base in a workspace. Bases that are not used at the same time can share memory.

        `lifetimes` maps each base to the indices of the first and the last step that use it.
        """
        offsets: dict[int, int] = {}
        for base, (first, last) in lifetimes.items():
            start = 0
            for other, offset in sorted(offsets.items(), key=lambda item: item[1]):
                used = lifetimes[other][0] <= last and first <= lifetimes[other][1]
                if used and offset < start + self.bases[base].nbytes:
                    start = max(start, -(-(offset + self.bases[other].nbytes) // ALIGNMENT) * ALIGNMENT)
            offsets[base] = start
        return offsets
