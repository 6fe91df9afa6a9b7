"""Save and load models in which softmax attention was replaced.

The models are from this library, timm or transformers, or contain nn.MultiheadAttention. Each model is saved to a folder, as
model.safetensors and linearized.json. For each replaced layer, linearized.json lists the attention method and its options. The
file contains names of attention methods, models, activations and normalization layers. These names are only looked up in
registries of this library, timm and transformers, and are never imported.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, backends
from ..commands import write_together
from ..models import create_model
from ..models.pretrained import WEIGHTS, folder_path, read_state, state_writer
from ..models.state import load_state
from ..nn.core import CORES, Core, Mounted
from ..nn.module import AttentionModule
from .drop_in import OPS, DropIn
from .hosts import Snapshot, check_model
from .swap import holders, host_of, replace_attention

CONFIG = "linearized.json"
PROGRESS = "linearize.pt"  # the checkpoint of `linearize`, which `vix linearize` removes after it saves the model
# Arguments of timm.create_model that linearized.json may contain
TIMM_ARGUMENTS = frozenset(
    """
    act_layer attn_gated attn_only_layer_scale attn_pool_mlp_ratio attn_pool_num_heads attn_type base_dims
    class_token depth distilled dynamic_img_pad dynamic_img_size embed_dim embed_norm_layer embed_proj_type
    enable_patch_interpolator fc_norm final_norm global_pool heads img_size in_chans init_values
    input_norm_layer mlp_ratio no_embed_class norm_layer num_classes num_heads num_kv_heads num_reg_tokens
    patch_size patchify_channels_last pool_include_prefix pos_embed pos_embed_align_corners pos_embed_antialias
    pos_embed_ar_preserving pos_embed_grid_size pos_embed_interp_mode pos_embed_use_grid_sample pre_norm
    proj_bias qk_norm qkv_bias qkv_fused ref_feat_shape reg_tokens rope_grid_indexing rope_grid_offset
    rope_mrope_section rope_ref_feat_shape rope_rotate_half rope_temperature rope_type scale_attn_inner
    scale_attn_inner_norm scale_attn_norm scale_mlp scale_mlp_norm stem_type stride swiglu_align_to swiglu_mlp
    use_abs_pos_emb use_fc_norm use_key_only_attn_mask use_post_norm use_post_transformer_norm
    use_pre_transformer_norm use_rot_pos_emb
    """.split()
)
# Module attributes that affect the output, but not the parameters or the child modules
SETTINGS = """
    activation base batch_first global_pool grid_indexing grid_offset grid_type head_dim linear_bands max_period
    max_res min_period norm_first normalize_coords num_attention_heads num_heads num_prefix_tokens
    pool_include_prefix pool_type pos_embed_align_corners pos_embed_antialias pos_embed_ar_preserving
    pos_embed_interp_mode pos_embed_type pos_embed_use_grid_sample ref_feat_shape rotate_half scale scaling
    temperature
""".split()


def save_linearized(
    model: nn.Module, folder: str | Path, *, data: dict[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Save a model with replaced attention to a folder, for example after `linearize`.

    model.safetensors and linearized.json are written completely before either appears in the folder. If `model` is from timm,
    transformers or this library and `load_linearized` cannot create it, a warning states the reason.

    Args:
        model: a model from this library, timm or transformers, or one with nn.MultiheadAttention.
        folder: the folder to write.
        data: a dict that describes the training images. "classes" lists the class names. "mean" and "std" list the mean and the
            standard deviation of each channel, for pixel values in [0, 1]. Defaults to model.config["data"] for models that
            `vix train` trained.
        overwrite: whether to replace a model that an earlier call saved in the folder.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `model` has no replaced attention, its state dict contains an entry that is not a tensor, or `folder` is a
            file or contains a model. With overwrite=True, the folder may contain a model that this function saved.
    """
    check_model(model)
    config = _described_model(model)
    if not config["layers"]:
        raise ValueError("model: expected a model with replaced attention, got one without")
    folder = check_folder(folder, overwrite=overwrite)
    if data is None and isinstance(getattr(model, "config", None), dict):
        data = model.config.get("data")
    if not isinstance(data, dict | None):
        raise TypeError(f"data: expected a dict, got {data!r}")
    text = json.dumps(config | ({"data": data} if data else {}), indent=2) + "\n"
    tensors, seen = {}, set()
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"model: expected a state dict of tensors, got a {type(value).__name__} for {name}")
        shared = value.untyped_storage().data_ptr() in seen  # safetensors refuses tensors that share memory
        seen.add(value.untyped_storage().data_ptr())
        tensors[name] = value.clone().contiguous() if shared else value.contiguous()
    if reason := reason_against_creating(model):
        warnings.warn(
            f"{folder}: load_linearized needs a new model as `model`, as it cannot create one: {reason}", stacklevel=2
        )

    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS
    write_together({folder / CONFIG: lambda path: path.write_text(text), weights: state_writer(weights, tensors)})


