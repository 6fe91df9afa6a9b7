"""The attention layers and the Fourier transform of the original models, in two implementations with the same parameters.

backend="reference" runs the published computation in eager PyTorch. Like the original code, it stores all intermediate
results in memory, such as logits, attention weights and complex Fourier coefficients. The other backends run the operators of
vix_kernels and PyTorch's scaled_dot_product_attention where these compute the same function. Performer attention has only the
reference implementation, because no kernel supports its eps and its maximum over the batch.

A rotary `table` from vix.RotaryTable has the shape (positions, dim_head). The first half of its columns contains sines, and the
second half contains cosines. Row t rotates the query and the key of token t, in interleaved pairs of channels.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from vix_kernels import Rope, apply_rope, fourier_mixing, linformer_attention, nystrom_attention

from .blocks import Mixer


def split_heads(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    return rearrange(x, "b h n d -> b n (h d)")


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, backend: str) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for q, k and v (batch, heads, tokens, d), with dropout on the attention weights."""
    if backend != "reference":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    scores = einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    return einsum("bhij,bhjd->bhid", F.dropout(scores.softmax(-1), dropout), v)


def rope_of(table: Tensor) -> Rope:
    """Convert a rotary table to a Rope. 16-bit tables are cast to float32."""
    sin, cos = table.to(torch.promote_types(table.dtype, torch.float32))[None].chunk(2, -1)
    return Rope(cos.contiguous(), sin.contiguous())


def rotate_pairs(q: Tensor, k: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k with channels (2i, 2i + 1) of token t rotated by angle i of table[t], in plain PyTorch."""
    sin, cos = (repeat(half, "n i -> n (i two)", two=2) for half in table[: q.shape[2]].chunk(2, -1))

    def rotated(x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack((-odd, even), -1).flatten(-2) * sin

    return rotated(q), rotated(k)


def rotate(q: Tensor, k: Tensor, table: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    if table is None:
        return q, k
    if backend == "reference":
        return rotate_pairs(q, k, table)
    return apply_rope(q, k, rope_of(table[: q.shape[2]]), backend=backend)


class SoftmaxAttention(Mixer):
    """The attention layer of ViT. Dropout is applied after the output projection, and not to the attention weights.

    A single head of width `dim` has no output projection and no dropout.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int, dropout: float, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        inner = heads * dim_head
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        projected = heads > 1 or dim_head != dim
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout)) if projected else nn.Identity()

    def mix(self, x: Tensor, table: Tensor | None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, -1))
        q, k = rotate(q, k, table, self.backend)
        return self.to_out(merge_heads(softmax_attention(q, k, v, 0.0, self.backend)))


