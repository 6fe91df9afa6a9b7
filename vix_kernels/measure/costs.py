"""The minimum cost of a call: its FLOPs, exponentials, memory traffic and launches.

The OpSpec gives the FLOPs and the exponentials. The memory traffic is the total size of the inputs and outputs of the
torch.library operators in the call. No result is computed, and no GPU is needed. The call runs on meta tensors, and its
launches are counted instead of executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import conditions
from ..primitives.registry import operators
from ..testing import Case, OpSpec, draw
from .offline import driver_of
from .roofline import Cost

DIRECTIONS = ("forward", "backward")


def cost(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str, arch: str) -> Cost:
    """Return the cost of the forward or backward pass, with the launch configurations of `arch`, such as "sm_90"."""
    problem = draw(spec, case, dtype, "meta")
    with _counting(arch) as count:
        outputs = problem(backend="triton")
    flops = spec.flops(case)
    if direction == "backward":
        with _counting(arch) as count:
            problem.gradients(outputs)
        flops = round(spec.backward * flops)
    return Cost(flops, spec.exps(case), count.bytes, count.launches)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "vix_kernels":
            with self:  # PyTorch's kernels inside an operator also count
                out = operators[function._schema.name.split("::")[1]].implementation(*args)
            touched = {id(x): x for x in (*args, *tree_leaves(out)) if isinstance(x, Tensor)}
            # A tensor that is passed twice counts once. The repeated elements of an expanded tensor also count once.
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in touched.values())
            return out
        if not function.is_view and "empty" not in function._schema.name:
            self.launches += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def _counting(arch: str) -> Iterator[_Count]:
    """Yield a _Count of the bytes and launches in the `with` block, as if the block ran on a GPU with architecture `arch`.

    No kernel is compiled or run.
    """
    count = _Count()

    def observe(*launch: Any) -> None:
        count.launches += 1

    with driver_of(arch), conditions.under(observer=observe), count:
        yield count
