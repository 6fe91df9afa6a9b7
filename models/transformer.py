"""The vision transformer with its token mixer passed in.

    image -> stem -> class token, position -> depth x [x + attention(norm(x)), x + mlp(norm(x))] -> norm -> pool -> head

The stem is one strided convolution (ViT, arXiv:2010.11929) or three of them (the hybrids of Vision Xformers,
arXiv:2107.02239, with the normalisation and the activation that arXiv:2106.14881 asks for). The position is learned,
rotary (RoFormer, arXiv:2104.09864; along both axes, arXiv:2403.13298) or absent. Arguments, methods and parameter names are
timm's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vix_kernels import Rope, rope_1d, rope_axial, rope_mixed, rope_mixed_frequencies

POSITIONS = ("learned", "rope_1d", "rope_axial", "rope_mixed", "none")
POOLS = ("token", "avg")


class PatchStem(nn.Module):
    """One patch, one token: (B, in_chans, H, W) -> (B, tokens, embed_dim)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ConvStem(nn.Sequential):
    """Three convolutions with a total stride of one patch: (B, in_chans, H, W) -> (B, tokens, embed_dim)."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: tuple[int, int]) -> None:
        widths = in_chans, -(-embed_dim // 4), -(-embed_dim // 2), embed_dim
        layers: list[nn.Module] = []
        for i, stride in enumerate(zip(*map(self._strides, patch_size), strict=True)):
            # A kernel of stride + 2 overlaps its neighbours by a pixel on each side, whatever the stride.
            kernel = stride[0] + 2, stride[1] + 2
            layers += [nn.Conv2d(widths[i], widths[i + 1], kernel, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(widths[i + 1]), nn.GELU()]
        super().__init__(*layers[:-1])  # the blocks start from a normalised sum, not from a rectified one

    @staticmethod
    def _strides(patch_size: int) -> tuple[int, int, int]:
        # Small patches are cut late, large ones early, where the maps are wide: 2 = 1*1*2, 8 = 2*2*2, 16 = 4*2*2.
        third = 2 if patch_size % 2 == 0 else 1
        second = 2 if patch_size % 4 == 0 else 1
        return patch_size // (second * third), second, third

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2).transpose(1, 2)


class RotaryPosition(nn.Module):
    """A fixed table: derived, so never saved, and in fp32 whatever the model is cast to."""

    def __init__(self, make: Callable[..., Rope]) -> None:
        super().__init__()
        self._make = make
        self._set(make())

    def _set(self, rope: Rope) -> None:
        self.register_buffer("cos", rope.cos, persistent=False)
        self.register_buffer("sin", rope.sin, persistent=False)
        self.layout = rope.layout

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryPosition:
        super()._apply(fn, recurse)
        # `fn` may have rounded the table to bf16, or moved it off the meta device without its values.
        self._set(self._make(device=self.cos.device))
        return self

    def forward(self, layer: int) -> Rope:
        return Rope(self.cos, self.sin, self.layout)


class MixedRotaryPosition(nn.Module):
    """Learned frequencies for each layer and head."""

    def __init__(self, grid: tuple[int, int], head_dim: int, num_heads: int, depth: int, prefix_tokens: int) -> None:
        super().__init__()
        self.grid, self.prefix_tokens = grid, prefix_tokens
        start = [rope_mixed_frequencies(head_dim, num_heads, seed=layer) for layer in range(depth)]
        self.frequencies = nn.Parameter(torch.stack(start))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixedRotaryPosition:
        before = self.frequencies.detach()
        super()._apply(fn, recurse)
        # Rounded frequencies turn far tokens by wrong angles: move them, do not cast them.
        if self.frequencies.dtype != torch.float32:
            self.frequencies.data = before.to(self.frequencies.device)
        return self

    def forward(self, layer: int) -> Rope:
        return rope_mixed(*self.grid, self.frequencies[layer], prefix_tokens=self.prefix_tokens)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: float, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        x = x + self.attn(self.norm1(x), rope=rope)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A vision transformer; `forward` maps images (B, in_chans, *img_size) to logits (B, num_classes).

    Args:
        attention: makes the token mixer of one layer: `attention(layer, embed_dim, grid, prefix_tokens, num_heads=,
            qkv_bias=, proj_drop=, backend=)`, with the rows and columns of the token map and the tokens in front of it,
            returns a module that is called as `module(x, rope=rope)` with x (B, tokens, embed_dim).
        stem: `PatchStem` or `ConvStem`.
        img_size: height and width, or one number for both; a multiple of `patch_size`.
        num_classes: 0 returns the pooled features.
        mlp_ratio: hidden width of the MLP over `embed_dim`.
        position: "learned" | "rope_1d" (in raster order) | "rope_axial" (rows and columns) | "rope_mixed" (learned directions
            for each layer and head) | "none". The class token is not rotated.
        class_token: put a learned token before the patches.
        global_pool: the head reads the class "token" or the mean of the patches, "avg".
        drop_rate: dropout before the head.
        proj_drop_rate: dropout after the projection of the attention and in the MLP.
        backend: "auto" | "triton" | "torch" | "reference", for the attention.
    """

    def __init__(
        self,
        attention: Callable[..., nn.Module],
        stem: Callable[[int, int, tuple[int, int]], nn.Module] = PatchStem,
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = False,
        position: str = "learned",
        class_token: bool = True,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = _pair("img_size", img_size), _pair("patch_size", patch_size)
        check_counts(in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        for name, flag in {"qkv_bias": qkv_bias, "class_token": class_token}.items():
            if not isinstance(flag, bool):  # the string "false" would be true
                raise ValueError(f"{name}: expected True or False, got {flag!r}")
        for name, rate in {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate}.items():
            if not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {rate!r}")
        if not isinstance(mlp_ratio, int | float) or not 1 <= embed_dim * mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio: expected a number that leaves the MLP a width of 1 or more, got {mlp_ratio!r}")
        if any(size % patch for size, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(f"img_size: expected multiples of patch_size {self.patch_size}, got {self.img_size}")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads {num_heads}, got {embed_dim}")
        if position not in POSITIONS:
            raise ValueError(f"position: expected one of {POSITIONS}, got {position!r}")
        head_dim, multiple = embed_dim // num_heads, 2 if position == "rope_1d" else 4
        if position.startswith("rope") and head_dim % multiple:
            raise ValueError(f"embed_dim: expected a multiple of {multiple} per head for {position}, got {head_dim}")

        self.in_chans, self.embed_dim, self.num_features = in_chans, embed_dim, embed_dim
        self.num_prefix_tokens = int(class_token)
        self.grad_checkpointing = False
        grid = self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]
        tokens = grid[0] * grid[1]

        self.patch_embed = stem(in_chans, embed_dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        learned = position == "learned"
        self.pos_embed = nn.Parameter(torch.empty(1, class_token + tokens, embed_dim)) if learned else None
        self.rope: nn.Module | None = None
        if position == "rope_1d":
            self.rope = RotaryPosition(partial(rope_1d, tokens, head_dim, prefix_tokens=int(class_token)))
        elif position == "rope_axial":
            self.rope = RotaryPosition(partial(rope_axial, *grid, head_dim, prefix_tokens=int(class_token)))
        elif position == "rope_mixed":
            self.rope = MixedRotaryPosition(grid, head_dim, num_heads, depth, int(class_token))

        make = partial(attention, num_heads=num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, backend=backend)
        self.blocks = nn.ModuleList(
            Block(embed_dim, make(layer, embed_dim, grid, self.num_prefix_tokens), mlp_ratio, proj_drop_rate)
            for layer in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool
        self.reset_classifier(num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for token in (self.cls_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)

    def no_weight_decay(self) -> set[str]:
        exempt = {"cls_token", "pos_embed", "rope.frequencies"}
        return {name for name, _ in self.named_parameters() if name in exempt}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head in place; `num_classes` 0 removes it."""
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in POOLS:
            raise ValueError(f"global_pool: expected one of {POOLS}, got {global_pool!r}")
        if global_pool == "token" and not self.num_prefix_tokens:
            raise ValueError('global_pool: expected "avg" with class_token=False, got "token"')
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes: expected an integer >= 0, got {num_classes!r}")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.to(self.norm.weight.device, self.norm.weight.dtype)
        if num_classes:
            _init_linear(self.head)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, *img_size) to normalised tokens (B, prefix + patches, embed_dim)."""
        if x.ndim != 4 or x.shape[1:] != (self.in_chans, *self.img_size):
            expected = f"(batch, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]})"
            raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        for layer, block in enumerate(self.blocks):
            rope = self.rope(layer) if self.rope is not None else None
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_linear(linear: nn.Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {count!r}")


def _pair(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name}: expected a positive integer or two of them, got {size!r}")
    return pair
