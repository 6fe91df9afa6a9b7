"""Reimplementations of the original Vision Xformers models (arXiv:2107.02239), which can load the original weights.

They reproduce the quirks of the original models. For new models, use create_model, whose models do not have these quirks.

In ORIGINALS, names without a prefix refer to classes in the repository pranavphoenix/VisionXformer at commit 7ee52ee. In that
repository, CCN and CCP are called CCT, LeViN and LeViP are called LeViT, and CvN and CvP are called CvT. Names with the prefix
"wheel_" refer to classes in the vision_xformer package, version 0.2.0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vix_kernels import backends

from ..arguments import check_name, nearest
from ..state import load_state
from . import cct, levit, vix
from .cct import CCT
from .cvt import CvT
from .fnet2d import EarlierFNet2D, FNet2D
from .levit import LeViT
from .vix import ViX

__all__ = ["ORIGINALS", "from_original"]

# State dict entries that may be missing: the rotary table, which is computed, and num_batches_tracked, which is not used.
_DERIVED = ("layer_pos_emb.emb", "num_batches_tracked")


@dataclass(frozen=True)
class Original:
    """The specification of an original model.

    Attributes:
        model: the class. Its keyword-only parameters, except `backend`, are constructor arguments of the original.
        parts: positional arguments for the class. If a part is a function, its keyword-only parameters are also constructor
            arguments of the original.
        defaults: defaults of constructor arguments that differ from those in the signatures.
        ignored: constructor arguments that the original accepts but does not use.
        only: constructor arguments for which only one value works, each mapped to that value.
        dead: entries in the state_dict that the original does not use.
    """

    model: type[nn.Module]
    parts: tuple[Any, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    only: Mapping[str, Any] = field(default_factory=dict)
    dead: tuple[str, ...] = ()


_DEAD = ("pos_embedding",)
_ROTARY = {"rotary_position_emb": True}
_HEADS = ("heads", "dim_head")
_CCT = ("mlp_radio", "stochastic_depth")
_LEVIT = ("image_size", "dim_key", "dim_value")
_CVT = tuple(f"s{stage}_{name}" for stage in (1, 2, 3) for name in ("proj_kernel", "kv_proj_stride"))
_FNET = vix.fourier, vix.normed_patches, None, "token_mixer"

ORIGINALS = {
    "ViT": Original(ViX, (vix.softmax, vix.patches)),
    "ViTRoPE": Original(ViX, (vix.softmax, vix.patches, 1025), only=_ROTARY, dead=_DEAD),
    "HybridViT": Original(ViX, (vix.softmax, vix.convolutions)),
    "HybridViTRoPE": Original(ViX, (vix.softmax, vix.convolutions, 1025), only=_ROTARY, dead=_DEAD),
    "ViL": Original(ViX, (vix.linformer_of_one_head, vix.patches)),
    "ViLRoPE": Original(ViX, (vix.linformer_of_all_heads, vix.patches, 1025), only=_ROTARY, dead=_DEAD),
    "HybridViL": Original(ViX, (vix.linformer_of_all_heads, vix.convolutions)),
    "HybridViLRoPE": Original(ViX, (vix.linformer_of_all_heads, vix.convolutions, 1025), only=_ROTARY, dead=_DEAD),
    "ViP": Original(ViX, (vix.performer, vix.patches)),
    "ViPRoPE": Original(ViX, (vix.performer, vix.patches, 1025), only=_ROTARY),
    "HybridViP": Original(ViX, (vix.performer, vix.convolutions)),
    "HybridViPRoPE": Original(ViX, (vix.performer, vix.convolutions, 1025), only=_ROTARY),
    "ViN": Original(ViX, (vix.nystrom_of_four_heads, vix.patches)),
    "ViNRoPE": Original(ViX, (vix.nystrom_of_four_heads, vix.patches, 1088), {"emb_dropout": 0.5}, only=_ROTARY),
    "HybridViN": Original(ViX, (vix.nystrom_of_64, vix.convolutions)),
    "HybridViNRoPE": Original(ViX, (vix.nystrom_of_four_heads, vix.convolutions, 1088), {"emb_dropout": 0.5}, only=_ROTARY),
    "FNet": Original(ViX, (vix.fourier, vix.patches), {"emb_dropout": 0.5}, ignored=_HEADS),
    "HybridFNet": Original(ViX, (vix.fourier, vix.convolutions), ignored=_HEADS),
    "FNet2D": Original(EarlierFNet2D),
    "CCT": Original(CCT, (cct.CompactAttention,), ignored=_CCT),
    "CCN": Original(CCT, (cct.nystrom,), ignored=_CCT),
    "CCP": Original(CCT, (cct.performer,), ignored=_CCT),
    "LeViN": Original(LeViT, (levit.nystrom,), ignored=_LEVIT),
    "LeViP": Original(LeViT, (levit.performer,), ignored=_LEVIT),
    "CvN": Original(CvT, (levit.nystrom,), ignored=_CVT),
    "CvP": Original(CvT, (levit.performer,), ignored=_CVT),
    "wheel_ViL": Original(ViX, (vix.linformer, vix.normed_patches)),
    "wheel_ViP": Original(ViX, (vix.performer, vix.normed_patches)),
    "wheel_ViN": Original(ViX, (vix.nystrom, vix.normed_patches)),
    "wheel_FNet": Original(ViX, _FNET),
    "wheel_FNet2D": Original(FNet2D),
}


def from_original(
    name: str, config: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, backend: str = "auto"
) -> nn.Module:
    """Load an original Vision Xformers model. Logits, gradients and parameter names are the same as in the original.

    Args:
        name: the name of the original, such as "ViP" or "wheel_ViP".
        config: the original's constructor arguments.
        state_dict: the original's state_dict. The entries `layer_pos_emb.emb` (the rotary table) and `num_batches_tracked` may
            be missing. The unused `pos_embedding` of rotary ViTs and ViLs, including hybrids, is ignored.
        backend: "reference" runs the published computation, for comparison. "auto", "triton" and "torch" run the operators of
            vix_kernels where these compute the same function; see originals/mixers.py.

    Returns:
        The model in float32 and in training mode, so the dropout in `config` is active. The docstrings of the model classes
        describe where dropout is applied.

    Raises:
        TypeError: `name` is not a string, or `config` is not a mapping.
        ValueError: `name` or an argument in `config` is unknown; an argument is missing or not supported; or `state_dict` does
            not match the model. In the last case, the message lists all entries that are missing or unexpected, or that have
            the wrong shape.
    """
    model = build(name, config, backend=backend)
    original = ORIGINALS[name]
    state = {key: value for key, value in state_dict.items() if key not in original.dead}
    load_state(model, state, f"the original {name!r} of this config", lambda key: key.endswith(_DERIVED))
    model.config = {"original": name, "arguments": dict(config)}
    return model


def build(name: str, config: Mapping[str, Any], *, backend: str = "auto") -> nn.Module:
    """Build the model that `from_original` returns, without loading weights."""
    check_name(name, ORIGINALS, "original")
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a mapping of constructor arguments, got {type(config).__name__}")
    backends.check(backend)
    original = ORIGINALS[name]
    return original.model(*original.parts, **_arguments(name, original, config), backend=backend)


# Parameters and buffers that `build` does not initialize, with the approximate standard deviations of their initial values in
# the original models.
_SPREAD = {
    "cls_token": 1.0, "pos_embedding": 1.0, "positional_emb": 0.2, "proj_k": 0.06, "proj_v": 0.06, "projection_matrix": 1.0,
    "g": 0.0, "b": 0.0,
}  # fmt: skip


@torch.no_grad()
def drawn(model: nn.Module) -> nn.Module:
    """Initialize the tensors of `model` that `build` leaves uninitialized, so that the model can be trained. Return `model`."""
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        last = name.rpartition(".")[2]
        if last in _SPREAD:
            x.normal_(0, _SPREAD[last]).add_(1.0 if last == "g" else 0.0)
    return model


def _arguments(name: str, original: Original, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments: `config`, completed with the defaults of the original."""
    callables: list[Callable[..., Any]] = [original.model, *filter(callable, original.parts)]
    parameters = [p for each in callables for p in inspect.signature(each).parameters.values() if p.kind is p.KEYWORD_ONLY]
    defaults = {p.name: p.default for p in parameters if p.name != "backend"} | original.defaults
    known = sorted({*defaults, *original.ignored, *original.only})
    for key in config:
        if key not in known:
            raise ValueError(
                f"config: original {name!r} has no argument {key!r}{nearest(key, known)}; it takes {', '.join(known)}"
            )
    missing = [key for key, default in defaults.items() if default is inspect.Parameter.empty and key not in config]
    if missing:
        raise ValueError(f"config: original {name!r} needs {', '.join(missing)}")
    for key, value in original.only.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}: expected {value!r}, the only value that works in {name!r}, got {config[key]!r}")
    return {key: config.get(key, default) for key, default in defaults.items()}
