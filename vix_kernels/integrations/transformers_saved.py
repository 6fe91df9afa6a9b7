"""Save the attention of a transformers model in `save_pretrained`, and restore it in `from_pretrained`.

transformers does not save attn_implementation. Importing vix_kernels.integrations.transformers therefore wraps two methods of
PreTrainedModel and one of PreTrainedConfig. While `save_pretrained` runs, the configuration has two additional entries:
attn_implementation, which transformers reads when it loads a configuration, and vix_attention, which describes the attention.
If the configuration of a new model has the entry vix_attention, `post_init` installs this attention before weights are loaded.
If the entry lists layers, it stays in the configuration, so that other models created from this configuration have the same
attention. Models without attention from this library are not affected. If a process loads a model with attention from this
library, but has not imported the integration, transformers raises an error that names attn_implementation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..nn.core import CORES
from .drop_in import DropIn
from .hosts import ENTRY, host
from .linearized import described, options_of
from .swap import replace_attention

with host("transformers", "5.17"):
    from transformers import PreTrainedConfig, PreTrainedModel

CHILDREN = "vix"  # the attn_implementation that calls the child module `vix` of each attention module
MISSING = "vix_missing"  # attribute of modules in a new model, set if no layer listed in vix_attention was replaced
# Maps each other attn_implementation of this library to a pair: its attention, and whether ops that need training are allowed
NAMED: dict[str, tuple[DropIn, bool]] = {}


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and, recursively, all its sub-configurations."""
    yield config
    for part in parts(config).values():
        yield from configs(part)


def parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    found = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part for name, part in found.items() if isinstance(part, PreTrainedConfig)}


def implementations(config: PreTrainedConfig) -> str | dict[str, Any] | None:
    """Return the attn_implementation to save: a name, None for the default, or a dict if there are sub-configurations.

    The keys of the dict are "" for `config`, and the names of the sub-configurations.
    """
    name = config._attn_implementation
    name = name if name == CHILDREN else f"vix_{NAMED[name][0].op}" if name in NAMED else None
    found = {part: implementations(each) for part, each in parts(config).items()}
    return {"": name} | found if found else name


