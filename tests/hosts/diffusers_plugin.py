"""A pytest plugin that runs diffusers' tests with replaced self-attention. It reads one environment variable:

VIX_REPLACE: the operator, such as nystrom, that replaces self-attention in each newly created model.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torchvision_operators
from torch import nn

DECLARED = torchvision_operators.declare() if torchvision_operators.mismatch() else None

from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DModel  # noqa: E402

from vix_kernels.integrations import diffusers as vix  # noqa: E402


def replace_after_creation(kind: type[nn.Module], op: str) -> None:
    create = kind.__init__

    @functools.wraps(create)
    def created(self: nn.Module, *args: Any, **options: Any) -> None:
        create(self, *args, **options)
        vix.replace_attention(self, op)

    kind.__init__ = created


if os.environ.get("VIX_REPLACE"):
    for each in (DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DModel):
        replace_after_creation(each, os.environ["VIX_REPLACE"])
