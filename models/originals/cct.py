"""CCT, CCN and CCP: compact transformers with softmax, Nystrom and Performer attention.

image -> n_conv_layers * [convolution, ReLU, max pooling] -> position
      -> num_layers * block -> norm -> sequence pooling (learned weighted mean) -> linear
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .blocks import Mixer
from .mixers import NystromAttention, PerformerAttention, merge_heads, softmax_attention, split_heads


class CompactAttention(Mixer):
    """The attention layer of CCT. The dropout rate of the attention weights is always 0.1."""

    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor, table: None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.proj(merge_heads(softmax_attention(q, k, v, 0.1 if self.training else 0.0, self.backend)))


def nystrom(dim: int, heads: int, backend: str) -> Mixer:
    """Create an attention layer of CCN. The head width is always 32."""
    return NystromAttention(dim, heads=heads, dim_head=32, backend=backend)


def performer(dim: int, heads: int, backend: str) -> Mixer:
    """Create an attention layer of CCP. `heads` is ignored; there are always 4 heads of width 32."""
    return PerformerAttention(dim, heads=4, dim_head=32)


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the branch of each sample with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.rate):
            return x
        keep = 1 - self.rate
        return x * torch.empty(len(x), 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep) / keep


class CompactBlock(nn.Module):
    """A transformer block. The residual connection around the feed-forward network starts from the normalized tokens."""

    def __init__(self, dim: int, hidden: int, attention: Mixer, drop_path: float) -> None:
        super().__init__()
        self.pre_norm, self.self_attn, self.norm1 = nn.LayerNorm(dim), attention, nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop_path(self.self_attn(self.pre_norm(x))))
        return x + self.drop_path(self.linear2(nn.functional.gelu(self.linear1(x))))


class Tokenizer(nn.Module):
    """Convolutional tokenizer that maps images to token maps. `side` returns the side length of the map for a square image."""

    def __init__(
        self, channels: int, dim: int, layers: int, conv: tuple[int, int], strides: Sequence[int], pooling: tuple[int, int, int]
    ) -> None:
        super().__init__()
        kernel, padding = conv
        widths = channels, *[64] * (layers - 1), dim
        self.conv_layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(widths[i], widths[i + 1], kernel, strides[i], padding, bias=False),
                    nn.ReLU(),
                    nn.MaxPool2d(*pooling),
                )
                for i in range(layers)
            )
        )

    def side(self, image: int) -> int:
        for conv, _, pool in self.conv_layers:
            image = (image + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1
            image = (image + 2 * pool.padding - pool.kernel_size) // pool.stride + 1
        return image

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_layers(x)


class CompactClassifier(nn.Module):
    def __init__(self, blocks: list[CompactBlock], tokens: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.positional_emb = nn.Parameter(torch.empty(1, tokens, dim))
        self.attention_pool = nn.Linear(dim, 1)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positional_emb
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        weights = self.attention_pool(x).softmax(1)
        return self.fc((weights.mT @ x).squeeze(1))


class CCT(nn.Module):
    """The original CCT, CCN or CCP, depending on `attention`.

    Maps images (batch, n_input_channels, img_size, img_size) to logits (batch, num_classes). The original models accept
    `mlp_radio` (sic) and `stochastic_depth` but ignore them. The stochastic depth rates always increase linearly from 0 to 0.1.
    Dropout is applied only in CompactAttention.
    """

    def __init__(
        self,
        attention: Callable[[int, int, str], Mixer],
        *,
        img_size: int = 224,
        embedding_dim: int = 768,
        n_input_channels: int = 3,
        n_conv_layers: int = 1,
        kernel_size: int = 7,
        stride: Sequence[int] = (2, 1, 1),
        padding: int = 3,
        pooling_kernel_size: int = 3,
        pooling_stride: int = 2,
        pooling_padding: int = 1,
        num_layers: int,
        num_heads: int,
        num_classes: int,
        positional_embedding: str,
        mlp_ratio: float = 4.0,
        backend: str,
    ) -> None:
        super().__init__()
        if positional_embedding != "learnable":
            raise ValueError(f"positional_embedding: expected 'learnable', as published, got {positional_embedding!r}")
        if len(stride) < n_conv_layers:
            raise ValueError(f"stride: expected one stride per convolution, n_conv_layers = {n_conv_layers}, got {stride}")
        pooling = pooling_kernel_size, pooling_stride, pooling_padding
        self.tokenizer = Tokenizer(
            n_input_channels, embedding_dim, n_conv_layers, (kernel_size, padding), stride, pooling
        )  # fmt: skip
        rates = torch.linspace(0, 0.1, num_layers).tolist()
        hidden = int(embedding_dim * mlp_ratio)
        blocks = [
            CompactBlock(embedding_dim, hidden, attention(embedding_dim, num_heads, backend), rate) for rate in rates
        ]  # fmt: skip
        tokens = self.tokenizer.side(img_size) ** 2
        self.classifier = CompactClassifier(blocks, tokens, embedding_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.tokenizer(x).flatten(2).mT)
