"""A replacement for `FastAttention` from performer-pytorch, with the same name, arguments, weights and outputs.

    from vix_kernels.integrations.performer_pytorch import FastAttention

Let a_nj = c w_j . x_n and h_n = |c x_n|^2 / 2, where x_n is a query q_n or a key k_n, w_j is row j of the projection matrix and
c = dim_heads^(-1/4). Up to a factor that cancels, the random features are:

    phi_j(q_n) = exp(a_nj - h_n - max_j a_nj) + eps            phi_j(k_n) = exp(a_nj - h_n - max_nj a_nj) + eps

No gradient flows through the maxima. In `aggregate`, slots attend to tokens, and in `broadcast`, tokens attend to slots (see
vix_kernels/primitives). Here, the random features are the slots. For N keys, `aggregate` sums the exponentials
E_nj = phi_j(k_n) - eps. The eps terms have rank one, so they are added to these sums:

    S_j = sum_n E_nj v_n + eps sum_n v_n            z_j = sum_n E_nj + eps N

For the queries, `broadcast` receives an additional slot that accounts for eps. Its value is the mean of the values S_j / z_j of
the other slots, weighted by z_j:

    out_n = softmax(a_n1 - t_n + log z_1, ..., log(eps sum_j z_j)) . (S_1 / z_1, ..., sum_j S_j / sum_j z_j)
    t_n = h_n + max_j a_nj
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends
from .._torch.tiles import TILE_CPU, TILE_GPU
from ..layout import accumulator
from ..ops.checks import autocast, check_projection, check_qkv
from ..ops.performer import orthogonal_projection, performer_attention
from ..primitives import aggregate, broadcast
from .hosts import Report, patch_package
from .hosts import unpatch as unpatch

EPS, KERNEL_EPS = 1e-4, 1e-3
SCALINGS = ("chi", "sqrt")  # values of `scaling` for orthogonal_projection, indexed by ortho_scaling
RELU = nn.ReLU()


class FastAttention(nn.Module):
    """Performer attention for given q, k and v, equivalent to FastAttention in performer-pytorch 1.1.4.

    Args:
        dim_heads: width of a head.
        nb_features: number of random features; default int(dim_heads * ln(dim_heads)).
        ortho_scaling: if 0, the rows of the projection matrix have the norms of Gaussian vectors. If 1, all rows have the norm
            sqrt(dim_heads).
        causal: must be False.
        generalized_attention: whether to use the features kernel_fn(c w_j . x) + 1e-3 instead of exponentials. Here, w_j is
            row j of projection_matrix, and c = dim_heads ** -0.25.
        kernel_fn: the function for generalized_attention. Attention with these features runs in plain PyTorch.
        no_projection: whether to omit the random features and return softmax(q) softmax(k)^T v. The softmax of q is over the
            channels, and the softmax of k is over the tokens.
        compat: if True, subtract the maxima from the exponents of the features and add eps to the features, as
            performer-pytorch does. If False, omit both, which is faster.
        backend: as in performer_attention.

    The buffer `projection_matrix` defines the random features. It is generated with PyTorch's global random number generator.
    To use the same features on all ranks, set the same seed on each rank or broadcast the buffer.
    """

    def __init__(
        self,
        dim_heads: int,
        nb_features: int | None = None,
        ortho_scaling: int = 0,
        causal: bool = False,
        generalized_attention: bool = False,
        kernel_fn: Callable[[Tensor], Tensor] = RELU,
        no_projection: bool = False,
        *,
        compat: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if causal:
            raise NotImplementedError("causal: expected False; causal attention is not supported")
        if ortho_scaling not in (0, 1):
            raise ValueError(f"ortho_scaling: expected 0 or 1, got {ortho_scaling!r}")
        backends.check(backend)
        if backend == "triton" and (generalized_attention or no_projection):
            raise NotImplementedError(
                "backend: expected 'auto', 'torch' or 'reference', because generalized_attention and no_projection have no "
                "kernels, got 'triton'"
            )
        self.dim_heads = dim_heads
        self.nb_features = int(dim_heads * math.log(dim_heads)) if nb_features is None else nb_features
        self.ortho_scaling = ortho_scaling
        self.generalized_attention, self.kernel_fn, self.no_projection = generalized_attention, kernel_fn, no_projection
        self.compat, self.backend = compat, backend
        self.register_buffer("projection_matrix", self._draw())

    def _draw(self) -> Tensor:
        seed = int(torch.randint(2**62, (), device="cpu"))
        return orthogonal_projection(self.nb_features, self.dim_heads, seed=seed, scaling=SCALINGS[self.ortho_scaling])

    @torch.no_grad()
    def redraw_projection_matrix(self, device: torch.device | str) -> None:
        """Draw new random features. `device` is ignored.

        Do not call this method between a forward pass and its backward pass.
        """
        self.projection_matrix.copy_(self._draw())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Return the attention output, (batch, heads, queries, value_dim).

        Args:
            q: (batch, heads, queries, dim_heads).
            k: (batch, heads, tokens, dim_heads). If k and v have batch size 1, both are expanded to the batch size of q.
            v: (batch, heads, tokens, value_dim).
            key_padding_mask: bool (batch, tokens), True = valid. Padded tokens do not affect the output. The output for a query
                without valid keys is 0.
        """
        q, k, v = autocast(q, k, v)
        if all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)) and k.shape[0] == v.shape[0] == 1:
            k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
        check_qkv(q, k, v, key_padding_mask)
        if key_padding_mask is not None:
            k, v = (x.masked_fill(~key_padding_mask[:, None, :, None], 0.0) for x in (k, v))
        # q, k and v already have autocast's dtype. Disable autocast, so that the products below can also run in float32.
        with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
            return self._attend(q, k, v, key_padding_mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.no_projection:
            return two_softmaxes(q, k, v, mask)
        projection = self.projection_matrix.to(accumulator(q.dtype))
        slots = check_projection(projection, q)
        if self.generalized_attention:
            w = (q.shape[3] ** -0.25 * projection).to(q.dtype).T
            q_features, k_features = self.kernel_fn(q @ w), self.kernel_fn(k @ w)
            if mask is not None:
                k_features = k_features.masked_fill(~mask[:, None, :, None], 0.0)
            return explicit_attention(q_features, k_features, v, KERNEL_EPS, mask)
        if not self.compat:
            return performer_attention(q, k, v, projection, key_padding_mask=mask, backend=self.backend)
        backend = backends.resolve(self.backend, q, max(q.shape[3] + 1, v.shape[3]))
        # With at most as many tokens as random features, the features are small enough to store.
        few = self.backend == "auto" and q.device.type != "cuda" and max(q.shape[2], k.shape[2]) <= slots.shape[2]
        if few or backend == "reference":
            return explicit_attention(*exponentials(q, k, projection, mask), v, EPS, mask)
        return tiled_attention(q, k, v, slots, mask, backend)

    def extra_repr(self) -> str:
        return f"dim_heads={self.dim_heads}, nb_features={self.nb_features}, compat={self.compat}"


class ProjectionUpdater(nn.Module):
    """Redraws random features at intervals, like the module of the same name in performer-pytorch 1.1.4.

    The package's updater only finds the package's FastAttention. This updater finds all modules that have the method
    `redraw_projection_matrix`.

    Args:
        instance: the model whose random features are redrawn.
        feature_redraw_interval: number of calls to `redraw_projections` between two redraws. None: never redraw.
    """

    def __init__(self, instance: nn.Module, feature_redraw_interval: int | None) -> None:
        super().__init__()
        self.instance, self.feature_redraw_interval = instance, feature_redraw_interval
        self.register_buffer("calls_since_last_redraw", torch.tensor(0))

    def fix_projections_(self) -> None:
        """Stop redrawing the features."""
        self.feature_redraw_interval = None

    def redraw_projections(self) -> None:
        """Count this call, or redraw the features if the interval has passed. In evaluation mode, do nothing."""
        if not self.training:
            return
        if self.feature_redraw_interval is None or self.calls_since_last_redraw < self.feature_redraw_interval:
            self.calls_since_last_redraw += 1
            return
        self.calls_since_last_redraw.zero_()
        for module in self.instance.modules():
            if hasattr(module, "redraw_projection_matrix"):
                module.redraw_projection_matrix(module.projection_matrix.device)


def patch(model: nn.Module, *, backend: str = "auto") -> Report:
    """Replace the attention in a performer-pytorch model, in place. Outputs, weights and weight names do not change.

        report = patch(PerformerLM(...))

    The package's ProjectionUpdater still redraws the random features. `unpatch(model)` undoes the replacement.

    Args:
        model: a model that contains FastAttention modules of performer-pytorch 1.1.4 or newer.
        backend: as in performer_attention. With "triton", layers with generalized_attention or no_projection are not replaced.

    Returns:
        a report that lists the replaced layers, and states why other attention layers, such as causal ones, could not be
        replaced.

    Raises:
        ValueError: nothing could be replaced. The model is then unchanged.
        ImportError: performer-pytorch is not installed or not supported, or `import performer_pytorch` finds a copy other than
            the installed one.
    """

    def reason_against(module: nn.Module) -> str:
        if module.causal:
            return "causal: expected False; causal attention is not supported"
        if backend == "triton" and (module.generalized_attention or module.no_projection):
            return "backend 'triton' has no kernels for generalized_attention and no_projection"
        return ""

    return patch_package(
        model, "performer-pytorch", "1.1.4", FastAttention, backend=backend, reason_against=reason_against
    )  # fmt: skip


def two_softmaxes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], torch.finfo(k.dtype).min)
    # No normalizer is needed. It would always be 1, because both softmaxes sum to 1.
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """Return the attention output without storing the features. See the equations at the top of this file.

    `slots` is projection_matrix, (1, 1, features, dim_heads).
    """
    c = q.shape[3] ** -0.25
    values, lse = aggregate(slots, k, v, scale=c, gaussian=True, mask=mask, backend=backend)
    highest = highest_logits(k, c * slots)
    if mask is not None:
        highest = highest.masked_fill(~mask[:, None], torch.finfo(highest.dtype).min)
    z = (math.log(2) * lse - highest.amax(-1, keepdim=True)).exp()
    s = z[..., None] * values + EPS * v.sum(2, keepdim=True, dtype=values.dtype)
    z = z + EPS * count_valid(k, mask, z.dtype)
    sum_s, sum_z = s.sum(2, keepdim=True), z.sum(-1, keepdim=True)
    values = torch.cat([s / z[..., None], sum_s / sum_z[..., None]], 2)
    bias = torch.cat([z, EPS * sum_z], -1).log2()
    # An extra channel of the query contains t = t_n / c, because broadcast multiplies the logits by c. All slots except the eps
    # slot are -1 in this channel, so the gradient of t is a sum over these slots. If t_n were added to the logit of the eps
    # slot instead, the gradient of t would equal the gradient of this logit. That gradient is lost to rounding if the eps slot
    # has nearly all of the weight.
    t = (c / 2) * q.to(lse.dtype).square().sum(-1, keepdim=True) + highest_logits(q, slots)[..., None]
    slots = F.pad(F.pad(slots, (0, 1), value=-1.0), (0, 0, 0, 1))
    return broadcast(torch.cat([q, t.to(q.dtype)], -1), slots, values, bias, scale=c, backend=backend)


