"""Adapt models and their weights to another image size, number of input channels or number of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .backbone import Backbone
from .positions import resample_tokens
from .zoo import create_model

# Maps each state dict entry with a token dimension to the index of this dimension, and to whether it includes prefix tokens.
_OVER_TOKENS = {
    "pos_embed": (1, True),
    "key_projection": (-2, True),
    "value_projection": (-2, True),
    "attention_bias": (1, False),
}
# Module attributes that depend on the image size. `core` and `site` belong to mixer modules (vix_kernels/nn/module.py).
_SIZED = ("img_size", "grid", "grid_size", "core", "site", "_make")


def adapt_state(state: Mapping[str, Any], source: Backbone, model: Backbone) -> dict[str, Any]:
    """Return the state dict `state` of `source`, adapted to the image size and input channels of `model`.

    Entries of the head that do not match `model` are removed.
    """
    state, expected = dict(state), model.state_dict()
    maps = model.token_maps()
    for module, (old, tokens) in source.token_maps().items():
        new = maps[module][0]
        for key in state if old != new else ():
            name = key.rpartition(".")[2]
            if name in _OVER_TOKENS and key.startswith(f"{module}." if module else ""):
                dim, with_prefix = _OVER_TOKENS[name]
                state[key] = resample_tokens(state[key], dim, old, new, tokens if with_prefix else 0)
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)) + ".weight"
    if source.in_chans != model.in_chans:
        state[first] = _other_channels(state[first], model.in_chans)
    for key in [key for key in state if is_head(key)]:
        if key not in expected or expected[key].shape != state[key].shape:
            del state[key]
    return state


def _other_channels(weight: Tensor, channels: int) -> Tensor:
    """Return `weight` adapted to `channels` input channels. The adapted weights preserve the magnitude of the outputs.

    If `channels` is 1, the old input channels are summed. Otherwise, they are repeated and scaled.
    """
    before = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // before), 1, 1)[:, :channels] * (before / channels)


def over_tokens(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the entries in `state` with a token dimension."""
    return [key for key in state if key.rpartition(".")[2] in _OVER_TOKENS]


def is_head(key: str) -> bool:
    return key.startswith(("head.", "attention_pool."))


def check_attention(model: Backbone) -> None:
    """Raise ValueError if the attention of any layer of `model` differs from the attention that `create_model` built."""
    modules = dict(model.named_modules())
    for path, module in create_model(model.config["name"], device="meta", **model.config["arguments"]).named_modules():
        if hasattr(module, "core") and getattr(modules.get(path), "core", None) != module.core:
            raise ValueError(f"model: expected the attention of create_model, but that of {path} has been replaced")


def resize(model: Backbone, img_size: tuple[int, int]) -> None:
    """Adapt `model`, created by `create_model`, to images of another size, in place.

    Attributes that depend on the image size are copied from a new model of that size, and parameters with a token dimension are
    resampled. All other parameters, modules and hooks are kept, including a head that was replaced.

    Raises:
        ValueError: `create_model` did not build the model, or a module other than the head has been replaced. The model is
            unchanged.
    """
    if "name" not in (getattr(model, "config", None) or {}):
        raise ValueError(f"model: expected a model from create_model that is not pruned, got {type(model).__name__}")
    name, arguments, old = model.config["name"], model.config["arguments"], dict(model.named_modules())
    check_attention(model)
    new = create_model(name, device="meta", **arguments | {"img_size": img_size})
    for path, module in new.named_modules():
        if type(old.get(path)) is not type(module) and not is_head(f"{path}."):
            raise ValueError(f"model: expected the modules of create_model, but {path} has been replaced")
    before = model.state_dict()
    resampled = {key: x for key, x in adapt_state(before, model, new).items() if x is not before[key]}

    for path, module in new.named_modules():
        if not is_head(f"{path}."):
            vars(old[path]).update({key: vars(module)[key] for key in _SIZED if key in vars(module)})
    for module in old.values():
        if module._non_persistent_buffers_set:  # tables that a module computes from these attributes in `_apply`
            module._apply(lambda x: x)
    for key, value in resampled.items():
        path, _, entry = key.rpartition(".")
        setattr(old[path], entry, nn.Parameter(value, requires_grad=getattr(old[path], entry).requires_grad))
    model.config["arguments"] = arguments | {"img_size": img_size}
    for record in ("_model_args", "_traits"):  # timm stores the arguments of the models that it has created
        if hasattr(model, record):
            setattr(model, record, getattr(model, record) | {"img_size": img_size})
