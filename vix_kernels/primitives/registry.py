"""Registration of operators.

An operator has a PyTorch implementation for any device, a Triton implementation and a fake kernel, but no autograd formula. A
plain `torch.autograd.Function` around the operator computes the gradients. Calling the operator directly with a tensor that
requires a gradient raises an error, because the gradient would otherwise be lost silently.
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
# Types that can be used in schemas. The registered operator receives their fields as separate arguments.
GROUPS = {each.__name__: each for each in (Rotary, Pool, Statistics, LandmarkGradients)}


class Operator:
    """A `torch.library` operator whose plain eager calls bypass the dispatcher.

    Compilers, function modes, dispatch modes and Tensor subclasses see the registered operator torch.ops.vix_kernels.<name>. If
    a call involves none of them, the dispatcher would only add overhead.
    """

    registered: torch._ops.OpOverload

    def __init__(self, schema: str, module: str, has_kernel: Callable[..., bool]) -> None:
        self.name, _, rest = schema.partition("(")
        self.module, self.has_kernel = module, has_kernel
        parameters, _, returns = rest.partition(")")
        # For each group: its position, its type, the number of its fields in the schema, and whether it is optional
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
        """Return the arguments for the registered operator, with each group replaced by its fields."""
        for at, group, size, _ in reversed(self.groups):
            fields = arguments[at]
            if fields is None:
                fields = [group._field_defaults.get(name) for name in group._fields]
            arguments = (*arguments[:at], *fields[:size], *arguments[at + 1 :])
        return arguments

    def grouped(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """Return the arguments with fields combined into groups. This is the inverse of `flat`."""
        for at, group, size, optional in self.groups:
            fields = arguments[at : at + size]
            whole = None if optional and fields[0] is None else group(*fields)
            arguments = (*arguments[:at], whole, *arguments[at + size :])
        return arguments

    def function(self, inputs: Sequence[Any], backend: str) -> Callable:
        return _function("_triton" if backend == "triton" and self.has_kernel(*inputs) else "_torch", self.module, self.name)

    def implementation(self, *arguments: Any) -> Any:
        """Run the PyTorch or the Triton implementation. This is the body of the registered operator."""
        *inputs, backend = self.grouped(arguments)
        device = next(each.device.type for each in inputs if isinstance(each, Tensor))
        # The public function has already cast its inputs, so autocast must not cast the operands of matrix products.
        with torch.autocast(device if device != "meta" else "cpu", enabled=False):
            return self.function(inputs, backend)(*inputs)

    def refuse_gradient(self, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
            raise RuntimeError(f"torch.ops.vix_kernels.{self.name} has no gradient: call the functions of vix_kernels instead")
        with torch._C._AutoDispatchBelowAutograd():
            return self.registered(*arguments)


def register(schema: str, *, module: str, fake: Callable, has_kernel: Callable[..., bool] = lambda *inputs: True) -> Operator:
    """Register an operator.

    Args:
        schema: a `torch.library` schema. The last argument must be `str backend` ("torch" or "triton"). The types in GROUPS can
            also be used, as in "Rotary? rotary" and "Pool pool". Implementations receive a value of such a type as one
            argument. The registered operator receives the fields in the type's SCHEMA as separate arguments.
        module: name of the module with the implementation, in both `_torch/` and `_triton/`. The implementation is a function
            with the operator's name. It receives the arguments without the backend.
        fake: a function that receives all arguments and returns empty outputs with the right shapes, dtypes and strides.
        has_kernel: a function that receives the arguments without the backend, and returns whether the Triton implementation
            supports them. If not, the PyTorch implementation runs for both backends.
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
# Values of the thread-local set of included dispatch keys while no dispatch mode, transform, tracer or functionalization is
# active.
DEFAULT_KEYS = {
    keys.raw_repr()
    for keys in (
        torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect),
        torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView),
    )
}


def plain(arguments: Sequence[Any]) -> bool:
    """Return whether a call may bypass the dispatcher.

    The dispatcher is needed while a compiler, tracer, transform, autocast, function mode or dispatch mode is active. It
    is also needed for Tensor subclasses (except Parameter), meta tensors, functional tensors, tensors with the ZeroTensor
    dispatch key, and tensors whose negative bit is set. If gradients are enabled, it is also needed for tensors that require a
    gradient.
    """
    if torch.compiler.is_compiling() or torch._C._dispatch_tls_local_include_set().raw_repr() not in DEFAULT_KEYS:
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
    """Import and return an implementation. The import is deferred until the first call, because Triton may not be installed."""
    return getattr(import_module(f"vix_kernels.{package}.{module}"), name)


def in_transform() -> bool:
    """Return whether a torch.func transform, such as vmap, is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def refuse_transforms() -> None:
    """Raise an error inside torch.func transforms, which the operators do not support."""
    if not torch.compiler.is_compiling() and in_transform():
        raise NotImplementedError(
            "vix_kernels: torch.func transforms (vmap, grad, jvp, ...) are not supported; use backend='reference' inside them"
        )


def needs_autograd(inputs: Iterable[Any]) -> bool:
    """Return whether a call with `inputs` must go through its `autograd.Function`.

    This is the case if an input requires a gradient and gradients are enabled, if the call is being compiled, or if
    forward-mode AD is active. In all other cases, calling the operator directly returns bit-identical results and saves no
    tensors. If forward-mode AD is active, the `autograd.Function` raises an error.

    Raises:
        NotImplementedError: a torch.func transform is active.
    """
    refuse_transforms()
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