def check_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Return `folder` as a Path, after checking that `save_linearized` may write to it.

    The folder may contain a checkpoint of `linearize`, or part of a model from an interrupted call to `save_linearized`.

    Raises:
        TypeError: `folder` is not a path.
        ValueError: `folder` is a file or contains a model. With overwrite=True, the folder may contain a model that
            `save_linearized` saved.
    """
    folder = folder_path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: expected a folder, got {folder}, which is a file")
    found = {name for name in (CONFIG, PROGRESS, WEIGHTS, "config.json") if (folder / name).exists()}
    if CONFIG not in found and ("config.json" in found or WEIGHTS in found and PROGRESS not in found):
        raise ValueError(f"folder: expected a new folder, got {folder}, which contains another model")
    if {CONFIG, WEIGHTS} <= found and not overwrite:
        raise ValueError(f"folder: expected a new folder, or overwrite=True, got {folder}, which contains a model")
    return folder


def reason_against_creating(model: nn.Module) -> str:
    """Return why `load_linearized` cannot create `model` from a saved folder, or an empty string if it can.

    This function can be called before or after the attention of `model` is replaced. For models that are not from this library,
    timm or transformers, the result is an empty string, although `load_linearized` cannot create them.
    """
    if host_of(model) == "torch.nn":
        return ""
    config = _described_model(model)
    state = {name: value.to("meta") for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        with torch.device("meta"):
            created = _create_host(json.loads(json.dumps(config["host"])), Path(CONFIG))
        _restore(created, config, state, Path(CONFIG), cast=True)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def load_linearized(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Return the model that `save_linearized` saved, in evaluation mode.

    Args:
        folder: the folder that `save_linearized` wrote.
        model: a new model with the architecture of the saved model and with softmax attention. It is changed in place. If
            None, a model is created. Only models from this library, timm and transformers can be created. A timm model can only
            be created if the arguments of timm.create_model were None, numbers, booleans, strings, or lists or tuples of these.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        TypeError: `model` is not an nn.Module.
        ValueError: a file is damaged or names an unknown attention method or model, the model cannot be created, or
            linearized.json does not match `model` or the weights. `model` is then unchanged.
    """
    if model is not None:
        check_model(model)
        weights = (x for x in model.state_dict().values() if isinstance(x, Tensor))
        if not torch.is_inference_mode_enabled() and any(x.is_inference() for x in weights):
            raise ValueError("model: expected a model created outside torch.inference_mode, got one created inside")
    folder = folder_path(folder)
    config = read_config(folder)
    state = read_state(folder / WEIGHTS)
    created = _create_host(config["host"], folder / CONFIG) if model is None else model
    if any(holder.core.name != "softmax" for holder in holders(created).values()):
        raise ValueError("model: expected a new model with softmax attention, got one with replaced attention")
    snapshot = Snapshot(created)
    try:
        _restore(created, config, state, folder / CONFIG, cast=model is None)
    except BaseException as error:
        snapshot.restore()
        if model is None and isinstance(error, ValueError):
            raise ValueError(f"{error}; pass a new model as `model` if its architecture is not recorded") from error
        raise
    if isinstance(getattr(created, "config", None), dict) and "data" in config:
        created.config["data"] = config["data"]
    return created.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Check and return the contents of linearized.json in `folder`. Lists in options become tuples."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected a folder written by save_linearized, got {folder}, which has no {CONFIG}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON written by save_linearized, got {error}") from error
    layers = config.get("layers") if isinstance(config, dict) else None
    if not isinstance(layers, dict) or not isinstance(config.get("host"), dict) or not isinstance(config.get("data", {}), dict):
        raise ValueError(f"{path}: expected a host and layers that are mappings, as save_linearized writes them")
    for name, layer in layers.items():
        if not isinstance(layer, dict) or not isinstance(layer.get("options"), dict):
            raise ValueError(f"{path}: layers: expected an op and options for {name}, got {layer!r}")
        if layer.get("op") not in OPS:
            raise ValueError(f"{path}: layers: expected one of {', '.join(map(repr, OPS))} for {name}, got {layer.get('op')!r}")
        layer["options"] = options_of(layer)
    return config


