"""Linear-cost attention for vision: fused Triton kernels, a tiled PyTorch backend, and ViX models built on them."""

from . import nn
from .ops.agent import agent_attention
from .ops.feature import feature_attention
from .ops.fourier import fourier_mixing
from .ops.linear import linear_attention
from .ops.linformer import linformer_attention
from .ops.nystrom import nystrom_attention
from .ops.performer import orthogonal_projection, performer_attention
from .ops.rope import Rope, apply_rope, rope_1d, rope_axial, rope_mixed, rope_mixed_frequencies
from .ops.weights import attention_weights

__version__ = "0.1.0"

__all__ = [
    "Rope",
    "agent_attention",
    "apply_rope",
    "attention_weights",
    "feature_attention",
    "fourier_mixing",
    "linear_attention",
    "linformer_attention",
    "nn",
    "nystrom_attention",
    "orthogonal_projection",
    "performer_attention",
    "rope_1d",
    "rope_axial",
    "rope_mixed",
    "rope_mixed_frequencies",
]
