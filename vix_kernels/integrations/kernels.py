"""Hugging Face kernels: layers of this library in its mapping, so that `kernelize` puts them into models of transformers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .hosts import host
from .transformers import fnet_transform, modeling_fnet, modeling_nystromformer, nystromformer_attention, own_matrices

with host("kernels", "0.17"):
    from kernels import register_kernel_mapping, replace_kernel_forward_from_hub

DEVICES = ("cuda", "rocm", "cpu")


class VixNystromformerSelfAttention(nn.Module):
    """What kernels puts into a NystromformerSelfAttention: no state, only a forward."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        return nystromformer_attention(self, hidden_states, attention_mask, output_attentions)


class VixFNetBasicFourierTransform(nn.Module):
    """What kernels puts into an FNetBasicFourierTransform."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return fnet_transform(self, hidden_states)


@dataclass(frozen=True)
class InPackage:
    """A repository for the mapping of kernels that loads nothing: the layer is here."""

    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


def register() -> None:
    """Make the attention of Nystromformer and the transform of FNet known to kernels.

        register()
        model = kernelize(model, mode=Mode.TRAINING, device="cuda")

    Outputs and parameters stay those of transformers, see transformers.patch, which does the same without kernels.
    """
    layers = {
        "NystromformerSelfAttention": VixNystromformerSelfAttention,
        "FNetBasicFourierTransform": VixFNetBasicFourierTransform,
    }
    replace_kernel_forward_from_hub(modeling_nystromformer.NystromformerSelfAttention, "NystromformerSelfAttention")
    replace_kernel_forward_from_hub(
        modeling_fnet.FNetBasicFourierTransform, "FNetBasicFourierTransform", lambda module: not own_matrices(module)
    )  # fmt: skip
    register_kernel_mapping({name: {device: InPackage(layer) for device in DEVICES} for name, layer in layers.items()})
