"""A replacement for `LinformerSelfAttention` from linformer, with the same name, arguments, weights and outputs.

    from vix_kernels.integrations.linformer import LinformerSelfAttention

Unlike the original, this module raises an error if forward receives unknown arguments.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import backends
from ..nn.dropout import Dropout
from ..ops.checks import check_mask
from ..ops.linformer import attend_to_slots
from .hosts import Report, patch_package, reason_against_linear
from .hosts import unpatch as unpatch


class LinformerSelfAttention(nn.Module):
    """Linformer attention including its linear layers, equivalent to the module in linformer 0.2.3.

    Args:
        dim: width of the tokens. It must be a multiple of heads.
        seq_len: maximum number of keys. Shorter sequences use the first rows of the projection matrices.
        k: number of keys and values after the projection.
        heads: number of heads.
        dim_head: width of a head; default dim // heads.
        one_kv_head: whether all query heads use the same keys and values.
        share_kv: whether the keys are also used as values.
        dropout: dropout rate of the attention weights. While dropout is active, the module runs in plain PyTorch and stores the
            attention weights.
        backend: as in linformer_attention.
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        k: int = 256,
        heads: int = 8,
        dim_head: int | None = None,
        one_kv_head: bool = False,
        share_kv: bool = False,
        dropout: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: expected a divisor of dim {dim}, got {heads}")
        backends.check(backend)
        self.seq_len, self.k, self.heads, self.share_kv, self.backend = seq_len, k, heads, share_kv, backend
        self.dim_head = dim // heads if dim_head is None else dim_head
        kv_dim = self.dim_head * (1 if one_kv_head else heads)
        self.to_q = nn.Linear(dim, self.dim_head * heads, bias=False)
        self.to_k = nn.Linear(dim, kv_dim, bias=False)
        self.proj_k = self._projection()
        if not share_kv:
            self.to_v = nn.Linear(dim, kv_dim, bias=False)
            self.proj_v = self._projection()
        self.dropout = Dropout(dropout)
        self.to_out = nn.Linear(self.dim_head * heads, dim)

    def _projection(self) -> nn.Parameter:
        bound = self.k**-0.5
        return nn.Parameter(torch.empty(self.seq_len, self.k).uniform_(-bound, bound))

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Return the output of the attention layer, (batch, tokens, dim).

        Args:
            x: (batch, tokens, dim).
            context: (batch, context_tokens, dim), at most seq_len tokens from which keys and values are computed. Default: x.
            key_padding_mask: bool (batch, context_tokens), True = valid.
        """
        name, context = ("x", x) if context is None else ("context", context)
        if context.shape[1] > self.seq_len:
            raise ValueError(f"{name}: expected at most seq_len = {self.seq_len} tokens, got {context.shape[1]}")
        check_mask(key_padding_mask, context[:, None])
        if key_padding_mask is not None:
            context = context.masked_fill(~key_padding_mask[..., None], 0.0)
        q = rearrange(self.to_q(x), "b n (h d) -> b h n d", h=self.heads)
        keys = self._slots(context, self.to_k, self.proj_k)
        values = keys if self.share_kv else self._slots(context, self.to_v, self.proj_v)
        scale = self.dim_head**-0.5
        # With at most k queries, the attention weights are small enough to store.
        few = self.backend == "auto" and q.device.type != "cuda" and q.shape[2] <= self.k
        if few or (self.training and self.dropout.p):
            out = self.dropout((scale * q @ keys.mT).softmax(-1)) @ values
        else:
            out = attend_to_slots(q, keys.to(q.dtype), values, scale=scale, backend=self.backend)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def _slots(self, x: Tensor, linear: nn.Linear, projection: Tensor) -> Tensor:
        """Return E^T linear(x), (batch, heads, k, dim_head), where E is `projection`.

        The products are computed in the cheaper order.
        """
        tokens, dim, width = x.shape[1], linear.in_features, linear.out_features
        projection = projection[:tokens].T.expand(len(x), -1, -1)
        if self.k * dim * (tokens + width) < tokens * width * (dim + self.k):
            slots = linear(torch.bmm(projection, x))
        else:
            slots = torch.bmm(projection, linear(x))
        return rearrange(slots, "b k (h d) -> b h k d", d=self.dim_head).expand(-1, self.heads, -1, -1)


def patch(model: nn.Module, *, backend: str = "auto") -> Report:
    """Replace the attention in a linformer model, in place. Outputs, weights and weight names do not change.

        report = patch(Linformer(...))

    `unpatch(model)` undoes the replacement.

    Args:
        model: a model that contains LinformerSelfAttention modules of linformer 0.2.3 or newer.
        backend: as in linformer_attention.

    Returns:
        a report that lists the replaced layers, and states why other attention layers could not be replaced.

    Raises:
        ValueError: nothing could be replaced. The model is then unchanged.
        ImportError: linformer is not installed or not supported, or `import linformer` finds a copy other than the installed
            one.
    """
    return patch_package(
        model, "linformer", "0.2.3", LinformerSelfAttention,
        backend=backend, reason_against=_reason_against, ignored=("kwargs",),
    )  # fmt: skip


def _reason_against(module: nn.Module) -> str:
    return reason_against_linear(module, "to_k", *(() if module.share_kv else ("to_v",)))
