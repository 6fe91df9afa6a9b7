"""performer-pytorch's `FastAttention`: its name, arguments, weights and outputs.

    from vix_kernels.integrations.performer_pytorch import FastAttention

With a_nj = c w_j . x_n and h_n = |c x_n|^2 / 2 its features are, up to a factor that cancels,

    phi_j(q_n) = exp(a_nj - h_n - max_j a_nj) + eps            phi_j(k_n) = exp(a_nj - h_n - max_nj a_nj) + eps

where no gradient goes through the maxima. Both eps are of rank one. Over keys aggregate sums the exponentials alone, E_nj:

    S_j = sum_n E_nj v_n + eps sum_n v_n            z_j = sum_n E_nj + eps N

and the eps of the queries is one more slot in broadcast, whose values are the mean of all others':

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
from ..ops.checks import autocast, check_mask, check_projection, check_qkv
from ..ops.performer import orthogonal_projection, performer_attention
from ..primitives import aggregate, broadcast

EPS, KERNEL_EPS = 1e-4, 1e-3
SCALINGS = ("chi", "sqrt")  # of the lengths of the features, by ortho_scaling
RELU = nn.ReLU()


class FastAttention(nn.Module):
    """Performer attention of q, k and v, as performer-pytorch 1.1.4 has it.

    Args:
        dim_heads: width of a head.
        nb_features: random features; default int(dim_heads * ln(dim_heads)).
        ortho_scaling: 0, features as long as Gaussian vectors, or 1, all of length sqrt(dim_heads).
        causal: refused.
        generalized_attention: features kernel_fn(c w_j . x) + 1e-3 instead of exponentials.
        kernel_fn: makes these features, in plain PyTorch.
        no_projection: no features: softmax of q over its channels, of k over the tokens.
        compat: exponentials with the package's eps and maxima. False: without them, which is the paper's FAVOR+, unbiased
            and faster.
        backend: as in performer_attention.

    The random features are the buffer `projection_matrix`. Torch's global random numbers decide on them: ranks have the same
    ones by equal seeds or by a broadcast of their buffers.
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
            raise NotImplementedError("backend: generalized_attention and no_projection have no kernels, got 'triton'")
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
        """Draw new random features, the same ones for any `device`; never between a forward and its backward."""
        self.projection_matrix.copy_(self._draw())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Attention of q (batch, heads, queries, dim_heads) to k (batch, heads, tokens, dim_heads) and v.

        key_padding_mask: bool (batch, tokens), True = the token takes part; the others count neither in the maximum nor in
        the eps. A query without any valid key returns 0.
        """
        q, k, v = autocast(q, k, v)
        check_qkv(q, k, v)
        check_mask(key_padding_mask, k)
        if key_padding_mask is not None:
            k, v = (x.masked_fill(~key_padding_mask[:, None, :, None], 0.0) for x in (k, v))
        # Dtypes are settled: autocast must not touch the products.
        with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
            return self._attend(q, k, v, key_padding_mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.no_projection:
            return two_softmaxes(q, k, v, mask)
        projection = self.projection_matrix.to(accumulator(q.dtype))
        slots = check_projection(projection, q)
        if self.generalized_attention:
            w = (q.shape[3] ** -0.25 * projection).to(q.dtype).T
            of_q, of_k = self.kernel_fn(q @ w), self.kernel_fn(k @ w)
            if mask is not None:
                of_k = of_k.masked_fill(~mask[:, None, :, None], 0.0)
            return by_features(of_q, of_k, v, KERNEL_EPS, mask)
        if not self.compat:
            return performer_attention(q, k, v, projection, key_padding_mask=mask, backend=self.backend)
        backend = backends.resolve(self.backend, q, max(q.shape[3] + 1, v.shape[3]))
        # The features of few tokens are smaller than the sums over them.
        few = self.backend == "auto" and q.device.type != "cuda" and max(q.shape[2], k.shape[2]) <= slots.shape[2]
        if few or backend == "reference":
            return by_features(*exponentials(q, k, projection, mask), v, EPS, mask)
        return by_moves(q, k, v, slots, mask, backend)

    def extra_repr(self) -> str:
        return f"dim_heads={self.dim_heads}, nb_features={self.nb_features}, compat={self.compat}"


def two_softmaxes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], torch.finfo(k.dtype).min)
    # Not divided by the sums over channels and tokens: they are 1.
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def by_moves(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """Attention by the features at the top of this file, of slots (1, 1, M, D)."""
    c = q.shape[3] ** -0.25
    values, lse = aggregate(slots, k, v, scale=c, gaussian=True, mask=mask, backend=backend)
    highest = highest_logits(k, c * slots)
    if mask is not None:
        highest = highest.masked_fill(~mask[:, None], torch.finfo(highest.dtype).min)
    z = (math.log(2) * lse - highest.amax(-1, keepdim=True)).exp()
    s = z[..., None] * values + EPS * v.sum(2, keepdim=True, dtype=values.dtype)
    z = z + EPS * how_many(k, mask, z.dtype)
    sum_s, sum_z = s.sum(2, keepdim=True), z.sum(-1, keepdim=True)
    values = torch.cat([s / z[..., None], sum_s / sum_z[..., None]], 2)
    bias = torch.cat([z, EPS * sum_z], -1).log2()
    # t_n is one more channel, from which it gets its gradient. Subtracted from the features, that is the sum of theirs; added
    # to the eps, it would be that of a slot which may have nearly all of the weight, and be lost to rounding.
    t = (c / 2) * q.to(lse.dtype).square().sum(-1, keepdim=True) + highest_logits(q, slots)[..., None]
    slots = F.pad(F.pad(slots, (0, 1), value=-1.0), (0, 0, 0, 1))
    return broadcast(torch.cat([q, t.to(q.dtype)], -1), slots, values, bias, scale=c, backend=backend)


def exponentials(q: Tensor, k: Tensor, projection: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """These features without their eps, in projection's dtype."""
    q, k = (q.shape[3] ** -0.25 * x.to(projection.dtype) for x in (q, k))
    of_q, of_k = q @ projection.T, k @ projection.T
    if mask is not None:
        of_k = of_k.masked_fill(~mask[:, None, :, None], float("-inf"))
    highest = of_q.detach().amax(-1, keepdim=True)
    of_q = (of_q - (q.square().sum(-1, keepdim=True) / 2 + highest)).exp()
    highest = of_k.detach().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(of_k.dtype).min)
    return of_q, (of_k - (k.square().sum(-1, keepdim=True) / 2 + highest)).exp()


