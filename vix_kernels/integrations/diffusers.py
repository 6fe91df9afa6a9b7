"""Integration with diffusers: replace the self-attention in diffusers models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn.core import Site
from .drop_in import DropIn
from .hosts import Report, host, replace_each
from .sdpa import SdpaReplacement

with host("diffusers", "0.38"):
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0


class VixAttnProcessor(AttnProcessor2_0):
    """An AttnProcessor2_0 that computes attention with the child module `vix` of the calling Attention module."""

    def __call__(  # diffusers' Attention only passes arguments that this signature names
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the output of AttnProcessor2_0, computed with `attn.vix` instead of softmax attention.

        Raises:
            NotImplementedError: encoder_hidden_states is given (cross-attention), or the mask is not a padding mask.
        """
        if encoder_hidden_states is not None:
            raise NotImplementedError("encoder_hidden_states: expected None; cross-attention is not supported")
        with SdpaReplacement(attn.vix, fall_back=False):
            return super().__call__(attn, hidden_states, None, attention_mask, temb)


def replace_attention(model: nn.Module, op: str, *, retrain: bool = False, **options: Any) -> Report:
    """Replace the self-attention in a diffusers model, in place. Existing parameters keep their names and values.

        report = replace_attention(pipeline.transformer, "nystrom", num_landmarks=64)

    A VixAttnProcessor replaces the AttnProcessor2_0 of each self-attention layer. Layers with other processors, such as the
    attention layers of Flux and SD3, are not supported.

    Args:
        model: a diffusers model that contains diffusers.models.attention_processor.Attention modules.
        op, retrain, options: as in DropIn. Each layer has different random features.

    Returns:
        a report that lists the replaced layers, and states why other attention layers could not be replaced.

    Raises:
        ValueError: nothing could be replaced, or `op` needs retrain=True.
    """
    return replace_each(
        model,
        DropIn(op, retrain=retrain, **options),
        reason_against=_reason_against,
        site_of=lambda attention: Site(attention.inner_dim // attention.heads, attention.heads),
        adapt=lambda module: module.set_processor(VixAttnProcessor()),
        expected="a self-attention layer of diffusers' class Attention",
    )


def _reason_against(module: nn.Module) -> str:
    if type(module) is not Attention:
        return f"{type(module).__name__}, which is not the Attention of diffusers.models.attention_processor"
    if module.is_cross_attention:
        return "cross-attention"
    # By default, modules with unscaled logits (scale_qk=False) have an AttnProcessor, so they are not replaced.
    if type(module.processor) not in (AttnProcessor2_0, VixAttnProcessor):
        return f"a processor of class {type(module.processor).__name__}"
    return ""
