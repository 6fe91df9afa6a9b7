"""Register the models in vix_kernels.models with timm, under the names vix_NAME. integrations/timm.py imports this module."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .. import models
from .hosts import host

with host("timm", "1.0.28"):
    from timm.models import register_model


def _entry(name: str) -> Any:
    """Return the function that timm calls to build vix_NAME."""

    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm passes these for pretrained weights
            arguments.pop(key, None)
        if pretrained:
            raise RuntimeError(f"pretrained: expected False, got True: vix_{name} has no published weights")
        model = models.create_model(name, **arguments)
        model.default_cfg = model.pretrained_cfg = dict(
            architecture=f"vix_{name}", num_classes=model.num_classes, input_size=(model.in_chans, *model.img_size),
            mean=(0.5,) * model.in_chans, std=(0.5,) * model.in_chans, interpolation="bicubic", crop_pct=1.0,
            classifier="head",
        )  # fmt: skip
        return model

    build.__name__ = build.__qualname__ = f"vix_{name}"
    build.__doc__ = f"Build the model {name!r} from vix_kernels.models. Accepts the same arguments as create_model."
    return build


for _name in models.list_models():
    setattr(sys.modules[__name__], f"vix_{_name}", register_model(_entry(_name)))
