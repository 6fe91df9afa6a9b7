"""Register the models in vix_kernels.models with timm, under the names vix_NAME. integrations/timm.py imports this module.

`timm.create_model("vix_NAME", ...)` accepts the arguments of `vix_kernels.models.create_model`, and timm's arguments such as
`features_only`. No weights are published, so `pretrained=True` requires a file with weights, or a folder written by
timm.models.save_for_hf:

    timm.create_model("vix_vin_tiny", pretrained=True, pretrained_cfg_overlay=dict(file="model.safetensors"))
    timm.create_model("local-dir:FOLDER", pretrained=True)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..models import drop_path, fnet2d, layers, list_models, positions
from ..models.arguments import pair
from ..models.backbone import Backbone, grid_of
from ..models.resize import adapt_state, over_tokens
from ..models.stages import shrinking
from ..models.zoo import create_model, defaults
from ..nn.dropout import Dropout
from ..nn.module import MixerModule
from .hosts import host

with host("timm", "1.0.28"):
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module

# torch.fx cannot trace these modules, because they check shapes, choose between algorithms, or return non-tensors.
for _module in (
    MixerModule, Dropout, layers.Block, drop_path.DropPath, layers.TokenBatchNorm, fnet2d.FourierBlock,
    positions.RotaryPosition, positions.MixedRotaryPosition,
):  # fmt: skip
    register_notrace_module(_module)


def _default_cfg(name: str) -> dict[str, Any]:
    """Return the `default_cfg` that timm needs for the model `name` with default arguments."""
    arguments = defaults(name)
    img_size, channels = pair("img_size", arguments["img_size"]), arguments["in_chans"]
    if "embed_stride" in arguments:  # CvT
        first_conv, grids = "stages.0.embed", shrinking(img_size, arguments["embed_stride"])
    elif "pool_stride" in arguments:  # CCT
        strides = (side for stride in arguments["strides"] for side in (stride, arguments["pool_stride"]))
        first_conv, grids = "tokenizer.0", shrinking(img_size, tuple(strides))
    else:
        grid = grid_of(img_size, arguments["patch_size"])
        grids = [grid, *shrinking(grid, (2,) * (arguments.get("stages", 1) - 1))]
        hybrid = name.startswith(("hybrid", "fnet_2d"))
        first_conv = "stages.0.embed.0" if "stages" in arguments else "patch_embed.0" if hybrid else "patch_embed.proj"
    return dict(
        num_classes=arguments["num_classes"], input_size=(channels, *img_size), fixed_input_size=True, pool_size=[*grids][-1],
        first_conv=first_conv, classifier="head", mean=(0.5,) * channels, std=(0.5,) * channels, interpolation="bicubic",
        crop_pct=1.0,
    )  # fmt: skip


default_cfgs = generate_default_cfgs({f"vix_{name}": _default_cfg(name) for name in list_models()})


def _entry(name: str) -> Any:
    """Return the function that timm calls to build vix_NAME."""
    preset = defaults(name)
    levels = len(preset["embed_stride"]) if "embed_stride" in preset else preset.get("stages", preset["depth"])

    def create(attn_drop_rate: float = 0.0, **arguments: Any) -> Backbone:
        if attn_drop_rate:
            reason = "there are no attention weights to drop"
            raise NotImplementedError(f"attn_drop_rate: expected 0 ({reason}), got {attn_drop_rate}")
        return create_model(name, **arguments)

    def adapt(state: Mapping[str, Tensor], model: Backbone, has_classes: bool) -> dict[str, Tensor]:
        """Return the weights `state`, adapted to `model`. timm calls this function before it loads the weights.

        Also set num_classes in model.pretrained_cfg to the number of classes in the weights. timm uses this entry to decide
        whether to keep the head. `has_classes` states whether num_classes was passed or features_only is set.

        Raises:
            ValueError: the image size of the weights is neither input_size in model.pretrained_cfg nor the image size of
                `model`, or `has_classes` is False and the weights have a different number of classes than `model`.
        """
        state, cfg = dict(state.get("model", state)), model.pretrained_cfg
        if "head.weight" in state:
            cfg["num_classes"] = len(state["head.weight"])
            if not has_classes and cfg["num_classes"] != model.num_classes:
                raise ValueError(f"num_classes: expected {cfg['num_classes']} (as in the file) or another number, got None")
        arguments = model.config["arguments"] | {"img_size": cfg["input_size"][1:]}
        source, found = create_model(name, device="meta", **arguments), model.state_dict()
        described = source.state_dict()
        if different := [key for key in over_tokens(state) if state[key].shape != described[key].shape]:
            if any(state[key].shape != found[key].shape for key in different):
                shape = f"{different[0]} has the shape {tuple(state[different[0]].shape)} in the file"
                raise ValueError(
                    f"pretrained_cfg_overlay: expected the input_size of the weights, got {cfg['input_size']}, but {shape}"
                )
            source = model  # the weights have the image size of `model`
        return adapt_state(state, source, model)

    def build(pretrained: bool = False, **arguments: Any) -> nn.Module:
        features = arguments.get("features_only", False)
        depth = levels if "embed_stride" in preset or "stages" in preset else arguments.get("depth", levels)
        return build_model_with_cfg(
            create, f"vix_{name}", pretrained, feature_cfg=dict(out_indices=min(3, depth), feature_cls="getter"),
            pretrained_filter_fn=partial(adapt, has_classes=features or "num_classes" in arguments), **arguments,
        )  # fmt: skip

    build.__name__ = build.__qualname__ = f"vix_{name}"
    build.__doc__ = f"Build the model {name!r} from vix_kernels.models. Accepts the same arguments as create_model."
    return build


for _name in list_models():
    setattr(sys.modules[__name__], f"vix_{_name}", register_model(_entry(_name)))
