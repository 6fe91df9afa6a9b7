"""Integration with torch.nn: replace the attention in nn.MultiheadAttention and in PyTorch's encoder and decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .drop_in import DropIn, valid_tokens
from .hosts import Report, replace_each


class MultiheadAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention whose child `vix` computes attention. `replace_mha` converts modules to this class."""

    vix: DropIn

    def extra_repr(self) -> str:
        return self.vix.describe()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """Return False to disable PyTorch's inference fast path, which would read the parameters and bypass this module."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Compute attention like nn.MultiheadAttention with need_weights=False.

        Args:
            query, key, value: (batch, tokens, embed_dim) if batch_first, else (tokens, batch, embed_dim). Unbatched inputs
                are (tokens, embed_dim).
            key_padding_mask: (batch, tokens), or (tokens,) for unbatched inputs. As in nn.MultiheadAttention, bool with
                True = padded, or float with 0 = valid and -inf = padded.

        Returns:
            a tuple of the output, with the shape of query, and None instead of the attention weights.

        Raises:
            NotImplementedError: need_weights is True (the default), attn_mask or is_causal is set, attention dropout is active
                (unless `vix` has dropout="ignore"), or query is a nested tensor.
        """
        if need_weights:
            raise NotImplementedError("need_weights: expected False (attention weights are never computed), got True")
        if attn_mask is not None:
            raise NotImplementedError("attn_mask: expected None; use key_padding_mask (batch, tokens)")
        if query.is_nested:
            raise NotImplementedError("query: expected a strided tensor and a key_padding_mask, got a nested tensor")
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            raise ValueError(f"query, key, value: expected 2 or 3 dimensions, got {query.dim()}, {key.dim()}, {value.dim()}")
        layout = "n c" if query.dim() == 2 else "b n c" if self.batch_first else "n b c"
        q, k, v = (
            rearrange(x, f"{layout.replace('c', '(h d)')} -> {'b' if 'b' in layout else '1'} h n d", h=self.num_heads)
            for x in self._projected(query, key, value)
        )
        if key_padding_mask is not None:
            valid = ~key_padding_mask if key_padding_mask.dtype == torch.bool else valid_tokens(key_padding_mask)
            key_padding_mask = valid[None] if query.dim() == 2 else valid
        dropout = self.dropout if self.training else 0.0
        out = self.vix(
            q, k, v, dropout_p=dropout, is_causal=is_causal, key_padding_mask=key_padding_mask,
            self_attention=query is key,
        )  # fmt: skip
        out = self.out_proj(rearrange(out, "b h n d -> b n (h d)"))
        return rearrange(out, f"{'b' if 'b' in layout else '1'} n c -> {layout}"), None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), self.in_proj_weight.chunk(3), biases))


def replace_mha(
    model: nn.Module, op: str, *, layers: Sequence[str] | None = None, retrain: bool = False, **options: Any
) -> Report:
    """Replace the attention in the nn.MultiheadAttention modules of `model`, in place.

        report = replace_mha(model, "performer", retrain=True, num_features=128)

    Existing parameters keep their names and values. PyTorch's encoder and decoder layers are supported, but do not use the
    inference fast path, which would bypass the new attention. Unlike the fast path, these layers do not set outputs for padded
    tokens to zero. Attention dropout, which is 0.1 by default in these layers, must be 0 in training. With dropout="ignore",
    it is skipped, and other dropout still applies. A call to a replaced module with need_weights=True (the default) raises an
    error.

    Args:
        model: a model that contains nn.MultiheadAttention modules.
        layers: names or patterns of the modules to replace, such as ["layers.1*"]. None: all.
        op, retrain, options: as in DropIn. Each layer has different random features.

    Returns:
        a report that lists the replaced layers, and states why other attention layers could not be replaced.

    Raises:
        ValueError: nothing could be replaced, or `op` needs retrain=True.
    """

    def adapt(module: nn.Module) -> None:
        module.__class__ = MultiheadAttention

    attention = DropIn(op, retrain=retrain, **options)
    report = replace_each(
        model,
        attention,
        reason_against=_reason_against,
        adapt=adapt,
        expected="nn.MultiheadAttention",
        layers=layers,
    )
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, MultiheadAttention) for m in module.modules()):
            module.use_nested_tensor = False  # otherwise its layers would receive nested tensors
    return report


def _reason_against(module: nn.Module) -> str:
    if type(module) not in (nn.MultiheadAttention, MultiheadAttention):
        return f"{type(module).__name__}, which is not nn.MultiheadAttention"
    if module.in_proj_weight is None:
        return "keys or values have a different width than queries (kdim, vdim)"
    if module.bias_k is not None or module.add_zero_attn:
        return "it appends additional keys and values (add_bias_kv, add_zero_attn)"
    return ""
