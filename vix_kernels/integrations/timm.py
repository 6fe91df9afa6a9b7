"""Integration with timm: replace the attention in timm's vision transformers, and register vix_kernels models with timm.

Importing this module registers the models and attention layers of this library with timm:

    timm.create_model("vix_vin_tiny", num_classes=10)                              a model of vix_kernels.models
    timm.create_model("vit_tiny_patch16_224", attn_layer="vix_nystrom")            a timm model with different attention
    train.py DIR --device-modules vix_kernels.integrations.timm --model vix_vin_tiny
"""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..nn.core import Mixer, Site, Tokens, subscribe
from ..nn.packed_linear import packed_linear
from ..ops.rope import Rope
from . import timm_models  # noqa: F401  registers the models in vix_kernels.models
from .drop_in import OPS, DropIn, TokenGrid
from .hosts import Report, check_model, host, replace_each, require_call

with host("timm", "1.0.28"):
    from timm.layers import Attention, AttentionRope, PatchDropout, PatchDropoutWithIndices
    from timm.models import register_notrace_module
    from timm.models.eva import EvaAttention
    from timm.models.vision_transformer import ATTN_LAYERS


class _Replaced:
    """Base class of the replacements for three of timm's attention classes.

    The replacements only change how the output is computed from q, k and v.
    """

    vix: DropIn

    def extra_repr(self) -> str:
        return self.vix.describe()

    def finish(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        dropout = self.attn_drop.p if self.training else 0.0
        out = self.vix(q, k, v, attn_mask, dropout, is_causal, rope=rope)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class ReplacedAttention(_Replaced, Attention):
    """A timm.layers.Attention whose child `vix` computes the attention."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the output of the attention layer, (batch, tokens, dim_out), for x (batch, tokens, dim)."""
        q, k, v = map(self.split, packed_linear(self.qkv, x))
        return self.finish(x, q, k, v, None, attn_mask, is_causal)


class _ReplacedRope(_Replaced):
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the output (batch, tokens, dim_out) for x (batch, tokens, dim). `rope` is a table as in `rope_of`."""
        q, k, v = map(self.split, self.projected(x))
        if k.shape[1] != q.shape[1]:
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        rotary = None if rope is None else rope_of(rope, self.num_prefix_tokens, self.num_heads, self.rotate_half)
        return self.finish(x, q, k, v, rotary, attn_mask, is_causal)


class ReplacedAttentionRope(_ReplacedRope, AttentionRope):
    """A timm.layers.AttentionRope whose child `vix` computes the attention."""

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        return packed_linear(self.qkv, x) if self.qkv is not None else (self.q_proj(x), self.k_proj(x), self.v_proj(x))


class ReplacedEvaAttention(_ReplacedRope, EvaAttention):
    """An EvaAttention from timm whose child `vix` computes the attention."""

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_bias is None:
            return packed_linear(self.qkv, x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return F.linear(x, self.qkv.weight, bias).chunk(3, -1)


_REPLACED = {Attention: ReplacedAttention, AttentionRope: ReplacedAttentionRope, EvaAttention: ReplacedEvaAttention}
for _host, _replacement in _REPLACED.items():
    require_call("timm", _replacement, _host)
    register_notrace_module(_replacement)  # torch.fx cannot trace these modules, because they check shapes


def rope_of(table: Tensor, prefix_tokens: int, num_heads: int, half: bool) -> Rope:
    """Convert timm's table of rotary sines and cosines, (tokens, 2 R) or (heads, tokens, 2 R), to a Rope.

    R is the number of rotated channels. A row contains R sines, then R cosines. The first `prefix_tokens` tokens have no row
    and are not rotated. If `half`, channels i and i + R / 2 form a pair with equal angles, otherwise channels 2i and 2i + 1.
    """
    if table.dim() == 2:
        table = table[None]
    if table.dim() != 3 or table.shape[0] not in (1, num_heads):
        raise NotImplementedError(
            f"rope: expected a table (tokens, 2 R) or ({num_heads} heads, tokens, 2 R), got {tuple(table.shape)}; a "
            "separate table for each sample (patch dropout) is not supported"
        )
    once = slice(table.shape[2] // 4) if half else slice(None, None, 2)
    sin, cos = (part[..., once].float() for part in table.chunk(2, -1))
    layout = "half" if half else "interleaved"
    if table.requires_grad:  # learned angles: Rope.of propagates the gradient to them
        return Rope.of(F.pad(torch.atan2(sin, cos), (0, 0, prefix_tokens, 0)), layout)
    sin, cos = F.pad(sin, (0, 0, prefix_tokens, 0)), F.pad(cos, (0, 0, prefix_tokens, 0), value=1.0)
    return Rope(cos, sin, layout)


class BuiltAttention(ReplacedAttention):
    """Base class of the classes that `attention_layer` returns. Landmarks and agents are placed as in `replace_attention`.

    Attributes:
        attention: (class attribute) the DropIn that each layer copies.
        retrain: (class attribute) whether weights trained with different attention may be loaded.
        vix: the current attention of this layer. `replace_attention` changes this attribute.
        built: the attention with which this layer was created.
    """

    attention: DropIn
    retrain: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.vix = type(self).attention.mounted(Site(self.head_dim, self.num_heads)).like(self)
        self.own = (self.vix,)  # a tuple, so that the module is not registered a second time, as the child `own`
        _place_while_built()

    @property
    def built(self) -> DropIn:
        return self.own[0]


class MarkedAttention(BuiltAttention):
    """A BuiltAttention that does not closely approximate softmax attention. Its state dict stores `mark` as `_extra_state`."""

    @property
    def mark(self) -> str:
        """The op, followed by "+exact" if class and register tokens use exact softmax attention."""
        return self.vix.op + "+exact" * (self.vix.core.exact_rows(Tokens()) > 0)

    def get_extra_state(self) -> Tensor:
        """Return the mark as a tensor of bytes, because safetensors and code that averages state dicts need tensors."""
        return torch.tensor(list(self.mark.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: `_load_from_state_dict` checks the mark before it loads any weights."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        mark, key = self.mark, f"{prefix}_extra_state"
        weights = (x for name, x in state_dict.items() if name.startswith(prefix) and name != key)
        has_values = not all(getattr(x, "is_meta", False) for x in weights)
        trained_with = _text_of(state_dict.get(key)) if has_values else mark
        if mark == f"{trained_with}+exact" and "exact_prefix" not in self.vix.options:  # saved before exact_prefix existed
            self.vix.core, self.vix.follows_prefix, mark = replace(self.vix.core, exact_prefix=False), False, trained_with
        may_differ = self.retrain or self.vix is not self.built  # replace_attention checks retrain before it changes vix
        if trained_with != mark and not may_differ:
            if not any(message.startswith(_REFUSED) for message in error_msgs):  # one error, not one for each layer
                option = "exact_prefix=True" if trained_with == f"{mark}+exact" else "retrain=True"
                error_msgs.append(
                    f"{_REFUSED} trained with {mark!r} attention (marked by {key}), got weights trained with {trained_with!r}"
                    f"{'' if key in state_dict else ' (no mark)'}; use attn_layer=attention_layer({self.vix.op!r}, {option})"
                )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip
        if may_differ and key in missing_keys:
            missing_keys.remove(key)


_REFUSED = "attn_layer: expected weights"


def _text_of(mark: Any) -> str:
    """Decode `mark`, a tensor of bytes, or return "softmax" if `mark` is None.

    The values are rounded first, because averaging state dicts can introduce rounding errors.
    """
    if not isinstance(mark, Tensor):
        return "softmax" if mark is None else repr(mark)
    return bytes(mark.round().to(torch.uint8).flatten().tolist()).decode(errors="replace")


def attention_layer(op: str, *, retrain: bool = False, **options: Any) -> type[Attention]:
    """Return a subclass of timm's Attention with the attention method `op`. Pass this class to timm as attn_layer.

        timm.create_model("vit_tiny_patch16_224", attn_layer=attention_layer("nystrom", num_landmarks=49))

    Landmarks and agents are placed as in `replace_attention`. If `op` does not closely approximate softmax attention (see
    `retrain` in DropIn), each layer adds `_extra_state` to the state dict. This entry marks the weights as trained with `op`.

    Args:
        op, options: as in DropIn. All layers have the same random features.
        retrain: whether the model will be trained with this attention after weights are loaded. If False, and if `op` marks
            weights as described above, load_state_dict rejects weights without the same mark.
    """
    return _class_with(DropIn(op, retrain=True, **options), retrain)


class _WithAttention(type):
    """Metaclass of the classes that `attention_layer` returns. Pickle recreates these classes instead of importing them."""


def _class_with(attention: DropIn, retrain: bool) -> type[Attention]:
    kind = BuiltAttention if attention.core.takes_trained_weights() else MarkedAttention
    contents = {"attention": attention, "retrain": retrain, "__module__": __name__}
    return _WithAttention(f"{attention.op.capitalize()}Attention", (kind,), contents)


copyreg.pickle(_WithAttention, lambda layer: (_class_with, (layer.attention, layer.retrain)))


LAYERS: dict[str, type[Attention]] = {}  # maps each op to its attention class


@subscribe
def _admit(core: type[Mixer]) -> None:
    """Register the attention class for `core` with timm, as vix_NAME. `subscribe` calls this function for each core."""
    if core.name in OPS:
        layer = LAYERS[core.name] = attention_layer(core.name)
        ATTN_LAYERS[f"vix_{core.name}"] = globals()[layer.__name__] = layer


@cache
def _place_while_built() -> None:
    """Register `_place_in` once, as a global hook that runs whenever a module registers a child.

    The hook is necessary, because timm passes neither the number of prefix tokens nor the grid to the class in attn_layer.
    """
    register_module_module_registration_hook(_place_in)


def _place_in(vit: nn.Module, name: str, module: nn.Module) -> None:
    """For each BuiltAttention in the blocks of `vit`, set the number of prefix tokens and the grid of landmarks or agents.

    This hook runs when `vit` registers its blocks, and again whenever `vit` registers another child. Some models, such as
    distilled DeiT models, set the number of prefix tokens after they register the blocks.
    """
    blocks = module if name == "blocks" else vit._modules.get("blocks")
    if blocks is None or "num_prefix_tokens" not in vars(vit):
        return
    for layer in blocks.modules():
        if isinstance(layer, BuiltAttention):
            _place(layer.built, vit, _follow(vit.patch_embed) if _has_grid(vit) else None)


def replace_attention(
    model: nn.Module, op: str, *, layers: Sequence[str] | None = None, retrain: bool = False, **options: Any
) -> Report:
    """Replace the attention in a timm model, in place. Existing parameters keep their names and values.

        report = replace_attention(timm.create_model("vit_base_patch16_224", pretrained=True), "nystrom")

    timm's attention classes Attention, AttentionRope and EvaAttention are supported, including rotary embedding, normalization
    of q and k, gates and output dropout.

    Landmarks and agents are placed on the patch grid, which may differ between calls if the model accepts any image size. Each
    prefix token (class or register token) is a separate landmark or agent. `options` can change this placement. With patch
    dropout, landmarks and agents are means of segments of the sequence. The report describes the placement.

    Args:
        model: a timm model.
        layers: names or patterns of the layers to replace, such as ["blocks.1*"]. None: all.
        op, retrain, options: as in DropIn. Each layer has different random features.

    Returns:
        a report that lists the replaced layers, and states why other attention layers could not be replaced.
        `restore_attention` undoes the replacement.

    Raises:
        ValueError: nothing could be replaced, or `op` needs retrain=True. The model is then unchanged.
    """
    check_model(model)
    attention = DropIn(op, retrain=retrain, **options)
    transformers = _vision_transformers(model)
    embeddings = {id(each): each.patch_embed for each in transformers.values() if _has_grid(each)}
    new = [each for each in embeddings.values() if _grid_of(each) is None]
    grids: dict[int, TokenGrid] = {}

    def place(name: str, attention: DropIn) -> None:
        inside = [path for path in transformers if not path or name.startswith(f"{path}.")]
        if inside:
            vit = transformers[max(inside, key=len)]
            _place(attention, vit, grids.get(id(vit)))

    def adapt(module: nn.Module) -> None:
        module.__class__ = _REPLACED.get(type(module), type(module))  # an already replaced module keeps its class

    try:
        grids.update({key: _follow(each) for key, each in embeddings.items()})
        return replace_each(
            model, attention, reason_against=_reason_against, adapt=adapt, place=place, layers=layers,
            expected="an attention class of timm's vision transformers or EVA",
        )  # fmt: skip
    except BaseException:
        for each in new:
            _unfollow(each)
        raise


def restore_attention(model: nn.Module) -> list[str]:
    """Undo `replace_attention`, in place. Each module has its original attention again and keeps its Parameter objects.

    Returns:
        the names of the restored modules.

    Raises:
        ValueError: no attention was replaced.
    """
    restored, kept = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, _Replaced):
            continue
        if isinstance(module, BuiltAttention):
            kept.add(id(module.built.grid))
            if module.vix is module.built:
                continue
            module.vix = module.built.like(module)
        else:
            module.__class__ = next(host for host, replacement in _REPLACED.items() if isinstance(module, replacement))
            del module.vix
        restored.append(name or "(the model itself)")
    if not restored:
        raise ValueError("model: expected a model with replaced attention, got one without")
    for module in model.modules():
        if id(_grid_of(module)) not in kept:
            _unfollow(module)
    return restored


def _vision_transformers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a dict of the vision transformers in `model` by name: the modules with `blocks` and `num_prefix_tokens`."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "num_prefix_tokens") and hasattr(module, "blocks")
    }


def _place(attention: DropIn, vit: nn.Module, grid: TokenGrid | None) -> None:
    """Set the grid and the number of prefix tokens of `attention`. With patch dropout, the grid is None."""
    drops_patches = isinstance(getattr(vit, "patch_drop", None), PatchDropout | PatchDropoutWithIndices)
    attention.place(vit.num_prefix_tokens, None if drops_patches else grid)


def _has_grid(vit: nn.Module) -> bool:
    return hasattr(getattr(vit, "patch_embed", None), "dynamic_feat_size")


def _follow(embedding: nn.Module) -> TokenGrid:
    """Return the hook that records the token grid of `embedding`. Register a new hook if `embedding` does not have one."""
    grid = _grid_of(embedding)
    if grid is None:
        grid = TokenGrid()
        embedding.register_forward_hook(grid)
    if not grid.sizes and getattr(embedding, "grid_size", None) is not None:
        grid.add(embedding.grid_size)
    return grid


def _unfollow(module: nn.Module) -> None:
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, TokenGrid):
            del module._forward_hooks[key]


def _grid_of(module: nn.Module) -> TokenGrid | None:
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, TokenGrid)), None)


def _reason_against(module: nn.Module) -> str:
    if type(module) in _REPLACED or isinstance(module, _Replaced):
        return ""
    kind, names = type(module), ", ".join(kind.__name__ for kind in _REPLACED)
    return f"{kind.__module__}.{kind.__name__}, which is not one of timm's {names}"
