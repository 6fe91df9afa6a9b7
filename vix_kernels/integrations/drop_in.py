"""A replacement for softmax attention, with the signature of `torch.nn.functional.scaled_dot_product_attention`.

The integrations call this replacement instead of `scaled_dot_product_attention`. A core (see nn/core.py) computes the
attention. Arguments that the core does not support raise NotImplementedError, because ignoring them would silently change the
results. There are two exceptions: with dropout="ignore", dropout is ignored, and the op "linear" always ignores the scale.
"""

from __future__ import annotations

from dataclasses import replace
from operator import index
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .. import backends
from ..nn.checks import check_call_grid
from ..nn.core import CORES, Core, Mixer, Mounted, SdpaArgs, Site, Tokens, subscribe
from ..ops.checks import dtype_name
from ..ops.rope import Rope

OPS: list[str] = []  # names of the registered cores that can replace softmax attention


@subscribe
def _admit(core: type[Mixer]) -> None:
    if core.for_hosts and core.name not in OPS:
        OPS.append(core.name)


class DropIn(Mounted):
    """An attention module with the signature of `scaled_dot_product_attention`.

    An integration creates a DropIn from the user's options. `replace_sdpa` and `register` use this DropIn directly.
    `replace_attention` and `replace_mha` add a copy of the DropIn to each attention module, as the child module `vix`. Only
    these copies can have parameters. Models of this library need no copies: `replace_attention` changes the core (see
    nn/core.py) of each attention module.

    Args:
        op: the attention method: "nystrom", "performer", "feature", "linear", "agent", or the name of a core that another
            package registered.
        retrain: whether the model was, or will be, trained with this attention. Must be True for all ops except "nystrom", and
            for "nystrom" with a residual convolution. These methods do not closely approximate softmax attention, so weights
            trained with softmax attention would give wrong results.
        backend: "auto", "triton", "torch" or "reference".
        dropout: how to handle attention dropout, which linear-cost attention does not support: "refuse" raises
            NotImplementedError, and "ignore" computes the attention without dropout.
        options: options of the core. "nystrom" accepts num_landmarks, landmarks, grid_size, prefix_tokens, pinv_iterations,
            pinv_init and residual_conv_kernel; "performer" accepts num_features and seed; "feature" accepts num_features,
            gaussian and seed; "linear" accepts feature_map and eps; "agent" accepts num_agents, grid_size and prefix_tokens.
            All except "linear" accept exact_prefix. With exact_prefix=True (the default), class and register tokens use exact
            softmax attention. If num_landmarks or num_agents exceeds the number of tokens, fewer landmarks or agents are used.
            The random features of "performer" are generated from `seed` and are not saved with the model.

    Attributes:
        core: the core that computes the attention.
        host: the class of the attention module before the replacement, or None if the module was created with a child `vix`.
        prefix_tokens: the number of class and register tokens of the model, or 0 if this number is unknown.
        num_tokens: the number of tokens at the model's configured image size, or None if this number is unknown.
        grid: the hook that records the token grid of each call. Landmarks and agents are placed on this grid. If `grid` is
            None, the options or the argument `grid_size` of the call determine the placement.
    """

    # Defaults for instances that earlier versions pickled without these attributes
    follows_prefix, prefix_tokens, num_tokens, dropout = False, 0, None, "refuse"
    host: type[nn.Module] | None = None

    def __init__(
        self, op: str, *, retrain: bool = False, backend: str = "auto", dropout: str = "refuse", **options: Any
    ) -> None:
        super().__init__()
        if not isinstance(op, str) or op not in OPS:
            reason = CORES[op].not_for_hosts if isinstance(op, str) and op in CORES else ""
            raise ValueError(
                f"op: expected one of {', '.join(map(repr, OPS))}, got {op!r}{f' ({reason})' if reason else ''}"
            )  # fmt: skip
        kind = CORES[op]
        for option in options:
            if option not in kind.options():
                raise TypeError(
                    f"{option}: expected an option of {op!r} ({', '.join((*kind.options(), 'backend', 'dropout'))})"
                )
        backends.check(backend)
        if dropout not in ("refuse", "ignore"):
            raise ValueError(f"dropout: expected 'refuse' or 'ignore', got {dropout!r}")
        self.core: Core = kind.made("host", **options)
        check_trained(self.core, retrain)
        self.op, self.options, self.backend, self.dropout = op, options, backend, dropout
        self.grid: TokenGrid | None = None
        self.follows_prefix = getattr(self.core, "exact_prefix", False) is True and options.get("landmarks") != "pad_front"
        self.is_mounted = False

    def mounted(self, site: Site) -> DropIn:
        """Return a copy for the layer at `site`.

        The copy has separate parameters, and its random features depend on the layer.
        """
        copy = DropIn(self.op, retrain=True, backend=self.backend, dropout=self.dropout, **self.options)
        copy.core = self.core.fit(site)
        if copy.core.needs_module():
            copy.mount(copy.core, site)
            copy.is_mounted = True
        return copy

    def like(self, host: nn.Module) -> DropIn:
        """Set the device, dtype and training mode to those of `host`, the module that will contain this module. Return self."""
        weight = next((x for x in host.parameters() if x.is_floating_point()), None)
        return (self if weight is None else self.to(weight.device, weight.dtype)).train(host.training)

    def without_module(self) -> DropIn:
        """Return self if the attention needs no parameters. Only copies returned by `mounted` can have parameters.

        Raises:
            ValueError: the attention needs parameters.
        """
        if self.core.needs_module():
            raise ValueError(
                f"{', '.join(self.options) or 'op'}: expected attention without parameters, got {self.core}: no module can "
                "hold its parameters here"
            )
        return self

    def place(self, prefix_tokens: int, grid: TokenGrid | None) -> None:
        """Place landmarks or agents on `grid`, after `prefix_tokens` tokens, unless the options specify another placement.

        With the option exact_prefix=True, the first `prefix_tokens` tokens use exact softmax attention. With
        landmarks="pad_front", exact_prefix=True has no effect.
        """
        self.prefix_tokens = prefix_tokens
        size = None if grid is None else grid.size_of()
        self.num_tokens = None if size is None else prefix_tokens + size[0] * size[1]
        if self.follows_prefix:
            self.core = replace(self.core, exact_prefix=prefix_tokens)
        if "prefix_tokens" not in self.core.options():
            return
        if "prefix_tokens" not in self.options:
            self.core = self.core.after_prefix(prefix_tokens)
        self.grid = grid if self.allows_grid() and "grid_size" not in self.options else None

    def allows_grid(self) -> bool:
        """Return whether landmarks or agents may be placed on a grid: the option `landmarks` must be "grid" or absent."""
        return self.options.get("landmarks", "grid") == "grid"

    def placed(self, tokens: int | None = None) -> Core:
        """Return the core for a call with `tokens` tokens. If a grid was recorded, the core places landmarks or agents on it.

        If `tokens` is None, the core uses the grid of the latest call.
        """
        size = None if self.grid is None else self.grid.size_of(None if tokens is None else tokens - self.core.prefix_tokens)
        return self.core if size is None else self.core.on_grid(size)

    def describe(self) -> str:
        """Return a description of the op and its main options, such as the number and placement of landmarks."""
        return self.placed().describe()

    def __repr__(self) -> str:
        options = self.options | ({"dropout": "ignore"} if self.dropout == "ignore" else {})
        return f"{self.op}({', '.join(f'{name}={value!r}' for name, value in options.items())})"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        rope: Rope | None = None,
        self_attention: bool | None = None,
        cu_seqlens: Tensor | None = None,
        group: Any | None = None,
        grid_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the attention output. The positional arguments are those of `scaled_dot_product_attention`.

        query, key, value and the output have shape (batch, heads, tokens, head_dim).

        Args:
            attn_mask: a padding mask that is the same for all heads and queries, such as (batch, 1, 1, tokens). A bool mask is
                True for valid keys. A float mask must be 0 for valid keys, and -inf or the lowest value of its dtype for padded
                keys.
            key_padding_mask: bool (batch, tokens), True = valid.
            rope: rotary embedding to apply to query and key.
            self_attention: whether query and key come from the same tokens. Defaults to True if they have the same
                number of tokens, and to False otherwise.
            cu_seqlens, group: start offsets of packed samples, and the process group across which the tokens are sharded.
                Neither is supported yet.
            grid_size: (rows, columns) of the grid that the tokens after the prefix form. Landmarks and agents are placed on
                this grid if `allows_grid` returns True.

        Raises:
            NotImplementedError: an argument is not supported, such as causal attention, grouped-query attention, a mask that is
                not a padding mask, or dropout_p > 0 if the module was created with dropout="refuse".
        """
        if is_causal:
            raise NotImplementedError("is_causal: expected False; causal attention is not supported")
        if dropout_p and self.dropout == "refuse":
            raise NotImplementedError(
                f"dropout_p: expected 0, got {dropout_p}: there are no attention weights to drop; set the model's attention "
                "dropout to 0, or replace the attention with dropout='ignore', which computes it without dropout"
            )
        if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise NotImplementedError(f"query, key, value: expected 4 dimensions each, got shapes {shapes}")
        if not query.shape[1] == key.shape[1] == value.shape[1]:
            heads = query.shape[1], key.shape[1], value.shape[1]
            raise NotImplementedError(
                f"key: expected as many heads as query, got heads (query, key, value) {heads}; grouped heads are not supported"
            )
        if not query.shape[0] == key.shape[0] == value.shape[0]:
            batches = query.shape[0], key.shape[0], value.shape[0]
            raise NotImplementedError(
                f"key: expected query's batch size, got batch sizes (query, key, value) {batches}; samples are not broadcast"
            )
        if grid_size is None:
            core = self.placed(query.shape[2])
        else:
            check_call_grid(grid_size, query.shape[2], self.core.known_prefix())
            core = self.core.on_grid(grid_size) if self.allows_grid() else self.core
        _check_places(core, query.shape[2], key.shape[2])
        if attn_mask is not None:
            if key_padding_mask is not None:
                raise NotImplementedError("attn_mask: expected None, because key_padding_mask is also given")
            key_padding_mask = padding_of(attn_mask, key)
        core.refuse(rope=rope, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, group=group)
        if self_attention is None:
            self_attention = query.shape[2] == key.shape[2]
        module = self if self.is_mounted else self.without_module().core.derived(query)
        return core.attend(
            module, query, key, value, scale=scale, rope=rope, sdpa=SdpaArgs(), backend=self.backend,
            tokens=Tokens(key_padding_mask, cu_seqlens, grid_size, group=group, self_attention=self_attention),
        )  # fmt: skip


class TokenGrid:
    """Forward hook that records the token grids of a vision transformer.

    It is registered on the patch embedding, which receives the images. `sizes` maps a number of tokens to a grid (rows,
    columns), with the most recent grid last. Earlier grids are kept, because activation checkpointing may recompute the
    attention of an earlier call.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int]] = {}

    def __call__(self, embedding: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> None:
        if isinstance(args[0], torch.fx.Proxy):  # the size is unknown during tracing, and the traced graph has no hooks
            return
        self.add(embedding.dynamic_feat_size(tuple(args[0].shape[-2:])))

    def add(self, size: tuple[int, int]) -> None:
        rows, columns = map(index, size)  # plain ints, even in compiled code, because grid cells are computed in Python
        self.sizes.pop(rows * columns, None)
        self.sizes[rows * columns] = rows, columns

    def size_of(self, tokens: int | None = None) -> tuple[int, int] | None:
        """Return the grid with `tokens` tokens if it was recorded, else the most recent grid, or None if there is no grid."""
        return self.sizes.get(tokens) or (list(self.sizes.values())[-1] if self.sizes else None)


def _check_places(core: Core, *lengths: int) -> None:
    """Raise NotImplementedError if the prefix or the grid of `core` does not match sequences of the given lengths."""
    prefix, grid = core.prefix_tokens, core.grid_size
    for tokens in lengths:
        if tokens <= prefix:
            raise NotImplementedError(f"prefix_tokens: expected fewer than the {tokens} tokens, got {prefix}")
        if grid is not None and tokens - prefix != grid[0] * grid[1]:
            after = f"{tokens - prefix} tokens after a prefix of {prefix}"
            raise NotImplementedError(f"grid_size: expected height * width = {after}, got {grid}")


def check_trained(core: Core, retrain: bool) -> None:
    """Raise ValueError if `core` requires retraining and `retrain` is False."""
    if not core.takes_trained_weights() and not retrain:
        raise ValueError(
            f"retrain: expected True for {core.name!r}, got False: it does not approximate softmax attention closely enough "
            "for weights trained with softmax; train the model with it, or use 'nystrom' without a residual convolution"
        )


def padding_of(attn_mask: Tensor, key: Tensor) -> Tensor:
    """Convert `attn_mask` to a bool padding mask (batch, tokens), True = valid.

    `attn_mask` must be broadcastable to (batch, heads, queries, tokens) and the same for all heads and queries.
    """
    per_row = (-2, -3)  # dimensions of queries and heads; a stride of 0 means that one value is repeated
    same = all(attn_mask.shape[d] == 1 or attn_mask.stride(d) == 0 for d in per_row if attn_mask.dim() >= -d)
    readable = attn_mask.dtype == torch.bool or attn_mask.is_floating_point()
    if not readable or not 1 <= attn_mask.dim() <= 4 or not same:
        raise NotImplementedError(
            "attn_mask: expected one row for all heads and queries, such as (batch, 1, 1, tokens), got "
            f"{dtype_name(attn_mask.dtype)} {tuple(attn_mask.shape)}"
        )
    while attn_mask.dim() < 4:
        attn_mask = attn_mask[None]
    row = attn_mask[:, 0, 0]
    return (row if row.dtype == torch.bool else valid_tokens(row)).expand(key.shape[0], key.shape[2])


def valid_tokens(additive: Tensor) -> Tensor:
    """Convert an additive mask to a bool mask that is True where the additive mask is 0.

    All other values, such as -inf, must be at most half the lowest finite value of the dtype. A larger value would be a bias,
    which is not supported. On a CPU in eager mode, a bias raises NotImplementedError. On a GPU and in compiled code,
    torch._assert_async checks the values, because raising this error would require a synchronization or a graph break. If the
    assertion fails on a GPU, the process can no longer use the GPU.
    """
    valid = additive == 0
    masked = additive <= torch.finfo(additive.dtype).min / 2
    require_all(valid | masked, "additive mask: expected 0, -inf or the lowest value of its dtype; biases are not supported")
    return valid


def require_all(condition: Tensor, message: str) -> None:
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition.all():
            raise NotImplementedError(message)
    elif condition.device.type != "meta":
        torch._assert_async(condition.all(), message)
