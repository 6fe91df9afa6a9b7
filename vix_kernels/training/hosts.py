"""Image classifiers from timm and transformers, with the interface of this library's models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vix_kernels.integrations.swap import replace_attention
from vix_kernels.models import create_model
from vix_kernels.models.arguments import pair
from vix_kernels.models.backbone import Backbone
from vix_kernels.models.state import mismatch

from .config import UserError


class HostModel(nn.Module):
    """A classifier from timm or transformers that maps images (batch, in_chans, *img_size) to logits.

    Attributes:
        host: the timm or transformers model.
        in_chans, img_size, num_classes: the shape of the inputs and outputs. The argument `shape` (channels, height,
            width) overrides in_chans and img_size. Use it for models that accept any image size.
        config: a dict whose entry "data", if any, describes the training images, as explained in `save_model`.
    """

    num_prefix_tokens = 0

    def __init__(self, host: nn.Module, data: dict[str, Any] | None = None, shape: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.host = host
        self.in_chans, self.img_size, self.num_classes = image_shape(host)
        if shape is not None:
            self.in_chans, self.img_size = shape[0], tuple(shape[1:])
        self.config: dict[str, Any] = {"data": data} if data else {}

    def forward(self, x: Tensor) -> Tensor:
        out = self.host(x)
        return out if isinstance(out, Tensor) else out.logits

    def get_classifier(self) -> nn.Module:
        head = self.host.get_classifier() if hasattr(self.host, "get_classifier") else self.host.classifier
        return nn.ModuleList(head) if isinstance(head, tuple) else head  # distilled models have two heads

    def no_weight_decay(self) -> set[str]:
        exempt = self.host.no_weight_decay() if hasattr(self.host, "no_weight_decay") else ()
        return {f"host.{name}" for name in exempt}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.host.set_grad_checkpointing(enable)


def image_shape(host: nn.Module) -> tuple[int, tuple[int, int], int]:
    """Return the number of channels, the image size and the number of classes of a classifier.

    Raises:
        UserError: the model does not specify the image size or the number of classes.
    """
    config = getattr(host, "config", None)
    if hasattr(config, "image_size") and hasattr(config, "num_labels"):  # transformers
        return getattr(config, "num_channels", 3), pair("image_size", config.image_size), config.num_labels
    cfg = getattr(host, "pretrained_cfg", None) or {}
    size = getattr(getattr(host, "patch_embed", None), "img_size", None) or cfg.get("input_size", (3, None, None))[1:]
    classes = getattr(host, "num_classes", None)
    if not classes or None in size:
        raise UserError(f"--model: expected a timm or transformers image classifier, got {type(host).__name__}")
    first = next((each for each in host.modules() if isinstance(each, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels, tuple(size), classes


def create_host(spec: str, checkpoint: str | None, pretrained: bool, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Create the model that `spec` names: "timm:NAME", or "hf:FOLDER" for a Hugging Face model saved in FOLDER.

    Args:
        checkpoint: a .safetensors or .pth file with the weights of a timm model. If `arguments` contains num_classes, the head
            in the file must have that many classes.
        pretrained: whether to download the weights of a timm model.
        arguments: arguments of timm.create_model.

    Returns:
        The model, and a dict with the "classes", "mean" and "std" of the training images. Unknown values are omitted.

    Raises:
        UserError: the model is unknown, its weights cannot be loaded, or `checkpoint` or `pretrained` is set for "hf:FOLDER".
    """
    library, _, name = spec.partition(":")
    if library == "hf":
        if checkpoint is not None:
            raise UserError(f"--checkpoint: expected none with --model hf:FOLDER, which has weights, got {checkpoint!r}")
        if pretrained:
            raise UserError(f"--pretrained: expected --model timm:NAME, got {spec}")
        return _transformers(name)
    if library != "timm" or not name:
        raise UserError(f"--model: expected timm:NAME or hf:FOLDER, got {spec!r}")
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--model: {spec} needs timm: pip install timm ({error})") from error
    if not timm.is_model(name):
        close = timm.list_models(f"*{name}*")[:3]
        raise UserError(
            f"--model: expected the name of a timm model, got {name!r}{'; similar: ' if close else ''}{', '.join(close)}"
        )
    state = None if checkpoint is None else read_weights(checkpoint)
    try:
        if state is not None and "num_classes" not in arguments:
            head = timm.get_pretrained_cfg(name.partition(".")[0]).classifier
            if isinstance(head, str) and f"{head}.weight" in state:
                arguments["num_classes"] = len(state[f"{head}.weight"])
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:
        raise UserError(f"--model: cannot create {spec}: {' '.join(str(error).split())}") from error
    if state is not None:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            found = mismatch(model.state_dict(), state, lambda key: False, most=3) or error
            raise UserError(f"--checkpoint: the weights in {checkpoint} do not fit {spec}; {found}") from error
    cfg = model.pretrained_cfg
    known = pretrained or checkpoint is not None
    return model, {name: list(cfg[name]) for name in ("mean", "std") if known and name in cfg}


