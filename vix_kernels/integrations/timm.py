"""timm: another attention in its vision transformers, and the models of this library in its registry.

Importing this registers; nothing changes until a name is used:

    timm.create_model("vix_vin_tiny", num_classes=10)                              every model of vix_kernels.models
    timm.create_model("vit_tiny_patch16_224", attn_layer="vix_nystrom")            a timm model built with an attention
    train.py DIR --device-modules vix_kernels.integrations.timm --model vix_vin_tiny
"""

from __future__ import annotations

import copyreg
import sys
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import models
from ..nn.packed_linear import packed_linear
from ..ops.rope import Rope
from .drop_in import OPS, DropIn, TokenGrid, options_of
from .hosts import Report, host, replace_each, require_call

with host("timm", "1.0.28"):
    from timm.layers import Attention, AttentionRope, PatchDropout
    from timm.models import register_model
    from timm.models.eva import EvaAttention
    from timm.models.vision_transformer import ATTN_LAYERS


class _Replaced:
    """What the three attentions of timm share: parameters and all that surrounds the attention are theirs."""

    attention: DropIn

    def extra_repr(self) -> str:
        return self.attention.describe()

    def finish(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        dropout = self.attn_drop.p if self.training else 0.0
        out = self.norm(rearrange(self.attention(q, k, v, attn_mask, dropout, is_causal, rope=rope), "b h n d -> b n (h d)"))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", d=self.head_dim)


class ReplacedAttention(_Replaced, Attention):
    """timm.layers.Attention with another attention between its linear maps."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (batch, tokens, dim) to the same."""
        q, k, v = map(self.split, packed_linear(self.qkv, x))
        return self.finish(x, q, k, v, None, attn_mask, is_causal)


class _ReplacedRope(_Replaced):
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (batch, tokens, dim) to the same; rope is timm's table of the tokens behind the prefix, sines and cosines."""
        q, k, v = map(self.split, self.projected(x))
        if k.shape[1] != q.shape[1]:
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        turn = None if rope is None else rope_of(rope, self.num_prefix_tokens, self.num_heads, self.rotate_half)
        return self.finish(x, q, k, v, turn, attn_mask, is_causal)


class ReplacedAttentionRope(_ReplacedRope, AttentionRope):
    """timm.layers.AttentionRope with another attention."""

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        return packed_linear(self.qkv, x) if self.qkv is not None else (self.q_proj(x), self.k_proj(x), self.v_proj(x))


class ReplacedEvaAttention(_ReplacedRope, EvaAttention):
    """The attention of timm's EVA with another attention."""

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_bias is None:
            return packed_linear(self.qkv, x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        return F.linear(x, self.qkv.weight, bias).chunk(3, -1)


_REPLACED = {Attention: ReplacedAttention, AttentionRope: ReplacedAttentionRope, EvaAttention: ReplacedEvaAttention}
for _theirs, _ours in _REPLACED.items():
    require_call("timm", _ours, _theirs)


def rope_of(table: Tensor, prefix_tokens: int, num_heads: int, half: bool) -> Rope:
    """timm's table (tokens, 2 R) or (heads, tokens, 2 R), sines beside cosines, each angle twice, as a Rope."""
    if table.dim() == 2:
        table = table[None]
    if table.dim() != 3 or table.shape[0] not in (1, num_heads):
        raise NotImplementedError(
            f"rope: expected a table (tokens, 2 R) or ({num_heads} heads, tokens, 2 R), got {tuple(table.shape)}; tables of "
            "their own for each sample (patch dropout) are not supported"
        )
    once = slice(table.shape[2] // 4) if half else slice(None, None, 2)
    sin, cos = (part[..., once].float() for part in table.chunk(2, -1))
    layout = "half" if half else "interleaved"
    if table.requires_grad:  # the tables of learned angles; along the circle is the only way they move
        return Rope.of(F.pad(torch.atan2(sin, cos), (0, 0, prefix_tokens, 0)), layout)
    sin, cos = F.pad(sin, (0, 0, prefix_tokens, 0)), F.pad(cos, (0, 0, prefix_tokens, 0), value=1.0)
    return Rope(cos, sin, layout)


def attention_layer(op: str, *, retrain: bool = False, **options: Any) -> type[Attention]:
    """A class for timm's attn_layer: its Attention, with its parameters and another attention.

        timm.create_model("vit_tiny_patch16_224", attn_layer=attention_layer("nystrom", num_landmarks=49, prefix_tokens=1))

    Args:
        op, retrain, options: as in DropIn. All layers share the random features.
    """
    return _class_with(DropIn(op, retrain=retrain, **options))


class _WithAttention(type):
    """The kind of these classes: pickle, which looks for others by their name, makes them again."""


def _class_with(attention: DropIn) -> type[Attention]:
    name, contents = f"{attention.op.capitalize()}Attention", {"attention": attention, "__module__": __name__}
    return _WithAttention(name, (ReplacedAttention,), contents)


copyreg.pickle(_WithAttention, lambda layer: (_class_with, (layer.attention,)))


# Whoever names one knows what the model has to be trained with.
NystromAttention, PerformerAttention, LinearAttention, AgentAttention = (attention_layer(op, retrain=True) for op in OPS)
LAYERS = NystromAttention, PerformerAttention, LinearAttention, AgentAttention
ATTN_LAYERS.update({f"vix_{layer.attention.op}": layer for layer in LAYERS})


def replace_attention(model: nn.Module, op: str, *, retrain: bool = False, **options: Any) -> Report:
    """Put another attention into a timm model, in place; parameters and their names stay.

        report = replace_attention(timm.create_model("vit_base_patch16_224", pretrained=True), "nystrom")

    Serves Attention (vision_transformer), AttentionRope and EvaAttention (EVA, DINOv3; timm's rotary tables included), with
    their norms of q and k, gates and dropout of the output. Landmarks and agents are placed on the grid of the patches, that of
    each call where images have any size, and prefix tokens (class, registers) are their own; `options` may say otherwise. In a
    model with patch dropout, whose tokens form no grid, they are segments: the report says which.

    Args:
        model: a timm model.
        op, retrain, options: as in DropIn. Each layer has random features of its own.

    Returns:
        what was replaced, and what was left for which reason. `restore_attention` undoes it.

    Raises:
        ValueError: nothing could be replaced, or `op` needs retrain=True. The model is as it was.
    """
    attention = DropIn(op, retrain=retrain, **options)
    transformers = _vision_transformers(model)
    embeddings = {id(each): each.patch_embed for each in transformers.values() if hasattr(each, "patch_embed")}
    grids = {key: _grid_of(embedding) or TokenGrid(None) for key, embedding in embeddings.items()}

    def attention_at(name: str) -> DropIn:
        inside = [path for path in transformers if not path or name.startswith(f"{path}.")]
        if not inside or "prefix_tokens" not in options_of(op):
            return attention
        vit = transformers[max(inside, key=len)]
        here = {"prefix_tokens": vit.num_prefix_tokens} | options
        fixed = "grid_size" in options or options.get("landmarks", "grid") != "grid"
        if fixed or id(vit) not in grids or isinstance(getattr(vit, "patch_drop", None), PatchDropout):
            return DropIn(op, retrain=retrain, **here)
        return DropIn(op, retrain=retrain, grid=grids[id(vit)], **here)

    def put(module: nn.Module, attention: DropIn) -> None:
        module.__class__ = _REPLACED.get(type(module), type(module))  # one that was replaced stays what it is
        module.attention = attention

    hooks = []
    try:
        for key, embedding in embeddings.items():
            if grids[key].size is None:
                grids[key].size = getattr(embedding, "grid_size", None)
            if _grid_of(embedding) is None:
                hooks.append(embedding.register_forward_hook(grids[key]))
        return replace_each(
            model,
            attention,
            reason_against=_reason_against,
            put=put,
            expected="an attention that timm's vision transformers or EVA have",
            attention_at=attention_at,
        )
    except BaseException:
        for hook in hooks:
            hook.remove()
        raise


def restore_attention(model: nn.Module) -> list[str]:
    """Undo `replace_attention`, in place: every attention is timm's again, with the same Parameter objects.

    Returns:
        the names of the modules that were restored.

    Raises:
        ValueError: there is none.
    """
    restored = []
    for name, module in model.named_modules():
        if isinstance(module, _Replaced) and vars(module).pop("attention", None) is not None:
            if type(module) in _REPLACED.values():  # one that was built with another attention has that one again
                module.__class__ = next(theirs for theirs, ours in _REPLACED.items() if ours is type(module))
            restored.append(name or "(the model itself)")
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, TokenGrid):
                del module._forward_hooks[key]
    if not restored:
        raise ValueError("model: expected one whose attention was replaced, got none")
    return restored


def _vision_transformers(model: nn.Module) -> dict[str, nn.Module]:
    """The vision transformers in `model` by their names: what has blocks and knows how many tokens are its prefix."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "num_prefix_tokens") and hasattr(module, "blocks")
    }


def _grid_of(embedding: nn.Module) -> TokenGrid | None:
    """The hook that an earlier replacement left."""
    return next((hook for hook in embedding._forward_hooks.values() if isinstance(hook, TokenGrid)), None)


def _reason_against(module: nn.Module) -> str:
    if type(module) in _REPLACED or isinstance(module, _Replaced):
        return ""
    kind, names = type(module), ", ".join(kind.__name__ for kind in _REPLACED)
    return f"{kind.__module__}.{kind.__name__}, none of timm's {names}"


def _register_models() -> None:
    """Every model of the zoo as vix_NAME, with timm's words for its arguments."""

    def entry(name: str) -> Any:
        def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
            for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm's, about weights to load
                arguments.pop(key, None)
            if pretrained:
                raise RuntimeError(f"pretrained: expected False, got True: vix_{name} has no published weights")
            model = models.create_model(name, **arguments)
            model.default_cfg = model.pretrained_cfg = dict(
                architecture=f"vix_{name}", num_classes=model.num_classes, input_size=(model.in_chans, *model.img_size),
                mean=(0.5,) * model.in_chans, std=(0.5,) * model.in_chans, interpolation="bicubic", crop_pct=1.0,
                classifier="head",
            )  # fmt: skip
            return model

        build.__name__ = build.__qualname__ = f"vix_{name}"
        build.__doc__ = f"The model {name!r} of vix_kernels.models, with its arguments."
        return build

    for name in models.list_models():
        setattr(sys.modules[__name__], f"vix_{name}", register_model(entry(name)))


_register_models()
