"""The steps of a recorded pass, and how to replay them with new tensors. See plans.py.

Every tensor that a step reads or writes is a base or a part of a base. The bases of a pass are, in this order: its sources, the
outputs and workspaces that it allocates, constants, and the results of operations. The sources of a forward pass are the
arguments. The sources of a backward pass are the bases that the forward pass saved, and the output gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from . import backends


@functools.cache
def launcher() -> Any:
    """Return the module that launches compiled kernels. The import is deferred, because Triton may not be installed."""
    from ._triton import compiled

    return compiled


class Location(NamedTuple):
    """Where a tensor starts: the index of a base, and the distance from the start of this base in bytes."""

    base: int
    offset: int


@dataclass(frozen=True)
class Place:
    """A tensor in a step: its location, dtype, size and stride."""

    location: Location
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def rebased(self, locations: Mapping[int, Location]) -> Place:
        base, offset = locations[self.location.base]
        return replace(self, location=Location(base, self.location.offset + offset))

    def tensor(self, bases: Sequence[Tensor]) -> Tensor:
        base = bases[self.location.base]
        storage = base.untyped_storage()
        start = (base.data_ptr() - storage.data_ptr() + self.location.offset) // self.dtype.itemsize
        return torch.empty(0, dtype=self.dtype, device=base.device).set_(storage, start, self.size, self.stride)


@dataclass
class Step:
    """One step of a pass. In `args`, each tensor is replaced by a Place."""

    args: list[Any]

    @property
    def places(self) -> list[Place]:
        return [x for x in self.args if isinstance(x, Place)]

    def rebased(self, locations: Mapping[int, Location]) -> Step:
        """Return the same step, with each base replaced by its location in `locations`."""
        return replace(self, args=[x.rebased(locations) if isinstance(x, Place) else x for x in self.args])


@dataclass
class Launch(Step):
    """A kernel launch. `compiled` is None in the interpreter."""

    kernel: Any
    grid: tuple[int, ...]
    meta: dict[str, Any]
    compiled: Any

    def __post_init__(self) -> None:
        self.pointers = [(i, *x.location) for i, x in enumerate(self.args) if isinstance(x, Place)]
        self.grid = (*self.grid, 1, 1)[:3]

    def replay(self, bases: list[Tensor], addresses: list[int], stream: int | None) -> None:
        args = self.args.copy()
        if self.compiled is not None and not self.kernel.pre_run_hooks:
            for i, base, offset in self.pointers:
                args[i] = addresses[base] + offset
            self.compiled.start(self.grid, stream, args)
            return
        for i, *_ in self.pointers:
            args[i] = args[i].tensor(bases)
        self.kernel[self.grid](*args, **self.meta)


@dataclass
class Operation(Step):
    """A PyTorch operation that returns new tensors, or that modifies a tensor of the pass in place and has no results.

    `args` are the leaves of the operation's positional and keyword arguments.
    """

    structure: TreeSpec  # structure of the arguments
    function: Callable
    results: Sequence[int]  # indices of its results in the list of recorded bases

    def replay(self, bases: list[Tensor], addresses: list[int], stream: int | None) -> None:
        leaves = [x.tensor(bases) if type(x) is Place else x for x in self.args]
        args, kwargs = tree_unflatten(leaves, self.structure)
        with torch._C._DisableAutocast():  # the recorder sees operations after autocast has cast their arguments
            results = self.function(*args, **kwargs)
        if not self.results:
            return
        for x in results if isinstance(results, tuple | list) else (results,):
            bases.append(x)
            addresses.append(x.data_ptr())


@dataclass
class PassPlan:
    """A forward or backward pass that can be replayed.

    Attributes:
        allocations: size, stride and dtype of the outputs and workspaces.
        constants: tensors that existed before the call, but are not arguments, such as cached tables.
        steps: launches and operations.
        outputs: for each output, the index of a base if the output is a whole base, otherwise a Place. None for a gradient that
            is not needed.
    """

    allocations: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    constants: list[Tensor] = field(repr=False)
    steps: list[Step]
    outputs: list[int | Place | None]

    def run(self, sources: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """Replay the pass. Return the outputs and the bases."""
        device = sources[0].device
        bases = [*sources]
        for size, stride, dtype in self.allocations:
            bases.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
        bases += self.constants
        if backends.is_current(device):  # entering a device context takes a microsecond
            self.replay(bases)
        else:
            with torch.cuda.device(device):
                self.replay(bases)
        outputs = [bases[x] if type(x) is int else x if x is None else x.tensor(bases) for x in self.outputs]
        return outputs, bases

    def replay(self, bases: list[Tensor]) -> None:
        """Replay the steps. `bases` contains the sources, allocations and constants."""
        addresses = [x.data_ptr() for x in bases]
        stream = None if backends.interpreted() else launcher().current_stream()
        for step in self.steps:
            step.replay(bases, addresses, stream)
