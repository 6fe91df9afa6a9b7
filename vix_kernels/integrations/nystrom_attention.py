"""A replacement for `NystromAttention` from nystrom-attention, with the same name, arguments, weights and outputs.

    from vix_kernels.integrations.nystrom_attention import NystromAttention

With compat=True (the default), NystromAttention reproduces three quirks of the original:

- The sequence is padded at the front with all-zero tokens to a multiple of the number of landmarks.
- The initial iterate of the pseudo-inverse depends on the largest row and column sums in the batch, so the output for a
  sample depends on the other samples.
- With a mask, a landmark without valid tokens attends equally to all landmarks, so it affects the pseudo-inverse.
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
from .hosts import Report, patch_package, reason_against_linear
from .hosts import unpatch as unpatch


class NystromAttention(nn.Module):
    """Nystrom attention including its linear layers, equivalent to the module in nystrom-attention 0.0.14.

    Args:
        dim: width of the tokens.
        dim_head, heads: width and number of the heads.
        num_landmarks: number of landmarks. Each landmark is the mean of a segment of the padded sequence. The sequence may have
            fewer tokens than num_landmarks.
        pinv_iterations: number of iterations for the pseudo-inverse.
        residual: whether to add a depthwise convolution of v over the tokens.
        residual_conv_kernel: kernel size of this convolution. Must be odd.
        eps: with a mask, this constant is added to the number of valid tokens in each segment. It is only used in calls that
            run in plain PyTorch (see below).
        dropout: dropout rate of the output.
        compat: if True, return the same results as nystrom-attention. If False, exclude padding, masked tokens and landmarks
            without valid tokens, and compute each sample independently of the other samples.
        backend: as in `vix_kernels.nystrom_attention`.

    Calls that return attention matrices, and calls with a mask if compat is True, compute the attention in plain PyTorch.
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
        """Return the output of the attention layer, (batch, tokens, dim), and the attention matrices if requested.

        Args:
            x: (batch, tokens, dim).
            mask: bool (batch, tokens), or (1, tokens) for all samples, True = valid.
            return_attn: also return the attention matrix of the padded sequence.
            return_attn_matrices: also return the three factors of this matrix: the attention weights from tokens to landmarks,
                the pseudo-inverse, and the attention weights from landmarks to tokens. Takes precedence over return_attn.
        """
        tokens = x.shape[1]
        if mask is not None and mask.dim() == 2 and mask.shape[0] == 1:
            mask = mask.expand(x.shape[0], -1)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            expected, got = f"bool {tuple(x.shape[:2])}", f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"mask: expected {expected} (batch, tokens), True = valid, got {got}")
        padding = -tokens % self.num_landmarks
        if padding:
            x = F.pad(x, (0, 0, padding, 0))
            if mask is None and not self.compat:
                mask = x.new_ones(x.shape[0], tokens, dtype=torch.bool)
            if mask is not None:
                mask = F.pad(mask, (padding, 0), value=False)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)  # this also zeroes q, k and v, because to_qkv has no bias
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in packed_linear(self.to_qkv, x))
        if return_attn or return_attn_matrices or (self.compat and mask is not None):
            # Compute in float32 without autocast: 16-bit products make the pseudo-inverse inaccurate.
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
        out = rearrange(out, "b h n d -> b n (h d)")
        # In training, nystrom-attention also applies dropout to the padding. Do the same, so that the dropout masks are equal.
        out = self.to_out(out)[:, padding:] if self.compat and self.training else self.to_out(out[:, padding:])
        if return_attn_matrices:
            return out, tuple(factors)
        if return_attn:
            from_marks, inverse, to_marks = factors
            return out, from_marks @ (inverse @ to_marks)
        return out

    def _attend_plainly(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the output and the three factors of the attention matrix, in multiplication order."""
        length = q.shape[2] // self.num_landmarks
        divisor, valid_tokens, valid_marks = length, None, None
        if mask is not None:
            counts = mask.unflatten(1, (-1, length)).sum(2)[:, None, :, None]
            divisor = counts + self.eps
            valid_tokens, valid_marks = mask[:, None, :, None], counts > 0
        q = self.scale * q
        q_marks, k_marks = (x.unflatten(2, (-1, length)).sum(3) / divisor for x in (q, k))

        def attend(rows: Tensor, columns: Tensor, valid_rows: Tensor | None, valid_columns: Tensor | None) -> Tensor:
            logits = rows @ columns.mT
            if valid_rows is None:
                return logits.softmax(-1)
            valid = valid_rows & valid_columns.mT
            # In nystrom-attention, the weights of an invalid row are uniform.
            weights = logits.masked_fill(~valid, torch.finfo(logits.dtype).min).softmax(-1)
            return weights if self.compat else weights.masked_fill(~valid, 0.0)

        from_marks = attend(q, k_marks, valid_tokens, valid_marks)
        inverse = self._inverse(attend(q_marks, k_marks, valid_marks, valid_marks))
        to_marks = attend(q_marks, k, valid_marks, valid_tokens)
        out = from_marks @ (inverse @ (to_marks @ v))
        if self.residual:
            weight, backend = self.res_conv.weight, backends.resolve(self.backend, v, v.shape[3])
            plain = backend == "reference"
            out = out + (token_conv_reference(v, weight) if plain else token_conv(v, weight, backend=backend))
        return out, from_marks, inverse, to_marks

    def _inverse(self, a: Tensor) -> Tensor:
        """Return an iterative approximation of the pseudo-inverse of a, (batch, heads, landmarks, landmarks)."""
        if self.compat:
            start = a.sum(-1).amax() * a.sum(-2).amax()
        else:
            start = a.sum(-2, keepdim=True).amax(-1, keepdim=True).clamp(min=1.0)
        return inverse_reference(a, a.mT / start, self.pinv_iterations)


def patch(model: nn.Module, *, backend: str = "auto") -> Report:
    """Replace the attention in a nystrom-attention model, in place. Outputs, weights and weight names do not change.

        report = patch(Nystromformer(...))

    Calls with a mask run in plain PyTorch. `unpatch(model)` undoes the replacement.

    Args:
        model: a model that contains NystromAttention modules of nystrom-attention 0.0.14 or newer.
        backend: as in `vix_kernels.nystrom_attention`.

    Returns:
        a report that lists the replaced layers, and states why other attention layers could not be replaced.

    Raises:
        ValueError: nothing could be replaced. The model is then unchanged.
        ImportError: nystrom-attention is not installed or not supported, or `import nystrom_attention` finds a copy other than
            the installed one.
    """
    return patch_package(
        model, "nystrom-attention", "0.0.14", NystromAttention, backend=backend, reason_against=_reason_against
    )  # fmt: skip


def _reason_against(module: nn.Module) -> str:
    if module.residual and module.res_conv.kernel_size[0] % 2 == 0:
        return f"residual_conv_kernel: expected an odd number of taps, got {module.res_conv.kernel_size[0]}"
    return reason_against_linear(module, "to_qkv")
