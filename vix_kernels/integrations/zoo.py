"""Replace the attention in the models of vix_kernels.models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..nn.core import CORES, Core, Site
from ..nn.module import AttentionModule, RedrawnAttentionModule
from .drop_in import DropIn
from .hosts import Report, selected


def replace_attention(
    model: nn.Module, op: str, *, layers: Sequence[str] | None = None, retrain: bool = False, **options: Any
) -> Report:
    """Replace the softmax attention in a model from create_model, in place. Existing parameters keep their names and values.

    To build a model with a different attention method, use `create_model(name, mixer=...)` instead.

    Args:
        model: a model from create_model.
        layers: names or patterns of the layers to replace, such as ["blocks.1*"]. None: all.
            Layers that match no name or pattern are not listed in the report.
        op, retrain, options: as in DropIn. Each layer has different random features.

    Returns:
        a report that lists the replaced layers, and states why the remaining selected layers could not be replaced.

    Raises:
        ValueError: nothing could be replaced, a pattern matches no attention layer, or `op` needs retrain=True.
    """
    kind = DropIn(op, retrain=retrain, **options)  # checks the arguments
    backend = options.pop("backend", None)
    options.pop("dropout", None)
    report = Report(repr(kind), model=model)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, AttentionModule)]
    chosen = []
    for name, module in selected(found, layers):
        if module.core.name != "softmax":
            report.refused[name] = f"{module.core.name} attention, which is not softmax attention"
            continue
        if module.attn_drop.p and kind.dropout == "refuse":
            report.refused[name] = f"attn_drop is {module.attn_drop.p}; pass dropout='ignore' to replace it without dropout"
            continue
        core = placed(CORES[op].made("host", **options), module.site, options)
        chosen.append((module, core))
        report.attentions[name] = core.describe()
        if module.site.num_tokens is not None:
            report.tokens[name] = module.site.num_tokens
    report.checked("a model with softmax attention")
    report.expect(kind, chosen[0][0].site.head_dim, 2)
    for module, core in chosen:
        put(module, core, backend)
    return report


def placed(core: Core, site: Site, options: dict[str, Any]) -> Core:
    """Return `core` adapted to the layer at `site`.

    Landmarks or agents are placed on the grid of `site`, unless `options` specifies another placement.
    """
    core = core.fit(site).with_prefix(site.prefix_tokens)
    core = core.after_prefix(options.get("prefix_tokens", site.prefix_tokens))
    if site.grid_size and options.get("landmarks", "grid") == "grid" and "grid_size" not in options:
        core = core.on_grid(site.grid_size)
    return core


def put(module: AttentionModule, core: Any, backend: str | None = None) -> None:
    """Set the core of `module` to `core`. New parameters are on the device of `module`.

    `core` must already be adapted to module.site.
    """
    weight = module.qkv.weight
    module.core, module.backend = core, backend or module.backend
    module.mount(core, module.site)
    for name in core.state(module.site):
        value = getattr(module, name)
        if isinstance(value, nn.Module):
            value.to(weight)
        elif isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(value.to(weight.device)))  # a meta tensor cannot be assigned to value.data
        elif value is not None:
            setattr(module, name, value.to(weight.device))
    if core.has_extra_state:
        module.__class__ = RedrawnAttentionModule
