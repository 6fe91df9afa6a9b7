"""Save models to folders, and load them. A folder contains model.safetensors, config.json and a model card, README.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from os import PathLike
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor, nn

from vix_kernels import __version__
from vix_kernels.commands import write_atomically

from .resize import adapt_state, check_attention, is_head
from .state import load_state
from .zoo import create_model, takes

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Save `model`, created by `create_model` or `from_original`, to `folder`. Each file is written atomically.

    `model.config["data"]`, if present, describes the training images: "classes" are the names of the classes, and "mean" and
    "std" are the statistics of each channel, for pixel values in [0, 1]. `vix predict` reads this entry. An existing model card
    is not overwritten, because users fill in its blanks.

    Raises:
        TypeError: `model` is not from `create_model` or `from_original`, or it was pruned.
        ValueError: the attention was replaced. `vix_kernels.linearize.save_linearized` saves such a model.
    """
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "config", None), dict):
        raise TypeError(
            f"model: expected a model from create_model or from_original that is not pruned, got {type(model).__name__}"
        )
    if "name" in model.config:
        check_attention(model)
    folder = folder_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, state_writer(folder / WEIGHTS, weights))
    config = json.dumps(model.config | {"vix_kernels": __version__}, indent=2) + "\n"
    write_atomically(folder / CONFIG, lambda path: path.write_text(config))
    if not (folder / CARD).exists():
        write_atomically(folder / CARD, lambda path: path.write_text(model_card(model)))


def load_model(folder: str | Path, **overrides: Any) -> nn.Module:
    """Load the model that `save_model` wrote to `folder`, and set it to evaluation mode.

    Args:
        overrides: arguments of `create_model` to change. A different img_size resamples position embeddings, token projections
            and attention biases. For a different in_chans, the input channels of the first convolution's weight are summed
            or repeated. A different num_classes creates a new head. global_pool="seq" creates new pooling weights if the saved
            model has none.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        TypeError: `folder` is not a path, or an override is unknown.
        ValueError: a file is damaged, an override is invalid, or the weights do not match the model. In the last case, the
            message lists all entries that are missing or unexpected, or that have the wrong shape.
    """
    folder = folder_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected a folder written by save_model, got {str(folder)!r}, which is not a folder")
    config = _read_config(folder / CONFIG)
    state = read_state(folder / WEIGHTS)
    arguments = config["arguments"]
    if "original" in config:
        if overrides:
            raise ValueError(f"overrides: expected none for an original, got {', '.join(overrides)}")
        from .originals import from_original

        return from_original(config["original"], arguments, state).eval()
    if unknown := sorted(arguments.keys() - takes(config["name"], arguments.get("mixer"))):
        raise ValueError(f"{folder / CONFIG}: expected arguments of {config['name']!r}, got {', '.join(unknown)}")
    try:
        model = create_model(config["name"], **arguments | overrides)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise ValueError(f"folder: expected a model that fits in memory, got {arguments | overrides} in {folder}") from None
    if data := _still_true(config.get("data"), overrides):
        model.config["data"] = data
    if overrides:
        with torch.device("meta"):
            source = create_model(config["name"], **arguments)
        state = adapt_state(state, source, model)
    load_state(
        model, state, f"{config['name']} as described in {folder / CONFIG}", lambda key: is_head(key) and bool(overrides)
    )
    return model.eval()


def model_card(model: nn.Module) -> str:
    """Return a model card. Only the fields that can be derived from the model are filled in."""
    config = model.config
    name = config.get("name") or config["original"]
    arguments = ", ".join(f"{key}={value!r}" for key, value in config["arguments"].items())
    return Template((files(__package__) / "card.md").read_text()).substitute(
        name=name,
        made_by=f"create_model({name!r}{', ' if arguments else ''}{arguments})"
        if "name" in config
        else f"from_original({name!r})",
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        version=__version__,
    )


def state_writer(path: Path, tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    """Return a function for `write_atomically` that writes `tensors`, which must be contiguous, to a .safetensors file.

    If the file cannot be written, the function raises an OSError that names `path`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # also raised if the disk is full
            raise OSError(f"cannot write {path}: {error}") from error

    return write


def folder_path(folder: Any) -> Path:
    if not isinstance(folder, str | PathLike):
        raise TypeError(f"folder: expected a path, got {folder!r}")
    return Path(folder)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, as save_model writes it: {error}") from error
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("original", config.get("name")), str)
        or not isinstance(config.get("arguments"), dict)
        or not isinstance(config.get("data", {}), dict)
    ):
        raise ValueError(f"{path}: expected the name and the arguments of a model, as save_model writes them")
    return config


def read_state(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # Earlier versions stored in the metadata how often a Performer had redrawn its random features.
            extra = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key.endswith("_extra_state")}
            return {key: file.get_tensor(key) for key in file.keys()} | extra
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _still_true(data: dict[str, Any] | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data`, the description of the training images, without the entries that `overrides` invalidate."""
    invalidated = {"num_classes": {"classes"}, "in_chans": {"mean", "std"}}
    changed = set().union(*(invalidated.get(name, set()) for name in overrides))
    return {name: value for name, value in (data or {}).items() if name not in changed}


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and the state dict of a model that `save_model` wrote. Raises ValueError if a file is damaged."""
    return _read_config(folder / CONFIG), read_state(folder / WEIGHTS)
