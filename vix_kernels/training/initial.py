"""Start a run from the weights of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vix_kernels.integrations import linearized
from vix_kernels.models.backbone import Backbone
from vix_kernels.models.positions import resample_tokens
from vix_kernels.models.pretrained import CONFIG, read_folder
from vix_kernels.models.resize import adapt_state, is_head
from vix_kernels.models.state import mismatch
from vix_kernels.nn.module import AttentionModule

from .checkpoint import load_checkpoint
from .config import UserError
from .hosts import HostModel, make_model, read_weights

FLAG = "--initial-checkpoint"


def load_initial(model: nn.Module, path: str, classes: Sequence[str]) -> None:
    """Load trained weights into `model`.

    Position embeddings are resampled. If the classes differ, the head of `model` keeps its weights.

    If the types of attention differ, attention layers load only the weights of their linear layers and norms. Parameters
    that occur only in the saved attention layers, such as learned features, are ignored. Parameters that occur only in the
    attention layers of `model` keep their values.

    Args:
        path: a run or a checkpoint of `vix train`, a folder written by `save_model` or `vix linearize`, or a .safetensors or
            .pth file.
        classes: the names of the classes of `model`.

    Raises:
        UserError: the file is missing or damaged, position embeddings cannot be resampled, or other weights outside the head
            do not match.
    """
    file = Path(path)
    source, state, data = _read(file)
    if isinstance(source, Backbone) and isinstance(model, Backbone):
        state = adapt_state(state, source, model)
    else:
        state = _adapted(state, model)
    same = "classes" not in data or list(data["classes"]) == list(classes)
    _load(model, state, file, keep_head=same)


def _read(file: Path) -> tuple[nn.Module | None, dict[str, Any], dict[str, Any]]:
    """Return the saved model, its state dict, and the description of its training images.

    The model is None if `file` contains only weights. Otherwise, the model may be on the meta device.
    """
    run = next((file / name for name in ("best.pt", "last.pt") if (file / name).is_file()), file)
    if run.suffix == ".pt":
        checkpoint = load_checkpoint(run, flag=FLAG)
        data = checkpoint["data"]
        source = _source(checkpoint["config"], checkpoint["model_kwargs"], data.get("shape"), file)
        return source, checkpoint["ema"] or checkpoint["model"], data
    try:
        if (file / linearized.CONFIG).is_file():
            source = linearized.load_linearized(file)
            return source, source.state_dict(), linearized.read_config(file).get("data", {})
        if (file / CONFIG).is_file():
            config, state = read_folder(file)
            return _source({"model": config.get("name", "")}, config["arguments"], None, file), state, config.get("data", {})
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise UserError(f"{FLAG}: {error}") from error
    if file.is_dir():
        names = f"best.pt, last.pt, {linearized.CONFIG} or {CONFIG}"
        raise UserError(f"{FLAG}: expected a folder with a trained model, got {file}, which has no {names}")
    return None, read_weights(file, FLAG), {}


def _source(config: dict[str, Any], arguments: dict[str, Any], shape: Any, path: Path) -> nn.Module:
    """Return a model on the meta device that has the architecture of the saved model."""
    try:
        with torch.device("meta"):
            return make_model(config, arguments, shape)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{FLAG}: cannot create the model of {path}: {error}") from error


def _adapted(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a copy of `state` with resampled position embeddings.

    If `model` is a HostModel, all names in the copy start with "host.".
    """
    expected = model.state_dict()
    if isinstance(model, HostModel) and not any(name.startswith("host.") for name in state):
        state = {f"host.{name}": value for name, value in state.items()}
    adapted = {}
    for name, value in state.items():
        if name.endswith("pos_embed") and name in expected and value.shape != expected[name].shape:
            value = _resampled(name, value, expected[name], model)
        adapted[name] = value
    return adapted


def _resampled(name: str, value: Tensor, wanted: Tensor, model: nn.Module) -> Tensor:
    """Resample the position embeddings `value` (1, tokens, dim) from a square grid to the grid of `model`.

    The embeddings of class and register tokens come first, and do not change.
    """
    host = getattr(model, "host", model)
    grid = getattr(host, "grid", None) or getattr(getattr(host, "patch_embed", None), "grid_size", None)
    prefix = wanted.shape[1] - (grid[0] * grid[1] if grid else 0)
    side = round((value.shape[1] - prefix) ** 0.5)
    if grid is None or prefix < 0 or side * side + prefix != value.shape[1]:
        raise UserError(f"{FLAG}: expected {name} of shape {tuple(wanted.shape)} or of a square grid, got {tuple(value.shape)}")
    return resample_tokens(value, 1, (side, side), tuple(grid), prefix)


def _of_attention(name: str, layers: list[str]) -> bool:
    """Return whether a state dict entry is specific to a type of attention, such as a tensor of random features.

    The result is False for linear layers and norms inside attention layers.

    Args:
        name: the name of the entry.
        layers: the names of the model's attention modules that are from this library.
    """
    keys = [name.removeprefix(f"{layer}.") for layer in layers if name.startswith(f"{layer}.")]
    return ".vix." in name or any(not key.startswith(("qkv.", "q_norm.", "k_norm.", "proj.")) for key in keys)


def _load(model: nn.Module, state: dict[str, Any], path: Path, keep_head: bool) -> None:
    expected = model.state_dict()
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    heads = {name for name, parameter in model.named_parameters() if id(parameter) in head}
    heads |= {name for name in (*expected, *state) if is_head(name)}
    layers = [name for name, module in model.named_modules() if isinstance(module, AttentionModule)]
    for name in list(state):
        if name in heads:
            fits = keep_head and name in expected and state[name].shape == expected[name].shape
        else:
            fits = name in expected or not _of_attention(name, layers)
        if not fits:
            del state[name]
    optional = heads | {name for name in expected if _of_attention(name, layers)}
    optional |= {f"{layer}.qkv.bias" for layer in layers}  # a new bias is 0, so it has no effect
    if found := mismatch(expected, state, optional.__contains__, most=3):
        raise UserError(f"{FLAG}: the weights in {path} do not fit the model; {found}")
    model.load_state_dict(state, strict=False)