def by_features(of_q: Tensor, of_k: Tensor, v: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """Attention by the features of_q + eps and of_k + eps, without an addition to any of them; masked of_k and v are 0."""
    dtype = accumulator(v.dtype)
    s = of_k.mT @ v.to(of_k.dtype) + eps * v.sum(2, keepdim=True, dtype=dtype)
    z = of_k.sum(2, dtype=dtype) + eps * how_many(v, mask, dtype)
    sums = torch.cat([s, z[..., None]], -1)
    out = of_q @ sums.to(of_q.dtype) + eps * sums.sum(2, keepdim=True)
    return (out[..., :-1] / out[..., -1:]).to(v.dtype)


def how_many(k: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor | int:
    """Tokens that take part, at least 1: a number, or (batch, 1, 1)."""
    return k.shape[2] if mask is None else mask.sum(-1, dtype=dtype).clamp(min=1)[:, None, None]


@torch.no_grad()
def highest_logits(x: Tensor, slots: Tensor) -> Tensor:
    """max_j p_j . x_n (batch, heads, N) of slots (1, 1, M, D), a tile of tokens at a time."""
    highest = slots.new_empty(x.shape[:3])
    room = TILE_CPU if x.device.type == "cpu" else TILE_GPU
    step = max(1, room // (x.shape[0] * x.shape[1] * slots.shape[2]))
    for start in range(0, x.shape[2], step):
        tile = slice(start, start + step)
        torch.amax(x[:, :, tile].to(slots.dtype) @ slots[0, 0].T, -1, out=highest[:, :, tile])
    return highest
