"""Linear-cost attention for vision: fused Triton kernels, a tiled PyTorch backend, and ViX models on them."""

from . import nn
from .ops.fourier import fourier_mixing
from .ops.linear import linear_attention
from .ops.performer import orthogonal_projection, performer_attention
from .ops.rope import Rope, apply_rope, rope_1d, rope_axial, rope_mixed, rope_mixed_frequencies

__version__ = "0.1.0"

__all__ = [
    "Rope",
    "apply_rope",
    "fourier_mixing",
    "linear_attention",
    "nn",
    "orthogonal_projection",
    "performer_attention",
    "rope_1d",
    "rope_axial",
    "rope_mixed",
    "rope_mixed_frequencies",
]
