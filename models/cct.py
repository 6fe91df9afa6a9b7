"""The compact convolutional transformer (CCT, arXiv:2104.05704), and its variants CCN and CCP from Vision Xformers.

image -> len(strides) * [convolution, relu, max pooling] -> position
      -> depth * [x + attention(norm(x)), n + mlp(n) with n = norm(x)] -> norm -> sequence pooling -> head
"""

from __future__ import annotations

from itertools import islice

from torch import Tensor, nn

from .arguments import check_choice, check_counts, check_flags, check_heads, check_mlp_ratio, check_rates
from .backbone import Backbone
from .drop_path import drop_path_rates
from .layers import Block, init_linear, run_blocks, to_tokens
from .mixers import Mixer, Place
from .positions import POSITIONS, learned_position, rotary_position


class ConvTokenizer(nn.Sequential):
    """Convolutions, each followed by ReLU and max pooling: (B, in_chans, H, W) -> (B, tokens, embed_dim).

    All convolutions except the last have 64 output channels. `strides` contains one stride per convolution. All pooling layers
    have the stride `pool_stride`.
    """

    def __init__(self, in_chans: int, embed_dim: int, kernel: int, strides: tuple[int, ...], pool_stride: int) -> None:
        widths = in_chans, *(64,) * (len(strides) - 1), embed_dim
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            layers += [conv, nn.ReLU(), nn.MaxPool2d(3, pool_stride, padding=1)]
        super().__init__(*layers)

    def grid(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of the token map for images of size `img_size`."""
        for layer in self:
            if not isinstance(layer, nn.ReLU):
                stride = layer.stride if isinstance(layer.stride, int) else layer.stride[0]
                img_size = tuple((side - 1) // stride + 1 for side in img_size)
        return img_size

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(super().forward(x))


class CCT(Backbone):
    """A compact convolutional transformer (CCT, arXiv:2104.05704), whose tokens come from convolutions and max pooling.

    `forward` maps images (B, in_chans, *img_size) to logits (B, num_classes).

    Changes from the original Vision Xformers models:

    - `mlp_ratio` and `drop_path_rate` take effect. The published configurations set `mlp_radio` (sic) and `stochastic_depth`,
      and the original models ignore both.
    - `num_heads` takes effect, and heads can have any width. The original CCP always uses 4 heads, and the original CCN and CCP
      always use heads of width 32.
    - Images need not be square.

    Args:
        mixer: a function that creates the token mixer of a layer; see models/mixers.py.
        kernel_size: kernel size of the tokenizer's convolutions. Must be odd.
        strides: one stride for each convolution.
        pool_stride: stride of the max pooling after each convolution.
        position: "learned" | "rope_1d" | "rope_axial" | "rope_mixed" | "none", as in VisionTransformer.
        global_pool: "seq" = mean of the tokens, weighted by softmax(w^T x) with a learned w; "avg" = mean of the tokens;
            "max" = maximum of the tokens; "" = no pooling (logits for each token).
        drop_path_rate: stochastic depth rate of the last layer. The rates increase linearly from 0 in the first layer.

    For the other arguments, see VisionTransformer.
    """

    pools = ("seq", "avg", "max", "")

    def __init__(
        self,
        mixer: Mixer,
        *,
        img_size: int | tuple[int, int] = 64,
        in_chans: int = 3,
        num_classes: int = 200,
        embed_dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 1.0,
        qkv_bias: bool = False,
        kernel_size: int = 3,
        strides: tuple[int, ...] = (2, 1, 1),
        pool_stride: int = 1,
        position: str = "learned",
        global_pool: str = "seq",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        backend: str = "auto",
    ) -> None:
        super().__init__(img_size=img_size, in_chans=in_chans, drop_rate=drop_rate)
        check_counts(embed_dim=embed_dim, depth=depth, num_heads=num_heads, kernel_size=kernel_size, pool_stride=pool_stride)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if not isinstance(strides, tuple | list) or not strides:
            raise ValueError(f"strides: expected one integer per convolution, got {strides!r}")
        check_counts(**{f"strides[{i}]": stride for i, stride in enumerate(strides)})
        check_flags(qkv_bias=qkv_bias)
        check_rates(proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        check_mlp_ratio(mlp_ratio, embed_dim)
        check_choice(POSITIONS, position=position)
        check_heads(embed_dim, num_heads)
        self.embed_dim = embed_dim

        self.tokenizer = ConvTokenizer(in_chans, embed_dim, kernel_size, tuple(strides), pool_stride)
        self.grid = self.tokenizer.grid(self.img_size)
        self.pos_embed = learned_position(position, self.grid[0] * self.grid[1], embed_dim)
        self.rope = rotary_position(position, self.grid, embed_dim, num_heads, depth)
        options = dict(num_heads=num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, backend=backend)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim, mixer(embed_dim, Place(layer, self.grid, 0), **options), mlp_ratio,
                drop=proj_drop_rate, drop_path=rate, renormalise=True,
            )
            for layer, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )  # fmt: skip
        self.norm = nn.LayerNorm(embed_dim)
        self.attention_pool: nn.Module | None = None
        self.finish(embed_dim, num_classes, global_pool)

    def token_maps(self) -> dict[str, tuple[tuple[int, int], int]]:
        return {"": (self.grid, 0)}

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.global_pool != "seq":
            self.attention_pool = None
        elif self.attention_pool is None:
            # A bias would have no effect: adding a constant to all logits does not change their softmax.
            self.attention_pool = nn.Linear(self.embed_dim, 1, bias=False).to(next(self.blocks.parameters()))
            self.attention_pool.train(self.training)
            init_linear(self.attention_pool)

    def forward_trunk(self, x: Tensor, levels: int | None = None, outputs: list[Tensor] | None = None) -> Tensor:
        x = self.tokenizer(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return run_blocks(islice(self.blocks, levels), x, self.rope, self.grad_checkpointing, outputs)

    def pool(self, x: Tensor) -> Tensor:
        if self.attention_pool is None:
            return super().pool(x)
        return (self.attention_pool(x).float().softmax(dim=1).to(x.dtype).mT @ x).squeeze(1)
