"""Attention modules with the argument names of timm's `Attention`, one per file.

They map x (batch, tokens, dim) to a tensor of the same shape.
"""

from importlib import import_module
from pkgutil import iter_modules

from .agent import AgentAttention
from .feature import FeatureAttention
from .fourier import FourierMixing
from .linear import LinearAttention
from .linformer import LinformerAttention
from .nystrom import NystromAttention
from .performer import PerformerAttention
from .softmax import Attention

__all__ = [
    "AgentAttention",
    "Attention",
    "FeatureAttention",
    "FourierMixing",
    "LinearAttention",
    "LinformerAttention",
    "NystromAttention",
    "PerformerAttention",
]

for _file in iter_modules(__path__):  # importing a file registers the core in it, if any
    import_module(f"{__name__}.{_file.name}")
