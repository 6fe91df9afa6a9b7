"""The model zoo, which creates models by name. Each name selects an architecture with a default mixer and default arguments.

Names without a suffix select the published configurations. ViTs and FNets process 32 x 32 pixels (CIFAR-10) with one token per
pixel. LeViTs, CvTs and CCTs process 64 x 64 pixels (Tiny ImageNet) with 32 x 32 tokens. Suffixes select other sizes: _tiny for
32 x 32 pixels, _small for 64 x 64, and _base for 224 x 224.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from fnmatch import fnmatch
from functools import partial
from typing import Any, NamedTuple

import torch

from .arguments import check_name, nearest
from .backbone import Backbone
from .cct import CCT
from .cvt import CvT
from .fnet2d import FNet2D
from .layers import ConvStem
from .levit import LeViT
from .mixers import make_mixer, mixer_options
from .vit import VisionTransformer

HybridTransformer = partial(VisionTransformer, stem=ConvStem)


class Entry(NamedTuple):
    architecture: Callable[..., Backbone]
    mixer: str | None  # None if the architecture has a fixed mixer
    arguments: dict[str, Any]


# _tiny, _small and _base have the widths of timm's ViTs, and divide an image into 16 rows and 16 columns of patches (14 and 14
# for _base).
_TRANSFORMERS = {
    "": {},
    "_tiny": dict(img_size=32, patch_size=2, embed_dim=192, depth=12, num_heads=3, mlp_ratio=4.0, qkv_bias=True),
    "_small": dict(img_size=64, patch_size=4, embed_dim=384, depth=12, num_heads=6, mlp_ratio=4.0, qkv_bias=True),
    "_base": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0, qkv_bias=True),
}
# _tiny, _small and _base have the widths and depths of LeViT-128S, LeViT-192 and LeViT-384, and heads with 32 channels.
_LEVITS = {
    "": {},
    "_tiny": dict(img_size=32, patch_size=2, stages=3, embed_dim=(128, 256, 384), depth=(2, 3, 4), num_heads=(4, 8, 12)),
    "_small": dict(img_size=64, patch_size=4, stages=3, embed_dim=(192, 288, 384), depth=4, num_heads=(6, 9, 12)),
    "_base": dict(img_size=224, patch_size=16, stages=3, embed_dim=(384, 512, 768), depth=4, num_heads=(12, 16, 24)),
}
# _base is CvT-13. The other sizes also have heads with 64 channels, but a smaller depth or width.
_CVTS = {
    "": {},
    "_tiny": dict(
        img_size=32, embed_kernel=(3, 3, 3), embed_stride=(2, 2, 2), embed_dim=(64, 128, 256), depth=(1, 2, 4),
        num_heads=(1, 2, 4), mlp_ratio=4.0, qkv_bias=True,
    ),
    "_small": dict(
        img_size=64, embed_kernel=(7, 3, 3), embed_stride=(4, 2, 2), embed_dim=(64, 192, 384), depth=(1, 2, 6),
        num_heads=(1, 3, 6), mlp_ratio=4.0, qkv_bias=True,
    ),
    "_base": dict(
        img_size=224, embed_kernel=(7, 3, 3), embed_stride=(4, 2, 2), embed_dim=(64, 192, 384), depth=(1, 2, 10),
        num_heads=(1, 3, 6), mlp_ratio=4.0, qkv_bias=True,
    ),
}  # fmt: skip
# _tiny, _small and _base are CCT-6/3x1, CCT-7/3x2 and CCT-14/7x2.
_CCTS = {
    "": {},
    "_tiny": dict(img_size=32, embed_dim=256, depth=6, num_heads=4, mlp_ratio=2.0, strides=(1,), pool_stride=2),
    "_small": dict(img_size=64, embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0, strides=(1, 1), pool_stride=2),
    "_base": dict(
        img_size=224, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0, kernel_size=7, strides=(2, 2), pool_stride=2
    ),
}
_FNETS_2D = {
    "": {},
    "_tiny": dict(img_size=32, patch_size=2, embed_dim=192, depth=12, mlp_ratio=4.0),
    "_small": dict(img_size=64, patch_size=4, embed_dim=384, depth=12, mlp_ratio=4.0),
    "_base": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, mlp_ratio=4.0),
}
_CLASSES = {"_tiny": 10, "_small": 200, "_base": 1000}  # CIFAR-10, Tiny ImageNet, ImageNet
# Each family has an architecture, the model names with their default mixers, and the arguments for each suffix.
_FAMILIES: tuple[tuple[Callable[..., Backbone], dict[str, str | None], dict[str, dict[str, Any]]], ...] = (
    (
        VisionTransformer,
        dict(vit="softmax", vil="linformer", vip="performer", vin="nystrom", fnet="fourier"),
        _TRANSFORMERS,
    ),
    (
        HybridTransformer,
        dict(hybrid_vit="softmax", hybrid_vil="linformer", hybrid_vip="performer", hybrid_vin="nystrom", hybrid_fnet="fourier"),
        _TRANSFORMERS,
    ),
    (LeViT, dict(levit="softmax", levin="nystrom", levip="performer"), _LEVITS),
    (CvT, dict(cvt="softmax", cvn="nystrom", cvp="performer"), _CVTS),
    (CCT, dict(cct="softmax", ccn="nystrom", ccp="performer"), _CCTS),
    (FNet2D, dict(fnet_2d=None), _FNETS_2D),
)
# Default arguments for models with a given mixer, in every architecture.
_WITH_MIXER = {"performer": dict(qkv_bias=True)}  # as published
# LeViT encodes positions in its attention bias. The mixers of LeViN and LeViP compute no logits to which this bias could be
# added, so these models have rotary embeddings by default.
_ROTATED = {LeViT: dict(position="rope_axial")}


def _entries() -> dict[str, Entry]:
    entries = {}
    for architecture, names, sizes in _FAMILIES:
        for name, mixer in names.items():
            fixed = _WITH_MIXER.get(mixer, {}) | (_ROTATED.get(architecture, {}) if mixer != "softmax" else {})
            for suffix, arguments in sizes.items():
                classes = {"num_classes": _CLASSES[suffix]} if suffix else {}
                entries[name + suffix] = Entry(architecture, mixer, fixed | classes | arguments)
    # The size of the published ImageNet model. The original has a stem of one convolution, and always uses 4 heads.
    entries["hybrid_vin_imagenet"] = Entry(
        HybridTransformer,
        "nystrom",
        dict(img_size=224, patch_size=16, num_classes=1000, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0)
        | dict(num_landmarks=32),
    )
    return entries


_MODELS = _entries()
PUBLISHED = tuple(name for _, names, _ in _FAMILIES for name in names)  # models in the published sizes


def list_models(pattern: str | None = None) -> list[str]:
    """Return the model names for `create_model`, optionally only those that match `pattern`, such as "hybrid_*"."""
    if pattern is not None and not isinstance(pattern, str):
        raise TypeError(f"pattern: expected text such as 'hybrid_*', got {pattern!r}")
    return sorted(name for name in _MODELS if pattern is None or fnmatch(name, pattern))


def create_model(
    name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **overrides: Any
) -> Backbone:
    """Build the model `name` on `device`, with newly initialized weights of the given dtype.

    Overrides are keyword arguments of the architecture (`VisionTransformer`, `LeViT`, `CvT`, `CCT`, `FNet2D`). In addition,
    mixer="softmax" | "performer" | "feature" | "linear" | "nystrom" | "linformer" | "agent" | "fourier" selects a token mixer.
    The options of the mixer are also accepted; see `mixer_options` in models/mixers.py. `FNet2D` has a fixed mixer and
    accepts neither `mixer` nor mixer options.

    Raises:
        TypeError: an argument is unknown (the message suggests similar names), or `name`, `dtype` or an option of the mixer has
            the wrong type.
        ValueError: the name is unknown, or a value is invalid.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    valid = takes(name, overrides.get("mixer"))
    for key in overrides:
        if key not in valid:
            hint = nearest(key, valid)
            raise TypeError(f"model {name!r} has no argument {key!r}{hint}; it takes {', '.join(sorted(valid))}")
    architecture, mixer, _ = _MODELS[name]
    # If a different mixer is selected, drop the preset options of the default mixer.
    arguments = {key: value for key, value in preset(name).items() if key in valid} | overrides
    mixers = []
    if mixer is not None:
        mixer = arguments.pop("mixer", mixer)
        mixers.append(make_mixer(mixer, **{key: arguments.pop(key) for key in mixer_options(mixer) & arguments.keys()}))
    with nullcontext() if device is None else torch.device(device):
        model = architecture(*mixers, **arguments)
    model.to(device=device, dtype=dtype)
    model.config = {"name": name, "arguments": overrides}
    return model


def takes(name: str, mixer: str | None = None) -> set[str]:
    """Return the names of the arguments that the model `name` accepts with `mixer`. None selects the model's default mixer."""
    entry = _entry(name)
    signature = inspect.signature(entry.architecture).parameters.values()
    names = {each.name for each in signature if each.kind is each.KEYWORD_ONLY} - {"stem"}
    return names if entry.mixer is None else names | {"mixer"} | mixer_options(mixer or entry.mixer)


def preset(name: str) -> dict[str, Any]:
    """Return the arguments that the model `name` sets. They override the defaults of its architecture and mixer."""
    return dict(_entry(name).arguments)


def defaults(name: str) -> dict[str, Any]:
    """Return the default arguments of the model `name`: those of its architecture, overridden by `preset(name)`."""
    signature = inspect.signature(_entry(name).architecture).parameters.values()
    return {each.name: each.default for each in signature if each.kind is each.KEYWORD_ONLY} | preset(name)


def _entry(name: str) -> Entry:
    check_name(name, list_models(), "model")
    return _MODELS[name]
