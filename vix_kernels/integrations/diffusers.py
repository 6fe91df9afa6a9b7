"""Integration with diffusers: replace the self-attentions in its models."""

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
    """An AttnProcessor2_0 that computes attention with the child module `vix` of the Attention that calls it."""

    def __call__(  # diffusers' Attention only passes arguments that this signature names
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Compute the output like AttnProcessor2_0, but with `attn.vix` instead of softmax attention.

        Raises:
            NotImplementedError: the call is a cross-attention, or the mask is not a padding mask.
        """
        if encoder_hidden_states is not None:
            raise NotImplementedError("encoder_hidden_states: expected None; cross-attention is not supported")
        with SdpaReplacement(attn.vix, fall_back=False):
            return super().__call__(attn, hidden_states, None, attention_mask, temb)


def replace_attention(model: nn.Module, op: str, *, retrain: bool = False, **options: Any) -> Report:
    """Replace the self-attentions in a diffusers model by changing their processors. Parameters and their names do not change.

        report = replace_attention(pipeline.transformer, "nystrom", num_landmarks=64)

    Only self-attentions whose processor is an AttnProcessor2_0 are replaced. For example, the attentions in Flux and SD3 have
    other processors, because they process several token streams.

    Args:
        model: a diffusers model that contains diffusers.models.attention_processor.Attention modules.
        op, retrain, options: as in DropIn. Each layer has different random features.

    Returns:
        a report that lists the replaced layers, and the other attention layers with the reason why they were not replaced.

    Raises:
        ValueError: nothing could be replaced, or `op` needs retrain=True.
    """
    return replace_each(
        model,
        DropIn(op, retrain=retrain, **options),
        reason_against=_reason_against,
        site_of=lambda attention: Site(attention.inner_dim // attention.heads, attention.heads),
        adapt=lambda module: module.set_processor(VixAttnProcessor()),
        expected="a self-attention of diffusers' class Attention",
    )


def _reason_against(module: nn.Module) -> str:
    if type(module) is not Attention:
        return f"{type(module).__name__}, which is not the Attention of diffusers.models.attention_processor"
    if module.is_cross_attention:
        return "cross-attention"
    # Attentions with unscaled logits are not supported. Their default processor is an AttnProcessor.
    if type(module.processor) not in (AttnProcessor2_0, VixAttnProcessor):
        return f"a processor of class {type(module.processor).__name__}"
    return ""
