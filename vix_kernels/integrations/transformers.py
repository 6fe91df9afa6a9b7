"""Integration with Hugging Face transformers: attention for attn_implementation, and faster Nystromformers and FNets."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .. import backends
from ..nn.core import CORES, Mixer, Site, subscribe
from ..ops.fourier import fourier_mixing
from ..ops.nystrom import nystrom_attention
from ..ops.pooling import pooling
from ..primitives import aggregate, broadcast, landmarks, pinv, token_conv
from .drop_in import OPS, DropIn, check_trained, require_all, valid_tokens
from .hosts import Report, host, module_of, patch_each, replace_each, require_call
from .transformers_saved import CHILDREN, ENTRY, MISSING, NAMED, configs, install, is_replaced, select_children

with host("transformers", "5.17"):
    from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import bidirectional_mask_function
    from transformers.models.auto import modeling_auto
    from transformers.models.fnet import modeling_fnet
    from transformers.models.nystromformer import modeling_nystromformer

# Unsupported arguments that models may pass to their attention function
_UNSERVED = (
    "softcap", "position_bias", "s_aux", "sinks", "sliding_window", "block_indices", "indices", "cu_seq_lens_q",
    "cu_seq_lens_k", "output_attentions",
)  # fmt: skip


def register(*, retrain: bool = False, **options: Mapping[str, Any]) -> None:
    """Register "vix_nystrom", "vix_performer", "vix_linear" and "vix_agent" with transformers.

        register(nystrom=dict(num_landmarks=64))
        model.set_attn_implementation("vix_nystrom")  # or from_pretrained(..., attn_implementation="vix_nystrom")

    Padding masks are supported. Causal and windowed masks, attention dropout in training, grouped-query attention and requests
    for the attention weights raise NotImplementedError. A later call changes the options of all models that use these names.
    Omitted ops are reset to their default options. Importing this module calls this function without arguments.
    `save_pretrained` saves the attention method and its options with a model, and `from_pretrained` restores both. If the saved
    options differ from the registered options, the restored attention is registered under a separate name.

    Args:
        retrain: whether to allow "vix_performer", "vix_linear" and "vix_agent", which require a model that was, or will be,
            trained with them. If False, using one of them raises ValueError.
        options: for each op, an optional keyword argument with the op's name. Its value is a mapping of options (see DropIn).
            All layers have the same random features.
    """
    for op in options:
        if op not in OPS:
            raise TypeError(f"{op}: expected options of {', '.join(map(repr, OPS))}")
    for op in OPS:
        if op in options or not CORES[op].made("host").needs_module():
            _register(op, retrain, options.get(op, {}))
    _retrain[:] = [retrain]


_retrain: list[bool] = []  # the `retrain` argument of the latest call to `register`; empty before the first call


@subscribe
def _admit(core: type[Mixer]) -> None:
    """Register a newly added core with transformers if `register` has already been called."""
    if _retrain and core.name in OPS and not core.made("host").needs_module():
        _register(core.name, _retrain[0], {})


def _register(op: str, retrain: bool, options: Mapping[str, Any]) -> None:
    add(f"vix_{op}", DropIn(op, retrain=True, **options).without_module(), retrain)


def add(name: str, attention: DropIn, retrain: bool) -> str:
    """Register `attention` with transformers under `name`, and return the name."""
    NAMED[name] = attention, retrain
    AttentionInterface.register(name, _attention_function(attention, retrain))
    AttentionMaskInterface.register(name, padding_mask)
    return name


def _attention_function(attention: DropIn, retrain: bool) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Map query, key and value (batch, heads, tokens, head_dim) to the output (batch, tokens, heads, head_dim) and None."""
        check_trained(attention.core, retrain)
        for name in _UNSERVED:
            value_of = others.get(name)
            if value_of is not None and value_of is not False:
                raise NotImplementedError(
                    f"{name}: expected None, got {type(value_of).__name__}; {attention!r} does not support it"
                )
        # As in transformers, a mask overrides is_causal, and a module without the attribute is_causal is causal.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = causal and attention_mask is None and query.shape[2] > 1
        return attention(query, key, value, attention_mask, dropout, causal, scaling).transpose(1, 2), None

    return attend


