"""Integration with the Hugging Face kernels library: register layers that `kernelize` can use in transformers models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .hosts import host
from .transformers import fnet_transform, modeling_fnet, modeling_nystromformer, nystromformer_attention, uses_dft_matrices

with host("kernels", "0.17"):
    from kernels import register_kernel_mapping, replace_kernel_forward_from_hub

DEVICES = ("cuda", "rocm", "cpu")


class VixNystromformerSelfAttention(nn.Module):
    """Layer that the kernels library substitutes for NystromformerSelfAttention.

    This layer has no state, because the kernels library only uses its forward method.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        return nystromformer_attention(self, hidden_states, attention_mask, output_attentions)


class VixFNetBasicFourierTransform(nn.Module):
    """Layer that the kernels library substitutes for FNetBasicFourierTransform."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return fnet_transform(self, hidden_states)


@dataclass(frozen=True)
class InPackage:
    """Entry in the layer mapping of the kernels library. The layer is defined in this package, so nothing is downloaded."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


def register() -> None:
    """Register replacements for Nystromformer's attention and FNet's Fourier transform with the kernels library.

        register()
        model = kernelize(model, mode=Mode.TRAINING, device="cuda")

    Parameters do not change. Outputs change only for sequences that consist entirely of padding. See
    `vix_kernels.integrations.transformers.patch`, which makes the same replacements without the kernels library.
    """
    layers = {
        "NystromformerSelfAttention": VixNystromformerSelfAttention,
        "FNetBasicFourierTransform": VixFNetBasicFourierTransform,
    }
    replace_kernel_forward_from_hub(modeling_nystromformer.NystromformerSelfAttention, "NystromformerSelfAttention")
    replace_kernel_forward_from_hub(
        modeling_fnet.FNetBasicFourierTransform, "FNetBasicFourierTransform", lambda module: not uses_dft_matrices(module)
    )  # fmt: skip
    register_kernel_mapping({name: {device: InPackage(layer) for device in DEVICES} for name, layer in layers.items()})
