"""Registration of an operator: PyTorch for any device, Triton where asked for, a fake kernel, no autograd of its own.

Gradients belong to a plain `torch.autograd.Function` around the operator. A direct call on a tensor that requires a
gradient would lose it silently, so it raises.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("vix_kernels", "DEF")
implementations: dict[str, Callable] = {}  # the bodies of the operators, by name


def register(schema: str, *, module: str, fake: Callable, has_kernel: Callable[..., bool] = lambda *inputs: True) -> Callable:
    """Register the operator of `schema`, whose last argument is `str backend` ("torch" or "triton").

    The functions of its name in `_torch/<module>.py` and `_triton/<module>.py` compute it; where `has_kernel` is False, which
    is asked with the same arguments, the one in PyTorch does for both backends. `fake` makes outputs of the right shapes,
    dtypes and strides; all but `fake` go without the backend.
    """
    name = schema[: schema.index("(")]

    def implementation(*arguments: Any) -> Any:
        *inputs, backend = arguments
        package = "_triton" if backend == "triton" and has_kernel(*inputs) else "_torch"
        device = next(each.device.type for each in inputs if isinstance(each, Tensor))
        # Dtypes were settled by the public function: autocast must not touch the products inside.
        with torch.autocast(device if device != "meta" else "cpu", enabled=False):
            return _function(package, module, name)(*inputs)

    def refuse_gradient(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
            raise RuntimeError(f"torch.ops.vix_kernels.{name} has no gradient of its own: call vix_kernels' functions")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    implementations[name] = implementation
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    library.impl(name, refuse_gradient, "Autograd")
    torch.library.register_fake(f"vix_kernels::{name}", fake, lib=library)
    operator = getattr(torch.ops.vix_kernels, name).default
    return operator


@cache
def _function(package: str, module: str, name: str) -> Callable:
    """Imported when it is called first: Triton may not be installed."""
    return getattr(import_module(f"vix_kernels.{package}.{module}"), name)


def in_transform() -> bool:
    """Whether vmap or torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def refuse_transforms() -> None:
    """One named error under vmap and torch.func, whose rules these operators do not have."""
    if not torch.compiler.is_compiling() and in_transform():
        raise NotImplementedError(
            "vix_kernels: torch.func transforms (vmap, grad, jvp, ...) are not supported; use backend='reference' inside them"
        )