def replace_attention(
    model: nn.Module, op: str, *, layers: Sequence[str] | None = None, retrain: bool = False, **options: Any
) -> Report:
    """Replace the attention in a transformers vision model, in place. Existing parameters keep their names and values.

        report = replace_attention(ViTModel.from_pretrained(...), "nystrom", num_landmarks=64)

    Unlike with `register`, each layer has a separate attention module, which can have parameters. The attn_implementation of
    the replaced layers becomes "vix". Other layers with the same configuration object use "sdpa". `save_pretrained` saves the
    attention of each layer with the model, and `from_pretrained` restores it. Models that are created from model.config also
    have this attention.

    Args:
        model: a PreTrainedModel whose attention is selected by attn_implementation.
        layers: names or patterns of the layers to replace, such as ["layers.1*"]. None: all.
        op, retrain, options: as in DropIn. Each layer has different random features.

    Returns:
        a report that lists the replaced layers, and states why other attention layers could not be replaced.

    Raises:
        ValueError: nothing could be replaced, or `op` needs retrain=True.
    """
    prefix_tokens, num_tokens, unsupported = count_prefix(model), count_tokens(model), _unsupported(model)

    def place(name: str, attention: DropIn) -> None:
        attention.place(prefix_tokens, None)
        attention.num_tokens = num_tokens

    report = replace_each(
        model,
        DropIn(op, retrain=retrain, **options),
        reason_against=lambda module: _reason_against(module) or unsupported.get(module, ""),
        adapt=lambda module: None,
        expected="an attention layer that attn_implementation selects",
        layers=layers,
        site_of=lambda module: Site(module.head_dim, _heads(module)),
        place=place,
    )
    select_children(model, [module_of(model, name) for name in report.replaced])
    return report


def count_prefix(model: nn.Module) -> int:
    """Return the number of class, distillation and register tokens of a vision model."""
    counts = {"cls_token": -2, "distillation_token": -2, "register_tokens": -2, "class_embedding": None}
    found = {name.rpartition(".")[2]: p for name, p in model.named_parameters()}
    return sum(1 if dim is None else found[name].shape[dim] for name, dim in counts.items() if name in found)


def count_tokens(model: nn.Module) -> int | None:
    """Return the number of tokens of a vision model at its configured image size, or None if this number is unknown.

    The number is unknown for models that merge or mask patches or use windows, because their attention layers receive fewer
    tokens.
    """
    patches = {module.num_patches for module in model.modules() if isinstance(getattr(module, "num_patches", None), int)}
    config = getattr(model, "config", None)
    changes = any(hasattr(config, name) for name in ("depths", "window_size", "mask_ratio"))
    return None if changes or len(patches) != 1 else patches.pop() + count_prefix(model)


