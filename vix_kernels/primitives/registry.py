"""Registration of an operator: PyTorch for any device, Triton where asked for, a fake kernel, no autograd of its own.

Gradients belong to a plain `torch.autograd.Function` around the operator. A direct call on a tensor that requires a
gradient would lose it silently, so it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..layout import Rotary, flattened, joined

library = torch.library.Library("vix_kernels", "DEF")
operators: dict[str, Operator] = {}


class Operator:
    """An operator of `torch.library`, which plain eager calls go past.

    What compilers, modes and subclasses of Tensor see is torch.ops.vix_kernels.<name>. Where none of them is at work, its
    dispatch would only cost time.
    """

    registered: torch._ops.OpOverload

    def __init__(self, name: str, module: str, has_kernel: Callable[..., bool], rotary_at: int | None) -> None:
        self.name, self.module, self.has_kernel, self.rotary_at = name, module, has_kernel, rotary_at

    def __call__(self, *arguments: Any) -> Any:
        if not plain(arguments):
            return self.registered(*self.flat(arguments))
        *inputs, backend = arguments
        return self.function(inputs, backend)(*inputs)

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """As the registered operator takes them: a Rotary in three."""
        if (at := self.rotary_at) is None:
            return arguments
        cos, sin, _, interleaved = flattened(arguments[at])
        return *arguments[:at], cos, sin, interleaved, *arguments[at + 1 :]

    def function(self, inputs: Sequence[Any], backend: str) -> Callable:
        return _function("_triton" if backend == "triton" and self.has_kernel(*inputs) else "_torch", self.module, self.name)

    def implementation(self, *arguments: Any) -> Any:
        """The body of the registered operator."""
        *inputs, backend = arguments
        if (at := self.rotary_at) is not None:
            inputs[at : at + 3] = [joined(*inputs[at : at + 3])]
        device = next(each.device.type for each in inputs if isinstance(each, Tensor))
        # Dtypes were settled by the public function: autocast must not touch the products inside.
        with torch.autocast(device if device != "meta" else "cpu", enabled=False):
            return self.function(inputs, backend)(*inputs)

    def refuse_gradient(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
            raise RuntimeError(f"torch.ops.vix_kernels.{self.name} has no gradient of its own: call vix_kernels' functions")
        with torch._C._AutoDispatchBelowAutograd():
            return self.registered(*arguments)


def register(schema: str, *, module: str, fake: Callable, has_kernel: Callable[..., bool] = lambda *inputs: True) -> Operator:
    """Register the operator of `schema`, whose last argument is `str backend` ("torch" or "triton").

    The functions of its name in `_torch/<module>.py` and `_triton/<module>.py` compute it; where `has_kernel` is False, which
    is asked with the same arguments, the one in PyTorch does for both backends. `fake` makes outputs of the right shapes,
    dtypes and strides; all but `fake` go without the backend. "Tensor? cos, Tensor? sin, bool interleaved" in the schema are
    one argument, a Rotary or None, to all but `fake` and the registered operator.
    """
    name, _, parameters = schema.partition("(")
    before, has_rotary, _ = parameters.replace("?", "").partition("Tensor cos, Tensor sin, bool interleaved")
    operator = Operator(name, module, has_kernel, before.count(",") if has_rotary else None)
    operators[name] = operator
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    library.impl(name, operator.implementation, "CompositeExplicitAutograd")
    library.impl(name, operator.refuse_gradient, "Autograd")
    torch.library.register_fake(f"vix_kernels::{name}", fake, lib=library)
    operator.registered = getattr(torch.ops.vix_kernels, name).default
    return operator


PLAIN = (Tensor, torch.nn.Parameter)
# The dispatch keys that a thread includes while no mode, transform, tracer or functionalisation is at work.
AT_REST = {
    keys.raw_repr()
    for keys in (
        torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect),
        torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView),
    )
}


def plain(arguments: Sequence[Any]) -> bool:
    """Nobody watches or changes what these tensors take part in, and they are what lies in their memory."""
    if torch.compiler.is_compiling() or torch._C._dispatch_tls_local_include_set().raw_repr() not in AT_REST:
        return False
    if torch._C._is_any_autocast_enabled() or torch._C._len_torch_function_stack():
        return False
    has_gradients = torch.is_grad_enabled()
    for each in arguments:
        if isinstance(each, Rotary):
            if not plain(each):
                return False
        elif isinstance(each, Tensor) and (
            type(each) not in PLAIN
            or each.is_meta
            or each.is_neg()
            or each._is_zerotensor()
            or torch._is_functional_tensor(each)
            or (has_gradients and each.requires_grad)
        ):
            return False
    return True


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


def needs_autograd(inputs: Iterable[Any]) -> bool:
    """Return whether a call on `inputs` has to go through its `autograd.Function`; raise as `refuse_transforms` does.

    It does if one of them requires a gradient, if forward-mode AD is active, which the Function refuses, or if a compiler is at
    work. Otherwise the operator alone returns the same bits, and nothing is saved.
    """
    refuse_transforms()
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
