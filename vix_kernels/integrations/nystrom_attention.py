"""nystrom-attention's `NystromAttention`: its name, arguments, weights and outputs.

    from vix_kernels.integrations.nystrom_attention import NystromAttention

The package pads the sequence with zero tokens in front to a multiple of the landmarks, and starts its pseudo-inverse from a
maximum over the whole batch. With a mask, a landmark without tokens has equal shares of all others, and so a part in their
pseudo-inverse.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends
from ..layout import accumulator
from ..nn.dropout import Dropout
from ..nn.packed_linear import packed_linear
from ..ops.nystrom import nystrom_attention
from ..primitives.pinv import inverse_reference
from ..primitives.token_conv import token_conv, token_conv_reference


class NystromAttention(nn.Module):
    """Nystrom attention between linear maps, as nystrom-attention 0.0.14 has it.

    Args:
        dim: width of the tokens.
        dim_head, heads: width and number of the heads.
        num_landmarks: segments of the sequence; it may be shorter.
        pinv_iterations: steps to the pseudo-inverse.
        residual: add a depthwise convolution over the tokens of v.
        residual_conv_kernel: its taps, odd.
        eps: of the divisor of a landmark with a mask.
        dropout: of the output.
        compat: True: what the package computes. False: neither padding nor masked tokens have any part, nor have landmarks
            without tokens, and samples do not depend on their batch mates.
        backend: as in nystrom_attention.

    The package's outputs with a mask, and returned matrices, are plain PyTorch whatever the backend.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        num_landmarks: int = 256,
        pinv_iterations: int = 6,
        residual: bool = True,
        residual_conv_kernel: int = 33,
        eps: float = 1e-8,
        dropout: float = 0.0,
        *,
        compat: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        taps = residual_conv_kernel
        if residual and (taps < 1 or taps % 2 == 0):
            raise ValueError(f"residual_conv_kernel: expected an odd number of taps, got {taps}")
        backends.check(backend)
        self.heads, self.num_landmarks, self.pinv_iterations = heads, num_landmarks, pinv_iterations
        self.scale, self.residual, self.eps = dim_head**-0.5, residual, eps
        self.compat, self.backend = compat, backend
        inner = heads * dim_head
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), Dropout(dropout))
        if residual:
            self.res_conv = nn.Conv2d(heads, heads, (taps, 1), padding=(taps // 2, 0), groups=heads, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_attn: bool = False, return_attn_matrices: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, Tensor, Tensor]]:
        """Mix the tokens.

        Args:
            x: (batch, tokens, dim).
            mask: bool (batch, tokens), True = the token takes part.
            return_attn: return the attention matrix too, that of the padded sequence.
            return_attn_matrices: return its three factors instead: tokens to landmarks, the inverse, landmarks to tokens.
        """
        tokens = x.shape[1]
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            expected, got = f"bool {tuple(x.shape[:2])}", f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"mask: expected {expected} (batch, tokens), True = takes part, got {got}")
        padding = -tokens % self.num_landmarks
        if padding:
            x = F.pad(x, (0, 0, padding, 0))
            if mask is None and not self.compat:
                mask = x.new_ones(x.shape[0], tokens, dtype=torch.bool)
            if mask is not None:
                mask = F.pad(mask, (padding, 0), value=False)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)  # and so q, k and v, as their maps have no bias
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in packed_linear(self.to_qkv, x))
        if return_attn or return_attn_matrices or (self.compat and mask is not None):
            # In float32, and autocast must not touch the products: 16 bits lose the inverse.
            wide = [part.to(accumulator(part.dtype)) for part in (q, k, v)]
            with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
                out, *factors = self._attend_plainly(*wide, mask)
            out = out.to(v.dtype)
        else:
            out = nystrom_attention(
                q, k, v, num_landmarks=self.num_landmarks, pinv_iterations=self.pinv_iterations,
                pinv_init="original" if self.compat else "exact", key_padding_mask=mask, backend=self.backend,
                conv_weight=self.res_conv.weight if self.residual else None,
            )  # fmt: skip
        out = self.to_out(rearrange(out[:, :, padding:], "b h n d -> b n (h d)"))
        if return_attn_matrices:
            return out, tuple(factors)
        if return_attn:
            from_marks, inverse, to_marks = factors
            return out, from_marks @ (inverse @ to_marks)
        return out

    def _attend_plainly(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and the three factors of the attention matrix, in memory."""
        length = q.shape[2] // self.num_landmarks
        divisor, taken_tokens, taken_marks = length, None, None
        if mask is not None:
            counts = mask.unflatten(1, (-1, length)).sum(2)[:, None, :, None]
            divisor = counts + self.eps
            taken_tokens, taken_marks = mask[:, None, :, None], counts > 0
        q = self.scale * q
        q_marks, k_marks = (x.unflatten(2, (-1, length)).sum(3) / divisor for x in (q, k))

        def shares(rows: Tensor, columns: Tensor, taken_rows: Tensor | None, taken_columns: Tensor | None) -> Tensor:
            logits = rows @ columns.mT
            if taken_rows is None:
                return logits.softmax(-1)
            taken = taken_rows & taken_columns.mT
            # A row that takes no part has equal shares in the package.
            shares = logits.masked_fill(~taken, torch.finfo(logits.dtype).min).softmax(-1)
            return shares if self.compat else shares.masked_fill(~taken, 0.0)

        from_marks = shares(q, k_marks, taken_tokens, taken_marks)
        inverse = self._inverse(shares(q_marks, k_marks, taken_marks, taken_marks))
        to_marks = shares(q_marks, k, taken_marks, taken_tokens)
        out = from_marks @ (inverse @ (to_marks @ v))
        if self.residual:
            weight, backend = self.res_conv.weight, backends.resolve(self.backend, v, v.shape[3])
            plain = backend == "reference"
            out = out + (token_conv_reference(v, weight) if plain else token_conv(v, weight, backend=backend))
        return out, from_marks, inverse, to_marks

    def _inverse(self, a: Tensor) -> Tensor:
        """Steps towards the pseudo-inverse of a (batch, heads, landmarks, landmarks)."""
        if self.compat:
            start = a.sum(-1).amax() * a.sum(-2).amax()
        else:
            start = a.sum(-2, keepdim=True).amax(-1, keepdim=True).clamp(min=1.0)
        return inverse_reference(a, a.mT / start, self.pinv_iterations)