def _described_model(model: nn.Module) -> dict[str, Any]:
    """Return the contents of linearized.json for `model`, without the entry "data"."""
    layers = {name: described(holder) for name, holder in holders(model).items() if holder.core.name != "softmax"}
    return {"vix_kernels": __version__, "host": _describe_host(model), "structure": _structure(model), "layers": layers}


def _restore(model: nn.Module, config: dict[str, Any], state: Mapping[str, Tensor], path: Path, cast: bool) -> None:
    """Replace the attention of a new model as `config` specifies, and load the weights in `state`.

    If `cast` is True, cast the parameters and buffers of the model to the dtypes in `state` before loading.
    """
    for name, layer in config["layers"].items():
        _put(model, name, layer, path)
    if (saved := config.get("structure")) != _structure(model) and saved != _earlier_structure(model):
        raise ValueError(f"model: expected the architecture that {path} describes, got another one")
    if cast:
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name in state:
                value.data = value.data.to(state[name].dtype)
    load_state(model, state, f"the model described in {path}", lambda key: False)


def options_of(layer: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a layer from a JSON file. Lists become tuples, because JSON has no tuples."""
    return {key: tuple(x) if isinstance(x, list) else x for key, x in layer["options"].items()}


def described(holder: Mounted) -> dict[str, Any]:
    """Return a JSON-serializable dict that describes the attention in `holder`.

    The keys are "op", "options" and "backend", and "dropout" if dropout is ignored.
    """
    core: Core = holder.core
    options = {each.name: getattr(core, each.name) for each in fields(core)}
    if isinstance(holder, DropIn) and holder.grid is not None:  # landmarks or agents are placed on the grid of each call
        options = {name: value for name, value in options.items() if name not in ("landmarks", "grid_size")}
    dropout = {"dropout": "ignore"} if isinstance(holder, DropIn) and holder.dropout == "ignore" else {}
    return {"op": core.name, "options": options, "backend": holder.backend} | dropout


def _put(model: nn.Module, name: str, layer: dict[str, Any], path: Path) -> None:
    """Replace the attention of one layer, and cast the new parameters to float32, the dtype in which they are trained."""
    op, options, backend = layer["op"], layer["options"], layer.get("backend", "auto")
    try:
        backends.check(backend)
        if host_of(model) == "vix_kernels":
            from .zoo import put

            put(holders(model)[name], CORES[op](**options), backend)
        else:
            dropout = layer.get("dropout", "refuse")
            replace_attention(model, op, layers=[name], retrain=True, backend=backend, dropout=dropout, **options)
        holder = holders(model)[name]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: layers: cannot replace {name!r}: {error}") from error
    holder.widen()


def _structure(model: nn.Module) -> str:
    """Return a digest of the names, classes and settings of the modules in `model`.

    The digest ignores child modules named `vix`, dropout modules and nn.Identity modules. timm uses nn.Identity for dropout
    with rate 0.
    """
    lines = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "vix" in name.split(".") or "Drop" in kind or kind == "Identity":
            continue
        settings = [_plain(getattr(module, each, None)) for each in SETTINGS]
        lines.append(f"{name} {kind} {settings} {'' if _is_attention(module) else module.extra_repr()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _earlier_structure(model: nn.Module) -> str:
    """Return the digest that earlier versions saved. It depends on fewer settings than the digest of `_structure`."""
    lines = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "vix" in name.split(".") or "Drop" in kind:
            continue
        sizes = [getattr(module, each, None) for each in ("num_heads", "num_attention_heads", "head_dim")]
        lines.append(f"{name} {kind} {sizes if _is_attention(module) else module.extra_repr()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, AttentionModule) or isinstance(getattr(module, "vix", None), DropIn)


def _plain(value: Any) -> Any:
    """Convert a setting to a value whose repr is the same in every process.

    Tensors, modules and other objects without a name become None.
    """
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, int | float):
        return float(value)
    return value if isinstance(value, str) else getattr(value, "__name__", None)


def _describe_host(model: nn.Module) -> dict[str, Any]:
    library = host_of(model)
    host: dict[str, Any] = {"library": library, "class": type(model).__name__}
    if library == "vix_kernels":
        config = getattr(model, "config", {})  # pruned models have none
        return host | {key: config[key] for key in ("name", "arguments") if key in config}
    if library == "transformers":
        return host | {"config": model.config.to_diff_dict()}
    if library == "timm":
        arguments = dict(getattr(model, "_model_args", {}))  # recent versions of timm record the arguments of create_model
        names = ("num_classes", "global_pool")
        arguments |= {name: getattr(model, name) for name in names if isinstance(getattr(model, name, None), (int, str))}
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        arguments |= {"img_size": size} if size else {}
        arguments |= getattr(model, "vix_arguments", {})  # set for models that `vix train` created
        return host | {
            "name": getattr(model, "pretrained_cfg", {}).get("architecture"),
            "arguments": {name: value for name, x in arguments.items() if _is_argument(name, value := _number(x))},
        }
    return host


def _number(value: Any) -> Any:
    """Convert a NumPy number or a zero-dimensional tensor to a Python number. Return other values unchanged."""
    return value.item() if getattr(value, "shape", None) == () else value


def _is_argument(name: str, value: Any) -> bool:
    """Return whether linearized.json may set the argument `name` of timm.create_model to `value`."""
    values = value if isinstance(value, list | tuple) else [value]
    return name in TIMM_ARGUMENTS and all(isinstance(each, str | int | float | None) for each in values)


def _create_host(host: dict[str, Any], path: Path) -> nn.Module:
    """Return a new model as described by `host`, the entry "host" of the file at `path`."""
    library, name, arguments = host.get("library"), host.get("name"), host.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError(f"{path}: host: arguments: expected a mapping, got {arguments!r}")
    if library == "vix_kernels":
        create = partial(create_model, name)
    elif library == "timm":
        import timm

        if not isinstance(name, str) or not timm.is_model(name):
            raise ValueError(f"{path}: host: name: expected the name of a timm model, got {name!r}")
        for key, value in arguments.items():
            if not _is_argument(key, value):
                raise ValueError(f"{path}: host: arguments: expected those that save_linearized writes, got {key}={value!r}")
        create = partial(timm.create_model, name, pretrained=False)
    elif library == "transformers":
        from .transformers import create_host

        create, arguments = partial(create_host, host.get("class"), host.get("config")), {}
    else:
        raise ValueError(
            f"model: expected a new {host.get('class')}, because the library of the model in {path} is {library!r}, got None"
        )
    try:
        return create(**arguments)
    except Exception as error:  # the libraries raise different errors for invalid arguments
        listed = ", ".join((str(name or library), *(f"{key}={value!r}" for key, value in arguments.items())))
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path}: cannot create the model that it describes ({listed}): {cause}") from error
