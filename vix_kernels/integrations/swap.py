"""Replace the attention in any supported model, and find the modules that hold a core (see nn/core.py)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..models.backbone import Backbone
from ..nn.core import Mounted
from ..nn.module import AttentionModule
from ..nn.softmax import Softmax
from .drop_in import DropIn
from .hosts import ROOT, Report, check_model, module_of
from .speed import SlowerWarning


def host_of(model: nn.Module) -> str:
    """Return the library of a model: "vix_kernels", "transformers", "timm" or, for all other models, "torch.nn"."""
    check_model(model)
    if isinstance(model, Backbone):
        return "vix_kernels"
    transformers = sys.modules.get("transformers")  # if it has not been imported, none of its models can exist
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        return "transformers"
    kinds = {kind for each in model.modules() for kind in type(each).__mro__}
    return "timm" if any(each.__module__.startswith("timm.") and "Attention" in each.__name__ for each in kinds) else "torch.nn"


def replace_attention(
    model: nn.Module, op: str, *, layers: Sequence[str] | None = None, retrain: bool = False, **options: Any
) -> Report:
    """Replace the attention of a model from this library, timm, transformers or torch.nn in place. Return a report.

    This function calls the integration for the model's library, such as `vix_kernels.integrations.timm.replace_attention`, with
    the same arguments. It suppresses SlowerWarning.
    """
    replace: Callable[..., Report]
    host = host_of(model)
    if host == "vix_kernels":
        from .zoo import replace_attention as replace
    elif host == "transformers":
        from .transformers import replace_attention as replace
    elif host == "timm":
        from .timm import replace_attention as replace
    else:
        from .torch_nn import replace_mha as replace
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowerWarning)
        return replace(model, op, layers=layers, retrain=retrain, **options)


def holders(model: nn.Module) -> dict[str, Mounted]:
    """Return a dict that maps the name of each attention layer to the module that holds its core."""
    found: dict[str, Mounted] = {}
    for name, module in model.named_modules():
        name = name or ROOT
        if isinstance(module, AttentionModule):
            found[name] = module
        elif isinstance(getattr(module, "vix", None), DropIn):
            found[name] = module.vix
    return found


def prefix_of(holder: Mounted) -> int:
    """Return the number of class and register tokens that the layer of `holder` receives, or 0 if unknown."""
    return holder.site.prefix_tokens if isinstance(holder, AttentionModule) else holder.prefix_tokens


class Softmaxed:
    """Reusable context manager that makes layers with replaced attention compute softmax attention.

    Inside the context, modules whose class was changed have their original class and run their original code. In other modules,
    softmax attention replaces the core. nn.TransformerEncoder still does not convert padded batches to nested tensors, because
    `replace_mha` disables this conversion.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.changes: list[tuple[nn.Module, str, Any]] = []
        found = holders(model)
        for name in names:
            module, holder = module_of(model, name), found[name]
            if isinstance(holder, DropIn) and holder.host not in (None, type(module)):
                self.changes.append((module, "__class__", holder.host))
            else:
                self.changes.append((holder, "core", Softmax()))

    def __enter__(self) -> None:
        self.before = [getattr(each, name) for each, name, _ in self.changes]
        for each, name, value in self.changes:
            object.__setattr__(each, name, value)

    def __exit__(self, *error: Any) -> None:
        for (each, name, _), value in zip(self.changes, self.before, strict=True):
            object.__setattr__(each, name, value)
