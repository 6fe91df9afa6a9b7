"""The vision transformer.

    image -> stem -> class token, position -> depth * [x + attention(norm(x)), x + mlp(norm(x))] -> norm -> pool -> head

The stem has one strided convolution (ViT, arXiv:2010.11929) or three convolutions (the hybrids of Vision Xformers,
arXiv:2107.02239). Arguments, methods and parameters are named as in timm, if timm has them.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from .arguments import check_choice, check_counts, check_flags, check_heads, check_mlp_ratio, check_rates, pair
from .backbone import Backbone, grid_of
from .drop_path import drop_path_rates
from .layers import Block, ConvStem, PatchStem, run_blocks
from .mixers import Mixer, Place
from .positions import POSITIONS, learned_position, rotary_position


class VisionTransformer(Backbone):
    """A vision transformer (ViT, arXiv:2010.11929) with a choice of stems and token mixers.

    `forward` maps images (B, in_chans, *img_size) to logits (B, num_classes).

    Changes from the original Vision Xformers models:

    - The hybrids have normalization and activations between their convolutions. Without these, the convolutions would form a
      single linear map.
    - Patches are not layer-normalized. The vision_xformer package normalizes them, so a one-pixel patch loses its brightness.
    - `num_heads` takes effect. The original ViN and its rotary variants always use 4 heads.
    - The size of the position encoding depends on the image size, and rotary models have no unused position embedding.
    - The class token and the position embedding are initialized with a standard deviation of 0.02 instead of 1.
    - Tokens are normalized before pooling.

    Args:
        mixer: a function that creates the token mixer of a layer; see models/mixers.py.
        stem: `PatchStem` or `ConvStem`.
        img_size: height and width, or one number for both. Must be a multiple of `patch_size`.
        num_classes: number of classes. If 0, the model returns the pooled features.
        mlp_ratio: ratio of the MLP's hidden width to `embed_dim`.
        position: "learned" | "rope_1d" (in raster order) | "rope_axial" (rows and columns) | "rope_mixed" (learned directions
            for each layer and head) | "none". The class token is not rotated.
        class_token: whether to prepend a learned token to the patches.
        global_pool: input of the head: "token" = class token; "avg" = mean of the patch tokens; "max" = maximum of the patch
            tokens; "" = no pooling (logits for each token).
        drop_rate: dropout rate before the head.
        proj_drop_rate: dropout rate after the attention's output projection and in the MLP.
        drop_path_rate: stochastic depth rate of the last layer. The rates increase linearly from 0 in the first layer.
        backend: backend of the attention: "auto" | "triton" | "torch" | "reference".
    """

    pools = ("token", "avg", "max", "")

    def __init__(
        self,
        mixer: Mixer,
        stem: type[PatchStem | ConvStem] = PatchStem,
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
        drop_path_rate: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(img_size=img_size, in_chans=in_chans, drop_rate=drop_rate)
        check_counts(embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        check_flags(qkv_bias=qkv_bias, class_token=class_token)
        check_rates(proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        check_mlp_ratio(mlp_ratio, embed_dim)
        check_choice(POSITIONS, position=position)
        self.patch_size = pair("patch_size", patch_size)
        self.grid = grid_of(self.img_size, patch_size)
        check_heads(embed_dim, num_heads)
        self.embed_dim, self.num_prefix_tokens = embed_dim, int(class_token)
        prefix = self.num_prefix_tokens

        self.patch_embed = stem(in_chans, embed_dim, self.patch_size, self.grid)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02)) if class_token else None
        self.pos_embed = learned_position(position, prefix + self.grid[0] * self.grid[1], embed_dim)
        self.rope = rotary_position(position, self.grid, embed_dim, num_heads, depth, prefix)
        options = dict(num_heads=num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, backend=backend)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, mixer(embed_dim, Place(layer, self.grid, prefix), **options), mlp_ratio,
                drop=proj_drop_rate, drop_path=rate,
            )
            for layer, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )  # fmt: skip
        self.norm = nn.LayerNorm(embed_dim)
        self.finish(embed_dim, num_classes, global_pool)

    def token_maps(self) -> dict[str, tuple[tuple[int, int], int]]:
        return {"": (self.grid, self.num_prefix_tokens)}

    def forward_trunk(self, x: Tensor, levels: int | None = None, outputs: list[Tensor] | None = None) -> Tensor:
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return run_blocks(islice(self.blocks, levels), x, self.rope, self.grad_checkpointing, outputs)