def entry(model: PreTrainedModel | None, config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the entry vix_attention for `config`, or None if modules with `config` use no attention from this library.

    If `model` is None, descriptions of layers come from the existing entry.
    """
    if config._attn_implementation in NAMED:
        return described(NAMED[config._attn_implementation][0])
    if config._attn_implementation != CHILDREN:
        return None
    return vars(config).get(ENTRY) if model is None else replaced_layers(model, config)


def replaced_layers(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return {"layers": {name: description}} for the replaced modules that use `config`, or None if there are none."""
    layers = {}
    for name, module in model.named_modules():
        if getattr(module, "config", None) is config and is_replaced(module):
            wide = {"float32": True} if any(x.dtype == torch.float32 for x in module.vix.learned_parameters()) else {}
            layers[name] = described(module.vix) | wide
    return {"layers": layers} if layers else None


def select_children(model: PreTrainedModel, replaced: Iterable[nn.Module]) -> None:
    """Set attn_implementation to "vix" and update vix_attention in the configurations of the modules in `replaced`."""
    for config in {id(module.config): module.config for module in replaced}.values():
        config._attn_implementation_internal = CHILDREN  # the property's setter would also change sub-configurations
        setattr(config, ENTRY, entry(model, config))
        for _, module in _modules_with(model, config):
            vars(module).pop(MISSING, None)


@contextmanager
def with_entries(whole: PreTrainedConfig, model: PreTrainedModel | None = None) -> Iterator[None]:
    """Add attn_implementation and vix_attention to a configuration and its sub-configurations during the `with` block.

    If `model` is None, keep the layer descriptions that the configuration already contains.
    """
    before, changed = [], []
    try:
        for config in configs(whole):
            found = entry(model, config)
            before.append((config, vars(config).pop(ENTRY, None)))
            if found is not None:
                changed.append(config)
                setattr(config, ENTRY, found)
        if changed and whole is not changed[0]:
            changed.append(whole)
        for config in changed:
            config.attn_implementation = implementations(config)
        yield
    finally:
        for config in changed:
            for name in (ENTRY, "attn_implementation"):
                vars(config).pop(name, None)
        for config, found in before:
            if found is not None:
                setattr(config, ENTRY, found)


def restore(model: PreTrainedModel) -> None:
    """Install the attention that the configuration of a new model describes."""
    known = {id(each) for each in configs(model.config)}
    for config in {id(each): each for each in _configs_of(model)}.values():
        found, name = vars(config).get(ENTRY), config._attn_implementation
        if found is None:
            continue
        if not isinstance(found, dict):
            raise ValueError(f"config.json: {ENTRY}: expected a mapping, as save_pretrained writes it, got {found!r}")
        if "layers" in found:
            if id(config) in known:
                _restore_layers(model, config, found)
            elif name == CHILDREN and not any(is_replaced(module) for _, module in _modules_with(model, config)):
                # The configuration is a copy that a submodule of `model` made. Layers with such a copy are not replaced.
                config._attn_implementation_internal = "sdpa"
            continue
        if name == CHILDREN:
            attention = _attention(found)
            raise ValueError(
                f"attn_implementation: expected 'vix_{attention.op}', with which the model was saved, or another "
                f"implementation for all layers, got {name!r}, which requires a model saved after replace_attention"
            )
        if name in NAMED:
            attention = _attention(found)
            if name == f"vix_{attention.op}":
                config._attn_implementation_internal = _registered(name, attention)
        delattr(config, ENTRY)  # even if an argument of from_pretrained has overridden the saved attn_implementation


def _configs_of(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            yield module.config


def _modules_with(model: nn.Module, config: PreTrainedConfig) -> list[tuple[str, nn.Module]]:
    return [each for each in model.named_modules() if getattr(each[1], "config", None) is config]


def is_replaced(module: nn.Module) -> bool:
    """Return whether the child module `vix` computes the attention of `module`."""
    return isinstance(getattr(module, "vix", None), DropIn)


def _attention(found: Any) -> DropIn:
    """Return the attention that `found` describes. `found` is the entry vix_attention, or its description of one layer."""
    if not isinstance(found, dict) or not isinstance(found.get("options"), dict):
        raise ValueError(f"config.json: {ENTRY}: expected an op and options, got {found!r}")
    how = {name: found[name] for name in ("backend", "dropout") if name in found}
    try:
        return DropIn(found.get("op"), retrain=True, **how, **options_of(found))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json: {ENTRY}: {error}") from error


def _registered(name: str, attention: DropIn) -> str:
    """Return a name under which `attention` is registered.

    If `attention` is registered under `name`, return `name`. Otherwise, register `attention` under a new name.
    """
    from .transformers import add

    registered, allowed = NAMED[name]
    if described(registered) == described(attention) and (allowed or attention.core.takes_trained_weights()):
        return name
    usual = CORES[attention.op].made("host")
    attention.options = {key: x for key, x in attention.options.items() if x != getattr(usual, key)}
    backend = "" if attention.backend == "auto" else f" on {attention.backend}"
    return add(f"vix_{attention!r}{backend}", attention.without_module(), True)


def _restore_layers(model: PreTrainedModel, config: PreTrainedConfig, found: dict[str, Any]) -> None:
    """Replace the attention of the saved layers in `model` if `config` has attn_implementation "vix".

    `model` can be a submodule of the saved model, or a larger model that contains the saved model. In both cases, the names of
    the layers have a different prefix in `model` than in `found`. Submodules are restored before the model that contains them.

    If no layer is replaced, set the attribute vix_missing on all modules that use `config`. With this attribute,
    attn_implementation "vix" raises an error. A later replacement of the attention removes the attribute.
    """
    layers = found["layers"]
    if not isinstance(layers, dict):
        raise ValueError(f"config.json: {ENTRY}: layers: expected a mapping, got {layers!r}")
    inside = dict(_modules_with(model, config))
    pairs = [(name, name) for name in layers if name in inside] or [
        (saved, name)
        for saved in layers
        for name in inside
        if f".{saved}".endswith(f".{name}") or f".{name}".endswith(f".{saved}")
    ]
    count = Counter(each for pair in pairs for each in zip(("saved", "name"), pair, strict=True))
    places = {name: saved for saved, name in pairs if count["saved", saved] == count["name", name] == 1}
    if config._attn_implementation != CHILDREN:
        places = {}
    try:
        for name, saved in places.items():
            attention, module = _attention(layers[saved]), inside[name]
            if is_replaced(module):  # already restored with a submodule of `model`
                continue
            options = attention.options | dict(backend=attention.backend, dropout=attention.dropout)
            replace_attention(model, attention.op, layers=[name], retrain=True, **options)
            if layers[saved].get("float32"):
                module.vix.widen()
                model._keep_in_fp32_modules_strict.add("vix")
    finally:
        setattr(config, ENTRY, found)
    found_any = any(is_replaced(module) for module in inside.values())
    for module in inside.values():
        if found_any:
            vars(module).pop(MISSING, None)
        else:
            setattr(module, MISSING, True)


def install() -> None:
    """Wrap `save_pretrained` and `post_init` of PreTrainedModel, and `save_pretrained` of PreTrainedConfig."""
    save_pretrained, post_init = PreTrainedModel.save_pretrained, PreTrainedModel.post_init
    save_config = PreTrainedConfig.save_pretrained

    @wraps(save_pretrained)
    def save(self: PreTrainedModel, *args: Any, **options: Any) -> Any:
        with with_entries(self.config, self):
            return save_pretrained(self, *args, **options)

    @wraps(save_config)
    def save_only_config(self: PreTrainedConfig, *args: Any, **options: Any) -> Any:
        with with_entries(self):
            return save_config(self, *args, **options)

    @wraps(post_init)
    def finish(self: PreTrainedModel) -> None:
        post_init(self)
        restore(self)

    PreTrainedModel.save_pretrained, PreTrainedModel.post_init = save, finish
    PreTrainedConfig.save_pretrained = save_only_config