def exponentials(q: Tensor, k: Tensor, projection: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the exponential features of q and k, before eps is added, in the dtype of `projection`."""
    q, k = (q.shape[3] ** -0.25 * x.to(projection.dtype) for x in (q, k))
    q_logits, k_logits = q @ projection.T, k @ projection.T
    if mask is not None:
        k_logits = k_logits.masked_fill(~mask[:, None, :, None], float("-inf"))
    highest = q_logits.detach().amax(-1, keepdim=True)
    q_features = (q_logits - (q.square().sum(-1, keepdim=True) / 2 + highest)).exp()
    highest = k_logits.detach().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(k_logits.dtype).min)
    return q_features, (k_logits - (k.square().sum(-1, keepdim=True) / 2 + highest)).exp()


def explicit_attention(q_features: Tensor, k_features: Tensor, v: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """Return the attention output for the features q_features + eps and k_features + eps.

    The terms with eps are added to the sums, so q_features + eps and k_features + eps are never stored. Masked rows of
    k_features and v must be 0.
    """
    dtype = accumulator(v.dtype)
    s = k_features.mT @ v.to(k_features.dtype) + eps * v.sum(2, keepdim=True, dtype=dtype)
    z = k_features.sum(2, dtype=dtype) + eps * count_valid(v, mask, dtype)
    sums = torch.cat([s, z[..., None]], -1)
    out = q_features @ sums.to(q_features.dtype) + eps * sums.sum(2, keepdim=True)
    return (out[..., :-1] / out[..., -1:]).to(v.dtype)


def count_valid(k: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor | int:
    """Return the number of tokens. With a mask, return the number of valid tokens per sample, at least 1, as (batch, 1, 1)."""
    return k.shape[2] if mask is None else mask.sum(-1, dtype=dtype).clamp(min=1)[:, None, None]


@torch.no_grad()
def highest_logits(x: Tensor, slots: Tensor) -> Tensor:
    """Return the maximum of slots[0, 0, j] . x_n over j, (batch, heads, tokens). Process one tile of tokens at a time."""
    highest = slots.new_empty(x.shape[:3])
    tile_size = TILE_CPU if x.device.type == "cpu" else TILE_GPU
    step = max(1, tile_size // (x.shape[0] * x.shape[1] * slots.shape[2]))
    for start in range(0, x.shape[2], step):
        tile = slice(start, start + step)
        torch.amax(x[:, :, tile].to(slots.dtype) @ slots[0, 0].T, -1, out=highest[:, :, tile])
    return highest