class NystromAttention(Mixer):
    """The attention layer of ViN, without dropout.

    The pseudo-inverse is computed in six iterations, and the convolution of the values has kernel size 33. The sequence is
    padded at the front with all-zero tokens to a multiple of the number of landmarks. The softmax, the landmarks and the rotary
    embedding treat these tokens like all other tokens. For example, a class token and 1024 other tokens are padded with 63
    all-zero tokens, so the class token is rotated as the 64th token. The initial value of the pseudo-inverse depends on the
    largest row and column sums in the batch, so the output for a sample depends on the other samples.

    If there are fewer tokens than landmarks before padding, the reference implementation runs.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int, backend: str, num_landmarks: int = 64) -> None:
        super().__init__()
        self.heads, self.num_landmarks, self.backend = heads, num_landmarks, backend
        inner = heads * dim_head
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(0.0))
        self.res_conv = nn.Conv2d(heads, heads, (33, 1), padding=(16, 0), groups=heads, bias=False)

    def mix(self, x: Tensor, table: Tensor | None) -> Tensor:
        tokens = x.shape[1]
        padding = -tokens % self.num_landmarks
        if self.backend == "reference" or tokens < self.num_landmarks:
            return self.mix_plainly(F.pad(x, (0, 0, padding, 0)) if padding else x, table)[:, padding:]
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, -1))
        out = nystrom_attention(
            q, k, v, num_landmarks=self.num_landmarks, landmarks="pad_front", pinv_init="original",
            conv_weight=self.res_conv.weight, backend=self.backend,
            rope=None if table is None else rope_of(table[padding : padding + tokens]),
        )  # fmt: skip
        return self.to_out(merge_heads(out))

    def mix_plainly(self, x: Tensor, table: Tensor | None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.to_qkv(x).chunk(3, -1))
        q, k = rotate(q, k, table, "reference")
        q = q * q.shape[-1] ** -0.5
        length = q.shape[2] // self.num_landmarks
        q_marks, k_marks = (part.unflatten(2, (-1, length)).sum(3) / length for part in (q, k))
        from_marks = einsum("bhid,bhjd->bhij", q, k_marks).softmax(-1)
        between = einsum("bhid,bhjd->bhij", q_marks, k_marks).softmax(-1)
        to_marks = einsum("bhid,bhjd->bhij", q_marks, k).softmax(-1)
        out = (from_marks @ self.pseudo_inverse(between)) @ (to_marks @ v) + self.res_conv(v)
        return self.to_out(merge_heads(out))

    @staticmethod
    def pseudo_inverse(a: Tensor) -> Tensor:
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        z = a.mT / (a.sum(-1).max() * a.sum(-2).max())
        for _ in range(6):
            az = a @ z
            z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
        return z


class LinformerAttention(Mixer):
    """The attention layer of ViL. Keys and values are projected along the token dimension to `k` tokens.

    With `share_kv`, the keys before rotation are also the values, and keys and values share one projection. With `one_kv_head`,
    all query heads share one key head and one value head. Dropout is applied to the attention weights, and not after the output
    projection. While dropout is active, the reference implementation runs, because linformer_attention has no dropout.
    """

    def __init__(
        self, dim: int, *, tokens: int, heads: int, dim_head: int, dropout: float, backend: str,
        one_kv_head: bool, share_kv: bool = True, k: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.dim_head, self.share_kv, self.backend = heads, dim_head, share_kv, backend
        width = dim_head if one_kv_head else heads * dim_head
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, width, bias=False)
        self.proj_k = nn.Parameter(torch.empty(tokens, k))
        if not share_kv:
            self.to_v = nn.Linear(dim, width, bias=False)
            self.proj_v = nn.Parameter(torch.empty(tokens, k))
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def mix(self, x: Tensor, table: Tensor | None) -> Tensor:
        q, k = self.to_q(x), self.to_k(x)
        v = k if self.share_kv else self.to_v(x)
        proj_v = self.proj_k if self.share_kv else self.proj_v
        kv_heads = k.shape[-1] // self.dim_head
        if self.backend == "reference" or (self.training and self.dropout.p):
            if table is not None:
                rotated = rotate_pairs(split_heads(q, self.heads), split_heads(k, kv_heads), table)
                q, k = (merge_heads(x) for x in rotated)
            return self.to_out(self.attend_plainly(q, k, v, proj_v, kv_heads))
        # Query heads that share a key head become additional queries for that head.
        q = rearrange(q, "b n (h g d) -> b h (n g) d", h=kv_heads, d=self.dim_head)
        out = linformer_attention(
            q, split_heads(k, kv_heads), split_heads(v, kv_heads), self.proj_k, None if self.share_kv else proj_v,
            rope=None if table is None else rope_of(table[: x.shape[1]]), backend=self.backend,
        )  # fmt: skip
        return self.to_out(rearrange(out, "b h (n g) d -> b n (h g d)", n=x.shape[1]))

    def attend_plainly(self, q: Tensor, k: Tensor, v: Tensor, proj_v: Tensor, kv_heads: int) -> Tensor:
        keys, values = (einsum("bnd,nk->bkd", x, projection) for x, projection in ((k, self.proj_k), (v, proj_v)))
        q = split_heads(q, self.heads)
        keys, values = (split_heads(x, kv_heads).expand(-1, self.heads, -1, -1) for x in (keys, values))
        weights = (einsum("bhnd,bhkd->bhnk", q, keys) * self.dim_head**-0.5).softmax(-1)
        return merge_heads(einsum("bhnk,bhkd->bhnd", self.dropout(weights), values))


class PerformerAttention(Mixer):
    """The attention layer of ViP, with biases in the q, k and v projections, and without dropout.

    All heads use the same int(d ln d) random features, where d is the head width. The attention runs in plain PyTorch with
    every backend; see RandomFeatures.
    """

    def __init__(self, dim: int, *, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * dim_head
        self.fast_attention = RandomFeatures(dim_head)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))
        self.to_out = nn.Linear(inner, dim)

    def mix(self, x: Tensor, table: Tensor | None) -> Tensor:
        q, k, v = (split_heads(linear(x), self.heads) for linear in (self.to_q, self.to_k, self.to_v))
        q, k = rotate(q, k, table, "reference")
        return self.to_out(merge_heads(self.fast_attention(q, k, v)))


class RandomFeatures(nn.Module):
    """FAVOR+, except that a maximum is subtracted and an eps is added.

    phi(x) = (exp(w x - |x|^2 / 2 - maximum) + 1e-4) / sqrt(m), for m features, where x is q or k times d^(-1/4). For a query,
    `maximum` is the largest w x over its features. For keys, it is the largest w x over all features, keys, heads and samples,
    so the output for a sample depends on the other samples. Gradients flow through both maxima. The projection matrix is saved
    with the weights and never redrawn.
    """

    def __init__(self, dim_head: int) -> None:
        super().__init__()
        self.register_buffer("projection_matrix", torch.empty(int(dim_head * math.log(dim_head)), dim_head))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.features(q, is_key=False), self.features(k, is_key=True)
        weight = 1.0 / einsum("bhnm,bhm->bhn", q, k.sum(2))
        context = einsum("bhnm,bhnd->bhmd", k, v)
        return einsum("bhmd,bhnm,bhn->bhnd", context, q, weight)

    def features(self, x: Tensor, *, is_key: bool) -> Tensor:
        normalizer = x.shape[-1] ** -0.25
        projection = repeat(self.projection_matrix.to(x.dtype), "m d -> b h m d", b=x.shape[0], h=x.shape[1])
        logits = einsum("bhnd,bhmd->bhnm", normalizer * x, projection)
        half_square = (x**2).sum(-1, keepdim=True) / 2 * normalizer**2
        # Use max as in the original: unlike amax, max over a dimension does not split its gradient among equal maxima.
        maximum = logits.max() if is_key else logits.max(-1, keepdim=True).values
        return len(self.projection_matrix) ** -0.5 * ((logits - half_square - maximum).exp() + 1e-4)


class FourierMixing(Mixer):
    """The mixer of FNet: the real part of the Fourier transform over channels and tokens, without normalization.

    The transform includes the class token.
    """

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def mix(self, x: Tensor, table: Tensor | None) -> Tensor:
        if self.backend == "reference":
            return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        return fourier_mixing(x, backend=self.backend)
