"""The original models with the structure of ViT: ViT, ViL, ViP, ViN and FNet, and their hybrid and rotary variants.

    image -> stem -> class token, position -> depth * [x + mixer(norm(x)), x + feed_forward(norm(x))] -> pool -> norm -> linear

`ViX` is the class of all these models. The functions below it create the token mixers and the stems. The constructor of an
original model accepts the keyword-only parameters of `ViX` (except `backend`) and of the function that creates the mixer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from ..arguments import pair
from .blocks import FeedForward, PreNorm, Residuals
from .mixers import FourierMixing, LinformerAttention, NystromAttention, PerformerAttention, SoftmaxAttention

POOLS = ("cls", "mean")


class RotaryTable(nn.Module):
    """A rotary table. Row t contains the sines and then the cosines of t * 10000^(-2i / dim_head) for 0 <= i < dim_head / 2.

    The table is saved with the weights, as in the original.
    """

    def __init__(self, rows: int, dim_head: int) -> None:
        super().__init__()
        frequencies = 10000 ** (-torch.arange(0, dim_head, 2).float() / dim_head)
        angles = torch.arange(rows).float()[:, None] * frequencies
        self.register_buffer("emb", torch.cat([angles.sin(), angles.cos()], -1))


class ViX(nn.Module):
    """The class of all models in this file. Maps images (batch, channels, *image_size) to logits (batch, num_classes).

    The class token is at position 0. In models that are not rotary, all tokens, including the class token, have learned
    position embeddings. Rotary models instead rotate the query and key of each token according to the token's position in the
    sequence. The final norm is in the head, after pooling. pool="mean" averages all tokens, including the class token.
    `emb_dropout` is applied after the position embedding. `dropout` is applied in the feed-forward networks and, in all
    variants of ViT and ViL, in the attention layers.

    Args:
        mixer: a function that creates the token mixer of a layer, such as `softmax` below.
        stem: a function that creates the embedding, such as `patches` below.
        rotary_rows: number of rows in the rotary table, or None for a learned position embedding.
        trunk: the name of the submodule that contains the layers, as it appears in the state_dict.

    The other arguments, except `backend`, are the constructor arguments of the original.
    """

    def __init__(
        self,
        mixer: Callable[..., nn.Module],
        stem: Callable[[int, int, int, int], nn.Module],
        rotary_rows: int | None = None,
        trunk: str = "transformer",
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        mlp_dim: int,
        pool: str = "cls",
        channels: int = 3,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        backend: str,
        **mixer_options: Any,
    ) -> None:
        super().__init__()
        (height, width), patch = pair("image_size", image_size), pair("patch_size", patch_size)
        if height % patch[0] or width % patch[1]:
            raise ValueError(f"image_size: expected multiples of patch_size {patch}, got {(height, width)}")
        if pool not in POOLS:
            raise ValueError(f"pool: expected one of {POOLS}, got {pool!r}")
        tokens = (height // patch[0]) * (width // patch[1]) + 1
        if rotary_rows is not None and tokens > rotary_rows:
            raise ValueError(f"image_size: expected at most the {rotary_rows} tokens of the rotary table, got {tokens}")
        self.image_size, self.pool, self.trunk = (height, width), pool, trunk
        self.to_patch_embedding = stem(channels, *patch, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        if rotary_rows is None:
            self.pos_embedding = nn.Parameter(torch.empty(1, tokens, dim))
            self.layer_pos_emb = None
        else:
            self.pos_embedding = None
            self.layer_pos_emb = RotaryTable(rotary_rows, mixer_options["dim_head"])
        self.dropout = nn.Dropout(emb_dropout)
        pairs = (
            (
                PreNorm(nn.LayerNorm(dim), mixer(dim, tokens, dropout, backend, **mixer_options)),
                PreNorm(nn.LayerNorm(dim), FeedForward(nn.Linear, dim, mlp_dim, dropout)),
            )
            for _ in range(depth)
        )
        self.add_module(trunk, Residuals(pairs))
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2:] != self.image_size:
            height, width = self.image_size
            raise ValueError(f"x: expected shape (batch, channels, {height}, {width}), got {tuple(x.shape)}")
        x = self.to_patch_embedding(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        if self.pos_embedding is not None:
            x = x + self.pos_embedding
        table = None if self.layer_pos_emb is None else self.layer_pos_emb.emb
        x = self.get_submodule(self.trunk)(self.dropout(x), table)
        return self.mlp_head(x[:, 0] if self.pool == "cls" else x.mean(1))


def softmax(dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64) -> nn.Module:
    return SoftmaxAttention(dim, heads=heads, dim_head=dim_head, dropout=dropout, backend=backend)


def performer(dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64) -> nn.Module:
    """Create a Performer attention layer. `dropout` is ignored, as in the original."""
    return PerformerAttention(dim, heads=heads, dim_head=dim_head)


def nystrom(
    dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64, num_landmarks: int = 64
) -> nn.Module:
    """Create a Nystrom attention layer. `dropout` is ignored, as in the original."""
    return NystromAttention(dim, heads=heads, dim_head=dim_head, backend=backend, num_landmarks=num_landmarks)


def nystrom_of_64(dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64) -> nn.Module:
    """Create the mixer of HybridViN. The number of landmarks is always 64."""
    return nystrom(dim, tokens, dropout, backend, heads=heads, dim_head=dim_head)


def nystrom_of_four_heads(dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64) -> nn.Module:
    """Create the mixer of ViN and of the rotary ViNs. `heads` is ignored; there are always 4 heads."""
    return nystrom(dim, tokens, dropout, backend, heads=4, dim_head=dim_head)


def linformer(
    dim: int, tokens: int, dropout: float, backend: str, *,
    heads: int, dim_head: int = 64, k: int = 64, one_kv_head: bool = True, share_kv: bool = True,
) -> nn.Module:  # fmt: skip
    return LinformerAttention(
        dim, tokens=tokens, heads=heads, dim_head=dim_head, dropout=dropout, backend=backend,
        one_kv_head=one_kv_head, share_kv=share_kv, k=k,
    )  # fmt: skip


def linformer_of_one_head(dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64) -> nn.Module:
    """Create the mixer of ViL: one key head with 64 projected keys, which are also the values. `tokens` must be 1025."""
    _check_1025(tokens)
    return linformer(dim, tokens, dropout, backend, heads=heads, dim_head=dim_head)


def linformer_of_all_heads(dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64) -> nn.Module:
    """Create the mixer of HybridViL and of the rotary ViLs: as in ViL, but with as many key heads as query heads."""
    _check_1025(tokens)
    return linformer(dim, tokens, dropout, backend, heads=heads, dim_head=dim_head, one_kv_head=False)


def _check_1025(tokens: int) -> None:
    if tokens != 1025:
        raise ValueError(f"image_size: expected 1024 patches, the only number that the original supports, got {tokens - 1}")


def fourier(dim: int, tokens: int, dropout: float, backend: str) -> nn.Module:
    """Create the mixer of the FNets. FNet and HybridFNet accept `heads` and `dim_head` but ignore them."""
    return FourierMixing(backend)


def patches(channels: int, height: int, width: int, dim: int) -> nn.Module:
    """Create the stem that applies one linear layer to each patch."""
    return nn.Sequential(_cut(height, width), nn.Linear(height * width * channels, dim))


def normed_patches(channels: int, height: int, width: int, dim: int) -> nn.Module:
    """Create the stem of the models in the vision_xformer package: a linear layer between two norms.

    The first norm is over the values of one patch. With patch_size=1, these values are the 3 channels of a pixel. The norm
    removes the brightness of gray pixels, so all gray images have the same logits.
    """
    width_in = height * width * channels
    return nn.Sequential(_cut(height, width), nn.LayerNorm(width_in), nn.Linear(width_in, dim), nn.LayerNorm(dim))


def convolutions(channels: int, height: int, width: int, dim: int) -> nn.Module:
    """Create the stem of the hybrids: three 3 x 3 convolutions without activations.

    As in the original, `channels` is ignored. There are always 3 input channels.
    """
    if (height, width) != (1, 1):
        raise ValueError(f"patch_size: expected 1, the only patch size of the original, got {(height, width)}")
    widths = 3, 32, 64, dim
    layers = (nn.Conv2d(i, o, 3, padding=1) for i, o in zip(widths, widths[1:], strict=False))
    return nn.Sequential(*layers, _cut(1, 1))


def _cut(height: int, width: int) -> nn.Module:
    return Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=height, p2=width)
