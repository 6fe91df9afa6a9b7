"""Check whether a module call can be replaced by a direct call to the function that the module computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..primitives.registry import in_transform


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling `module` only runs the forward method of `kind`.

    The result is False for subclasses, for modules with hooks, during compilation or tracing, and inside torch.func transforms.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    hooked = any(hooks) or _has_any_global_hook()
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return type(module) is kind and not hooked and not traced and not in_transform()