def accepts_size(name: str) -> bool:
    """Return whether the timm model `name` has a `patch_embed` with an `img_size`, as most vision transformers do.

    Such models accept the argument `img_size`. If timm cannot create the model, return False.
    """
    try:
        import timm

        with torch.device("meta"):
            return hasattr(getattr(timm.create_model(name), "patch_embed", None), "img_size")
    except (ImportError, RuntimeError, ValueError):  # create_host reports the reason
        return False


def _transformers(folder: str) -> tuple[nn.Module, dict[str, Any]]:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageClassification

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"--model: expected hf:FOLDER with a model that transformers saved, got {folder!r}")
    try:
        model = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model: cannot load {folder}: {str(error).splitlines()[0]}") from error
    labels = [model.config.id2label[label] for label in sorted(model.config.id2label)]
    classes = {} if labels == [f"LABEL_{n}" for n in range(len(labels))] else {"classes": labels}  # these are the default names
    return model, classes | _normalization(Path(folder) / "preprocessor_config.json", image_shape(model)[0])


def _normalization(path: Path, channels: int) -> dict[str, list[float]]:
    """Return the "mean" and "std" in the preprocessor_config.json at `path`, or an empty dict if there are none."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"--model: {path}: expected JSON, as transformers saves it, got {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--model: {path}: expected a mapping, as transformers saves it, got {settings!r}")
    if settings.get("do_normalize") is False:
        return {"mean": [0.0] * channels, "std": [1.0] * channels}
    found = {name: settings.get(f"image_{name}") for name in ("mean", "std")}
    if found == {"mean": None, "std": None}:
        return {}
    for name, values in found.items():
        if isinstance(values, int | float):  # for all channels
            found[name] = values = [values] * channels
        if not isinstance(values, list) or len(values) != channels or not all(isinstance(x, int | float) for x in values):
            raise UserError(f"--model: {path}: image_{name}: expected a number for each of {channels} channels, got {values!r}")
    return found


def read_weights(path: str | Path, flag: str = "--checkpoint") -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or .pth file. No code in the file is executed.

    Raises:
        UserError: the file is missing or damaged, or does not contain a state dict.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{flag}: expected a file with weights, got {path}, which {what}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors raise different errors for a damaged file
        raise UserError(f"{flag}: {path} is damaged or not a file with weights ({type(error).__name__})") from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict) and state[key]:
            state = state[key]
            break
    if not isinstance(state, dict) or not any(isinstance(x, Tensor) for x in state.values()):
        raise UserError(f"{flag}: expected a state dict in {path}, got {type(state).__name__}")
    return {name.removeprefix("module."): x for name, x in state.items() if isinstance(x, Tensor)}


def make_model(
    config: Mapping[str, Any], arguments: dict[str, Any], shape: tuple[int, int, int] | None = None, pretrained: bool = False
) -> nn.Module:
    """Create the model of a run with random weights. If `pretrained` is set, a timm model has pretrained weights instead.

    Args:
        config: the settings of the run. Only `model` is read, and for a timm model also `attention` and `backend`.
        arguments: the arguments of the model.
        shape: channels, height and width of the images of the run.
    """
    name, attention = config["model"], config.get("attention")
    if not name.startswith("timm:"):
        return create_model(name, **arguments)
    host, _ = create_host(name, None, pretrained, **arguments)
    host.vix_arguments = {key: list(x) if isinstance(x, tuple) else x for key, x in arguments.items()}  # to save the model
    if attention is not None:
        try:
            replace_attention(host, attention, retrain=True, backend=config.get("backend", "auto"))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"--attention: cannot use {attention!r}: {error}") from error
    return HostModel(host, None, shape)


def classifier(model: nn.Module, data: dict[str, Any] | None) -> nn.Module:
    """Return `model`, wrapped in a HostModel if it is not a model of this library."""
    return model if isinstance(model, Backbone) else HostModel(model, data)
