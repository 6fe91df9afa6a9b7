"""A pyramid of token maps with one stage each, for LeViT and CvT."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from .arguments import check_choice, check_heads
from .backbone import Backbone
from .layers import run_blocks, to_maps, to_tokens
from .mixers import Place
from .positions import POSITIONS, learned_position, rotary_position


class Stage(nn.Module):
    """Blocks on a token map created from the previous stage's map: (B, C, H, W) -> tokens (B, grid[0] * grid[1], dim).

    Args:
        embed: creates the tokens, (B, C, H, W) -> (B, dim, *grid).
        norm: normalizes the tokens before the blocks.
        make_block: creates a block, given its Place.
        first_layer: number of blocks in the previous stages.
        position: as in VisionTransformer. Each stage has separate positions.
    """

    def __init__(
        self,
        embed: nn.Module,
        norm: nn.Module,
        make_block: Callable[[Place], nn.Module],
        *,
        grid: tuple[int, int],
        dim: int,
        num_heads: int,
        depth: int,
        first_layer: int,
        position: str,
    ) -> None:
        super().__init__()
        check_choice(POSITIONS, position=position)
        check_heads(dim, num_heads)
        self.grid = grid
        self.embed, self.norm = embed, norm
        self.pos_embed = learned_position(position, grid[0] * grid[1], dim)
        self.rope = rotary_position(position, grid, dim, num_heads, depth)
        self.blocks = nn.ModuleList(make_block(Place(first_layer + layer, grid, 0)) for layer in range(depth))

    def forward(self, maps: Tensor, checkpointing: bool) -> Tensor:
        x = self.norm(to_tokens(self.embed(maps)))
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return run_blocks(self.blocks, x, self.rope, checkpointing)


class Pyramid(Backbone):
    """Base class of models with `stages`, followed by `norm`."""

    stages: nn.ModuleList
    norm: nn.Module

    def token_maps(self) -> dict[str, tuple[tuple[int, int], int]]:
        return {f"stages.{number}": (stage.grid, 0) for number, stage in enumerate(self.stages)}

    def forward_features(self, x: Tensor) -> Tensor:
        self.check_images(x)
        for number, stage in enumerate(self.stages):
            x = stage(x if number == 0 else to_maps(x, self.stages[number - 1].grid), self.grad_checkpointing)
        return self.norm(x)


def shrinking(img_size: tuple[int, int], strides: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the rows and columns after each stride, for convolutions that pad by half their kernel size."""
    for stride in strides:
        img_size = tuple((side - 1) // stride + 1 for side in img_size)
        yield img_size
