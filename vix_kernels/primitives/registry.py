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

from ..layout import LandmarkGradients, Pool, Rotary, Statistics

library = torch.library.Library("vix_kernels", "DEF")
operators: dict[str, Operator] = {}
# Types of a schema's arguments that the registered operator takes field by field.
GROUPS = {each.__name__: each for each in (Rotary, Pool, Statistics, LandmarkGradients)}


class Operator:
    """An operator of `torch.library`, which plain eager calls go past.

    What compilers, modes and subclasses of Tensor see is torch.ops.vix_kernels.<name>. Where none of them is at work, its
    dispatch would only cost time.
    """

    registered: torch._ops.OpOverload

    def __init__(self, schema: str, module: str, has_kernel: Callable[..., bool]) -> None:
        self.name, _, rest = schema.partition("(")
        self.module, self.has_kernel = module, has_kernel
        parameters, _, returns = rest.partition(")")
        # Position and type of each group, the number of its fields in the schema, and whether it is optional
        self.groups: list[tuple[int, Any, int, bool]] = []
        flat = []
        for at, parameter in enumerate(parameters.split(", ")):
            kind, optional, _ = parameter.partition("?")
            if group := GROUPS.get(kind.split()[0]):
                parameter = group.SCHEMA.replace("Tensor ", "Tensor? ") if optional else group.SCHEMA
                self.groups.append((at, group, parameter.count(",") + 1, bool(optional)))
            flat.append(parameter)
        self.schema = f"{self.name}({', '.join(flat)}){returns}"

    def __call__(self, *arguments: Any) -> Any:
        if not plain(arguments):
            return self.registered(*self.flat(arguments))
        *inputs, backend = arguments
        return self.function(inputs, backend)(*inputs)

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Arguments as the registered operator takes them: the fields of a group instead of the group."""
        for at, group, size, _ in reversed(self.groups):
            fields = arguments[at]
            if fields is None:
                fields = [group._field_defaults.get(name) for name in group._fields]
            arguments = (*arguments[:at], *fields[:size], *arguments[at + 1 :])
        return arguments

    def grouped(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The inverse of `flat`."""
        for at, group, size, optional in self.groups:
            fields = arguments[at : at + size]
            whole = None if optional and fields[0] is None else group(*fields)
            arguments = (*arguments[:at], whole, *arguments[at + size :])
        return arguments

    def function(self, inputs: Sequence[Any], backend: str) -> Callable:
        return _function("_triton" if backend == "triton" and self.has_kernel(*inputs) else "_torch", self.module, self.name)

    def implementation(self, *arguments: Any) -> Any:
        """The body of the registered operator."""
        *inputs, backend = self.grouped(arguments)
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
    dtypes and strides; all but `fake` go without the backend. A group in the schema ("Rotary? rotary", "Pool pool") is one
    argument to all of them. Only the registered operator takes its fields.
    """
    operator = Operator(schema, module, has_kernel)
    operators[operator.name] = operator
    library.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    library.impl(operator.name, operator.implementation, "CompositeExplicitAutograd")
    library.impl(operator.name, operator.refuse_gradient, "Autograd")
    torch.library.register_fake(f"vix_kernels::{operator.name}", lambda *flat: fake(*operator.grouped(flat)), lib=library)
    operator.registered = getattr(torch.ops.vix_kernels, operator.name).default
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
    pending = [*arguments]
    for each in pending:
        if isinstance(each, tuple):
            pending += each
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
