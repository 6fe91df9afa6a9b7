"""One attention in the place of softmax attention: an op of this library behind the signature of torch's own function.

Every door calls it as it would call `torch.nn.functional.scaled_dot_product_attention`. What an op cannot honour raises
NotImplementedError, so that no answer changes in silence.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .. import backends
from ..nn.checks import check_placement
from ..ops.agent import agent_attention
from ..ops.checks import autocast, check_integer, dtype_name
from ..ops.linear import check_feature_map, linear_attention
from ..ops.nystrom import check_nystrom, nystrom_attention
from ..ops.performer import orthogonal_projection, performer_attention
from ..ops.pooling import at_most, pooled_queries
from ..ops.rope import Rope
from ..primitives.registry import library

APPROXIMATIONS = ("nystrom",)  # near enough to softmax attention to take its trained weights


class DropIn:
    """An attention that is called like `scaled_dot_product_attention`; it has no parameters.

    Args:
        op: "nystrom", "performer", "linear" or "agent".
        retrain: the model is (or was) trained with this attention. All but "nystrom" need it: they do not approximate softmax
            attention closely, so that a model trained with that would go on with wrong answers.
        options: of the op: num_landmarks, landmarks, grid_size, prefix_tokens, pinv_iterations, pinv_init; num_features, seed;
            feature_map, eps; num_agents, grid_size, prefix_tokens; and backend. Landmarks and agents are fewer where there are
            fewer tokens. Random features are drawn from `seed` and kept outside of the model.
        grid: the grid of the tokens in the current call, on which landmarks and agents are then placed.
    """

    def __init__(self, op: str, *, retrain: bool = False, grid: TokenGrid | None = None, **options: Any) -> None:
        if not isinstance(op, str) or op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(map(repr, OPS))}, got {op!r}{_why_not(op)}")
        check_options(op, options)
        check_trained(op, retrain)
        self.op, self.options, self.grid = op, options, grid

    def of_layer(self, layer: int) -> DropIn:
        """This attention for one of several layers, which should not share their random features."""
        if self.op != "performer":
            return self
        return DropIn(self.op, retrain=True, **self.options | {"seed": self.options.get("seed", 0) + layer})

    def placed(self, tokens: int | None = None) -> dict[str, Any]:
        """The options of a call with so many tokens, by default of the latest: landmarks or agents on its grid, if any."""
        cells = None if tokens is None else tokens - self.options.get("prefix_tokens", 0)
        size = None if self.grid is None else self.grid.size_of(cells)
        if size is None:
            return self.options
        name, default = COUNTS[self.op]
        options = self.options | {"grid_size": size, name: most_cells(size, self.options.get(name, default))}
        return options | {"landmarks": "grid"} if self.op == "nystrom" else options

    def describe(self) -> str:
        """What it is, in words: the op, and how many landmarks, agents or features where."""
        options = self.placed()
        if self.op in COUNTS:
            name, default = COUNTS[self.op]
            grid = options.get("grid_size")
            where = "in segments" if grid is None else f"on the grid {grid[0]} x {grid[1]}"
            prefix = options.get("prefix_tokens", 0)
            behind = f", {prefix} prefix token{'s' * (prefix > 1)}" if prefix else ""
            return f"{self.op}, {options.get(name, default)} {name.removeprefix('num_')} {where}{behind}"
        if self.op == "performer":
            return f"performer, {options.get('num_features') or 'd ln d'} features, seed {options.get('seed', 0)}"
        return f"linear, {options.get('feature_map', 'relu')} of the channels"

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"

    def __call__(
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
    ) -> Tensor:
        """(batch, heads, tokens, head_dim) to the same, as `scaled_dot_product_attention`.

        Args:
            attn_mask: one row for all heads and queries, such as (batch, 1, 1, tokens): bool, True = may be looked at, or added
                to the logits, 0 or the lowest number.
            key_padding_mask: bool (batch, tokens), True = the token takes part.
            rope: rotary embedding of query and key.

        Raises:
            NotImplementedError: a mask, dropout, causal or grouped attention that linear-cost attention cannot honour.
        """
        if is_causal:
            raise NotImplementedError("is_causal: expected False; causal attention is not supported")
        if dropout_p:
            raise NotImplementedError(
                f"dropout_p: expected 0, got {dropout_p}: there are no weights to drop; set the attention's dropout to 0"
            )
        if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
            raise NotImplementedError(f"query, key, value: expected 4 dimensions each, got a query of {tuple(query.shape)}")
        if enable_gqa or not query.shape[1] == key.shape[1] == value.shape[1]:
            heads = query.shape[1], key.shape[1], value.shape[1]
            raise NotImplementedError(f"key: expected as many heads as query has, got {heads}; no grouped heads")
        if not query.shape[0] == key.shape[0] == value.shape[0]:
            batches = query.shape[0], key.shape[0], value.shape[0]
            raise NotImplementedError(f"key: expected query's batch, got {batches}; samples are not broadcast")
        options = self.placed(query.shape[2])
        _check_places(options, query.shape[2], key.shape[2])
        if attn_mask is not None:
            if key_padding_mask is not None:
                raise NotImplementedError("attn_mask: expected None beside a key_padding_mask")
            key_padding_mask = padding_of(attn_mask, key)
        return OPS[self.op](query, key, value, scale=scale, key_padding_mask=key_padding_mask, rope=rope, **options)


class TokenGrid:
    """The grids (rows, columns) of a vision transformer's tokens, by their number, the latest last.

    It is a forward hook of the patch embedding, which is the one module that sees the size of the images. Several grids are
    kept because activation checkpointing computes attention again after later calls.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int]] = {}

    def __call__(self, embedding: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> None:
        self.add(embedding.dynamic_feat_size(tuple(args[0].shape[-2:])))

    def add(self, size: tuple[int, int]) -> None:
        rows, columns = map(index, size)  # numbers to compilers too, since the cells of landmarks follow from them
        self.sizes.pop(rows * columns, None)
        self.sizes[rows * columns] = rows, columns

    def size_of(self, tokens: int | None = None) -> tuple[int, int] | None:
        """The grid of so many tokens, or else the latest; None before the first."""
        return self.sizes.get(tokens) or (list(self.sizes.values())[-1] if self.sizes else None)


def most_cells(grid: tuple[int, int], most: int) -> int:
    """The largest number up to `most` that is a product of at most the rows and at most the columns of the grid."""
    rows, columns = grid
    return max(a * min(most // a, columns) for a in range(1, min(rows, most) + 1))


def _check_places(options: dict[str, Any], *lengths: int) -> None:
    """Whether prefix and grid are those of sequences of these lengths."""
    prefix, grid = options.get("prefix_tokens", 0), options.get("grid_size")
    for tokens in lengths:
        if tokens <= prefix:
            raise NotImplementedError(f"prefix_tokens: expected fewer than the {tokens} tokens, got {prefix}")
        if grid is not None and tokens - prefix != grid[0] * grid[1]:
            after = f"{tokens - prefix} tokens after {prefix} of the prefix"
            raise NotImplementedError(f"grid_size: expected height * width = {after}, got {grid}")


def check_trained(op: str, retrain: bool) -> None:
    """Raises ValueError for an op that a model has to be trained with, unless `retrain` says that it is."""
    if op not in APPROXIMATIONS and not retrain:
        raise ValueError(
            f"retrain: expected True for {op!r}, got False: it is no approximation of softmax attention that trained weights "
            "could go on with; train the model with it, or choose 'nystrom'"
        )


def padding_of(attn_mask: Tensor, key: Tensor) -> Tensor:
    """`attn_mask`, broadcastable to (batch, heads, queries, tokens), as bool (batch, tokens): only its keys may differ."""
    per_row = (-2, -3)  # queries and heads; a stride of 0 repeats one value
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
    return (row if row.dtype == torch.bool else taking_part(row)).expand(key.shape[0], key.shape[2])


def taking_part(additive: Tensor) -> Tensor:
    """Which tokens an additive mask leaves, bool: those with 0. All others must be far below any logit, or -inf.

    A mask with other values is a bias, which would be lost in silence: it raises NotImplementedError, on a GPU and in compiled
    code an assertion of the device, which ends the process's work there, because reading the values would wait for it.
    """
    taken = additive == 0
    barred = additive <= torch.finfo(additive.dtype).min / 2
    require_all(taken | barred, "additive mask: expected 0 or the lowest number; biases are not supported")
    return taken


def require_all(condition: Tensor, message: str) -> None:
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition.all():
            raise NotImplementedError(message)
    elif condition.device.type != "meta":
        torch._assert_async(condition.all(), message)


def check_options(op: str, options: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for an option that `op` does not have, or that can fit no call."""
    for option in options:
        if option not in options_of(op):
            raise TypeError(f"{option}: expected an option of {op!r} ({', '.join(options_of(op))})")
    backends.check(options.get("backend", "auto"))
    if op in COUNTS:
        name, default = COUNTS[op]
        check_placement(name, options.get(name, default), options.get("grid_size"), options.get("prefix_tokens", 0))
    if op == "nystrom":
        iterations, init = options.get("pinv_iterations", 6), options.get("pinv_init", "exact")
        check_nystrom(options.get("landmarks", "segment"), iterations, init)
    elif op == "linear":
        check_feature_map(options.get("feature_map", "relu"), options.get("eps", 1e-6))
    elif op == "performer":
        check_integer("seed", options.get("seed", 0), 0)
        if options.get("num_features") is not None:
            check_integer("num_features", options["num_features"], 1)


def options_of(op: str) -> list[str]:
    kinds = inspect.signature(OPS[op]).parameters.values()
    return [each.name for each in kinds if each.kind is each.KEYWORD_ONLY and each.name not in _CALL]


_CALL = ("scale", "key_padding_mask", "rope")  # come with a call, not with the attention


def _nystrom(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, key_padding_mask: Tensor | None, rope: Rope | None,
    num_landmarks: int = 64, landmarks: str = "segment", grid_size: tuple[int, int] | None = None, prefix_tokens: int = 0,
    pinv_iterations: int = 6, pinv_init: str = "exact", backend: str = "auto",
) -> Tensor:  # fmt: skip
    return nystrom_attention(
        q, k, v, num_landmarks=at_most(at_most(num_landmarks, q.shape[2] - prefix_tokens), k.shape[2] - prefix_tokens),
        landmarks=landmarks, grid_size=grid_size, prefix_tokens=prefix_tokens, pinv_iterations=pinv_iterations,
        pinv_init=pinv_init, scale=scale, key_padding_mask=key_padding_mask, rope=rope, backend=backend,
    )  # fmt: skip


def _performer(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, key_padding_mask: Tensor | None, rope: Rope | None,
    num_features: int | None = None, seed: int = 0, backend: str = "auto",
) -> Tensor:  # fmt: skip
    if num_features is None:
        num_features = max(1, int(q.shape[3] * math.log(q.shape[3])))
    projection = random_features(q, num_features, seed)
    return performer_attention(
        q, k, v, projection, scale=scale, key_padding_mask=key_padding_mask, rope=rope, backend=backend
    )  # fmt: skip


def _linear(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, key_padding_mask: Tensor | None, rope: Rope | None,
    feature_map: str = "relu", eps: float = 1e-6, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Linear attention has no scale: relu's cancels, elu is learned with what it sees."""
    return linear_attention(
        q, k, v, feature_map=feature_map, eps=eps, key_padding_mask=key_padding_mask, rope=rope, backend=backend
    )  # fmt: skip


def _agent(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, key_padding_mask: Tensor | None, rope: Rope | None,
    num_agents: int = 49, grid_size: tuple[int, int] | None = None, prefix_tokens: int = 0, backend: str = "auto",
) -> Tensor:  # fmt: skip
    q, k, v = autocast(q, k, v)
    of_queries = key_padding_mask if q.shape[2] == k.shape[2] else None
    agents, counts = pooled_queries(
        q, at_most(num_agents, q.shape[2] - prefix_tokens), grid_size=grid_size, prefix_tokens=prefix_tokens, mask=of_queries,
        backend=backend,
    )  # fmt: skip
    return agent_attention(
        q, k, v, agents, scale=scale, agent_mask=None if of_queries is None else counts > 0,
        key_padding_mask=key_padding_mask, rope=rope, backend=backend,
    )  # fmt: skip


COUNTS = {"nystrom": ("num_landmarks", 64), "agent": ("num_agents", 49)}  # what is placed on a grid, and how many by default
OPS: dict[str, Callable[..., Tensor]] = {
    "nystrom": _nystrom, "performer": _performer, "linear": _linear, "agent": _agent,
}  # fmt: skip


def _why_not(op: str) -> str:
    reasons = {
        "linformer": "its projections are parameters for one number of tokens: build the model with nn.LinformerAttention",
        "fourier": "it mixes tokens without q, k and v: build the model with nn.FourierMixing",
    }
    return f" ({reasons[op]})" if isinstance(op, str) and op in reasons else ""


def random_features(q: Tensor, num_features: int, seed: int) -> Tensor:
    """orthogonal_projection for the width of q, on its device, drawn once and kept for the process."""
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.vix_kernels.random_features(q.detach(), num_features, seed)
    return _drawn(num_features, q.shape[3], seed, q.device)


@lru_cache(maxsize=256)
def _drawn(num_features: int, width: int, seed: int, device: torch.device) -> Tensor:
    # Kept for later calls, which are not under the transforms and modes of this one.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        return orthogonal_projection(num_features, width, seed=seed).to(device)


# What compilers see of it, which cannot trace the drawing. An operator has to return memory of its own.
library.define("random_features(Tensor q, SymInt num_features, int seed) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl(
    "random_features",
    lambda q, num_features, seed: _drawn(num_features, q.shape[3], seed, q.device).clone(),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "vix_kernels::random_features",
    lambda q, num_features, seed: q.new_empty(num_features, q.shape[3], dtype=torch.float32),
    lib=library,
)
