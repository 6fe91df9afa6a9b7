"""The originals built as ViT is: ViT, ViL, ViP, ViN and FNet, their hybrids and rotary forms, and those of the wheel.

    image -> stem -> class token, position -> depth x [x + mixer(norm(x)), x + feed_forward(norm(x))] -> pool -> norm -> linear

`ViX` is the skeleton. The functions below it are its parts: how a mixer is made of the constructor's arguments, and the stems.
Keyword-only parameters of the skeleton and of its mixer are the original's constructor arguments, by their names.
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
    """Row t holds the sines, then the cosines, of t * 10000^(-2i / dim_head); saved with the weights, as the original does."""

    def __init__(self, rows: int, dim_head: int) -> None:
        super().__init__()
        frequencies = 10000 ** (-torch.arange(0, dim_head, 2).float() / dim_head)
        angles = torch.arange(rows).float()[:, None] * frequencies
        self.register_buffer("emb", torch.cat([angles.sin(), angles.cos()], -1))


class ViX(nn.Module):
    """The skeleton: images (batch, channels, *image_size) to logits (batch, num_classes).

    Position 0 is the class token, which the learned position is added to as well. In the rotary models it is the queries and
    keys that carry the position, of the flattened image and one-dimensional. There is no norm of the tokens but the
    head's; pool="mean" is the mean of all tokens, the class token's too. Dropout: `emb_dropout` behind the position,
    `dropout` in the feed-forward networks and, in ViT and ViL, in the attention.

    Args:
        mixer: makes the token mixer of a layer, as `softmax` below.
        stem: makes the embedding, as `patches` below.
        rotary_rows: rows of the rotary table, or None for a learned position.
        trunk: the name of the layers in the state_dict.
        Others: the original's.
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
        **of_mixer: Any,
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
            self.layer_pos_emb = RotaryTable(rotary_rows, of_mixer["dim_head"])
        self.dropout = nn.Dropout(emb_dropout)
        pairs = (
            (
                PreNorm(nn.LayerNorm(dim), mixer(dim, tokens, dropout, backend, **of_mixer)),
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
    """`dropout` does not reach the attention."""
    return PerformerAttention(dim, heads=heads, dim_head=dim_head)


def nystrom(
    dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64, num_landmarks: int = 64
) -> nn.Module:
    """`dropout` does not reach the attention."""
    return NystromAttention(dim, heads=heads, dim_head=dim_head, backend=backend, num_landmarks=num_landmarks)


def nystrom_of_64(dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64) -> nn.Module:
    """HybridViN's: the number of landmarks is no argument."""
    return nystrom(dim, tokens, dropout, backend, heads=heads, dim_head=dim_head)


def nystrom_of_four_heads(dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64) -> nn.Module:
    """ViN's, and those of the rotary models: `heads` is taken and not used, there are always 4."""
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
    """ViL's: one head of keys that are the values too, 64 slots, and projections of 1025 tokens whatever the image."""
    _check_1025(tokens)
    return linformer(dim, tokens, dropout, backend, heads=heads, dim_head=dim_head)


def linformer_of_all_heads(dim: int, tokens: int, dropout: float, backend: str, *, heads: int, dim_head: int = 64) -> nn.Module:
    """HybridViL's, and those of the rotary models: as ViL's, but for as many heads of keys as of queries."""
    _check_1025(tokens)
    return linformer(dim, tokens, dropout, backend, heads=heads, dim_head=dim_head, one_kv_head=False)


def _check_1025(tokens: int) -> None:
    if tokens != 1025:
        raise ValueError(f"image_size: expected 1024 patches, which the original's projections are fixed to, got {tokens - 1}")


def fourier(dim: int, tokens: int, dropout: float, backend: str) -> nn.Module:
    """The repository's FNets take `heads` and `dim_head` and make nothing of them."""
    return FourierMixing(backend)


def patches(channels: int, height: int, width: int, dim: int) -> nn.Module:
    """One linear map of each patch."""
    return nn.Sequential(_cut(height, width), nn.Linear(height * width * channels, dim))


def normed_patches(channels: int, height: int, width: int, dim: int) -> nn.Module:
    """The wheel's, between two norms. The first is over the values of one patch: with patch_size=1, over the 3 colours of a
    pixel, so that any two grey images have the same logits."""
    width_in = height * width * channels
    return nn.Sequential(_cut(height, width), nn.LayerNorm(width_in), nn.Linear(width_in, dim), nn.LayerNorm(dim))


def convolutions(channels: int, height: int, width: int, dim: int) -> nn.Module:
    """The hybrids': three 3 x 3 convolutions with nothing between them, for 3 channels whatever `channels` says."""
    if (height, width) != (1, 1):
        raise ValueError(f"patch_size: expected 1, which the original's widths are fixed to, got {(height, width)}")
    widths = 3, 32, 64, dim
    layers = (nn.Conv2d(i, o, 3, padding=1) for i, o in zip(widths, widths[1:], strict=False))
    return nn.Sequential(*layers, _cut(1, 1))


def _cut(height: int, width: int) -> nn.Module:
    return Rearrange("b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=height, p2=width)
