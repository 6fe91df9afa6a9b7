"""Vision Xformers (ViX) models.

For example, `create_model("hybrid_vip", img_size=64, num_classes=200)` creates a hybrid ViP.
"""

from __future__ import annotations

from .backbone import Backbone
from .cct import CCT
from .cvt import CvT
from .fnet2d import FNet2D
from .levit import LeViT
from .originals import from_original
from .pretrained import load_model, save_model
from .vit import VisionTransformer
from .zoo import create_model, list_models

__all__ = [
    "CCT",
    "Backbone",
    "CvT",
    "FNet2D",
    "LeViT",
    "VisionTransformer",
    "create_model",
    "from_original",
    "list_models",
    "load_model",
    "save_model",
]