def create_host(class_name: Any, config: Any) -> nn.Module:
    """Create a randomly initialized model from `config`.

    `class_name` and the model_type of `config` must be in the registries of transformers.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"config: expected a model_type of transformers, got {kind!r}")
    settings = CONFIG_MAPPING[kind].from_dict(_without_implementations(config))
    registries = [value for name, value in vars(modeling_auto).items() if re.fullmatch(r"MODEL\w*_MAPPING", name)]
    found = [registry[type(settings)] for registry in registries if type(settings) in registry]
    for each in found:
        for candidate in each if isinstance(each, tuple) else (each,):
            if candidate.__name__ == class_name:
                return candidate(settings)
    raise ValueError(f"class: expected a model of transformers for {kind}, got {class_name!r}")


def _without_implementations(config: Any) -> Any:
    """Return `config` without vix_attention and entries that select implementations. Such entries may name code to download."""
    if not isinstance(config, dict):
        return config
    return {
        key: _without_implementations(x) for key, x in config.items() if not key.endswith("_implementation") and key != ENTRY
    }


def _heads(module: nn.Module) -> int:
    return module.num_attention_heads if hasattr(module, "num_attention_heads") else module.num_heads


def _reason_against(module: nn.Module) -> str:
    if "ALL_ATTENTION_FUNCTIONS" not in inspect.unwrap(type(module).forward).__code__.co_names:
        return f"{type(module).__name__}, whose attention attn_implementation does not select"
    if not hasattr(module, "head_dim") or not (hasattr(module, "num_attention_heads") or hasattr(module, "num_heads")):
        return f"{type(module).__name__}, which has no attributes head_dim and num_heads"
    return "causal attention" if getattr(module, "is_causal", True) else ""


def _unsupported(model: nn.Module) -> dict[nn.Module, str]:
    """Return a dict that maps modules to reasons why they cannot be replaced, such as a causal mask that `model` creates."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
    known, causal, found = {id(each) for each in configs(model.config)}, {}, {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        causal[name] = causal.get(name.rpartition(".")[0])
        if isinstance(module, PreTrainedModel):  # some models create a causal mask for modules whose is_causal is False
            used = inspect.unwrap(type(module).forward).__code__.co_names
            is_causal = "create_causal_mask" in used and "create_bidirectional_mask" not in used
            causal[name] = config if is_causal else None  # submodules with a different configuration do not receive this mask
        if config is not None and config is causal[name]:
            found[module] = "causal attention"
        elif id(config) not in known:
            found[module] = "its configuration is a copy, which save_pretrained and set_attn_implementation do not reach"
    return found


def _attend_with_child(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, None]:
    if is_replaced(module):
        return _attention_function(module.vix, retrain=True)(module, *args, **options)
    if hasattr(module, MISSING) or not hasattr(getattr(module, "config", None), ENTRY):
        raise ValueError(
            f"config: expected a model with the layers in config.{ENTRY}, got {type(module).__name__} without them; call "
            "replace_attention, or pass attn_implementation='sdpa' to from_pretrained to load the model with softmax attention"
        )
    return sdpa_attention_forward(module, *args, **options)


def padding_mask(
    *args: Any,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> Tensor | None:
    """Return the additive mask (batch, 1, 1, tokens) for the registered attention functions, or None if there is no mask.

    The mask is additive, as in transformers' eager attention, because many models add the mask to the logits no matter
    which attn_implementation is set.
    """
    if mask_function is not bidirectional_mask_function:
        raise NotImplementedError(
            "mask_function: expected bidirectional_mask_function; causal and windowed masks are not supported"
        )
    if attention_mask is None:
        return None
    additive = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return additive.masked_fill_(~attention_mask.bool(), torch.finfo(dtype).min)[:, None, None]


def patch(model: nn.Module) -> Report:
    """Replace the attention of Nystromformers and the Fourier transform of FNets in `model`, in place.

        report = patch(NystromformerModel.from_pretrained(...))

    Parameters do not change. The replacements are faster, and compute the same outputs unless a sequence consists entirely of
    padding. For such a sequence, the attention weights of the landmarks are 0 here, but uniform in transformers. Calls with
    output_attentions=True run the original transformers implementation. Padded batches are always supported. An unpatched
    model raises an error for them if num_landmarks differs from segment_means_seq_len.

    Returns:
        a report that lists the replaced layers, and states why other layers could not be replaced.

    Raises:
        ValueError: nothing could be replaced.
    """

    def reason_against(module: nn.Module) -> str:
        return "it multiplies by DFT matrices (use_tpu_fourier_optimizations)" if uses_dft_matrices(module) else ""

    return patch_each(
        model,
        {
            modeling_nystromformer.NystromformerSelfAttention: NystromformerSelfAttention,
            modeling_fnet.FNetBasicFourierTransform: FNetBasicFourierTransform,
        },
        attention="Nystromformer and FNet",
        expected="a Nystromformer or an FNet of transformers",
        reason_against=reason_against,
    )


def nystromformer_attention(
    module: modeling_nystromformer.NystromformerSelfAttention,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    """Forward method of NystromformerSelfAttention that does not store attention matrices of size tokens x landmarks.

    As in transformers, padding is masked only in the softmax over tokens, and init_option "original" divides the initial
    iterate of the pseudo-inverse by the largest column sum in the batch.

    Args:
        hidden_states: (batch, tokens, channels).
        attention_mask: additive mask (batch, 1, 1 or tokens, tokens), with the same row for all queries. It is 0 for valid
            tokens, and the lowest value of its dtype for padded tokens.
        output_attentions: whether to also return the attention weights. If True, the forward method of transformers runs.

    Returns:
        a tuple of the output (batch, tokens, channels), and the attention weights if requested.
    """
    if output_attentions:
        host = modeling_nystromformer.NystromformerSelfAttention
        if attention_mask is not None and module.num_landmarks != module.seq_len:
            # transformers adds the mask to logits with a row per landmark, which fails if the mask has a row per query.
            attention_mask = _one_row(attention_mask)
        return host.forward(module, hidden_states, attention_mask, output_attentions)
    linears = module.query, module.key, module.value
    q, k, v = (rearrange(linear(hidden_states), "b n (h d) -> b h n d", h=module.num_attention_heads) for linear in linears)
    if module.num_landmarks == module.seq_len:  # in this case, which is the default, transformers computes softmax attention
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        if module.conv_kernel_size is not None:
            out = out + module.conv(v)
    else:
        out = _through_landmarks(module, q, k, v, attention_mask)
    return (rearrange(out, "b h n d -> b n (h d)"),)


def _through_landmarks(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
    if q.shape[2] != module.seq_len:
        raise ValueError(f"hidden_states: expected segment_means_seq_len = {module.seq_len} tokens, got {q.shape[2]}")
    weight = None if module.conv_kernel_size is None else module.conv.weight
    if attention_mask is None:
        return nystrom_attention(
            q, k, v, num_landmarks=module.num_landmarks, pinv_init=module.init_option, conv_weight=weight
        )  # fmt: skip
    valid = valid_tokens(_one_row(attention_mask)[:, 0, 0]).expand(k.shape[0], -1)
    pool = pooling("num_landmarks", module.num_landmarks, None, 0, q.shape[2])
    options = dict(scale=q.shape[3] ** -0.5, backend=backends.resolve("auto", q, q.shape[3]))
    q_marks, k_marks, _, _ = landmarks(q, k, **pool, backend=options["backend"])
    values, _ = aggregate(q_marks, k, v, mask=valid, **options)
    out = broadcast(q, k_marks, pinv(q_marks, k_marks, values, init=module.init_option, **options), **options)
    return out if weight is None else out + token_conv(v, weight, backend=options["backend"])


def _one_row(attention_mask: Tensor) -> Tensor:
    """Return the first row of a mask (batch, heads or 1, queries or 1, tokens), as a tensor (batch, 1, 1, tokens).

    Check that all heads and queries have the same row.
    """
    row = attention_mask[:, :1, :1]
    require_all(attention_mask == row, "attention_mask: expected the same row for all heads and queries")
    return row


def fnet_transform(module: modeling_fnet.FNetBasicFourierTransform, hidden_states: Tensor) -> tuple[Tensor]:
    """Compute the output of FNetBasicFourierTransform with `fourier_mixing`.

    hidden_states and the only entry of the returned tuple are (batch, tokens, channels).
    """
    return (fourier_mixing(hidden_states),)


class NystromformerSelfAttention(modeling_nystromformer.NystromformerSelfAttention):
    forward = nystromformer_attention


class FNetBasicFourierTransform(modeling_fnet.FNetBasicFourierTransform):
    forward = fnet_transform


require_call("transformers", NystromformerSelfAttention, modeling_nystromformer.NystromformerSelfAttention)
require_call("transformers", FNetBasicFourierTransform, modeling_fnet.FNetBasicFourierTransform)


def uses_dft_matrices(module: modeling_fnet.FNetBasicFourierTransform) -> bool:
    """Return whether `module` uses DFT matrices.

    If a sequence is shorter than `dft_mat_seq`, the module truncates this matrix, so the results differ from those of an FFT.
    """
    return hasattr(module, "dft_mat_seq")


AttentionInterface.register(CHILDREN, _attend_with_child)
AttentionMaskInterface.register(CHILDREN, padding_mask)
register()
install()
